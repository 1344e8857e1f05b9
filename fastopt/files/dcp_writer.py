"""What torch.distributed.checkpoint calls a planner and a storage writer, for one process and bounded memory."""

import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fastopt.files.dcp_tree import leaves, name_of

ALIGNMENT = 64
"""Bytes that tensors in a file are aligned to, as the zip files are that hold them."""


def save(folder: Path, content: Mapping[str, Any]) -> None:
    """Fill an empty folder with a checkpoint, which is on the disk afterwards but for the names of its files.

    Raises:
        ValueError: two entries have the same name, or a part of a tensor belongs to another process.
        OSError: a file cannot be written.
    """
    # dcp.save does the same for one process, but warns that there is one, and hides what failed in a text.
    writer, planner = Writer(folder), Planner()
    writer.set_up_storage_writer(is_coordinator=True)
    planner.set_up_planner(content, writer.storage_meta(), is_coordinator=True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local])
    check_complete(metadata)
    [plan] = writer.prepare_global_plan(plans)
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [results])


def check_complete(metadata: Metadata) -> None:
    """Raise if this process holds a part of a tensor alone, as it does of a DTensor."""
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            here, all_of_it = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
            if here != all_of_it:
                raise ValueError(
                    f"this process holds {here:,} of the {all_of_it:,} elements of {name!r}; save a sharded state with "
                    "torch.distributed.checkpoint from all of its processes"
                )


class Planner(DefaultSavePlanner):
    """Flattens as torch does, and keeps empty dicts."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Take what is to be saved."""
        self.state_dict, self.mappings, self.is_coordinator = {}, {}, is_coordinator
        for path, value in leaves(state_dict):
            name = name_of(path)
            if name in self.mappings:
                raise ValueError(f"two entries of the content would have the name {name!r}")
            self.state_dict[name], self.mappings[name] = value, path


class Writer(FileSystemWriter):
    """Writes one file, entry by entry, and holds none of them longer than that.

    torch's own holds what it has copied, from a device or out of a larger storage, until the file is whole.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write all entries, and say where they are."""
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        with open(Path(self.path) / name, "wb") as file:
            for item in plan.items:
                file.write(bytes(-file.tell() % ALIGNMENT))
                begin = file.tell()
                data = planner.resolve_data(item)
                if item.type == WriteItemType.BYTE_IO:
                    assert isinstance(data, io.BytesIO)
                    file.write(data.getbuffer())
                else:
                    assert isinstance(data, torch.Tensor)
                    torch.save(compact(data), file)
                place = _StorageInfo(name, begin, file.tell() - begin)
                results.append(WriteResult(item.index, place.length, place))
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, in a storage of its own size."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
