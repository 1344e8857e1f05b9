"""Copies of an optimizer's state that training does not touch."""

import os
import time
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.backends import current, python
from fastopt.backends.interface import Group, State
from fastopt.casting import Cast, is_plain
from fastopt.collector import paused_collector
from fastopt.containers import tensors_of
from fastopt.errors import check_bools
from fastopt.inplace import CastInPlace, InPlace, check_inplace
from fastopt.policy import DTypes, Policy, saving_policy
from fastopt.report import LoadReport, SaveReport
from fastopt.state_dict import StateDict, deepcopied, id_map, load, state_dict
from fastopt.writing import Ready, write_in_turn

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

    def restore(self, *, inplace: InPlace = False) -> LoadReport:
        """Bring the optimizer back to this state, hyperparameters included, as often as wanted.

        Every tensor gets the dtype and the device that it had, whatever those of its parameter are. The hooks of
        loading run.

        Args:
            inplace: whether the values go into the tensors that the optimizer holds now, as in `load_state_dict`;
                `"auto"`: where there is one of the shape.

        Raises:
            ValueError: the optimizer's groups are other ones by now; or, with `inplace=True`, it holds no tensor of the
                shape in a tensor's place. The optimizer is as it was then.
            ValueError: `inplace` is neither a bool nor `"auto"`.
        """
        check_inplace(inplace)
        if inplace:
            fill = partial(FillBack, replace=inplace == "auto", origins=self._origins)
            return load(self._optimizer, self.state_dict(), fill)
        if self._origins:
            return load(self._optimizer, self.state_dict(), partial(CastBack, origins=self._origins))
        keep = {"*": "keep", "step": "keep"}
        return load(self._optimizer, self.state_dict(), partial(Cast, copy=True, policy=Policy(keep, keep)))

    def save(self, path: str | os.PathLike[str]) -> SaveReport:
        """Write the state to a file or a folder as `fastopt.save` does, in the format that the name asks for.

        Raises:
            BackgroundSaveError: an earlier save in the background has failed, and nobody has asked its Future; this
                save is done all the same.
            Exception: what `fastopt.save` raises. What was there is as it was then.
        """
        return write_in_turn(path, lambda: Ready(time.perf_counter(), self._copied, None, self.report))

    def __repr__(self) -> str:
        name, size = type(self._optimizer).__name__, self.report.bytes_written
        return f"<fastopt.Snapshot of {name}: {self.report.tensors:,} tensors, {size / 1e6:,.1f} MB>"


def snapshot(
    optimizer: Optimizer, *, device: torch.device | str | int = "cpu", dtype: DTypes | None = None, audit: bool = False
) -> Snapshot:
    """Copy the state of an optimizer, all tensors in one batch, so that training may go on.

    Args:
        optimizer: the optimizer; its hooks for saving run.
        device: the device of the copies, or `"keep"` for the one that each tensor is on.
        dtype: a floating dtype for the copies of floating state other than `step`; None keeps the dtypes. Or a dict by
            key, as the `policy` of `load_state_dict`; keys that it does not fit keep theirs.
        audit: whether the casts are looked at, as in `load_state_dict`; the snapshot's `report` has what is found.

    Returns:
        A snapshot that shares no memory with the optimizer.

    Raises:
        ValueError: the device holds no values ("meta"), or `dtype` makes no policy.
    """
    if device != "keep" and torch.device(device).type == "meta":
        raise ValueError("snapshot: tensors on the meta device have no values, and could not be restored")
    check_bools(audit=audit)
    started = time.perf_counter()
    policy = saving_policy(dtype, device)
    live = state_dict(optimizer)
    with paused_collector():
        saved_groups = deepcopied(live["param_groups"])
        params = id_map(saved_groups, optimizer.param_groups)
        cast = Cast(optimizer, saved_groups, copy=True, policy=policy, audit=audit)
        cast.doing, cast.report.done, cast.report.options = "copying", "copied", "dtype"
        state = cast.cast_state(live["state"], params)
        cast.report.unused_patterns = policy.unused()
        copied = {key: value if key in ("state", "param_groups") else cast.keep(value) for key, value in live.items()}
        copied["state"] = {index: state[params.get(index, index)] for index in live["state"]}
        copied["param_groups"] = saved_groups
        cast.report.seconds = time.perf_counter() - started
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
        return self.to(value, original(value, self.origins))


class FillBack(CastInPlace):
    """Fills the tensors that are there, and gives the others the dtypes and devices of their originals."""

    def __init__(self, optimizer: Optimizer, saved_groups: list[Group], *, replace: bool, origins: Origins) -> None:
        super().__init__(optimizer, saved_groups, replace=replace)
        self.origins = origins

    def tensor(self, param: torch.Tensor, value: torch.Tensor, saved_id: Any, key: Any, state_key: Any) -> torch.Tensor:
        """A copy like the original."""
        return self.to(value, original(value, self.origins))


def original(copy: torch.Tensor, origins: Origins) -> dict[str, Any]:
    """The arguments of `copy.to()` for a tensor like the original."""
    dtype, device = origins.get(id(copy), (copy.dtype, copy.device))
    return {"dtype": dtype, "device": device}


def origins_of(state: Any, copies: Any) -> Origins:
    """What the originals were, where their copies differ."""
    return {
        id(copy): (tensor.dtype, tensor.device)
        for tensor, copy in zip(tensors_of(state), tensors_of(copies), strict=True)
        if tensor.dtype != copy.dtype or tensor.device != copy.device
    }
