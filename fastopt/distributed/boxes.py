"""Boxes of saved tensors, read from the files of a folder to where they are needed."""

import math
import os
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastopt.backends import current
from fastopt.backends.interface import BoxInFile
from fastopt.collector import paused_collector
from fastopt.errors import CheckpointError
from fastopt.files.dcp_folder import Wanted, opened
from fastopt.files.dcp_metadata import Chunk, TensorEntry
from fastopt.files.dcp_shards import Known, Shard


class Box(NamedTuple):
    """A part of a saved chunk, and the tensor that it fills."""

    name: str
    """That of the entry."""
    dtype: torch.dtype
    """The saved one."""
    chunk: Chunk
    begin: Sequence[int]
    """Where the box begins within the chunk."""
    target: torch.Tensor
    """A tensor of the box's sizes, detached, of any dtype, strides and device."""


def boxes(name: str, entry: TensorEntry, offsets: Sequence[int], target: torch.Tensor) -> Iterator[Box]:
    """What is to be read to fill a part of a saved tensor.

    Args:
        name: the entry's.
        entry: the tensor.
        offsets: where the part begins in it.
        target: the memory of the part.
    """
    for cut in cuts(entry.chunks, offsets, target.shape):
        part = target
        for dimension, (start, extent) in enumerate(zip(cut.start, cut.sizes, strict=True)):
            if extent < part.shape[dimension]:
                part = part.narrow(dimension, start, extent)
        yield Box(name, entry.dtype, cut.chunk, cut.begin, part)


class Cut(NamedTuple):
    """What a part of a tensor and a saved chunk of it have in common."""

    chunk: Chunk
    begin: tuple[int, ...]
    """Where it begins in the chunk."""
    start: tuple[int, ...]
    """Where it begins in the part."""
    sizes: tuple[int, ...]


def cuts(chunks: Sequence[Chunk], offsets: Sequence[int], sizes: Sequence[int]) -> list[Cut]:
    """What a part of a tensor is made of.

    Args:
        chunks: all of the tensor, in the order of their offsets; they cover each element once.
        offsets: where the part begins.
        sizes: how large it is.

    Note [Chunks of a part]: a tensor has as many chunks as ranks have saved it, and a rank that loads it needs one or
    two of them. They are cut along a dimension or two, and sorted along the first of these, so that a search finds
    where to look. That would miss a chunk which begins before another one and ends after it; but then elements are
    missing, as the chunks that are found have to cover the part, and all chunks are looked at.
    """
    needed = math.prod(sizes)
    if needed == 0:
        return []
    first, last = chunks[0].offsets, chunks[-1].offsets
    dimension = next((d for d, (one, other) in enumerate(zip(first, last, strict=True)) if one != other), None)
    if dimension is None:
        return common(chunks, offsets, sizes)

    def along(chunk: Chunk) -> int:
        return chunk.offsets[dimension]

    begin = along(chunks[bisect_right(chunks, offsets[dimension], key=along) - 1])
    end = bisect_left(chunks, offsets[dimension] + sizes[dimension], key=along)
    found = common(chunks[bisect_left(chunks, begin, key=along) : end], offsets, sizes)
    return found if sum(math.prod(cut.sizes) for cut in found) == needed else common(chunks, offsets, sizes)


def common(chunks: Sequence[Chunk], offsets: Sequence[int], sizes: Sequence[int]) -> list[Cut]:
    """What chunks and a part have in common, one by one."""
    found = []
    for chunk in chunks:
        begin, start, extents = [], [], []
        for offset, size, chunk_offset, chunk_size in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True):
            first = max(offset, chunk_offset)
            length = min(offset + size, chunk_offset + chunk_size) - first
            if length <= 0:
                break
            begin.append(first - chunk_offset)
            start.append(first - offset)
            extents.append(length)
        else:
            found.append(Cut(chunk, tuple(begin), tuple(start), tuple(extents)))
    return found


def read_boxes(folder: Path, wanted: Iterable[Box], known: Known | None = None) -> int:
    """Read boxes, file by file and in the order in which they lie there; all threads read and cast.

    Returns:
        The bytes that were needed.

    Raises:
        CheckpointError: a file is missing, cut short or damaged; the text names file and entry.
        OSError: a file cannot be read; a note names file and entry.
    """
    by_file: dict[str, list[Box]] = defaultdict(list)
    for box in wanted:
        by_file[box.chunk.place.file].append(box)
    known = Known() if known is None else known
    return sum(read_from_file(folder / file, by_file[file], known) for file in sorted(by_file))


def read_from_file(path: Path, in_file: list[Box], known: Known) -> int:
    """Read boxes of one file; returns the bytes that were needed."""
    with paused_collector():
        in_file.sort(key=lambda box: box.chunk.place)
        places = {box.chunk.place: Wanted(box.chunk.place, box.name) for box in in_file}
        shard = opened(path, list(places.values()), known)
        entries = [located(shard, box) for box in in_file]
    try:
        current().read_boxes(entries)
    except OSError as error:
        size = os.fstat(shard.file.descriptor).st_size
        for box in in_file:
            if sum(box.chunk.place[1:]) > size:
                raise CheckpointError(
                    f"{path} was cut short while it was being read: entry {box.name!r} ends at byte "
                    f"{sum(box.chunk.place[1:]):,}, and the file has {size:,}"
                ) from error
        error.add_note(f"while reading {in_file[0].name!r} to {in_file[-1].name!r} from {path}")
        raise
    return sum(box.target.numel() * box.dtype.itemsize for box in in_file)


def located(shard: Shard, box: Box) -> BoxInFile:
    """Where in its file a box is."""
    layout, offset = shard.located(box.chunk.place, box.name, box.dtype, box.chunk.sizes)
    first = layout.first + sum(start * step for start, step in zip(box.begin, layout.stride, strict=True))
    return shard.file.descriptor, offset + first * box.dtype.itemsize, box.dtype, layout.stride, box.target
