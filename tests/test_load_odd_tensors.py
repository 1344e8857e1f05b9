"""Tensors of all kinds in `load_state_dict()`, as `.to()` treats them; torch's own method on a twin is the oracle."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from tests.loads import load_value, saved, tensor
from tests.oracle import Bare, assert_same_error, assert_same_load, leaves, outcome, parameter, torch_load

pytestmark = pytest.mark.usefixtures("backend")


# 8. What `.to()` does.


def odd_tensors(dtype):
    base = tensor(6, 8, dtype=dtype)
    shared = torch.ones(10, dtype=dtype)
    leaf = torch.ones(3, dtype=dtype, requires_grad=True)
    with_attribute = torch.ones(2, dtype=dtype)
    with_attribute.note = ["attached"]
    return {
        "transposed": base.t(),
        "sliced": base[1:3, ::2],
        "expanded": tensor(1, 4, dtype=dtype).expand(5, 4),
        "permuted": tensor(2, 3, 4, dtype=dtype).permute(2, 0, 1),
        "channels last": tensor(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
        "part of a storage": torch.ones(100, dtype=dtype)[10:20],
        "two views": [shared[:5], shared[5:], shared],
        "overlapping": torch.ones(9, dtype=dtype).as_strided((3, 3), (1, 2)),
        "without elements": tensor(0, 3, dtype=dtype),
        "a scalar": tensor(dtype=dtype),
        "a scalar in a storage": base[2, 3],
        "a Parameter": torch.nn.Parameter(tensor(3, dtype=dtype)),
        "a Parameter without gradient": torch.nn.Parameter(tensor(3, dtype=dtype), requires_grad=False),
        "a Buffer": torch.nn.Buffer(tensor(3, dtype=dtype)),
        "requires grad": leaf,
        "sparse": torch.eye(3, dtype=dtype).to_sparse(),
        "uncoalesced": torch.sparse_coo_tensor(
            torch.zeros(1, 2, dtype=torch.int64), torch.ones(2, dtype=dtype), (3,), check_invariants=False
        ),
        "with attributes": with_attribute,
        "negative view": torch._neg_view(tensor(4, dtype=dtype)),
    }


@pytest.mark.parametrize("name", odd_tensors(torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_odd_tensors(name, dtype, copy):
    value = odd_tensors(dtype)[name]
    load_value({"a": value, "again": value, "step": value, "nested": {"step": [value]}}, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_that_is_no_leaf(dtype, copy):
    value = {"a": torch.ones(3, dtype=dtype, requires_grad=True) * 2}
    compare_outcomes(value, copy)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_modes(mode, dtype, copy):
    leaf = torch.ones(3, dtype=dtype, requires_grad=True)
    for value in (leaf, leaf * 2, torch.ones(3, dtype=dtype)):
        with mode():
            compare_outcomes({"a": value}, copy)
            compare_outcomes({"a": value, "step": value, "list": [value]}, copy)


def compare_outcomes(value, copy):
    params = [parameter(3)]
    actual, expected = Bare(params), Bare(params)
    state_dict = saved({0: value})
    _, torchs = outcome(lambda: torch_load(expected, state_dict, copy=copy))
    _, ours = outcome(lambda: fastopt.load_state_dict(actual, state_dict, copy=copy))
    assert_same_error(ours, torchs)
    assert_same_load(actual, expected, given=state_dict, given_to_torch=state_dict, copy=copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_tensors(dtype, copy):
    with torch.inference_mode():
        value = {"a": tensor(3, dtype=dtype), "step": tensor(dtype=dtype)}
    load_value(value, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensor_subclasses_dispatch_to_their_own_to(dtype, copy):
    value = TwoTensor(tensor(3, 4, dtype=dtype), tensor(3, 4, dtype=dtype, seed=1))
    loaded = load_value({"a": value, "step": value, "list": [value]}, copy)
    assert {type(t) for t in leaves(loaded) if isinstance(t, torch.Tensor)} == {TwoTensor}


def test_parameter_of_a_subclass(copy):
    param = torch.nn.Parameter(TwoTensor(tensor(3, dtype=torch.bfloat16), tensor(3, dtype=torch.bfloat16)))
    load_value({"a": tensor(3), "b": tensor(3, dtype=torch.bfloat16), "step": tensor()}, copy, param)


@pytest.mark.parametrize("kind", ["conj", "real", "imag"])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.complex64])
def test_views_of_complex_tensors(kind, param_dtype, copy):
    load_value({"a": getattr(tensor(3, dtype=torch.complex64), kind)}, copy, parameter(3, dtype=param_dtype))
    value = tensor(3, dtype=torch.complex64).conj()
    load_value({"a": value, "b": value.imag, "step": value}, copy, parameter(3, dtype=param_dtype))


def test_parameters_on_meta(copy):
    param = torch.nn.Parameter(torch.empty(3, 4, device="meta"))
    value = {"step": tensor(), "a": tensor(3, 4), "b": tensor(3, 4, dtype=torch.bfloat16).t()}
    loaded = load_value(value, copy, param)
    assert loaded["a"].is_meta
    assert not loaded["step"].is_meta
    load_value(value, copy, param, capturable=True)
