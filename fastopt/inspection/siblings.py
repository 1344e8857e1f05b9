"""Entries of a state that are unlike those of the other parameters, or unlike what the optimizer holds now.

A step reads what the optimizer once put there: a key that is gone, or a None where a moment was, is an error in the
load or in the step after it. What has to be there is written nowhere; the entries of the other parameters say it. They
may differ for a reason: a parameter that was not stepped has none, factored state is of matrices alone, some keys come
later. So what most parameters of a group have is asked for, of matrices and of others each on their own; in torch's own
optimizers, whose entries are all alike, of all. What the optimizer itself has now says as much, where its group is
switched on and off like the saved one, and the key is not a new one.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from fastopt.errors import describe_tensor
from fastopt.inspection.hyperparameters import same_switches
from fastopt.inspection.problems import Param, Problem
from fastopt.inspection.shapes import SHAPED_BY_RULE, TORCHS_OWN, is_matrix


class Entry(NamedTuple):
    """The saved state of a parameter."""

    saved_id: Any
    param: Param
    value: Any

    def problem(self, text: str, key: Any = None) -> Problem:
        """A problem of this entry."""
        return Problem("structure", f"{self.param.label}, saved under id {self.saved_id!r}{text}", self.saved_id, key)


class Tally:
    """For how many parameters something holds, of matrices and of others."""

    def __init__(self, is_uniform: bool) -> None:
        self.is_uniform = is_uniform
        """Whether the two kinds do not differ."""
        self.total: Counter[bool] = Counter()
        self.holding: dict[Any, Counter[bool]] = defaultdict(Counter)

    def usual(self, matrix: bool) -> list[Any]:
        """What holds for most parameters of a kind, or, where for half of them, for most of the other kind as well."""
        if self.is_uniform:
            return [what for what, found in self.holding.items() if 2 * found.total() >= self.total.total()]
        return [
            what
            for what, found in self.holding.items()
            if 2 * found[matrix] > self.total[matrix]
            or (2 * found[matrix] == self.total[matrix] > 0 and 2 * found[not matrix] > self.total[not matrix])
        ]


def entry_problems(
    optimizer: Optimizer,
    saved_groups: Sequence[Any],
    state: Mapping[Any, Any],
    pairs: Iterable[tuple[int, Any, Param]],
) -> Iterator[Problem]:
    """Entries that are no dicts, lack a key, or have something else where a tensor of their parameter's shape belongs.

    `pairs`: group, saved id and parameter of all whose place is known.
    """
    by_group: dict[int, list[Entry]] = defaultdict(list)
    for index, saved_id, param in pairs:
        if saved_id in state:
            by_group[index].append(Entry(saved_id, param, state[saved_id]))
    yield from no_dicts(optimizer, [entry for entries in by_group.values() for entry in entries])
    for index, entries in by_group.items():
        filled = [entry for entry in entries if isinstance(entry.value, Mapping) and not is_unused(entry.value)]
        is_switched_alike = same_switches(optimizer.param_groups[index], saved_groups[index])
        held = optimizer.state if is_switched_alike else {}
        yield from lacking_keys(optimizer, filled, held)
        yield from no_tensors(optimizer, filled, held)


def is_unused(entry: Mapping[Any, Any]) -> bool:
    """Whether a parameter has no state yet, as one that was not stepped; `SGD` once wrote it so."""
    return all(value is None for value in entry.values())


def no_dicts(optimizer: Optimizer, entries: Sequence[Entry]) -> Iterator[Problem]:
    """Entries that are no dicts, where the others are."""
    odd = [entry for entry in entries if not isinstance(entry.value, Mapping)]
    is_usual = type(optimizer) in TORCHS_OWN or 2 * len(odd) < len(entries)
    for entry in odd:
        if is_usual or isinstance(optimizer.state.get(entry.param.tensor), Mapping):
            yield entry.problem(f": its state is {described(entry.value)}, not a dict")


def lacking_keys(optimizer: Optimizer, entries: Sequence[Entry], held_state: Mapping[Any, Any]) -> Iterator[Problem]:
    """Keys that an entry lacks."""
    by_rule = type(optimizer) in SHAPED_BY_RULE
    tally = Tally(is_uniform=by_rule)
    for entry in entries:
        matrix = is_matrix(entry.param.tensor)
        tally.total[matrix] += 1
        for key in entry.value:
            tally.holding[key][matrix] += 1
    usual = {matrix: tally.usual(matrix) for matrix in tally.total}
    for entry in entries:
        expected = usual[is_matrix(entry.param.tensor)]
        lacking = {key: "others of its group have" for key in expected if key not in entry.value}
        for key, value in held_entry(held_state, entry).items():
            if key not in entry.value and value is not None and (by_rule or key in tally.holding):
                lacking.setdefault(key, "the optimizer has")
        for key, who_has in lacking.items():
            yield entry.problem(f": has no {key!r}, which {who_has}", key)


def no_tensors(optimizer: Optimizer, entries: Sequence[Entry], held_state: Mapping[Any, Any]) -> Iterator[Problem]:
    """Values that are no tensors, or sparse ones, where others have dense ones of their parameters' shapes."""
    tallies: dict[Any, Tally] = defaultdict(lambda: Tally(is_uniform=type(optimizer) in SHAPED_BY_RULE))
    suspects: list[tuple[Entry, Any]] = []
    for entry in entries:
        param = entry.param.tensor
        for key, value in entry.value.items():
            if not is_dense(value):
                suspects.append((entry, key))
            if param.numel() > 1:  # what has one element is shaped like a step count
                tallies[key].total[is_matrix(param)] += 1
                tallies[key].holding["shaped"][is_matrix(param)] += is_shaped(value, param)
    usual: dict[Any, dict[bool, list[Any]]] = {}
    for entry, key in suspects:
        param, value = entry.param.tensor, entry.value[key]
        if key not in usual:
            usual[key] = {matrix: tallies[key].usual(matrix) for matrix in (False, True)}
        # SGD's momentum of a sparse gradient is sparse; then nothing beside it is dense.
        is_wanted = "shaped" in usual[key][is_matrix(param)] and (
            not isinstance(value, torch.Tensor) or any(is_shaped(other, param) for other in entry.value.values())
        )
        if is_wanted or is_shaped(held_entry(held_state, entry).get(key), param):
            text = f", {key}: {described(value)}, where a dense tensor of shape {list(param.shape)} belongs"
            yield entry.problem(text, key)


def held_entry(held_state: Mapping[Any, Any], entry: Entry) -> Mapping[Any, Any]:
    """What the optimizer holds now of the same parameter."""
    held = held_state.get(entry.param.tensor)
    return held if isinstance(held, Mapping) else {}


def is_dense(value: Any) -> bool:
    """Whether a value is a tensor with a place for each element."""
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def is_shaped(value: Any, param: torch.Tensor) -> bool:
    """Whether a value is a dense tensor of its parameter's shape."""
    return is_dense(value) and not value.is_nested and value.shape == param.shape and value.numel() > 1


def described(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, torch.Tensor):
        layout = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return layout + describe_tensor(value)
    if value is None or isinstance(value, int | float):
        return repr(value)
    return f"of type {type(value).__name__}"
