"""What the state of an optimizer holds."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.casting import bytes_of
from fastopt.collector import paused_collector
from fastopt.errors import check_bools
from fastopt.inspection.places import places, state_dict_of
from fastopt.inspection.values import Advance, ValueRange, numbers, total_range, unwatched
from fastopt.state_dict import OWN_KEYS, StateDict
from fastopt.text import SHOWN, aligned, counted, dtype_name, listed, size

SHAPES_SHOWN = 2
"""Shapes of a key that are printed, those of most tensors."""


@dataclass
class GroupSummary:
    """A param group."""

    parameters: int
    hyperparameters: dict[str, Any]


@dataclass
class KeySummary:
    """What stands under one key of the parameters' state, at any depth."""

    tensors: int = 0
    values: int = 0
    """Elements of the tensors."""
    bytes: int = 0
    dtypes: Counter[torch.dtype] = field(default_factory=Counter)
    """Tensors of each dtype."""
    shapes: Counter[torch.Size] = field(default_factory=Counter)
    """Tensors of each shape."""
    devices: Counter[torch.device] = field(default_factory=Counter)
    """Tensors on each device."""
    others: Counter[str] = field(default_factory=Counter)
    """Values that are no tensors, by type."""
    range: ValueRange | None = None
    """The smallest and the largest finite value, and how many are not finite; None where that was not asked."""


@dataclass
class Summary:
    """What `summary` returns. Prints as a table."""

    groups: list[GroupSummary] = field(default_factory=list)
    keys: dict[Any, KeySummary] = field(default_factory=dict)
    """By key of the parameters' state; None for state that is no dict."""
    with_state: int = 0
    """Parameters that have state, or what else the state holds an entry for."""

    @property
    def parameters(self) -> int:
        """Parameters of all groups."""
        return sum(group.parameters for group in self.groups)

    @property
    def tensors(self) -> int:
        """Tensors of the state."""
        return sum(key.tensors for key in self.keys.values())

    @property
    def bytes(self) -> int:
        """Bytes of the tensors; what is in two places counts twice."""
        return sum(key.bytes for key in self.keys.values())

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings and numbers; hyperparameters are as they are."""
        return {
            "parameters": self.parameters,
            "with_state": self.with_state,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "groups": [vars(group).copy() for group in self.groups],
            "keys": {str(key): key_to_dict(seen) for key, seen in self.keys.items()},
        }

    def __str__(self) -> str:
        lines = [
            f"{counted(self.parameters, 'parameter')} in {counted(len(self.groups), 'group')}, "
            f"{self.with_state:,} with state: {counted(self.tensors, 'tensor')}, {size(self.bytes)}"
        ]
        for index, group in enumerate(self.groups[:SHOWN]):
            settings = [f"{key}={value!r}" for key, value in group.hyperparameters.items() if is_on(value)]
            lines.append(f"  group {index}: {', '.join([counted(group.parameters, 'parameter'), *settings])}")
        if len(self.groups) > SHOWN:
            lines.append(f"  and {len(self.groups) - SHOWN:,} more groups")
        if self.keys:
            head = ["key", "tensors", "values", "bytes", "dtypes", "shapes", "devices"]
            if any(seen.range for seen in self.keys.values()):
                head += ["min", "max", "NaN", "inf"]
            lines += ["  " + line for line in aligned([head, *(row(key, seen) for key, seen in self.keys.items())])]
        return "\n".join(lines)


def summary(state: Optimizer | StateDict, *, values: bool = False, advance: Advance | None = None) -> Summary:
    """Describe the state of an optimizer: its groups, and what stands under each key.

    Args:
        state: an optimizer, or a state dict. Not changed; no hooks run.
        values: whether to look at the values as well, for the smallest and largest ones, NaNs and infinities. Reads
            all of the state once, at the memory's speed.
        advance: is called with the bytes of the values that were looked at, again and again.

    Raises:
        KeyError: `"state"`, `"param_groups"` or a group's `"params"` is missing.
        TypeError: it is neither an optimizer nor a dict.
    """
    check_bools(values=values)
    with paused_collector(), torch.no_grad():
        state_dict = state_dict_of(state)
        result = Summary([summarized_group(group) for group in state_dict["param_groups"]])
        result.with_state = sum(not is_empty(entry) for entry in state_dict["state"].values())
        readable: dict[Any, list[torch.Tensor]] = defaultdict(list)
        for entry in state_dict["state"].values():
            for place in places(entry):
                count(result.keys.setdefault(place.key, KeySummary()), place.value)
                if values and isinstance(place.value, torch.Tensor) and (found := numbers(place.value)) is not None:
                    readable[place.key].append(found)
        for key, tensors in readable.items():
            result.keys[key].range = total_range(tensors, advance or unwatched)
        return result


def is_empty(entry: Any) -> bool:
    """Whether a parameter has no state: torch makes an entry for it all the same when somebody asks for one."""
    return isinstance(entry, Mapping) and not entry


def summarized_group(group: Mapping[str, Any]) -> GroupSummary:
    """A group without its parameters."""
    hyperparameters = {key: value for key, value in group.items() if key not in OWN_KEYS}
    return GroupSummary(len(group["params"]), hyperparameters)


def count(seen: KeySummary, value: Any) -> None:
    """Add one value to what stands under its key."""
    if not isinstance(value, torch.Tensor):
        seen.others[type(value).__name__] += 1
        return
    seen.tensors += 1
    seen.values += value.numel()
    seen.bytes += bytes_of(value)
    seen.dtypes[value.dtype] += 1
    if not value.is_nested:
        seen.shapes[value.shape] += 1
    seen.devices[value.device] += 1


def key_to_dict(seen: KeySummary) -> dict[str, Any]:
    """What stands under a key, as strings and numbers."""
    counters = {
        "dtypes": {dtype_name(dtype): number for dtype, number in seen.dtypes.items()},
        "shapes": [{"shape": list(shape), "tensors": number} for shape, number in seen.shapes.most_common()],
        "devices": {str(device): number for device, number in seen.devices.items()},
        "others": dict(seen.others),
        "range": vars(seen.range).copy() if seen.range else None,
    }
    return {**vars(seen), **counters}


def row(key: Any, seen: KeySummary) -> list[str]:
    """A line of the table."""
    dtypes = [*map(dtype_name, seen.dtypes), *seen.others]
    cells = [str(key), f"{seen.tensors:,}", f"{seen.values:,}", size(seen.bytes), ", ".join(dtypes)]
    common = [shape_name(shape) for shape, _ in seen.shapes.most_common(SHAPES_SHOWN)]
    cells.append(listed(common, len(seen.shapes)))
    cells.append(", ".join(map(str, seen.devices)))
    if seen.range:
        cells += [f"{seen.range.minimum:.4g}", f"{seen.range.maximum:.4g}", f"{seen.range.nan:,}"]
        cells.append(f"{seen.range.inf:,}")
    return cells


def shape_name(shape: torch.Size) -> str:
    """`64x32`; `scalar` without dimensions."""
    return "x".join(map(str, shape)) or "scalar"


def is_on(value: Any) -> bool:
    """Whether a hyperparameter says anything: not None, nor False."""
    return value is not None and value is not False
