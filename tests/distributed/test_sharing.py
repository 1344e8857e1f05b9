"""Who reads what all ranks need."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastopt import distributed
from fastopt.distributed import loading
from tests.distributed.ranks import Ranks
from tests.distributed.trainings import Model, assert_same, optimizer_of, torchs, train, trained, whole

pytestmark = pytest.mark.usefixtures("backend")


def recorded(load: Any) -> list[str]:
    """The names of what this rank reads in a load."""
    names: list[str] = []
    read = loading.read_boxes

    def record(folder: Path, wanted: Any) -> None:
        boxes = list(wanted)
        names.extend(box.name for box in boxes)
        read(folder, boxes)

    loading.read_boxes = record
    try:
        load()
    finally:
        loading.read_boxes = read
    return names


def reads(folder: Path, layout: str, inplace: bool) -> list[str]:
    model, optimizer = trained(layout)
    for number, entry in enumerate(optimizer.state.values()):
        entry["step"].fill_(number + 0.5)
    expected = whole(torchs(model, optimizer))
    distributed.save(optimizer, model, folder)
    for entry in optimizer.state.values():
        entry["step"].zero_()
    other = optimizer if inplace else optimizer_of(model)
    names = recorded(lambda: distributed.load(other, model, folder, inplace=inplace))
    assert_same(whole(torchs(model, other)), expected)
    return names


@pytest.mark.parametrize("inplace", [False, True])
def test_each_step_is_read_by_one_rank(tmp_path: Path, two_ranks: Ranks, four_ranks: Ranks, inplace: bool) -> None:
    for ranks in (two_ranks, four_ranks):
        by_rank = ranks.run(reads, tmp_path / "folder", "rows", inplace)
        steps = [[name for name in names if name.endswith(".step")] for names in by_rank]
        all_steps = [*(f"state.weights.{index}.step" for index in range(7)), "state.bias.step"]
        assert sorted(itertools.chain.from_iterable(steps)) == sorted(all_steps)
        assert max(map(len, steps)) - min(map(len, steps)) <= 1


def needs_others(folder: Path) -> list[str]:
    """Each rank has an optimizer for parameters of its own, as in a pipeline."""
    model = Model()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    distributed.save(optimizer, model, folder)
    own = [model.weights[dist.get_rank()], model.bias]
    fresh = torch.optim.AdamW(own, weight_decay=0.5, amsgrad=True)
    names = recorded(lambda: distributed.load(fresh, model_of(own), folder))
    for param in own:
        assert_same(fresh.state[param], optimizer.state[param])
    return names


def model_of(params: list[torch.Tensor]) -> torch.nn.Module:
    model = torch.nn.Module()
    model.weights = torch.nn.ParameterDict({str(dist.get_rank()): params[0]})
    model.bias = params[1]
    return model


def test_ranks_that_need_different_tensors_read_their_own(tmp_path: Path, two_ranks: Ranks) -> None:
    for rank, names in enumerate(two_ranks.run(needs_others, tmp_path / "folder")):
        keys = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        assert sorted(names) == sorted(f"state.{name}.{key}" for name in ("bias", f"weights.{rank}") for key in keys)
