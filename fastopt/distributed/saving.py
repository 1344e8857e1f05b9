"""An optimizer's state into a folder of torch.distributed.checkpoint, by all ranks."""

import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.optim import Optimizer

from fastopt.background import in_turn, raise_unasked
from fastopt.distributed.names import StateDict, state_dict
from fastopt.distributed.ranks import RanksError, agreed, described, is_distributed
from fastopt.distributed.writer import FastWriter
from fastopt.files.dcp_folder import as_saved
from fastopt.files.dcp_tree import leaves
from fastopt.files.torch_readable import check_readable


def save(
    optimizer: Optimizer,
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Save the state of an optimizer to a folder of torch.distributed.checkpoint, on all ranks together.

    The folder is what `dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=path)` would make it:
    `load` here and `dcp.load` read it, on any number of ranks. It is written through `FastWriter`, which says what
    becomes of a checkpoint that is there already. Unlike torch's, the optimizer takes no step if it has no state.

    Args:
        optimizer: the optimizer; its state must not change meanwhile.
        model: what names the parameters, as in `state_dict`.
        path: the folder, which all ranks see.
        process_group: the ranks that save, all of which call this; None for all.

    Raises:
        RanksError: something failed on some rank. Every rank raises it; a checkpoint that was there still is.
        BackgroundSaveError: an earlier save in the background has failed, and nobody has asked its Future; this one is
            done.
    """
    doing = f"the save to {os.fspath(path)}"
    with in_turn(path):
        write(agreed(process_group, doing, lambda: readable(state_dict(optimizer, model))), path, process_group)
    raise_unasked(f"{doing} is done")


def readable(content: StateDict) -> StateDict:
    """A state dict that a load will read.

    Raises:
        TypeError: `torch.load(weights_only=True)` would not read a value; the text says where.
    """
    check_readable((path, as_saved(value)) for path, value in leaves(content) if not isinstance(value, torch.Tensor))
    return content


def write(content: StateDict, path: str | os.PathLike[str], group: dist.ProcessGroup | None) -> None:
    """Write a state dict with all ranks of a group.

    Raises:
        RanksError: something failed on some rank.
    """
    try:
        _save_state_dict(content, FastWriter(path), group, no_dist=not is_distributed())
    except CheckpointException as error:
        failures = {rank: described(failure) for rank, (failure, _) in error.failures.items()}
        raise RanksError(f"the save to {os.fspath(path)}", failures) from error
