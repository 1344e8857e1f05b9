"""Folders of torch.distributed.checkpoint, read and written by one process."""

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from fastopt.errors import CheckpointError
from fastopt.files import dcp_metadata
from fastopt.files.chunked import ChunkedTensor
from fastopt.files.dcp_metadata import Index, Place, TensorEntry
from fastopt.files.dcp_shards import Known, Shard
from fastopt.files.dcp_tree import tree
from fastopt.files.torch_file import SafeGlobal


def read(path: str | os.PathLike[str], allowed: Iterable[SafeGlobal] = ()) -> Any:
    """What a folder holds, on the CPU, however many ranks wrote it; no code of its files runs.

    Tensors are not read yet: they lie in mappings of the files, and what is never looked at is never read. One that was
    saved in several chunks is a `ChunkedTensor`. While they are in use the files must not be cut short, which would
    kill the process (SIGBUS). All other values are read, and in memory.

    Dicts have strings as keys, as torch.distributed.checkpoint saves no others; but the ids of an optimizer's state
    are what its groups say. Of a checkpoint that was saved without flattening it, the keys are those of its entries.

    Args:
        path: the folder.
        allowed: classes and functions that it may name besides those of `torch.load(weights_only=True)`.

    Raises:
        OSError: a file of it cannot be opened.
        pickle.UnpicklingError: it names classes or functions that are not allowed; the text lists them.
        CheckpointError: it is no such folder, or damaged; the text names file and entry.
    """
    folder, allowed = Path(path), list(allowed)
    before = identity(folder)
    index = dcp_metadata.read(folder, allowed)
    with safe_globals(allowed):
        found = read_places(folder, index)
    if identity(folder) != before:
        raise CheckpointError(f"{folder} was replaced while it was being read")
    try:
        return tree((path, content_of(index, name, found)) for name, path in index.paths.items())
    except CheckpointError as error:
        raise CheckpointError(f"{folder / dcp_metadata.NAME} is damaged: {error}") from error


def identity(folder: Path) -> tuple[int, ...] | None:
    """What becomes another when a checkpoint is saved to the folder; every save replaces this file, as the last one."""
    try:
        status = (folder / dcp_metadata.NAME).stat()
    except OSError:
        return None  # an error that reading it finds as well
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def read_places(folder: Path, index: Index) -> dict[Place, Any]:
    """What is at each place, file by file and in their order."""
    by_file: dict[str, list[tuple[Place, str, TensorEntry | None, tuple[int, ...]]]] = defaultdict(list)
    for name, entry in index.entries.items():
        if isinstance(entry, TensorEntry):
            for chunk in entry.chunks:
                by_file[chunk.place.file].append((chunk.place, name, entry, chunk.sizes))
        else:
            by_file[entry.place.file].append((entry.place, name, None, ()))
    known = Known()
    found: dict[Place, Any] = {}
    for file, wanted in by_file.items():
        wanted.sort(key=lambda item: item[:2])
        with opened(folder / file, wanted[0][1], known) as shard:
            shard.check([item[:2] for item in wanted])
            for place, name, tensor, sizes in wanted:
                found[place] = shard.tensor(place, name, tensor.dtype, sizes) if tensor else shard.value(place, name)
    return found


def opened(path: Path, name: str, known: Known) -> Shard:
    """A file that holds an entry."""
    try:
        return Shard(path, known)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing, which holds entry {name!r} and maybe others") from error


def content_of(index: Index, name: str, found: dict[Place, Any]) -> Any:
    """The value or tensor that an entry is."""
    entry = index.entries[name]
    if not isinstance(entry, TensorEntry):
        return found[entry.place]
    if len(entry.chunks) == 1:
        return found[entry.chunks[0].place]
    return ChunkedTensor(entry.size, entry.dtype, [(chunk.offsets, found[chunk.place]) for chunk in entry.chunks])
