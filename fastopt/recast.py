"""Casting and moving the state that an optimizer holds: the `optimizer.to()` that torch does not have."""

import time

from torch.optim import Optimizer

from fastopt.casting import Cast
from fastopt.collector import paused_collector
from fastopt.errors import check_bools, optimizer_noted
from fastopt.policy import Devices, DTypes, Policy
from fastopt.report import LEFT, LoadReport
from fastopt.state_dict import id_map, packed


def to_device(optimizer: Optimizer, device: Devices = "param") -> LoadReport:
    """Move an optimizer's state, all tensors in one batch; the dtypes stay.

    `model.to(device)` moves the parameters and leaves the state behind, which the next step then fails on. The groups,
    their tensors among the hyperparameters included, stay as they are.

    Args:
        optimizer: the optimizer, after its model has moved. No hooks run.
        device: `"param"`: the device of each tensor's parameter. Or a device, or a dict by key of a parameter's state,
            as `device` of `load_state_dict` has it. `step` stays where it is, but goes to the parameter in groups that
            are `capturable` or `fused`, unless the dict names it.

    Returns:
        What was moved; tensors that are where they belong stay the same objects, and count as shared.

    Raises:
        ValueError: a tensor would go to the meta device, which holds no values.
        KeyError: the state has a tensor for a key that stands in no group.

    After an error the optimizer is as it was.
    """
    return recast(optimizer, Policy("keep", device), "device")


def cast_state(optimizer: Optimizer, policy: DTypes, *, audit: bool = False) -> LoadReport:
    """Cast an optimizer's state, all tensors in one batch; the devices stay.

    Args:
        optimizer: the optimizer. No hooks run.
        policy: `"reference"`: to the dtypes that `load_state_dict` would give, those of the parameters. Or a floating
            dtype for floating state, or a dict by key of a parameter's state, as `policy` of `load_state_dict` has it.
            `step` becomes float32 on its parameter's device in groups that are `capturable` or `fused` and else stays,
            unless the dict names it.
        audit: whether the casts are looked at, as in `load_state_dict`: what overflows, underflows, is rounded away.

    Returns:
        What was cast; tensors that need no cast stay the same objects, and count as shared.

    Raises:
        ValueError: `policy` has no such rule, or a dtype that is not floating.
        KeyError: the state has a tensor for a key that stands in no group.

    After an error the optimizer is as it was.
    """
    check_bools(audit=audit)
    return recast(optimizer, Policy(policy, "keep"), "policy", audit)


def recast(optimizer: Optimizer, policy: Policy, option: str, audit: bool = False) -> LoadReport:
    """Give the optimizer's state the dtypes and devices of a policy, which was given as `option`."""
    started = time.perf_counter()
    with paused_collector(), optimizer_noted(optimizer):
        live = packed(optimizer)
        cast = Cast(optimizer, live["param_groups"], copy=False, policy=policy, audit=audit)
        cast.doing, cast.report.done, cast.report.fate, cast.report.options = "recasting", "recast", LEFT, option
        state = cast.cast_state(live["state"], id_map(live["param_groups"], optimizer.param_groups))
        if cast.report.emptied:
            raise ValueError(f"{cast.report.emptied} tensors would go to the meta device, which holds no values")
        cast.report.unused_patterns = cast.policy.unused()
        optimizer.state = state
    cast.report.seconds = time.perf_counter() - started
    return cast.report
