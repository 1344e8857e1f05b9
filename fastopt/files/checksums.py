"""CRC-32 of what is in files: zlib's, which is that of zip files as well, on all threads."""

import ctypes
import functools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

Checksum = Callable[..., int]
"""As `zlib.crc32`: of a buffer, and of what was before it."""

CHUNK = 4 << 20
"""Bytes that a thread takes at a time."""

POLYNOMIAL = 0xEDB88320
"""That of CRC-32, its lowest power first, as are all values here."""

_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.restype = ctypes.py_object
_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_READABLE, _WRITABLE = 0x100, 0x200


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy. Whoever has the view keeps the tensor alive."""
    return memory_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def writable_memory_of(tensor: torch.Tensor) -> memoryview:
    """The same, to write to."""
    count = tensor.numel() * tensor.element_size()
    return _view(tensor.data_ptr(), count, _WRITABLE) if count else memoryview(b"")


def memory_at(address: int, count: int) -> memoryview:
    """The bytes at an address; whoever has the view keeps what is there alive."""
    return _view(address, count, _READABLE) if count else memoryview(b"")


def checksums(descriptor: int, ranges: Iterable[tuple[int, int]]) -> Iterator[int]:
    """The CRC-32 of parts of a file, offset and bytes each, one after the other; all threads read.

    Raises:
        OSError: the file cannot be read, or ends before.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for offset, count in ranges:
            chunks = [(start, min(CHUNK, offset + count - start)) for start in range(offset, offset + count, CHUNK)]
            of_chunk = functools.partial(checksum, descriptor)
            found = map(of_chunk, chunks) if len(chunks) < 2 else pool.map(of_chunk, chunks)
            total = 0
            for crc, (_, length) in zip(found, chunks, strict=True):
                total = combined(total, crc, length)
            yield total


def checksum(descriptor: int, chunk: tuple[int, int]) -> int:
    """The CRC-32 of a part of a file."""
    offset, count = chunk
    total = 0
    while count:
        if not (content := os.pread(descriptor, count, offset)):
            raise OSError(f"the file has ended before {count} bytes from byte {offset} on")
        total = zlib.crc32(content, total)
        offset, count = offset + len(content), count - len(content)
    return total


def combined(first: int, second: int, count: int) -> int:
    """The CRC-32 of two pieces of data in a row, from those of each; the second is `count` bytes long."""
    return product(power_of_x(8 * count), first) ^ second if first else second


@functools.lru_cache(maxsize=64)  # nearly all chunks have one length
def power_of_x(exponent: int) -> int:
    """A power of x modulo the polynomial, over the field of two elements."""
    result, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = product(result, square)
        square = product(square, square)
        exponent >>= 1
    return result


def product(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32."""
    result = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            result ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return result
