"""Planning alone, at a scale that no machine here has: `python -m benchmarks.planning [--parameters N] [--ranks N]`.

AdamW's state of a model of many parameters, each sharded by rows over all ranks, as `fully_shard` does it, saved by so
many ranks and loaded by another number of them. No tensor is there, and no file: what is measured is how long a rank
thinks about what to read, and what is counted is what the ranks would read from where. A rank is planned for all
parameters, and all ranks are for a sample of the parameters; the parameters repeat a pattern of shapes, of which the
sample has the same shares.
"""

import argparse
import itertools
import json
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from benchmarks.machine import this_machine
from benchmarks.runner import ROOT
from fastopt.distributed.boxes import cuts
from fastopt.files import dcp_metadata
from fastopt.files.dcp_metadata import Chunk, Place

SHAPES = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (4096,), (4096,))
"""Those of a layer of a language model: attention, feed-forward, norms."""
MOMENTS = 2
ITEM = 4
"""Bytes of an element."""
STEP = 1216
"""Bytes of a step in a file, all of which are read: torch.save's zip around 4."""
SAMPLE = 64
"""Parameters that all ranks are planned for; a multiple of the pattern."""
STOCK_SAMPLE = 400
"""Parameters that torch's planner is asked about, for its time a parameter."""


class Part(NamedTuple):
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def part_of(rank: int, ranks: int, shape: tuple[int, ...]) -> Part:
    """The rows of a rank, as torch cuts them: all ranks have as many, but for the last ones."""
    each = -(-shape[0] // ranks)
    begin = min(rank * each, shape[0])
    rest = (0,) * (len(shape) - 1)
    return Part((begin, *rest), (min(begin + each, shape[0]) - begin, *shape[1:]))


def chunks_of(shape: tuple[int, ...], ranks: int) -> list[Chunk]:
    """What the ranks have saved of a tensor."""
    parts = (part_of(rank, ranks, shape) for rank in range(ranks))
    return [Chunk(*part, Place(f"__{rank}_0.distcp", 0, 0)) for rank, part in enumerate(parts) if part.sizes[0]]


def elements(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())


@dataclass
class Findings:
    """What a simulation found; times in seconds, sizes in bytes."""

    parameters: int
    saved_by: int
    loaded_by: int
    planning_of_a_rank: float
    planning_of_a_rank_by_torch: float
    """From a sample."""
    reads_of_a_rank: float
    """Boxes and steps, on average."""
    bytes_of_a_rank: float
    bytes_of_the_fullest_rank: float
    chunk_bytes_of_a_rank: float
    """What a reader of whole chunks, as torch's, would read."""
    duplicates_of_moments: int
    """Bytes of moments that are read more than once."""
    reads_of_steps: int
    """By all ranks: they are dealt out, see Note [Shared reads] in fastopt/distributed/sharing.py."""
    reads_of_steps_by_each: int
    """What they would be otherwise, as they are for torch's planner."""
    bytes_of_a_file: float
    bytes_of_the_busiest_file: float
    most_ranks_at_a_file: int
    metadata_chunks: int
    metadata_bytes: float
    """From a sample, as are the times to read it."""
    metadata_seconds: float
    metadata_seconds_by_torch: float


def simulate(parameters: int, saved_by: int, loaded_by: int, sampled_ranks: int) -> Findings:
    chunks = {shape: chunks_of(shape, saved_by) for shape in set(SHAPES)}
    shapes = list(itertools.islice(itertools.cycle(SHAPES), parameters))

    started = time.perf_counter()
    ranks = range(0, loaded_by, max(1, loaded_by // sampled_ranks))
    for rank in ranks:
        plan(rank, loaded_by, shapes, chunks)
    planning = (time.perf_counter() - started) / len(ranks)

    scale = parameters / SAMPLE
    reads, own, whole, files, readers = 0, Counter[int](), 0, Counter[str](), Counter[str]()
    for rank in range(loaded_by):
        touched = set()
        for chunk, sizes in plan(rank, loaded_by, list(itertools.islice(itertools.cycle(SHAPES), SAMPLE)), chunks):
            nbytes = elements(sizes) * ITEM
            reads, whole = reads + 1, whole + elements(chunk.sizes) * ITEM
            own[rank] += nbytes
            files[chunk.place.file] += nbytes
            touched.add(chunk.place.file)
        readers.update(touched)
    needed = MOMENTS * sum(map(elements, itertools.islice(itertools.cycle(SHAPES), SAMPLE))) * ITEM
    total_chunks = MOMENTS * sum(len(chunks[shape]) for shape in shapes)
    size, ours, torchs = metadata_costs(chunks, saved_by)
    steps = parameters / loaded_by
    return Findings(
        parameters,
        saved_by,
        loaded_by,
        planning,
        planning_by_torch(loaded_by, chunks) * parameters,
        reads * scale / loaded_by + steps,
        own.total() * scale / loaded_by + steps * STEP,
        max(own.values()) * scale + steps * STEP,
        whole * scale / loaded_by + steps * STEP,
        int((own.total() - needed) * scale),
        parameters,
        parameters * loaded_by,
        files.total() * scale / len(files),
        max(files.values()) * scale,
        max(readers.values()),
        total_chunks,
        size * total_chunks,
        ours * total_chunks,
        torchs * total_chunks,
    )


def plan(
    rank: int, ranks: int, shapes: list[tuple[int, ...]], chunks: dict[tuple[int, ...], list[Chunk]]
) -> Iterator[tuple[Chunk, tuple[int, ...]]]:
    """What a rank reads: the chunk, and how much of it."""
    found = []
    for shape in shapes:
        part = part_of(rank, ranks, shape)
        for _ in range(MOMENTS):
            found += [(cut.chunk, cut.sizes) for cut in cuts(chunks[shape], *part)]
    return iter(found)


def planning_by_torch(ranks: int, chunks: dict[tuple[int, ...], list[Chunk]]) -> float:
    """Seconds of torch's planner for a parameter."""
    entries = {
        shape: TensorStorageMetadata(
            TensorProperties(),
            torch.Size(shape),
            [ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes)) for one in saved],
        )
        for shape, saved in chunks.items()
    }
    started = time.perf_counter()
    for shape in itertools.islice(itertools.cycle(SHAPES), STOCK_SAMPLE):
        part = ChunkStorageMetadata(*map(torch.Size, part_of(ranks // 2, ranks, shape)))
        for _ in range(MOMENTS):
            create_read_items_for_chunk_list("name", entries[shape], [part])
    return (time.perf_counter() - started) / STOCK_SAMPLE


def metadata_costs(chunks: dict[tuple[int, ...], list[Chunk]], saved_by: int) -> tuple[float, float, float]:
    """Of a chunk in `.metadata`: bytes, and seconds to read it, through fastopt and by pickle alone, as torch does."""
    entries, places = {}, {}
    for number, shape in enumerate(SHAPES):
        name = f"state.model.layers.{number}.weight.exp_avg"
        saved = [ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes)) for one in chunks[shape]]
        entries[name] = TensorStorageMetadata(TensorProperties(), torch.Size(shape), saved)
        for one in chunks[shape]:
            places[MetadataIndex(name, one.offsets)] = _StorageInfo(one.place.file, len(places) * 10**6, 10**6)
    content = pickle.dumps(Metadata(entries, {name: (name,) for name in entries}, places))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / dcp_metadata.NAME).write_bytes(content)
        ours = best(partial(dcp_metadata.read, Path(folder)))
    return len(content) / len(places), ours / len(places), best(partial(pickle.loads, content)) / len(places)


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def text(found: Findings) -> str:
    def gb(nbytes: float) -> str:
        return f"{nbytes / 1e9:,.2f} GB"

    rows = {
        "planning of a rank": f"{found.planning_of_a_rank:.1f} s",
        "by torch's planner": f"{found.planning_of_a_rank_by_torch:,.0f} s",
        "reads of a rank": f"{found.reads_of_a_rank:,.0f}",
        "bytes read by a rank": f"{gb(found.bytes_of_a_rank)}, at most {gb(found.bytes_of_the_fullest_rank)}",
        "by a reader of whole chunks": gb(found.chunk_bytes_of_a_rank),
        "moments read more than once": gb(found.duplicates_of_moments),
        "reads of steps, all ranks": f"{found.reads_of_steps:,}; by each rank: {found.reads_of_steps_by_each:,}",
        "bytes read from a file": f"{gb(found.bytes_of_a_file)}, at most {gb(found.bytes_of_the_busiest_file)}",
        "ranks that read a file": f"at most {found.most_ranks_at_a_file}",
        "chunks in .metadata": f"{found.metadata_chunks:,}",
        "its size": gb(found.metadata_bytes),
        "reading it": f"{found.metadata_seconds:,.0f} s, by pickle {found.metadata_seconds_by_torch:,.0f} s",
    }
    head = f"{found.parameters:,} parameters, saved by {found.saved_by:,} ranks, loaded by {found.loaded_by:,}"
    return "\n".join([head, *(f"  {name:<28} {value}" for name, value in rows.items()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=1024, help="that save; they load as well, and so do 3/4 of them")
    parser.add_argument("--group", type=int, default=64, help="ranks of a group where groups hold the same (HSDP)")
    parser.add_argument("--sampled-ranks", type=int, default=4, help="that are planned for all parameters")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "planning.json")
    arguments = parser.parse_args()
    found = []
    ranks, group = arguments.ranks, arguments.group
    for saved_by, loaded_by in ((ranks, ranks), (ranks, ranks * 3 // 4), (group, group)):
        found.append(simulate(arguments.parameters, saved_by, loaded_by, arguments.sampled_ranks))
        sys.stdout.write(text(found[-1]))
        sys.stdout.flush()
    content = {"machine": asdict(this_machine()), "findings": list(map(asdict, found))}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
