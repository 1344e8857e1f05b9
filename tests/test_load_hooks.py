"""Mappings, hooks and `__setstate__` in `load_state_dict()`; torch's own method on a twin is the oracle."""

import copy as copying
from collections import OrderedDict, UserDict, defaultdict

import pytest
import torch

import fastopt
from tests.loads import load_both, saved, tensor
from tests.oracle import TORCH_STATE_DICT, Bare, Comparison, adam, parameter, torch_load, trained

pytestmark = pytest.mark.usefixtures("backend")


# 1. The outer dict and pre-hooks.


@pytest.mark.parametrize("container", [dict, OrderedDict, UserDict, lambda items: defaultdict(list, items)])
def test_any_mapping_with_a_copy(container, copy):
    load_both(adam, container(TORCH_STATE_DICT(trained(adam()))), copy)


def test_hooks_see_a_shallow_copy_and_run_in_order(copy):
    state_dict = TORCH_STATE_DICT(trained(adam()))
    runs = []
    for load in (fastopt.load_state_dict, torch_load):
        events = []
        optimizer = adam()

        def pre(name, events=events):
            def hook(hooked, given):
                events.append((name, sorted(map(str, given)), given is state_dict, len(hooked.state)))
                given[name] = True

            return hook

        optimizer.register_load_state_dict_pre_hook(pre("second"))
        optimizer.register_load_state_dict_pre_hook(pre("third"))
        optimizer.register_load_state_dict_pre_hook(pre("first"), prepend=True)
        for name, prepend in (("fifth", False), ("sixth", False), ("fourth", True)):
            optimizer.register_load_state_dict_post_hook(
                lambda hooked, name=name, events=events: events.append((name, len(hooked.state))),
                prepend=prepend,
            )
        load(optimizer, state_dict, copy=copy)
        runs.append((events, optimizer.param_groups, optimizer.state))
    Comparison().same(*runs)
    assert list(state_dict) == ["state", "param_groups"]


def test_results_of_pre_hooks_replace_the_dict(copy):
    other = TORCH_STATE_DICT(trained(adam(lr=0.25), seed=5))

    def make_optimizer():
        optimizer = adam()
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, given: {"state": {}, "param_groups": []})
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, given: other if not given["state"] else None)
        return optimizer

    actual, expected = make_optimizer(), make_optimizer()
    fastopt.load_state_dict(actual, TORCH_STATE_DICT(trained(adam())), copy=copy)
    torch_load(expected, TORCH_STATE_DICT(trained(adam())), copy=copy)
    Comparison().optimizers(actual, expected)
    assert actual.param_groups[0]["lr"] == other["param_groups"][0]["lr"]


def test_pre_hook_may_change_the_optimizers_groups(copy):
    def make_optimizer():
        optimizer = Bare([parameter(2)])

        def add(optimizer, given):
            optimizer.add_param_group({"params": [parameter(3)]})

        optimizer.register_load_state_dict_pre_hook(add)
        return optimizer

    state_dict = {"state": {1: {"a": tensor(3)}}, "param_groups": [{"params": [0]}, {"params": [1]}]}
    load_both(make_optimizer, state_dict, copy)


def test_post_hook_result_is_ignored_and_sees_the_loaded_state(copy):
    optimizer = adam()
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)) or {"state": {}})
    state_dict = TORCH_STATE_DICT(trained(adam()))
    fastopt.load_state_dict(optimizer, state_dict, copy=copy)
    assert seen == [len(state_dict["state"])]


# 10. `__setstate__`.


def test_setstate_is_called_once_with_state_and_groups(copy):
    class Watched(Bare):
        def __setstate__(self, state):
            self.calls = [*vars(self).get("calls", ()), (sorted(state), type(state), type(state["state"]))]
            super().__setstate__(state)

    params = [parameter(2)]
    state_dict = saved({0: {"a": tensor(2)}})
    actual, _ = load_both(lambda: Watched(params), state_dict, copy)
    expected = Watched(params)
    torch_load(expected, state_dict, copy=copy)
    assert actual.calls == expected.calls != []


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Rprop", "RMSprop", "ASGD"])
@pytest.mark.parametrize("as_number", [float, int])
def test_subclasses_turn_a_number_step_into_a_tensor(kind, as_number, copy):
    def make_optimizer():
        return getattr(torch.optim, kind)([parameter(3)])

    state_dict = copying.deepcopy(TORCH_STATE_DICT(trained(make_optimizer())))
    for state in state_dict["state"].values():
        state["step"] = as_number(state["step"])
    load_both(make_optimizer, state_dict, copy)


def test_error_in_setstate_is_the_optimizers_own(copy):
    class Failing(Bare):
        def __setstate__(self, state):
            raise LookupError("no")

    with pytest.raises(LookupError, match="no"):
        fastopt.load_state_dict(Failing([parameter(2)]), saved({0: {}}), copy=copy)


def test_load_warns_that_it_passes_over_the_optimizers_own_method(copy):
    class Own(Bare):
        def load_state_dict(self, state_dict):
            raise NotImplementedError

    with pytest.warns(UserWarning, match="load_state_dict of its own"):
        fastopt.load_state_dict(Own([parameter(2)]), saved({0: {}}), copy=copy)
