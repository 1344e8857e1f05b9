"""States that a fast walk gets wrong unless it knows when to stop being fast."""

import functools
from collections import OrderedDict

import pytest
import torch

import fastopt

from .oracle import torch_load


def optimizer(*params: torch.Tensor) -> torch.optim.Optimizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # a parameter that stands twice
        return torch.optim.SGD(list(params), momentum=0.9)


def saved(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    return optimizer.state_dict() | {"state": state}


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("first", [OrderedDict(a=1), {"a": 1}])
@pytest.mark.parametrize("second", [OrderedDict(a=2), {"a": 2}])
def test_the_later_of_two_entries_for_one_parameter_wins(backend, copy, first, second):
    param = torch.nn.Parameter(torch.ones(2))
    group = {"params": [param, param]}
    ours, torchs = (torch.optim.SGD.__new__(torch.optim.SGD) for _ in range(2))
    for each in (ours, torchs):
        torch.optim.SGD.__init__(each, [param])
        each.param_groups[0]["params"] = list(group["params"])
    groups = [{**torchs.state_dict()["param_groups"][0], "params": [0, 1]}]
    state_dict = {"state": {0: first, 1: second}, "param_groups": groups}
    fastopt.load_state_dict(ours, state_dict, copy=copy)
    torch_load(torchs, state_dict, copy=copy)
    assert dict(ours.state) == dict(torchs.state)


@pytest.mark.parametrize("other", ["unclaimed", OrderedDict(a=3)])
def test_an_unclaimed_key_that_is_a_parameter(backend, other):
    param = torch.nn.Parameter(torch.ones(2))
    ours, torchs = optimizer(param), optimizer(param)
    state_dict = saved(ours, {param: {"a": other}, 0: {"a": 1.5}})
    fastopt.load_state_dict(ours, state_dict, copy=False)
    torch_load(torchs, state_dict, copy=False)
    assert dict(ours.state) == dict(torchs.state)


def test_a_storage_that_was_resized_away(backend):
    value = torch.ones(3)
    value.untyped_storage().resize_(0)
    target = optimizer(torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))
    with pytest.raises(RuntimeError) as ours:
        fastopt.load_state_dict(target, saved(target, {0: {"a": value}}), copy=False)
    with pytest.raises(RuntimeError) as torchs:
        torch_load(target, saved(target, {0: {"a": value}}), copy=False)
    assert str(ours.value) == str(torchs.value)
    with pytest.raises(RuntimeError):
        fastopt.to([value], dtype=torch.bfloat16)


@pytest.mark.parametrize("copy", [True, False])
def test_a_ring_of_many_containers_ends(backend, copy):
    ring: list[dict] = [{} for _ in range(70)]
    for index, link in enumerate(ring):
        link["left"] = link["right"] = ring[(index + 1) % len(ring)]
    target = optimizer(torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(RecursionError) as error:
        fastopt.load_state_dict(target, saved(target, {0: {"a": ring[0]}}), copy=copy)
    assert "parameter 0" in "".join(error.value.__notes__)


def test_nesting_deeper_than_the_native_walk(backend):
    value: object = torch.full((2,), 3.0)
    for _ in range(100):
        value = {"deeper": [value]}
    target = optimizer(torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))
    report = fastopt.load_state_dict(target, saved(target, {0: value}))
    loaded = next(iter(target.state.values()))
    for _ in range(100):
        loaded = loaded["deeper"][0]
    assert loaded.dtype is torch.bfloat16
    assert loaded.tolist() == [3.0, 3.0]
    assert report.tensors == 1


def test_a_tensor_that_stands_twice_is_counted_once(backend):
    value = torch.ones(3)
    target = optimizer(torch.nn.Parameter(torch.ones(3)))
    report = fastopt.load_state_dict(target, saved(target, {0: {"a": value, "b": value}}))
    assert (report.tensors, report.copied, report.bytes_written) == (1, 1, value.nbytes)


def test_missing_counts_parameters_and_not_ids(backend):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    target = optimizer(*params)
    state_dict = saved(target, {0: {"a": 1}})
    state_dict["param_groups"][0]["params"] = [0, 0]
    assert fastopt.load_state_dict(target, state_dict).missing == [0]


def test_missing_is_what_the_dict_lacked(backend):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    target = optimizer(*params)
    target.register_load_state_dict_post_hook(lambda loaded: loaded.state[params[1]])
    assert fastopt.load_state_dict(target, saved(target, {0: {"a": 1}})).missing == [1]


def test_too_few_names_do_not_hide_the_error(backend):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    target = optimizer(*params)
    target.param_groups[0]["param_names"] = ["only"]
    value = torch.ones(2, device="meta")
    with pytest.raises(NotImplementedError):
        fastopt.load_state_dict(target, saved(target, {1: {"a": value}}))


def test_the_first_wrong_group_is_the_one_reported(backend):
    target = torch.optim.SGD([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}])
    state_dict = target.state_dict()
    state_dict["param_groups"][0]["params"] = [0, 1]
    del state_dict["param_groups"][1]["params"]
    with pytest.raises(ValueError, match="doesn't match the size") as ours:
        fastopt.load_state_dict(target, state_dict)
    assert "parameters of group 0" in "".join(ours.value.__notes__)


def test_a_missing_list_and_an_unhashable_id_name_their_group(backend):
    target = torch.optim.SGD([{"params": [torch.ones(1)]}, {"params": [torch.ones(1)]}])
    state_dict = target.state_dict()
    state_dict["param_groups"][1]["params"] = [[7]]
    with pytest.raises(TypeError, match="unhashable") as unhashable:
        fastopt.load_state_dict(target, state_dict)
    assert "param group 1" in "".join(unhashable.value.__notes__)
    del state_dict["param_groups"][1]["params"]
    with pytest.raises(KeyError) as missing:
        fastopt.load_state_dict(target, state_dict)
    assert "param group 1" in "".join(missing.value.__notes__)


def test_a_wrapper_that_borrows_our_attributes_survives(backend):
    original = torch.optim.Optimizer.load_state_dict
    try:
        fastopt.install()

        @functools.wraps(torch.optim.Optimizer.load_state_dict)
        def wrapper(self, state_dict):
            return wrapped(self, state_dict)

        wrapped = torch.optim.Optimizer.load_state_dict
        torch.optim.Optimizer.load_state_dict = wrapper
        fastopt.uninstall()
        assert torch.optim.Optimizer.load_state_dict is wrapper
        target = optimizer(torch.nn.Parameter(torch.ones(2)))
        assert target.load_state_dict(target.state_dict()) is None
    finally:
        torch.optim.Optimizer.load_state_dict = original


def test_a_dtype_has_to_be_one(backend):
    with pytest.raises(TypeError, match="dtype is a str"):
        fastopt.to([torch.ones(1)], dtype="float32")
