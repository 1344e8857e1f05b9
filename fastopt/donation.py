"""Loading a state that is given away: what is cast is released at once, and needs no memory twice."""

from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.backends.interface import Group, State
from fastopt.casting import Cast, bytes_of
from fastopt.containers import tensors_of
from fastopt.policy import Policy

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

    def cast_state(self, saved_state: Any, params: dict[Any, torch.Tensor]) -> State:
        """The new state; the saved one is empty then, and so is the dict that was given.

        Raises:
            TypeError: nothing can be taken out of the saved state.
        """
        if not isinstance(saved_state, MutableMapping):
            raise TypeError(f"donate: nothing can be taken out of the state, a {type(saved_state).__name__}")
        self.given.clear()  # a dict without its state must not be taken for one
        state: State = defaultdict(dict)
        for portion in portions(saved_state):
            state.update(super().cast_state(portion, params))
        return state


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
