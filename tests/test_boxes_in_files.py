"""Boxes of elements read out of files, held to torch's own copies."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fastopt.backends import current, python

pytestmark = pytest.mark.usefixtures("backend")

F32, BF16, F64, I32 = torch.float32, torch.bfloat16, torch.float64, torch.int32


def in_file(path: Path, tensor: torch.Tensor, before: int) -> int:
    """Write the memory of a tensor after so many bytes; returns the file's descriptor."""
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    path.write_bytes(bytes(before) + bytes(memory.tolist()))
    return os.open(path, os.O_RDONLY)


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)


SOURCES = {
    "a vector": lambda dtype: (values(dtype, 3000), (slice(17, 2500),)),
    "whole rows": lambda dtype: (values(dtype, 40, 30), (slice(3, 20), slice(None))),
    "parts of short rows": lambda dtype: (values(dtype, 40, 30), (slice(3, 20), slice(4, 9))),
    "parts of long rows": lambda dtype: (values(dtype, 5, 9000), (slice(1, 4), slice(100, 8000))),
    "a box of a box": lambda dtype: (values(dtype, 6, 7, 8), (slice(1, 4), slice(2, 3), slice(3, 8))),
    "columns first": lambda dtype: (values(dtype, 30, 2000).t(), (slice(3, 1999), slice(1, 4))),
    "a number": lambda dtype: (values(dtype), ()),
    "nothing": lambda dtype: (values(dtype, 4, 5), (slice(2, 2), slice(1, 3))),
}

TARGETS = {
    "packed": lambda shape, dtype: torch.full(shape, 7, dtype=dtype),
    "with gaps": lambda shape, dtype: torch.full([2 * size for size in shape], 7, dtype=dtype)[
        tuple(slice(0, 2 * size, 2) for size in shape)
    ],
    "turned": lambda shape, dtype: torch.full(shape[::-1], 7, dtype=dtype).permute([*range(len(shape))][::-1]),
}


@pytest.mark.parametrize("piece", [python.PIECE, 256])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (F32, BF16), (BF16, F32), (F64, F32), (I32, F32), (F32, torch.float8_e5m2)]
)
def test_each_element_goes_to_its_place(
    tmp_path: Path, monkeypatch: Any, dtypes: Any, source: str, target: str, piece: int
) -> None:
    monkeypatch.setattr(python, "PIECE", piece)
    saved, box = SOURCES[source](dtypes[0])
    part = saved[box]
    results = [TARGETS[target](part.shape, dtypes[1]) for _ in range(2)]
    descriptor = in_file(tmp_path / "file", saved, 13)
    first = 13 + part.storage_offset() * saved.element_size() if part.numel() else 13
    before = results[0]._version
    try:
        current().read_boxes([(descriptor, first, saved.dtype, saved.stride(), results[0])])
    finally:
        os.close(descriptor)
    results[1].copy_(part)
    around = [torch.empty(0, dtype=torch.uint8).set_(result.untyped_storage()) for result in results]
    assert torch.equal(*around)
    assert (results[0]._version > before) == (part.numel() > 0)


def test_boxes_of_several_files_in_one_batch(tmp_path: Path) -> None:
    sources = [values(F32, 40, 3000) for _ in range(3)]
    descriptors = [in_file(tmp_path / str(index), source, index) for index, source in enumerate(sources)]
    targets = [torch.zeros(20, 3000, dtype=BF16) for _ in sources]
    try:
        current().read_boxes(
            [
                (descriptor, index + 20 * 3000 * 4, F32, (3000, 1), target)
                for index, (descriptor, target) in enumerate(zip(descriptors, targets, strict=True))
            ]
        )
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target, source[20:].to(BF16))


@pytest.mark.parametrize("columns", [1000, 3])
def test_a_file_that_ends_before_is_an_error(tmp_path: Path, columns: int) -> None:
    descriptor = in_file(tmp_path / "file", values(F32, 10, 1000), 0)
    try:
        with pytest.raises(OSError, match="the file has ended before"):
            current().read_boxes([(descriptor, 4000, F32, (1000, 1), torch.empty(10, columns))])
    finally:
        os.close(descriptor)


def test_new_tensors_are_like_any_other() -> None:
    specs = [((3, 4), F32), ((0, 5), BF16), ((), I32), ((1 << 21,), F32)]
    made = current().new_tensors(specs)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in made] == specs
    assert all(tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in made)
    for tensor in made:
        tensor.fill_(1)
        tensor.resize_(7).fill_(2)
    assert made[0].tolist() == [2.0] * 7
