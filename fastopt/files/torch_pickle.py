"""The pickle that `torch.save` makes of a content, with the storages left for others to write.

torch's own pickler makes it. Two kinds of tensors get a stand-in for their storage: those that are cast on the way,
whose storage in the file there is nowhere in memory, and those of other devices, which torch would copy as a whole.
"""

import pickle
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.storage import TypedStorage, UntypedStorage

REBUILDS = (torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor_v3)
"""What tensors are rebuilt by whose first argument is their storage."""

PROTOCOL = torch.serialization.DEFAULT_PROTOCOL


class Stored(NamedTuple):
    """What a record holds that is no storage on the CPU yet: elements of a tensor in row-major order, as this dtype."""

    tensor: Tensor
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.tensor.numel() * self.dtype.itemsize

    def in_memory(self) -> UntypedStorage:
        """A storage on the CPU that holds this."""
        return self.tensor.detach().to("cpu", self.dtype).contiguous().untyped_storage()


Record = tuple[str, bytes | str | UntypedStorage | Stored]
"""Name and content."""


def records_of(content: Any, dtypes: Mapping[int, torch.dtype]) -> list[Record]:
    """The records of the file that `torch.save(content, …)` writes, in its order.

    Args:
        content: whatever torch can save.
        dtypes: the dtype that a tensor gets in the file, by its `id`, as if `tensor.to(dtype)` stood in its place; all
            others keep theirs. Tensors named here are strided ones of no subclass that have values.

    Raises:
        Exception: what `torch.save` raises for content that it cannot save.
    """
    kept = _Records()
    stand_ins: dict[int, _StandIn] = {}

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            if type(value) is not Tensor:
                return NotImplemented
            dtype = dtypes.get(id(value))
            if dtype is not None and dtype is not value.dtype:
                return reduced_as(value, dtype)
            return NotImplemented if value.device.type == "cpu" else reduced(value, stand_ins)

    pickling = SimpleNamespace(Pickler=Pickler)
    torch.serialization._save(content, kept, pickling, PROTOCOL, False)  # type: ignore[no-untyped-call]
    stand_ins.clear()  # the class outlives this call until the garbage collector finds it
    return kept.records


class _Records:
    """Takes the records that torch would write into a zip file."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write_record(self, name: str, data: Any, size: int) -> None:
        """Called by torch: bytes or text, or the storage of a tensor."""
        self.records.append((name, data.stored if isinstance(data, _StandIn) else data))


class _StandIn:
    """Stands for an `UntypedStorage`, with what torch asks of one while it saves."""

    def __init__(self, stored: Stored, device: torch.device, storage: UntypedStorage | None = None) -> None:
        self.stored = stored
        self.device = device
        self._cdata = id(self) if storage is None else storage._cdata
        self._address = 0 if storage is None else storage.data_ptr()

    def data_ptr(self) -> int:
        """Where it is in memory, by which torch finds storages that are viewed as two dtypes."""
        return self._address

    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stored.size

    def cpu(self) -> "_StandIn":
        """Nothing has to move before it is written."""
        return self


class _TypedStandIn(TypedStorage):
    """What a tensor's pickle names as its storage."""

    def __new__(cls, stand_in: _StandIn, dtype: torch.dtype) -> "_TypedStandIn":
        """Around a stand-in, which TypedStorage itself would not take."""
        self: _TypedStandIn = object.__new__(cls)
        self._untyped_storage, self.dtype = stand_in, dtype  # type: ignore[assignment]
        return self

    def __init__(self, *_: Any) -> None:
        pass


class _UntypedStandIn(_TypedStandIn):
    """The same for dtypes that have no typed storage in a pickle."""

    def __new__(cls, stand_in: _StandIn, _: torch.dtype) -> "_UntypedStandIn":
        """Its elements are bytes."""
        return super().__new__(cls, stand_in, torch.uint8)  # type: ignore[return-value]

    def _pickle_storage_type(self) -> str:
        return "UntypedStorage"


def reduced(tensor: Tensor, stand_ins: dict[int, _StandIn]) -> tuple[Any, ...]:
    """How torch pickles a tensor, with a stand-in for its storage; tensors that share one share the stand-in."""
    function, arguments = tensor.__reduce_ex__(PROTOCOL)  # type: ignore[no-untyped-call]
    if function not in REBUILDS:
        return function, arguments
    named, *rest = arguments
    storage: UntypedStorage = tensor.untyped_storage()
    if storage._cdata not in stand_ins:
        stand_ins[storage._cdata] = _StandIn(Stored(bytes_of(storage), torch.uint8), storage.device, storage)
    return function, (typed(named, stand_ins[storage._cdata], tensor.dtype), *rest)


def reduced_as(tensor: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """How torch pickles `tensor.to(dtype)`, which is never made."""
    model = torch.empty(0, dtype=dtype)
    function, (named, _, _, _, _, *rest) = model.__reduce_ex__(PROTOCOL)  # type: ignore[no-untyped-call]
    strides = torch.empty_like(tensor, dtype=dtype, device="meta").stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    stand_in = _StandIn(Stored(tensor.permute(order), dtype), tensor.device)
    view = (0, tuple(tensor.shape), strides, tensor.requires_grad)
    return function, (typed(named, stand_in, dtype), *view, *rest)


def typed(named: TypedStorage | UntypedStorage, stand_in: _StandIn, dtype: torch.dtype) -> _TypedStandIn:
    """A stand-in in place of the storage that torch names in a pickle."""
    return (_TypedStandIn if isinstance(named, TypedStorage) else _UntypedStandIn)(stand_in, dtype)


def bytes_of(storage: UntypedStorage) -> Tensor:
    """A storage as a tensor of its bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
