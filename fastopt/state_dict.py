"""What `state_dict` and `load_state_dict` mean, in the order of the reference.

The reference is `torch.optim.Optimizer` of the installed torch. A reader who has its source, or the original
description of the algorithm, open beside this file finds every step of it here, in the same order:

    hooks -> check groups -> id map -> cast the state -> update the groups -> __setstate__ -> hooks

The optimizer changes in `__setstate__` and not before: whatever fails earlier leaves it as it was.
"""

import collections
import copy as copying
import sys
import time
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.backends import current, python
from fastopt.backends.interface import Backend, Group, State
from fastopt.collector import paused_collector
from fastopt.errors import describe_parameter, describe_tensor, note_wrong_arguments
from fastopt.report import LoadReport

StateDict = dict[str, Any]


def state_dict(optimizer: Optimizer) -> StateDict:
    """Return the optimizer's state as `torch.optim.Optimizer.state_dict` does, in linear time with a small constant.

    Returns:
        A dict of two entries. `"state"` holds, by index, the live state of each parameter: the inner dicts and their
        tensors are the optimizer's own, not copies. `"param_groups"` holds each group's hyperparameters and, in place
        of its parameters, their indices, which run on over the groups.

    Raises:
        KeyError: the state has a tensor for a key that stands in no group.
    """
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)

    groups = optimizer.param_groups
    index_lists, packed_state = current().index_state([group["params"] for group in groups], optimizer.state)
    packed_groups = [pack_group(group, indices) for group, indices in zip(groups, index_lists, strict=True)]
    result: StateDict = {"state": packed_state, "param_groups": packed_groups}

    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        hook_result = post_hook(optimizer, result)
        if hook_result is not None:
            result = hook_result
    return result


def pack_group(group: Group, indices: list[int]) -> Group:
    """A group as it is saved: indices instead of parameters, as the last entry."""
    packed = {key: value for key, value in group.items() if key != "params"}
    packed["params"] = indices
    return packed


def load_state_dict(optimizer: Optimizer, state_dict: StateDict, *, copy: bool = True) -> LoadReport:
    """Load a state into an optimizer as `torch.optim.Optimizer.load_state_dict` does.

    Floating state is cast to the dtype of its parameter, all state moves to the device of its parameter; `step` stays
    as it was saved unless its group is `capturable` or `fused`.

    Args:
        optimizer: the optimizer to fill. Its groups go on holding the very same parameters.
        state_dict: what `state_dict` returned, with as many groups and parameters as the optimizer has. Not changed.
        copy: whether a tensor that needs no cast is copied. True: the optimizer shares no memory with `state_dict`, as
            if it had been deep-copied first. False: it takes over the same tensor objects, as torch does.

    Returns:
        What was cast, copied, shared, missing and unexpected.

    Raises:
        ValueError: the number of groups, or the size of one, differs.
        KeyError: `"state"`, `"param_groups"` or a group's `"params"` is missing.
        Exception: whatever torch raises for a value that it cannot cast, with a note that names parameter and key.

    After any error but one of the optimizer's own `__setstate__` or of a post-hook, the optimizer is as it was.
    """
    if isinstance(optimizer, Optimizer) and type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        warnings.warn(
            f"{type(optimizer).__qualname__} has a load_state_dict of its own, which fastopt.load_state_dict does not "
            "call; use fastopt.install() and the optimizer's own method to go through it",
            stacklevel=2,
        )
    try:
        return load(optimizer, state_dict, copy=copy)
    except Exception as error:
        note_wrong_arguments(error, optimizer, state_dict)
        raise


def load(optimizer: Optimizer, state_dict: StateDict, *, copy: bool) -> LoadReport:
    """`load_state_dict` for callers that know which method of the optimizer they stand for."""
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
        cast = Cast(groups, state_dict["param_groups"], copy)
        state = cast.backend.cast_state(state_dict["state"], params, cast)
        cast.report.missing = missing_indices(state, groups, len(cast.report.unexpected))

        new_groups = [update_group(group, saved) for group, saved in zip(groups, saved_groups, strict=True)]
        optimizer.__setstate__({"state": state, "param_groups": new_groups})

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


def update_group(group: Group, saved_group: Group) -> Group:
    """The saved group, holding the optimizer's own list of parameters."""
    saved_group["params"] = group["params"]
    if "param_names" in group and "param_names" not in saved_group:
        saved_group["param_names"] = group["param_names"]
    return saved_group


