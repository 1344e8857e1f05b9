"""fastopt.copy_ against `Tensor.copy_`, on both backends."""

import itertools
from collections.abc import Callable
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
    assert_like,
    bytes_of_storage,
    casts_complex,
    pairs,
    same_values,
    several_examples,
    values,
    with_grad,
)

pytestmark = casts_complex


def twin(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over a copy of the whole storage, with the same view of it."""
    memory = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage().clone())
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def assert_copied_as_torch(dsts: list[torch.Tensor], srcs: list[torch.Tensor]) -> None:
    twins = [twin(dst) for dst in dsts]
    moves = [expected._version for expected in twins]
    for expected, src in zip(twins, srcs, strict=True):
        expected.copy_(src)
    moves = [expected._version - before for expected, before in zip(twins, moves, strict=True)]
    versions = [dst._version for dst in dsts]
    fastopt.copy_(dsts, srcs)
    for index, (dst, expected) in enumerate(zip(dsts, twins, strict=True)):
        assert bytes_of_storage(dst) == bytes_of_storage(expected), f"entry {index}"
        assert dst._version - versions[index] == moves[index], f"entry {index}"


@several_examples
@given(st.lists(pairs(), max_size=6))
def test_copy(backend: str, drawn: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert_copied_as_torch([dst for dst, _ in drawn], [src for _, src in drawn])


@pytest.mark.parametrize(("dst", "src"), [*itertools.product(DTYPES, DTYPES)])
def test_copy_between_any_dtypes(backend: str, dst: torch.dtype, src: torch.dtype) -> None:
    assert_copied_as_torch(
        [values((67,), dst), values((3, 4), dst).t(), values((), dst)],
        [values((67,), src, 1), values((4, 3), src, 2), values((), src, 3)],
    )


@any_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_copy_from_every_kind(backend: str, kind: str, dtype: torch.dtype, grad_mode: Any) -> None:
    src = KINDS[kind]()
    dst, expected = torch.zeros(src.shape, dtype=dtype), torch.zeros(src.shape, dtype=dtype)
    with grad_mode():
        torchs_error = error_of(lambda: expected.copy_(src))
        our_error = error_of(lambda: fastopt.copy_([dst], [src]))
    assert type(our_error) is type(torchs_error)
    if torchs_error is not None:
        assert str(our_error) == str(torchs_error)
        assert any("entry 0" in note for note in our_error.__notes__)
    assert_like(dst, expected, src)


@any_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_copy_into_every_kind(backend: str, kind: str, dtype: torch.dtype, grad_mode: Any) -> None:
    dst, expected = KINDS[kind](), KINDS[kind]()
    src = values(tuple(dst.shape), dtype, seed=4)
    if dst.layout is not torch.strided:
        src = src.to_sparse()
    before = dst._version
    with grad_mode():
        torchs_error = error_of(lambda: expected.copy_(src))
        our_error = error_of(lambda: fastopt.copy_([dst], [src]))
    assert type(our_error) is type(torchs_error)
    if torchs_error is None:
        assert_like(dst, expected, src)
        return
    assert str(our_error) == str(torchs_error)
    assert any("entry 0" in note for note in our_error.__notes__)
    assert dst._version == before


def error_of(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def test_copy_into_a_view_moves_its_base(backend: str) -> None:
    base = values((6, 4), torch.float32)
    expected = base.clone()
    expected[2:4].copy_(torch.ones(2, 4))
    version = base._version
    fastopt.copy_([base[2:4]], [torch.ones(2, 4)])
    assert torch.equal(base, expected)
    assert base._version == version + 1


def test_copy_is_seen_by_autograd(backend: str) -> None:
    weight = with_grad(torch.ones(3))
    saved = torch.ones(3)
    loss = (weight * saved).sum()
    fastopt.copy_([saved], [torch.zeros(3)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copy_lets_gradients_through(backend: str) -> None:
    leaf, dst = with_grad(torch.ones(3)), torch.zeros(3, dtype=torch.float64)
    fastopt.copy_([dst], [leaf])
    dst.sum().backward()
    assert torch.equal(leaf.grad, torch.ones(3))


def test_copy_into_a_leaf_that_requires_grad_needs_no_grad(backend: str) -> None:
    dst = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError) as caught:
        fastopt.copy_([torch.zeros(2), dst], [torch.ones(2), torch.ones(3)])
    assert any("entry 1" in note for note in caught.value.__notes__)
    assert dst.tolist() == [0, 0, 0]
    with torch.no_grad():
        fastopt.copy_([dst], [torch.ones(3, dtype=torch.bfloat16)])
    assert dst.tolist() == [1, 1, 1]


def test_copy_of_inference_tensors(backend: str) -> None:
    with torch.inference_mode():
        made, other = torch.zeros(3), torch.ones(3, dtype=torch.float64)
        fastopt.copy_([made], [other])
    assert made.tolist() == [1, 1, 1]
    ordinary = torch.zeros(3)
    fastopt.copy_([ordinary], [made])
    assert ordinary.tolist() == [1, 1, 1]


def test_copy_into_an_inference_tensor_fails_as_torch_does(backend: str) -> None:
    with torch.inference_mode():
        dst, expected = torch.zeros(3), torch.zeros(3)
    torchs_error = error_of(lambda: expected.copy_(torch.ones(3)))
    our_error = error_of(lambda: fastopt.copy_([dst], [torch.ones(3)]))
    assert isinstance(our_error, RuntimeError)
    assert str(our_error) == str(torchs_error)
    assert any("entry 0" in note for note in our_error.__notes__)
    assert same_values(dst, expected)


def test_copy_from_generators_and_of_nothing(backend: str) -> None:
    dsts = [torch.zeros(n) for n in range(4)]
    fastopt.copy_((dst for dst in dsts), (torch.full((n,), float(n)) for n in range(4)))
    assert [dst.tolist() for dst in dsts] == [[], [1], [2, 2], [3, 3, 3]]
    fastopt.copy_([], iter(()))


@pytest.mark.parametrize("non_blocking", [False, True])
def test_copy_takes_non_blocking(backend: str, non_blocking: bool) -> None:
    dsts = [torch.zeros(3), torch.zeros(3, dtype=torch.int32)]
    fastopt.copy_(dsts, [torch.ones(3, dtype=torch.bfloat16), torch.ones(3)], non_blocking=non_blocking)
    assert [dst.tolist() for dst in dsts] == [[1, 1, 1], [1, 1, 1]]
