"""States on their way into checkpoints, each in its turn."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from fastopt.background import in_turn, raise_unasked
from fastopt.files import formats
from fastopt.inspection.places import places
from fastopt.policy import DTypes
from fastopt.report import LoadReport, SaveReport
from fastopt.saving import DTypesById, with_dtypes
from fastopt.state_dict import StateDict, state_dict


class Ready(NamedTuple):
    """What is to be written."""

    started: float
    saved: StateDict
    dtypes: DTypesById | None
    """Those that tensors get while they are written."""
    report: LoadReport
    """The casts that are done, or are to be done then."""


def ready(optimizer: Optimizer, dtype: DTypes | None) -> Ready:
    """The live state of an optimizer."""
    started = time.perf_counter()
    saved = state_dict(optimizer)
    if dtype is None:
        return Ready(started, saved, None, LoadReport(""))
    return Ready(started, *with_dtypes(optimizer, saved, dtype))


def write_in_turn(path: str | os.PathLike[str], take: Callable[[], Ready]) -> SaveReport:
    """Write a state here and now, after all saves to the path that were asked for before.

    Args:
        path: the checkpoint.
        take: returns the state.

    Raises:
        BackgroundSaveError: an earlier save has failed, and nobody has asked about it; this one is done.
        Exception: what `formats.write` raises.
    """
    with in_turn(path):
        report = write_ready(path, path, take())
    raise_unasked(f"the save to {os.fspath(path)} is done")
    return report


def write_ready(path: str | os.PathLike[str], place: str | os.PathLike[str], what: Ready) -> SaveReport:
    """Write what is to be written; `path` is what the user calls the place."""
    formats.write(place, what.saved, what.dtypes)
    seconds = time.perf_counter() - what.started
    casts = {pair: count for pair, count in what.report.casts.items() if pair[0] != pair[1]}
    tensors = count_tensors(what.saved["state"])
    return SaveReport(os.fspath(path), tensors, formats.size_of(place), seconds, casts, what.report.unused_patterns)


def count_tensors(value: Any) -> int:
    """Tensors in a value, which may be one or a container of any kind."""
    if isinstance(value, torch.Tensor):
        return 1
    if type(value) is dict:
        return sum(map(count_tensors, value.values()))
    return sum(isinstance(place.value, torch.Tensor) for place in places(value))
