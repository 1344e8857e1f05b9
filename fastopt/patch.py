"""fastopt as a drop-in: `torch.optim.Optimizer`'s own methods, replaced at class level.

Every optimizer of the process goes through them, those of trainers included, and so does a subclass that overrides a
method and calls `super()`. No optimizer object is touched, so pickling and copying one works as ever.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from fastopt.casting import Cast
from fastopt.errors import check_bools
from fastopt.state_dict import load
from fastopt.state_dict import state_dict as fast_state_dict

METHODS = ("state_dict", "load_state_dict")


@dataclass(frozen=True)
class _Installed:
    copy: bool


_lock = threading.RLock()
_installed: _Installed | None = None
_replaced: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""By name: our method, and the one it stands for. Ours is known by identity, as a wrapper would copy any mark on it."""


def _replacement(original: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs `fast` while fastopt is installed, and `original` for whoever holds on to it longer."""

    # Like torch's methods, not for dynamo to trace; the decorator loads dynamo only when it is called. The parameters
    # keep torch's names, as torch.distributed.checkpoint binds them by keyword.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if _installed is None else fast(*args, **kwargs)

    return method


def _state_dict(self: Optimizer) -> dict[str, Any]:
    return fast_state_dict(self)


def _load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
    load(self, state_dict, functools.partial(Cast, copy=_installed is not None and _installed.copy))


_FAST: dict[str, Callable[..., Any]] = {"state_dict": _state_dict, "load_state_dict": _load_state_dict}


def install(*, copy: bool = False) -> None:
    """Make every optimizer of the process save and load through fastopt.

    Installing again only changes `copy`.

    Args:
        copy: as for `fastopt.load_state_dict`. The default takes tensors that need no cast over as they are, as torch
            does.
    """
    _set(_Installed(copy))


def uninstall() -> None:
    """Give torch's own methods back. Without effect where fastopt is not installed."""
    _set(None)


@contextlib.contextmanager
def installed(*, copy: bool = False) -> Iterator[None]:
    """Install fastopt for a block, and restore afterwards what was before; blocks nest.

    The whole process is affected meanwhile, other threads included.
    """
    before = _installed
    _set(_Installed(copy))
    try:
        yield
    finally:
        _set(before)


def _set(wanted: _Installed | None) -> None:
    global _installed
    if wanted is not None:
        check_bools(copy=wanted.copy)
    with _lock:
        for name in METHODS:
            method = getattr(Optimizer, name)
            ours, original = _replaced.get(name, (None, None))
            if wanted is not None and method is not ours:
                _replaced[name] = _replacement(method, _FAST[name]), method
                setattr(Optimizer, name, _replaced[name][0])
            elif wanted is None and method is ours:
                setattr(Optimizer, name, original)
        _installed = wanted
