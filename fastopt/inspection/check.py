"""What is wrong with a state dict, for an optimizer that is about to load it."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.optim import LBFGS, Adafactor, Optimizer

from fastopt.backends.interface import Group
from fastopt.collector import paused_collector
from fastopt.errors import describe_tensor
from fastopt.inspection.places import Place, label, places
from fastopt.inspection.values import Advance, not_finite, numbers, unwatched
from fastopt.state_dict import OWN_KEYS, StateDict

SHAPED_BY_RULE = {
    optimizer
    for optimizer in vars(torch.optim).values()
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer)
} - {Optimizer, Adafactor, LBFGS}
"""Optimizers of torch each tensor of whose state is of one element, or shaped like its parameter."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A tensor of the state, and its parameter."""

Kind = Literal["structure", "shape", "dtype", "values", "damage"]


@dataclass(frozen=True)
class Problem:
    """Something that makes a load fail, or go wrong without a word. Prints as one line."""

    kind: Kind
    text: str
    saved_id: Any = None
    """The id of the parameter's state, where it is about one."""
    key: Any = None
    """The key in that state, where it is about one."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class Param(NamedTuple):
    """A parameter of the optimizer that a saved id stands for."""

    tensor: torch.Tensor
    label: str


class Row(NamedTuple):
    """A saved tensor, and the parameter that it would go to."""

    saved_id: Any
    param: Param | None
    """None where the id stands for no parameter, or the groups leave in doubt for which."""
    place: Place

    @property
    def value(self) -> torch.Tensor:
        """The tensor."""
        tensor: torch.Tensor = self.place.value
        return tensor

    def __str__(self) -> str:
        owner = f"{self.param.label}, saved under id" if self.param else "id"
        return f"{owner} {self.saved_id!r}, {self.place.path or 'all of its state'}: {describe_tensor(self.value)}"

    def problem(self, kind: Kind, text: str) -> Problem:
        """A problem of this tensor."""
        return Problem(kind, f"{self} {text}", self.saved_id, self.place.key)


def check(optimizer: Optimizer, state_dict: StateDict, *, shapes: bool = True, finite: bool = False) -> list[Problem]:
    """List all that is wrong with a state dict for an optimizer, before it is loaded.

    torch loads state of any shape and any values without a word, and the step after it fails, or trains on noise. This
    is what a load by place, torch's and `fastopt.load_state_dict`, would do; where parameters have moved, `match` the
    dict first. No hooks run.

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
        TypeError: `optimizer` is none.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"check: optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    with paused_collector(), torch.no_grad():
        return list(problems(optimizer, state_dict, shapes, finite))


def problems(optimizer: Optimizer, state_dict: Any, shapes: bool, finite: bool) -> Iterator[Problem]:
    """All problems, structure first."""
    if not isinstance(state_dict, Mapping):
        yield Problem("structure", f"the state dict is a {type(state_dict).__name__}, not a dict")
        return
    groups, saved_groups = optimizer.param_groups, state_dict.get("param_groups")
    params: dict[Any, Param] = {}
    if isinstance(saved_groups, list | tuple):
        yield from group_problems(groups, saved_groups)
        params = paired(groups, saved_groups)
        if finite:
            yield from nan_hyperparameters(saved_groups)
    else:
        yield from missing("param_groups", "list", saved_groups)

    state = state_dict.get("state")
    if not isinstance(state, Mapping):
        yield from missing("state", "dict", state)
        return
    yield from unclaimed(state, saved_groups)
    rows = list(tensor_rows(state, params))
    yield from dtype_problems(rows)
    if shapes:
        yield from shape_problems(optimizer, rows)
    yield from empty_tensors(rows)
    if finite:
        yield from infinite_tensors(rows)


# ---- structure ----


def missing(key: str, kind: str, value: Any) -> Iterator[Problem]:
    """What is to be said where an entry of the dict is not what it has to be."""
    found = f"{key!r} is missing" if value is None else f"{key!r} is a {type(value).__name__}, not a {kind}"
    yield Problem("structure", f"{found}; the state dict of an optimizer holds 'state' and 'param_groups'")


def ids_of(saved_group: Any) -> Sequence[Any] | None:
    """The saved ids of a group, if it is one."""
    ids = saved_group.get("params") if isinstance(saved_group, Mapping) else None
    return ids if isinstance(ids, list | tuple) else None


def group_problems(groups: Sequence[Group], saved_groups: Sequence[Any]) -> Iterator[Problem]:
    """Groups that differ in number or size, lack hyperparameters, or have ids that are none."""
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
    yield from odd_ids(saved_groups)


def lacking_hyperparameters(index: int, group: Group, saved: Mapping[str, Any]) -> Iterator[Problem]:
    """Hyperparameters of the optimizer's group that the saved one has not; a step that reads one of them fails.

    Those that are off now (a bool, None, zero) may be younger than the file: `__setstate__` adds them, as off.
    """
    for key, value in group.items():
        off = value is None or isinstance(value, bool) or (isinstance(value, int | float) and not value)
        if key not in saved and key not in OWN_KEYS and not off:
            text = f"param group {index} has no {key!r}, which is {value!r} in the optimizer"
            yield Problem("structure", text, key=key)


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


