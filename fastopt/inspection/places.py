"""What stands where in a state dict: its parameters, and the values of their state."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from fastopt.backends.interface import Group
from fastopt.containers import is_leaf
from fastopt.errors import note_missing_keys
from fastopt.state_dict import StateDict, packed


def state_dict_of(state: Optimizer | StateDict) -> StateDict:
    """The state dict of an optimizer, as it is without hooks; or what was given, if it is one.

    Raises:
        KeyError: `"state"` or `"param_groups"` is missing.
    """
    if isinstance(state, Optimizer):
        return packed(state)
    if not isinstance(state, Mapping):
        kind = f"a {type(state).__name__}, neither an optimizer nor a state dict"
        if isinstance(state, str | os.PathLike):
            raise TypeError(f"{os.fspath(state)!r:.60} is {kind}; `fastopt inspect` reads files")
        raise TypeError(f"state is {kind}")
    for key in ("param_groups", "state"):
        if key not in state:
            error = KeyError(key)
            note_missing_keys(error, state)
            raise error
    return state


class Place(NamedTuple):
    """A value of the state of a parameter."""

    key: Any
    """The key of the parameter's state; None where the state is no dict."""
    path: str
    """The way to it, for people: `exp_avg`, `old_dirs[3]`."""
    value: Any
    """A tensor, or whatever else is no container, or an empty one."""
    is_nested: bool = False
    """Whether it stands deeper than under the key."""


def places(entry: Any) -> Iterator[Place]:
    """All values of the state of a parameter, at any depth."""
    if isinstance(entry, Mapping):
        for key, value in entry.items():
            if isinstance(value, Tensor):  # as nearly all are
                yield Place(key, str(key), value)
            else:
                yield from values_below(key, str(key), value)
    else:
        yield from values_below(None, "", entry)


def values_below(key: Any, path: str, value: Any, is_nested: bool = False) -> Iterator[Place]:
    """All values that stand below one, or itself where it is no container."""
    if is_whole(value):
        yield Place(key, path, value, is_nested)
    elif isinstance(value, Mapping):
        for inner, item in value.items():
            yield from values_below(key, f"{path}[{inner!r}]", item, True)
    else:
        for index, item in enumerate(value):
            yield from values_below(key, f"{path}[{index}]", item, True)


def is_whole(value: Any) -> bool:
    """Whether there is nothing to look at below a value; an iterator would be used up by looking."""
    if isinstance(value, Tensor) or is_leaf(value) or not isinstance(value, Iterable) or isinstance(value, Iterator):
        return True
    return isinstance(value, Sized) and len(value) == 0


def label(index: int, position: int, group: Group) -> str:
    """A parameter by its index among all and, where it is known, its name."""
    names = group.get("param_names")
    if isinstance(names, list | tuple) and position < len(names):
        return f"parameter {index} {names[position]!r}"
    return f"parameter {index}"
