"""Files with the state of an optimizer, and each format's own library to read and write them."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from torch.optim import Optimizer

import fastopt
from benchmarks.optimizers import load_work
from benchmarks.question import Work

FOLDER = "FASTOPT_BENCHMARK_FILES"
"""The variable with the folder that the runner makes for the files of a question, and removes after it."""

StateDict = dict[str, Any]


@dataclass(frozen=True)
class FileWork(Work):
    path: Path
    optimizer: Optimizer
    """Without a state where the file is to be loaded, with one where it is to be written."""
    state_dict: StateDict
    """What is to be written; of what is to be loaded, structure and shapes alone (tensors on the meta device)."""
    cold: bool = False
    """Whether the file is to be read from the disk, and not from the page cache."""

    @property
    def fresh_memory(self) -> int:
        """The page cache takes in what comes from the disk."""
        return self.bytes_written + (self.bytes_read if self.cold else 0)


def folder() -> Path:
    return Path(os.environ.get(FOLDER) or tempfile.mkdtemp(prefix="fastopt-benchmark-"))


def file_to_load(suffix: str, parameters: int, elements: int, param: str, cache: str) -> FileWork:
    """A file with a state in float32, for parameters of some dtype. It is written once for all contenders."""
    path = folder() / f"{parameters}-of-{elements}{suffix}"
    if not path.exists():
        written = file_to_save(suffix, parameters, elements)
        if suffix == ".safetensors":  # the library has no place for what is not a tensor
            fastopt.save(written.optimizer, path)
        else:
            write_by_library(path, written.state_dict)
        del written
    work = load_work(parameters, elements, param=param)
    shapes = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), work.state_dict)
    return FileWork(bytes_of(path), work.bytes_written, path, work.optimizer, shapes, cache == "cold")


def file_to_save(suffix: str, parameters: int, elements: int) -> FileWork:
    """A state in float32, and the path for a file with it."""
    work = load_work(parameters, elements, param="float32")
    fastopt.load_state_dict(work.optimizer, work.state_dict, copy=False)
    path = folder() / f"saved-{parameters}-of-{elements}{suffix}"
    return FileWork(work.bytes_read, work.bytes_read, path, work.optimizer, work.state_dict)


def read_by_library(path: Path, shapes: StateDict, mmap: bool = False) -> StateDict:
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        state = {
            index: {key: tensors[f"state.{index}.{key}"] for key in entry} for index, entry in shapes["state"].items()
        }
        return {"state": state, "param_groups": shapes["param_groups"]}
    if path.suffix == ".dcp":
        empty: StateDict = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda tensor: torch.empty_like(tensor, device="cpu"), shapes
        )
        dcp.load(empty, checkpoint_id=path)
        return empty
    loaded: StateDict = torch.load(path, weights_only=True, mmap=mmap)
    return loaded


def write_by_library(path: Path, state_dict: StateDict) -> None:
    """And to the disk, as `fastopt.save` does."""
    if path.suffix == ".safetensors":
        tensors = {
            f"state.{index}.{key}": tensor
            for index, entry in state_dict["state"].items()
            for key, tensor in entry.items()
        }
        save_file(tensors, path, {"param_groups": json.dumps(state_dict["param_groups"])})
    elif path.suffix == ".dcp":
        dcp.save(state_dict, checkpoint_id=path)
    else:
        torch.save(state_dict, path)
    for file in files_of(path):
        with open(file, "rb") as written:
            os.fsync(written.fileno())


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def bytes_of(path: Path) -> int:
    return sum(file.stat().st_size for file in files_of(path))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_room(path: Path) -> None:
    """For a file to be written, on a disk that is not at work for whoever wrote before."""
    remove(path)
    os.sync()


def warm(path: Path) -> None:
    """Bring the files into the page cache."""
    for file in files_of(path):
        with open(file, "rb") as data:
            while data.read(2**20):
                pass


def cool(path: Path) -> None:
    """Have the page cache let go of the files. A host that keeps them in memory of its own goes on doing that."""
    for file in files_of(path):
        with open(file, "rb") as data:
            os.fsync(data.fileno())
            os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
