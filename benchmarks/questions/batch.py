"""The primitives: one call for many tensors of mixed dtypes, beside torch's loop and its `_foreach_copy_`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch

import fastopt
from benchmarks import plots
from benchmarks.optimizers import NATIVE_BACKEND, PYTHON, PYTHON_BACKEND
from benchmarks.question import Case, Contender, Question, Work
from benchmarks.tensors import copy_one_by_one, to_by_foreach_copy, to_one_by_one

LOOP = "one by one"

To = Callable[[list[torch.Tensor], torch.dtype], list[torch.Tensor]]
Copy = Callable[[list[torch.Tensor], list[torch.Tensor]], None]

SOURCE_DTYPES = (torch.float32, torch.float16, torch.float64)
TO_DTYPE = torch.bfloat16
COPY_DTYPES = (torch.bfloat16, torch.float32, torch.float32)


@dataclass(frozen=True)
class BatchWork(Work):
    sources: list[torch.Tensor]
    destinations: list[torch.Tensor]
    """For `copy_`; empty for `to`, which makes its own."""


def build(operation: str, tensors: int, elements: int) -> BatchWork:
    sources = [torch.full((elements,), 1 / 3, dtype=dtype) for dtype in islice(cycle(SOURCE_DTYPES), tensors)]
    read = sum(source.nbytes for source in sources)
    if operation == "to":
        return BatchWork(read, tensors * elements * TO_DTYPE.itemsize, sources, [])
    destinations = [torch.ones(elements, dtype=dtype) for dtype in islice(cycle(COPY_DTYPES), tensors)]
    return BatchWork(read, sum(destination.nbytes for destination in destinations), sources, destinations)


def contender(name: str, to: To, copy: Copy, environment: dict[str, str] | None = None) -> Contender[BatchWork]:
    def prepare(work: BatchWork) -> Callable[[], object]:
        if work.destinations:
            return partial(copy, work.destinations, work.sources)
        return partial(to, work.sources, TO_DTYPE)

    return Contender(name, prepare, environment or {})


def fastopt_to(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    return fastopt.to(tensors, dtype=dtype)


def cases(*sizes: tuple[int, int]) -> list[Case]:
    return [
        Case(
            f"{operation}, {tensors:,} x {elements:,}",
            {"operation": operation, "tensors": tensors, "elements": elements},
        )
        for operation in ("to", "copy_")
        for tensors, elements in sizes
    ]


QUESTION = Question(
    title="to(bfloat16) and copy_ of lists of mixed dtypes",
    cases=cases((30_000, 64), (9, 2**25)),
    quick=cases((300, 64), (3, 2**16)),
    warm_up={"tensors": 6, "elements": 64},
    build=build,
    contenders=(
        contender(LOOP, to_one_by_one, copy_one_by_one),
        contender("torch._foreach_copy_", to_by_foreach_copy, torch._foreach_copy_),
        contender("fastopt", fastopt_to, fastopt.copy_, NATIVE_BACKEND),
        contender(PYTHON, fastopt_to, fastopt.copy_, PYTHON_BACKEND),
    ),
    baseline=LOOP,
    plot=plots.bandwidth,
)
