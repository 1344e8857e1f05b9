"""What is wrong with a state dict, for an optimizer that is about to load it."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.backends.interface import Group
from fastopt.collector import paused_collector
from fastopt.errors import check_bools
from fastopt.inspection.hyperparameters import (
    lacking_hyperparameters,
    nan_hyperparameters,
    optional_names,
    unlike_hyperparameters,
)
from fastopt.inspection.problems import Problem, Row, distinct, ids_of, pairs_of, tensor_rows
from fastopt.inspection.shapes import shape_problems
from fastopt.inspection.siblings import entry_problems
from fastopt.inspection.values import Advance, not_finite, numbers, unwatched
from fastopt.state_dict import StateDict, other_names
from fastopt.text import SHOWN, listed, some


def check(optimizer: Optimizer, state_dict: StateDict, *, shapes: bool = True, finite: bool = False) -> list[Problem]:
    """List all that is wrong with a state dict for an optimizer, before it is loaded.

    torch loads state of any shape and any values without a word, and the step after it fails, or trains on noise. This
    is what a load by place, torch's and `fastopt.load_state_dict`, would do; where parameters have moved, and the names
    say so, `match` the dict first. No hooks run.

    What an optimizer's state has to hold is known from that of the other parameters, and from what the optimizer holds
    now: a key that most of a group have (of the matrices, or of the others), a dense tensor where most have one of
    their parameter's shape, hyperparameters of the kind of its own. Parameters without state are in order, as they have
    perhaps not been stepped yet.

    Args:
        optimizer: the optimizer to load into. Not changed.
        state_dict: the state dict. Not changed.
        shapes: whether state shaped unlike its parameter is a problem, under keys where it should not be: those under
            which the optimizer holds state of its parameters' shapes now; all keys of torch's own optimizers, whose
            state is shaped so or is one element (all but Adafactor and LBFGS); and those under which most of the saved
            state has its parameter's shape (most of the matrices', most of the others'), or all of it has the shape of
            some other parameter that it could have been saved for. So factored state, and state of one element or
            other sizes, pass.
        finite: whether NaNs and infinities in the state, and NaNs among the hyperparameters, are a problem. Reads all
            of the state once, at the memory's speed.

    Returns:
        Every problem, those of the structure first, then by kind and key; empty if there is none.

    Raises:
        TypeError: `optimizer` is none, or an option no bool.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"check: optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    check_bools(shapes=shapes, finite=finite)
    with paused_collector(), torch.no_grad():
        return list(problems(optimizer, state_dict, shapes, finite))


def problems(optimizer: Optimizer, state_dict: Any, shapes: bool, finite: bool) -> Iterator[Problem]:
    """All problems, structure first."""
    if not isinstance(state_dict, Mapping):
        yield Problem("structure", f"the state dict is a {type(state_dict).__name__}, not a dict")
        return
    given_groups, given_state = state_dict.get("param_groups"), state_dict.get("state")
    saved_groups: Sequence[Any] = given_groups if isinstance(given_groups, list | tuple) else ()
    state: Mapping[Any, Any] = given_state if isinstance(given_state, Mapping) else {}
    pairs = list(pairs_of(optimizer.param_groups, saved_groups))
    rows = list(tensor_rows(state, {saved_id: param for _, saved_id, param in pairs}))

    if saved_groups is given_groups:
        yield from group_problems(optimizer, saved_groups)
        yield from unclaimed(state, saved_groups)
    else:
        yield from missing("param_groups", "list", given_groups)
    if state is given_state:
        yield from entry_problems(optimizer, saved_groups, state, pairs)
    else:
        yield from missing("state", "dict", given_state)
    yield from name_problems(optimizer.param_groups, saved_groups)
    yield from dtype_problems(rows)
    if shapes:
        yield from shape_problems(optimizer, rows)
    yield from empty_tensors(rows)
    if finite:
        yield from nan_hyperparameters(saved_groups)
        yield from infinite_tensors(rows)


# ---- structure ----


def missing(key: str, kind: str, value: Any) -> Iterator[Problem]:
    """What is to be said where an entry of the dict is not what it has to be."""
    found = f"{key!r} is missing" if value is None else f"{key!r} is a {type(value).__name__}, not a {kind}"
    yield Problem("structure", f"{found}; the state dict of an optimizer holds 'state' and 'param_groups'")


