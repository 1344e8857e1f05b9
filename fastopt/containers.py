"""Containers of a state, and what in them is taken as it is."""

import collections
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch


def is_leaf(value: Any) -> bool:
    """Whether a value is taken as it is although one could iterate over it.

    torch rebuilds these from their items as well, which turns a str into the text of a generator and raises for a range
    and a numpy array.
    """
    numpy = sys.modules.get("numpy")
    return isinstance(value, str | bytes | range) or (numpy is not None and isinstance(value, numpy.ndarray))


def rebuilt(value: Iterable[Any], items: Iterator[Any]) -> Any:
    """A container of the same type around other items."""
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(items)
    if isinstance(value, collections.deque):
        return type(value)(items, value.maxlen)
    return type(value)(items)  # type: ignore[call-arg]


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in the order of their containers; those of a set, which has none, are left out."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, Iterable) and not (isinstance(value, Set) or is_leaf(value)):
        for item in value:
            yield from tensors_of(item)


def agree(one: Any, other: Any) -> bool:
    """Whether two values are the same; NaNs are, and values that cannot be compared are not."""
    if one is other:
        return True
    try:
        if isinstance(one, list | tuple):
            return type(one) is type(other) and len(one) == len(other) and all(map(agree, one, other))
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(agree(value, other[key]) for key, value in one.items())
        equal = one == other
        if hasattr(equal, "shape"):  # tensors and arrays compare item by item, and broadcast
            return bool(one.shape == other.shape and equal.all())
        return bool(equal) or bool(one != one and other != other)
    except Exception:
        return False
