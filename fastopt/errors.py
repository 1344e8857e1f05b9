"""How errors name their culprit.

What torch raises stays torch's, type and text; fastopt adds a note (PEP 678) that says which parameter, key, dtype and
shape it was about. Tracebacks show it, and programs find it in `error.__notes__`.
"""

import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer


class OverlapError(ValueError):
    """Two entries of one batch share memory, and at least one of them would be written."""

    def __init__(self, text: str, *entries: int) -> None:
        super().__init__(text)
        self.entries = entries


class BackgroundSaveError(RuntimeError):
    """An earlier save in the background failed, and nobody asked its Future. The cause is what went wrong."""


class CheckpointError(ValueError):
    """What was read is no checkpoint, or a damaged one; the text names the file and the entry."""


class NoChecksumsError(CheckpointError):
    """A checkpoint was to be verified, and has no checksums."""


class UnsafeGlobalsError(pickle.UnpicklingError):
    """A checkpoint names classes or functions that are not imported unless the caller allows them."""

    def __init__(self, where: str, names: Sequence[str]) -> None:
        super().__init__(where, names)
        self.where = where
        """The file, and the entry of it."""
        self.names = names
        """All of them, as `module.name`."""

    def __str__(self) -> str:
        return f"{self.what}; if you trust them, pass them as safe_globals=[...]"

    @property
    def what(self) -> str:
        """What is wrong, without what to do about it."""
        return f"{self.where} names {', '.join(self.names)}, which loading a checkpoint does not import"


class NoStateDictError(KeyError):
    """There is no state dict where one was looked for in a checkpoint."""

    def __init__(self, what: str, candidates: Sequence[str]) -> None:
        super().__init__(what, candidates)
        self.what = what
        """What is wrong, without what to do about it."""
        self.candidates = candidates
        """Keys at which there are some."""

    def __str__(self) -> str:
        return f"{self.what}; pass key={' or '.join(map(repr, self.candidates))}" if self.candidates else self.what


def describe_tensor(tensor: torch.Tensor) -> str:
    """Dtype, shape and device, for an error: `float32 [3, 4] on cpu`."""
    try:
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
    except Exception:  # a subclass or a mode that refuses even this must not hide the error being described
        return f"a {type(tensor).__name__}"


def check_bools(**options: Any) -> None:
    """Raise a TypeError for an option that is no bool: `"no"` is true."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: {value!r} is {_kind(value)}, not a bool")


@contextmanager
def optimizer_noted(optimizer: Any) -> Iterator[None]:
    """Add to an error within the block that the optimizer is none, where it is none."""
    try:
        yield
    except Exception as error:
        note_wrong_optimizer(error, optimizer)
        raise


def note_wrong_optimizer(error: Exception, optimizer: Any) -> None:
    """Add to an error that the optimizer is none, where it is none."""
    if not isinstance(optimizer, Optimizer):
        error.add_note(f"optimizer is {_kind(optimizer)}, not a torch.optim.Optimizer")


def note_wrong_arguments(error: Exception, optimizer: Any, state_dict: Any) -> None:
    """Add to an error of `load_state_dict` what is wrong with its arguments, if anything is."""
    note_wrong_optimizer(error, optimizer)
    if not isinstance(state_dict, Mapping):
        file_first = "; load the file first, e.g. torch.load(path, weights_only=True)"
        hint = file_first if isinstance(state_dict, str | os.PathLike) else ""
        error.add_note(f"state_dict is {_kind(state_dict)}, not a dict{hint}")
    else:
        note_missing_keys(error, state_dict)
        for key, kind, name in (("state", Mapping, "dict"), ("param_groups", (list, tuple), "list")):
            if key in state_dict and not isinstance(state_dict[key], kind):
                error.add_note(f"{key!r} is {_kind(state_dict[key])}, not a {name}")


def note_missing_keys(error: Exception, state_dict: Mapping[Any, Any]) -> None:
    """Add to a KeyError what a dict is that is no optimizer's state dict."""
    if not isinstance(error, KeyError) or ("state" in state_dict and "param_groups" in state_dict):
        return
    if not state_dict:
        error.add_note("the dict is empty, as one is that was given away to a load (donate=True)")
        return
    keys = list(map(repr, state_dict))
    inner = [key for key, value in state_dict.items() if isinstance(value, Mapping) and "param_groups" in value]
    hint = "".join(f"; an optimizer's state dict is at {key!r}" for key in inner)
    error.add_note(f"the dict holds {', '.join(keys[:8])}{' and more' if len(keys) > 8 else ''}{hint}")


def note_odd_entries(
    error: Exception, state: Mapping[Any, Any], params: Mapping[Any, torch.Tensor], groups: Iterable[Mapping[str, Any]]
) -> None:
    """Add to an error of the optimizer's own, which names no parameter, the first one whose state it cannot have liked.

    Args:
        error: what `__setstate__` has raised.
        state: the loaded state.
        params: the parameters by the ids they were saved under.
        groups: the optimizer's groups.
    """
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    lacks_key = isinstance(key, str) and any(isinstance(entry, Mapping) and key in entry for entry in state.values())
    for saved_id, param in params.items():
        entry = state.get(param, {})
        if not isinstance(entry, Mapping):
            odd = describe_tensor(entry) if isinstance(entry, torch.Tensor) else _kind(entry)
            found = f"is {odd}, not a dict"
        elif lacks_key and entry and key not in entry:
            found = f"has no {key!r}"
        else:
            continue
        error.add_note(f"the state of {describe_parameter(param, saved_id, groups)}, {found}")
        return


def _kind(value: Any) -> str:
    name = "None" if value is None else type(value).__name__
    article = "" if value is None else "an " if name[0] in "AEIOUaeiou" else "a "
    return article + name


def describe_parameter(param: torch.Tensor, saved_id: Any, groups: Iterable[Mapping[str, Any]]) -> str:
    """Index, name where it is known, dtype, shape and device of a parameter, and the id it was saved under."""
    index = 0
    for group in groups:
        for position, candidate in enumerate(group["params"]):
            if candidate is param:
                names = group.get("param_names")
                name = f" {names[position]!r}" if names and position < len(names) else ""
                return f"parameter {index}{name} ({describe_tensor(param)}), saved under id {saved_id!r}"
            index += 1
    return f"the parameter saved under id {saved_id!r}"
