"""An optimizer's state out of a folder of torch.distributed.checkpoint, whoever wrote it on however many ranks."""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from fastopt.background import await_saves
from fastopt.collector import paused_collector
from fastopt.distributed.boxes import read_boxes
from fastopt.distributed.contents import for_optimizer, saved_state
from fastopt.distributed.ranks import agreed
from fastopt.distributed.sharing import Deal
from fastopt.distributed.targets import Target, held_targets, new_targets, slots
from fastopt.errors import check_bools
from fastopt.files import dcp_metadata
from fastopt.files.torch_file import SafeGlobal
from fastopt.report import LoadReport
from fastopt.state_dict import load_state_dict


def load(
    optimizer: Optimizer,
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    inplace: bool = False,
    safe_globals: Iterable[SafeGlobal] = (),
    process_group: dist.ProcessGroup | None = None,
) -> LoadReport:
    """Load the state of an optimizer from a folder of torch.distributed.checkpoint, on all ranks together.

    fastopt or torch has written it, on any number of ranks and with any placements. Each rank reads what its parts of
    the parameters need, and no more, and casts it to their dtypes while it is read, so that no more memory is taken
    than that of the new state. The optimizer need not have a state before, and takes no step.

    Args:
        optimizer: the optimizer. What was saved in the shape of a parameter that is a DTensor is placed as that is; all
            else, as `step`, is a plain tensor on every rank.
        model: what names the parameters, as in `state_dict`.
        path: the folder, which all ranks see.
        key: where in the checkpoint the state dict is, as `"optimizer"` of `{"model": …, "optimizer": …}`; None: it is
            all of it. It may be `get_optimizer_state_dict`'s, flattened or not, or the optimizer's own, with ids, which
            are taken to count the same parameters here.
        inplace: whether the values of the state go into the tensors that the optimizer holds, which keep their dtypes.
            After an error while they are read they hold anything.
        safe_globals: classes and functions that the folder may name, as in `fastopt.load`.
        process_group: the ranks that load, all of which call this; None for all.

    Returns:
        What was loaded into this rank's optimizer.

    Raises:
        RanksError: something failed on some rank: a file is missing, cut short or damaged, a parameter was not saved,
            its shape is another. Every rank raises it, with file and entry or parameter. All optimizers are as they
            were, but for `inplace`.
        BackgroundSaveError: what this process was to save to the path in the background could not be.
    """
    check_bools(inplace=inplace)
    await_saves(path)
    started = time.perf_counter()
    folder, allowed = Path(path), list(safe_globals)
    doing = f"the load from {os.fspath(path)}"

    def plan() -> tuple[dict[str, Any], list[Target]]:
        with paused_collector():
            saved = saved_state(folder, dcp_metadata.read(folder, allowed), key, allowed)
            loaded, params = for_optimizer(saved, optimizer, model)
            found = [slot for number, entry in loaded["state"].items() for slot in slots(entry, params[number])]
            return loaded, held_targets(found, optimizer.state) if inplace else new_targets(found)

    loaded, targets = agreed(process_group, doing, plan)
    deal = Deal(process_group, targets)
    agreed(process_group, doing, lambda: read_boxes(folder, (box for target in deal.own for box in target.boxes())))
    deal.hand_round()
    report = agreed(process_group, doing, lambda: load_state_dict(optimizer, loaded, copy=False, inplace=inplace))
    count(report, targets, inplace)
    report.seconds = time.perf_counter() - started
    return report


def count(report: LoadReport, targets: list[Target], inplace: bool) -> None:
    """Make a report one of what was read, in place of what became of it afterwards."""
    report.shared, report.copied, report.casts = report.tensors - len(targets), 0, {}
    report.filled = len(targets) if inplace else 0
    for target in targets:
        saved, held, elements = target.stored.entry.dtype, target.memory.dtype, target.memory.numel()
        report.add(saved, held, 1, elements * saved.itemsize, elements * held.itemsize)
        report.copied += saved == held
