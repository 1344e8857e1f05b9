"""How two states differ."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from fastopt.backends.interface import Group
from fastopt.casting import bytes_of
from fastopt.collector import paused_collector
from fastopt.containers import agree
from fastopt.errors import describe_tensor
from fastopt.inspection.places import Place, label, places, state_dict_of
from fastopt.inspection.values import Advance, difference, numbers, unwatched
from fastopt.state_dict import OWN_KEYS, StateDict
from fastopt.text import SHOWN, aligned, counted, dtype_name


@dataclass
class KeyDiff:
    """How the tensors under one key of the parameters' state differ."""

    tensors: int = 0
    """Pairs of tensors of one shape, whose values were compared."""
    same: int = 0
    """Those of one dtype, with the same values."""
    values: int = 0
    different: int = 0
    """Values that are not equal; NaNs are equal to one another."""
    dtypes: Counter[tuple[torch.dtype, torch.dtype]] = field(default_factory=Counter)
    """Tensors whose dtypes differ, by both."""
    absolute: float = 0.0
    """The largest |a - b| in float64; infinite where one of two different values is NaN or infinite."""
    relative: float = 0.0
    """The largest |a - b| / max(|a|, |b|), which is at most 2; infinite like `absolute`."""
    where: str = ""
    """The place of the largest `absolute`."""


