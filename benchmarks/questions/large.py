"""Loading a few large tensors, where the work is in the bytes and in the pages they go to."""

from collections.abc import Callable
from functools import partial

import torch

import fastopt
from benchmarks import goals, plots
from benchmarks.optimizers import (
    FASTOPT_LOADERS,
    LINEAR_LOADER,
    NATIVE_BACKEND,
    SHARING,
    STOCK,
    LoadWork,
    load_work,
    stock_loader,
)
from benchmarks.question import Case, Contender, Question
from benchmarks.tensors import to_by_foreach_copy


def fresh_foreach_copy(work: LoadWork) -> Callable[[], object]:
    return partial(to_by_foreach_copy, work.moments(), param_dtype(work))


def into_warm_memory(
    copy: Callable[[list[torch.Tensor], list[torch.Tensor]], None],
) -> Callable[[LoadWork], Callable[[], object]]:
    """A copy into tensors that were there before and have been written to."""

    def prepare(work: LoadWork) -> Callable[[], object]:
        sources = work.moments()
        return partial(copy, [torch.ones_like(source, dtype=param_dtype(work)) for source in sources], sources)

    return prepare


def param_dtype(work: LoadWork) -> torch.dtype:
    dtype: torch.dtype = work.optimizer.param_groups[0]["params"][0].dtype
    return dtype


def case(parameters: int, elements: int) -> Case:
    label = f"{parameters} x 2 tensors of {elements / 2**20:g} Mi elements"
    return Case(label, {"parameters": parameters, "elements": elements})


FULL = case(16, 32 * 2**20)

QUESTION = Question(
    title="load_state_dict of AdamW, large parameters, float32 to bfloat16",
    cases=[FULL],
    quick=[case(4, 2**20)],
    warm_up={"parameters": 2, "elements": 2**16},
    build=load_work,
    contenders=(
        stock_loader(lambda size, rounds: rounds),
        LINEAR_LOADER,
        Contender("_foreach_copy_, fresh", fresh_foreach_copy),
        *FASTOPT_LOADERS,
        Contender("_foreach_copy_, preallocated", into_warm_memory(torch._foreach_copy_)),
        Contender("fastopt.copy_, preallocated", into_warm_memory(fastopt.copy_), NATIVE_BACKEND),
    ),
    baseline=STOCK,
    goals=[goals.faster(FULL, SHARING, STOCK, 2)],
    plot=plots.bandwidth,
)
