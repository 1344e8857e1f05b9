"""fastopt.copy_ and fastopt.to against `Tensor.copy_` and `Tensor.to`, on both backends."""

import contextlib
import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHERS = (torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = FLOATING + OTHERS
LARGE = 3 << 20  # elements of a result that gets memory of its own

# What torch says of complex -> real, it says through either function.
pytestmark = pytest.mark.filterwarnings("ignore:Casting complex values to real")
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


def twin(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over a copy of the whole storage, with the same view of it."""
    memory = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage().clone())
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


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


@contextlib.contextmanager
def untouched(*tensors: torch.Tensor) -> Iterator[None]:
    before = [bytes_of_storage(tensor) for tensor in tensors]
    yield
    assert [bytes_of_storage(tensor) for tensor in tensors] == before


# ---- fastopt.to ----


@several_examples
@given(st.lists(sources(), max_size=6), st.none() | st.sampled_from(DTYPES), st.booleans())
def test_to(backend: str, tensors: list[torch.Tensor], dtype: torch.dtype | None, copied: bool) -> None:
    assert_to_as_torch(tensors, dtype=dtype, copy=copied)


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


# ---- what fastopt.to returns is an ordinary tensor ----


@pytest.fixture(params=[5, 1000, LARGE], ids=["tiny", "small", "large"])
def result(request: pytest.FixtureRequest, backend: str) -> torch.Tensor:
    [cast] = fastopt.to([values((request.param,), torch.bfloat16)], dtype=torch.float32)
    return cast


def test_result_has_a_storage_of_its_own_size(result: torch.Tensor) -> None:
    assert result.untyped_storage().nbytes() == result.nbytes
    assert result.data_ptr() == result.untyped_storage().data_ptr()
    assert result.data_ptr() % torch.empty(result.shape).element_size() == 0
    assert result.data_ptr() % 64 == 0
    assert result.untyped_storage().resizable()


def test_result_can_be_saved_and_loaded(result: torch.Tensor) -> None:
    file = io.BytesIO()
    torch.save({"a": result, "b": result[1:]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded["a"], result)
    assert loaded["b"].data_ptr() == loaded["a"].data_ptr() + result.element_size()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), torch.clone])
def test_result_can_be_duplicated(result: torch.Tensor, duplicate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert torch.equal(duplicate(result), result)


def test_result_can_be_shared_between_processes(result: torch.Tensor) -> None:
    before = result.clone()
    assert not result.is_shared()
    result.share_memory_()
    assert result.is_shared()
    assert torch.equal(result, before)


def test_result_can_grow_and_shrink(result: torch.Tensor) -> None:
    before = result.clone()
    result.resize_(2 * LARGE)
    assert torch.equal(result[: before.numel()], before)
    result.fill_(1)
    result.resize_(3)
    result.untyped_storage().resize_(3 * result.element_size())
    assert result.tolist() == [1, 1, 1]
    result.untyped_storage().resize_(0)
    assert result.untyped_storage().nbytes() == 0


def test_result_and_its_numpy_array_are_one_memory(result: torch.Tensor) -> None:
    array = result.numpy()
    array[0] = 77
    assert result[0].item() == 77
    expected = result.clone()
    del result
    assert array.tobytes() == expected.numpy().tobytes()


def test_result_outlives_its_siblings(backend: str) -> None:
    sources = [values((n,), torch.float32, seed=n) for n in (10, 1000, LARGE, 3)]
    for survivor in range(len(sources)):
        kept = fastopt.to(sources, dtype=torch.float64)[survivor]
        fastopt.to(sources, dtype=torch.float16)
        assert torch.equal(kept, sources[survivor].to(torch.float64))


def test_result_can_be_trained(result: torch.Tensor) -> None:
    param = torch.nn.Parameter(result)
    param.square().sum().backward()
    assert torch.equal(param.grad, 2 * param.detach())
    result.add_(1)
    assert result._version == 1


# ---- fastopt.copy_ ----


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


# ---- what fastopt.copy_ refuses, before it writes ----


def test_copy_of_different_numbers(backend: str) -> None:
    dsts = [torch.zeros(2), torch.zeros(2)]
    with untouched(*dsts), pytest.raises(ValueError, match="2 destinations and 1 sources"):
        fastopt.copy_(dsts, [torch.ones(2)])


@pytest.mark.parametrize("shape", [(1,), (3, 1), (), (0,), (1, 3)])
@pytest.mark.parametrize("odd", [torch.Tensor, Subclass, torch.nn.Parameter])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_copy_names_the_entry_whose_shapes_differ(
    backend: str, shape: tuple[int, ...], odd: type[torch.Tensor], position: int
) -> None:
    dsts, srcs = [torch.zeros(3) for _ in range(3)], [torch.ones(3) for _ in range(3)]
    srcs[position] = odd(torch.ones(shape)).detach().as_subclass(odd)
    with untouched(*dsts), pytest.raises(ValueError, match=rf"entry {position}\b"):
        fastopt.copy_(dsts, srcs)


@pytest.mark.parametrize("role", ["destination", "source"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_copy_names_the_entry_that_is_no_tensor(backend: str, role: str, position: int) -> None:
    lists: dict[str, list[Any]] = {"destination": [torch.zeros(3)] * 2, "source": [torch.ones(3)] * 2}
    lists["destination"] = [torch.zeros(3) for _ in range(3)]
    lists["source"] = [torch.ones(3) for _ in range(3)]
    lists[role][position] = [1, 1, 1]
    tensors = [dst for dst in lists["destination"] if isinstance(dst, torch.Tensor)]
    with untouched(*tensors), pytest.raises(TypeError, match=rf"{role} {position}\b.*list"):
        fastopt.copy_(lists["destination"], lists["source"])


def overlaps(memory: torch.Tensor) -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Batches over `memory`, 16 elements, in which a destination shares some with another entry or its own source."""
    free = torch.ones(8)
    square = memory.view(4, 4)
    return {
        "within an entry": ([memory[1:9]], [memory[:8]]),
        "within an entry, transposed": ([square], [square.t()]),
        "within an entry, other dtype": ([memory], [memory.view(torch.int32)]),
        "within an entry, other strides of size one": ([memory.view(1, 16)], [memory.as_strided((1, 16), (99, 1))]),
        "destination and earlier source": ([free.clone(), memory[:8]], [memory[4:12], free]),
        "destination and later source": ([memory[:8], free.clone()], [free, memory[7:15]]),
        "two destinations": ([memory[:8], memory[7:15]], [free, free]),
        "equal destinations": ([memory[:8], memory[:8]], [free, free]),
        "a destination within another": ([memory, memory[3:4]], [torch.ones(16), torch.ones(1)]),
        "a destination that is copied to itself, and another": ([memory, memory[3:4]], [memory, torch.ones(1)]),
        "a source within a destination": ([memory, torch.zeros(1)], [torch.ones(16), memory[9:10]]),
        "a source of an integer entry": ([memory[:8], torch.zeros(8, dtype=torch.int32)], [free, memory[4:12]]),
    }


@pytest.mark.parametrize("case", overlaps(torch.zeros(16)))
@pytest.mark.parametrize("reverse", [False, True])
def test_copy_refuses_overlapping_memory(backend: str, case: str, reverse: bool) -> None:
    memory = torch.arange(16.0)
    dsts, srcs = overlaps(memory)[case]
    entries = len(dsts)
    # Entries that overlap nothing, before and after, keep their places in the message.
    dsts, srcs = [torch.zeros(2), *dsts, torch.zeros(2)], [torch.ones(2), *srcs, torch.ones(2)]
    if reverse:
        dsts, srcs = dsts[::-1], srcs[::-1]
    version = memory._version
    with (
        untouched(*dsts),
        pytest.raises(ValueError, match=rf"(destination|source) [1-{entries}] overlaps .* [1-{entries}]\b"),
    ):
        fastopt.copy_(dsts, srcs)
    assert memory._version == version


def test_copy_allows_interleaved_columns(backend: str) -> None:
    table, other = torch.arange(12.0).view(4, 3), torch.arange(100.0, 112.0, dtype=torch.float64).view(4, 3)
    expected = other.to(torch.float32)
    fastopt.copy_([table[:, i] for i in range(3)], [other[:, i] for i in range(3)])
    assert torch.equal(table, expected)
    fastopt.copy_([table[:, 0]], [table[:, 1]])
    assert torch.equal(table[:, 0], expected[:, 1])


def test_copy_allows_neighbours(backend: str) -> None:
    memory = torch.arange(12.0)
    fastopt.copy_([memory[:4], memory[4:8]], [memory[8:], torch.ones(4, dtype=torch.bfloat16)])
    assert memory.tolist() == [8, 9, 10, 11, 1, 1, 1, 1, 8, 9, 10, 11]


def test_copy_allows_one_source_for_many(backend: str) -> None:
    source = torch.arange(5.0)
    dsts = [torch.zeros(5, dtype=dtype) for dtype in FLOATING]
    fastopt.copy_(dsts, [source] * len(dsts))
    assert all(torch.equal(dst, source.to(dst.dtype)) for dst in dsts)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "integer", "Parameter"])
