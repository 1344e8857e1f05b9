"""Groups in `load_state_dict()`: parameters, options, names; torch's own method on a twin is the oracle."""

import itertools

import pytest
import torch
from torch.optim import Optimizer

import fastopt
from tests.loads import FLOATING, load_both
from tests.oracle import (
    TORCH_LOAD_STATE_DICT,
    TORCH_STATE_DICT,
    Comparison,
    adam,
    assert_same_error,
    assert_same_load,
    fingerprint,
    outcome,
    parameter,
    torch_load,
    train,
    trained,
)

pytestmark = pytest.mark.usefixtures("backend")


# The seed's opening: groups hold the parameters themselves.


@pytest.mark.parametrize(
    ("before", "after"), [(one, other) for one, other in itertools.product(FLOATING, repeat=2) if one is not other]
)
@pytest.mark.parametrize("convert", [lambda model, dtype: model.to(dtype), lambda model, dtype: model.to(dtype=dtype)])
def test_model_cast_after_the_optimizer_was_built(before, after, convert, copy):
    def built():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).to(before)
        optimizer = trained(torch.optim.Adam(model.parameters()))
        state_dict = TORCH_STATE_DICT(optimizer)
        convert(model, after)
        return optimizer, state_dict

    (actual, given), (expected, given_to_torch) = built(), built()
    lists = [group["params"] for group in actual.param_groups]
    params = [list(params) for params in lists]
    fastopt.load_state_dict(actual, given, copy=copy)
    torch_load(expected, given_to_torch, copy=copy)
    assert_same_load(actual, expected, given=given, given_to_torch=given_to_torch, copy=copy)
    for group, listed, members in zip(actual.param_groups, lists, params, strict=True):
        assert group["params"] is listed
        assert all(now is then for now, then in zip(group["params"], members, strict=True))
    assert {state["exp_avg"].dtype for state in actual.state.values()} == {after}
    train(actual, seed=1)
    train(expected, seed=1)
    Comparison().optimizers(actual, expected)


def test_model_half(copy):
    model = torch.nn.Linear(4, 3)
    optimizer = trained(torch.optim.SGD(model.parameters(), momentum=0.9))
    state_dict = TORCH_STATE_DICT(optimizer)
    model.half()
    load_both(lambda: optimizer, state_dict, copy)
    train(optimizer)


# 2. Groups are deep-copied.


def test_groups_are_deep_copied(copy):
    state_dict = TORCH_STATE_DICT(trained(adam(lr=torch.tensor(0.1))))
    shared = ["one list", torch.ones(2)]
    for group in state_dict["param_groups"]:
        group["shared"] = shared
    optimizer, _ = load_both(lambda: adam(lr=torch.tensor(0.1)), state_dict, copy)
    one, other = (group["shared"] for group in optimizer.param_groups)
    assert one is other
    assert one is not shared
    assert one[1] is not shared[1]


def test_lr_that_is_no_leaf_raises_torchs_error(copy):
    state_dict = TORCH_STATE_DICT(trained(adam()))
    state_dict["param_groups"][0]["lr"] = torch.tensor(0.1, requires_grad=True) * 2
    actual, expected = adam(), adam()
    _, torchs = outcome(lambda: TORCH_LOAD_STATE_DICT(expected, state_dict))
    before = fingerprint(actual)
    _, ours = outcome(lambda: fastopt.load_state_dict(actual, state_dict, copy=copy))
    assert isinstance(torchs, RuntimeError)
    assert_same_error(ours, torchs)
    assert fingerprint(actual) == before


# 9. Groups.


def test_new_group_is_the_saved_one(copy):
    state_dict = TORCH_STATE_DICT(trained(torch.optim.SGD([parameter(3)], lr=0.5, momentum=0.9)))
    group = state_dict["param_groups"][0]
    del group["nesterov"]
    group["extra"] = {"of": [1, 2]}
    group["lr"] = group.pop("lr")
    group["params"] = tuple(group["params"])

    class Untouched(torch.optim.SGD):
        __setstate__ = Optimizer.__setstate__

    for kind in (torch.optim.SGD, Untouched):
        optimizer, _ = load_both(lambda kind=kind: kind([parameter(3)], lr=0.1, momentum=0.8), state_dict, copy)
    assert "nesterov" not in optimizer.param_groups[0]


@pytest.mark.parametrize("saved_names", [True, False])
@pytest.mark.parametrize("current_names", [True, False])
def test_param_names(saved_names, current_names, copy):
    def make_optimizer(names, prefix):
        model = torch.nn.Linear(3, 4)
        named = [(prefix + name, torch.nn.Parameter(p.detach().clone())) for name, p in model.named_parameters()]
        return torch.optim.Adam(named if names else [p for _, p in named])

    state_dict = TORCH_STATE_DICT(trained(make_optimizer(saved_names, "saved.")))
    params = make_optimizer(False, "").param_groups[0]["params"]
    named = [(f"current.{index}", p) for index, p in enumerate(params)]
    load_both(lambda: torch.optim.Adam(named if current_names else params), state_dict, copy)
