"""DTensors, as the part that each process holds and how the parts are placed.

Nothing here imports `torch.distributed.tensor`, which takes long: before somebody else has, there is no DTensor.
"""

import sys
from typing import Any

import torch

from fastopt.chunked import is_dense


def module() -> Any:
    """`torch.distributed.tensor`; None where nobody has imported it."""
    return sys.modules.get("torch.distributed.tensor")


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor."""
    distributed = module()
    return distributed is not None and isinstance(value, distributed.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What a DTensor holds in this process; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def placed_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the parts of two DTensors of one shape are the same on every process; or neither is a DTensor."""
    if is_dtensor(one) and is_dtensor(other):
        ours, theirs = one._spec, other._spec  # type: ignore[attr-defined]
        return bool(ours.mesh == theirs.mesh and ours.placements == theirs.placements)
    return is_dtensor(one) == is_dtensor(other)


def placement(tensor: torch.Tensor) -> str:
    """How a tensor is placed, in words for an error."""
    if not is_dtensor(tensor):
        return "a plain tensor"
    mesh = tuple(tensor.device_mesh.shape)  # type: ignore[attr-defined]
    return f"a DTensor placed by {tensor.placements} on a mesh of {mesh}"  # type: ignore[attr-defined]


def is_seen_through(tensor: Any) -> bool:
    """Whether it is a DTensor of which a copy or a cast is one of the part that is here.

    Not where a sum is pending, where autograd wants to know, or where strides have gaps that a copy would close.
    """
    if not is_dtensor(tensor) or (tensor.requires_grad and torch.is_grad_enabled()):
        return False
    distributed = module()
    seen = (distributed.Shard, distributed.Replicate)
    has_gaps = tensor.numel() > 0 and not is_dense(tensor.shape, tensor.stride())
    return all(type(one) in seen for one in tensor.placements) and not has_gaps


class Specs:
    """How DTensors of other dtypes are placed. Each is found once for all that have the same."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def __call__(self, spec: Any, dtype: torch.dtype) -> Any:
        """The spec of a DTensor that differs in its dtype."""
        meta = spec.tensor_meta
        if dtype is meta.dtype:
            return spec
        key = id(spec.mesh), spec.placements, meta.shape, meta.stride, dtype
        if key not in self.known:
            self.known[key] = spec.shallow_copy_with_tensor_meta(meta._replace(dtype=dtype))
        return self.known[key]


def placed(part: torch.Tensor, spec: Any) -> torch.Tensor:
    """A DTensor of the part that this process holds, as its spec says; without an operation of torch's.

    Its `__init__`, which does nothing, takes twice as long as all the rest, and torch leaves it out as well.
    """
    dtensor = module().DTensor
    return dtensor.__new__(dtensor, part, spec, requires_grad=False)  # type: ignore[no-any-return]


def for_native() -> tuple[Any, ...] | None:
    """What the native walk knows of DTensors: the type, the placements it sees through, and the specs for results."""
    distributed = module()
    if distributed is None:
        return None
    return distributed.DTensor, distributed.Shard, distributed.Replicate, distributed.DTensor.__new__, Specs()
