"""Boxes of saved tensors, read from the files of a folder to where they are needed."""

import os
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
        entry: the tensor, whose chunks cover each element once.
        offsets: where the part begins in it.
        target: the memory of the part.
    """
    if target.numel() == 0:
        return
    for chunk in entry.chunks:
        begin, part = [], target
        for dimension, (start, extent, chunk_start, chunk_extent) in enumerate(
            zip(offsets, target.shape, chunk.offsets, chunk.sizes, strict=True)
        ):
            first, last = max(start, chunk_start), min(start + extent, chunk_start + chunk_extent)
            if first >= last:
                break
            begin.append(first - chunk_start)
            if last - first < extent:
                part = part.narrow(dimension, first - start, last - first)
        else:
            yield Box(name, entry.dtype, chunk, begin, part)


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
