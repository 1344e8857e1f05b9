"""fastopt.copy_ and fastopt.to between the CPU and a GPU, beside torch's own."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastopt
from tests.batches import FLOATING
from tests.gpu.bits import assert_same_bits_but_for_nan, random_values

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

MIB = 1 << 20
COUNTS = (0, 1, 7, 16, 33, 4095, 4097, 100_003, 600_001)  # the last one is more than a transfer that is shared
WAYS = {"to the GPU": ("cpu", "cuda"), "to the CPU": ("cuda", "cpu")}
MEMORIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pageable": lambda tensor: tensor,
    "pinned": lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory(),
}

ways = pytest.mark.parametrize("way", WAYS)
memories = pytest.mark.parametrize("memory", MEMORIES)


def assert_copied(dsts: list[torch.Tensor], srcs: list[torch.Tensor]) -> None:
    expected = [torch.empty_like(dst).copy_(src) for dst, src in zip(dsts, srcs, strict=True)]
    versions = [dst._version for dst in dsts]
    fastopt.copy_(dsts, srcs)
    for dst, result, version in zip(dsts, expected, versions, strict=True):
        assert_same_bits_but_for_nan(dst, result)
        assert dst._version > version


@memories
@ways
@pytest.mark.parametrize("target", FLOATING, ids=str)
@pytest.mark.parametrize("source", FLOATING, ids=str)
def test_casts_of_every_size(backend: str, source: torch.dtype, target: torch.dtype, way: str, memory: str) -> None:
    from_device, to_device = WAYS[way]
    srcs = [MEMORIES[memory](random_values(count, source, from_device)) for count in COUNTS]
    dsts = [MEMORIES[memory](torch.zeros(count, dtype=target, device=to_device)) for count in COUNTS]
    assert_copied(dsts, srcs)


@ways
@pytest.mark.parametrize("dtype", [*FLOATING, torch.uint8, torch.int64, torch.bool], ids=str)
def test_moves_at_every_alignment(backend: str, dtype: torch.dtype, way: str) -> None:
    from_device, to_device = WAYS[way]
    srcs, dsts = [], []
    for src_offset in range(4):
        for dst_offset in range(4):
            for count in COUNTS[:6]:
                srcs.append(random_values(count + src_offset, dtype, from_device)[src_offset:])
                dsts.append(torch.zeros(count + dst_offset, dtype=dtype, device=to_device)[dst_offset:])
    assert_copied(dsts, srcs)


@ways
def test_memory_of_the_cpu_at_any_byte(backend: str, way: str) -> None:
    bytes_there = torch.randint(0, 256, (40_001,), dtype=torch.uint8)
    on_cpu = torch.frombuffer(memoryview(bytes_there.numpy())[1:], dtype=torch.float32)
    on_gpu = random_values(10_000, torch.float32)
    assert_copied(*([[on_gpu], [on_cpu]] if way == "to the GPU" else [[on_cpu], [on_gpu]]))


@ways
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_the_ring_holds(backend: str, source: torch.dtype, target: torch.dtype, way: str) -> None:
    from_device, to_device = WAYS[way]
    srcs = [torch.randn(size, device=from_device).to(source) for size in (160 * MIB + 5, 3 * MIB, 11)]
    assert_copied([torch.zeros_like(src, dtype=target, device=to_device) for src in srcs], srcs)


@ways
def test_many_small_tensors_of_mixed_dtypes(backend: str, way: str) -> None:
    from_device, to_device = WAYS[way]
    srcs = [random_values(1 + i % 90, FLOATING[i % 4], from_device) for i in range(20_000)]
    dsts = [torch.zeros_like(src, dtype=FLOATING[i // 4 % 4], device=to_device) for i, src in enumerate(srcs)]
    assert_copied(dsts, srcs)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cpu", None])
@pytest.mark.parametrize("copy", [True, False])
def test_to_is_what_torch_makes(backend: str, dtype: torch.dtype | None, device: str | None, copy: bool) -> None:
    tensors = [
        torch.rand(8, 6).t(),
        torch.rand(2, 3, 4, 5, device="cuda").to(memory_format=torch.channels_last),
        torch.rand(12)[::2],
        torch.rand(5, 4, device="cuda"),
        torch.arange(5),
        torch.tensor(2.5),
        torch.empty(0, 3),
    ]
    options = {key: value for key, value in (("dtype", dtype), ("device", device)) if value is not None}
    results = fastopt.to(tensors, dtype=dtype, device=device, copy=copy)
    for tensor, result in zip(tensors, results, strict=True):
        expected = tensor.to(**options, copy=copy)
        assert (result is tensor) == (expected is tensor)
        assert result.stride() == expected.stride()
        assert result.device == expected.device
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)


@ways
def test_work_is_ordered_by_the_current_stream(backend: str, way: str) -> None:
    stream = torch.cuda.Stream()
    on_cpu, on_gpu = torch.full((5 * MIB,), 3.0), torch.zeros(5 * MIB, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        if way == "to the GPU":
            on_gpu.fill_(1)
            fastopt.copy_([on_gpu], [on_cpu])
            on_cpu.fill_(5)  # read already
            seen = on_gpu.clone()
        else:
            on_gpu.fill_(3)
            fastopt.copy_([on_cpu], [on_gpu])
            seen = on_cpu
    stream.synchronize()
    assert bool((seen == 3).all())


@memories
def test_a_source_may_be_changed_after_the_call(backend: str, memory: str) -> None:
    sources = [MEMORIES[memory](torch.full((size,), 3.0)) for size in (MIB, 40 * MIB, 3)]
    results = [torch.zeros_like(source, device="cuda") for source in sources]
    torch.cuda._sleep(100_000_000)
    fastopt.copy_(results, sources)
    for source in sources:
        source.fill_(5)
    assert all(bool((result == 3).all()) for result in results)


def test_pinned_memory_without_blocking(backend: str) -> None:
    for _ in range(10):
        source = torch.full((20 * MIB,), 3.0).pin_memory()
        on_gpu, back = torch.zeros_like(source, device="cuda"), torch.zeros_like(source).pin_memory()
        fastopt.copy_([on_gpu], [source], non_blocking=True)
        del source  # its memory is not given out again before it has been read
        torch.zeros(20 * MIB).pin_memory().fill_(7)
        fastopt.copy_([back], [on_gpu], non_blocking=True)
        torch.cuda.current_stream().synchronize()
        assert bool((back == 3).all())


def test_threads_share_the_ring(backend: str) -> None:
    def there_and_back(seed: int) -> None:
        source = torch.rand(12 * MIB + seed, generator=torch.Generator().manual_seed(seed))
        small = list(source[:30_000].split(3))
        with torch.cuda.stream(torch.cuda.Stream()):
            on_gpu = fastopt.to([source, *small], device="cuda")
            back = fastopt.to(on_gpu, device="cpu")
        assert torch.equal(back[0], source)
        assert torch.equal(torch.cat(back[1:]), source[:30_000])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(there_and_back, range(12)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_several_gpus_at_once(backend: str) -> None:
    sources = [torch.rand(3 * MIB) for _ in range(4)]
    devices = [f"cuda:{i % 2}" for i in range(4)]
    on_gpus = [torch.zeros_like(s, device=device) for s, device in zip(sources, devices, strict=True)]
    fastopt.copy_(on_gpus, sources)
    assert torch.cuda.current_device() == 0
    for source, result in zip(sources, on_gpus, strict=True):
        assert torch.equal(result.cpu(), source)


def test_a_graph_that_is_captured_takes_what_torch_lets_it(backend: str) -> None:
    source = torch.full((2 * MIB,), 3.0).pin_memory()
    result = torch.zeros_like(source, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastopt.copy_([result], [source], non_blocking=True)
    source.fill_(5)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((result == 5).all())


def test_only_as_much_memory_of_the_gpu_as_the_ring_has() -> None:
    sources = [torch.rand(64 * MIB).bfloat16() for _ in range(8)]
    results = [torch.zeros_like(source, dtype=torch.float32, device="cuda") for source in sources]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fastopt.copy_(results, sources)
    assert torch.cuda.max_memory_allocated() - before <= 256 * MIB
    assert torch.cuda.memory_allocated() == before


def test_importing_initialises_no_cuda() -> None:
    code = "import torch, fastopt; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
