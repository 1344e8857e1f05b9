"""State that is shaped unlike its parameter, where it should not be."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import LBFGS, Adafactor, Optimizer

from fastopt.inspection.problems import Problem, Row

TORCHS_OWN = {
    optimizer
    for optimizer in vars(torch.optim).values()
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer)
} - {Optimizer}
"""The optimizers of torch."""

SHAPED_BY_RULE = TORCHS_OWN - {Adafactor, LBFGS}
"""Those each tensor of whose state is of one element, or shaped like its parameter."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A tensor of the state, and its parameter."""


def shape_problems(optimizer: Optimizer, rows: Iterable[Row]) -> Iterator[Problem]:
    """State that is shaped unlike its parameter, where it should be."""
    for row, param in misshapen(optimizer, rows):
        yield row.problem("shape", f"belongs to a parameter of shape {list(param.shape)}")


def misshapen(optimizer: Optimizer, rows: Iterable[Row]) -> Iterator[tuple[Row, torch.Tensor]]:
    """Such state, key by key, each tensor with its parameter."""
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
                yield row, param


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
