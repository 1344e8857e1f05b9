"""fastopt.to against `Tensor.to`, on both backends."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from tests.batches import (
    DTYPES,
    KINDS,
    any_kind,
    assert_to_as_torch,
    casts_complex,
    images,
    several_examples,
    sources,
    values,
    with_grad,
)

pytestmark = casts_complex


@several_examples
@given(st.lists(sources(), max_size=6), st.none() | st.sampled_from(DTYPES), st.booleans())
def test_to(backend: str, tensors: list[torch.Tensor], dtype: torch.dtype | None, copied: bool) -> None:
    assert_to_as_torch(tensors, dtype=dtype, copy=copied)


@any_kind
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.int32])
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_to_of_every_kind(backend: str, kind: str, dtype: torch.dtype | None, grad_mode: Any) -> None:
    tensors = [KINDS[kind](), images(), KINDS[kind]()]
    with grad_mode():
        assert_to_as_torch(tensors, dtype=dtype, copy=False)
        assert_to_as_torch(tensors, dtype=dtype, copy=True)


def test_to_of_inference_tensors(backend: str) -> None:
    with torch.inference_mode():
        made = images()
    assert_to_as_torch([made], dtype=torch.bfloat16)
    assert_to_as_torch([made], copy=True)
    assert_to_as_torch([made])


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "meta", torch.device("cpu")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_to_a_device(backend: str, device: Any, dtype: torch.dtype | None) -> None:
    assert_to_as_torch([images(), torch.tensor(1)], device=device, dtype=dtype)


def test_to_gradients_flow(backend: str) -> None:
    leaf = with_grad(images())
    [result] = fastopt.to([leaf], dtype=torch.float64)
    result.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_to_results_share_no_memory(backend: str) -> None:
    source = images()
    results = fastopt.to([source, source, source[:1]], dtype=torch.bfloat16)
    assert len({result.untyped_storage().data_ptr() for result in results}) == 3


def test_to_of_generators_and_of_nothing(backend: str) -> None:
    results = fastopt.to((values((n,), torch.float32) for n in range(3)), dtype=torch.float64)
    assert [result.shape for result in results] == [(0,), (1,), (2,)]
    assert fastopt.to([], dtype=torch.float64) == []
    assert fastopt.to(iter(()), dtype=torch.float64) == []


@pytest.mark.parametrize("position", [0, 1, 3])
@pytest.mark.parametrize("device", [None, "cpu", "meta"])
def test_to_names_the_entry_that_is_no_tensor(backend: str, position: int, device: str | None) -> None:
    tensors: list[Any] = [images()] * 3
    tensors.insert(position, "weights")
    with pytest.raises(TypeError, match=rf"entry {position}\b.*str"):
        fastopt.to(tensors, dtype=torch.bfloat16, device=device)


def test_to_names_the_entry_that_torch_refuses(backend: str) -> None:
    tensors = [images(), torch.empty(2, device="meta")]
    with pytest.raises(NotImplementedError) as expected:
        tensors[1].to(device="cpu", dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError) as caught:
        fastopt.to(tensors, device="cpu", dtype=torch.bfloat16)
    assert str(caught.value) == str(expected.value)
    assert any("entry 1" in note for note in caught.value.__notes__)


def test_to_of_more_than_memory_holds_fails_as_torch_does(backend: str) -> None:
    endless = torch.zeros(1, dtype=torch.bfloat16).expand(1 << 46)
    dense = torch.empty(0, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as expected:
        endless.to(torch.float64)
    with pytest.raises(RuntimeError) as caught:
        fastopt.to([dense, endless], dtype=torch.float64)
    assert type(caught.value) is type(expected.value)
    assert any("entry 1" in note for note in caught.value.__notes__)
