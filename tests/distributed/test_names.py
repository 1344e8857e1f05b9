"""An optimizer's state by the names of its parameters, held to torch's `get_optimizer_state_dict`."""

import warnings
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from fastopt import distributed
from tests.distributed.ranks import Ranks
from tests.distributed.trainings import Model, assert_same, optimizer_of, train, trained

pytestmark = pytest.mark.usefixtures("backend")


def compares(layout: str) -> None:
    model, optimizer = trained(layout)
    same_as_torchs(optimizer, model)


def same_as_torchs(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    actual, expected = distributed.state_dict(optimizer, model), get_optimizer_state_dict(model, optimizer)
    assert_same(actual, expected)
    for name, entry in expected["state"].items():
        assert all(actual["state"][name][key] is value for key, value in entry.items())


@pytest.mark.parametrize("layout", ["fsdp", "rows", "grid"])
def test_sharded_models(two_ranks: Ranks, layout: str) -> None:
    two_ranks.run(compares, layout)


def wraps() -> None:
    inner = Model()
    wrapped = DistributedDataParallel(inner)
    optimizer = optimizer_of(wrapped)
    train(wrapped, optimizer)
    same_as_torchs(optimizer, wrapped)
    with pytest.raises(TypeError, match=r"FullyShardedDataParallel \(FSDP1\)"):
        distributed.state_dict(optimizer, flat(inner))


def flat(inner: torch.nn.Module) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(torch.nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=True)


def test_wrapped_models(two_ranks: Ranks) -> None:
    two_ranks.run(wraps)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight


def compiled(model: torch.nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what it imports
        return torch.compile(model)


@pytest.mark.parametrize("wrap", [lambda model: model, compiled], ids=["as it is", "compiled"])
def test_models_of_one_process(wrap: Any) -> None:
    model = wrap(Tied())
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    same_as_torchs(optimizer, model)


def test_frozen_parameters_and_those_without_a_gradient() -> None:
    model = Tied()
    model.second.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model.first.bias.grad = torch.ones(3)
    optimizer.step()
    same_as_torchs(optimizer, model)
