"""Packing a state: `state_dict()` moves no bytes, so all of it is bookkeeping."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.optim import Optimizer

import fastopt
from benchmarks import goals, plots
from benchmarks.optimizers import NATIVE_BACKEND, PYTHON, PYTHON_BACKEND, STOCK, adamw, adamw_entry
from benchmarks.question import Case, Contender, Question, Work

NATIVE = "fastopt"


@dataclass(frozen=True)
class PackWork(Work):
    optimizer: Optimizer
    """With a state."""


def build(parameters: int) -> PackWork:
    optimizer = adamw([(1,)] * parameters, torch.float32)
    for param in optimizer.param_groups[0]["params"]:
        optimizer.state[param] = adamw_entry((1,), torch.float32)
    return PackWork(0, 0, optimizer)


def packer(
    name: str, pack: Callable[[Optimizer], object], environment: dict[str, str] | None = None
) -> Contender[PackWork]:
    return Contender(name, lambda work: partial(pack, work.optimizer), environment or {})


def cases(*counts: int) -> list[Case]:
    return [Case(f"{count:,} parameters", {"parameters": count}) for count in counts]


CASES = cases(10_000, 100_000)

QUESTION = Question(
    title="state_dict of AdamW",
    cases=CASES,
    quick=cases(300, 3_000),
    warm_up={"parameters": 10},
    build=build,
    contenders=(
        packer(STOCK, Optimizer.state_dict),
        packer(NATIVE, fastopt.state_dict, NATIVE_BACKEND),
        packer(PYTHON, fastopt.state_dict, PYTHON_BACKEND),
    ),
    baseline=STOCK,
    goals=[goals.faster(CASES[-1], NATIVE, STOCK, 5)],
    plot=plots.time_over("parameters", STOCK, PYTHON, NATIVE),
)
