"""fastopt.copy_ between tensors of one GPU, beside `dst.copy_(src)`."""

import pytest
import torch

import fastopt
from tests.batches import FLOATING, OTHERS
from tests.gpu.device import assert_same_bits_but_for_nan, needs_gpu, random_values

pytestmark = needs_gpu

GPU = "cuda"
COUNTS = (0, 1, 7, 16, 33, 4095, 4096, 4097, 100_003)


def assert_copied(dsts: list[torch.Tensor], srcs: list[torch.Tensor]) -> None:
    expected = [dst.clone().copy_(src) for dst, src in zip(dsts, srcs, strict=True)]
    versions = [dst._version for dst in dsts]
    fastopt.copy_(dsts, srcs)
    for dst, result, version in zip(dsts, expected, versions, strict=True):
        assert_same_bits_but_for_nan(dst, result)
        assert dst._version > version


@pytest.mark.parametrize("target", FLOATING, ids=str)
@pytest.mark.parametrize("source", FLOATING, ids=str)
def test_casts_of_every_size(backend: str, source: torch.dtype, target: torch.dtype) -> None:
    srcs = [random_values(count, source) for count in COUNTS]
    assert_copied([torch.zeros(count, dtype=target, device=GPU) for count in COUNTS], srcs)


@pytest.mark.parametrize("dtype", FLOATING + OTHERS, ids=str)
def test_moves_at_every_alignment(backend: str, dtype: torch.dtype) -> None:
    if dtype is torch.complex64:
        pytest.skip("random bits are compared as bits; complex has no such view")
    srcs, dsts = [], []
    for src_offset in range(4):
        for dst_offset in range(4):
            for count in COUNTS:
                srcs.append(random_values(count + src_offset, dtype)[src_offset:])
                dsts.append(torch.zeros(count + dst_offset, dtype=dtype, device=GPU)[dst_offset:])
    assert_copied(dsts, srcs)


def test_many_small_tensors_of_mixed_dtypes(backend: str) -> None:
    dtypes = [FLOATING[i % 4] for i in range(5_000)]
    srcs = [random_values(1 + i % 90, dtype) for i, dtype in enumerate(dtypes)]
    targets = [FLOATING[i // 4 % 4] for i in range(5_000)]
    assert_copied([torch.zeros_like(src, dtype=dtype) for src, dtype in zip(srcs, targets, strict=True)], srcs)


def test_strided_tensors_and_tensors_of_the_cpu(backend: str) -> None:
    srcs = [
        torch.rand(8, 6, device=GPU).t(),
        torch.rand(12),
        torch.rand(12, device=GPU),
        torch.rand(12, device=GPU)[::2],
    ]
    dsts = [
        torch.zeros(6, 8, device=GPU),
        torch.zeros(12, device=GPU),
        torch.zeros(12),
        torch.zeros(6, dtype=torch.bfloat16, device=GPU),
    ]
    assert_copied(dsts, srcs)


def test_work_is_ordered_by_the_current_stream(backend: str) -> None:
    stream = torch.cuda.Stream()
    src, dst = torch.zeros(1 << 20, device=GPU), torch.zeros(1 << 20, dtype=torch.bfloat16, device=GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        src.fill_(3)
        fastopt.copy_([dst], [src])
        seen = dst.clone()
    stream.synchronize()
    assert bool((seen == 3).all())


def test_a_cuda_graph_replays_the_copies(backend: str) -> None:
    srcs = [torch.zeros(100, device=GPU) for _ in range(70)]
    dsts = [torch.zeros(100, dtype=torch.bfloat16, device=GPU) for _ in srcs]
    fastopt.copy_(dsts, srcs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastopt.copy_(dsts, srcs)
    for index, src in enumerate(srcs):
        src.fill_(index)
    graph.replay()
    torch.cuda.synchronize()
    assert [float(dst[0]) for dst in dsts] == [float(index) for index in range(70)]


def test_a_load_in_place_keeps_the_memory(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(1000, device=GPU, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"] = {0: {key: value.clone() for key, value in saved["state"][0].items()}}
    saved["state"][0]["exp_avg"].fill_(5)
    address = optimizer.state[param]["exp_avg"].data_ptr()
    fastopt.load_state_dict(optimizer, saved, inplace=True)
    assert optimizer.state[param]["exp_avg"].data_ptr() == address
    assert bool((optimizer.state[param]["exp_avg"] == 5).all())
