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


def local(tensor: Any) -> torch.Tensor:
    """What a DTensor holds in this process; any other tensor itself."""
    part: torch.Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor
    return part


def spec(dtensor: Any) -> Any:
    """How a DTensor is placed: mesh, placements, and the shape, strides and dtype of the whole."""
    return dtensor._spec


def placed_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the parts of two DTensors of one shape are the same on every process; or neither is a DTensor."""
    kinds = is_dtensor(one), is_dtensor(other)
    if not all(kinds):
        return not any(kinds)
    ours, theirs = spec(one), spec(other)
    return bool(ours.mesh == theirs.mesh and ours.placements == theirs.placements)


def placement(tensor: Any) -> str:
    """How a tensor is placed, in words for an error."""
    if not is_dtensor(tensor):
        return "a plain tensor"
    return f"a DTensor placed by {tensor.placements} on a mesh of {tuple(tensor.device_mesh.shape)}"


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


def are_among(tensors: list[Any]) -> bool:
    """Whether a list of very many may hold DTensors."""
    distributed = module()
    return distributed is not None and distributed.DTensor in set(map(type, tensors))


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

    Its `__init__`, which does nothing but call those of its bases, takes longer than all the rest and is left out.
    """
    dtensor = module().DTensor
    made: torch.Tensor = dtensor.__new__(dtensor, part, spec, requires_grad=False)
    return made


def for_native() -> tuple[Any, ...] | None:
    """What the native walk knows of DTensors: the type, the placements it sees through, and the specs for results."""
    distributed = module()
    if distributed is None:
        return None
    return distributed.DTensor, distributed.Shard, distributed.Replicate, distributed.DTensor.__new__, Specs()
