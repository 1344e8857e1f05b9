"""torch.distributed.checkpoint's way to load an optimizer's state, which goes by the parameters' names."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

from benchmarks.optimizers import LoadWork
from benchmarks.question import Contender, Size


def by_names(work: LoadWork) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A module with the optimizer's parameters, and the state under their names."""
    [group] = work.optimizer.param_groups
    module = torch.nn.Module()
    names = [f"parameter_{index}" for index in range(len(group["params"]))]
    for name, param in zip(names, group["params"], strict=True):
        module.register_parameter(name, param)
    [saved_group] = work.state_dict["param_groups"]
    entries = work.state_dict["state"]
    return module, {
        "state": {name: entries[saved_id] for name, saved_id in zip(names, saved_group["params"], strict=True)},
        "param_groups": [saved_group | {"params": names}],
    }


def prepare(work: LoadWork) -> Callable[[], object]:
    module, state_dict = by_names(work)
    return partial(
        set_optimizer_state_dict, module, work.optimizer, state_dict, options=StateDictOptions(full_state_dict=True)
    )


def rounds(size: Size, rounds: int) -> int:
    """Not for the model whose state it would not have room to make by a step of its own, as it does first."""
    return 0 if size["model"] == "Llama 1B" else rounds


DCP_LOADER = Contender("DCP set_optimizer_state_dict", prepare, rounds=rounds)
