"""Which dtype and which device a tensor of a saved state gets.

The reference is `Optimizer._process_value_according_to_param_policy` of torch; the rest is what a caller asks for.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

DTypes = str | torch.dtype | Mapping[str, str | torch.dtype]
Devices = str | int | torch.device | Mapping[str, str | int | torch.device]

DTYPE_RULES = ("reference", "keep", "float-only")


class Rule(NamedTuple):
    """What holds under one key of a parameter's state."""

    dtype: str | torch.dtype
    """One of `DTYPE_RULES`, `"step"`, or the dtype for floating tensors."""
    device: str | torch.device
    """`"param"`, `"keep"`, `"step"`, or the device."""

    def options(self, param: torch.Tensor, value: torch.Tensor, hosted: bool) -> dict[str, Any]:
        """The arguments of `value.to()`. `hosted`: whether the parameter's group wants `step` on its device."""
        dtype, device = self.dtype_of(param, value, hosted), self.device_of(param, hosted)
        options: dict[str, Any] = {}
        if dtype is not None:
            options["dtype"] = dtype
        if device is not None:
            options["device"] = device
        return options

    def dtype_of(self, param: torch.Tensor, value: torch.Tensor, hosted: bool) -> torch.dtype | None:
        """The dtype a tensor is cast to; None leaves it as it was saved."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype if value.is_floating_point() else None
        if self.dtype == "step":
            return torch.float32 if hosted else None
        casts = self.dtype == "reference" or (self.dtype == "float-only" and value.is_floating_point())
        return param.dtype if casts and param.is_floating_point() else None

    def device_of(self, param: torch.Tensor, hosted: bool) -> torch.device | None:
        """The device a tensor moves to; None leaves it where it is."""
        if isinstance(self.device, torch.device):
            return self.device
        return param.device if self.device == "param" or (self.device == "step" and hosted) else None


class Policy:
    """The rules of one load, by the key that a tensor stands under in its parameter's state.

    A key's own name comes before patterns (`fnmatch`), and those hold in the order they are given in. `step` counts on
    in full precision whatever the patterns say, as in low precision it stops counting
    (https://github.com/pytorch/pytorch/issues/74424): its rule is the reference's unless `"step"` itself is named.
    """

    def __init__(self, dtypes: DTypes | None = None, devices: Devices = "param") -> None:
        self.dtypes = by_pattern("policy", {} if dtypes is None else dtypes, checked_dtype)
        self.devices = by_pattern("device", devices, checked_device)
        self.is_reference = dtypes is None and isinstance(devices, str) and devices == "param"
        self.rules: dict[Any, Rule] = {}
        self.step = Rule(self.dtypes.get("step", "step"), self.devices.get("step", "step"))
        self.used: set[str] = set()

    def rule(self, state_key: Any, is_step: bool) -> Rule:
        """The rule for a tensor.

        Args:
            state_key: the key of the parameter's state that it stands under, at any depth; None where the state is no
                dict. What is no str is fitted by `"*"` alone.
            is_step: whether its own key is `"step"`.
        """
        if is_step:
            self.used.add("step")
            return self.step
        found = self.rules.get(state_key)
        if found is None:
            found = Rule(self.find(self.dtypes, state_key, "reference"), self.find(self.devices, state_key, "param"))
            self.rules[state_key] = found
        return found

    def find(self, patterns: Mapping[str, Any], key: Any, default: str) -> Any:
        """What the name itself says, or else the first pattern that fits."""
        named = isinstance(key, str)
        fitting = [p for p in patterns if p == "*" or (named and (p == key or fnmatchcase(key, p)))]
        fitting.sort(key=lambda pattern: pattern != key)
        self.used.update(fitting[:1])
        return patterns[fitting[0]] if fitting else default

    def unused(self) -> list[str]:
        """Patterns that no key of the state has needed, but for `"*"`: perhaps misspelled."""
        return [p for p in dict.fromkeys((*self.dtypes, *self.devices)) if p != "*" and p not in self.used]


def saving_policy(dtype: DTypes | None, device: str | int | torch.device = "keep") -> Policy:
    """The policy under which state leaves an optimizer: it keeps what it is, but for what is asked for.

    Args:
        dtype: a floating dtype for floating state other than `step`; None keeps the dtypes. Or a dict by key, as the
            `policy` of `load_state_dict`; keys that it does not fit keep theirs.
        device: for all state.
    """
    dtypes = by_pattern("dtype", {} if dtype is None else dtype, checked_dtype)
    policy = Policy({"step": "keep", **dtypes, "*": dtypes.get("*", "keep")}, {"*": device, "step": device})
    if "step" not in dtypes:
        policy.used.add("step")  # nobody has misspelled it
    return policy


def by_pattern(option: str, given: Any, checked: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Pattern -> checked rule; one rule for all where no mapping was given."""
    if not isinstance(given, Mapping):
        return {"*": checked(option, given)}
    for pattern in given:
        if not isinstance(pattern, str):
            raise TypeError(f"{option}: the pattern {pattern!r} is a {type(pattern).__name__}, not a str")
    return {pattern: checked(f"{option}[{pattern!r}]", value) for pattern, value in given.items()}


def checked_dtype(option: str, value: Any) -> str | torch.dtype:
    """A rule for dtypes, or an error that names the option."""
    if isinstance(value, torch.dtype):
        if not value.is_floating_point:
            raise ValueError(f"{option}: {value} is no floating dtype, and state cast to it would be destroyed")
        return value
    if not isinstance(value, str):
        raise TypeError(f"{option}: {value!r} is a {type(value).__name__}, not a torch.dtype or a str")
    if value not in DTYPE_RULES and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        raise ValueError(f"{option}: {value!r} is a str; pass torch.{value.removeprefix('torch.')}")
    if value not in DTYPE_RULES:
        raise ValueError(f"{option}: {value!r} is none of {', '.join(map(repr, DTYPE_RULES))}, and no torch.dtype")
    return value


def checked_device(option: str, value: Any) -> str | torch.device:
    """A rule for devices, or an error that names the option."""
    if isinstance(value, str) and value in ("param", "keep"):
        return value
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        error.add_note(f"{option}: {value!r} is neither 'param' nor 'keep', nor a device")
        raise
