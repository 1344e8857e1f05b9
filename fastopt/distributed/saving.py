"""An optimizer's state into a folder of torch.distributed.checkpoint, by all ranks."""

import os
from concurrent.futures import Future
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.optim import Optimizer

from fastopt.background import in_background, in_turn, raise_unasked
from fastopt.distributed.names import StateDict, state_dict
from fastopt.distributed.planner import KnownPlaces
from fastopt.distributed.ranks import RanksError, agreed, described, is_distributed
from fastopt.distributed.staging import staged
from fastopt.distributed.writer import FastWriter
from fastopt.errors import check_bools
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


def async_save(
    optimizer: Optimizer,
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    *,
    keep: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> Future[None]:
    """Save as `save` does, in the background, and return as soon as there is a copy of the state.

    All ranks call it, in the same order. Training waits for the copy alone, see Note [Staging]; the ranks then talk to
    each other through a gloo group that is made for it once, so that they may train through others meanwhile. One
    optimizer has at most one copy: where its previous save is not done, this one waits for it first. What
    `fastopt.save` says of saves in the background, of their order and of the end of the process, holds for these as
    well; process groups must not be destroyed before they are done.

    Args:
        optimizer: the optimizer.
        model: what names the parameters.
        path: the folder.
        keep: whether the memory of the copy is kept for the next save of this optimizer, which is several times as
            fast then; it is as much as this rank's part of the state, and goes with the optimizer.
        process_group: the ranks that save; None for all.

    Returns:
        A Future that is done when the checkpoint is there. Its `result()` raises RanksError, on every rank, if
        something failed on some rank.

    Raises:
        RanksError: a state cannot be saved on some rank, as `state_dict` or `save` say.
        BackgroundSaveError: an earlier save in the background has failed, and nobody has asked its Future; this one
            goes on.
    """
    check_bools(keep=keep)
    place = os.path.abspath(os.fspath(path))  # the process may be elsewhere when it is written
    doing = f"the save to {os.fspath(path)}"
    group = background_group(process_group)

    def take() -> StateDict:  # in this thread, and so not in the group of the other
        return agreed(process_group, doing, lambda: staged(optimizer, readable(state_dict(optimizer, model)), keep))

    future = in_background(optimizer, place, take, partial(write, path=place, group=group))
    raise_unasked(f"{doing} goes on in the background", future)
    return future


groups: "WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]" = WeakKeyDictionary()
"""The groups of saves in the background, by those that training has."""


def background_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A gloo group of the same ranks; None without torch.distributed."""
    if not is_distributed():
        return None
    own = dist.group.WORLD if group is None else group
    assert own is not None
    if own not in groups:
        ranks = dist.get_process_group_ranks(own)
        groups[own] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return groups[own]


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
        _save_state_dict(content, FastWriter(path), group, no_dist=not is_distributed(), planner=KnownPlaces())
    except CheckpointException as error:
        failures = {rank: described(failure) for rank, (failure, _) in error.failures.items()}
        raise RanksError(f"the save to {os.fspath(path)}", failures) from error
