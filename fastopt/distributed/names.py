"""An optimizer's state by the names of its parameters, as torch.distributed.checkpoint.state_dict has it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from fastopt.errors import describe_tensor
from fastopt.state_dict import state_dict as by_index

StateDict = dict[str, Any]


def state_dict(optimizer: Optimizer, model: torch.nn.Module) -> StateDict:
    """Return the state of an optimizer with the names of its parameters in place of their indices.

    It is what `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer)` returns, and goes
    where that goes, but for one thing: torch lets an optimizer without a state take a step first, with gradients of
    zero, to have one. Here such an optimizer has an empty state.

    Args:
        optimizer: the optimizer; its hooks of saving run.
        model: what names the parameters: sharded by `fully_shard`, in parallel by tensors, in DistributedDataParallel,
            compiled, or none of that. The names are those that it had without.

    Returns:
        `"state"`, by name, the live state of each parameter, whose tensors are the optimizer's own, and
        `"param_groups"`, whose `"params"` are names.

    Raises:
        ValueError: a parameter of the optimizer is none of the model's.
        TypeError: the model is a FullyShardedDataParallel, whose flat parameters only torch can name.
    """
    packed = by_index(optimizer)
    names = names_by_index(optimizer, model)
    state = {names[index]: entry for index, entry in packed["state"].items()}
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in packed["param_groups"]]
    return {**packed, "state": state, "param_groups": groups}


def names_by_index(optimizer: Optimizer, model: torch.nn.Module) -> dict[int, str]:
    """The first name of each of an optimizer's parameters, by the index that a state dict has for it."""
    names = names_of(model)
    found: dict[int, str] = {}
    for index, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        if param not in names:
            raise ValueError(f"parameter {index} of the optimizer ({describe_tensor(param)}) is none of the model's")
        found[index] = names[param][0]
    return found


def names_of(model: torch.nn.Module) -> dict[torch.Tensor, list[str]]:
    """All names of each parameter; the first is the one that it is saved by."""
    refuse_flat_parameters(model)
    names: dict[torch.Tensor, list[str]] = {}
    for param, name in named(model):
        names.setdefault(param, []).append(name)
    return names


def named(model: torch.nn.Module) -> Iterator[tuple[torch.Tensor, str]]:
    """Parameters under each name that they have, without what wrappers have put into it."""
    for key, param in model.named_parameters(remove_duplicate=False):
        for name in _get_fqns(model, key):
            yield param, name


def refuse_flat_parameters(model: torch.nn.Module) -> None:
    """Raise for a model whose parameters are pieces of flat ones."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise TypeError(
            "the model is a FullyShardedDataParallel (FSDP1), whose flat parameters only torch can name: shard it with "
            "fully_shard, or give FastWriter and FastReader to torch's own dcp.save and dcp.load"
        )
