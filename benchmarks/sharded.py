"""An AdamW state that is sharded over ranks, and what each rank does with it."""

import atexit
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, init_device_mesh

from benchmarks import files, floor, memory
from benchmarks.optimizers import adamw_entry
from benchmarks.question import Work
from benchmarks.ranks import Ranks, ranks
from fastopt import distributed

SAVED_BY = 2
"""Ranks that have saved what is loaded."""


@dataclass(frozen=True)
class ShardedWork(Work):
    """What the first rank has to do; its bytes are those of its own part."""

    group: Ranks


class Here:
    """What a rank has."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    path: Path
    bytes: int
    """Of the part of the state that is on this rank."""
    call: Callable[[], object]
    result: object = None


HERE = Here()


def build(action: str, size: int, parameters: int, elements: int) -> ShardedWork:
    """A state in float32 of so many ranks.

    Args:
        action: "load", where no state is there and one has been saved; "save", "stall" or "state", where one is there.
        size: the ranks.
        parameters: how many there are.
        elements: of each, over all ranks.
    """
    group = ranks(size)
    path = files.folder() / f"{action}-{parameters}-of-{elements}"
    if action == "load" and not path.exists():
        save_by_torch(path, parameters, elements)
    atexit.register(group.everywhere, finish_here)  # before the ranks leave
    group.everywhere(build_here, path, parameters, elements, action != "load")
    own = HERE.bytes
    return ShardedWork(own, own, group)


def save_by_torch(path: Path, parameters: int, elements: int) -> None:
    """Have ranks of their own save what is to be loaded."""
    unfinished = path.with_suffix(".unfinished")
    torch.multiprocessing.spawn(save_as_rank, (unfinished, parameters, elements), nprocs=SAVED_BY)
    unfinished.rename(path)


def save_as_rank(rank: int, path: Path, parameters: int, elements: int) -> None:
    """What such a rank does."""
    from benchmarks import ranks as here

    here.join(rank, SAVED_BY, f"{path}.store")
    build_here(path, parameters, elements, True)
    dcp.save(get_optimizer_state_dict(HERE.model, HERE.optimizer), checkpoint_id=path)
    here.leave()


def build_here(path: Path, parameters: int, elements: int, has_state: bool) -> None:
    """The part of a rank."""
    finish_here()
    HERE.path = path
    HERE.model = torch.nn.Module()
    for index in range(parameters):
        HERE.model.register_parameter(f"p{index}", torch.nn.Parameter(placed(torch.zeros(part(elements)), elements)))
    HERE.optimizer = torch.optim.AdamW(HERE.model.parameters())
    HERE.bytes = 2 * parameters * part(elements) * 4
    if has_state:
        for param in HERE.model.parameters():
            entry = adamw_entry((part(elements),), torch.float32)
            moments = {key: moment(param, entry[key]) for key in ("exp_avg", "exp_avg_sq")}
            HERE.optimizer.state[param] = {"step": entry["step"], **moments}


def part(elements: int) -> int:
    """Elements of a rank."""
    return elements // dist.get_world_size() if dist.is_initialized() else elements


def placed(local: torch.Tensor, elements: int) -> torch.Tensor:
    """The part of a rank as the whole tensor."""
    if not dist.is_initialized():
        return local
    return DTensor.from_local(local, mesh(), [Shard(0)], run_check=False, shape=torch.Size([elements]), stride=(1,))


@cache
def mesh() -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def moment(param: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A tensor of the state, made as a step makes it: torch finds how it is placed once for all that are alike."""
    if not isinstance(param, DTensor):
        return values
    made = torch.zeros_like(param)
    made.to_local().detach().copy_(values)
    return made.detach()


def prepare_here(prepare: Callable[[], Callable[[], object]]) -> None:
    """All that comes before the clock starts."""
    HERE.call = prepare()
    memory.touch(HERE.bytes)
    if dist.is_initialized():
        dist.barrier()


def on_all_ranks(prepare: Callable[[], Callable[[], object]]) -> Callable[[ShardedWork], Callable[[], object]]:
    """Has all ranks do what `prepare` returns on each, as a contender's `prepare`."""

    def prepared(work: ShardedWork) -> Callable[[], object]:
        work.group.everywhere(prepare_here, prepare)
        return partial(work.group.everywhere, run_here)

    return prepared


