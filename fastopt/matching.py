"""A saved state for an optimizer whose parameters stand in other places by now, found by their names."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from numbers import Integral
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.optim import Optimizer

from fastopt.backends.interface import Group
from fastopt.collector import paused_collector
from fastopt.containers import agree
from fastopt.errors import check_bools, describe_tensor, note_wrong_arguments
from fastopt.inspection.problems import Param, Row, tensor_rows
from fastopt.inspection.shapes import misshapen
from fastopt.state_dict import OWN_KEYS, StateDict, pack_group
from fastopt.text import some

Rename = Mapping[str, str] | Callable[[str], str] | Sequence[tuple[str | re.Pattern[str], str]]
NamedParameters = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]

Key = TypeVar("Key")
Value = TypeVar("Value")


class Saved(NamedTuple):
    """A parameter of the saved dict."""

    name: str
    id: Any
    group: int


@dataclass
class MatchReport:
    """What did not fit in a `match`, for one with `strict=False`. Prints as a few lines."""

    missing: list[str] = field(default_factory=list)
    """Names of the optimizer's parameters that were not saved; they keep the state that they have."""
    unexpected: list[str] = field(default_factory=list)
    """Saved names of parameters that the optimizer has not; their state is dropped."""
    misshapen: list[str] = field(default_factory=list)
    """Names of parameters whose saved state is of another shape; they keep the state that they have."""
    others: list[str] = field(default_factory=list)
    """Hyperparameters that disagree, and whatever else did not fit."""

    def __str__(self) -> str:
        lines = [
            f"{what}: {some(names)}"
            for what, names in {
                "not saved, present state kept": self.missing,
                "not in the optimizer, dropped": self.unexpected,
                "saved in another shape, present state kept": self.misshapen,
            }.items()
            if names
        ]
        return "\n".join([*lines, *self.others]) or "everything fits"


def match(
    state_dict: StateDict | Optimizer,
    optimizer: Optimizer | StateDict,
    *,
    by: str = "name",
    rename: Rename | None = None,
    strict: bool = True,
    named_parameters: NamedParameters | None = None,
    report: MatchReport | None = None,
) -> StateDict:
    """Make a saved state dict fit an optimizer whose parameters were reordered, regrouped, added, removed or renamed.

    The result has the optimizer's groups, and numbers the parameters as its own state dict would: `load_state_dict`
    takes it, torch's and fastopt's. As a pre-hook of loading, which gets the two in the other order, it takes them so
    too: `optimizer.register_load_state_dict_pre_hook(fastopt.match)`, or a `functools.partial` of it with options.

    Hyperparameters: a group takes each one from the saved groups of its matched parameters, where those agree. Where
    they differ, or some of them lack it, that is a problem; without `strict` the group keeps its present value. A group
    none of whose parameters was saved keeps all of its hyperparameters.

    Args:
        state_dict: a state dict with the names of its parameters: `"param_names"` in each group, as torch writes them
            for an optimizer built from named parameters, or ids that are names themselves. Not changed.
        optimizer: the optimizer to fit. Not changed.
        by: what to match by; `"name"`, and nothing else so far.
        rename: new names for the saved ones: a dict, a function, or pairs of a regular expression and a replacement,
            applied in their order by `re.sub`, as `[(r"^module\\.", "")]`.
        strict: whether a problem is an error: a parameter that only one side has, state that is shaped unlike its
            parameter where it should not be (as `check` judges it), hyperparameters that disagree, state under an int
            that is the id of no saved parameter, a key of the dict `rename` that is no saved name. If not, a parameter
            that was not saved, or in another shape, keeps the state that it has now, and what has no place is dropped.
        named_parameters: the names of the optimizer's parameters, as `model.named_parameters()` gives them; others may
            be among them. None: the `"param_names"` of the optimizer's groups.
        report: is filled with what did not fit, names and texts, for `strict=False`.

    Returns:
        A new dict. The state of each parameter is the same object as in `state_dict` or, where it was not saved, in the
        optimizer; no tensor is copied. A saved parameter without state has none. State under a key that is no int and
        belongs to no group is kept, and so are other entries of `state_dict`.

    Raises:
        ValueError: with `strict`, the dict does not fit; the text lists every problem.
        ValueError: a side has no names, or a name or a parameter stands twice, or `rename` makes two names one.
        ValueError: `by` is not `"name"`.
        TypeError: `rename` is no dict, no function and no sequence of pairs, or makes something else than a str; or
            `named_parameters` are no names with parameters, but a model, or its parameters.
        re.error: a regular expression of `rename` is none; a note names the pair.
        KeyError: `"state"`, `"param_groups"` or a group's `"params"` is missing.
    """
    if by != "name":
        raise ValueError(f"match: by={by!r}; parameters are matched by 'name'")
    check_bools(strict=strict)
    if isinstance(state_dict, Optimizer):
        state_dict, optimizer = cast(StateDict, optimizer), state_dict
    optimizer = cast(Optimizer, optimizer)
    try:
        with paused_collector():
            result, found, problems = matched(state_dict, optimizer, rename, named_parameters)
    except Exception as error:
        note_wrong_arguments(error, optimizer, state_dict)
        raise
    if report is not None:
        vars(report).update(vars(found))
    if strict and problems:
        heading = "match: the state dict does not fit the optimizer (strict=False takes what fits):"
        raise ValueError("\n  ".join([heading, *problems]))
    return result


