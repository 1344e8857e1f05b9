"""Whether `torch.load(weights_only=True)` would read what is to be saved: fastopt writes nothing else.

Nearly all of a state is of a few types that it takes. For what is left, its own unpickler has the say, with storages
that have no memory; so it is with what the user has allowed by `torch.serialization.add_safe_globals`.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import _weights_only_unpickler

from fastopt.files.metadata import Path, place
from fastopt.files.torch_globals import unsafe_globals_in
from fastopt.files.torch_pickle import records_of

ATOMS = (type(None), bool, float, str)
TENSORS = (torch.Tensor, torch.nn.Parameter)

BITS = 255 * 8 - 1
"""Of the longest integer that torch's unpickler knows; longer ones have an opcode of their own."""


def check_readable(parts: Iterable[tuple[Path, Any]]) -> None:
    """Raise if `torch.load(weights_only=True)` would not read what `torch.save` makes of some values.

    Args:
        parts: values, each with the keys that lead to it.

    Raises:
        TypeError: it would not; the text says which value, and of what type.
        Exception: what `torch.save` raises for a value that it cannot save; a note says which.
    """
    rare = Rare()
    for path, value in parts:
        rare.look_at(value, path)
    if rare.found and is_refused([value for _, value in rare.found]):
        for where, value in rare.found:
            raise_if_refused(where, value)


class Rare:
    """Finds the values of which nobody knows that torch reads them."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Any]] = []
        """Each with the place where it stands, in words."""
        self.seen: set[int] = set()
        """Containers, of which one may hold itself."""

    def look_at(self, value: Any, path: Path) -> None:
        """Look at a value, and at what it holds."""
        if is_plain(value):
            return
        kind = type(value)
        if kind is dict or (kind is OrderedDict and not vars(value)):
            if self.is_new(value):
                for key, item in value.items():
                    if not is_plain(key):
                        self.found.append((f"the key {key!r:.100} of {place(path)}", key))
                    if not is_plain(item):
                        self.look_at(item, (*path, key))
        elif kind in (list, tuple):
            if self.is_new(value):
                for index, item in enumerate(value):
                    self.look_at(item, (*path, index))
        else:
            self.found.append((place(path), value))

    def is_new(self, container: Any) -> bool:
        """Whether this is the first time that a container stands somewhere."""
        known = id(container) in self.seen
        self.seen.add(id(container))
        return not known


def is_plain(value: Any) -> bool:
    """Whether torch reads a value, which is no container."""
    kind = type(value)
    if kind in ATOMS:
        return True
    if kind in TENSORS:
        return not value.__dict__  # attributes are pickled as well
    return kind is int and value.bit_length() <= BITS


def is_refused(values: list[Any]) -> bool:
    """Whether torch would not read some values, or cannot save them."""
    try:
        return refusal(pickled(values)) is not None
    except Exception:
        return True


def raise_if_refused(where: str, value: Any) -> None:
    """Raise if this is a value that torch would not read, or cannot save."""
    try:
        content = pickled(value)
    except Exception as error:
        error.add_note(f"at {where}")
        raise
    if (reason := refusal(content)) is not None:
        kind, names = type(value), unsafe_globals_in(content)
        why = f"it would name {', '.join(names)}" if names else reason
        raise TypeError(
            f"{where} is of type {kind.__module__}.{kind.__qualname__}, and torch.load(weights_only=True) would not "
            f"read the file: {why}; save another value, "
            "or allow these by torch.serialization.add_safe_globals, here and where the file is loaded"
        )


def pickled(value: Any) -> bytes:
    """The pickle in the file that `torch.save` makes of a value."""
    [content] = [data for name, data in records_of(value, {}) if name == "data.pkl"]
    assert isinstance(content, bytes)
    return content


def refusal(content: bytes) -> str | None:
    """Why torch would not read a pickle, if it would not."""
    validated = torch._utils._sparse_tensors_to_validate  # by the next load of this process
    count = len(validated)
    try:
        Unpickler(io.BytesIO(content), encoding="utf-8").load()  # type: ignore[no-untyped-call]
    except pickle.UnpicklingError as error:
        return str(error).partition("\n")[0]
    except Exception:  # a class that the user has allowed wants to have values
        return None
    finally:
        del validated[count:]
    return None


class Unpickler(_weights_only_unpickler.Unpickler):
    """Torch's own, for a pickle without its file."""

    def persistent_load(self, pid: Any) -> torch.storage.TypedStorage:
        """A storage, without memory."""
        _, kind, _, _, count = pid
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        storage = torch.UntypedStorage(count * dtype.itemsize, device="meta")  # type: ignore[no-untyped-call]
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]
