"""What of a folder is an optimizer's state, whichever form it was saved in, made that of an optimizer here."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.serialization import safe_globals

from fastopt.backends import current
from fastopt.containers import agree
from fastopt.distributed.boxes import boxes, read_boxes
from fastopt.distributed.names import names_of
from fastopt.distributed.targets import Stored
from fastopt.errors import NoStateDictError, describe_tensor
from fastopt.files.dcp_folder import read_places
from fastopt.files.dcp_metadata import Index, KeyPath, TensorEntry
from fastopt.files.dcp_tree import tree
from fastopt.files.torch_file import SafeGlobal
from fastopt.flattened import STATE, is_flattened, unflattened

Group = dict[str, Any]


class Saved(NamedTuple):
    """A state by the names or ids of parameters, whose tensors are `Stored`."""

    state: Mapping[Any, Any]
    groups: list[Group]


def saved_state(folder: Path, index: Index, key: str | None, allowed: Iterable[SafeGlobal]) -> Saved:
    """The state at a key of a checkpoint; values are read, tensors are not.

    Raises:
        NoStateDictError: there is none.
        UnsafeGlobalsError, CheckpointError: a value is not allowed, or damaged.
    """
    inner = {name: rest for name, path in index.paths.items() if (rest := within(path, key))}
    values = {name: index.entries[name] for name in inner if not isinstance(index.entries[name], TensorEntry)}
    with safe_globals(list(allowed)):
        found = read_places(folder, Index(values, {}))
    leaves: list[tuple[KeyPath, Any]] = []
    for name, path in inner.items():
        entry = index.entries[name]
        leaves.append((path, Stored(name, entry) if isinstance(entry, TensorEntry) else found[entry.place]))
    leaves = with_hyperparameters(folder, leaves)
    content: Any = tree(leaves)
    if is_flattened(content):
        content = unflattened(content)
    if not (isinstance(content, dict) and isinstance(content.get("param_groups"), list)):
        tops = sorted({str(path[0]) for path in index.paths.values() if "param_groups" in path})
        raise NoStateDictError(f"{folder} has no state dict" + ("" if key is None else f" at {key!r}"), tops)
    return Saved(content.get("state", {}), content["param_groups"])


def with_hyperparameters(folder: Path, leaves: list[tuple[KeyPath, Any]]) -> list[tuple[KeyPath, Any]]:
    """Leaves with those tensors read that are no parameter's state, as a tensor `lr`."""
    stored = {path: value for path, value in leaves if isinstance(value, Stored) and not is_state(path)}
    tensors = current().new_tensors([(one.entry.size, one.entry.dtype) for one in stored.values()])
    wanted = zip(stored.values(), tensors, strict=True)
    read_boxes(folder, (box for one, tensor in wanted for box in boxes(*one, [0] * tensor.dim(), tensor)))
    read = dict(zip(stored, tensors, strict=True))
    return [(path, read.get(path, value)) for path, value in leaves]


def is_state(path: KeyPath) -> bool:
    """Whether a path leads into the state of a parameter, in either form."""
    return path[0] == STATE.rstrip(".") or str(path[0]).startswith(STATE)


def within(path: KeyPath, key: str | None) -> KeyPath:
    """The rest of a path after a key of dicts, as `"optimizer"`; empty where it does not lie there."""
    if key is None:
        return path
    keys = tuple(key.split("."))
    return path[len(keys) :] if tuple(map(str, path[: len(keys)])) == keys else ()


def for_optimizer(saved: Saved, optimizer: Optimizer, model: torch.nn.Module) -> tuple[dict[str, Any], dict[int, Any]]:
    """A saved state as a state dict of an optimizer, and the parameters by the ids that they have in it.

    The state of other parameters than the optimizer's is left out.

    Raises:
        ValueError: a parameter of the optimizer is none of the model's or was not saved, or the hyperparameters of one
            of its groups were several.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = {saved_id: group for group in saved.groups for saved_id in group["params"]}
    ids = saved_ids(params, groups, model)
    state = {number: saved.state[saved_id] for number, saved_id in enumerate(ids) if saved_id in saved.state}
    empty = iter([group for group in saved.groups if not group["params"]])
    new_groups = []
    start = 0
    for position, group in enumerate(optimizer.param_groups):
        own = ids[start : start + len(group["params"])]
        options = common(position, [groups[saved_id] for saved_id in own], own) if own else next(empty, group)
        numbers = list(range(start, start + len(own)))
        new_groups.append({**options, "params": numbers})
        start += len(own)
    return {"state": state, "param_groups": new_groups}, dict(enumerate(params))


def saved_ids(params: list[torch.Tensor], saved: Mapping[Any, Group], model: torch.nn.Module) -> list[Any]:
    """The name or id under which each parameter was saved; ids count the parameters as here."""
    if saved and all(type(saved_id) is int for saved_id in saved):
        if len(saved) != len(params):
            raise ValueError(f"{len(saved)} parameters were saved by number, and the optimizer has {len(params)}")
        return list(saved)
    names = names_of(model)
    ids = []
    for number, param in enumerate(params):
        if param not in names:
            raise ValueError(f"parameter {number} of the optimizer ({describe_tensor(param)}) is none of the model's")
        name = next((name for name in names[param] if name in saved), None)
        if name is None:
            raise ValueError(f"parameter {names[param][0]!r} ({describe_tensor(param)}) was not saved")
        ids.append(name)
    return ids


def common(position: int, groups: list[Group], names: list[Any]) -> Group:
    """The hyperparameters of all parameters of a group."""
    first = groups[0]
    for group, name in zip(groups, names, strict=True):
        if group is not first and not agree({**first, "params": None}, {**group, "params": None}):
            differing = [key for key in first if key != "params" and not agree(first[key], group.get(key))]
            raise ValueError(
                f"param group {position} holds {names[0]!r} and {name!r}, which were saved with different "
                f"{', '.join(differing) or 'keys'}"
            )
    return first
