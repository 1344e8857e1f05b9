"""The choice between the native and the pure-Python backend, made once at import and public.

FASTOPT_BACKEND=auto (default) takes the extension where it is there and warns where it is not: pip does not show what
a build had to say. `native` raises ImportError with the cause; `python` does without it. Empty is `auto`.
"""

import importlib.util
import os
import warnings
from dataclasses import dataclass

import torch
from torch.utils._device import DeviceContext

from fastopt.backends import python
from fastopt.backends.interface import Backend

CHOICES = ("auto", "native", "python")
HOW_TO_BUILD = (
    "to get it, install fastopt with a C++ compiler at hand: `pip install .` in its sources, which fails where the "
    "extension cannot be built if FASTOPT_BUILD=cpu is set"
)


@dataclass(frozen=True)
class BackendInfo:
    """What fastopt runs on. Prints as a few lines."""

    name: str
    """`"native"` or `"python"`."""
    reason: str
    """Why this one."""
    cpu_target: str | None
    """The instruction set of the CPU kernels; None without the extension."""
    cpu_targets: tuple[str, ...]
    """Those that this machine runs, best first; FASTOPT_CPU_TARGET chooses."""
    threads: int
    """`torch.get_num_threads()`, which the native backend obeys."""
    torch: str
    torch_cuda: str | None
    """The CUDA version that torch was built for."""
    extension_cuda: str | None
    """The CUDA version that the extension was built with."""

    def __str__(self) -> str:
        target = f"{self.cpu_target} (of {', '.join(self.cpu_targets)})" if self.cpu_target else "torch's own"
        return "\n".join(
            (
                f"backend         {self.name}: {self.reason}",
                f"CPU kernels     {target}",
                f"threads         {self.threads}",
                f"torch           {self.torch}, CUDA {self.torch_cuda or 'none'}",
                f"extension       CUDA {self.extension_cuda or 'none'}",
            )
        )


def backend() -> BackendInfo:
    """Say which backend is in use, why, and what it runs on."""
    targets: tuple[str, ...] = ()
    target = cuda = None
    if _chosen.name == "native":
        from fastopt import _C

        targets, target, cuda = tuple(_C.cpu_targets()), _C.cpu_target(), _C.build_info()["cuda"]
    return BackendInfo(
        name=_chosen.name,
        reason=_reason,
        cpu_target=target,
        cpu_targets=targets,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        extension_cuda=cuda,
    )


def current() -> Backend:
    """The backend for the call at hand: the chosen one, unless a mode wants to see torch's operations one by one."""
    return python if _torch_is_watched() else _chosen


def use(choice: str) -> None:
    """Choose a backend as FASTOPT_BACKEND does, from now on."""
    global _chosen, _reason
    _chosen, _reason = _choose(choice)


def _choose(choice: str) -> tuple[Backend, str]:
    if choice not in CHOICES:
        raise ValueError(f"FASTOPT_BACKEND={choice!r} is none of {', '.join(CHOICES)}")
    if choice == "python":
        return python, "FASTOPT_BACKEND=python"
    if importlib.util.find_spec("fastopt._C") is None:
        reason = "the extension was not built"
        if choice == "native":
            raise ImportError(f"FASTOPT_BACKEND=native, but {reason}; {HOW_TO_BUILD}", name="fastopt._C")
        warnings.warn(
            f"fastopt runs in pure Python, as {reason}; {HOW_TO_BUILD}; FASTOPT_BACKEND=python silences this",
            stacklevel=2,
        )
        return python, reason
    try:
        from fastopt.backends import native
    except ImportError as error:
        if choice == "native":
            raise
        warnings.warn(f"fastopt runs in pure Python, as its extension does not load: {error}", stacklevel=2)
        return python, f"the extension does not load: {error}"
    return native, "the extension is there" if choice == "auto" else "FASTOPT_BACKEND=native"


def _torch_is_watched() -> bool:
    # The default device is such a mode as well, but has no say in a copy or a cast.
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return torch._C._len_torch_dispatch_stack() > 0 or any(type(mode) is not DeviceContext for mode in modes)


_chosen, _reason = _choose(os.environ.get("FASTOPT_BACKEND") or "auto")
