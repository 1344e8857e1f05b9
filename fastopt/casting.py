"""What becomes of one saved value: the cast policy of the reference, for tensors in containers of any kind.

The reference is `cast(param, value)` within `torch.optim.Optimizer.load_state_dict`, and
`Optimizer._process_value_according_to_param_policy`.
"""

import copy as copying
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.audit import AuditCount, audited
from fastopt.backends import current, python
from fastopt.backends.interface import Backend, Group, State
from fastopt.chunked import ChunkedTensor, plain
from fastopt.containers import is_leaf, rebuilt
from fastopt.dtensors import local
from fastopt.errors import describe_parameter, describe_tensor
from fastopt.policy import Policy
from fastopt.report import LoadReport


class Cast:
    """Turns values of a saved state into values of the optimizer: `cast(param, value)` of the reference.

    The native backend does the same for plain tensors in plain dicts, and asks here for everything else.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        saved_groups: list[Group],
        *,
        copy: bool,
        policy: Policy | None = None,
        audit: bool = False,
        reads_files: bool = False,
    ) -> None:
        self.groups: Sequence[Group] = optimizer.param_groups
        self.saved_groups = saved_groups
        self.memo: dict[int, Any] | None = {} if copy else None
        self.hosted_on_device = ids_with_step_on_device(saved_groups)
        self.policy = policy or Policy()
        self.policy_stands = is_torchs_own(Optimizer._process_value_according_to_param_policy)
        self.backend: Backend = current() if self.policy_stands else python
        self.rule_of = None if self.policy.is_reference else self.policy.rule
        self.audits = audit
        self.gives = False
        self.doing = "loading"
        # A hook may have changed what the mapping holds, and the file knows nothing of that.
        self.reads_files = reads_files and not optimizer._optimizer_load_state_dict_pre_hooks
        self.check_source: Callable[[], None] = lambda: None
        """Raises where what the values were read from has changed meanwhile."""
        self.report = LoadReport(self.backend.name, audit={} if audit else None)

    def saved_state(self, state_dict: Any) -> Any:
        """What of the dict `cast_state` is given."""
        return state_dict["state"]

    def cast_state(self, saved_state: Any, params: dict[Any, torch.Tensor]) -> State:
        """The optimizer's new state; `params` are the parameters by saved id."""
        return self.backend.cast_state(saved_state, params, self)

    def entry(self, param: torch.Tensor, value: Any, saved_id: Any, key: Any = None, state_key: Any = None) -> Any:
        """The whole state of a parameter, or the value under `key` within what stands under `state_key`."""
        try:
            return self(param, value, saved_id, key, state_key)
        except Exception as error:
            error.add_note(f"while {self.doing} the state of {describe_parameter(param, saved_id, self.groups)}")
            raise

    def __call__(self, param: torch.Tensor, value: Any, saved_id: Any, key: Any = None, state_key: Any = None) -> Any:
        """Cast a value of any type; containers are rebuilt around the values they hold.

        `key` is the value's own, `state_key` that of the parameter's state which the value stands under, at any depth.
        """
        if isinstance(value, torch.Tensor):
            return self.tensor(param, value, saved_id, key, state_key)
        if isinstance(value, dict):
            return {
                self.keep(k): self(param, v, saved_id, k, k if state_key is None else state_key)
                for k, v in value.items()
            }
        if is_leaf(value):
            return self.keep(value)
        if isinstance(value, Iterable):
            # Items have no key, not even that of their container: a "step" in a list is cast like any tensor.
            return rebuilt(value, (self(param, item, saved_id, None, state_key) for item in value))
        return self.keep(value)

    def tensor(self, param: torch.Tensor, value: torch.Tensor, saved_id: Any, key: Any, state_key: Any) -> torch.Tensor:
        """Cast a tensor to the dtype and device that its parameter and its key ask for."""
        try:
            if not self.policy_stands and self.policy.is_reference:
                result = self.tensor_by_patched_policy(param, value, saved_id, key)
            else:
                rule = self.policy.rule(state_key, is_step=isinstance(key, str) and key == "step")
                result = self.to(value, rule.options(param, value, saved_id in self.hosted_on_device))
            if self.audits and result.dtype != value.dtype:
                self.report.add_audit(state_key, value.dtype, result.dtype, audited(plain(value), result))
            return result
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
        subclass, a sparse index) or through the graph. A chunked tensor has no memory to share.
        """
        source = value
        copied_before = self.memo is not None and id(value) in self.memo
        if self.memo is not None and not (is_plain(value) or isinstance(value, ChunkedTensor)):
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

    def group(self, index: int, group: Group, saved_group: Group) -> Group:
        """The hyperparameters of a new group: the saved ones, which are our own copy."""
        return saved_group

    def commit(self) -> None:
        """Do what could not be done before all values were known to be in order."""

    def note_failure(self, error: BaseException) -> None:
        """Add to an error of the commit what it leaves behind: nothing here."""

    def count(self, casts: Sequence[tuple[torch.dtype, torch.dtype, int, int, int]], copied: int, shared: int) -> None:
        """Add to the report what a backend did by itself."""
        for source, target, tensors, read, written in casts:
            self.report.add(source, target, tensors, read, written)
        self.report.copied += copied
        self.report.shared += shared

    def count_audits(self, audits: Sequence[tuple[Any, ...]]) -> None:
        """Add to the report what a backend audited by itself."""
        for state_key, source, target, *counts in audits:
            self.report.add_audit(state_key, source, target, AuditCount(*counts))

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


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the result of a cast surely shares nothing with the tensor it was made from."""
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements, where it has any in memory; of a DTensor's that are in this process."""
    tensor = local(tensor)
    if tensor.layout is not torch.strided or tensor.is_meta:
        return 0
    return tensor.numel() * tensor.element_size()


def is_torchs_own(function: Any) -> bool:
    """Whether this is torch's own cast policy, and not one that somebody put in its place.

    Judged by the module it was compiled in: a wrapper may borrow the name, but not the globals.
    """
    return getattr(function, "__globals__", None) is vars(sys.modules[Optimizer.__module__])
