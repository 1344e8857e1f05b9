"""Which chunks a part of a tensor is made of, held to torch's planner."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fastopt.distributed import boxes
from fastopt.distributed.boxes import cuts
from fastopt.files.dcp_metadata import Chunk, Place

Box = tuple[tuple[int, ...], tuple[int, ...]]


def grid(*cut: list[int]) -> list[Box]:
    """Boxes between such positions along each dimension."""
    spans = [list(itertools.pairwise(positions)) for positions in cut]
    return [
        (tuple(begin for begin, _ in box), tuple(end - begin for begin, end in box))
        for box in itertools.product(*spans)
    ]


SPIRAL: list[Box] = [((0, 0), (2, 7)), ((0, 7), (7, 2)), ((2, 0), (7, 2)), ((7, 2), (2, 7)), ((2, 2), (5, 5))]
"""Chunks around one another, as no placement cuts them."""

TILINGS = {
    "one": [((0, 0), (9, 9))],
    "rows": grid([0, 3, 6, 9], [0, 9]),
    "columns": grid([0, 9], [0, 1, 5, 9]),
    "a grid": grid([0, 4, 8, 9], [0, 2, 9]),
    "halves of rows": [*grid([0, 4], [0, 9]), *grid([4, 9], [0, 3, 9])],
    "a spiral": SPIRAL,
}


def by_torch(tiling: list[Box], part: Box) -> set[Any]:
    saved = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in tiling]
    entry = TensorStorageMetadata(TensorProperties(), torch.Size([9, 9]), saved)
    items = create_read_items_for_chunk_list("x", entry, [ChunkStorageMetadata(*map(torch.Size, part))])
    return {
        (tuple(item.storage_index.offset or ()), *map(tuple, (item.storage_offsets, item.dest_offsets, item.lengths)))
        for item in items
    }


@pytest.mark.parametrize("tiling", TILINGS)
def test_every_part_is_made_of_what_torch_reads(tiling: str) -> None:
    chunks = sorted(Chunk(offsets, sizes, Place("file", 0, 0)) for offsets, sizes in TILINGS[tiling])
    for rows, columns in itertools.product(itertools.combinations(range(10), 2), repeat=2):
        part = (rows[0], columns[0]), (rows[1] - rows[0], columns[1] - columns[0])
        found = [(cut.chunk.offsets, cut.begin, cut.start, cut.sizes) for cut in cuts(chunks, *part)]
        assert len(found) == len(set(found))
        assert set(found) == by_torch(TILINGS[tiling], part)


def test_numbers_and_nothing() -> None:
    number = [Chunk((), (), Place("file", 0, 0))]
    assert [cut.sizes for cut in cuts(number, (), ())] == [()]
    assert cuts([Chunk((0,), (0,), Place("file", 0, 0))], (0,), (0,)) == []
    assert cuts([Chunk((0,), (5,), Place("file", 0, 0))], (5,), (0,)) == []


def test_few_of_many_chunks_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    common = boxes.common
    monkeypatch.setattr(boxes, "common", lambda chunks, *part: looked_at.append(len(chunks)) or common(chunks, *part))
    positions = sorted(random.Random(0).sample(range(1, 10**6), 999))
    chunks = [Chunk(*box, Place("file", 0, 0)) for box in grid([0, *positions, 10**6], [0, 8])]
    for start in range(0, 10**6 - 100, 9973):
        assert sum(cut.sizes[0] for cut in cuts(chunks, (start, 0), (100, 8))) == 100
    assert max(looked_at) <= 5
