"""Sharded models and their optimizers, alike on any number of ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.optim import Optimizer

SHAPES = ((5, 4), (1, 3), (6, 2), (7,), (4, 3000), (3, 4, 5), (2, 0), ())
"""Cut unevenly, with nothing for most ranks, evenly; in rows long and short; and what cannot be cut."""

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.25, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.25, momentum=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.25),
}


class Model(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES[:-1])
        self.bias = torch.nn.Parameter(torch.randn(SHAPES[-1]).to(dtype))


def rows(shape: Any) -> list[Any]:
    return [Shard(0)] if shape else [Replicate()]


def columns(shape: Any) -> list[Any]:
    return [Shard(len(shape) - 1)] if shape else [Replicate()]


def grid(shape: Any) -> list[Any]:
    return [Shard(0), Shard(1)] if len(shape) > 1 else [Replicate(), *rows(shape)]


def hybrid(shape: Any) -> list[Any]:
    return [Replicate(), *rows(shape)]


PLACEMENTS = {"rows": rows, "columns": columns, "grid": grid, "hybrid": hybrid}


def sharded(layout: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model, its parameters laid out in one of these ways, by `fully_shard`, or not at all."""
    model = Model(dtype)
    if layout == "plain":
        return model
    if layout == "fsdp":
        model.bias = torch.nn.Parameter(model.bias.reshape(1).detach())  # a number cannot be cut
        model.weights = torch.nn.ParameterList(weight for weight in model.weights if weight.numel())
        fully_shard(model)
        return model
    size = dist.get_world_size()
    is_flat = layout in ("rows", "columns")
    mesh = init_device_mesh("cpu", (size,) if is_flat else (2, size // 2))
    for module in (model.weights, model):
        for name, param in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(param.detach(), mesh, PLACEMENTS[layout](param.shape))
            module.register_parameter(name, torch.nn.Parameter(placed))
    return model


def optimizer_of(model: torch.nn.Module, name: str = "AdamW") -> Optimizer:
    params = list(model.parameters())
    return OPTIMIZERS[name]([{"params": params[:-1]}, {"params": params[-1:], "weight_decay": 0.5}])


def train(model: torch.nn.Module, optimizer: Optimizer, steps: int = 2) -> None:
    """Steps with gradients that are the same on every rank, whatever the layout."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()


def trained(layout: str, name: str = "AdamW", dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Optimizer]:
    model = sharded(layout, dtype)
    optimizer = optimizer_of(model, name)
    train(model, optimizer)
    return model, optimizer


def whole(value: Any) -> Any:
    """A state as one process would hold it."""
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def assert_same(actual: Any, expected: Any, place: str = "state") -> None:
    """Types, keys in their order, dtypes, placements, and every bit."""
    assert type(actual) is type(expected), place
    if isinstance(expected, DTensor):
        assert (actual.placements, actual.device_mesh) == (expected.placements, expected.device_mesh), place
        assert (actual.shape, actual.stride()) == (expected.shape, expected.stride()), place
        assert_same(actual.to_local(), expected.to_local(), place)
    elif isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape, actual.device) == (expected.dtype, expected.shape, expected.device), place
        assert torch.equal(actual.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), place
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), place
        for key in expected:
            assert_same(actual[key], expected[key], f"{place}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), place
        for index, (item, other) in enumerate(zip(actual, expected, strict=True)):
            assert_same(item, other, f"{place}[{index}]")
    else:
        assert actual == expected, place


def torchs(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state by names, as torch has it."""
    return get_optimizer_state_dict(model, optimizer)
