"""One object that the saved state refers to from several places: a deep copy keeps it one, and so does copy=True."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastopt

from .oracle import Bare, assert_same_load, parameter, torch_load


def tensor() -> torch.Tensor:
    return torch.arange(3.0)


def same_tensor_in_one_entry() -> dict[int, Any]:
    shared = tensor()
    return {0: {"step": shared, "a": shared, "b": tensor()}, 1: {"step": tensor()}}


def same_tensor_in_two_entries() -> dict[int, Any]:
    shared = tensor()
    return {0: {"step": shared}, 1: {"step": shared}}


def same_entry_twice() -> dict[int, Any]:
    entry = {"step": tensor(), "a": tensor()}
    return {0: entry, 1: entry}


def same_dict_inside_two_entries() -> dict[int, Any]:
    inner = {"step": tensor(), "deeper": {"step": tensor()}}
    return {0: {"a": inner}, 1: {"b": inner}}


def same_list_twice_in_one_entry() -> dict[int, Any]:
    items = [tensor(), [tensor()]]
    return {0: {"a": items, "b": items}, 1: {"a": [tensor()]}}


def same_tensor_in_what_python_casts() -> dict[int, Any]:
    shared = tensor()
    return {0: {"step": shared, "a": OrderedDict(step=shared)}, 1: OrderedDict(step=shared)}


def same_tensor_without_a_parameter() -> dict[int, Any]:
    shared = tensor()
    return {0: {"step": shared}, 1: {"step": tensor()}, 2: {"step": shared}}


def same_entry_without_a_parameter() -> dict[int, Any]:
    entry = {"step": tensor()}
    return {0: entry, 1: {"step": tensor()}, 2: entry}


STATES = [value for name, value in list(globals().items()) if name.startswith("same_")]


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", STATES)
def test_as_torch(backend, build: Callable[[], dict[int, Any]], dtype, copy):
    """Nothing but the state itself holds the tensors, as after `torch.load`."""
    ours, torchs = (Bare([parameter(3, dtype=dtype) for _ in range(2)]) for _ in range(2))
    state_dict = {"state": build(), "param_groups": [{"params": [0, 1]}]}
    fastopt.load_state_dict(ours, state_dict, copy=copy)
    torch_load(torchs, state_dict, copy=copy)
    assert_same_load(ours, torchs, given=state_dict, given_to_torch=state_dict, copy=copy)
