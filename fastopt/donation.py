"""Loading a state that is given away: what is cast is released at once, and needs no memory twice."""

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.backends.interface import Group, State
from fastopt.casting import Cast, bytes_of
from fastopt.containers import tensors_of
from fastopt.policy import Policy
from fastopt.report import TAKEN_OVER

PORTION = 32 * 2**20
"""Bytes that are cast before their sources are released: enough to keep all threads at work."""


class CastDonated(Cast):
    """Takes the saved state apart while it casts it. What needs no cast becomes the optimizer's."""

    def __init__(
        self,
        optimizer: Optimizer,
        saved_groups: list[Group],
        *,
        policy: Policy,
        audit: bool,
        given: MutableMapping[str, Any],
    ) -> None:
        super().__init__(optimizer, saved_groups, copy=False, policy=policy, audit=audit)
        self.given = given
        self.gives = True
        self.report.fate = TAKEN_OVER
        self.ours: set[int] = set()

    def saved_state(self, state_dict: Any) -> Any:
        """The state, taken out of the dict that was given and, where a pre-hook put another in its place, of that.

        Both are empty then: a dict without its state must not be taken for one.

        Raises:
            TypeError: nothing can be taken out of the dict or of the state.
        """
        state = super().saved_state(state_dict)
        for name, mapping in {"dict": self.given, "state": state}.items():
            if not isinstance(mapping, MutableMapping):
                raise TypeError(f"donate: nothing can be taken out of the {name}, a {type(mapping).__name__}")
        self.given.clear()
        state_dict.clear()
        return state

    def cast_state(self, saved_state: Any, params: dict[Any, torch.Tensor]) -> State:
        """The new state; the saved one is empty then."""
        state: State = defaultdict(dict)
        for portion in portions(saved_state):
            self.ours = nobody_elses(portion)
            state.update(super().cast_state(portion, params))
        return state

    def __call__(self, param: torch.Tensor, value: Any, saved_id: Any, key: Any = None, state_key: Any = None) -> Any:
        """As of any load; but the tensors of a dict that only we hold leave it one by one, to be released when cast."""
        if id(value) not in self.ours:
            return super().__call__(param, value, saved_id, key, state_key)
        return {k: self(param, value.pop(k) if is_done(value[k]) else value[k], saved_id, k, k) for k in list(value)}


def portions(saved_state: MutableMapping[Any, Any]) -> Iterator[dict[Any, Any]]:
    """The entries of a state in order, taken out of it, in parts of some `PORTION` bytes."""
    portion: dict[Any, Any] = {}
    size = 0
    for saved_id in list(saved_state):
        portion[saved_id] = saved_state.pop(saved_id)
        size += sum(map(bytes_of, tensors_of(portion[saved_id])))
        if size >= PORTION:
            yield portion
            portion, size = {}, 0
    if portion:
        yield portion


def is_done(value: Any) -> bool:
    """Whether nothing can want a value again once it is cast: a tensor, without weak references."""
    return isinstance(value, torch.Tensor) and not weakref.getweakrefcount(value)


def nobody_elses(entries: Mapping[Any, Any]) -> set[int]:
    """The identities of those dicts among a dict's values that are referred to from nowhere else."""
    return {id(entry) for entry in entries.values() if type(entry) is dict and sys.getrefcount(entry) == REFERENCES}


def references_to_ours() -> int:
    """References to such a dict, as `nobody_elses` counts them; how many is the interpreter's affair."""
    entries: dict[int, dict[Any, Any]] = {0: {}}
    [count] = {sys.getrefcount(entry) for entry in entries.values()}
    return count


REFERENCES = references_to_ours()
