"""Copies of states that training does not touch, in memory that is kept from one save to the next."""

import copy as copying
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.optim import Optimizer

from fastopt.backends import current
from fastopt.collector import paused_collector
from fastopt.dtensors import placed

# Note [Staging]
#
# What a save in the background makes training wait for is the copy of the state. Most of that time would go to fresh
# pages, which the system fills with zeros before it hands them out. So the memory of a copy is kept, and the next copy
# of the same optimizer goes there: at the speed of memory that is there already. Nothing else is done meanwhile: plans,
# and all that ranks have to say to each other, come afterwards, in the background.

kept: "WeakKeyDictionary[Optimizer, Any]" = WeakKeyDictionary()
"""The last copy of each optimizer's state, which goes with the optimizer."""


def staged(optimizer: Optimizer, content: Any, keep: bool) -> Any:
    """Copy a state to the CPU's memory, all tensors in one batch.

    Args:
        optimizer: whose state it is. Its last copy is overwritten, where that has the same tensors: nobody may read it
            any more.
        content: the state, in dicts and lists, of this rank; tensors are plain ones and DTensors.
        keep: whether the memory of the copy is kept for the next one.
    """
    stage = Stage()
    with paused_collector():
        copied = stage.add(content, kept.pop(optimizer, None))
        stage.run()
    if keep:
        kept[optimizer] = copied
    return copied


class Stage:
    """Collects tensors to be copied, and where a copy has to be put once it is made."""

    def __init__(self) -> None:
        self.filled: list[tuple[torch.Tensor, torch.Tensor]] = []
        """A tensor, and its copy of before."""
        self.made: list[tuple[torch.Tensor, DTensorSpec | None, Any, Any]] = []
        """A tensor without one, how it is distributed, and the container and the key where the copy belongs."""

    def add(self, value: Any, before: Any) -> Any:
        """A value of a state, as it will be when all has run."""
        if isinstance(value, dict):
            old = before if isinstance(before, dict) else {}
            return self.fill({}, value.items(), old)
        if isinstance(value, list):
            old = dict(enumerate(before)) if isinstance(before, list) else {}
            return self.fill([None] * len(value), enumerate(value), old)
        return copying.deepcopy(value)

    def fill(self, container: Any, items: Any, before: dict[Any, Any]) -> Any:
        """A container of copies."""
        for key, value in items:
            old = before.get(key)
            if not isinstance(value, torch.Tensor):
                container[key] = self.add(value, old)
                continue
            local, spec = (value._local_tensor, value._spec) if isinstance(value, DTensor) else (value, None)
            container[key] = old
            if not (isinstance(old, torch.Tensor) and self.fits(local, spec, old)):
                self.made.append((local.detach(), spec, container, key))
        return container

    def fits(self, local: torch.Tensor, spec: DTensorSpec | None, old: torch.Tensor) -> bool:
        """Whether a copy of before can be that of a tensor now; it will be then."""
        memory, old_spec = (old._local_tensor, old._spec) if isinstance(old, DTensor) else (old, None)
        same = (memory.dtype, memory.shape, old_spec) == (local.dtype, local.shape, spec)
        if same:
            self.filled.append((local.detach(), memory))
        return same

    def run(self) -> None:
        """Copy all."""
        sources = [source for source, _ in self.filled]
        current().copy_([memory for _, memory in self.filled], sources, False, begun=[])
        sources = [source for source, *_ in self.made]
        copies = current().to(sources, {"device": torch.device("cpu")}, copy=True)
        for copy, (_, spec, container, key) in zip(copies, self.made, strict=True):
            container[key] = copy if spec is None else placed(copy, spec)
