"""The pure-Python backend: complete, and the reference that the native one is held to."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any
from zlib import crc32 as crc32

import torch

from fastopt.backends.interface import BETWEEN, BoxInFile, PlaceInFile, Rules, State
from fastopt.chunked import row_major
from fastopt.errors import OverlapError, describe_tensor
from fastopt.files import torch_zip
from fastopt.files.reading import read_exactly
from fastopt.files.staging import Entry, pieces

name = "python"

PIECE = 2 * 2**20
"""Bytes that are read from a file at a time, to where their dtype can be read."""


def index_state(
    param_lists: list[list[torch.Tensor]], state: Mapping[Any, Any]
) -> tuple[list[list[int]], dict[Any, Any]]:
    indices: dict[int, int] = {}
    packed_lists: list[list[int]] = []
    start = 0
    for params in param_lists:
        # Within a group a later index replaces an earlier one; over several groups the first stays.
        indices.update({id(p): i for i, p in enumerate(params, start) if id(p) not in indices})
        packed_lists.append([indices[id(p)] for p in params])
        start += len(packed_lists[-1])
    return packed_lists, {(indices[id(k)] if isinstance(k, torch.Tensor) else k): v for k, v in state.items()}


def id_map(saved_lists: list[list[Any]], param_lists: list[list[torch.Tensor]]) -> dict[Any, torch.Tensor]:
    return dict(zip(chain.from_iterable(saved_lists), chain.from_iterable(param_lists), strict=True))


def cast_state(saved_state: Mapping[Any, Any], id_map: dict[Any, torch.Tensor], rules: Rules) -> State:
    state: State = defaultdict(dict)
    for saved_id, value in saved_state.items():
        if saved_id in id_map:
            param = id_map[saved_id]
            state[param] = rules.entry(param, value, saved_id)
        else:
            state[rules.keep(saved_id)] = rules.unclaimed(saved_id, value)
    return state


def copy_(
    dsts: list[torch.Tensor],
    srcs: list[torch.Tensor],
    non_blocking: bool,
    begun: list[list[int]],
    reads_files: bool = False,
) -> None:
    for index, (dst, src) in enumerate(zip(dsts, srcs, strict=True)):
        check_pair(index, dst, src)
    check_overlap(dsts, srcs)
    for index, (dst, src) in enumerate(zip(dsts, srcs, strict=True)):
        begun.append([index])
        copy_entry(index, dst, src, non_blocking)


def to(tensors: list[torch.Tensor], options: dict[str, Any], copy: bool) -> list[torch.Tensor]:
    return [to_entry(index, tensor, options, copy) for index, tensor in enumerate(tensors)]


def write_torch_files(
    fd: int, contents: list[Any], dtypes: Mapping[int, torch.dtype], start: int = 0
) -> list[tuple[int, int]]:
    places: list[tuple[int, int]] = []
    for content in contents:
        start = start_after(places, start)
        places.append((start, torch_zip.write(fd, content, dtypes, start)))
    return places


def start_after(places: list[tuple[int, int]], start: int) -> int:
    """Where the next file within a file begins; `start` where there is none yet."""
    if not places:
        return start
    end = sum(places[-1])
    return end + -end % BETWEEN


def write_small(fd: int, entries: list[Entry]) -> list[int | None]:
    return [None] * len(entries)


def tensors_in_file(descriptor: int, path: str | os.PathLike[str], places: list[PlaceInFile]) -> list[torch.Tensor]:
    size = os.fstat(descriptor).st_size
    mapping = torch.UntypedStorage.from_file(os.fspath(path), shared=False, nbytes=size) if size else None
    tensors = []
    for offset, nbytes, dtype, shape, stride, first, is_copied in places:
        if not 0 <= offset <= offset + nbytes <= size:
            raise ValueError("a tensor is not within the file")
        if is_copied or mapping is None:
            content = torch.empty(nbytes, dtype=torch.uint8)
            read_exactly(descriptor, offset, content)
            storage = content.untyped_storage()
        else:
            storage = mapping[offset : offset + nbytes]
        tensor = torch.empty(0, dtype=dtype)
        tensor.set_(storage, first, shape, row_major(shape) if stride is None else stride)
        if tensor.untyped_storage().nbytes() != nbytes:  # torch makes room where there is none
            raise ValueError("a tensor is not within its bytes of the file")
        tensors.append(tensor)
    return tensors


def read_into(descriptor: int, offset: int, dtype: torch.dtype, target: torch.Tensor) -> None:
    for piece in pieces(target, PIECE // dtype.itemsize):
        content = torch.empty(piece.shape, dtype=dtype)
        read_exactly(descriptor, offset, content)
        piece.copy_(content)
        offset += content.nbytes


def read_boxes(entries: list[BoxInFile]) -> None:
    for descriptor, offset, dtype, steps, target in entries:
        if target.numel():
            read_box(descriptor, offset, dtype, list(steps), target)


def read_box(descriptor: int, offset: int, dtype: torch.dtype, steps: list[int], target: torch.Tensor) -> None:
    """Fill a tensor with a box of a file, read in pieces together with what lies between its elements."""
    span = 1 + sum((extent - 1) * step for extent, step in zip(target.shape, steps, strict=True))
    if span * dtype.itemsize <= PIECE or target.dim() == 0:
        content = torch.empty(span, dtype=dtype)
        read_exactly(descriptor, offset, content)
        target.copy_(content.as_strided(target.shape, steps))
        return
    outer = max(range(target.dim()), key=lambda dimension: (target.shape[dimension] > 1, steps[dimension]))
    inner = span - (target.shape[outer] - 1) * steps[outer]
    at_once = max(1, (PIECE // dtype.itemsize - inner) // steps[outer] + 1)
    for start in range(0, target.shape[outer], at_once):
        part = target.narrow(outer, start, min(at_once, target.shape[outer] - start))
        read_box(descriptor, offset + start * steps[outer] * dtype.itemsize, dtype, steps, part)


def new_tensors(specs: list[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
    return [torch.empty(tuple(size), dtype=dtype) for size, dtype in specs]


def file_range(tensor: torch.Tensor) -> tuple[int, int, int, bytes] | None:
    return None


def read_torch_file(path: str | os.PathLike[str]) -> tuple[Any] | None:
    return None


def copy_entry(index: int, dst: torch.Tensor, src: torch.Tensor, non_blocking: bool) -> None:
    """`dst.copy_(src)`; torch's own error, if any, gets the entry's index."""
    try:
        dst.copy_(src, non_blocking=non_blocking)
    except Exception as error:
        error.add_note(f"copy_: entry {index}: {describe_tensor(src)} -> {describe_tensor(dst)}")
        raise


def to_entry(index: int, tensor: torch.Tensor, options: dict[str, Any], copy: bool) -> torch.Tensor:
    """`tensor.to(**options, copy=copy)`; torch's own error, if any, gets the entry's index."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"to: entry {index} is a {type(tensor).__name__}, not a tensor")
    try:
        return tensor.to(**options, copy=copy)
    except Exception as error:
        error.add_note(f"to: entry {index}: {describe_tensor(tensor)}")
        raise


