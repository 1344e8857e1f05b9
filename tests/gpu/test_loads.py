"""States that come from the CPU and go back there, with parameters on a GPU; the load on the CPU is the oracle."""

import copy as copying
import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

import fastopt
from tests.gpu.device import IS_STAND_IN, needs_device, needs_gpu
from tests.oracle import TORCH_LOAD_STATE_DICT, TORCH_STATE_DICT, Comparison, trained

pytestmark = needs_device

GPU = "cuda"
MIB = 1 << 20
SHAPES: tuple[tuple[int, ...], ...] = ((300, 40), (7,), (), (0, 3), *[(3,)] * 500, (1200, 1000))
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (AdamW, {}),
    "amsgrad": (AdamW, {"amsgrad": True}),
    "capturable": (AdamW, {"capturable": True}),
    "fused": (AdamW, {"fused": True}),
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def native() -> None:
    """Skips what torch has no kernels for on the stand-in."""
    if fastopt.backend().name != "native":
        pytest.skip("for the native backend")


def make(kind: str, device: str = GPU, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> Optimizer:
    torch.manual_seed(0)
    optimizer, options = KINDS[kind]
    return optimizer([torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes], **options)


def state_of(kind: str, shapes: Any = SHAPES) -> dict[str, Any]:
    """A state as that kind of optimizer has it, in float32, on the CPU."""
    target = make(kind, "cpu", shapes=shapes)
    optimizer, options = KINDS[kind]
    on_cpu_too = {key: value for key, value in options.items() if key not in ("capturable", "fused")}
    source = trained(optimizer(target.param_groups[0]["params"], **on_cpu_too))
    return {"state": TORCH_STATE_DICT(source)["state"], "param_groups": TORCH_STATE_DICT(target)["param_groups"]}


def on_cpu(optimizer: Optimizer) -> dict[str, Any]:
    """A copy of its state dict, with all of its tensors on the CPU."""
    state_dict = TORCH_STATE_DICT(optimizer)
    state = {index: {key: t.cpu().clone() for key, t in entry.items()} for index, entry in state_dict["state"].items()}
    return {**state_dict, "state": state}


def places(optimizer: Optimizer) -> list[torch.device]:
    return [tensor.device for entry in optimizer.state.values() for tensor in entry.values()]


def assert_loaded(optimizer: Optimizer, kind: str, saved: dict[str, Any]) -> None:
    """As by torch, with parameters on the CPU; and on the devices that torch would choose."""
    expected = make(kind, "cpu", optimizer.param_groups[0]["params"][0].dtype)
    TORCH_LOAD_STATE_DICT(expected, copying.deepcopy(saved))
    Comparison().same(on_cpu(optimizer), on_cpu(expected))
    step_on_gpu = kind in ("capturable", "fused")
    for entry in optimizer.state.values():
        assert {key for key, tensor in entry.items() if not tensor.is_cuda} == (
            {"step"} if "step" in entry and not step_on_gpu else set()
        )


@kinds
@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_on_the_cpu_is_loaded_as_by_torch(backend: str, kind: str, dtype: torch.dtype, copy: bool) -> None:
    saved = state_of(kind)
    optimizer = make(kind, dtype=dtype)
    report = fastopt.load_state_dict(optimizer, saved, copy=copy)
    assert_loaded(optimizer, kind, saved)
    assert report.tensors == sum(map(len, saved["state"].values()))


@needs_gpu
@kinds
def test_the_next_steps_are_those_after_a_load_by_torch(backend: str, kind: str) -> None:
    optimizer, expected, saved = make(kind), make(kind), state_of(kind)
    fastopt.load_state_dict(optimizer, saved)
    TORCH_LOAD_STATE_DICT(expected, copying.deepcopy(saved))
    Comparison().same(on_cpu(trained(optimizer)), on_cpu(trained(expected)))


@kinds
def test_a_state_on_the_gpu_is_copied(backend: str, kind: str) -> None:
    source, optimizer = make(kind), make(kind)
    fastopt.load_state_dict(source, state_of(kind))
    saved = TORCH_STATE_DICT(source)
    fastopt.load_state_dict(optimizer, saved)
    addresses = {tensor.data_ptr() for entry in saved["state"].values() for tensor in entry.values() if tensor.numel()}
    assert not any(t.data_ptr() in addresses for entry in optimizer.state.values() for t in entry.values())
    assert places(optimizer) == places(source)
    Comparison().same(on_cpu(optimizer), on_cpu(source))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    "options", [{}, {"audit": True}, {"donate": True}, {"policy": "keep"}, {"device": {"exp_avg": "cpu", "*": "param"}}]
)
def test_options_do_what_they_do_on_the_cpu(options: dict[str, Any]) -> None:
    optimizer, expected = make("AdamW", dtype=torch.float16), make("AdamW", "cpu", torch.float16)
    saved = state_of("AdamW")
    for entry in saved["state"].values():
        entry["exp_avg_sq"].mul_(1e-5)  # some of it too small for float16
    report = fastopt.load_state_dict(optimizer, copying.deepcopy(saved), **options)
    expected_report = fastopt.load_state_dict(expected, saved, **options)
    Comparison().same(on_cpu(optimizer), on_cpu(expected))
    assert report.casts.keys() >= {pair for pair in expected_report.casts if pair[0] is not pair[1]}
    assert report.audit == expected_report.audit


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("options", [{}, {"audit": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_file_is_loaded_to_the_gpu(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    saved = state_of("AdamW")
    torch.save(saved, tmp_path / "o.pt")
    optimizer = make("AdamW", dtype=dtype)
    fastopt.load(optimizer, tmp_path / "o.pt", **options)
    assert_loaded(optimizer, "AdamW", saved)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_no_address_changes(dtype: torch.dtype) -> None:
    optimizer, saved = make("AdamW", dtype=dtype), state_of("AdamW")
    fastopt.load_state_dict(optimizer, saved)
    before = [tensor.data_ptr() for entry in optimizer.state.values() for tensor in entry.values()]
    for entry in saved["state"].values():
        entry["exp_avg"].mul_(2)
    fastopt.load_state_dict(optimizer, saved, inplace=True)
    assert [tensor.data_ptr() for entry in optimizer.state.values() for tensor in entry.values()] == before
    assert_loaded(optimizer, "AdamW", saved)


@pytest.mark.usefixtures("native")
@kinds
@pytest.mark.parametrize("device", ["cpu", "keep", GPU])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_snapshot_is_restored(kind: str, device: str, dtype: torch.dtype | None) -> None:
    optimizer = make(kind)
    fastopt.load_state_dict(optimizer, state_of(kind))
    expected, where = on_cpu(optimizer), places(optimizer)
    snapshot = fastopt.snapshot(optimizer, device=device, dtype=dtype)
    copies = [tensor for entry in snapshot.state_dict()["state"].values() for tensor in entry.values()]
    if device != "keep":
        assert {tensor.device.type for tensor in copies} == {device}
    for inplace in (False, False, True):
        for entry in optimizer.state.values():
            for tensor in entry.values():
                tensor.copy_(torch.full(tensor.shape, 9.0))
        snapshot.restore(inplace=inplace)
        assert places(optimizer) == where
        for index, entry in on_cpu(optimizer)["state"].items():
            for key, tensor in entry.items():
                kept = expected["state"][index][key]
                assert torch.equal(tensor, kept if key == "step" or dtype is None else kept.to(dtype).float())


def test_state_follows_its_model_and_comes_back(backend: str) -> None:
    optimizer = make("AdamW", "cpu")
    saved = state_of("AdamW")
    fastopt.load_state_dict(optimizer, saved)
    for param in optimizer.param_groups[0]["params"]:
        param.data = param.data.to(GPU)
    fastopt.to_device(optimizer)
    assert_loaded(optimizer, "AdamW", saved)
    fastopt.to_device(optimizer, "cpu")
    assert {place.type for place in places(optimizer)} == {"cpu"}
    Comparison().same(on_cpu(optimizer)["state"], saved["state"])


def test_no_memory_on_the_gpu_leaves_the_optimizer_as_it_was(backend: str) -> None:
    shapes = ((16 * MIB,), (5,))
    optimizer, saved = make("AdamW", shapes=shapes), state_of("AdamW", shapes)
    fastopt.load_state_dict(optimizer, saved)
    before = on_cpu(optimizer)
    for entry in saved["state"].values():
        entry["exp_avg"].fill_(7)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 96 * MIB) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            fastopt.load_state_dict(optimizer, saved)
        Comparison().same(on_cpu(optimizer), before)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    fastopt.load_state_dict(optimizer, saved)
    Comparison().same(on_cpu(optimizer)["state"], saved["state"])


class Failing:
    """Has transfers fail on the stand-in."""

    def __init__(self) -> None:
        self.runtime = ctypes.CDLL(None)
        self.runtime.stand_in_transfers.restype = ctypes.c_int64
        self.runtime.stand_in_fail_transfer.argtypes = [ctypes.c_int64]

    def transfers(self) -> int:
        return self.runtime.stand_in_transfers()

    def fail(self, after: int) -> None:
        self.runtime.stand_in_fail_transfer(after)


needs_stand_in = pytest.mark.skipif(not IS_STAND_IN, reason="not on the stand-in")


@needs_stand_in
@pytest.mark.usefixtures("native")
def test_many_tensors_take_few_transfers() -> None:
    optimizer, saved, device = make("AdamW", dtype=torch.bfloat16), state_of("AdamW"), Failing()
    before = device.transfers()
    fastopt.load_state_dict(optimizer, saved)
    assert device.transfers() - before <= 4
    fastopt.snapshot(optimizer)
    assert device.transfers() - before <= 8


@needs_stand_in
@pytest.mark.usefixtures("native")
def test_a_transfer_that_fails_names_what_it_was_at_and_leaves_the_optimizer_as_it_was() -> None:
    optimizer, saved, device = make("AdamW", dtype=torch.bfloat16), state_of("AdamW"), Failing()
    before = device.transfers()
    fastopt.load_state_dict(optimizer, saved)
    needed = device.transfers() - before
    expected = on_cpu(optimizer)
    for entry in saved["state"].values():
        entry["exp_avg"].fill_(7)
    for after in range(needed):
        device.fail(after)
        with pytest.raises(RuntimeError, match="CUDA: unspecified launch failure") as caught:
            fastopt.load_state_dict(optimizer, saved)
        device.fail(-1)
        assert "the state saved under id" in caught.value.__notes__[0]
        assert "at key 'exp_avg" in caught.value.__notes__[0]
        Comparison().same(on_cpu(optimizer), expected)
    fastopt.load_state_dict(optimizer, saved)
    assert_loaded(optimizer, "AdamW", saved)


@needs_stand_in
@pytest.mark.usefixtures("native")
def test_a_copy_that_fails_names_its_entry() -> None:
    on_gpu, device = torch.zeros(5).to(GPU), Failing()
    device.fail(0)
    with pytest.raises(RuntimeError) as copied:
        fastopt.copy_([torch.zeros(2), on_gpu], [torch.ones(2), torch.ones(5)])
    with pytest.raises(RuntimeError) as moved:
        fastopt.to([on_gpu], device="cpu")
    device.fail(-1)
    assert copied.value.__notes__ == ["copy_: entry 1: float32 [5] on cpu -> float32 [5] on cuda:0"]
    assert moved.value.__notes__ == ["to: entry 0: float32 [5] on cuda:0"]