class Cast:
    """Turns values of a saved state into values of the optimizer: `cast(param, value)` of the reference.

    The native backend does the same for plain tensors in plain dicts, and asks here for everything else.
    """

    def __init__(self, groups: Sequence[Group], saved_groups: list[Group], copy: bool) -> None:
        self.groups = groups
        self.saved_groups = saved_groups
        self.memo: dict[int, Any] | None = {} if copy else None
        self.hosted_on_device = ids_with_step_on_device(saved_groups)
        self.policy_stands = is_torchs_own(Optimizer._process_value_according_to_param_policy)
        self.backend: Backend = current() if self.policy_stands else python
        self.report = LoadReport(self.backend.name)

    def entry(self, param: torch.Tensor, value: Any, saved_id: Any, key: Any = None) -> Any:
        """The whole state of a parameter, or its value under `key`."""
        try:
            return self(param, value, saved_id, key)
        except Exception as error:
            error.add_note(f"while loading the state of {describe_parameter(param, saved_id, self.groups)}")
            raise

    def __call__(self, param: torch.Tensor, value: Any, saved_id: Any, key: Any = None) -> Any:
        """Cast a value of any type; containers are rebuilt around the values they hold."""
        if isinstance(value, torch.Tensor):
            return self.tensor(param, value, saved_id, key)
        if isinstance(value, dict):
            return {self.keep(k): self(param, v, saved_id, k) for k, v in value.items()}
        if is_leaf(value):
            return self.keep(value)
        if isinstance(value, Iterable):
            # Items have no key, not even that of their container: a "step" in a list is cast like any tensor.
            return rebuilt(value, (self(param, item, saved_id) for item in value))
        return self.keep(value)

    def tensor(self, param: torch.Tensor, value: torch.Tensor, saved_id: Any, key: Any) -> torch.Tensor:
        """Cast a tensor to the dtype and device that its parameter and its key ask for."""
        try:
            if not self.policy_stands:
                return self.tensor_by_patched_policy(param, value, saved_id, key)
            if key == "step":
                hosted = saved_id in self.hosted_on_device
                return self.to(value, {"dtype": torch.float32, "device": param.device} if hosted else {})
            if param.is_floating_point():
                return self.to(value, {"dtype": param.dtype, "device": param.device})
            return self.to(value, {"device": param.device})
        except Exception as error:
            place = "a value without a key" if key is None else f"key {key!r}"
            error.add_note(f"at {place}: {describe_tensor(value)}")
            raise

    def tensor_by_patched_policy(
        self, param: torch.Tensor, value: torch.Tensor, saved_id: Any, key: Any
    ) -> torch.Tensor:
        """Cast a tensor as a replacement of torch's own policy says."""
        source = self.keep(value)
        result = Optimizer._process_value_according_to_param_policy(param, source, saved_id, self.saved_groups, key)
        self.count_tensor(value, result, copied=result is source)
        return result

    def to(self, value: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """`value.to(**options)`, and never the dict's own memory where that must not be shared.

        What is cast is not copied first, unless it is of a kind that may share memory through a cast (a tensor
        subclass, a sparse index) or through the graph.
        """
        source = value
        copied_before = self.memo is not None and id(value) in self.memo
        if self.memo is not None and not is_plain(value):
            source = copying.deepcopy(value, self.memo)
        result = source.to(**options) if options else source
        unchanged = result is source
        if unchanged and source is value:
            result = self.keep(value)
        if not (unchanged and copied_before):
            self.count_tensor(value, result, copied=unchanged)
        return result

    def unclaimed(self, saved_id: Any, value: Any) -> Any:
        """The state under an id that belongs to no parameter: kept, for backward compatibility."""
        self.report.unexpected.append(saved_id)
        return self.keep(value)

    def keep(self, value: Any) -> Any:
        """A value that needs no cast: copied where nothing may be shared."""
        return value if self.memo is None else copying.deepcopy(value, self.memo)

    def count(self, casts: Sequence[tuple[torch.dtype, torch.dtype, int, int, int]], copied: int, shared: int) -> None:
        """Add to the report what a backend did by itself."""
        for source, target, tensors, read, written in casts:
            self.report.add(source, target, tensors, read, written)
        self.report.copied += copied
        self.report.shared += shared

    def count_tensor(self, value: torch.Tensor, result: torch.Tensor, copied: bool) -> None:
        """Add one tensor to the report."""
        if result is value:
            self.count([], 0, 1)
            return
        self.count([(value.dtype, result.dtype, 1, bytes_of(value), bytes_of(result))], int(copied), 0)
        self.report.emptied += result.is_meta and not value.is_meta


def ids_with_step_on_device(saved_groups: Sequence[Group]) -> set[Any]:
    """Saved ids whose group asks for `step` on the parameter's device; of several groups with an id, the first decides.

    Otherwise `step` is not cast, as in low precision it stops counting:
    https://github.com/pytorch/pytorch/issues/74424.
    """
    hosted: set[Any] = set()
    if not any(group.get("capturable", False) or group.get("fused", False) for group in saved_groups):
        return hosted
    seen: set[Any] = set()
    for group in saved_groups:
        ids = set(group["params"]) - seen
        seen |= ids
        if group.get("capturable", False) or group.get("fused", False):
            hosted |= ids
    return hosted


def is_leaf(value: Any) -> bool:
    """Whether a value is taken as it is although one could iterate over it.

    torch rebuilds these from their items as well, which turns a str into the text of a generator and raises for a range
    and a numpy array.
    """
    numpy = sys.modules.get("numpy")
    return isinstance(value, str | bytes | range) or (numpy is not None and isinstance(value, numpy.ndarray))


def rebuilt(value: Iterable[Any], items: Iterator[Any]) -> Any:
    """A container of the same type around other items."""
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(items)
    if isinstance(value, collections.deque):
        return type(value)(items, value.maxlen)
    return type(value)(items)  # type: ignore[call-arg]


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the result of a cast surely shares nothing with the tensor it was made from."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements, where it has any in memory."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return tensor.numel() * tensor.element_size()


def is_torchs_own(function: Any) -> bool:
    """Whether this is torch's own cast policy, and not one that somebody put in its place.

    Judged by the module it was compiled in: a wrapper may borrow the name, but not the globals.
    """
    return getattr(function, "__globals__", None) is vars(sys.modules[Optimizer.__module__])


def missing_indices(state: State, groups: Sequence[Group], kept: int) -> list[int]:
    """Indices of the parameters that got no state; `kept` entries of the state belong to none."""
    if len(state) - kept == sum(len(group["params"]) for group in groups):
        return []
    everyone = (param for group in groups for param in group["params"])
    return [index for index, param in enumerate(everyone) if param not in state]
