"""What the demo insists on; exact, down to the last bit."""

from collections.abc import Sequence

import torch
from torch.optim import Optimizer


class WrongResultError(Exception):
    """Two results that must be the same are not."""


def require_same_losses(run: str, expected: Sequence[float], actual: Sequence[float]) -> None:
    """Raise WrongResultError where a run's losses leave those it must have."""
    if len(expected) != len(actual):
        raise WrongResultError(f"{run}: {len(actual)} losses instead of {len(expected)}")
    for step, (wanted, got) in enumerate(zip(expected, actual, strict=True)):
        if wanted != got:
            raise WrongResultError(f"{run}: the loss of its step {step} is {got!r} and should be {wanted!r}")


def require_same_state(expected: Optimizer, actual: Optimizer) -> None:
    """Raise WrongResultError where two optimizers' states differ in a key, a dtype or a value."""
    expected_state, actual_state = expected.state_dict()["state"], actual.state_dict()["state"]
    if expected_state.keys() != actual_state.keys():
        raise WrongResultError("the states belong to different parameters")
    for index, entries in expected_state.items():
        if entries.keys() != actual_state[index].keys():
            raise WrongResultError(f"the states of parameter {index} have different keys")
        for key, tensor in entries.items():
            other = actual_state[index][key]
            if tensor.dtype != other.dtype or not torch.equal(tensor, other):
                raise WrongResultError(f"the states differ in {key} of parameter {index}")
