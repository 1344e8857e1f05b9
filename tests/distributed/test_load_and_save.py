"""States saved by some ranks and loaded by others, through fastopt and through torch, bit for bit."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fastopt import distributed
from tests.distributed.ranks import Ranks
from tests.distributed.trainings import (
    assert_same,
    optimizer_of,
    sharded,
    torchs,
    train,
    trained,
    whole,
)

pytestmark = pytest.mark.usefixtures("backend")

F32, BF16 = torch.float32, torch.bfloat16


def quietly(call, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process is alone
        return call(*arguments, **options)


def saves(folder: Path, layout: str, name: str) -> Any:
    """Save one state through both; returns it as a whole."""
    model, optimizer = trained(layout, name)
    distributed.save(optimizer, model, folder / "ours")
    quietly(dcp.save, torchs(model, optimizer), checkpoint_id=folder / "torchs")
    return whole(torchs(model, optimizer))


def loads(folder: Path, layout: str, name: str, dtype: torch.dtype) -> Any:
    """Load what both have saved, through both; returns it as a whole."""
    for saved in ("ours", "torchs"):
        expected_model, actual_model = sharded(layout, dtype), sharded(layout, dtype)
        expected, actual = optimizer_of(expected_model, name), optimizer_of(actual_model, name)
        content = torchs(expected_model, expected)
        quietly(dcp.load, content, checkpoint_id=folder / saved)
        set_optimizer_state_dict(expected_model, expected, content)
        params = [param.detach().clone() for param in actual_model.parameters()]

        report = distributed.load(actual, actual_model, folder / saved)

        assert_same(torchs(actual_model, actual), torchs(expected_model, expected))
        assert_same(list(map(torch.Tensor.detach, actual_model.parameters())), params)
        assert report.tensors == sum(len(entry) for entry in torchs(actual_model, actual)["state"].values())
        train(actual_model, actual)
        train(expected_model, expected)
        assert_same(torchs(actual_model, actual), torchs(expected_model, expected))

        read = torchs(expected_model, expected)
        quietly(dcp.load, read, storage_reader=distributed.FastReader(folder / saved))
        assert_same(whole(read), whole(content))
    return whole(content)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_two_ranks_to_four_and_one(tmp_path: Path, two_ranks: Ranks, four_ranks: Ranks, name: str) -> None:
    saved = two_ranks.run(saves, tmp_path, "rows", name)[0]
    for loaded in (*four_ranks.run(loads, tmp_path, "rows", name, F32), loads(tmp_path, "plain", name, F32)):
        assert_same(loaded, saved)


@pytest.mark.parametrize("layout", ["columns", "grid", "hybrid"])
def test_layouts_to_each_other(tmp_path: Path, two_ranks: Ranks, four_ranks: Ranks, layout: str) -> None:
    saved = four_ranks.run(saves, tmp_path, layout, "AdamW")[0]
    for other in (layout, "rows"):
        for loaded in four_ranks.run(loads, tmp_path, other, "AdamW", F32):
            assert_same(loaded, saved)
    for loaded in two_ranks.run(loads, tmp_path, "columns", "AdamW", F32):
        assert_same(loaded, saved)


def test_fully_shard_and_another_dtype(tmp_path: Path, two_ranks: Ranks, four_ranks: Ranks) -> None:
    two_ranks.run(saves, tmp_path, "fsdp", "AdamW")
    four_ranks.run(loads, tmp_path, "fsdp", "AdamW", BF16)


def test_one_process_to_two(tmp_path: Path, two_ranks: Ranks) -> None:
    saved = saves(tmp_path, "plain", "AdamW")
    for layout in ("plain", "rows"):
        for loaded in two_ranks.run(loads, tmp_path, layout, "AdamW", F32):
            assert_same(loaded, saved)


# ---- inside torch's own workflows ----


def through_torch(folder: Path, layout: str, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = trained(layout)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.25)
    content = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    expected = whole(torchs(model, optimizer))
    quietly(dcp.save, {**content, "epoch": 3}, storage_writer=distributed.FastWriter(folder))

    other_model = sharded(layout)
    other = optimizer_of(other_model)
    train(other_model, other, steps=1)
    for group in other.param_groups:
        group["lr"] = torch.tensor(0.5)
    parts = get_optimizer_state_dict(other_model, other, options=options)
    read = {"model": other_model.state_dict(), "optimizer": parts, "epoch": 0}
    for tensor in (*other_model.state_dict().values(), *other.state_dict()["state"][0].values()):
        tensor.detach().zero_()
    dcp.load(read, storage_reader=distributed.FastReader(folder))
    set_optimizer_state_dict(other_model, other, read["optimizer"], options=options)
    assert read["epoch"] == 3
    assert_same(whole(read["model"]), whole(content["model"]))
    assert_same(whole(torchs(other_model, other)), expected)

    fresh_model = sharded(layout)
    fresh = optimizer_of(fresh_model)
    distributed.load(fresh, fresh_model, folder, key="optimizer")
    assert_same(whole(torchs(fresh_model, fresh)), expected)


@pytest.mark.parametrize("flatten", [False, True])
def test_inside_get_and_set_optimizer_state_dict(tmp_path: Path, two_ranks: Ranks, flatten: bool) -> None:
    two_ranks.run(through_torch, tmp_path, "rows", flatten)


def saves_by_ids(folder: Path) -> Any:
    model, optimizer = trained("rows")
    quietly(dcp.save, {"optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    return whole(torchs(model, optimizer))


def loads_by_ids(folder: Path) -> Any:
    model = sharded("columns")
    optimizer = optimizer_of(model)
    distributed.load(optimizer, model, folder, key="optimizer")
    return whole(torchs(model, optimizer))


def test_a_state_that_was_saved_by_ids(tmp_path: Path, two_ranks: Ranks, four_ranks: Ranks) -> None:
    saved = two_ranks.run(saves_by_ids, tmp_path)[0]
    for loaded in four_ranks.run(loads_by_ids, tmp_path):
        assert_same(loaded, saved)


# ---- in place ----


def fills(folder: Path) -> None:
    model, optimizer = trained("rows")
    expected = whole(torchs(model, optimizer))
    distributed.save(optimizer, model, folder)
    held = [dict(entry) for entry in optimizer.state.values()]
    memory = [value.to_local().data_ptr() for entry in held for value in entry.values() if hasattr(value, "to_local")]
    train(model, optimizer)

    report = distributed.load(optimizer, model, folder, inplace=True)

    assert_same(whole(torchs(model, optimizer)), expected)
    now = [value for entry in optimizer.state.values() for value in entry.values()]
    assert all(a is b for a, b in zip(now, [value for entry in held for value in entry.values()], strict=True))
    assert [value.to_local().data_ptr() for value in now if hasattr(value, "to_local")] == memory
    assert report.tensors == report.filled == len(now)


def test_values_go_into_the_tensors_that_are_held(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(fills, tmp_path / "folder")


def finds_nothing_to_fill(folder: Path) -> str:
    model, optimizer = trained("rows")
    distributed.save(optimizer, model, folder)
    with pytest.raises(distributed.RanksError) as caught:
        distributed.load(optimizer_of(model), model, folder, inplace=True)
    return str(caught.value)


def test_nothing_to_fill_is_an_error_that_names_the_entry(tmp_path: Path, two_ranks: Ranks) -> None:
    for text in two_ranks.run(finds_nothing_to_fill, tmp_path / "folder"):
        assert "rank 1: ValueError: entry 'state." in text
        assert "the optimizer holds no tensor in its place" in text


# ---- saves ----


def saves_twice(folder: Path) -> None:
    model, optimizer = trained("rows")
    distributed.save(optimizer, model, folder)
    train(model, optimizer)
    distributed.save(optimizer, model, folder)
    fresh_model = sharded("rows")
    fresh = optimizer_of(fresh_model)
    distributed.load(fresh, fresh_model, folder)
    assert_same(torchs(fresh_model, fresh)["state"].keys(), torchs(model, optimizer)["state"].keys())
    assert_same(whole(torchs(fresh_model, fresh)), whole(torchs(model, optimizer)))
    dist.barrier()


def test_a_save_takes_the_place_of_another(tmp_path: Path, two_ranks: Ranks, four_ranks: Ranks) -> None:
    folder = tmp_path / "folder"
    four_ranks.run(saves_twice, folder)
    (folder / "notes.txt").write_text("mine")
    two_ranks.run(saves_twice, folder)
    assert sorted(name.partition(".")[0] for name in os.listdir(folder)) == ["", "__0_0", "__1_0", "notes"]


def saves_nothing(folder: Path) -> None:
    model = sharded("rows")
    optimizer = optimizer_of(model)
    before = whole(list(model.parameters()))
    assert distributed.state_dict(optimizer, model)["state"] == {}
    distributed.save(optimizer, model, folder)
    assert_same(whole(list(model.parameters())), before)
    assert not optimizer.state
    trained_model, with_state = trained("rows")
    distributed.load(with_state, trained_model, folder)
    assert not with_state.state


def test_an_optimizer_without_a_state_takes_no_step(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(saves_nothing, tmp_path / "folder")
