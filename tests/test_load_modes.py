"""`load_state_dict()` under modes and defaults; torch's own method under the same is the oracle."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from fastopt.casting import Cast
from tests.loads import FunctionLog, load_both
from tests.oracle import TORCH_STATE_DICT, Comparison, adam, assert_same_load, bits, torch_load, trained

pytestmark = pytest.mark.usefixtures("backend")


class DispatchLog(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [FunctionLog, DispatchLog])
def test_modes_see_the_casts_that_torch_makes(mode, copy):
    state_dict = TORCH_STATE_DICT(trained(adam()))
    actual, expected = adam(dtype=torch.bfloat16), adam(dtype=torch.bfloat16)
    with mode() as torchs:
        torch_load(expected, state_dict, copy=copy)
    with mode() as ours:
        fastopt.load_state_dict(actual, state_dict, copy=copy)
    assert_same_load(actual, expected, given=state_dict, given_to_torch=state_dict, copy=copy)
    casts = {"FunctionLog": "to", "DispatchLog": "aten._to_copy.default"}[mode.__name__]
    assert ours.calls[casts] == torchs.calls[casts] > 0


class Doubling(TorchDispatchMode):
    """Changes the result of every cast."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten._to_copy.default else result


def test_a_mode_may_change_the_results(copy):
    state_dict = TORCH_STATE_DICT(trained(adam()))
    with Doubling():
        actual, _ = load_both(lambda: adam(dtype=torch.float64), state_dict, copy)
    plain = adam(dtype=torch.float64)
    torch_load(plain, state_dict, copy=copy)
    first, first_plain = (next(iter(optimizer.state.values()))["exp_avg"] for optimizer in (actual, plain))
    assert bits(first).tobytes() == bits(first_plain * 2).tobytes()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_device_has_no_say(device, copy):
    state_dict = TORCH_STATE_DICT(trained(adam()))
    optimizers = iter([adam(dtype=torch.bfloat16), adam(dtype=torch.bfloat16)])
    with torch.device(device):
        load_both(lambda: next(optimizers), state_dict, copy)


def test_default_dtype_has_no_say(copy):
    state_dict = TORCH_STATE_DICT(trained(adam()))
    torch.set_default_dtype(torch.float64)
    try:
        load_both(adam, state_dict, copy)
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_has_no_say(copy):
    state_dict = TORCH_STATE_DICT(trained(adam()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        load_both(lambda: adam(dtype=torch.float64), state_dict, copy)


def test_inside_a_fake_mode():
    # Only shared: a deepcopy of such tensors fails inside the mode, and torch 2.13 crashes when it collects the rest.
    with torch._subclasses.FakeTensorMode():
        state_dict = TORCH_STATE_DICT(trained_without_closure(adam()))
        actual, expected = adam(dtype=torch.bfloat16), adam(dtype=torch.bfloat16)
        torch_load(expected, state_dict, copy=False)
        fastopt.load_state_dict(actual, state_dict, copy=False)
        Comparison().optimizers(actual, expected)


def trained_without_closure(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_from_a_file_is_left_to_the_backend(dtype, copy, backend, tmp_path, monkeypatch):
    torch.save(TORCH_STATE_DICT(trained(adam())), tmp_path / "optimizer.pt")
    state_dict = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    actual, expected = adam(dtype=dtype), adam(dtype=dtype)
    torch_load(expected, state_dict, copy=copy)
    asked = []
    entry = Cast.entry
    monkeypatch.setattr(Cast, "entry", lambda self, *args: asked.append(args) or entry(self, *args))
    fastopt.load_state_dict(actual, state_dict, copy=copy)
    assert_same_load(actual, expected, given=state_dict, given_to_torch=state_dict, copy=copy)
    assert len(asked) == (0 if backend == "native" else 3)


@pytest.mark.parametrize("held", [False, True], ids=["", "held"])
def test_a_storage_that_python_has_seen_is_shared_as_before(held, copy):
    both = torch.rand(6)
    state = {"first": both[:3], "second": both[3:], "alone": torch.rand(3), "step": torch.rand(())}
    seen = [tensor.untyped_storage() for tensor in state.values()]
    if not held:
        seen.clear()
    load_both(lambda: adam((3,)), {"state": {0: state}, "param_groups": adam((3,)).state_dict()["param_groups"]}, copy)