def run_here() -> None:
    """What the clock measures; it stops when all ranks are done."""
    HERE.result = HERE.call()


def finish_here() -> None:
    """Wait for what goes on in the background, and let go of what was done."""
    if isinstance(HERE.result, Future):
        HERE.result.result()
    HERE.result = None


# ---- what ranks are asked to do ----


def held_content() -> dict[str, Any]:
    """A state to be filled, which the optimizer has made by a step of its own."""
    content: dict[str, Any] = get_optimizer_state_dict(HERE.model, HERE.optimizer)
    return content


def load_into(content: dict[str, Any], reader: dcp.StorageReader) -> None:
    """Torch's way, with a reader."""
    dcp.load(content, storage_reader=reader)
    set_optimizer_state_dict(HERE.model, HERE.optimizer, content)


def torch_load() -> Callable[[], object]:
    """From an optimizer without a state, for which torch makes one by a step."""
    return lambda: load_into(held_content(), dcp.FileSystemReader(HERE.path))


def torch_load_again() -> Callable[[], object]:
    """Into a state that is there."""
    return partial(load_into, held_content(), dcp.FileSystemReader(HERE.path))


def torch_load_with_our_reader() -> Callable[[], object]:
    return partial(load_into, held_content(), distributed.FastReader(HERE.path))


def our_load() -> Callable[[], object]:
    return partial(distributed.load, HERE.optimizer, HERE.model, HERE.path)


def raw_read() -> Callable[[], object]:
    """As many bytes as belong to this rank, from the files into fresh memory."""
    saved = sorted(HERE.path.glob("*.distcp"))
    own = [saved[dist.get_rank() % len(saved)]] if dist.is_initialized() else saved
    return partial(floor.read, own, HERE.bytes, None, HERE.bytes // len(own))


def torch_save() -> Callable[[], object]:
    make_room()
    return partial(dcp.save, get_optimizer_state_dict(HERE.model, HERE.optimizer), checkpoint_id=HERE.path)


def our_save() -> Callable[[], object]:
    make_room()
    return partial(distributed.save, HERE.optimizer, HERE.model, HERE.path)


def raw_write() -> Callable[[], object]:
    """The memory of this rank's part, one tensor after the other, and to the disk."""
    make_room()
    HERE.path.mkdir(exist_ok=True)
    return partial(write_memory, HERE.path / f"{dist.get_rank()}", moments())


def write_memory(path: Path, tensors: list[torch.Tensor]) -> None:
    with open(path, "wb", buffering=0) as file:
        for tensor in tensors:
            left = memoryview(tensor.numpy()).cast("B")
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())


def moments() -> list[torch.Tensor]:
    """The memory of this rank's part."""
    entries = HERE.optimizer.state.values()
    return [value.to_local() for entry in entries for value in entry.values() if isinstance(value, DTensor)]


def make_room() -> None:
    """For a folder to be written, on a disk that is not at work."""
    if dist.get_rank() == 0:
        shutil.rmtree(HERE.path, ignore_errors=True)
        os.sync()
    dist.barrier()


def torch_stall() -> Callable[[], object]:
    make_room()
    return partial(dcp.async_save, get_optimizer_state_dict(HERE.model, HERE.optimizer), checkpoint_id=HERE.path)


def torch_stall_again() -> Callable[[], object]:
    """With a stager that has the memory of an earlier save."""
    make_room()
    content, stager = get_optimizer_state_dict(HERE.model, HERE.optimizer), DefaultStager(OWN_THREAD)
    save = partial(dcp.async_save, content, checkpoint_id=HERE.path, async_stager=stager)
    done(save())
    make_room()
    return save


OWN_THREAD = StagingOptions(False, False, False, False)
"""Those of the stager that `async_save` makes where it gets none."""


def our_stall() -> Callable[[], object]:
    make_room()
    distributed.saving.background_group(None)  # the group, which is made once
    return partial(distributed.async_save, HERE.optimizer, HERE.model, HERE.path)


def our_stall_again() -> Callable[[], object]:
    save = our_stall()
    done(save())
    make_room()
    return save


def done(future: object) -> None:
    """Wait for a save in the background."""
    assert isinstance(future, Future)
    future.result()


def copy_to_warm_memory() -> Callable[[], object]:
    return floor.into_warm_memory(moments(), torch.float32)
