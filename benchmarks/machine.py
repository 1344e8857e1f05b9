"""The stamp on every result: what it was measured on, with what, and when."""

import datetime
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import fastopt
from fastopt import BackendInfo


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    memory_bytes: int
    load_average: float
    """Of the last minute before the run: how quiet the machine was."""
    kernel: str
    transparent_huge_pages: str
    python: str
    torch: str
    fastopt: str
    backend: BackendInfo
    date: str

    def __str__(self) -> str:
        backend = self.backend
        return "\n".join(
            (
                f"{self.cpu}, {self.cores} cores, {self.memory_bytes / 2**30:.0f} GiB, "
                f"load {self.load_average:.1f} before the run",
                f"{self.kernel}, transparent huge pages: {self.transparent_huge_pages}",
                f"Python {self.python}, torch {self.torch}, fastopt {self.fastopt} ({backend.name}, "
                f"{backend.cpu_target or 'no kernels'}, {backend.threads} threads)",
                self.date,
            )
        )


def this_machine() -> Machine:
    return Machine(
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=os.getloadavg()[0],
        kernel=f"{platform.system()} {platform.release()}",
        transparent_huge_pages=huge_pages(),
        python=platform.python_version(),
        torch=torch.__version__,
        fastopt=fastopt.__version__,
        backend=fastopt.backend(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", text_of("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def huge_pages() -> str:
    """The setting in use, which the kernel puts in brackets."""
    found = re.search(r"\[(\w+)\]", text_of("/sys/kernel/mm/transparent_hugepage/enabled"))
    return found[1] if found else "unknown"


def text_of(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
