"""What is wrong with a state dict, whatever optimizer it is for."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastopt.collector import paused_collector
from fastopt.inspection.check import infinite_tensors, missing, odd_ids, unclaimed
from fastopt.inspection.hyperparameters import nan_hyperparameters
from fastopt.inspection.problems import Problem, ids_of, tensor_rows
from fastopt.inspection.values import Advance, unwatched


def flaws(state_dict: Any, *, advance: Advance = unwatched) -> list[Problem]:
    """List what no optimizer could load as it stands: groups and ids that are none, NaNs and infinities.

    Args:
        state_dict: the state dict. Not changed; all of its state is read once.
        advance: is called with the bytes of the values that were looked at, again and again.

    Returns:
        Every problem, those of the structure first; empty if there is none.
    """
    with paused_collector(), torch.no_grad():
        return list(found(state_dict, advance))


def found(state_dict: Mapping[str, Any], advance: Advance) -> Iterator[Problem]:
    """All problems, structure first."""
    saved_groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if isinstance(saved_groups, list | tuple):
        for index, group in enumerate(saved_groups):
            if ids_of(group) is None:
                yield Problem("structure", f"param group {index} has no list 'params'")
        yield from odd_ids(saved_groups)
        yield from nan_hyperparameters(saved_groups)
    else:
        yield from missing("param_groups", "list", saved_groups)
    if not isinstance(state, Mapping):
        yield from missing("state", "dict", state)
        return
    if isinstance(saved_groups, list | tuple):
        yield from unclaimed(state, saved_groups)
    yield from infinite_tensors(tensor_rows(state, {}), advance)
