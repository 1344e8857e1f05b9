"""`state_dict()`, row by row of the contract; torch's own method on the same optimizer is the oracle."""

from collections import OrderedDict, defaultdict

import pytest
import torch

import fastopt
from tests.oracle import TORCH_STATE_DICT, Bare, Comparison, adam, assert_same_error, outcome, parameter, trained

pytestmark = pytest.mark.usefixtures("backend")


def assert_same_state_dict(optimizer):
    """Also that what torch passes on by reference is the very same object."""
    comparison = Comparison()
    comparison.optimizers(optimizer, optimizer)
    actual, expected = fastopt.state_dict(optimizer), TORCH_STATE_DICT(optimizer)
    comparison.same(actual, expected)
    return actual


def test_groups_are_packed_in_key_order_with_params_last():
    optimizer = trained(adam(lr=torch.tensor(0.1), betas=(0.8, 0.9)))
    for group in optimizer.param_groups:
        group["extra"] = ["a", {"b": 1}]
        group["params"] = group.pop("params")
        group["after"] = None
    saved = assert_same_state_dict(optimizer)
    for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        assert list(packed)[-1] == "params"
        assert all(packed[key] is group[key] for key in group if key != "params")


def test_inner_states_are_the_live_objects():
    optimizer = trained(adam())
    params = [p for group in optimizer.param_groups for p in group["params"]]
    saved = assert_same_state_dict(optimizer)
    assert all(saved["state"][index] is optimizer.state[param] for index, param in enumerate(params))


@pytest.mark.parametrize(
    "layout",
    [
        [[0, 0, 1]],
        [[0, 1, 0], [2]],
        [[0, 1], [1, 2]],
        [[0, 1], [2, 1, 1, 3], [3, 0]],
        [[], [0], []],
        [[0, 1, 2, 3]],
    ],
)
@pytest.mark.parametrize("container", [list, tuple])
def test_indices_of_parameters_that_stand_twice(layout, container):
    params = [parameter(2) for _ in range(4)]
    optimizer = Bare(params)
    optimizer.param_groups = [{"params": container(params[i] for i in indices)} for indices in layout]
    for index in {index for indices in layout for index in indices}:
        optimizer.state[params[index]] = {"number": index}
    assert_same_state_dict(optimizer)


def test_names_of_parameters_are_saved():
    model = torch.nn.Linear(2, 3)
    assert_same_state_dict(trained(torch.optim.Adam(model.named_parameters())))


@pytest.mark.parametrize("container", [dict, OrderedDict, lambda items: defaultdict(dict, items)])
def test_keys_that_are_no_tensors_stay(container):
    optimizer = trained(adam())
    optimizer.state = container(optimizer.state)
    optimizer.state["all"] = {"count": torch.tensor(3)}
    optimizer.state[7] = None
    optimizer.state[("a", 1)] = [1, 2]
    assert_same_state_dict(optimizer)


def test_number_key_that_is_also_an_index():
    optimizer = trained(adam())
    optimizer.state[1] = "the later entry stays"
    assert_same_state_dict(optimizer)


def test_parameter_without_state():
    assert_same_state_dict(trained(adam(), skip=(1,)))


def test_state_of_a_tensor_in_no_group_raises_the_same_key_error():
    optimizer = trained(adam())
    optimizer.state[parameter(2)] = {}
    _, expected = outcome(lambda: TORCH_STATE_DICT(optimizer))
    _, actual = outcome(lambda: fastopt.state_dict(optimizer))
    assert isinstance(expected, KeyError)
    assert_same_error(actual, expected)


def test_group_without_params_raises_the_same_error():
    optimizer = trained(adam())
    del optimizer.param_groups[0]["params"]
    _, expected = outcome(lambda: TORCH_STATE_DICT(optimizer))
    _, actual = outcome(lambda: fastopt.state_dict(optimizer))
    assert_same_error(actual, expected)


def hooked(events, replacement):
    """An optimizer whose hooks write down that they ran, and what they saw."""
    optimizer = trained(adam())

    def pre(name):
        return lambda optimizer: events.append((name, len(optimizer.state)))

    def post(name, result):
        def hook(optimizer, state_dict):
            events.append((name, list(state_dict)))
            state_dict[f"seen by {name}"] = True
            return result

        return hook

    optimizer.register_state_dict_pre_hook(pre("second"))
    optimizer.register_state_dict_pre_hook(pre("third"))
    optimizer.register_state_dict_pre_hook(pre("first"), prepend=True)
    optimizer.register_state_dict_post_hook(post("fifth", replacement))
    optimizer.register_state_dict_post_hook(post("sixth", None))
    optimizer.register_state_dict_post_hook(post("fourth", None), prepend=True)
    return optimizer


@pytest.mark.parametrize("replacement", [None, {"new": 1}, {}])
def test_hooks_run_in_order_and_may_replace_the_result(replacement):
    runs = []
    for method in (fastopt.state_dict, TORCH_STATE_DICT):
        events = []
        given = None if replacement is None else dict(replacement)
        runs.append((method(hooked(events, given)), events, given))
    Comparison().same(*runs)


def test_results_of_pre_hooks_are_ignored():
    optimizer = trained(adam())
    optimizer.register_state_dict_pre_hook(lambda optimizer: {"state": {}, "param_groups": []})
    assert_same_state_dict(optimizer)


def test_pre_hook_may_change_the_groups():
    optimizer = trained(adam())
    optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.param_groups[0].update(marked=True))
    assert "marked" in assert_same_state_dict(optimizer)["param_groups"][0]


def test_hooks_that_remove_themselves():
    optimizer = trained(adam())
    seen = []
    handle = optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: seen.append(state_dict))
    fastopt.state_dict(optimizer)
    handle.remove()
    fastopt.state_dict(optimizer)
    assert len(seen) == 1
