"""Tensors written to a file through staging of bounded size, cast on the way."""

import ctypes
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from fastopt.files.checksums import Checksum, combined, memory_at
from fastopt.files.writeback import begin_writeback

Entry = tuple[int, torch.Tensor, torch.dtype]
"""Where in the file a tensor begins, in bytes; the tensor; the dtype that it has there."""

CHUNK = 4 << 20
"""Bytes of a stage, and the most that is written at once."""

SMALL = 64 << 10
"""Bytes from which on a tensor that needs no cast is written from where it lies; smaller ones are gathered."""

MOST_THREADS = 31
"""However many torch has: with a stage each, and one to fill meanwhile, staging takes 128 MiB at most."""


def write_tensors(fd: int, entries: Iterable[Entry], crc32: Checksum = zlib.crc32) -> list[int]:
    """Write tensors to their places in a file; returns the CRC-32 (zlib's) of what was written for each, in order.

    A tensor is written as its elements in row-major order, in the machine's byte order, packed. It may lie on any
    device, have any strides, be conjugated, empty, or share memory with others; it is a plain strided one with values
    (no wrapper subclass, not quantized, not on the meta device), and does not change meanwhile. Casts are those of
    `Tensor.copy_`. Extra memory: 128 MiB, whatever the tensors' sizes.

    Bytes of the file between the entries stay what they are; a file that is too short grows. Entries that follow each
    other in the file without a gap are gathered, so many small ones are best given in the order of their offsets (and
    the bytes between them as tensors of uint8). The file's position does not move. Nothing is synced,
    but what is written begins its way to the disk at once.

    Args:
        fd: a file that is open for writing, and stays open.
        entries: (offset in bytes, tensor, final dtype) each; no two overlap. Read one by one, as they are written.
        crc32: what takes the checksums.

    Raises:
        OSError: the file could not be written; some of it may be.
        RuntimeError: torch could not cast or copy a tensor; a note says which of the entries.

    Whatever it raises, no thread writes any more.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS)
    pool = ThreadPoolExecutor(threads)
    try:
        writer = _Writer(fd, pool, threads, crc32)
        for index, (offset, tensor, dtype) in enumerate(entries):
            try:
                writer.add(offset, tensor.detach(), dtype)
            except RuntimeError as error:
                error.add_note(f"while writing entry {index}")
                raise
        return writer.finish()
    finally:
        pool.shutdown(cancel_futures=True)  # waits for what is in flight


class _Part(NamedTuple):
    """A part of an entry within the memory of a job."""

    entry: int
    start: int
    length: int
    offset: int
    """In the file."""


class _Stage:
    """Memory that is filled and then written."""

    def __init__(self) -> None:
        self.memory = torch.empty(CHUNK, dtype=torch.uint8)
        self.used = 0
        self.parts: list[_Part] = []

    def has_room(self, count: int, itemsize: int) -> bool:
        return self.used + -self.used % itemsize + count <= CHUNK

    def take(self, entry: int, offset: int, count: int, itemsize: int) -> int:
        """Set aligned room aside for a part of an entry; returns where it begins."""
        start = self.used + -self.used % itemsize
        self.parts.append(_Part(entry, start, count, offset))
        self.used = start + count
        return start


class _Writer:
    """Cuts entries into jobs of a chunk. The calling thread casts, with torch's own threads; the pool's write."""

    def __init__(self, fd: int, pool: ThreadPoolExecutor, threads: int, crc32: Checksum) -> None:
        self.fd = fd
        self.crc32 = crc32
        self.pool = pool
        self.stages = threads + 1
        self.free: list[_Stage] = []
        self.stage: _Stage | None = None
        self.jobs: deque[tuple[Future[list[int]], list[_Part], _Stage | torch.Tensor]] = deque()
        self.crcs: list[int] = []

    def add(self, offset: int, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        """Write an entry, now or together with those that follow."""
        entry = len(self.crcs)
        self.crcs.append(0)
        count = tensor.numel() * dtype.itemsize
        if not lies_as_written(tensor, dtype):
            for piece in pieces(tensor, CHUNK // dtype.itemsize):
                self.cast(entry, offset, piece, dtype)
                offset += piece.numel() * dtype.itemsize
        elif 0 < count < SMALL:
            stage = self.with_room(count, 1)
            start = stage.take(entry, offset, count, 1)
            ctypes.memmove(stage.memory.data_ptr() + start, tensor.data_ptr(), count)
        else:
            for start in range(0, count, CHUNK):
                part = _Part(entry, 0, min(CHUNK, count - start), offset + start)
                self.submit(tensor.data_ptr() + start, [part], tensor)

    def cast(self, entry: int, offset: int, piece: torch.Tensor, dtype: torch.dtype) -> None:
        """Bring a piece of an entry into a stage."""
        count = piece.numel() * dtype.itemsize
        stage = self.with_room(count, dtype.itemsize)
        start = stage.take(entry, offset, count, dtype.itemsize)
        stage.memory[start : start + count].view(dtype).view(piece.shape).copy_(piece)

    def with_room(self, count: int, itemsize: int) -> _Stage:
        """A stage that so many bytes fit into."""
        if self.stage is not None and not self.stage.has_room(count, itemsize):
            self.flush()
        if self.stage is None:
            self.stage = self.free.pop() if self.free else _Stage()
        return self.stage

    def flush(self) -> None:
        """Have what is staged written."""
        if self.stage is not None:
            stage, self.stage = self.stage, None
            self.submit(stage.memory.data_ptr(), stage.parts, stage)

    def submit(self, address: int, parts: list[_Part], owner: _Stage | torch.Tensor) -> None:
        """Have memory written; `owner` keeps it alive."""
        while len(self.jobs) >= self.stages - 1:
            self.collect()
        self.jobs.append((self.pool.submit(write_parts, self.fd, address, parts, self.crc32), parts, owner))

    def collect(self) -> None:
        """Wait for the oldest job, and take its checksums and its stage."""
        job, parts, owner = self.jobs.popleft()
        for crc, part in zip(job.result(), parts, strict=True):
            self.crcs[part.entry] = combined(self.crcs[part.entry], crc, part.length)
        if isinstance(owner, _Stage):
            owner.used, owner.parts = 0, []
            self.free.append(owner)

    def finish(self) -> list[int]:
        """Wait for all that is in flight; returns the checksums."""
        self.flush()
        while self.jobs:
            self.collect()
        return self.crcs


def lies_as_written(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor's memory is what the file gets."""
    return (
        tensor.dtype is dtype
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
    )


