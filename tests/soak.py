"""Loads, saves and all else, over and over: `python -m tests.soak --seconds 1800`, or `make soak`.

What is loaded is held to what was saved, in every round; memory, open files and threads are watched. The process fails
where one of them grows: where what it is in the last quarter of the time, at the median, is beyond what it was in the
second by more than `SLACK`. Draws the course to a PNG, whose title says how long it was.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

import fastopt
from fastopt import backends

LARGE, SMALL = 3, 1_500
"""Parameters of 2 Mi elements, and of 96."""

SLACK = 24 << 20
"""Bytes: a few slabs, which the allocator may or may not have given back at that moment."""

EVERY = 1.0
"""Seconds between two samples."""


@dataclass
class Sample:
    """The process at a moment."""

    seconds: float
    resident: int  # bytes
    files: int
    threads: int


def sample(started: float) -> Sample:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = len(os.listdir("/proc/self/fd"))
    return Sample(time.monotonic() - started, resident, files, threading.active_count())


def optimizer_of(value: float) -> Optimizer:
    """An AdamW whose state is all of one value, and whose dtypes are mixed."""
    shapes = [2 << 20] * LARGE + [96] * SMALL
    params = [
        (f"p{index}", torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16 if index % 2 else torch.float32)))
        for index, shape in enumerate(shapes)
    ]
    optimizer = AdamW(params)
    fill(optimizer, value)
    return optimizer


def fill(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param] = {
                "step": torch.tensor(value),
                "exp_avg": torch.full_like(param, value),
                "exp_avg_sq": torch.full_like(param, value),
            }


def require(optimizer: Optimizer, value: float, what: str) -> None:
    for state in optimizer.state.values():
        for key, tensor in state.items():
            if not bool((tensor == value).all()):
                raise AssertionError(f"{what}: {key} is not {value}")


def refused(call: Callable[[], Any]) -> None:
    """A load that fails, as some do."""
    try:
        call()
    except (ValueError, KeyError, fastopt.CheckpointError):
        return
    raise AssertionError("an error was expected")


def actions(folder: Path) -> Iterator[tuple[str, Callable[[Optimizer, Optimizer], Any]]]:
    """By name: what brings the state of the first optimizer into the second."""

    def through(name: str, **options: Any) -> Callable[[Optimizer, Optimizer], Any]:
        def act(saved: Optimizer, target: Optimizer) -> None:
            fastopt.save(saved, folder / name)
            fastopt.load(target, folder / name, **options)

        return act

    def in_background(saved: Optimizer, target: Optimizer) -> None:
        future = fastopt.save(saved, folder / "background.pt", background=True)
        fastopt.load(target, folder / "background.pt")
        future.result()

    def snapshot(saved: Optimizer, target: Optimizer) -> None:
        taken = fastopt.snapshot(saved)
        fastopt.load_state_dict(target, taken.state_dict())
        taken.restore()

    def installed(saved: Optimizer, target: Optimizer) -> None:
        with fastopt.installed(copy=True):
            target.load_state_dict(saved.state_dict())

    def failing(saved: Optimizer, target: Optimizer) -> None:
        short = saved.state_dict()
        short["param_groups"][0]["params"].pop()
        refused(lambda: fastopt.load_state_dict(target, short))
        (folder / "short.pt").write_bytes((folder / "a.pt").read_bytes()[:-4000])
        refused(lambda: fastopt.load(target, folder / "short.pt"))
        fastopt.load_state_dict(target, saved.state_dict())

    def donated(saved: Optimizer, target: Optimizer) -> None:
        fastopt.load_state_dict(target, fastopt.snapshot(saved).state_dict(), donate=True)

    def cast_there_and_back(saved: Optimizer, target: Optimizer) -> None:
        fastopt.load_state_dict(target, fastopt.match(saved.state_dict(), target), policy=torch.float32, audit=True)
        fastopt.cast_state(target, "reference")

    def batches(saved: Optimizer, target: Optimizer) -> None:
        def tensors(optimizer: Optimizer) -> list[torch.Tensor]:
            return [tensor for state in optimizer.state.values() for tensor in state.values()]

        fastopt.copy_(tensors(target), fastopt.to(tensors(saved), dtype=torch.float64))

    yield "copied", lambda saved, target: fastopt.load_state_dict(target, saved.state_dict())
    yield "kept", lambda saved, target: fastopt.load_state_dict(target, saved.state_dict(), policy="keep")
    yield "in place", lambda saved, target: fastopt.load_state_dict(target, saved.state_dict(), inplace=True)
    yield "installed", installed
    yield "donated", donated
    yield "cast", cast_there_and_back
    yield "snapshot", snapshot
    yield "batches", batches
    yield "a.pt", through("a.pt", verify=True)
    yield "a.safetensors", through("a.safetensors", inplace=True)
    yield "a.dcp", through("a.dcp")
    yield "background", in_background
    yield "failing", failing


def run(seconds: float) -> tuple[int, list[Sample]]:
    """Rounds until the time is over, and what was seen meanwhile."""
    saved, target = optimizer_of(1.0), optimizer_of(0.0)
    samples: list[Sample] = []
    rounds, value = 0, 1.0
    with tempfile.TemporaryDirectory() as name:
        acts = dict(actions(Path(name)))
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            for what, act in acts.items():
                value = value % 100 + 1  # exact in bfloat16
                fill(saved, value)
                act(saved, target)
                require(target, value, what)
                if not samples or time.monotonic() - started - samples[-1].seconds >= EVERY:
                    samples.append(sample(started))
            rounds += 1
    gc.collect()
    return rounds, samples


def growth(samples: list[Sample]) -> list[str]:
    """What has grown from the second quarter to the last."""
    quarter = len(samples) // 4
    if quarter < 2:
        raise ValueError(f"{len(samples)} samples are too few to tell; let it run for longer")
    found = []
    for what, slack in (("resident", SLACK), ("files", 0), ("threads", 0)):
        early, late = (
            statistics.median(getattr(one, what) for one in part)
            for part in (samples[quarter : 2 * quarter], samples[-quarter:])
        )
        if late > early + slack:
            found.append(f"{what}: {early:,.0f} in the second quarter, {late:,.0f} in the last")
    return found


def draw(samples: list[Sample], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    minutes = [one.seconds / 60 for one in samples]
    axes.plot(minutes, [one.resident / 2**20 for one in samples], linewidth=1, label="resident memory")
    axes.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    counts = axes.twinx()
    counts.plot(minutes, [one.files for one in samples], color="tab:orange", linewidth=1, label="open files")
    counts.plot(minutes, [one.threads for one in samples], color="tab:green", linewidth=1, label="Python threads")
    counts.set(ylabel="count", ylim=(0, 2 * max(one.files for one in samples)))
    figure.legend(loc="outside lower center", ncols=3)
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--output", type=Path, default=None, help="a folder for soak.json and soak.png")
    options = parser.parse_args()
    rounds, samples = run(options.seconds)
    duration = samples[-1].seconds / 60
    title = (
        f"{duration:.1f} minutes, {rounds:,} rounds of {len(dict(actions(Path())))} actions, "
        f"{backends.current().name} backend, torch {torch.__version__}"
    )
    print(title)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        content = {"title": title, "samples": [asdict(one) for one in samples]}
        (options.output / "soak.json").write_text(json.dumps(content) + "\n")
        draw(samples, title, options.output / "soak.png")
    found = growth(samples)
    print(*found or ["memory, open files and threads stayed flat"], sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
