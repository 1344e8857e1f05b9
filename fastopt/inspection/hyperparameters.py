"""Hyperparameters of saved groups that the optimizer's steps could not work with."""

import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.backends.interface import Group
from fastopt.errors import describe_tensor
from fastopt.inspection.problems import Problem
from fastopt.state_dict import OWN_KEYS

NO_NUMBERS = (str, bytes, list, tuple, dict, set)


def lacking_hyperparameters(index: int, group: Group, saved: Mapping[str, Any]) -> Iterator[Problem]:
    """Hyperparameters of the optimizer's group that the saved one has not; a step that reads one of them fails.

    Those that are off now may be younger than the file: `__setstate__` adds them, as off.
    """
    for key, value in group.items():
        if key not in saved and key not in OWN_KEYS and not (isinstance(value, bool) or is_off(value)):
            text = f"param group {index} has no {key!r}, which is {described(value)} in the optimizer"
            yield Problem("structure", text, key=key)


def unlike_hyperparameters(
    index: int, group: Group, saved: Mapping[str, Any], optional: Collection[str]
) -> Iterator[Problem]:
    """Hyperparameters of another kind than the optimizer's own: a str where that is a number, a pair of another length.

    `optional`: those that may be None.
    """
    for key, value in group.items():
        if key in saved and key not in OWN_KEYS and is_unlike(value, saved[key], key in optional):
            text = f"{key!r} of param group {index} is {described(saved[key])}, and {described(value)} in the optimizer"
            yield Problem("structure", text, key=key)


def optional_names(optimizer: Optimizer) -> set[str]:
    """Hyperparameters that the optimizer's constructor takes None for, as far as its defaults tell."""
    try:
        arguments = inspect.signature(type(optimizer)).parameters
    except (TypeError, ValueError):  # of a class that hides it
        arguments = inspect.Signature().parameters
    defaults = [(name, argument.default) for name, argument in arguments.items()]
    return {name for name, default in [*defaults, *optimizer.defaults.items()] if default is None}


def is_unlike(value: Any, saved: Any, is_optional: bool) -> bool:
    """Whether a saved hyperparameter is of a kind that cannot stand where the optimizer has `value`."""
    if isinstance(value, bool):
        return isinstance(saved, NO_NUMBERS)
    if isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        if saved is None:
            return not is_optional
        return isinstance(saved, NO_NUMBERS) or (isinstance(saved, torch.Tensor) and saved.numel() != 1)
    if isinstance(value, tuple):
        if not isinstance(saved, tuple | list):
            return saved is not None or not is_optional
        return len(saved) != len(value) or any(is_unlike(*items, True) for items in zip(value, saved, strict=True))
    return False


def same_switches(group: Group, saved: Mapping[str, Any]) -> bool:
    """Whether what is on in a group is on in the saved one, as far as both have it: `amsgrad`, a momentum."""
    return all(is_off(value) == is_off(saved[key]) for key, value in group.items() if key in saved)


def is_off(value: Any) -> bool:
    """Whether a hyperparameter asks for nothing: False, None, zero."""
    return value is None or (isinstance(value, int | float) and not value)


def nan_hyperparameters(saved_groups: Sequence[Any]) -> Iterator[Problem]:
    """Hyperparameters that are NaN."""
    for index, group in enumerate(saved_groups):
        for key, value in group.items() if isinstance(group, Mapping) else ():
            values = value if isinstance(value, list | tuple) and key not in OWN_KEYS else [value]
            if any(map(is_nan, values)):
                yield Problem("values", f"{key!r} of param group {index} is {value!r}", key=key)


def is_nan(value: Any) -> bool:
    """Whether a number, or a tensor of one element, is NaN."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_meta and value.is_floating_point() and math.isnan(value.item())
    return isinstance(value, float) and math.isnan(value)


def described(value: Any) -> str:
    """A hyperparameter in a line."""
    return describe_tensor(value) if isinstance(value, torch.Tensor) else f"{value!r:.80}"
