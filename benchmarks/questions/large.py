"""Loading a few large tensors, where the work is in the bytes and in the pages they go to."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch

import fastopt
from benchmarks import goals, plots
from benchmarks.optimizers import (
    COPYING,
    FASTOPT_LOADERS,
    FLOOR_FRESH,
    FLOOR_WARM,
    FOREACH_FRESH,
    LINEAR_LOADER,
    NATIVE_BACKEND,
    SHARING,
    STOCK,
    LoadWork,
    load_work,
    stock_loader,
)
from benchmarks.question import Case, Contender, Question

IN_PLACE = "fastopt inplace=True"


def load_in_place(work: LoadWork) -> Callable[[], object]:
    """Into a state that an earlier load has made."""
    fastopt.load_state_dict(work.optimizer, work.state_dict)
    return partial(fastopt.load_state_dict, work.optimizer, work.state_dict, inplace=True)


def into_preallocated(
    copy: Callable[[list[torch.Tensor], list[torch.Tensor]], None],
) -> Callable[[LoadWork], Callable[[], object]]:
    """A copy into tensors that were there before and have been written to."""

    def prepare(work: LoadWork) -> Callable[[], object]:
        sources = work.moments()
        return partial(copy, [torch.ones_like(source, dtype=work.param_dtype) for source in sources], sources)

    return prepare


def deep_copy(work: LoadWork) -> Callable[[], object]:
    return partial(deepcopy, work.state_dict)


def case(parameters: int, elements: int) -> Case:
    label = f"{parameters} x 2 tensors of {elements / 2**20:g} Mi elements"
    return Case(label, {"parameters": parameters, "elements": elements})


FULL = case(16, 32 * 2**20)
FRESH_PAGES = (
    "half of fastopt's time is the system's, which fills every fresh page with zeros before it hands it out (perf on a "
    "Xeon (Sapphire Rapids): 47 % clear_page_erms, 49 % the cast), for all contenders alike: the floor's own speed in "
    "the table above is all that can be had"
)

QUESTION = Question(
    title="load_state_dict of AdamW, large parameters, float32 to bfloat16",
    cases=[FULL],
    quick=[case(4, 2**20)],
    warm_up={"parameters": 2, "elements": 2**16},
    build=load_work,
    contenders=(
        stock_loader(),
        LINEAR_LOADER,
        FOREACH_FRESH,
        *FASTOPT_LOADERS,
        FLOOR_FRESH,
        Contender("torch._foreach_copy_, preallocated", into_preallocated(torch._foreach_copy_)),
        Contender("fastopt.copy_, preallocated", into_preallocated(fastopt.copy_), NATIVE_BACKEND),
        Contender(IN_PLACE, load_in_place, NATIVE_BACKEND),
        FLOOR_WARM,
    ),
    baseline=STOCK,
    goals=[
        goals.faster(FULL, SHARING, STOCK, 2, FRESH_PAGES),
        goals.near(FULL, SHARING, FLOOR_FRESH.name, 0.9),
        goals.near(FULL, COPYING, FLOOR_FRESH.name, 0.9),
        goals.near(FULL, IN_PLACE, FLOOR_WARM.name, 0.9),
    ],
    plot=plots.bandwidth,
)
