"""What `state_dict` and `load_state_dict` mean, in the order of the reference.

The reference is `torch.optim.Optimizer` of the installed torch. A reader who has its source, or the original
description of the algorithm, open beside this file finds every step of it here, in the same order:

    hooks -> check groups -> id map -> cast the state -> update the groups -> commit, __setstate__ -> hooks

The optimizer changes in the commit and not before: whatever fails until then, or in it, leaves it as it was.
"""

import copy as copying
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.backends import current
from fastopt.backends.interface import Group, State
from fastopt.casting import Cast
from fastopt.collector import paused_collector
from fastopt.donation import CastDonated
from fastopt.errors import check_bools, note_odd_entries, note_wrong_arguments, optimizer_noted
from fastopt.inplace import CastInPlace, InPlace, check_inplace
from fastopt.policy import Devices, DTypes, Policy
from fastopt.report import LoadReport

StateDict = dict[str, Any]
OWN_KEYS = ("params", "param_names")
"""What a group holds besides hyperparameters."""

MakeCast = Callable[[Optimizer, list[Group]], Cast]
"""An optimizer and the saved groups -> what casts its state."""


def state_dict(optimizer: Optimizer) -> StateDict:
    """Return the optimizer's state as `torch.optim.Optimizer.state_dict` does, in linear time with a small constant.

    Returns:
        A dict of two entries. `"state"` holds, by index, the live state of each parameter: the inner dicts and their
        tensors are the optimizer's own, not copies. `"param_groups"` holds each group's hyperparameters and, in place
        of its parameters, their indices, which run on over the groups.

    Raises:
        KeyError: the state has a tensor for a key that stands in no group.
    """
    with optimizer_noted(optimizer):
        pre_hooks = optimizer._optimizer_state_dict_pre_hooks
    for pre_hook in pre_hooks.values():
        pre_hook(optimizer)

    result = packed(optimizer)

    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        hook_result = post_hook(optimizer, result)
        if hook_result is not None:
            result = hook_result
    return result


def packed(optimizer: Optimizer) -> StateDict:
    """The state dict as it is without hooks."""
    groups = optimizer.param_groups
    index_lists, packed_state = current().index_state([group["params"] for group in groups], optimizer.state)
    packed_groups = [pack_group(group, indices) for group, indices in zip(groups, index_lists, strict=True)]
    return {"state": packed_state, "param_groups": packed_groups}


def pack_group(group: Group, indices: list[int]) -> Group:
    """A group as it is saved: indices instead of parameters, as the last entry."""
    packed = {key: value for key, value in group.items() if key != "params"}
    packed["params"] = indices
    return packed


