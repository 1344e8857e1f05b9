"""The options of a load, and moving and casting of state, with parameters on a GPU; the CPU is the oracle."""

import copy as copying
from typing import Any

import pytest
import torch
from torch.optim import AdamW

import fastopt
from tests.gpu.device import needs_gpu
from tests.oracle import TORCH_STATE_DICT, Comparison, trained

pytestmark = [
    needs_gpu,
    pytest.mark.usefixtures("backend"),
]

GPU = "cuda"
MIB = 1 << 20


def adamw(device: str, dtype: torch.dtype = torch.float32, shapes: Any = ((300, 40), (7,), ())) -> AdamW:
    torch.manual_seed(0)
    return AdamW([torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes])


def on_cpu(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of it with all of its tensors on the CPU."""
    state = {
        index: {key: value.detach().cpu().clone() for key, value in entry.items()}
        for index, entry in state_dict["state"].items()
    }
    return {"state": state, "param_groups": copying.deepcopy(state_dict["param_groups"])}


def state_on(device: str) -> dict[str, Any]:
    saved = on_cpu(TORCH_STATE_DICT(trained(adamw("cpu"))))
    for entry in saved["state"].values():
        entry["exp_avg_sq"].mul_(1e-9)  # some of it too small for float16
        entry.update({key: entry[key].to(device) for key in ("exp_avg", "exp_avg_sq")})
    return saved


@pytest.mark.parametrize("saved_on", ["cpu", GPU])
@pytest.mark.parametrize(
    "options", [{}, {"copy": False}, {"policy": "keep"}, {"policy": {"exp_avg": torch.bfloat16}}, {"donate": True}]
)
def test_values_and_audit_are_those_of_the_cpu(saved_on: str, options: dict[str, Any]) -> None:
    on_gpu, expected = adamw(GPU, torch.float16), adamw("cpu", torch.float16)
    report = fastopt.load_state_dict(on_gpu, state_on(saved_on), audit=True, **options)
    expected_report = fastopt.load_state_dict(expected, state_on("cpu"), audit=True, **options)
    assert all(t.is_cuda for state in on_gpu.state.values() for key, t in state.items() if key != "step")
    Comparison().same(on_cpu(TORCH_STATE_DICT(on_gpu)), on_cpu(TORCH_STATE_DICT(expected)))
    assert report.audit is not None
    assert expected_report.audit is not None
    assert report.audit.keys() == expected_report.audit.keys()
    for key, seen in report.audit.items():
        other = expected_report.audit[key]
        assert seen.largest_error == pytest.approx(other.largest_error, rel=1e-6)
        assert vars(seen) | {"largest_error": 0} == vars(other) | {"largest_error": 0}


def test_state_by_key_stays_on_the_cpu() -> None:
    optimizer = adamw(GPU)
    fastopt.load_state_dict(optimizer, state_on(GPU), device={"exp_avg_sq": "cpu", "*": "param"})
    for state in optimizer.state.values():
        assert (state["exp_avg"].is_cuda, state["exp_avg_sq"].is_cuda, state["step"].is_cuda) == (True, False, False)


@pytest.mark.parametrize("saved_on", ["cpu", GPU])
def test_in_place_no_address_changes(saved_on: str) -> None:
    optimizer, saved = trained(adamw(GPU)), state_on(saved_on)

    def addresses() -> list[int]:
        return [t.data_ptr() for state in optimizer.state.values() for t in state.values()]

    before = addresses()
    for _ in range(100):
        fastopt.load_state_dict(optimizer, saved, inplace=True)
    assert addresses() == before
    Comparison().same(on_cpu(TORCH_STATE_DICT(optimizer))["state"], on_cpu(saved)["state"])


@pytest.mark.parametrize(("saved", "param"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_donated_state_is_never_on_the_gpu_twice(saved: str, param: str) -> None:
    sizes = [8 * MIB] * 12 + [500] * 1000
    optimizer = adamw(GPU, getattr(torch, param), [(size,) for size in sizes])
    dtype = getattr(torch, saved)
    state = {i: {"exp_avg": torch.ones(size, dtype=dtype, device=GPU)} for i, size in enumerate(sizes)}
    state_dict = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    del state
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    report = fastopt.load_state_dict(optimizer, state_dict, donate=True)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= max(report.bytes_written - report.bytes_read, 0) + 64 * MIB


def test_state_follows_its_model_and_comes_back() -> None:
    optimizer = trained(adamw("cpu"))
    before = on_cpu(TORCH_STATE_DICT(optimizer))
    for param in optimizer.param_groups[0]["params"]:
        param.data, param.grad = param.data.to(GPU), None
    fastopt.to_device(optimizer)
    for state in optimizer.state.values():
        assert (state["exp_avg"].is_cuda, state["step"].is_cuda) == (True, False)
    trained(optimizer)
    fastopt.to_device(optimizer, "cpu")
    fastopt.cast_state(optimizer, torch.bfloat16)
    assert {t.dtype for s in optimizer.state.values() for k, t in s.items() if k != "step"} == {torch.bfloat16}
    assert {t.device.type for s in optimizer.state.values() for t in s.values()} == {"cpu"}
    assert before.keys() == TORCH_STATE_DICT(optimizer).keys()