def pieces(tensor: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Views that are the tensor's elements in row-major order, of at most so many each."""
    if tensor.numel() <= most:
        if tensor.numel():
            yield tensor
    elif tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), most)
    elif (row := tensor[0].numel()) <= most:
        yield from torch.split(tensor, most // row)
    else:
        for index in range(len(tensor)):
            yield from pieces(tensor[index], most)


def write_parts(fd: int, address: int, parts: list[_Part], crc32: Checksum) -> list[int]:
    """Write parts of the memory at an address; returns the CRC-32 of each. What is adjacent is written at once."""
    begin = parts[0]
    count = 0
    for part in parts:
        if part.start != begin.start + count or part.offset != begin.offset + count:
            write_all(fd, memory_at(address + begin.start, count), begin.offset)
            begin, count = part, 0
        count += part.length
    write_all(fd, memory_at(address + begin.start, count), begin.offset)
    return [crc32(memory_at(address + part.start, part.length)) for part in parts]


def write_all(fd: int, memory: memoryview, offset: int) -> None:
    """Write all of the memory, however many calls that takes."""
    begin, count = offset, len(memory)
    while memory:
        written = os.pwrite(fd, memory, offset)
        memory, offset = memory[written:], offset + written
    if count >= SMALL:
        begin_writeback(fd, begin, count)