def paired(groups: Sequence[Group], saved_groups: Sequence[Any]) -> dict[Any, Param]:
    """Saved id -> parameter, in those groups whose sizes leave no doubt."""
    params: dict[Any, Param] = {}
    first = 0
    if len(groups) != len(saved_groups):
        return params
    for group, saved in zip(groups, saved_groups, strict=True):
        ids = ids_of(saved)
        if ids is not None and len(ids) == len(group["params"]):
            for position, (saved_id, tensor) in enumerate(zip(ids, group["params"], strict=True)):
                if isinstance(saved_id, Hashable):
                    params[saved_id] = Param(tensor, label(first + position, position, group))
        first += len(group["params"])
    return params


def unclaimed(state: Mapping[Any, Any], saved_groups: Any) -> Iterator[Problem]:
    """State of no parameter. Under keys of another kind than the ids, an optimizer may keep what is of all of them."""
    if not isinstance(saved_groups, list | tuple):
        return
    ids = {i for group in saved_groups for i in ids_of(group) or () if isinstance(i, Hashable)}
    kinds = set(map(type, ids))
    for saved_id in state:
        if saved_id not in ids and type(saved_id) in kinds:
            yield Problem("structure", f"state under id {saved_id!r}, which stands in no group", saved_id)


def tensor_rows(state: Mapping[Any, Any], params: Mapping[Any, Param]) -> Iterator[Row]:
    """Every tensor of the state, at any depth."""
    for saved_id, entry in state.items():
        param = params.get(saved_id)
        for place in places(entry):
            if isinstance(place.value, torch.Tensor):
                yield Row(saved_id, param, place)


# ---- shapes and dtypes ----


def dtype_problems(rows: Iterable[Row]) -> Iterator[Problem]:
    """Complex state of real parameters, whose imaginary part the cast drops."""
    for row in rows:
        if row.param and row.value.is_complex() and row.param.tensor.is_floating_point() and row.place.key != "step":
            yield row.problem("dtype", "loses its imaginary part to its real parameter")


def shape_problems(optimizer: Optimizer, rows: Iterable[Row]) -> Iterator[Problem]:
    """State that is shaped unlike its parameter, where it should be."""
    pairs_by_key: dict[Any, list[tuple[Row, torch.Tensor]]] = defaultdict(list)
    for row in rows:
        if row.param and not (row.place.is_nested or row.value.is_nested):
            pairs_by_key[row.place.key].append((row, row.param.tensor))
    by_rule = type(optimizer) in SHAPED_BY_RULE
    held_by_key = {} if by_rule else held_tensors(optimizer)
    for key, pairs in pairs_by_key.items():
        saved = [(row.value, param) for row, param in pairs]
        held = held_by_key.get(key, {})
        is_permuted = has_permuted_shapes(saved)
        is_shaped = {matrix: mostly_alike(held.values() or saved, matrix) for matrix in (False, True)}
        for row, param in pairs:
            if by_rule:
                wanted = row.value.numel() > 1 or is_shaped[is_matrix(param)] or is_permuted
            elif param in held:
                wanted = alike(*held[param])
            else:
                wanted = is_shaped[is_matrix(param)] or (is_permuted and not held)
            if wanted and not alike(row.value, param):
                yield row.problem("shape", f"belongs to a parameter of shape {list(param.shape)}")


def held_tensors(optimizer: Optimizer) -> dict[Any, dict[torch.Tensor, Pair]]:
    """The tensors that the optimizer holds now, by key and parameter."""
    held: dict[Any, dict[torch.Tensor, Pair]] = defaultdict(dict)
    for param, entry in optimizer.state.items():
        for key, tensor in entry.items() if isinstance(entry, Mapping) else ():
            if isinstance(tensor, torch.Tensor) and isinstance(param, torch.Tensor) and not tensor.is_nested:
                held[key][param] = tensor, param
    return held


def alike(value: torch.Tensor, param: torch.Tensor) -> bool:
    """Whether state is shaped like its parameter; one element is shaped like one element."""
    return value.shape == param.shape or value.numel() == param.numel() == 1


def is_matrix(param: torch.Tensor) -> bool:
    """Whether a parameter is of more than one dimension: optimizers that factor their state do so with these alone."""
    return param.ndim > 1


def mostly_alike(pairs: Iterable[Pair], matrix: bool) -> bool:
    """Whether more than half are alike, of those whose parameter is a matrix, or is none, of more than one element."""
    likeness = [alike(value, param) for value, param in pairs if param.numel() > 1 and is_matrix(param) == matrix]
    return 2 * sum(likeness) > len(likeness)


def has_permuted_shapes(pairs: Sequence[Pair]) -> bool:
    """Whether the shapes are those of the parameters in another order, as if these had been reordered since."""
    return Counter(value.shape for value, _ in pairs) == Counter(param.shape for _, param in pairs)


# ---- values ----


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
