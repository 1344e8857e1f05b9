"""The command `bench`: one load of AdamW's state from a file, through torch and through fastopt, on this machine.

Each way is measured in a process of its own, which loads several times; its first load, in which memory comes from the
system and libraries start their threads, does not count. The file is in the page cache. What was loaded is compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

import fastopt
from fastopt.cli.outcome import SAME, Outcome, as_json
from fastopt.files.checksums import memory_of
from fastopt.text import aligned, duration, size

ELEMENTS = 4 << 20
"""Of a parameter, or somewhat more or less, so that the state is as large as it should be."""

SAVED, LOADED = torch.float32, torch.bfloat16
"""Dtypes of the state in the file, and of the parameters that it is cast to."""

MEGABYTE = 10**6

Shape = tuple[int, int]
"""How many parameters there are, and how many elements each has."""

STATUS = Path("/proc/self/status")

WAYS: dict[str, Callable[[Optimizer, str], Any]] = {
    "torch.load, load_state_dict": lambda optimizer, path: optimizer.load_state_dict(
        torch.load(path, weights_only=True)
    ),
    "torch.load(mmap=True), load_state_dict": lambda optimizer, path: optimizer.load_state_dict(
        torch.load(path, weights_only=True, mmap=True)
    ),
    "fastopt.load": fastopt.load,
}
OURS = "fastopt.load"


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time one load on this machine, through torch and through fastopt",
        description="AdamW's float32 state is loaded from a file into bfloat16 parameters. benchmarks/ in the "
        "repository has more questions, and the machine's own limits beside the answers.",
    )
    command.add_argument("--megabytes", type=positive, default=512, help="of the state in the file (512)")
    command.add_argument("--rounds", type=positive, default=5, help="loads of each way that count (5)")
    command.add_argument("--folder", help="where the file is written for the while (the system's for temporary files)")
    command.set_defaults(run=bench)
    return command


def positive(text: str) -> int:
    """A number that is one at least."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


# ---- the process of the command ----


def bench(options: argparse.Namespace) -> Outcome:
    """Measure all ways."""
    total = options.megabytes * MEGABYTE // (2 * SAVED.itemsize)
    parameters = max(1, round(total / ELEMENTS))
    elements = total // parameters
    with tempfile.TemporaryDirectory(prefix="fastopt-bench-", dir=options.folder) as folder:
        path = os.path.join(folder, "optimizer.pt")
        in_a_process("write", path, (parameters, elements), 1)
        bytes_read = os.path.getsize(path)
        found = {way: in_a_process(way, path, (parameters, elements), options.rounds) for way in WAYS}
    if len({way.pop("fingerprint") for way in found.values()}) > 1:
        raise RuntimeError("the ways have loaded different values: this is a defect of fastopt, please report it")
    about = {
        "backend": vars(fastopt.backend()),
        "parameters": parameters,
        "elements": elements,
        "file_bytes": bytes_read,
        "ways": found,
    }
    return Outcome(as_json(about) if options.json else table((parameters, elements), bytes_read, found), SAME)


def in_a_process(way: str, path: str, shape: Shape, rounds: int) -> Any:
    """What `measure` returns there."""
    package = str(Path(fastopt.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    call = f"from fastopt.cli import bench; bench.measure({way!r}, {path!r}, {shape}, {rounds})"
    done = subprocess.run(
        [sys.executable, "-c", call], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{way}: {reason[0]}")
    return json.loads(done.stdout)


def table(shape: Shape, bytes_read: int, found: dict[str, Any]) -> str:
    """The results for people."""
    name = fastopt.backend().name
    rows = [["", "median", "fastest", "slowest", "of the file", "memory"]]
    for way, result in found.items():
        times = result["seconds"]
        median = statistics.median(times)
        memory = "" if result["memory"] is None else size(result["memory"])
        rows.append([way, *map(duration, (median, min(times), max(times))), f"{size(bytes_read / median)}/s", memory])
    ours = statistics.median(found[OURS]["seconds"])
    ratios = [
        f"{statistics.median(found[way]['seconds']) / ours:.2g} times as fast as {way}" for way in found if way != OURS
    ]
    return "\n".join(
        [
            f"AdamW's state of {shape[0]} x {shape[1]:,} elements, {size(bytes_read)} of float32 in the page cache, "
            f"into bfloat16 parameters; {torch.get_num_threads()} threads, {name} backend",
            *("  " + line for line in aligned(rows)),
            f"fastopt is {' and '.join(ratios)}; memory is the most beside the file's pages, results included",
        ]
    )


# ---- a process of its own ----


def measure(way: str, path: str, shape: Shape, rounds: int) -> None:
    """Write the file, or load it again and again; prints JSON."""
    if way != "write":
        read(path)
    parameters, elements = shape
    optimizer = torch.optim.AdamW([torch.zeros(elements, dtype=LOADED) for _ in range(parameters)])
    if way == "write":
        for param in optimizer.param_groups[0]["params"]:
            moments = {key: torch.rand(elements, dtype=SAVED) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[param] = {"step": torch.tensor(1.0), **moments}
        fastopt.save(optimizer, path)
        print("{}")
        return
    seconds, most = [], 0
    for _ in range(1 + rounds):
        optimizer.state.clear()
        with watched_memory() as memory:
            started = time.perf_counter()
            WAYS[way](optimizer, path)
            seconds.append(time.perf_counter() - started)
        most = max(most, *memory)
    print(json.dumps({"seconds": seconds[1:], "memory": most or None, "fingerprint": fingerprint(optimizer)}))


def read(path: str) -> None:
    """Have a file in the page cache."""
    with open(path, "rb") as file:
        while file.read(1 << 24):
            pass


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """How much memory a block takes that is no file's, looked at every other millisecond; zero if unknown."""
    before, seen, ends = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not ends.wait(0.002):
            seen.append(anonymous_bytes() - before)

    thread = threading.Thread(target=watch)
    if before:
        thread.start()
    yield seen
    ends.set()
    if before:
        thread.join()
        seen.append(anonymous_bytes() - before)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's; zero where Linux cannot be asked."""
    if not STATUS.exists():
        return 0
    lines = STATUS.read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def fingerprint(optimizer: Optimizer) -> int:
    """A checksum of the state."""
    total = 0
    for entry in optimizer.state.values():
        for tensor in entry.values():
            total = zlib.crc32(memory_of(tensor), total)
    return total