def group_problems(optimizer: Optimizer, saved_groups: Sequence[Any]) -> Iterator[Problem]:
    """Groups that differ in number or size, have other hyperparameters, or ids that are none."""
    groups, optional = optimizer.param_groups, optional_names(optimizer)
    if len(groups) != len(saved_groups):
        yield Problem("structure", f"param groups: {len(saved_groups)} saved, {len(groups)} in the optimizer")
    for index, saved in enumerate(saved_groups):
        ids = ids_of(saved)
        if ids is None:
            yield Problem("structure", f"param group {index} has no list 'params'")
        elif len(groups) == len(saved_groups):
            size = len(groups[index]["params"])
            if len(ids) != size:
                yield Problem("structure", f"parameters of group {index}: {len(ids)} saved, {size} in the optimizer")
            yield from lacking_hyperparameters(index, groups[index], saved)
            yield from unlike_hyperparameters(index, groups[index], saved, optional)
    yield from odd_ids(saved_groups)


def odd_ids(saved_groups: Sequence[Any]) -> Iterator[Problem]:
    """Saved ids that stand twice, or that no dict could have."""
    seen: set[Any] = set()
    for index, group in enumerate(saved_groups):
        for saved_id in ids_of(group) or ():
            if not isinstance(saved_id, Hashable):
                yield Problem("structure", f"saved id {saved_id!r} in param group {index} is not hashable")
            elif saved_id in seen:
                yield Problem("structure", f"saved id {saved_id!r} stands twice in the groups", saved_id)
            else:
                seen.add(saved_id)


def unclaimed(state: Mapping[Any, Any], saved_groups: Sequence[Any]) -> Iterator[Problem]:
    """State of no parameter. Under keys of another kind than the ids, an optimizer may keep what is of all of them.

    But not under texts of the ids, as JSON makes of numbers, nor under as many keys as there are parameters without.
    """
    ids = distinct(saved_groups)
    kinds = set(map(type, ids))
    foreign = []
    for saved_id in state:
        if saved_id not in ids:
            if type(saved_id) in kinds:
                yield Problem("structure", f"state under id {saved_id!r}, which stands in no group", saved_id)
            else:
                foreign.append(saved_id)
    if foreign:
        without = {str(saved_id): saved_id for saved_id in ids if saved_id not in state}
        stray = foreign if len(foreign) >= len(without) == len(ids) > 1 else [i for i in foreign if str(i) in without]
        if stray:
            text = f"state under {some(stray)}, where the groups have the ids {some(list(without.values()))}"
            yield Problem("structure", text, stray[0])


# ---- names ----


def name_problems(groups: Sequence[Group], saved_groups: Sequence[Any]) -> Iterator[Problem]:
    """Names of the parameters that are not the optimizer's own: a load by place gives each the state of another."""
    names, saved_names = names_of(groups), names_of(saved_groups)
    if not names or not saved_names or names == saved_names:
        return
    known, saved_known = set(names), set(saved_names)
    gone, new = [n for n in saved_names if n not in known], [n for n in names if n not in saved_known]
    facts = []
    if list(map(len, map(names_in, groups))) == list(map(len, map(names_in, saved_groups))):
        moved = [f"parameter {index} {own!r} was {saved!r}" for index, own, saved in other_names(groups, saved_groups)]
        facts.append(listed(moved[:SHOWN], len(moved)))
    facts += [f"only saved: {some(gone)}"] if gone else []
    facts += [f"only in the optimizer: {some(new)}"] if new else []
    facts += ["the same names in other places"] if not gone and not new else []
    yield Problem("names", f"{'; '.join(facts)}. A load goes by place; fastopt.match goes by names")


def names_of(groups: Sequence[Any]) -> list[Any]:
    """The names of all parameters; empty where a group has none."""
    lists = list(map(names_in, groups))
    return list(chain.from_iterable(lists)) if all(lists) else []


def names_in(group: Any) -> Sequence[Any]:
    """The names in a group, one for each parameter; empty where there are none."""
    names = group.get("param_names") if isinstance(group, Mapping) else None
    ids = ids_of(group)
    return names if ids is not None and isinstance(names, list | tuple) and len(names) == len(ids) else ()


# ---- dtypes ----


def dtype_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """Complex state of real parameters, whose imaginary part the cast drops."""
    for row in rows:
        if row.param and row.value.is_complex() and row.param.tensor.is_floating_point() and row.place.key != "step":
            yield row.problem("dtype", "loses its imaginary part to its real parameter")


# ---- values ----


def empty_tensors(rows: Iterable[Row]) -> Iterator[Problem]:
    """State on the meta device, of parameters that are not."""
    for row in rows:
        if row.param and row.value.is_meta and not row.param.tensor.is_meta:
            yield row.problem("values", "has no values")


def infinite_tensors(rows: Iterable[Row], advance: Advance = unwatched) -> Iterator[Problem]:
    """State with NaNs or infinities."""
    readable = [(row, tensor) for row in rows if (tensor := numbers(row.value)) is not None]
    for index, seen in not_finite([tensor for _, tensor in readable], advance).items():
        counts = {"NaN": seen.nan, "inf": seen.inf}
        found = " and ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        yield readable[index][0].problem("values", f"holds {found}")
