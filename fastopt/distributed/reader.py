"""A reader for torch.distributed.checkpoint's own loads."""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future
from torch.serialization import safe_globals

from fastopt.distributed.boxes import Box, read_boxes
from fastopt.files import dcp_metadata
from fastopt.files.dcp_folder import Wanted, opened
from fastopt.files.dcp_metadata import Chunk, Index, Place, TensorEntry
from fastopt.files.dcp_shards import Known
from fastopt.files.torch_file import SafeGlobal


class FastReader(FileSystemReader):
    """Reads a folder of torch.distributed.checkpoint for `dcp.load(state_dict, storage_reader=FastReader(path))`.

    Each byte range that a rank needs is read once, straight to where it belongs and cast on the way, by all threads and
    in the order of the files; of a chunk of which only a part is needed, only the part. torch's reader unpickles every
    chunk as a whole. No memory is needed but some 256 KiB a thread. No code of the files runs: what
    `torch.load(weights_only=True)` would not read is refused.

    Args:
        path: the folder.
        safe_globals: classes and functions that it may name besides, as in `fastopt.load`.

    In a load, it raises:
        CheckpointError: a file is missing, cut short or damaged; the text names file and entry.
        UnsafeGlobalsError: the folder names classes or functions that are not allowed.

    torch hands these to every rank, in a `CheckpointException` that names the ranks.
    """

    def __init__(self, path: str | os.PathLike[str], *, safe_globals: Iterable[SafeGlobal] = ()) -> None:
        super().__init__(path)
        self.safe_globals = list(safe_globals)
        self.chunks: dict[tuple[str, tuple[int, ...]], tuple[torch.dtype, Chunk]] = {}
        """By the name of an entry, and the offsets of its chunk."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder says of itself, as torch has it."""
        index = dcp_metadata.read(Path(self.path), self.safe_globals)
        self.chunks = {
            (name, chunk.offsets): (entry.dtype, chunk)
            for name, entry in index.entries.items()
            if isinstance(entry, TensorEntry)
            for chunk in entry.chunks
        }
        metadata = as_torchs(index)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what is planned for this rank."""
        known, folder = Known(), Path(self.path)
        values = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        self.read_values(folder, values, planner, known)
        targets = []
        wanted = []
        for item in plan.items:
            if item.type != LoadItemType.BYTE_IO:
                target = planner.resolve_tensor(item).detach()
                targets.append((item, target))
                wanted.append(self.box(item, target))
        read_boxes(folder, (box for box in wanted if box.target.numel()), known)
        for item, target in targets:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def box(self, item: ReadItem, target: torch.Tensor) -> Box:
        """What is to be read for an item."""
        dtype, chunk = self.chunks[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
        if target.shape != item.lengths:
            raise ValueError(
                f"entry {item.storage_index.fqn!r}: {list(item.lengths)} is to be read into {list(target.shape)}"
            )
        return Box(item.storage_index.fqn, dtype, chunk, item.storage_offsets, target)

    def read_values(self, folder: Path, items: list[ReadItem], planner: LoadPlanner, known: Known) -> None:
        """Hand values to the planner, which unpickles them with all that they name, once that is known to be safe."""
        by_file: dict[str, list[tuple[Wanted, ReadItem]]] = {}
        for item in items:
            info = self.storage_data[item.storage_index]
            wanted = Wanted(Place(info.relative_path, info.offset, info.length), item.storage_index.fqn)
            by_file.setdefault(info.relative_path, []).append((wanted, item))
        for file, in_file in by_file.items():
            in_file.sort(key=lambda pair: pair[0].place)
            shard = opened(folder / file, [wanted for wanted, _ in in_file], known)
            for wanted, item in in_file:
                with safe_globals(self.safe_globals):
                    shard.value(wanted.place, wanted.name)
                content = os.pread(shard.file.descriptor, wanted.place.length, wanted.place.offset)
                planner.load_bytes(item, io.BytesIO(content))


def as_torchs(index: Index) -> Metadata:
    """Metadata in torch's own classes, made of what was checked."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, entry in index.entries.items():
        if isinstance(entry, TensorEntry):
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            entries[name] = TensorStorageMetadata(TensorProperties(entry.dtype), torch.Size(entry.size), chunks)
            for number, chunk in enumerate(entry.chunks):
                places[MetadataIndex(name, chunk.offsets, number)] = _StorageInfo(*chunk.place)
        else:
            entries[name] = BytesStorageMetadata()
            places[MetadataIndex(name)] = _StorageInfo(*entry.place)
    return Metadata(entries, planner_data=dict(index.paths), storage_data=places)
