"""The cast kernels of every instruction set of this machine, held bit by bit to `Tensor.to`."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import fastopt
from fastopt import _C, backends

HOT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAIRS = [pytest.param(src, dst, id=f"{src}-{dst}".replace("torch.", "")) for src, dst in itertools.product(HOT, HOT)]
SHORTER_THAN_A_VECTOR = 15
GUARD = 64
CHUNK_BYTES = 1 << 20  # kChunkCost and kSerialCost of csrc/core/run.cpp
SERIAL_BYTES = 64 << 10


@pytest.fixture(params=_C.cpu_targets())
def cpu_target(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_target()
    _C.use_cpu_target(request.param)
    assert _C.cpu_target() == request.param
    yield request.param
    _C.use_cpu_target(before)


@pytest.fixture(params=[False, True], ids=["cached", "streaming"])
def streaming(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def native(cpu_target: str) -> Iterator[None]:
    before = backends.backend().name
    backends.use("native")
    yield
    backends.use(before)


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_cast_as_torch_does(result: torch.Tensor, source: torch.Tensor) -> None:
    expected = source.to(result.dtype)
    same = bits(result) == bits(expected)
    if result.dtype != source.dtype:
        same |= source.isnan() & result.isnan()
    wrong = (~same).nonzero().flatten()
    assert wrong.numel() == 0, (
        f"{wrong.numel()} of {source.numel()} differ, the first at {wrong[0].item()}: {source[wrong[0]].item()!r} "
        f"became {result[wrong[0]].item()!r}, torch says {expected[wrong[0]].item()!r}"
    )


def cast_at(
    source: torch.Tensor, dtype: torch.dtype, streaming: bool, src_offset: int = 0, dst_offset: int = 0
) -> torch.Tensor:
    """Cast by the kernel in use, both sides that many bytes off alignment; the bytes around the result must stay."""
    src_bytes, dst_bytes = source.nbytes, source.numel() * dtype.itemsize
    src = torch.zeros(src_offset + src_bytes, dtype=torch.uint8)
    src[src_offset:] = source.view(torch.uint8)
    dst = torch.randint(256, (GUARD + dst_offset + dst_bytes + GUARD,), dtype=torch.uint8)
    before = dst.clone()
    inside = slice(GUARD + dst_offset, GUARD + dst_offset + dst_bytes)
    _C.cast_buffer(src[src_offset:].numpy(), name(source.dtype), dst[inside].numpy(), name(dtype), streaming)
    result = dst[inside].clone().view(dtype)
    dst[inside] = before[inside]
    assert torch.equal(dst, before), "bytes around the destination changed"
    return result


def every_16_bit_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def every_exponent_with_boundary_mantissas(dtype: torch.dtype) -> torch.Tensor:
    """For every exponent and both signs: a tie at every bit, with an even or odd number above it, and its neighbours.

    That is where rounding to fewer bits changes, wherever the target cuts, subnormal targets included. The neighbours
    of a float64 tie differ from it by less than float32 holds, so rounding twice shows.
    """
    integer, mantissa_bits, exponent_bits = {
        torch.float32: (torch.int32, 23, 8),
        torch.float64: (torch.int64, 52, 11),
    }[dtype]
    mask = (1 << mantissa_bits) - 1
    above = (0, 1, 2, 0b101101, mask)
    mantissas = sorted(
        {
            ((high << (bit + 1)) + (1 << bit) + by) & mask
            for bit in range(mantissa_bits)
            for high in above
            for by in (-1, 0, 1)
        }
    )
    exponents = torch.arange(1 << exponent_bits, dtype=torch.int64) << mantissa_bits
    magnitudes = (exponents[:, None] + torch.tensor(mantissas)).flatten()
    lowest = -(1 << (mantissa_bits + exponent_bits))
    return torch.cat([magnitudes, magnitudes + lowest]).to(integer).view(dtype)


def limits_of_the_hot_dtypes(dtype: torch.dtype) -> torch.Tensor:
    """Largest, smallest normal and subnormal values of each hot dtype, half-way to the next, and their neighbours."""
    infos = [torch.finfo(hot) for hot in HOT]
    limits = torch.tensor(
        [value for i in infos for value in (i.max, i.max * (1 + i.eps / 4), i.tiny, i.tiny * i.eps, i.tiny * i.eps / 2)]
        + [0.0, float("inf"), float("nan"), 65504, 65519.99, 65520, 65536],
        dtype=torch.float64,
    ).to(dtype)
    infinity = torch.tensor(float("inf"), dtype=dtype)
    near = torch.cat([limits, torch.nextafter(limits, infinity), torch.nextafter(limits, -infinity)])
    return torch.cat([near, -near])


def hard_values(dtype: torch.dtype) -> torch.Tensor:
    if dtype.itemsize == 2:
        return every_16_bit_value(dtype)
    return torch.cat([every_exponent_with_boundary_mantissas(dtype), limits_of_the_hot_dtypes(dtype)])


def random_bits(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_hard_values(cpu_target: str, streaming: bool, src: torch.dtype, dst: torch.dtype) -> None:
    source = hard_values(src)
    assert_cast_as_torch_does(cast_at(source, dst, streaming), source)


@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_hard_values_in_the_tail_after_the_last_whole_vector(
    cpu_target: str, streaming: bool, src: torch.dtype, dst: torch.dtype
) -> None:
    source = hard_values(src)
    if len(source) > 2**16:
        source = source[torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[: 2**16]]
    result = torch.empty(len(source), dtype=dst)
    from_bytes, to_bytes = source.view(torch.uint8).numpy(), result.view(torch.uint8).numpy()
    for start in range(0, len(source), SHORTER_THAN_A_VECTOR):
        stop = start + SHORTER_THAN_A_VECTOR
        _C.cast_buffer(
            from_bytes[start * src.itemsize : stop * src.itemsize],
            name(src),
            to_bytes[start * dst.itemsize : stop * dst.itemsize],
            name(dst),
            streaming,
        )
    assert_cast_as_torch_does(result, source)


def test_hard_doubles_tell_two_roundings_from_one() -> None:
    doubles = hard_values(torch.float64)
    doubles = doubles[doubles.abs() < torch.finfo(torch.float16).max]
    rounded_once = torch.from_numpy(doubles.numpy().astype(np.float16))
    assert (bits(rounded_once) != bits(doubles.to(torch.float16))).any()


@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_every_small_size(cpu_target: str, streaming: bool, src: torch.dtype, dst: torch.dtype) -> None:
    for count in range(131):
        source = random_bits(count, src)
        assert_cast_as_torch_does(cast_at(source, dst, streaming), source)


@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_unaligned_starts(cpu_target: str, streaming: bool, src: torch.dtype, dst: torch.dtype) -> None:
    for src_offset, dst_offset in itertools.product(range(16), (*range(16), 24, 32, 48, 56, 62, 63)):
        source = random_bits(67, src)
        assert_cast_as_torch_does(cast_at(source, dst, streaming, src_offset, dst_offset), source)


@pytest.mark.parametrize("edge", [SERIAL_BYTES, CHUNK_BYTES, 2 * CHUNK_BYTES, 5 * CHUNK_BYTES])
@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_sizes_around_the_edges_of_chunks(
    native: None, threads: int, src: torch.dtype, dst: torch.dtype, edge: int
) -> None:
    count = edge // (src.itemsize + dst.itemsize)
    source = random_bits(count + 130, src)
    for size in (count - 65, count - 1, count, count + 1, count + 63, count + 64, count + 130):
        [result] = fastopt.to([source[:size]], dtype=dst, copy=True)
        assert_cast_as_torch_does(result, source[:size])


@pytest.mark.parametrize("place", [0, 700, 1500])
def test_many_small_tensors_around_a_large_one(native: None, threads: int, place: int) -> None:
    generator = torch.Generator().manual_seed(place)
    counts = torch.randint(0, 200, (1500,), generator=generator).tolist()
    sources = [random_bits(count, HOT[index % len(HOT)]) for index, count in enumerate(counts)]
    sources.insert(place, random_bits(3 * CHUNK_BYTES // 4 + 17, torch.float32))
    for dtype in HOT:
        for result, source in zip(fastopt.to(sources, dtype=dtype, copy=True), sources, strict=True):
            assert_cast_as_torch_does(result, source)


def test_a_buffer_of_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="int8"):
        _C.cast_buffer(bytes(4), "int8", bytearray(4), "float32", False)


def test_buffers_of_different_numbers_of_elements_are_refused() -> None:
    destination = bytearray(b"untouched!")
    with pytest.raises(ValueError, match="number of elements"):
        _C.cast_buffer(bytes(16), "float32", destination, "bfloat16", False)
    assert destination == b"untouched!"


def test_a_read_only_destination_is_refused() -> None:
    with pytest.raises(BufferError):
        _C.cast_buffer(bytes(4), "float32", bytes(2), "bfloat16", False)


def test_an_unknown_target_is_refused_and_the_choice_stays() -> None:
    before = _C.cpu_target()
    with pytest.raises(ValueError, match="nonsense") as caught:
        _C.use_cpu_target("nonsense")
    assert all(target in str(caught.value) for target in _C.cpu_targets())
    assert _C.cpu_target() == before
