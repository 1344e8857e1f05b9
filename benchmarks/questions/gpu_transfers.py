"""`copy_` between the CPU and a GPU, beside torch's ways and the bus itself. Asked only where there is a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import fastopt
from benchmarks import plots
from benchmarks.goals import faster, near
from benchmarks.optimizers import NATIVE_BACKEND
from benchmarks.question import Case, Contender, Question, Work
from benchmarks.tensors import copy_one_by_one

LOOP = "one by one"
FLOOR = "pinned, without a cast"
FASTOPT = "fastopt"

Copy = Callable[[list[torch.Tensor], list[torch.Tensor]], None]


@dataclass(frozen=True)
class TransferWork(Work):
    sources: list[torch.Tensor]
    destinations: list[torch.Tensor]


def build(source: str, target: str, to_gpu: bool, tensors: int, elements: int) -> TransferWork:
    devices = ("cpu", "cuda") if to_gpu else ("cuda", "cpu")
    dtypes = getattr(torch, source), getattr(torch, target)
    sources = [torch.full((elements,), 1 / 3, dtype=dtypes[0]).to(devices[0]) for _ in range(tensors)]
    destinations = [torch.ones(elements, dtype=dtypes[1]).to(devices[1]) for _ in range(tensors)]
    torch.cuda.synchronize()
    read, written = (tensors * elements * dtype.itemsize for dtype in dtypes)
    return TransferWork(read, written, sources, destinations)


def contender(name: str, copy: Copy, environment: dict[str, str] | None = None) -> Contender[TransferWork]:
    def prepare(work: TransferWork) -> Callable[[], object]:
        return partial(finished, partial(copy, work.destinations, work.sources))

    return Contender(name, prepare, environment or {})


def finished(call: Callable[[], object]) -> None:
    """Nothing on the GPU is left to be done."""
    call()
    torch.cuda.synchronize()


def prepare_floor(work: TransferWork) -> Callable[[], object]:
    """As many bytes as have to travel, from pinned memory or to it, in one transfer."""
    size = min(work.bytes_read, work.bytes_written)
    on_cpu = torch.ones(size, dtype=torch.uint8).pin_memory()
    on_gpu = torch.ones(size, dtype=torch.uint8).to("cuda")
    torch.cuda.synchronize()
    dst, src = (on_gpu, on_cpu) if work.destinations[0].is_cuda else (on_cpu, on_gpu)
    return partial(finished, partial(dst.copy_, src, non_blocking=True))


def case(source: str, target: str, to_gpu: bool, tensors: int, elements: int) -> Case:
    size = {"source": source, "target": target, "to_gpu": to_gpu, "tensors": tensors, "elements": elements}
    way = "to the GPU" if to_gpu else "to the CPU"
    return Case(f"{source} -> {target} {way}, {tensors:,} x {elements:,}", size)


def cases(tensors: int, elements: int) -> list[Case]:
    pairs = [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]
    return [case(source, target, to_gpu, tensors, elements) for to_gpu in (True, False) for source, target in pairs]


LARGE = cases(16, 2**26)
SMALL = [case("float32", "float32", to_gpu, 100_000, 64) for to_gpu in (True, False)]

QUESTION = Question(
    title="copy_ between the CPU and a GPU",
    cases=[*LARGE, *SMALL],
    quick=cases(3, 2**16),
    warm_up={"tensors": 12, "elements": 2**23},  # pins the ring, which is done once
    build=build,
    contenders=(
        Contender(FLOOR, prepare_floor),
        contender(LOOP, copy_one_by_one),
        contender("torch._foreach_copy_", torch._foreach_copy_),
        contender(FASTOPT, fastopt.copy_, NATIVE_BACKEND),
    ),
    baseline=LOOP,
    goals=(
        *(near(large, FASTOPT, FLOOR, 0.90) for large in LARGE),
        *(faster(small, FASTOPT, LOOP, 50) for small in SMALL),
    ),
    plot=plots.bandwidth,
)
