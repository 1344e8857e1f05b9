"""Large optimizer states, and what it takes stock torch and fastopt to load them."""

import contextlib
import gc
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checks import require_same_state
from torch.optim import AdamW, Optimizer

import fastopt

StateDict = dict[str, Any]
State = dict[int, dict[str, torch.Tensor]]
Loader = Callable[[Optimizer, StateDict], Any]

STOCK = "stock torch"
FASTOPT = "fastopt"
LOADERS: dict[str, Loader] = {STOCK: Optimizer.load_state_dict, FASTOPT: fastopt.load_state_dict}

# What a measurement holds at once for each element of a parameter: two float32 moments, the bfloat16 parameter, two
# bfloat16 moments that one contender has loaded, and what is touched before the other one loads.
BYTES_PER_ELEMENT = 2 * 4 + 2 + 2 * 2 + 3 * 2


@dataclass(frozen=True)
class Size:
    """Parameters of an optimizer, all alike."""

    parameters: int
    elements: int


@dataclass(frozen=True)
class Measured:
    """Loads of one state by every contender."""

    size: Size
    bytes_read: int
    bytes_written: int
    seconds: dict[str, list[float]]
    """Of each round, by contender."""

    def median(self, name: str) -> float:
        """Seconds of a contender's middle round."""
        return statistics.median(self.seconds[name])

    def median_rate(self, name: str) -> float:
        """GB/s of a contender's middle round, bytes read and written."""
        return statistics.median(self.rates(name))

    def rates(self, name: str) -> list[float]:
        """GB/s of each round, bytes read and written."""
        moved = self.bytes_read + self.bytes_written
        return [moved / seconds / 1e9 for seconds in self.seconds[name]]

    @property
    def gain(self) -> float:
        """How many times faster fastopt is than stock torch."""
        return self.median(STOCK) / self.median(FASTOPT)


def bfloat16_parameters(size: Size) -> list[torch.Tensor]:
    """What the state is loaded for."""
    return [torch.zeros(size.elements, dtype=torch.bfloat16) for _ in range(size.parameters)]


def float32_state(size: Size) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """The state that AdamW keeps of float32 parameters, by index."""
    for index in range(size.parameters):
        moments = {name: torch.rand(size.elements) for name in ("exp_avg", "exp_avg_sq")}
        yield index, {"step": torch.tensor(1.0), **moments}


def measure(
    state: State, size: Size, rounds: dict[str, int], waiting: Callable[[str], AbstractContextManager[Any]]
) -> Measured:
    """Time every contender's loads of a float32 state for bfloat16 parameters, and see that all load the same.

    Args:
        state: what `float32_state` gives for `size`.
        size: of the parameters.
        rounds: how often each contender loads; they take turns, in alternating order.
        waiting: entered around each load with the contender's name, to show that something goes on.
    """
    params = bfloat16_parameters(size)
    saved = {"state": state, "param_groups": AdamW(params).state_dict()["param_groups"]}
    seconds: dict[str, list[float]] = {name: [] for name in LOADERS}
    loaded: dict[str, AdamW] = {}
    for turn in range(max(rounds.values())):
        for name in list(LOADERS) if turn % 2 == 0 else reversed(LOADERS):
            if turn < rounds[name]:
                loaded[name] = AdamW(params)  # frees what the last round loaded
                with waiting(name):
                    touch_memory(3 * sum(param.nbytes for param in params))
                    seconds[name].append(seconds_of(LOADERS[name], loaded[name], saved))
    require_same_state(loaded[STOCK], loaded[FASTOPT])
    return Measured(size, bytes_of(state), bytes_of(loaded[STOCK].state), seconds)


def seconds_of(load: Loader, optimizer: Optimizer, saved: StateDict) -> float:
    """Wall time of a load."""
    gc.collect()
    started = time.perf_counter()
    load(optimizer, saved)
    return time.perf_counter() - started


def bytes_of(state: dict[Any, dict[str, torch.Tensor]]) -> int:
    """Bytes of all tensors of a state."""
    return sum(tensor.nbytes for entries in state.values() for tensor in entries.values())


def size_for_memory(elements: int, most: int) -> Size:
    """As many parameters of `elements` as `most` bytes, and half of the free memory, have room for in a measurement."""
    budget = min(most, available_memory() // 2)
    return Size(max(1, budget // (elements * BYTES_PER_ELEMENT)), elements)


def available_memory() -> int:
    """Bytes that can be had without swapping, as Linux estimates."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def touch_memory(size: int) -> None:
    """Write to so many bytes of memory with all threads, and free them.

    A virtual machine gets its memory from its host at the first touch, which is slow, and may lose within seconds what
    is freed. So this goes before each load, with half as much again as the load will write, since a load need not get
    the very pages that were freed last. In huge pages, as fastopt asks for them; small ones are cut from the same
    memory. Not by malloc, whose thresholds learn from every large block that is freed.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_HUGEPAGE)
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
