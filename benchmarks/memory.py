"""How much memory a process holds, and getting it from the host before it is measured."""

import mmap
import os
import re
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
ENOUGH_FOR_ALL_THREADS = 64 * 2**20


def touch(size: int) -> None:
    """Write to so many bytes of memory with all of torch's threads, which that starts, and give them back.

    Memory that a virtual machine has never used is slower at its first touch by up to ten times; whoever comes first
    would pay for all. Not by malloc, whose thresholds learn from every large block that is freed. No more than is free.
    """
    size = min(max(size, ENOUGH_FOR_ALL_THREADS), available() * 3 // 4)
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)  # such pages are what large results will ask for
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)


def available() -> int:
    """Bytes of memory that nobody uses."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def current_rss() -> int:
    return status_bytes("VmRSS") if STATUS.exists() else peak_rss()


def peak_rss() -> int:
    """The most bytes in memory since `forget_peak`; since the start of the process where Linux cannot be asked."""
    if STATUS.exists():
        return status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")


def status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{STATUS} has no {name}")
    return int(found[1]) * 1024