def load_state_dict(
    optimizer: Optimizer,
    state_dict: StateDict,
    *,
    copy: bool = True,
    policy: DTypes | None = None,
    device: Devices = "param",
    inplace: InPlace = False,
    donate: bool = False,
    audit: bool = False,
) -> LoadReport:
    """Load a state into an optimizer as `torch.optim.Optimizer.load_state_dict` does.

    Floating state is cast to the dtype of its parameter, all state moves to the device of its parameter; `step` stays
    as it was saved unless its group is `capturable` or `fused`.

    Args:
        optimizer: the optimizer to fill. Its groups go on holding the very same parameters.
        state_dict: what `state_dict` returned, with as many groups and parameters as the optimizer has. Not changed.
        copy: whether a tensor that needs no cast is copied. True: the optimizer shares no memory with `state_dict`, as
            if it had been deep-copied first. False: it takes over the same tensor objects, as torch does.
        policy: the dtypes that state gets. `"reference"`, as None: that of a floating parameter, for floating state and
            other. `"keep"`: the saved one. `"float-only"`: as the reference, but for floating state alone, so that the
            integers of a quantized optimizer stay. A floating dtype: that one for floating state, the saved one for
            other. Or a dict of these by key of a parameter's state: its name, or a pattern (`fnmatch`, the first that
            fits); where none fits, the reference holds. Each value is rounded once, from the saved dtype to the final
            one. `step` follows the reference unless the dict names `"step"` itself.
        device: the device that state goes to. `"param"`: its parameter's, as in the reference. `"keep"`: the one it is
            on. Or a device, or a dict of these as for `policy`.
        inplace: whether the values go into the tensors that the optimizer already holds, which stay the objects, and in
            the memory, that they are; each keeps its dtype and device. Nothing is allocated, and nothing is shared.
            So do tensors among the hyperparameters, as a tensor `lr`, where a tensor of their shape or a number was
            saved; a held number becomes what was saved. `"auto"`: a saved tensor that finds none of its shape in its
            place is loaded as ever, copied; the report lists such places in `replaced`.
        donate: whether the dict is given away. Its state is released while it is cast, so that inputs and outputs are
            never in memory both: 32 MiB at a time, and the tensors of a larger parameter in parts (with the Python
            backend, and for what takes rules of Python, one parameter's as a whole). What somebody else holds, or is in
            memory that torch's allocator did not make, stays. What needs no cast is taken over, whatever `copy` says.
            From the first cast on the dict is empty, also after an error, and so is one that a pre-hook put in its
            place; loading it again is a KeyError.
        audit: whether casts from one dtype to another are looked at, value by value: what overflows to infinity or
            underflows to zero, and how much is rounded away, by key and dtypes in the report's `audit`.

    Returns:
        What was cast, copied, shared, missing and unexpected.

    Raises:
        ValueError: the number of groups, or the size of one, differs.
        KeyError: `"state"`, `"param_groups"` or a group's `"params"` is missing.
        ValueError: `policy` has no such rule, or a dtype that is not floating; or `policy` or `device` is given with
            `inplace`, where each tensor has its dtype and device already.
        ValueError: `donate` or `audit` is given with `inplace`.
        TypeError: `copy`, `donate` or `audit` is no bool.
        ValueError: with `inplace`, the optimizer holds no tensor of the shape in a saved tensor's place, or two places
            hold overlapping ones (with `"auto"` overlapping ones alone).
        Exception: whatever torch raises for a value that it cannot cast, with a note that names parameter and key.

    After any error but one of a post-hook the optimizer is as it was, a KeyboardInterrupt included. With `inplace`,
    where an error while the values are written is too late for that, a note names the tensors that were filled, and the
    one that may be in part; all others are as they were.
    """
    return load_checked(
        optimizer, state_dict, lambda: cast_by(state_dict, copy, Policy(policy, device), inplace, donate, audit)
    )


def load_checked(optimizer: Optimizer, state_dict: StateDict, options: Callable[[], MakeCast]) -> LoadReport:
    """A load that a user has asked for by a function of fastopt's, with a warning or a note where that was wrong."""
    if isinstance(optimizer, Optimizer) and type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        warnings.warn(
            f"{type(optimizer).__qualname__} has a load_state_dict of its own, which fastopt.load_state_dict does not "
            "call; use fastopt.install() and the optimizer's own method to go through it",
            stacklevel=3,
        )
    try:
        return load(optimizer, state_dict, options())
    except Exception as error:
        note_wrong_arguments(error, optimizer, state_dict)
        raise


def cast_by(
    state_dict: StateDict,
    copy: bool,
    policy: Policy,
    inplace: InPlace,
    donate: bool,
    audit: bool,
    reads_files: bool = False,
) -> MakeCast:
    """What casts the state by the options of a load.

    `reads_files`: whether the state has just been read, and nobody has written to it since.
    """
    check_inplace(inplace)
    check_bools(copy=copy, donate=donate, audit=audit)
    if inplace and not policy.is_reference:
        raise ValueError("inplace: the tensors to fill have their dtypes and devices; there is nothing to choose")
    if inplace and donate:
        raise ValueError("donate: with inplace no memory is needed twice; there is nothing to give away")
    if inplace and audit:
        raise ValueError("audit: what is written in place is not audited")
    if inplace:
        return partial(CastInPlace, replace=inplace == "auto", reads_files=reads_files)
    if donate:
        return partial(CastDonated, policy=policy, audit=audit, given=state_dict)
    return partial(Cast, copy=copy, policy=policy, audit=audit, reads_files=reads_files)


def load(optimizer: Optimizer, state_dict: StateDict, make_cast: MakeCast) -> LoadReport:
    """`load_state_dict` by other rules, and for callers that know which method of the optimizer they stand for."""
    started = time.perf_counter()

    state_dict = state_dict.copy()  # any mapping that can be copied, as in torch
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        hook_result = pre_hook(optimizer, state_dict)
        if hook_result is not None:
            state_dict = hook_result

    with paused_collector():
        groups = optimizer.param_groups
        saved_groups = deepcopied(state_dict["param_groups"])

        params = id_map(saved_groups, groups)  # checks the groups first
        cast = make_cast(optimizer, state_dict["param_groups"])
        state = cast.cast_state(cast.saved_state(state_dict), params)
        cast.report.unused_patterns = cast.policy.unused()
        cast.report.missing = missing_indices(state, groups, len(cast.report.unexpected))
        cast.report.renamed = other_names(groups, saved_groups)

        new_groups = [
            update_group(group, cast.group(index, group, saved))
            for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True))
        ]
        try:
            commit(optimizer, cast, {"state": state, "param_groups": new_groups})
        except Exception as error:
            note_odd_entries(error, state, params, groups)
            raise

    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)

    cast.report.seconds = time.perf_counter() - started
    return cast.report


