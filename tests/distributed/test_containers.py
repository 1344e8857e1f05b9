"""What holds several optimizers, saved under flat keys together: through fastopt and through torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import fastopt
from fastopt import distributed
from tests.distributed.ranks import Ranks
from tests.distributed.trainings import assert_same, whole

pytestmark = pytest.mark.usefixtures("backend")

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Parts:
    """An optimizer for each part of a model, as a pipeline of torchtitan has them, saved under flat keys together."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.models = [torch.nn.Module() for _ in range(2)]
        for index, model in enumerate(self.models):
            model.add_module(f"layer{index}", torch.nn.Linear(6, 5))
        for model in self.models:
            fully_shard(model)
        self.optimizers = [
            torch.optim.AdamW(model.parameters(), lr=0.25 / (index + 1)) for index, model in enumerate(self.models)
        ]

    def train(self) -> "Parts":
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            for seed, param in enumerate(model.parameters()):
                param.grad = torch.full_like(param, float(seed + 1))
            optimizer.step()
        return self

    def state_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            content |= get_optimizer_state_dict(model, optimizer, options=FLAT)
        return content

    def load_state_dict(self, content: dict[str, Any]) -> None:
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            set_optimizer_state_dict(model, optimizer, content, options=FLAT)


def saves_and_loads_parts(folder: Path) -> None:
    saved = Parts().train()
    expected = whole(saved.state_dict())
    dcp.save(saved.state_dict(), checkpoint_id=folder / "torchs")
    dcp.save(saved.state_dict(), storage_writer=distributed.FastWriter(folder / "ours"))
    for name in ("torchs", "ours"):
        by_reader, by_part = Parts(), Parts()
        content = by_reader.state_dict()
        dcp.load(content, storage_reader=distributed.FastReader(folder / name))
        by_reader.load_state_dict(content)
        assert_same(whole(by_reader.state_dict()), expected)
        for model, optimizer in zip(by_part.models, by_part.optimizers, strict=True):
            distributed.load(optimizer, model, folder / name)
        assert_same(whole(by_part.state_dict()), expected)
    installed = Parts()
    with fastopt.installed():
        installed.load_state_dict(saved.state_dict())
    assert_same(whole(installed.state_dict()), expected)


def test_several_optimizers_under_flat_keys(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(saves_and_loads_parts, tmp_path)
