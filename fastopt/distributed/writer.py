"""A writer for torch.distributed.checkpoint's own saves."""

import dataclasses
import io
import os
import pickle
import re
import secrets
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from fastopt.backends.interface import BETWEEN
from fastopt.files import dcp_metadata
from fastopt.files.beside import sync_folder
from fastopt.files.dcp_writer import Entry, write_entries
from fastopt.files.staging import write_all
from fastopt.files.torch_file import check_alignment

OWN_FILE = re.compile(r"__\d+_\d+(\.[0-9a-f]{8})?\.distcp|\.([0-9a-f]{8}\.)?metadata\.tmp")
"""Files that torch's writer or this one has made, which go when no checkpoint needs them."""

MOST_GATHERED = 8 << 20
"""Bytes of values that are written at once."""


class FastWriter(StorageWriter):
    """Writes a folder of torch.distributed.checkpoint for `dcp.save(state_dict, storage_writer=FastWriter(path))`.

    Each rank writes one file, which torch's reader reads as its own: all threads cast, write and take checksums, with
    memory of bounded size. The files have new names in every save, and the `.metadata` that leads to them takes the
    place of an old one in one step, as the last thing: if any rank is killed before, the folder still is the checkpoint
    that it was. What no checkpoint needs any more is removed afterwards. All is on the disk when the save is done.

    The ranks have to see one folder, as for torch's own saves with a `.metadata` for all of them; a save without
    collectives (`use_collectives=False`) is refused.

    Args:
        path: the folder; made, with those that it is in, if it is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self.save_id = str(uuid.uuid4())

    @property
    def checkpoint_id(self) -> Path:
        """The folder."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path, not the URL of some other storage."""
        return "://" not in os.fspath(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save."""
        if checkpoint_id:
            self.path = Path(checkpoint_id)
        self.save_id = str(uuid.uuid4())

    def storage_meta(self) -> StorageMeta:
        """What the metadata says of the save."""
        return StorageMeta(checkpoint_id=self.path, save_id=self.save_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin the save on this rank.

        Raises:
            ValueError: each rank would have to write metadata of its own.
        """
        if not kwargs.get("use_collectives", True):
            raise ValueError("FastWriter: without collectives (use_collectives=False) no rank knows when all are done")
        check_alignment()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank a file that was not there before."""
        token = secrets.token_hex(4)
        return [dataclasses.replace(plan, storage_data=f"__{rank}_0.{token}.distcp") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what is planned for this rank."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self.written(plan, planner) if plan.items else [])
        return done

    def written(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        """Write the file of this rank, and say what is where in it."""
        values = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        path = self.path / plan.storage_data
        with open(path, "xb", buffering=0) as file:
            try:
                places = write_values(file.fileno(), (bytes_of(item, planner) for item in values))
                end = sum(places[-1]) if places else 0
                places += write_entries(file.fileno(), entries(tensors, planner), {}, end)
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return [
            WriteResult(item.index, length, _StorageInfo(path.name, offset, length))
            for item, (offset, length) in zip([*values, *tensors], places, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make all that was written the checkpoint, and remove what it replaces."""
        places: dict[MetadataIndex, _StorageInfo] = {one.index: one.storage_data for rank in results for one in rank}
        metadata.version, metadata.storage_data, metadata.storage_meta = (
            CURRENT_DCP_VERSION,
            places,
            self.storage_meta(),
        )
        temporary = self.path / f".{secrets.token_hex(4)}{dcp_metadata.NAME}.tmp"
        try:
            with open(temporary, "xb") as file:
                pickle.dump(metadata, file)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.path)
            os.replace(temporary, self.path / dcp_metadata.NAME)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(self.path)
        remove_unused(self.path, {place.relative_path for place in places.values()})


def entries(items: Iterable[WriteItem], planner: SavePlanner) -> Iterator[Entry]:
    """Tensors as they are asked for."""
    for item in items:
        yield Entry(item.index, item.tensor_data, planner.resolve_data(item).detach())


def bytes_of(item: WriteItem, planner: SavePlanner) -> memoryview:
    """A value as a file of `torch.save`."""
    content = planner.resolve_data(item)
    assert isinstance(content, io.BytesIO)
    return content.getbuffer()


def write_values(fd: int, contents: Iterable[memoryview]) -> list[tuple[int, int]]:
    """Write files of `torch.save` one after the other, and say where they are: offset and bytes."""
    places: list[tuple[int, int]] = []
    gathered, begin = bytearray(), 0
    for content in contents:
        gathered += bytes(-len(gathered) % BETWEEN)
        places.append((begin + len(gathered), len(content)))
        gathered += content
        if len(gathered) > MOST_GATHERED:
            gathered += bytes(-len(gathered) % BETWEEN)
            write_all(fd, memoryview(gathered), begin)
            begin += len(gathered)
            gathered = bytearray()
    write_all(fd, memoryview(gathered), begin)
    return places


def remove_unused(folder: Path, used: set[str]) -> None:
    """Remove files of earlier saves to a folder, and of those that were never finished."""
    for name in os.listdir(folder):
        if name not in used and OWN_FILE.fullmatch(name):
            (folder / name).unlink(missing_ok=True)
