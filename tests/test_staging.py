"""Tensors written through staging; torch's own copies and zlib are the oracle."""

import os
import zlib

import pytest
import torch

from fastopt.files import staging
from fastopt.files.checksums import checksums, combined
from fastopt.files.staging import write_tensors

CHUNK = 1 << 10
MANY = 3 * CHUNK + 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("fastopt.files.staging.CHUNK", CHUNK)
    monkeypatch.setattr("fastopt.files.staging.SMALL", 200)
    monkeypatch.setattr("fastopt.files.checksums.CHUNK", CHUNK)


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "file", "w+b") as file:
        yield file


def written_bytes(tensor, dtype):
    """What the file should get, by torch."""
    plain = torch.empty(tensor.shape, dtype=dtype)
    plain.copy_(tensor.detach())
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def values(count, dtype):
    real = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 100
    return torch.complex(real, -real).to(dtype) if dtype.is_complex else real.to(dtype)


def odd_tensors():
    return {
        "none": torch.empty(0),
        "no rows": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "small": values(7, torch.float32),
        "large": values(MANY, torch.float32),
        "transposed": values(6 * MANY, torch.float32).view(6, MANY).t(),
        "long rows": values(6 * MANY, torch.float32).view(MANY, 6).t(),
        "three dimensions": values(5 * 7 * 900, torch.float32).view(5, 900, 7).transpose(1, 2),
        "every other": values(2 * MANY, torch.float32)[::2],
        "expanded": values(3, torch.float32).expand(MANY, 3),
        "at an offset": values(MANY, torch.float32)[3:],
        "conjugated": values(MANY, torch.complex64).conj(),
        "negated": values(MANY, torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(values(9, torch.float32)),
        "with a gradient": values(9, torch.float32).requires_grad_() * 2,
        "uint8": torch.arange(250, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
    }


@pytest.mark.parametrize("name", odd_tensors())
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_one_tensor(file, name, dtype, offset):
    tensor = odd_tensors()[name]
    dtype = dtype or tensor.dtype
    [crc] = write_tensors(file.fileno(), [(offset, tensor, dtype)])
    expected = written_bytes(tensor, dtype)
    assert file.read() == bytes(offset if expected else 0) + expected
    assert crc == zlib.crc32(expected)


DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.uint16,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [11, MANY])
def test_dtypes_unchanged(file, dtype, count):
    contiguous = values(count, dtype)
    strided = torch.stack([contiguous, contiguous], dim=1)[:, 1]
    assert not strided.is_contiguous()
    raw = written_bytes(contiguous, dtype)
    crcs = write_tensors(file.fileno(), [(0, contiguous, dtype), (len(raw), strided, dtype)])
    assert file.read() == raw + raw
    assert crcs == [zlib.crc32(raw)] * 2


def test_nans_keep_their_bits(file):
    raw = torch.tensor([0x7FC00001, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    write_tensors(file.fileno(), [(0, torch.stack([raw, raw], dim=1)[:, 0], torch.float32)])
    assert file.read() == raw.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("gap", [0, 1, 64])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_tensors_with_gaps_that_stay(file, gap, threads):
    generator = torch.Generator().manual_seed(gap)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]
    tensors = []
    for index in range(300):
        size = int(torch.randint(0, 900 if index % 7 == 0 else 40, (), generator=generator))
        tensors.append((values(size, dtypes[index % 3]), dtypes[index % 4]))
    expected, entries = bytearray(), []
    for tensor, dtype in tensors:
        expected += b"#" * gap
        entries.append((len(expected), tensor, dtype))
        expected += written_bytes(tensor, dtype)
    file.write(b"#" * len(expected))
    file.flush()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        crcs = write_tensors(file.fileno(), iter(entries))
    finally:
        torch.set_num_threads(before)
    assert os.pread(file.fileno(), len(expected) + 1, 0) == expected
    assert crcs == [zlib.crc32(written_bytes(tensor, dtype)) for tensor, dtype in tensors]


def test_nothing_to_write(file):
    assert write_tensors(file.fileno(), []) == []


def test_what_torch_cannot_cast_is_named(file):
    tensor = torch.zeros(3)
    with pytest.raises(RuntimeError) as caught:
        write_tensors(file.fileno(), [(0, tensor, torch.float32), (12, tensor.to_sparse(), torch.float32)])
    assert "while writing entry 1" in caught.value.__notes__


def test_a_failing_write_is_raised_once_no_thread_writes_any_more(tmp_path, monkeypatch):
    running = []

    def failing(fd, memory, offset):
        running.append(offset)
        if offset >= 2 * CHUNK:
            raise OSError(28, "No space left on device")
        return len(memory)

    monkeypatch.setattr(staging.os, "pwrite", failing)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(99, [(0, values(100 * CHUNK, torch.float32), torch.float32)])
    assert len(running) < 20, "it went on writing"


def test_short_writes_go_on(file, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(staging.os, "pwrite", lambda fd, memory, offset: pwrite(fd, memory[:100], offset))
    tensor = values(MANY, torch.float32)
    write_tensors(file.fileno(), [(0, tensor, torch.float32)])
    assert file.read() == written_bytes(tensor, torch.float32)


@pytest.mark.parametrize("first", [b"", b"a", b"0123456789" * 77])
@pytest.mark.parametrize("second", [b"", b"\0", bytes(1000), b"xyz" * 3333])
def test_checksums_of_pieces_combine(first, second):
    assert combined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_checksums_of_parts_of_a_file(file):
    content = values(2 * CHUNK // 8 + MANY, torch.float64).numpy().tobytes()
    file.write(content)
    file.flush()
    ranges = [(0, 0), (5, 1), (7, CHUNK), (3, 2 * CHUNK + 1), (len(content), 0), (0, len(content))]
    expected = [zlib.crc32(content[offset : offset + count]) for offset, count in ranges]
    assert list(checksums(file.fileno(), ranges)) == expected
    with pytest.raises(OSError, match=f"has ended before 2 bytes from byte {len(content)} on"):
        list(checksums(file.fileno(), [(len(content) - 3, 5)]))