def matched(
    state_dict: StateDict, optimizer: Optimizer, rename: Rename | None, named_parameters: NamedParameters | None
) -> tuple[StateDict, MatchReport, list[str]]:
    """The state dict that fits as far as it can, what does not fit, and the same as texts that list all of it."""
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if not isinstance(state_dict["state"], Mapping):
        raise TypeError(f"match: 'state' is a {type(state_dict['state']).__name__}, not a dict")
    names = names_in_optimizer(groups, named_parameters)
    saved = list(saved_parameters(saved_groups))
    by_name = renamed(saved, rename)
    state, unclaimed = renumbered(state_dict["state"], optimizer, names, saved, by_name)
    odd = kept_for_shape(state, optimizer, names, by_name)
    new_groups, disagreements = regrouped(saved_groups, groups, names, by_name)
    result = {**state_dict, "state": state, "param_groups": new_groups}

    wanted = set(chain.from_iterable(names))
    missing = [name for name in chain.from_iterable(names) if name not in by_name]
    unexpected = [name for name in by_name if name not in wanted]
    others = [*unclaimed, *disagreements, *unused_renames(saved, rename)]
    report = MatchReport(missing, [by_name[name].name for name in unexpected], list(odd), others)
    return result, report, [*differences(missing, unexpected, by_name), *misfits(odd), *others]


# ---- names ----


def names_in_optimizer(groups: Sequence[Group], named_parameters: NamedParameters | None) -> list[list[str]]:
    """The names of the optimizer's parameters, by group."""
    if named_parameters is None:
        names = [present_names(index, group) for index, group in enumerate(groups)]
    else:
        names = given_names(groups, named_parameters)
    check_unique("the optimizer", list(chain.from_iterable(names)), [p for group in groups for p in group["params"]])
    return names


def present_names(index: int, group: Group) -> list[str]:
    """The names that the optimizer was built with."""
    params = group["params"]
    if params and "param_names" not in group:
        raise ValueError(
            f"match: param group {index} of the optimizer has no names; "
            "pass named_parameters=model.named_parameters(), or build the optimizer from those"
        )
    return parallel(group.get("param_names", []), params, f"param group {index} of the optimizer")


def given_names(groups: Sequence[Group], named_parameters: NamedParameters) -> list[list[str]]:
    """The names that the optimizer's parameters have among those given."""
    pairs = list(named_pairs(named_parameters))
    check_unique("named_parameters", [name for name, _ in pairs], [param for _, param in pairs])
    name_of = {param: name for name, param in pairs}
    nameless = [
        f"parameter {position} of param group {index} ({describe_tensor(param)})"
        for index, group in enumerate(groups)
        for position, param in enumerate(group["params"])
        if param not in name_of
    ]
    if nameless:
        raise ValueError(f"match: named_parameters has no name for the optimizer's {', '.join(nameless)}")
    return [[name_of[param] for param in group["params"]] for group in groups]


