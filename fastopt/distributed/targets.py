"""Where the tensors of a saved state go: new ones beside a parameter, or those that an optimizer holds."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from fastopt.backends import current
from fastopt.distributed.boxes import Box, boxes
from fastopt.dtensors import Specs, placed
from fastopt.errors import describe_tensor
from fastopt.files.dcp_metadata import TensorEntry

KeyPath = tuple[Any, ...]


class Stored(NamedTuple):
    """A tensor of a folder, in place of the one that is to be read."""

    name: str
    entry: TensorEntry


class Slot(NamedTuple):
    """Where in a state a stored tensor stands."""

    container: Any
    """A dict or a list."""
    key: Any
    path: KeyPath
    """The keys that lead there within the parameter's state."""
    param: torch.Tensor

    @property
    def stored(self) -> Stored:
        """What stands there."""
        return self.container[self.key]  # type: ignore[no-any-return]


def slots(container: Any, param: torch.Tensor, path: KeyPath = ()) -> Iterator[Slot]:
    """All stored tensors in a parameter's state."""
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in items:
        if isinstance(value, Stored):
            yield Slot(container, key, (*path, key), param)
        elif isinstance(value, dict | list):
            yield from slots(value, param, (*path, key))


class Target(NamedTuple):
    """Memory of this rank's that is to be filled with its part of a stored tensor."""

    stored: Stored
    offsets: Sequence[int]
    """Where the part begins."""
    memory: torch.Tensor
    is_plain: bool
    """Whether it is all of a plain tensor, and no part of a DTensor."""

    def boxes(self) -> Iterator[Box]:
        """What is to be read into it."""
        return boxes(self.stored.name, self.stored.entry, self.offsets, self.memory)


class Local(NamedTuple):
    """The part of a tensor that is on this rank."""

    offsets: Sequence[int]
    sizes: Sequence[int]
    spec: DTensorSpec | None
    """How it is distributed; None for a plain tensor, which is all here."""


class Places:
    """The parts of parameters that are on this rank, found once for all tensors of a shape and placement."""

    def __init__(self) -> None:
        self.known: dict[Any, Local | None] = {}

    def local(self, param: torch.Tensor, entry: TensorEntry) -> Local | None:
        """The part of a state's tensor on this rank; None where there is none, outside of the parameter's mesh."""
        if not isinstance(param, DTensor) or entry.size != param.shape:
            return whole(entry)
        spec = param._spec
        key = id(spec.mesh), spec.placements, spec.shape, spec.stride
        if key not in self.known:
            chunks: list[ChunkStorageMetadata] = []
            if spec.mesh.get_coordinate() is not None:
                chunks = param.__create_chunk_list__()  # type: ignore[no-untyped-call]
            if len(chunks) > 1:
                raise ValueError(f"{describe_tensor(param)} is on this rank in {len(chunks)} parts")
            self.known[key] = Local(chunks[0].offsets, chunks[0].sizes, spec) if chunks else None
        return self.known[key]


def whole(entry: TensorEntry) -> Local:
    """All of a tensor."""
    return Local([0] * len(entry.size), entry.size, None)


def new_targets(found: Sequence[Slot]) -> list[Target]:
    """Put new tensors where stored ones stand; returns the memory of all.

    They have the dtype and device that `load_state_dict` would give them, `step` those of the file, so that it takes
    them over as they are.
    """
    places, spec_of = Places(), Specs()
    # A step is a plain tensor, though it has the shape of a parameter that is a number.
    locals_ = [
        whole(slot.stored.entry) if slot.path[-1] == "step" else places.local(slot.param, slot.stored.entry)
        for slot in found
    ]
    dtypes = [dtype_of(slot) for slot in found]
    specs = [
        ((0,) if local is None else tuple(local.sizes), dtype) for local, dtype in zip(locals_, dtypes, strict=True)
    ]
    is_elsewhere = [slot.path[-1] != "step" and slot.param.device.type != "cpu" for slot in found]
    here = iter(current().new_tensors([spec for spec, far in zip(specs, is_elsewhere, strict=True) if not far]))
    targets = []
    for slot, local, (sizes, dtype), far in zip(found, locals_, specs, is_elsewhere, strict=True):
        tensor = torch.empty(sizes, dtype=dtype, device=slot.param.device) if far else next(here)
        stored = slot.stored
        spec = None if local is None else local.spec
        is_plain = local is not None and spec is None
        targets.append(Target(stored, [0] if local is None else local.offsets, tensor, is_plain))
        slot.container[slot.key] = tensor if spec is None else placed(tensor, spec_of(spec, tensor.dtype))
    return targets


def dtype_of(slot: Slot) -> torch.dtype:
    """The dtype that a tensor gets."""
    saved = slot.stored.entry.dtype
    if slot.path[-1] == "step" or not slot.param.is_floating_point() or saved.is_complex:
        return saved
    return slot.param.dtype


def held_targets(found: Sequence[Slot], state: Any) -> list[Target]:
    """Put the tensors that an optimizer holds where stored ones stand; returns the memory of all.

    Args:
        found: the places.
        state: the optimizer's.

    Raises:
        ValueError: it holds no tensor of the shape in a tensor's place.
    """
    places = Places()
    targets = []
    for slot in found:
        stored, held = slot.stored, state.get(slot.param)
        for key in slot.path:
            held = held[key] if isinstance(held, dict) and key in held else None
        if not isinstance(held, torch.Tensor) or held.shape != stored.entry.size:
            what = describe_tensor(held) if isinstance(held, torch.Tensor) else "no tensor"
            raise ValueError(
                f"entry {stored.name!r}, {list(stored.entry.size)}: the optimizer holds {what} in its place; "
                "inplace=False makes new ones"
            )
        if (local := places.local(held, stored.entry)) is not None:
            memory = held._local_tensor if isinstance(held, DTensor) else held
            targets.append(Target(stored, local.offsets, memory.detach(), local.spec is None))
        slot.container[slot.key] = held
    return targets
