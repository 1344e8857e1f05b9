"""Which dtype each tensor of a state gets on its way into a file."""

from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.backends import python
from fastopt.backends.interface import Group
from fastopt.casting import Cast, bytes_of, is_plain
from fastopt.collector import paused_collector
from fastopt.errors import describe_parameter
from fastopt.policy import DTypes, saving_policy
from fastopt.report import LoadReport
from fastopt.state_dict import StateDict, id_map

DTypesById = dict[int, torch.dtype]
"""By the `id` of a tensor."""


def with_dtypes(optimizer: Optimizer, saved: StateDict, dtype: DTypes) -> tuple[StateDict, DTypesById, LoadReport]:
    """A state dict to write, and the dtypes that its tensors get while they are written.

    Args:
        optimizer: whose state it is.
        saved: what `state_dict(optimizer)` returned.
        dtype: as in `save`.

    Returns:
        The dict with other containers around the same memory: a tensor to be cast is a new view, as the cast makes a
        new tensor of each place where one stands; the final dtypes of those; and a count of the casts.

    Raises:
        ValueError, TypeError: `dtype` makes no policy.
    """
    cast = CastLater(optimizer, saved["param_groups"], dtype)
    with paused_collector():
        params = id_map(saved["param_groups"], optimizer.param_groups)
        state = cast.cast_state(saved["state"], params)
    cast.report.unused_patterns = cast.policy.unused()
    in_order = {index: state[params.get(index, index)] for index in saved["state"]}
    return {**saved, "state": in_order}, cast.dtypes, cast.report


class CastLater(Cast):
    """Notes the dtype that a tensor is to be cast to, where the cast can wait until it is written."""

    def __init__(self, optimizer: Optimizer, saved_groups: list[Group], dtype: DTypes) -> None:
        super().__init__(optimizer, saved_groups, copy=False, policy=saving_policy(dtype))
        self.backend = python  # nothing is computed here
        self.dtypes: DTypesById = {}

    def entry(self, param: torch.Tensor, value: Any, saved_id: Any, key: Any = None, state_key: Any = None) -> Any:
        """The whole state of a parameter."""
        try:
            return self(param, value, saved_id, key, state_key)
        except Exception as error:
            error.add_note(f"while saving the state of {describe_parameter(param, saved_id, self.groups)}")
            raise

    def to(self, value: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """A view to be cast later. Tensors of odd kinds, which torch writes itself, are cast at once."""
        dtype = options.get("dtype", value.dtype)
        if dtype == value.dtype or not is_plain(value) or value.is_meta or value.is_complex():
            return super().to(value, options)
        view = value.detach()
        self.dtypes[id(view)] = dtype
        self.count([(value.dtype, dtype, 1, bytes_of(value), value.numel() * dtype.itemsize)], 0, 0)
        return view


class Nobody(Optimizer):
    """Stands for the optimizer that saved a file, of which nothing is known."""

    def __init__(self) -> None:
        self.param_groups = []  # Optimizer's own, which makes groups, imports torch._dynamo: seconds


def converted(saved: StateDict, dtype: DTypes) -> tuple[StateDict, DTypesById, LoadReport]:
    """`with_dtypes` for a state that no optimizer holds.

    Raises:
        ValueError, TypeError: `dtype` makes no policy.
    """
    no_param = torch.empty(0)
    cast = CastLater(Nobody(), saved["param_groups"], dtype)
    with paused_collector():
        state = {saved_id: cast.entry(no_param, value, saved_id) for saved_id, value in saved["state"].items()}
    cast.report.unused_patterns = cast.policy.unused()
    return {**saved, "state": state}, cast.dtypes, cast.report
