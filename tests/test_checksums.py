"""The checksum of each backend, beside zlib's."""

import zlib

import pytest

from fastopt.backends import current

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("count", [0, 1, 15, 16, 63, 64, 65, 127, 128, 4096, 100_003])
def test_it_is_that_of_zlib(count):
    data = bytes(index * index % 251 for index in range(count + 3))
    for begin in range(3):
        part = memoryview(data)[begin : begin + count]
        assert current().crc32(part) == zlib.crc32(part)
        assert current().crc32(part, 0xDEADBEEF) == zlib.crc32(part, 0xDEADBEEF)


def test_in_pieces():
    data = bytes(range(256)) * 5
    total = 0
    for begin in range(0, len(data), 77):
        total = current().crc32(data[begin : begin + 77], total)
    assert total == zlib.crc32(data)


def test_bytes_with_gaps_are_refused():
    with pytest.raises((ValueError, BufferError)):
        current().crc32(memoryview(b"abcdef")[::2])
