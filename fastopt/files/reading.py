"""Bytes of open files, read as they are asked for."""

import os

import torch

from fastopt.files.checksums import writable_memory_of


def read_exactly(descriptor: int, offset: int, target: torch.Tensor) -> None:
    """Fill a contiguous tensor on the CPU with the bytes that stand in a file.

    Raises:
        OSError: they cannot be read, or the file ends before.
    """
    memory = writable_memory_of(target)
    while memory:
        if not (count := os.preadv(descriptor, [memory], offset)):
            raise OSError(f"the file has ended before {len(memory)} bytes from byte {offset} on")
        memory, offset = memory[count:], offset + count