def named_pairs(named_parameters: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and parameters, as they were given."""
    pass_these = "pass model.named_parameters()"
    if isinstance(named_parameters, torch.nn.Module) or not isinstance(named_parameters, Iterable):
        raise TypeError(f"match: named_parameters is a {type(named_parameters).__name__}; {pass_these}")
    for pair in named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            kind = type(pair).__name__
            raise TypeError(f"match: named_parameters holds a {kind} that is no pair (name, parameter); {pass_these}")
        yield pair[0], pair[1]


def saved_parameters(saved_groups: Sequence[Group]) -> Iterator[Saved]:
    """All saved parameters in their order."""
    for index, group in enumerate(saved_groups):
        ids = group["params"]
        for name, saved_id in zip(saved_names(index, group), ids, strict=True):
            yield Saved(name, saved_id, index)


def saved_names(index: int, group: Group) -> Sequence[str]:
    """The names in a saved group."""
    ids: Sequence[Any] = group["params"]
    if "param_names" in group:
        return parallel(group["param_names"], ids, f"saved param group {index}")
    if not all(isinstance(saved_id, str) for saved_id in ids):
        raise ValueError(
            f"match: saved param group {index} has no names, as it was saved by an optimizer built from unnamed "
            "parameters; build the optimizer from model.named_parameters() before saving, or put the names of its "
            f'parameters, in their order, into state_dict["param_groups"][{index}]["param_names"]'
        )
    return ids


def parallel(names: list[str], params: Sequence[Any], place: str) -> list[str]:
    """The names, if there are as many as parameters."""
    if len(names) != len(params):
        raise ValueError(f"match: {place} has {len(params)} params, but {len(names)} param_names")
    return names


def renamed(saved: Sequence[Saved], rename: Rename | None) -> dict[str, Saved]:
    """The saved parameters by their new names."""
    names = [one.name for one in saved]
    check_unique("the saved groups", names, [one.id for one in saved])
    new_names = list(new_names_of(names, renaming(rename)))
    if clash := first_clash(new_names, names):
        raise ValueError("match: rename makes {!r} of both {!r} and {!r}".format(*clash))
    return dict(zip(new_names, saved, strict=True))


def new_names_of(names: Iterable[str], new_name_of: Callable[[str], str]) -> Iterator[str]:
    """The new name of each; errors say which was the old one."""
    for name in names:
        try:
            new_name = new_name_of(name)
        except Exception as error:
            error.add_note(f"match: while renaming {name!r}")
            raise
        if not isinstance(new_name, str):
            raise TypeError(f"match: rename makes {new_name!r} of {name!r}, which is no str")
        yield new_name


def renaming(rename: Rename | None) -> Callable[[str], str]:
    """The function from saved to new names."""
    if rename is None:
        return str
    if isinstance(rename, Mapping):
        return lambda name: rename.get(name, name)
    if callable(rename):
        return rename
    if not isinstance(rename, Iterable) or isinstance(rename, str) or any(isinstance(pair, str) for pair in rename):
        raise TypeError(
            f"match: rename={rename!r} is no sequence of pairs (regular expression, replacement), dict or function"
        )
    patterns = list(map(compiled, rename))

    def substituted(name: str) -> str:
        for pattern, replacement in patterns:
            try:
                name = pattern.sub(replacement, name)
            except re.error as error:
                error.add_note(f"match: in the pair {(pattern.pattern, replacement)!r} of rename")
                raise
        return name

    return substituted


def compiled(pair: Any) -> tuple[re.Pattern[str], str]:
    """A pair of `rename`, ready for use."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"match: {pair!r} in rename is no pair (regular expression, replacement)")
    try:
        return re.compile(pair[0]), pair[1]
    except (re.error, TypeError) as error:
        error.add_note(f"match: in the pair {tuple(pair)!r} of rename")
        raise


def check_unique(place: str, names: Sequence[str], params: Sequence[Any]) -> None:
    """Raise a ValueError where a name stands twice, or a parameter (or the id of one)."""
    if clash := first_clash(names, names):
        raise ValueError(f"match: the name {clash[0]!r} stands twice in {place}")
    if clash := first_clash(params, names):
        raise ValueError("match: one parameter stands twice in {}: as {!r} and {!r}".format(place, *clash[1:]))


def first_clash(keys: Sequence[Key], labels: Sequence[Value]) -> tuple[Key, Value, Value] | None:
    """The first key that stands twice, and the labels of both places."""
    if len(set(keys)) < len(keys):
        seen: dict[Key, Value] = {}
        for key, label in zip(keys, labels, strict=True):
            if key in seen:
                return key, seen[key], label
            seen[key] = label
    return None


# ---- state and groups ----


def renumbered(
    saved_state: Mapping[Any, Any],
    optimizer: Optimizer,
    names: list[list[str]],
    saved: Sequence[Saved],
    by_name: Mapping[str, Saved],
) -> tuple[dict[Any, Any], list[str]]:
    """The state by new index, and what in the saved one belongs to no parameter and cannot stay."""
    state: dict[Any, Any] = {}
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, (name, param) in enumerate(zip(chain.from_iterable(names), params, strict=True)):
        origin = by_name.get(name)
        if origin is None:
            if param in optimizer.state:
                state[index] = optimizer.state[param]
        elif origin.id in saved_state:
            state[index] = saved_state[origin.id]

    ids = {one.id for one in saved}
    unclaimed = [key for key in saved_state if key not in ids]
    state.update((key, saved_state[key]) for key in unclaimed if not isinstance(key, Integral))
    unexpected = [key for key in unclaimed if isinstance(key, Integral)]  # one may be a parameter's index by now
    return state, [f"state under ids that stand in no saved group: {listed(unexpected)}"] if unexpected else []


def kept_for_shape(
    state: dict[Any, Any], optimizer: Optimizer, names: list[list[str]], by_name: Mapping[str, Saved]
) -> dict[str, list[Row]]:
    """Give parameters whose saved state is shaped unlike them the state that they have; that saved state, by name."""
    everyone = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    named = enumerate(zip(chain.from_iterable(names), everyone, strict=True))
    params = {i: Param(param, name) for i, (name, param) in named if name in by_name and i in state}
    odd: dict[str, list[Row]] = {}
    for row, param in misshapen(optimizer, tensor_rows({index: state[index] for index in params}, params)):
        odd.setdefault(params[row.saved_id].label, []).append(row)
        if param in optimizer.state:
            state[row.saved_id] = optimizer.state[param]
        else:
            state.pop(row.saved_id, None)
    return odd


def regrouped(
    saved_groups: Sequence[Group], groups: Sequence[Group], names: list[list[str]], by_name: Mapping[str, Saved]
) -> tuple[list[Group], list[str]]:
    """The optimizer's groups with saved hyperparameters, and where those disagree."""
    numbers, new_groups, disagreements = count(), [], []
    for index, (group, group_names) in enumerate(zip(groups, names, strict=True)):
        origins = sorted({by_name[name].group for name in group_names if name in by_name})
        merged, disputed = merge(group, {origin: saved_groups[origin] for origin in origins})
        new_groups.append(pack_group(merged, [next(numbers) for _ in group_names]))
        disagreements += [f"param group {index} would have {text}" for text in disputed]
    return new_groups, disagreements


def merge(group: Group, origins: Mapping[int, Group]) -> tuple[Group, list[str]]:
    """The group with the hyperparameters of the saved groups that it comes from, and those that disagree."""
    if not origins:
        return group, []
    first, *others = origins.values()
    merged: Group = {}
    disputed: list[str] = []
    for key in dict.fromkeys(chain(first, *others, OWN_KEYS)):
        own = key in OWN_KEYS
        if not own and key in first and all(key in other and agree(first[key], other[key]) for other in others):
            merged[key] = first[key]
            continue
        if key in group:
            merged[key] = group[key]
        if not own:
            disputed.append(f"{key!r} = {' and '.join(claims(key, origins))}")
    return merged, disputed


def claims(key: str, origins: Mapping[int, Group]) -> Iterator[str]:
    """What each saved group says of a hyperparameter."""
    for index, group in origins.items():
        yield f"{group[key]!r} (saved group {index})" if key in group else f"none (saved group {index})"


# ---- problems ----


def differences(missing: Sequence[str], unexpected: Sequence[str], by_name: Mapping[str, Saved]) -> Iterator[str]:
    """What only one side has."""
    if missing:
        yield f"in the optimizer, but not in the state dict: {listed(missing)}"
    if unexpected:
        origins = ((name, by_name[name].name) for name in unexpected)
        labels = (repr(new) if new == old else f"{new!r} (saved as {old!r})" for new, old in origins)
        yield f"in the state dict, but not in the optimizer: {', '.join(labels)}"


def misfits(odd: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """What is shaped unlike its parameter."""
    for name, rows in odd.items():
        shapes = ", ".join(f"{row.place.path} {list(row.value.shape)}" for row in rows)
        shape = next(list(row.param.tensor.shape) for row in rows if row.param)
        yield f"shaped unlike their parameter {name!r} {shape}: {shapes}"


def unused_renames(saved: Sequence[Saved], rename: Rename | None) -> Iterator[str]:
    """Keys of a dict that are no saved names."""
    if isinstance(rename, Mapping):
        names = {one.name for one in saved}
        unused = [key for key in rename if key not in names]
        if unused:
            yield f"in rename, but not in the state dict: {listed(unused)}"


def listed(items: Iterable[Any]) -> str:
    """All items, for an error."""
    return ", ".join(map(repr, items))
