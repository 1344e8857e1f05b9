"""The fastest that a machine can move the bytes of a load, from memory or files: `floor.cpp`, built on first use."""

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("floor.cpp")
BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
COMPILE = (os.environ.get("CXX", "g++"), "-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
HUGE_PAGE = 2 * 2**20


@cache
def library() -> ctypes.CDLL:
    text = SOURCE.read_bytes() + " ".join(COMPILE).encode()
    target = BUILD / f"floor-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*COMPILE, str(SOURCE), "-o", str(unfinished)], check=True)
        unfinished.replace(target)
    loaded = ctypes.CDLL(str(target))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    loaded.floor_move.argtypes = [pointer, pointer, pointer, size, size, size, size]
    loaded.floor_move.restype = ctypes.c_bool
    loaded.floor_read.argtypes = [ctypes.POINTER(ctypes.c_char_p), pointer, size, pointer, size, size]
    loaded.floor_read.restype = ctypes.c_bool
    loaded.floor_map.argtypes = [ctypes.c_uint64]
    loaded.floor_map.restype = ctypes.c_uint64
    loaded.floor_unmap.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    return loaded


class Mapping:
    """Fresh memory for outputs of these sizes in bytes, each aligned to a cache line."""

    def __init__(self, sizes: Sequence[int]) -> None:
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // 64) * 64
        self.bytes = end + HUGE_PAGE
        self.start = library().floor_map(self.bytes)
        if not self.start:
            raise MemoryError(f"{self.bytes:,} bytes")
        first = -(-self.start // HUGE_PAGE) * HUGE_PAGE
        self.addresses = [first + offset for offset in offsets]

    def __del__(self) -> None:
        library().floor_unmap(self.start, self.bytes)


def move(sources: Sequence[torch.Tensor], addresses: torch.Tensor, counts: torch.Tensor, itemsize: int) -> None:
    pointers = torch.tensor([source.data_ptr() for source in sources])
    moved = library().floor_move(
        pointers.data_ptr(),
        addresses.data_ptr(),
        counts.data_ptr(),
        len(sources),
        sources[0].itemsize,
        itemsize,
        torch.get_num_threads(),
    )
    if not moved:
        raise ValueError(f"no loop from {sources[0].itemsize} to {itemsize} bytes")


def into_fresh_memory(sources: Sequence[torch.Tensor], dtype: torch.dtype) -> Callable[[], Mapping]:
    """A call that maps memory for the results and fills it."""
    sizes = [source.numel() * dtype.itemsize for source in sources]
    counts = torch.tensor([source.numel() for source in sources])
    library()

    def call() -> Mapping:
        mapping = Mapping(sizes)
        move(sources, torch.tensor(mapping.addresses), counts, dtype.itemsize)
        return mapping

    return call


def into_warm_memory(sources: Sequence[torch.Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """A call that fills memory that has been written to before."""
    mapping = into_fresh_memory(sources, dtype)()
    addresses, counts = torch.tensor(mapping.addresses), torch.tensor([source.numel() for source in sources])

    def call() -> None:
        assert mapping.start
        move(sources, addresses, counts, dtype.itemsize)

    return call


def read(paths: Sequence[Path], written: int, threads: int | None = None, most: int | None = None) -> Mapping:
    """Reads files once, or so many bytes of each, through small buffers, and writes fresh memory meanwhile."""
    mapping = Mapping([written])
    sizes = torch.tensor([min(path.stat().st_size, most or path.stat().st_size) for path in paths])
    names = (ctypes.c_char_p * len(paths))(*(bytes(path) for path in paths))
    if not library().floor_read(
        names, sizes.data_ptr(), len(paths), mapping.addresses[0], written, threads or torch.get_num_threads()
    ):
        raise OSError(f"cannot read {paths[0]} or one of the {len(paths) - 1} files beside it")
    return mapping
