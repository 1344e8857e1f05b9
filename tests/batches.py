"""What the tests of fastopt.copy_ and fastopt.to share: tensors of any kind, and comparisons with torch's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import fastopt

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = FLOATING + OTHERS

# What torch says of complex -> real, it says through either function.
casts_complex = pytest.mark.filterwarnings("ignore:Casting complex values to real")
several_examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Subclass(torch.Tensor):
    """A tensor that is not exactly a torch.Tensor."""


# ---- tensors of any kind ----


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Numbers that every dtype but bool can hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, shape, generator=generator).to(dtype)


def laid_out(tensor: torch.Tensor, order: tuple[int, ...], gap: int = 1, offset: int = 0) -> torch.Tensor:
    """The same values in other memory: dimensions in that order, elements `gap` apart, starting at `offset`."""
    permuted = tensor.permute(order)
    memory = torch.zeros(offset + permuted.numel() * gap, dtype=tensor.dtype)
    strided = memory[offset:][::gap].view(permuted.shape)
    strided.copy_(permuted)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return strided.permute(inverse)


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, tensor: torch.Tensor) -> torch.Tensor:
    order = tuple(draw(st.permutations(range(tensor.dim()))))
    return laid_out(tensor, order, draw(st.integers(1, 3)), draw(st.integers(0, 3)))


@st.composite
def sources(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """A tensor of any dtype and layout, with expanded dimensions here and there."""
    shape = draw(shapes) if shape is None else shape
    stored = tuple(1 if size > 0 and draw(st.integers(0, 5)) == 0 else size for size in shape)
    tensor = values(stored, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
    tensor = draw(layouts(tensor)).expand(shape)
    return torch.nn.Parameter(tensor, requires_grad=False) if draw(st.booleans()) else tensor


@st.composite
def pairs(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    shape = draw(shapes)
    dst = draw(layouts(values(shape, draw(st.sampled_from(DTYPES)))))
    return dst, draw(sources(shape))


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return values((2, 3, 4, 5), dtype)


def with_grad(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.requires_grad_()


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "zero-dimensional": lambda: torch.tensor(1.5),
    "empty": lambda: torch.empty(0, 3),
    "transposed": lambda: images()[0, 0].t(),
    "channels last": lambda: images().to(memory_format=torch.channels_last),
    "sliced": lambda: images()[:, ::2, 1:3],
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
    "a view at an offset": lambda: images()[1],
    "Parameter": lambda: torch.nn.Parameter(images()),
    "frozen Parameter": lambda: torch.nn.Parameter(images(), requires_grad=False),
    "requires grad": lambda: with_grad(images()),
    "computed with grad": lambda: with_grad(images()) * 2,
    "subclass": lambda: images().as_subclass(Subclass),
    "conjugated": lambda: images(torch.complex64).conj(),
    "negated": lambda: images(torch.complex64).conj().imag,
    "sparse COO": lambda: images()[0, 0].to_sparse(),
    "on meta": lambda: torch.empty(3, 2, device="meta").t(),
    "odd strides of size one": lambda: torch.arange(3.0).as_strided((1, 3, 1), (100, 1, 7)),
}
any_kind = pytest.mark.parametrize("kind", KINDS)


# ---- comparisons ----


def bytes_of_storage(tensor: torch.Tensor) -> list[int]:
    return list(tensor.untyped_storage())


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.layout is not torch.strided:
        return torch.equal(a.detach().to_dense(), b.detach().to_dense())
    resolved = (tensor.detach().resolve_conj().resolve_neg() for tensor in (a, b))
    a, b = (tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for tensor in resolved)
    return torch.equal(a, b)


def assert_like(result: torch.Tensor, expected: torch.Tensor, source: torch.Tensor) -> None:
    """Nothing that a caller could ask of the two tells them apart."""
    assert (result is source) == (expected is source)
    assert type(result) is type(expected)
    for trait in ("dtype", "device", "shape", "layout", "requires_grad", "is_leaf"):
        assert getattr(result, trait) == getattr(expected, trait), trait
    for trait in ("is_inference", "is_conj", "is_neg"):
        assert getattr(result, trait)() == getattr(expected, trait)(), trait
    assert type(result.grad_fn) is type(expected.grad_fn)
    if result.layout is torch.strided:
        assert result.stride() == expected.stride()
        assert result.storage_offset() == expected.storage_offset()
        assert result.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    if not result.is_meta:
        assert same_values(result, expected)


def assert_to_as_torch(tensors: list[torch.Tensor], **options: Any) -> None:
    results = fastopt.to(tensors, **options)
    given_options = {key: value for key, value in options.items() if value is not None}
    assert len(results) == len(tensors)
    for result, tensor in zip(results, tensors, strict=True):
        assert_like(result, tensor.to(**given_options), tensor)
