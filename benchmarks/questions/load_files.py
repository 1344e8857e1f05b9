"""Loading a state from a file of each format, out of the page cache and from the disk."""

from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer

import fastopt
from benchmarks import files, floor, goals, plots
from benchmarks.files import FileWork
from benchmarks.optimizers import NATIVE_BACKEND
from benchmarks.question import Case, Contender, Question, Size

LIBRARY = "the format's library, stock torch"
MAPPED = "torch.load(mmap=True), stock torch"
OURS = "fastopt.load"
FLOOR = "floor, read and touch"
DISK = "floor, one sequential read"

FORMATS = (".pt", ".safetensors", ".dcp")
LARGE = {"parameters": 16, "elements": 2**25}
MORE_MEMORY = 0.3e9
"""Bytes that a load may take besides its results."""


def contender(
    name: str,
    load: Callable[[FileWork], object],
    takes: Callable[[Size], bool] = lambda size: True,
    environment: dict[str, str] | None = None,
) -> Contender[FileWork]:
    def prepare(work: FileWork) -> Callable[[], object]:
        (files.cool if work.cold else files.warm)(work.path)
        return partial(load, work)

    def rounds(size: Size, rounds: int) -> int:
        if not takes(size):
            return 0
        return rounds if size["parameters"] < 100_000 or name == OURS else 1  # minutes

    return Contender(name, prepare, environment or {}, rounds)


def by_library(work: FileWork, mmap: bool = False) -> None:
    Optimizer.load_state_dict(work.optimizer, files.read_by_library(work.path, work.state_dict, mmap))


def case(suffix: str, param: str, cache: str, size: Size) -> Case:
    label = f"{suffix}, {size['parameters']:,} x 2 x {size['elements']:,}, to {param}, {cache}"
    return Case(label, {"suffix": suffix, "param": param, "cache": cache, **size})


WARM = [case(suffix, param, "warm", LARGE) for suffix in FORMATS for param in ("bfloat16", "float32")]
COLD = [case(suffix, "bfloat16", "cold", LARGE) for suffix in FORMATS]
SMALL = [
    *(case(suffix, "bfloat16", "warm", {"parameters": 100_000, "elements": 64}) for suffix in FORMATS[:2]),
    case(".dcp", "bfloat16", "warm", {"parameters": 10_000, "elements": 64}),  # its library would take an hour for more
]


def is_large(size: Size) -> bool:
    return size["elements"] > 64


QUESTION = Question(
    title="load of AdamW's state from a file in float32",
    cases=[*WARM, *COLD, *SMALL],
    quick=[case(c.size["suffix"], c.size["param"], c.size["cache"], {"parameters": 4, "elements": 2**14}) for c in WARM]
    + [case(".pt", "bfloat16", "cold", {"parameters": 4, "elements": 2**14})],
    warm_up={"parameters": 2, "elements": 64},
    build=files.file_to_load,
    contenders=(
        contender(LIBRARY, by_library),
        contender(MAPPED, partial(by_library, mmap=True), lambda size: size["suffix"] == ".pt" and is_large(size)),
        contender(OURS, lambda work: fastopt.load(work.optimizer, work.path), environment=NATIVE_BACKEND),
        contender(FLOOR, lambda work: floor.read(files.files_of(work.path), work.bytes_written), is_large),
        contender(DISK, lambda work: floor.read(files.files_of(work.path), 0, 1), lambda size: size["cache"] == "cold"),
    ),
    baseline=LIBRARY,
    goals=[
        *(goals.near(case, OURS, FLOOR, 1 / 1.1) for case in WARM),
        *(goals.memory_beside_results(case, OURS, MORE_MEMORY) for case in (*WARM, *COLD)),
        *(goals.near(case, OURS, DISK, 0.9) for case in COLD),
        *(goals.faster(case, OURS, LIBRARY, 20) for case in SMALL),
    ],
    plot=plots.bandwidth,
)
