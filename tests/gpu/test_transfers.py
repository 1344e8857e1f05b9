"""fastopt.copy_ and fastopt.to between the CPU and a GPU, beside what torch makes of the same values on the CPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastopt
from tests.batches import FLOATING
from tests.gpu.device import (
    IS_STAND_IN,
    assert_same_bits_but_for_nan,
    needs_device,
    needs_gpu,
    random_values,
    zeros,
)

pytestmark = needs_device

GPU = "cuda"
MIB = 1 << 20
COUNTS = (0, 1, 7, 16, 33, 4095, 4097, 100_003, 600_001)  # the last one is more than a transfer that is shared
WAYS = {"to the GPU": ("cpu", GPU), "to the CPU": (GPU, "cpu"), "within the GPU": (GPU, GPU)}
MEMORIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pageable": lambda tensor: tensor,
    "pinned": lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory(),
}

ways = pytest.mark.parametrize("way", WAYS)
memories = pytest.mark.parametrize("memory", MEMORIES)


@pytest.fixture
def native() -> None:
    """Skips what torch alone would not do, or has no kernels for on the stand-in."""
    if fastopt.backend().name != "native":
        pytest.skip("for the native backend")


def assert_copied(dsts: list[torch.Tensor], srcs: list[torch.Tensor]) -> None:
    expected = [torch.empty_like(dst, device="cpu").copy_(src.cpu()) for dst, src in zip(dsts, srcs, strict=True)]
    versions = [dst._version for dst in dsts]
    fastopt.copy_(dsts, srcs)
    for dst, result, version in zip(dsts, expected, versions, strict=True):
        assert_same_bits_but_for_nan(dst, result)
        assert dst._version > version


@pytest.mark.usefixtures("native")
@memories
@ways
@pytest.mark.parametrize("target", FLOATING, ids=str)
@pytest.mark.parametrize("source", FLOATING, ids=str)
def test_casts_of_every_size(source: torch.dtype, target: torch.dtype, way: str, memory: str) -> None:
    from_device, to_device = WAYS[way]
    srcs = [MEMORIES[memory](random_values(count, source, from_device)) for count in COUNTS]
    dsts = [MEMORIES[memory](zeros(count, target, to_device)) for count in COUNTS]
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
                dsts.append(zeros(count + dst_offset, dtype, to_device)[dst_offset:])
    assert_copied(dsts, srcs)


@pytest.mark.parametrize("way", ["to the GPU", "to the CPU"])
def test_memory_of_the_cpu_at_any_byte(backend: str, way: str) -> None:
    on_cpu = torch.frombuffer(bytearray(os.urandom(40_001)), dtype=torch.float32, offset=1)
    on_gpu = random_values(10_000, torch.float32)
    assert_copied(*([[on_gpu], [on_cpu]] if way == "to the GPU" else [[on_cpu], [on_gpu]]))


@pytest.mark.usefixtures("native")
@ways
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_the_ring_holds(source: torch.dtype, target: torch.dtype, way: str) -> None:
    from_device, to_device = WAYS[way]
    srcs = [torch.randn(size).to(source).to(from_device) for size in (160 * MIB + 5, 3 * MIB, 11)]
    assert_copied([zeros(src.numel(), target, to_device) for src in srcs], srcs)


@pytest.mark.usefixtures("native")
@ways
def test_many_small_tensors_of_mixed_dtypes(way: str) -> None:
    from_device, to_device = WAYS[way]
    srcs = [random_values(1 + i % 90, FLOATING[i % 4], from_device) for i in range(20_000)]
    assert_copied([zeros(src.numel(), FLOATING[i // 4 % 4], to_device) for i, src in enumerate(srcs)], srcs)


@needs_gpu
def test_strided_tensors_and_dtypes_without_kernels(backend: str) -> None:
    srcs = [torch.rand(8, 6).t(), torch.arange(12), torch.rand(24)[::2], torch.rand(6, 8, device=GPU).t()]
    dsts = [torch.zeros(6, 8, device=GPU), zeros(12, torch.float32), zeros(12, torch.float64), torch.zeros(8, 6)]
    assert_copied(dsts, srcs)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("device", [GPU, "cuda:0", 0, "cpu", None])
@pytest.mark.parametrize("copy", [True, False])
def test_to_is_what_torch_makes(dtype: torch.dtype | None, device: str | int | None, copy: bool) -> None:
    tensors = [
        torch.rand(8, 6).t(),
        torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.rand(5, 4).to(GPU),
        torch.rand(12)[2:],
        torch.tensor(2.5),
        torch.empty(0, 3),
    ]
    results = fastopt.to(tensors, dtype=dtype, device=device, copy=copy)
    for tensor, result in zip(tensors, results, strict=True):
        expected = tensor.cpu().to(dtype or tensor.dtype)
        place = tensor.device if device is None else torch.device(device)
        assert result.device == (torch.device("cuda:0") if place.type == GPU else place)
        assert (result is tensor) == (not copy and (tensor.dtype, tensor.device) == (result.dtype, result.device))
        assert result.dtype == expected.dtype
        assert result.stride() == expected.stride()
        assert torch.equal(result.cpu(), expected)


def occupied(stream: torch.cuda.Stream) -> None:
    """Keeps a stream busy; that of the stand-in does nothing before it has to."""
    if not IS_STAND_IN:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)


@pytest.mark.parametrize("way", ["to the GPU", "to the CPU"])
def test_work_is_ordered_by_the_current_stream(backend: str, way: str) -> None:
    threes, ones = (torch.full((5 * MIB,), value).pin_memory() for value in (3.0, 1.0))
    on_gpu = zeros(5 * MIB, torch.float32)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    occupied(stream)
    with torch.cuda.stream(stream):
        if way == "to the GPU":
            on_gpu.copy_(ones, non_blocking=True)
            on_cpu = torch.full((5 * MIB,), 3.0)
            fastopt.copy_([on_gpu], [on_cpu])
            on_cpu.fill_(5)  # read already
            seen = on_gpu.clone()
        else:
            on_gpu.copy_(threes, non_blocking=True)
            seen = torch.zeros(5 * MIB)
            fastopt.copy_([seen], [on_gpu])
    stream.synchronize()
    assert bool((seen.cpu() == 3).all())


@memories
def test_a_source_may_be_changed_after_the_call(backend: str, memory: str) -> None:
    sources = [MEMORIES[memory](torch.full((size,), 3.0)) for size in (MIB, 40 * MIB, 3)]
    results = [zeros(source.numel(), torch.float32) for source in sources]
    occupied(torch.cuda.current_stream())
    fastopt.copy_(results, sources)
    for source in sources:
        source.fill_(5)
    assert all(bool((result.cpu() == 3).all()) for result in results)


def test_pinned_memory_without_blocking(backend: str) -> None:
    for _ in range(10):
        source = torch.full((20 * MIB,), 3.0).pin_memory()
        on_gpu, back = zeros(20 * MIB, torch.float32), torch.zeros_like(source).pin_memory()
        occupied(torch.cuda.current_stream())
        fastopt.copy_([on_gpu], [source], non_blocking=True)
        del source  # its memory is not given out again before it has been read
        torch.zeros(20 * MIB).pin_memory().fill_(7)
        fastopt.copy_([back], [on_gpu], non_blocking=True)
        torch.cuda.current_stream().synchronize()
        assert bool((back == 3).all())


def test_threads_share_the_ring(backend: str) -> None:
    def there_and_back(seed: int) -> None:
        source = torch.rand(12 * MIB + seed, generator=torch.Generator().manual_seed(seed))
        small = list(source[:3_000].split(3))
        with torch.cuda.stream(torch.cuda.Stream()):
            on_gpu = fastopt.to([source, *small], device=GPU)
            back = fastopt.to(on_gpu, device="cpu")
        assert torch.equal(back[0], source)
        assert torch.equal(torch.cat(back[1:]), source[:3_000])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(there_and_back, range(8)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_several_gpus_at_once(backend: str) -> None:
    sources = [torch.rand(3 * MIB) for _ in range(4)]
    devices = [f"cuda:{i % 2}" for i in range(4)]
    on_gpus = [torch.zeros_like(s, device=device) for s, device in zip(sources, devices, strict=True)]
    fastopt.copy_(on_gpus, sources)
    assert torch.cuda.current_device() == 0
    for source, result in zip(sources, on_gpus, strict=True):
        assert torch.equal(result.cpu(), source)


@needs_gpu
def test_a_graph_that_is_captured_takes_what_torch_lets_it(backend: str) -> None:
    source = torch.full((2 * MIB,), 3.0).pin_memory()
    result = torch.zeros_like(source, device=GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastopt.copy_([result], [source], non_blocking=True)
    source.fill_(5)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((result == 5).all())


@pytest.mark.usefixtures("native")
def test_only_as_much_memory_of_the_gpu_as_the_ring_has() -> None:
    sources = [torch.rand(64 * MIB).bfloat16() for _ in range(4)]
    results = [zeros(source.numel(), torch.float32) for source in sources]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fastopt.copy_(results, sources)
    assert torch.cuda.max_memory_allocated() - before <= 256 * MIB
    assert torch.cuda.memory_allocated() == before


def test_importing_initialises_no_cuda() -> None:
    code = "import torch, fastopt; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("native")
def test_a_forked_process_says_why_it_cannot_copy() -> None:
    on_gpu, on_cpu = zeros(5, torch.float32), torch.ones(5)
    fastopt.copy_([on_gpu], [on_cpu])
    child = os.fork()
    if child == 0:
        try:
            fastopt.copy_([on_gpu], [on_cpu])
        except RuntimeError as error:
            os._exit(0 if "CUDA" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
