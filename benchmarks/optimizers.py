"""Optimizers and their saved states, built as AdamW has them after a step, and the ways to load them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

import fastopt
from benchmarks import floor
from benchmarks.question import Contender, Size, Work
from benchmarks.tensors import to_by_foreach_copy

STOCK = "stock torch"
LINEAR = "linear torch"
SHARING = "fastopt copy=False"
COPYING = "fastopt copy=True"
PYTHON = "fastopt python"

NATIVE_BACKEND = {"FASTOPT_BACKEND": "native"}
PYTHON_BACKEND = {"FASTOPT_BACKEND": "python"}


@dataclass(frozen=True)
class LoadWork(Work):
    optimizer: Optimizer
    """Without a state."""
    state_dict: dict[str, Any]

    @property
    def param_dtype(self) -> torch.dtype:
        return self.optimizer.param_groups[0]["params"][0].dtype  # type: ignore[no-any-return]

    def moments(self) -> list[torch.Tensor]:
        """The tensors that have to be cast."""
        entries = self.state_dict["state"].values()
        return [value for entry in entries for key, value in entry.items() if key != "step"]


Shape = tuple[int, ...]


def adamw(shapes: Sequence[Shape], dtype: torch.dtype) -> AdamW:
    return AdamW([torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes])


def adamw_entry(shape: Shape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state of one parameter."""
    return {
        "step": torch.tensor(1.0),
        "exp_avg": torch.full(shape, 1 / 3, dtype=dtype),
        "exp_avg_sq": torch.full(shape, 1 / 9, dtype=dtype),
    }


def load_work(parameters: int, elements: int, saved: str = "float32", param: str = "bfloat16") -> LoadWork:
    """A state saved in one dtype, for parameters of another."""
    return work_of_shapes([(elements,)] * parameters, saved, param)


def work_of_shapes(shapes: Sequence[Shape], saved: str, param: str) -> LoadWork:
    saved_dtype, param_dtype = getattr(torch, saved), getattr(torch, param)
    optimizer = adamw(shapes, param_dtype)
    state = {index: adamw_entry(shape, saved_dtype) for index, shape in enumerate(shapes)}
    for entry in state.values():
        for tensor in entry.values():
            tensor.untyped_storage()  # from then on it has a Python object, as every storage from torch.load
    moments = 2 * sum(map(prod, shapes))
    return LoadWork(
        bytes_read=moments * saved_dtype.itemsize,
        bytes_written=moments * param_dtype.itemsize,
        optimizer=optimizer,
        state_dict={"state": state, "param_groups": optimizer.state_dict()["param_groups"]},
    )


def linear_load_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """What torch could do: its own casts, one by one, without the search for every tensor's group."""
    groups, saved_groups = optimizer.param_groups, deepcopy(state_dict["param_groups"])
    saved_ids = chain.from_iterable(group["params"] for group in saved_groups)
    id_map = dict(zip(saved_ids, chain.from_iterable(group["params"] for group in groups), strict=True))
    state: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
    for saved_id, entry in state_dict["state"].items():
        param = id_map[saved_id]
        state[param] = {
            key: value if key == "step" else value.to(dtype=param.dtype, device=param.device)
            for key, value in entry.items()
        }
    new_groups = [{**saved, "params": group["params"]} for group, saved in zip(groups, saved_groups, strict=True)]
    optimizer.__setstate__({"state": state, "param_groups": new_groups})


def loader(
    name: str, load: Callable[[Optimizer, dict[str, Any]], object], environment: dict[str, str] | None = None
) -> Contender[LoadWork]:
    def prepare(work: LoadWork) -> Callable[[], object]:
        return partial(load, work.optimizer, work.state_dict)

    return Contender(name, prepare, environment or {})


def every_round(size: Size, rounds: int) -> int:
    return rounds


def stock_loader(rounds: Callable[[Size, int], int] = every_round) -> Contender[LoadWork]:
    """The reference, whose time grows with the square of the number of parameters."""
    return Contender(STOCK, loader(STOCK, Optimizer.load_state_dict).prepare, rounds=rounds)


def floor_fresh(work: LoadWork) -> Callable[[], object]:
    return floor.into_fresh_memory(work.moments(), work.param_dtype)


def floor_warm(work: LoadWork) -> Callable[[], object]:
    return floor.into_warm_memory(work.moments(), work.param_dtype)


def foreach_fresh(work: LoadWork) -> Callable[[], object]:
    return partial(to_by_foreach_copy, work.moments(), work.param_dtype)


FOREACH_FRESH = Contender("torch._foreach_copy_, fresh", foreach_fresh)
FLOOR_FRESH = Contender("floor, fresh", floor_fresh)
FLOOR_WARM = Contender("floor, warm", floor_warm)
LINEAR_LOADER = loader(LINEAR, linear_load_state_dict)
FASTOPT_LOADERS = (
    loader(SHARING, partial(fastopt.load_state_dict, copy=False), NATIVE_BACKEND),
    loader(COPYING, partial(fastopt.load_state_dict, copy=True), NATIVE_BACKEND),
)
PYTHON_LOADER = loader(PYTHON, partial(fastopt.load_state_dict, copy=False), PYTHON_BACKEND)
