"""What fastopt.copy_ refuses before it writes, and what it allows."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastopt
from tests.batches import FLOATING, Subclass, bytes_of_storage


@contextlib.contextmanager
def untouched(*tensors: torch.Tensor) -> Iterator[None]:
    before = [bytes_of_storage(tensor) for tensor in tensors]
    yield
    assert [bytes_of_storage(tensor) for tensor in tensors] == before


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
