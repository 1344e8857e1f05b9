"""Copies of an optimizer's state that training does not touch."""

import os
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.backends import current, python
from fastopt.backends.interface import Group, State
from fastopt.casting import Cast, is_plain
from fastopt.collector import paused_collector
from fastopt.containers import tensors_of
from fastopt.files import torch_file
from fastopt.inplace import CastInPlace
from fastopt.policy import DTypes, Policy, saving_policy
from fastopt.report import LoadReport
from fastopt.state_dict import StateDict, deepcopied, id_map, load, state_dict

Origins = dict[int, tuple[torch.dtype, torch.device]]
"""Dtype and device of an original, by the identity of its copy, where the copy has others."""


class Snapshot:
    """What `snapshot` returns: the state of an optimizer as it was at that time."""

    def __init__(self, optimizer: Optimizer, copied: StateDict, origins: Origins, report: LoadReport) -> None:
        self._optimizer = optimizer
        self._copied = copied
        self._origins = origins
        self.report = report
        """What was copied, and cast."""

    def state_dict(self) -> StateDict:
        """Return the state in the form of `torch.optim.Optimizer.state_dict`.

        The dicts of the state and of the groups are new ones in each call. The tensors are the snapshot's own: a load
        that shares them with an optimizer (torch's own, or one with `copy=False`) hands them over to training.
        """
        state = {index: dict(value) if type(value) is dict else value for index, value in self._copied["state"].items()}
        return {**self._copied, "state": state, "param_groups": [dict(group) for group in self._copied["param_groups"]]}

    def restore(self, *, inplace: bool = False) -> LoadReport:
        """Bring the optimizer back to this state, hyperparameters included, as often as wanted.

        Every tensor gets the dtype and the device that it had, whatever those of its parameter are. The hooks of
        loading run.

        Args:
            inplace: whether the values go into the tensors that the optimizer holds now, as in `load_state_dict`.

        Raises:
            ValueError: the optimizer's groups are other ones by now; or, with `inplace`, it holds no tensor of the
                shape in a tensor's place. The optimizer is as it was then.
        """
        if inplace:
            return load(self._optimizer, self.state_dict(), CastInPlace)
        if self._origins:
            return load(self._optimizer, self.state_dict(), partial(CastBack, origins=self._origins))
        keep = {"*": "keep", "step": "keep"}
        return load(self._optimizer, self.state_dict(), partial(Cast, copy=True, policy=Policy(keep, keep)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file that `torch.load(path, weights_only=True)` reads.

        An existing file is replaced at once and as a whole; where writing fails, it stays as it was.
        """
        torch_file.write(path, self._copied)

    def __repr__(self) -> str:
        name, size = type(self._optimizer).__name__, self.report.bytes_written
        return f"<fastopt.Snapshot of {name}: {self.report.tensors:,} tensors, {size / 1e6:,.1f} MB>"


def snapshot(
    optimizer: Optimizer, *, device: torch.device | str | int = "cpu", dtype: DTypes | None = None
) -> Snapshot:
    """Copy the state of an optimizer, all tensors in one batch, so that training may go on.

    Args:
        optimizer: the optimizer; its hooks for saving run.
        device: the device of the copies, or `"keep"` for the one that each tensor is on.
        dtype: a floating dtype for the copies of floating state other than `step`; None keeps the dtypes. Or a dict by
            key, as the `policy` of `load_state_dict`; keys that it does not fit keep theirs.

    Returns:
        A snapshot that shares no memory with the optimizer.

    Raises:
        ValueError: the device holds no values ("meta"), or `dtype` makes no policy.
    """
    if device != "keep" and torch.device(device).type == "meta":
        raise ValueError("snapshot: tensors on the meta device have no values, and could not be restored")
    policy = saving_policy(dtype, device)
    live = state_dict(optimizer)
    with paused_collector():
        saved_groups = deepcopied(live["param_groups"])
        params = id_map(saved_groups, optimizer.param_groups)
        cast = Cast(optimizer, saved_groups, copy=True, policy=policy)
        state = cast.cast_state(live["state"], params)
        cast.report.unused_patterns = policy.unused()
        copied = {key: value if key in ("state", "param_groups") else cast.keep(value) for key, value in live.items()}
        copied["state"] = {index: state[params.get(index, index)] for index in live["state"]}
        copied["param_groups"] = saved_groups
        return Snapshot(optimizer, copied, origins_of(live["state"], copied["state"]), cast.report)


class CastBack(Cast):
    """Gives the copies of a snapshot the dtypes and devices of their originals."""

    def __init__(self, optimizer: Optimizer, saved_groups: list[Group], *, origins: Origins) -> None:
        super().__init__(optimizer, saved_groups, copy=True)
        self.backend = python  # the native walk knows rules by key alone
        self.origins = origins
        self.returned: dict[int, torch.Tensor] = {}
        """What has become of copies, by their identity."""

    def cast_state(self, saved_state: Any, params: dict[Any, torch.Tensor]) -> State:
        """The new state; all copies that become the same dtype on the same device in one batch."""
        differing = {id(tensor): tensor for tensor in tensors_of(saved_state) if id(tensor) in self.origins}
        by_origin: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for identity, tensor in differing.items():
            if is_plain(tensor):
                by_origin.setdefault(self.origins[identity], []).append(tensor)
        for (dtype, device), tensors in by_origin.items():
            results = current().to(tensors, {"dtype": dtype, "device": device}, copy=True)
            self.returned.update(zip(map(id, tensors), results, strict=True))
        return super().cast_state(saved_state, params)

    def tensor(self, param: torch.Tensor, value: torch.Tensor, saved_id: Any, key: Any, state_key: Any) -> torch.Tensor:
        """A copy like the original."""
        if (returned := self.returned.pop(id(value), None)) is not None:  # each place gets a tensor of its own
            self.count_tensor(value, returned, copied=False)
            return returned
        dtype, device = self.origins.get(id(value), (value.dtype, value.device))
        return self.to(value, {"dtype": dtype, "device": device})


def origins_of(state: Any, copies: Any) -> Origins:
    """What the originals were, where their copies differ."""
    return {
        id(copy): (tensor.dtype, tensor.device)
        for tensor, copy in zip(tensors_of(state), tensors_of(copies), strict=True)
        if tensor.dtype != copy.dtype or tensor.device != copy.device
    }
