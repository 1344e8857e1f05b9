"""How long training stands still for a save that goes on in the background."""

import threading
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch.distributed.checkpoint import async_save

import fastopt
from benchmarks import files, floor, goals, plots
from benchmarks.files import FileWork
from benchmarks.optimizers import NATIVE_BACKEND
from benchmarks.question import Case, Contender, Question

CLONES = "clones, one by one"
OURS = "fastopt.save(background=True)"
COPY = "floor, a copy of the memory"


def contender(
    name: str, stall: Callable[[FileWork], object], environment: dict[str, str] | None = None
) -> Contender[FileWork]:
    def prepare(work: FileWork) -> Callable[[], object]:
        files.make_room(work.path)
        return partial(stall, work)

    return Contender(name, prepare, environment or {})


def tensors(work: FileWork) -> list[torch.Tensor]:
    return [tensor for entry in work.state_dict["state"].values() for tensor in entry.values()]


def clones(work: FileWork) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors(work)]


def copy_of_memory(work: FileWork) -> object:
    return floor.into_fresh_memory(tensors(work), torch.float32)()


def save_in_thread(work: FileWork) -> threading.Thread:
    thread = threading.Thread(target=torch.save, args=(deepcopy(work.state_dict), work.path))
    thread.start()
    return thread


def save_by_dcp(work: FileWork) -> object:
    return async_save(work.state_dict, checkpoint_id=work.path.with_suffix(".dcp"))


def save_in_background(work: FileWork) -> object:
    return fastopt.save(work.optimizer, work.path, background=True)


def case(parameters: int, elements: int) -> Case:
    size = {"suffix": ".pt", "parameters": parameters, "elements": elements}
    return Case(f"{parameters:,} x 2 x {elements:,}", size)


LARGE = case(16, 2**24)

QUESTION = Question(
    title="until a save of AdamW's state in float32 goes on in the background",
    cases=[LARGE, case(30_000, 64)],
    quick=[case(4, 2**14)],
    warm_up={"parameters": 2, "elements": 64},
    build=files.file_to_save,
    contenders=(
        contender(CLONES, clones),
        contender("copy.deepcopy, torch.save in a thread", save_in_thread),
        contender("DCP async_save", save_by_dcp),
        contender(OURS, save_in_background, NATIVE_BACKEND),
        contender(COPY, copy_of_memory),
    ),
    baseline=CLONES,
    goals=[goals.near(LARGE, OURS, COPY, 1 / 1.2)],
    plot=plots.bandwidth,
)
