"""A tensor that lies in files as they have it: in several chunks, at any byte; put together where it is needed."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map


class Source(Protocol):
    """Elements that are somewhere else than in memory that torch may read."""

    shape: torch.Size

    def copy_into(self, target: torch.Tensor) -> None:
        """Copy the elements into a tensor of the same shape, cast to its dtype."""


Part = tuple[Sequence[int], torch.Tensor | Source]
"""Where a chunk begins in each dimension, and its elements."""


class ChunkedTensor(torch.Tensor):
    """A tensor on the CPU without memory of its own, whose chunks may be in files that are not read yet.

    `.to(…)`, and `copy_` from it, go chunk by chunk, and need no memory but the result's. Any other operation is one on
    a plain tensor that is put together for it and given up after it; so is a deep copy, and what is pickled. One that
    writes to it puts it together for good; before that, a view of it is one of a copy.

    Args:
        size: its shape.
        dtype: the dtype of all chunks.
        parts: the chunks, which cover each element once.
        stride: its strides; None for a contiguous one.
    """

    parts: Sequence[Part]
    own: torch.Tensor | None
    """Its own memory, once something was written to it."""

    @staticmethod
    def __new__(  # noqa: D102
        cls, size: Sequence[int], dtype: torch.dtype, parts: Sequence[Part], stride: Sequence[int] | None = None
    ) -> "ChunkedTensor":
        self: ChunkedTensor = torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=dtype, device=torch.device("cpu")
        )
        self.parts, self.own = parts, None
        return self

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def whole(self, **options: Any) -> torch.Tensor:
        """A plain tensor of the same elements and strides; `options` are its dtype and device, if they are others."""
        result = torch.empty_strided(self.shape, self.stride(), **{"dtype": self.dtype, "device": "cpu", **options})
        self.copy_into(result)
        return result

    def copy_into(self, target: torch.Tensor) -> None:
        """Copy each chunk into its part of a tensor of the same shape, cast to its dtype."""
        for offsets, values in self.parts:
            box = target
            for dimension, (offset, extent) in enumerate(zip(offsets, values.shape, strict=True)):
                box = box.narrow(dimension, offset, extent)
            if isinstance(values, torch.Tensor):
                box.copy_(values)
            else:
                values.copy_into(box)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Operations of torch's: the two that go by chunks, and all others."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            options = {key: value for key, value in kwargs.items() if key in ("dtype", "device") and value is not None}
            return args[0].whole(**options)
        if func is torch.ops.aten.copy_.default and isinstance(args[1], cls) and args[0].shape == args[1].shape:
            args[1].copy_into(args[0])
            return args[0]
        if func._schema.is_mutable:  # type: ignore[attr-defined]
            written = tree_map(settled, args), tree_map(settled, kwargs)
            result = func(*written[0], **written[1])
            return args[0] if isinstance(args[0], cls) and result is args[0].own else result
        return func(*tree_map(plain, args), **tree_map(plain, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        memo[id(self)] = whole = self.whole()
        return whole

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def plain(value: Any) -> Any:
    """A chunked tensor put together; anything else as it is."""
    if not isinstance(value, ChunkedTensor):
        return value
    return value.whole() if value.own is None else value.own


def settled(value: Any) -> Any:
    """A chunked tensor's own memory, which it has from now on; anything else as it is."""
    if not isinstance(value, ChunkedTensor):
        return value
    if value.own is None:
        value.own = value.whole()
        value.parts = [([0] * value.dim(), value.own)]
    return value.own


def is_dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether strides are those of a tensor without gaps, whatever the order of its dimensions."""
    inner = 1
    for step, extent in sorted((step, extent) for step, extent in zip(stride, size, strict=True) if extent != 1):
        if step != inner:
            return False
        inner *= extent
    return inner == math.prod(size)


def row_major(size: Sequence[int]) -> tuple[int, ...]:
    """The strides of a new tensor."""
    strides, stride = [0] * len(size), 1
    for dim in range(len(size) - 1, -1, -1):
        strides[dim] = stride
        stride *= max(size[dim], 1)
    return tuple(strides)
