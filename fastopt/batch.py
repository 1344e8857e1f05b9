"""Copies and casts of many tensors in one call."""

from collections.abc import Iterable
from typing import Any

import torch

from fastopt.backends import current
from fastopt.collector import paused_collector
from fastopt.errors import check_bools


def copy_(dsts: Iterable[torch.Tensor], srcs: Iterable[torch.Tensor], *, non_blocking: bool = False) -> None:
    """Copy each source into its destination, as `dst.copy_(src)` does, in one batched call.

    Any mix of dtypes, strides and devices. The values are those of `dst.copy_(src)`, to the bit for what is not NaN;
    the destinations' version counters move as with it. Plain CPU tensors are copied by all threads together. With an
    extension built for CUDA, plain tensors of one GPU are copied by a launch for a thousand of them, and between CPU
    and GPU through pinned memory of the process's own, in the dtype that has fewer bytes; both in the order of the
    GPU's current stream. Other pairs are copied one by one through torch, before those.

    Args:
        dsts: tensors to write.
        srcs: as many tensors of the same shapes. Nothing is broadcast.
        non_blocking: whether pinned memory of the CPU may be read and written after the call, as the current stream
            gets there. As with torch, the caller sees to it that it stays as it is, or is not used, until then.

    Raises:
        ValueError: the numbers or the shapes of a pair differ, or a destination overlaps another destination or a
            source; the text names the entry. A pair of the very same tensor is no overlap. Only dense tensors are
            judged: strided views may interleave, so where they might overlap, all pairs are copied in the order given.
            The memory of a tensor subclass is not known and must be its own.
        TypeError: an entry is no tensor.
        RuntimeError: what torch raises for an entry, with a note that names it.

    After a ValueError or TypeError nothing has been written.
    """
    check_bools(non_blocking=non_blocking)
    listed_dsts, listed_srcs = list(dsts), list(srcs)
    if len(listed_dsts) != len(listed_srcs):
        raise ValueError(f"copy_: {len(listed_dsts)} destinations and {len(listed_srcs)} sources")
    current().copy_(listed_dsts, listed_srcs, non_blocking, begun=[])


def to(
    tensors: Iterable[torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    copy: bool = False,
) -> list[torch.Tensor]:
    """Cast and move tensors, as `tensor.to(dtype=dtype, device=device, copy=copy)` does, in one batched call.

    Args:
        tensors: any mix of dtypes, shapes, strides and devices.
        dtype: the dtype of the results; None keeps each tensor's own.
        device: the device of the results; None keeps each tensor's own.
        copy: copy what needs no cast as well; otherwise the result holds that tensor itself.

    Returns:
        One tensor each, in order; dense strides are kept.

    Raises:
        TypeError: an entry is no tensor, or `dtype` no dtype.
        RuntimeError: what torch raises for an entry, with a note that names it.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"to: dtype is a {type(dtype).__name__}, not a torch.dtype")
    check_bools(copy=copy)
    options: dict[str, Any] = {}
    if dtype is not None:
        options["dtype"] = dtype
    if device is not None:
        options["device"] = torch.device(device)
    listed = list(tensors)
    with paused_collector():
        return current().to(listed, options, copy)