def deepcopied(saved_groups: Any) -> Any:
    """A deep copy of the groups, but for lists of ids that are atoms: a copy of each would cost more than all the rest.

    Such a list is shared instead: it is only read, and does not get into the optimizer.
    """
    memo: dict[int, Any] = {}
    if type(saved_groups) is list:
        for group in saved_groups:
            ids = group.get("params") if type(group) is dict else None
            if type(ids) is list and {int, str}.issuperset(map(type, ids)):
                memo[id(ids)] = ids
    return copying.deepcopy(saved_groups, memo)


def check_groups(saved_groups: Sequence[Group], groups: Sequence[Group]) -> None:
    """Raise torch's ValueError where the numbers of groups, or of parameters in a group, differ."""
    if len(groups) != len(saved_groups):
        mismatch = ValueError("loaded state dict has a different number of parameter groups")
        mismatch.add_note(f"param groups: {len(saved_groups)} saved, {len(groups)} in the optimizer")
        raise mismatch
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        try:
            size, saved_size = len(group["params"]), len(saved["params"])
        except Exception as error:
            error.add_note(f"in param group {index}")
            raise
        if size != saved_size:
            mismatch = ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
            )
            mismatch.add_note(f"parameters of group {index}: {saved_size} saved, {size} in the optimizer")
            raise mismatch


def id_map(saved_groups: Sequence[Group], groups: Sequence[Group]) -> dict[Any, torch.Tensor]:
    """Map each saved id to the parameter that stands in its place, over all groups in order.

    Args:
        saved_groups: `state_dict["param_groups"]`, whose `"params"` are ids of any hashable type.
        groups: `optimizer.param_groups`, of the same sizes.

    Returns:
        Saved id -> parameter; for an id that stands twice, the last parameter.

    Raises:
        ValueError: the groups differ in number or size.
        TypeError: an id is not hashable.
    """
    check_groups(saved_groups, groups)
    saved_lists = [saved["params"] for saved in saved_groups]
    try:
        return current().id_map(saved_lists, [group["params"] for group in groups])
    except TypeError as error:
        odd = [(index, key) for index, ids in enumerate(saved_lists) for key in ids if not isinstance(key, Hashable)]
        error.add_note("".join(f"saved id {key!r} in param group {index}" for index, key in odd[:1]))
        raise


def other_names(groups: Sequence[Group], saved_groups: Sequence[Group]) -> list[tuple[int, str, str]]:
    """Index, name and saved name of each parameter that was saved under another name, where both sides have names.

    torch goes by place and takes the saved names over, so that nothing tells of it afterwards.
    """
    found: list[tuple[int, str, str]] = []
    first = 0
    for group, saved in zip(groups, saved_groups, strict=True):
        names, saved_names = group.get("param_names"), saved.get("param_names")
        if isinstance(names, list) and isinstance(saved_names, list) and names != saved_names:
            pairs = enumerate(zip(names, saved_names, strict=False), first)
            found += [(index, name, saved_name) for index, (name, saved_name) in pairs if name != saved_name]
        first += len(group["params"])
    return found


def update_group(group: Group, saved_group: Group) -> Group:
    """The saved group, holding the optimizer's own list of parameters."""
    saved_group["params"] = group["params"]
    if "param_names" in group and "param_names" not in saved_group:
        saved_group["param_names"] = group["param_names"]
    return saved_group


def commit(optimizer: Optimizer, cast: Cast, loaded: dict[str, Any]) -> None:
    """Hand what was loaded over to the optimizer; where that fails, it gets back what it had."""
    before = dict(vars(optimizer))
    try:
        cast.commit()
        cast.check_source()
        optimizer.__setstate__(loaded)
    except BaseException as error:
        optimizer.__dict__ = before
        cast.note_failure(error)
        raise


def missing_indices(state: State, groups: Sequence[Group], kept: int) -> list[int]:
    """Indices of the parameters that got no state; `kept` entries of the state belong to none."""
    if len(state) - kept == sum(len(group["params"]) for group in groups):
        return []
    everyone = (param for group in groups for param in group["params"])
    return [index for index, param in enumerate(everyone) if param not in state]
