"""Values of any type in `load_state_dict()`; torch's own method on a twin is the oracle."""

import pytest
import torch

import fastopt
from tests.loads import load_both, load_value, saved, tensor, values
from tests.oracle import TORCH_STATE_DICT, Bare, assert_same_error, outcome, parameter, torch_load, trained

pytestmark = pytest.mark.usefixtures("backend")


# 6. Values of any type.


@pytest.mark.parametrize("name", values())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int32])
def test_values_of_any_type(name, dtype, copy):
    load_value(values()[name], copy, parameter(3, 4, dtype=dtype))


@pytest.mark.parametrize("saved_id", ["step", "other", 4, 2**100, ("s", "t", "e", "p"), b"step", None])
def test_a_bare_tensor_under_any_saved_id(saved_id, copy):
    """It has no key, and so is no `step`, whatever its id is, or looks like in memory."""
    params = [parameter(3, 4, dtype=torch.bfloat16)]
    state_dict = saved({saved_id: tensor(3, 4)}, [saved_id])
    optimizer, _ = load_both(lambda: Bare(params), state_dict, copy)
    assert optimizer.state[params[0]].dtype == torch.bfloat16


@pytest.mark.parametrize("value", [iter([1]), (i for i in range(2)), memoryview(b"view"), {1: 2}.keys(), map(str, [1])])
def test_iterables_that_cannot_be_rebuilt_raise_torchs_type(value, copy):
    params = [parameter(2)]
    _, torchs = outcome(lambda: torch_load(Bare(params), saved({0: {"a": value}}), copy=copy))
    _, ours = outcome(lambda: fastopt.load_state_dict(Bare(params), saved({0: {"a": value}}), copy=copy))
    assert_same_error(ours, torchs, text=False)


# LBFGS keeps lists of tensors, and tensors in a state of one parameter that stand for all.


def test_lists_of_lbfgs(copy):
    def make_optimizer(dtype):
        return torch.optim.LBFGS([parameter(3, dtype=dtype), parameter(2, 2, dtype=dtype)], history_size=3, max_iter=4)

    state_dict = TORCH_STATE_DICT(trained(make_optimizer(torch.float32), steps=3))
    assert isinstance(state_dict["state"][0]["old_dirs"], list)
    for dtype in (torch.float32, torch.float64):
        load_both(lambda dtype=dtype: make_optimizer(dtype), state_dict, copy)


def test_deep_nesting(copy):
    value = leaf = {}
    for depth in range(150):
        leaf["step"] = tensor(1, dtype=torch.float64, seed=depth)
        leaf["value"] = [tensor(2, dtype=torch.float64, seed=depth)]
        leaf["deeper"] = leaf = {}
    load_value(value, copy)
