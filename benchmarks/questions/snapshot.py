"""A copy of a state that training does not touch, beside the deep copy that one would take otherwise."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch.optim import Optimizer

import fastopt
from benchmarks import goals, plots
from benchmarks.optimizers import NATIVE_BACKEND, PYTHON, PYTHON_BACKEND, adamw, adamw_entry
from benchmarks.question import Case, Contender, Question, Work

DEEPCOPY = "copy.deepcopy"
NATIVE = "fastopt"


@dataclass(frozen=True)
class SnapshotWork(Work):
    optimizer: Optimizer
    """With a state."""


def build(parameters: int, elements: int) -> SnapshotWork:
    shape = (elements,)
    optimizer = adamw([shape] * parameters, torch.float32)
    for param in optimizer.param_groups[0]["params"]:
        optimizer.state[param] = adamw_entry(shape, torch.float32)
    state_bytes = parameters * 2 * prod(shape) * torch.float32.itemsize
    return SnapshotWork(state_bytes, state_bytes, optimizer)


def taker(
    name: str, take: Callable[[Optimizer], object], environment: dict[str, str] | None = None
) -> Contender[SnapshotWork]:
    return Contender(name, lambda work: partial(take, work.optimizer), environment or {})


def case(parameters: int, elements: int) -> Case:
    return Case(f"{parameters:,} x 2 x {elements:,}", {"parameters": parameters, "elements": elements})


CASES = [case(30_000, 64), case(16, 16 * 1024 * 1024)]

QUESTION = Question(
    title="a copy of AdamW's state in float32",
    cases=CASES,
    quick=[case(300, 64), case(2, 100_000)],
    warm_up={"parameters": 2, "elements": 16},
    build=build,
    contenders=(
        taker(DEEPCOPY, lambda optimizer: deepcopy(optimizer.state_dict())),
        taker(NATIVE, fastopt.snapshot, NATIVE_BACKEND),
        taker(PYTHON, fastopt.snapshot, PYTHON_BACKEND),
    ),
    baseline=DEEPCOPY,
    goals=[goals.faster(case, NATIVE, DEEPCOPY, 1) for case in CASES],
    plot=plots.bandwidth,
)
