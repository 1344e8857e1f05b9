"""States that come from the CPU, and go back there, with parameters on a GPU; torch's own methods are the oracle."""

import copy as copying
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

import fastopt
from tests.gpu.test_options import GPU, MIB, adamw, on_cpu
from tests.oracle import TORCH_LOAD_STATE_DICT, TORCH_STATE_DICT, Comparison, trained

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("backend"),
]

KINDS = {
    "AdamW": (AdamW, {}),
    "capturable": (AdamW, {"capturable": True}),
    "fused": (AdamW, {"fused": True}),
    "amsgrad": (AdamW, {"amsgrad": True}),
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make(kind: str, device: str = GPU, dtype: torch.dtype = torch.float32) -> Optimizer:
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(300, 40), (7,), (), (0, 3), *[(3,)] * 50, (1200, 1000)]
    params = [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]
    optimizer, options = KINDS[kind]
    return optimizer(params, **options)


def assert_same_state(actual: Optimizer, expected: Optimizer) -> None:
    """On the same devices, to the bit."""
    a, b = TORCH_STATE_DICT(actual), TORCH_STATE_DICT(expected)
    for index, entry in b["state"].items():
        assert {k: v.device for k, v in a["state"][index].items()} == {k: v.device for k, v in entry.items()}
    Comparison().same(on_cpu(a), on_cpu(b))


@dtypes
@kinds
@pytest.mark.parametrize("copy", [True, False])
def test_a_state_on_the_cpu_is_loaded_as_by_torch(kind: str, dtype: torch.dtype, copy: bool) -> None:
    saved = on_cpu(TORCH_STATE_DICT(trained(make(kind, dtype=dtype))))
    for entry in saved["state"].values():
        entry.update({key: value.float() for key, value in entry.items() if key != "step"})
    optimizer, expected = make(kind, dtype=dtype), make(kind, dtype=dtype)
    report = fastopt.load_state_dict(optimizer, saved, copy=copy)
    TORCH_LOAD_STATE_DICT(expected, copying.deepcopy(saved))
    assert_same_state(optimizer, expected)
    assert report.tensors == sum(len(entry) for entry in saved["state"].values())
    assert_same_state(trained(optimizer), trained(expected))


@kinds
def test_a_state_on_the_gpu_is_copied(kind: str) -> None:
    source, optimizer = trained(make(kind)), make(kind)
    saved = TORCH_STATE_DICT(source)
    expected = on_cpu(saved)
    fastopt.load_state_dict(optimizer, saved)
    addresses = {tensor.data_ptr() for entry in saved["state"].values() for tensor in entry.values() if tensor.numel()}
    assert not any(t.data_ptr() in addresses for entry in optimizer.state.values() for t in entry.values())
    Comparison().same(on_cpu(TORCH_STATE_DICT(optimizer)), expected)


@pytest.mark.parametrize("options", [{}, {"audit": True}, {"donate": True}, {"inplace": True}])
def test_a_file_is_loaded_to_the_gpu(tmp_path: Path, options: dict[str, Any]) -> None:
    saved = on_cpu(TORCH_STATE_DICT(trained(make("AdamW"))))
    torch.save(saved, tmp_path / "o.pt")
    optimizer = trained(make("AdamW", dtype=torch.bfloat16)) if "inplace" in options else make("AdamW")
    fastopt.load(optimizer, tmp_path / "o.pt", **options)
    expected = make("AdamW", dtype=next(iter(optimizer.state)).dtype)
    TORCH_LOAD_STATE_DICT(expected, copying.deepcopy(saved))
    assert_same_state(optimizer, expected)


@kinds
@pytest.mark.parametrize("device", ["cpu", "keep", GPU])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_snapshot_is_restored(kind: str, device: str, dtype: torch.dtype | None) -> None:
    optimizer = trained(make(kind))
    expected = on_cpu(TORCH_STATE_DICT(optimizer))
    where = [t.device for entry in optimizer.state.values() for t in entry.values()]
    snapshot = fastopt.snapshot(optimizer, device=device, dtype=dtype)
    trained(optimizer)
    for _ in range(2):
        snapshot.restore()
        assert [t.device for entry in optimizer.state.values() for t in entry.values()] == where
        found = on_cpu(TORCH_STATE_DICT(optimizer))
        if dtype is None:
            Comparison().same(found, expected)
        for index, entry in expected["state"].items():
            for key, value in entry.items():
                kept = value if key == "step" or dtype is None else value.to(dtype).to(value.dtype)
                assert torch.equal(found["state"][index][key], kept)
        trained(optimizer)
        snapshot.restore(inplace=True)
        assert [t.device for entry in optimizer.state.values() for t in entry.values()] == where


def test_no_memory_on_the_gpu_leaves_the_optimizer_as_it_was() -> None:
    optimizer = trained(adamw(GPU, shapes=((16 * MIB,), (5,))))
    before = on_cpu(TORCH_STATE_DICT(optimizer))
    saved = copying.deepcopy(before)
    for entry in saved["state"].values():
        entry["exp_avg"].fill_(7)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 96 * MIB) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            fastopt.load_state_dict(optimizer, saved)
        Comparison().same(on_cpu(TORCH_STATE_DICT(optimizer)), before)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    fastopt.load_state_dict(optimizer, saved)
    Comparison().same(on_cpu(TORCH_STATE_DICT(optimizer)), saved)


def test_many_parameters_take_few_transfers() -> None:
    if fastopt.backend().name != "native":
        pytest.skip("the Python backend asks torch for each tensor")
    optimizer = adamw(GPU, shapes=((5,),) * 3_000)
    saved = on_cpu(TORCH_STATE_DICT(trained(adamw("cpu", shapes=((5,),) * 3_000))))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fastopt.load_state_dict(optimizer, saved)
        torch.cuda.synchronize()
    transfers = [event for event in profile.events() if "Memcpy HtoD" in event.name]
    assert len(transfers) <= 4