def check_pair(index: int, dst: torch.Tensor, src: torch.Tensor) -> None:
    """Raises TypeError or ValueError with the index of a pair that cannot be copied."""
    for role, tensor in (("destination", dst), ("source", src)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"copy_: {role} {index} is a {type(tensor).__name__}, not a tensor")
    if dst.shape != src.shape:
        raise ValueError(
            f"copy_: entry {index}: the source's shape {list(src.shape)} is not the destination's {list(dst.shape)}"
        )


def check_overlap(dsts: list[torch.Tensor], srcs: list[torch.Tensor]) -> None:
    """Raises ValueError where a destination shares memory with another destination or with a source.

    Only dense tensors are judged: two strided views may interleave without sharing an element, so entries of that kind
    are copied one after the other, in the order given.
    """
    spans = []
    for index, (dst, src) in enumerate(zip(dsts, srcs, strict=True)):
        if dst_span := dense_span(dst):
            spans.append((*dst_span, "destination", index))
        if (src_span := dense_span(src)) and not (src_span == dst_span and same_view(dst, src)):
            spans.append((*src_span, "source", index))
    spans.sort(key=lambda span: span[:2])
    reach: dict[str, tuple[int, int]] = {"destination": (0, -1), "source": (0, -1)}
    for begin, end, role, index in spans:
        for other in ("destination", "source"):
            reached, owner = reach[other]
            if begin < reached and "destination" in (role, other):
                raise OverlapError(f"copy_: {role} {index} overlaps {other} {owner} in memory", index, owner)
        reach[role] = max(reach[role], (end, index))


def dense_span(tensor: torch.Tensor) -> tuple[int, int] | None:
    """First and last address of a dense tensor in memory that can be compared, or None."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return None
    if tensor.is_meta or tensor.numel() == 0 or not is_dense(tensor):
        return None
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def same_view(dst: torch.Tensor, src: torch.Tensor) -> bool:
    """Whether copying one to the other would change nothing."""
    return dst.dtype == src.dtype and dst.stride() == src.stride()
