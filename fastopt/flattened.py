"""The flat form of an optimizer's state dict that torch.distributed.checkpoint has for it, and the usual one."""

from collections.abc import Mapping
from typing import Any

from fastopt.containers import agree

STATE, GROUPS = "state.", "param_groups."


def is_flattened(value: Any) -> bool:
    """Whether a value looks like `get_optimizer_state_dict(…, flatten_optimizer_state_dict=True)`."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) and key.startswith((STATE, GROUPS)) for key in value)
        and any(key.startswith(GROUPS) for key in value)
    )


def unflattened(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that a flat one was made of; parameters are named, and have the order of the flat one.

    The flat form has `"state.NAME.KEY"`, of any depth, and `"param_groups.NAME.KEY"` for each parameter and
    hyperparameter, and does not say which parameters were in one group. Those that follow each other and have the same
    hyperparameters are; so two groups in a row that had the same ones are one, which the check of a load finds.

    Raises:
        KeyError: there is state of a parameter that has no hyperparameters.
    """
    hyperparameters: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key.startswith(GROUPS):
            name, _, option = key.removeprefix(GROUPS).rpartition(".")
            hyperparameters.setdefault(name, {})[option] = value
    groups: list[dict[str, Any]] = []
    for name, options in hyperparameters.items():
        if groups and agree({**groups[-1], "params": None}, {**options, "params": None}):
            groups[-1]["params"].append(name)
        else:
            groups.append({**options, "params": [name]})
    state: dict[str, Any] = {}
    for key, value in flat.items():
        if key.startswith(STATE):
            place(state, key.removeprefix(STATE), value, hyperparameters)
    return {"state": state, "param_groups": groups}


def place(state: dict[str, Any], path: str, value: Any, names: Mapping[str, Any]) -> None:
    """Put a value where the state of its parameter has it, in dicts as many as there are keys."""
    name, rest = path, ""
    while name not in names:
        name, _, key = name.rpartition(".")
        if not name:
            raise KeyError(f"there is state of {path!r}, and no param group has this parameter")
        rest = f"{key}.{rest}" if rest else key
    *outer, key = rest.split(".")
    entry = state.setdefault(name, {})
    for outer_key in outer:
        entry = entry.setdefault(outer_key, {})
    entry[key] = value
