"""load_state_dict of a state that is sharded over ranks: many DTensors, each with a part on every rank."""

from collections.abc import Callable
from functools import partial

import torch

import fastopt
from benchmarks import goals, plots, sharded
from benchmarks.optimizers import NATIVE_BACKEND
from benchmarks.question import Case, Contender, Question
from benchmarks.sharded import HERE, ShardedWork

RANKS = 2


def build(parameters: int, elements: int) -> ShardedWork:
    """AdamW's state in float32, of so many parameters with so many elements each, over all ranks."""
    return sharded.build("state", RANKS, parameters, elements)


def in_bfloat16() -> torch.optim.Optimizer:
    """An optimizer of the same parameters in bfloat16, without a state."""
    with torch.no_grad():
        params = [torch.nn.Parameter(param.to(torch.bfloat16)) for param in HERE.model.parameters()]
    return torch.optim.AdamW(params)


def torch_load() -> Callable[[], object]:
    return partial(in_bfloat16().load_state_dict, HERE.optimizer.state_dict())


def linear_load() -> Callable[[], object]:
    """A cast of each tensor by torch, and no search."""
    tensors = [value for entry in HERE.optimizer.state.values() for key, value in entry.items() if key != "step"]
    return lambda: [tensor.to(torch.bfloat16) for tensor in tensors]


def our_load(copy: bool) -> Callable[[], object]:
    return partial(fastopt.load_state_dict, in_bfloat16(), HERE.optimizer.state_dict(), copy=copy)


STOCK = Contender("stock torch", sharded.on_all_ranks(torch_load))
LINEAR = Contender("linear torch", sharded.on_all_ranks(linear_load))
COPYING = Contender("fastopt copy=True", sharded.on_all_ranks(partial(our_load, True)), NATIVE_BACKEND)
SHARING = Contender("fastopt copy=False", sharded.on_all_ranks(partial(our_load, False)), NATIVE_BACKEND)


def case(parameters: int, elements: int) -> Case:
    label = f"{parameters:,} x 2 x {elements:,}, on {RANKS} ranks"
    return Case(label, {"parameters": parameters, "elements": elements})


MANY = case(10_000, 128)

QUESTION = Question(
    title="load_state_dict of AdamW whose parameters and state are DTensors, float32 to bfloat16",
    cases=[MANY],
    quick=[Case(MANY.label, {"parameters": 100, "elements": 128})],
    warm_up={"parameters": 2, "elements": 64},
    build=build,
    contenders=(STOCK, LINEAR, COPYING, SHARING),
    baseline=STOCK.name,
    goals=[goals.faster(MANY, ours.name, STOCK.name, 20) for ours in (COPYING, SHARING)],
    plot=plots.bandwidth,
)
