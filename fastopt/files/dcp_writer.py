"""A folder of torch.distributed.checkpoint that one process writes, with bounded memory."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import find_state_dict_object

from fastopt.backends import current
from fastopt.backends.interface import BETWEEN
from fastopt.collector import paused_collector
from fastopt.files.dcp_metadata import KeyPath
from fastopt.files.dcp_tree import name_of

FILE = f"__0_0{DEFAULT_SUFFIX}"
"""The file of the first rank, by torch's name for it."""

MOST_ENTRIES = 8192
"""Entries that are written together."""

MOST_BYTES = 256 * 2**20
"""Bytes of them, but for a single one that is larger."""

MOST_COPIED = 32 * 2**20
"""Bytes of those that are copied first: out of a larger storage, or from a device. One may be larger as well."""

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
PLAIN_VALUES = (int, float, bool, str, bytes, type(None), list, tuple, dict, torch.Size, torch.dtype)
"""Types of which torch knows no part that another process may hold."""


def save(folder: Path, content: Iterable[tuple[KeyPath, Any]], dtypes: Mapping[int, torch.dtype]) -> None:
    """Fill an empty folder with a checkpoint, which is on the disk afterwards but for the names of its files.

    Args:
        folder: the folder.
        content: paths and values, as `leaves` gives them.
        dtypes: the dtype that a tensor gets in the file, by its `id`; all others keep theirs.

    Raises:
        ValueError: two entries have the same name, or a part of a tensor belongs to another process.
        OSError: a file cannot be written.
    """
    with paused_collector():
        entries, paths = planned(content, dtypes)
        metadata = Metadata(metadata_of(entries), planner_data=paths)
        check_complete(metadata)
    with open(folder / FILE, "wb") as file:
        places = write_entries(file.fileno(), entries, dtypes)
        os.fsync(file.fileno())
    with paused_collector():
        writer = FileSystemWriter(folder)
        writer.set_up_storage_writer(is_coordinator=True)
        writer.finish(metadata, [list(map(written, entries, places))])


def written(entry: "Entry", place: tuple[int, int]) -> WriteResult:
    """What torch's writer says of an entry that is in the file."""
    offset, length = place
    return WriteResult(entry.index, length, _StorageInfo(FILE, offset, length))


class Entry:
    """A tensor, a part of one, or a value, each written for itself."""

    __slots__ = ("data", "index", "value")

    def __init__(self, index: MetadataIndex, data: TensorWriteData | None, value: Any) -> None:
        self.index = index
        self.data = data
        """What the metadata says of a tensor."""
        self.value = value
        """What `torch.save` saves."""


def planned(
    content: Iterable[tuple[KeyPath, Any]], dtypes: Mapping[int, torch.dtype]
) -> tuple[list[Entry], dict[str, KeyPath]]:
    """The entries of a content, as torch's planner has them, and their paths by name."""
    entries: list[Entry] = []
    paths: dict[str, KeyPath] = {}
    write_data = known_write_data(dtypes)
    for path, value in content:
        name = name_of(path)
        if name in paths:
            raise ValueError(f"two entries of the content would have the name {name!r}")
        paths[name] = path
        if type(value) in PLAIN_TENSORS:
            data = write_data(value)
            entries.append(Entry(MetadataIndex(name, data.chunk.offsets, 0), data, value))
        elif type(value) in PLAIN_VALUES:
            entries.append(Entry(MetadataIndex(name), None, value))
        else:
            entries += entries_of_torchs(name, value)
    return entries, paths


def known_write_data(dtypes: Mapping[int, torch.dtype]) -> Callable[[torch.Tensor], TensorWriteData]:
    """What the metadata says of a plain tensor: one object for all that are alike, which takes less time and memory."""
    known: dict[tuple[Any, ...], TensorWriteData] = {}

    def write_data(tensor: torch.Tensor) -> TensorWriteData:
        dtype = dtypes.get(id(tensor), tensor.dtype)
        key = (dtype, tensor.shape, tensor.layout, tensor.requires_grad, tensor.is_pinned())
        if (data := known.get(key)) is None:
            properties = TensorProperties.create_from_tensor(tensor)
            properties.dtype = dtype
            chunk = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)
            data = known[key] = TensorWriteData(chunk, properties, tensor.shape)
        return data

    return write_data


def entries_of_torchs(name: str, value: Any) -> Iterator[Entry]:
    """The entries of something that torch may hold in parts, as a DTensor."""
    plan = create_default_local_save_plan({name: value}, is_coordinator=True)
    for number, item in enumerate(plan.items):
        if item.tensor_data is None:
            yield Entry(item.index, None, value)
        else:
            index = MetadataIndex(name, item.index.offset, number)
            yield Entry(index, item.tensor_data, find_state_dict_object({name: value}, index))


def metadata_of(entries: Iterable[Entry]) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    """What the metadata says of entries, by their names."""
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for entry in entries:
        name, data = entry.index.fqn, entry.data
        if data is None:
            found[name] = BytesStorageMetadata()
        else:
            tensor = found.get(name)
            if not isinstance(tensor, TensorStorageMetadata):
                tensor = found[name] = TensorStorageMetadata(data.properties, data.size, [])
            tensor.chunks.append(data.chunk)
    return found


def check_complete(metadata: Metadata) -> None:
    """Raise if this process holds a part of a tensor alone, as it does of a DTensor."""
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and [chunk.sizes for chunk in entry.chunks] != [entry.size]:
            here, all_of_it = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
            if here != all_of_it:
                raise ValueError(
                    f"this process holds {here:,} of the {all_of_it:,} elements of {name!r}; save a sharded state with "
                    "torch.distributed.checkpoint from all of its processes"
                )


def write_entries(
    fd: int, entries: Iterable[Entry], dtypes: Mapping[int, torch.dtype], start: int = 0
) -> list[tuple[int, int]]:
    """Write entries to a file, which holds nothing from `start` on, and say where they are: offset and bytes."""
    places: list[tuple[int, int]] = []
    for batch in batches(entries, dtypes):
        end = sum(places[-1]) if places else start
        try:
            contents = [content for _, content in batch]
            places += current().write_torch_files(fd, contents, dtypes, end + -end % BETWEEN)
        except Exception as error:
            first, last = batch[0][0].index.fqn, batch[-1][0].index.fqn
            error.add_note(f"while writing {first!r}" + (f" to {last!r}" if last != first else ""))
            raise
    return places


def batches(entries: Iterable[Entry], dtypes: Mapping[int, torch.dtype]) -> Iterator[list[tuple[Entry, Any]]]:
    """Entries with what is to be written for them, as many as are written together."""
    batch: list[tuple[Entry, Any]] = []
    size = copied = 0
    for entry in entries:
        content = entry.value
        if isinstance(content, torch.Tensor):
            size += content.nbytes
            if dtypes.get(id(content), content.dtype) is content.dtype:  # else it is cast piece by piece where it lies
                is_copied = not is_compact(content)
                content = content.detach().to("cpu", copy=is_copied)
                copied += content.nbytes * is_copied
        batch.append((entry, content))
        if len(batch) == MOST_ENTRIES or size > MOST_BYTES or copied > MOST_COPIED:
            yield batch
            batch, size, copied = [], 0, 0
    if batch:
        yield batch


def is_compact(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on the CPU, in a storage of its own size, which is written as it is."""
    is_here = type(tensor) in PLAIN_TENSORS and tensor.device.type == "cpu"
    return is_here and tensor.untyped_storage().nbytes() == tensor.nbytes
