"""Writing a state to a file of each format, and to the disk."""

import os
from collections.abc import Callable
from functools import partial

import fastopt
from benchmarks import files, goals, plots
from benchmarks.files import FileWork
from benchmarks.optimizers import NATIVE_BACKEND
from benchmarks.question import Case, Contender, Question, Size

LIBRARY = "the format's library, fsync"
OURS = "fastopt.save"
RAW = "floor, raw write and fsync"

FORMATS = (".pt", ".safetensors", ".dcp")


def contender(
    name: str, save: Callable[[FileWork], object], environment: dict[str, str] | None = None
) -> Contender[FileWork]:
    def prepare(work: FileWork) -> Callable[[], object]:
        files.make_room(work.path)
        return partial(save, work)

    def rounds(size: Size, rounds: int) -> int:
        return 0 if name == RAW and size["elements"] == 64 else rounds

    return Contender(name, prepare, environment or {}, rounds)


def by_library(work: FileWork) -> None:
    files.write_by_library(work.path, work.state_dict)


def raw(work: FileWork) -> None:
    """The memory of the tensors, one after the other."""
    with open(work.path, "wb", buffering=0) as file:
        for entry in work.state_dict["state"].values():
            for tensor in entry.values():
                left = memoryview(tensor.reshape(-1).numpy()).cast("B")
                while left:
                    left = left[file.write(left) :]
        os.fsync(file.fileno())


def case(suffix: str, parameters: int, elements: int) -> Case:
    size = {"suffix": suffix, "parameters": parameters, "elements": elements}
    return Case(f"{suffix}, {parameters:,} x 2 x {elements:,}", size)


LARGE = [case(suffix, 16, 2**25) for suffix in FORMATS]
SMALL = [case(".pt", 100_000, 64), case(".safetensors", 100_000, 64), case(".dcp", 10_000, 64)]

QUESTION = Question(
    title="save of AdamW's state in float32 to a file",
    cases=[*LARGE, *SMALL],
    quick=[case(suffix, 4, 2**14) for suffix in FORMATS],
    warm_up={"parameters": 2, "elements": 64},
    build=files.file_to_save,
    contenders=(
        contender(LIBRARY, by_library),
        contender(OURS, lambda work: fastopt.save(work.optimizer, work.path), NATIVE_BACKEND),
        contender(RAW, raw),
    ),
    baseline=LIBRARY,
    goals=[
        *(goals.near(case, OURS, RAW, 1 / 1.1) for case in LARGE),
        *(goals.faster(case, OURS, LIBRARY, 20) for case in SMALL),
    ],
    plot=plots.bandwidth,
)