def test_copy_of_a_tensor_to_itself(backend: str, layout: str) -> None:
    memory = torch.arange(24.0).view(4, 6)
    tensor = {
        "contiguous": memory,
        "transposed": memory.t(),
        "sliced": memory[:, ::2],
        "integer": memory.to(torch.int64),
        "Parameter": torch.nn.Parameter(memory, requires_grad=False),
    }[layout]
    before, version, expected = tensor.clone(), tensor._version, tensor.clone()
    base_version = expected._version
    expected.copy_(expected)
    fastopt.copy_([tensor, torch.zeros(1)], [tensor, torch.ones(1)])
    assert torch.equal(tensor, before)
    assert tensor._version - version == expected._version - base_version


def test_copy_into_an_expanded_destination_fails_as_torch_does(backend: str) -> None:
    dst = torch.zeros(1).expand(3)
    with pytest.raises(RuntimeError) as expected:
        dst.copy_(torch.ones(3))
    with untouched(dst), pytest.raises(RuntimeError) as caught:
        fastopt.copy_([dst], [torch.ones(3)])
    assert str(caught.value) == str(expected.value)
    assert any("entry 0" in note for note in caught.value.__notes__)


# ---- modes ----


class Record(TorchDispatchMode):
    """Names of the operations that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations_of(call: Callable[[], Any]) -> list[str]:
    with Record() as record:
        call()
    return record.operations


def test_a_dispatch_mode_sees_what_torch_would_show_it(backend: str) -> None:
    sources, dsts = [images(), values((3,), torch.int64)], [images().double(), values((3,), torch.float32)]
    shown = operations_of(lambda: [source.to(torch.bfloat16) for source in sources])
    assert operations_of(lambda: fastopt.to(sources, dtype=torch.bfloat16)) == shown
    shown = operations_of(lambda: [dst.copy_(src) for dst, src in zip(dsts, sources, strict=True)])
    assert [op for op in operations_of(lambda: fastopt.copy_(dsts, sources)) if op == "copy_"] == shown


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_default_device_has_no_say(backend: str, default: str) -> None:
    source, dst = images(), torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)
    with torch.device(default):
        assert_to_as_torch([source], dtype=torch.bfloat16)
        fastopt.copy_([dst], [source])
    assert torch.equal(dst, source.to(torch.bfloat16))


def test_vmap_sees_its_own_tensors(backend: str) -> None:
    batch = values((4, 3), torch.float32)
    result = torch.vmap(lambda row: fastopt.to([row], dtype=torch.float64)[0] * 2)(batch)
    assert torch.equal(result, batch.double() * 2)