@dataclass
class Diff:
    """What `diff` returns: true where the two differ. Prints as a few lines."""

    only_in_a: list[str] = field(default_factory=list)
    """Groups, parameters and places of the state that `b` has not."""
    only_in_b: list[str] = field(default_factory=list)
    """Groups, parameters and places of the state that `a` has not."""
    others: list[str] = field(default_factory=list)
    """Hyperparameters, shapes, and values that are no tensors or have no numbers to compare, where they differ."""
    keys: dict[Any, KeyDiff] = field(default_factory=dict)
    """The tensors, by key of the parameters' state."""

    def __bool__(self) -> bool:
        return bool(self.only_in_a or self.only_in_b or self.others) or any(
            seen.same < seen.tensors for seen in self.keys.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings and numbers."""
        keys = {}
        for key, seen in self.keys.items():
            dtypes = {f"{dtype_name(a)} {dtype_name(b)}": number for (a, b), number in seen.dtypes.items()}
            keys[str(key)] = {**vars(seen), "dtypes": dtypes}
        return {**vars(self), "keys": keys}

    def __str__(self) -> str:
        tensors = sum(seen.tensors for seen in self.keys.values())
        if not self:
            return f"no difference, {counted(tensors, 'tensor')} compared"
        lines = [f"different, {counted(tensors, 'tensor')} compared"]
        for title, places_ in {"only in a": self.only_in_a, "only in b": self.only_in_b, "": self.others}.items():
            lines += [f"  {title}: {text}" if title else f"  {text}" for text in places_[:SHOWN]]
            if len(places_) > SHOWN:
                lines.append(f"  and {len(places_) - SHOWN:,} more" + (f" {title}" if title else ""))
        rows = [row(key, seen) for key, seen in self.keys.items() if seen.same < seen.tensors]
        if rows:
            head = ["key", "tensors that differ", "values", "largest difference", "relative", "at", "dtypes"]
            lines += ["  " + line for line in aligned([head, *rows])]
        if any(math.isinf(seen.absolute) for seen in self.keys.values()):
            lines.append("  inf: one of the two values is NaN or infinite, and the other is not that")
        return "\n".join(lines)


def row(key: Any, seen: KeyDiff) -> list[str]:
    """A line of the table."""
    dtypes = ", ".join(f"{dtype_name(a)} and {dtype_name(b)}" for a, b in seen.dtypes)
    tensors = f"{seen.tensors - seen.same:,} of {seen.tensors:,}"
    values = f"{seen.different:,} of {seen.values:,}"
    return [str(key), tensors, values, f"{seen.absolute:.4g}", f"{seen.relative:.4g}", seen.where, dtypes]


def diff(a: Optimizer | StateDict, b: Optimizer | StateDict, *, advance: Advance | None = None) -> Diff:
    """Compare two states: their groups, and all values of their parameters' state.

    Parameters are compared by name where both states name all of theirs, else by index. Values are compared in
    float64, some megabytes at a time; the two may be of different dtypes and on different devices.

    Args:
        a: an optimizer, or a state dict. Not changed; no hooks run.
        b: the other one.
        advance: is called with the bytes of what was compared, of both, again and again.

    Returns:
        The differences; false where there are none.

    Raises:
        KeyError: `"state"`, `"param_groups"` or a group's `"params"` is missing.
        TypeError: one is neither an optimizer nor a dict.
    """
    with paused_collector(), torch.no_grad():
        dict_a, dict_b = state_dict_of(a), state_dict_of(b)
        by_name = names_all(dict_a["param_groups"]) and names_all(dict_b["param_groups"])
        result = Diff()
        compare_groups(result, dict_a["param_groups"], dict_b["param_groups"])
        compare_owners(result, owners(dict_a, by_name), owners(dict_b, by_name), advance or unwatched)
        return result


# ---- groups ----


def names_all(groups: Sequence[Group]) -> bool:
    """Whether each parameter has a name of its own."""
    names = [name for group in groups for name in group.get("param_names") or ()]
    return len(set(names)) == len(names) == sum(len(group["params"]) for group in groups)


def compare_groups(result: Diff, groups_a: Sequence[Group], groups_b: Sequence[Group]) -> None:
    """Compare the hyperparameters; parameters are compared one by one."""
    shared = min(len(groups_a), len(groups_b))
    result.only_in_a += [f"param group {index}" for index in range(shared, len(groups_a))]
    result.only_in_b += [f"param group {index}" for index in range(shared, len(groups_b))]
    for index, (a, b) in enumerate(zip(groups_a, groups_b, strict=False)):
        for key in dict.fromkeys(chain(a, b)):
            place = f"{key!r} of param group {index}"
            if key in OWN_KEYS:
                continue
            if key not in b:
                result.only_in_a.append(place)
            elif key not in a:
                result.only_in_b.append(place)
            elif not agree(a[key], b[key]):
                result.others.append(f"{place}: {a[key]!r} and {b[key]!r}")


# ---- state ----


class Owner(NamedTuple):
    """A parameter, or whatever else has an entry in the state."""

    label: str
    state: dict[tuple[Any, str], Place]
    """By key and path."""


def owners(state_dict: StateDict, by_name: bool) -> dict[Any, Owner]:
    """All parameters by name or index, and what else the state has entries for by its id."""
    state = state_dict["state"]
    found: dict[Any, Owner] = {}
    ids = set()
    for group in state_dict["param_groups"]:
        for position, saved_id in enumerate(group["params"]):
            index = len(found)
            owner = Owner(label(index, position, group), by_path(state.get(saved_id, {})))
            found[group["param_names"][position] if by_name else index] = owner
            ids.add(saved_id)
    for key, entry in state.items():
        if key not in ids:
            found["id", key] = Owner(f"id {key!r}", by_path(entry))
    return found


def by_path(entry: Any) -> dict[tuple[Any, str], Place]:
    """The values of an entry by where they stand."""
    return {(place.key, place.path): place for place in places(entry)}


def compare_owners(
    result: Diff, owners_a: Mapping[Any, Owner], owners_b: Mapping[Any, Owner], advance: Advance
) -> None:
    """Compare all state."""
    result.only_in_a += [owner.label for key, owner in owners_a.items() if key not in owners_b]
    result.only_in_b += [owner.label for key, owner in owners_b.items() if key not in owners_a]
    for key, a in owners_a.items():
        if (b := owners_b.get(key)) is None:
            continue
        result.only_in_a += [f"{place.path} of {a.label}" for path, place in a.state.items() if path not in b.state]
        result.only_in_b += [f"{place.path} of {b.label}" for path, place in b.state.items() if path not in a.state]
        for path, place in a.state.items():
            if path in b.state:
                other = b.state[path].value
                compare_values(result, f"{place.path} of {a.label}", place, other)
                advance(sum(bytes_of(value) for value in (place.value, other) if isinstance(value, torch.Tensor)))


def compare_values(result: Diff, where: str, place: Place, b: Any) -> None:
    """Compare two values of the same place."""
    a = place.value
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or not agree(a, b):
            result.others.append(f"{where}: {described(a)} and {described(b)}")
        return
    numbers_a, numbers_b = (numbers(value) if value.layout is torch.strided else None for value in (a, b))
    if a.shape != b.shape or numbers_a is None or numbers_b is None or numbers_a.shape != numbers_b.shape:
        if not same_without_numbers(a, b):
            result.others.append(f"{where}: {described(a)} and {described(b)}, not compared")
        return
    seen = difference(numbers_a, numbers_b)
    total = result.keys.setdefault(place.key, KeyDiff())
    total.tensors += 1
    total.same += a.dtype == b.dtype and not seen.different
    total.values += seen.values
    total.different += seen.different
    total.relative = max(total.relative, seen.relative)
    if a.dtype != b.dtype:
        total.dtypes[a.dtype, b.dtype] += 1
    if seen.different and (not total.where or seen.absolute > total.absolute):
        total.absolute, total.where = seen.absolute, where


def same_without_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same that cannot be compared number by number (sparse, quantized, without values)."""
    if a is b or (a.is_meta and b.is_meta and a.shape == b.shape and a.dtype == b.dtype):
        return True
    try:
        if a.layout is torch.sparse_coo and b.layout is torch.sparse_coo:
            a, b = a.coalesce(), b.coalesce()
            return a.shape == b.shape and torch.equal(a.indices(), b.indices()) and torch.equal(a.values(), b.values())
        return a.layout is b.layout and a.dtype == b.dtype and torch.equal(a, b)
    except (RuntimeError, TypeError):  # torch has no comparison for them either
        return False


def described(value: Any) -> str:
    """A value in a line."""
    return describe_tensor(value) if isinstance(value, torch.Tensor) else repr(value)
