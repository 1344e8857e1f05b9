"""Saves in the background, by all ranks, while training goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from fastopt import distributed
from fastopt.distributed import saving, staging
from tests.distributed.ranks import Ranks
from tests.distributed.trainings import assert_same, optimizer_of, sharded, torchs, train, trained, whole

pytestmark = pytest.mark.usefixtures("backend")


def loaded(folder: Path, layout: str = "rows") -> Any:
    model = sharded(layout)
    optimizer = optimizer_of(model)
    distributed.load(optimizer, model, folder)
    return whole(torchs(model, optimizer))


def memory_of(content: Any) -> list[int]:
    state = content["state"].values()
    return [getattr(value, "_local_tensor", value).data_ptr() for entry in state for value in entry.values()]


def saves_while_training(folder: Path, layout: str) -> None:
    model, optimizer = trained(layout)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    memory = []
    for number in range(3):
        expected = whole(torchs(model, optimizer))
        future = distributed.async_save(optimizer, model, folder / f"{number}")
        train(model, optimizer)
        optimizer.param_groups[0]["lr"].mul_(0.5)
        for _ in range(3):
            dist.all_reduce(torch.ones(3))
        assert future.result() is None
        assert_same(loaded(folder / f"{number}", layout), expected)
        read = torchs(model, optimizer)
        dcp.load(read, checkpoint_id=folder / f"{number}")
        assert_same(whole(read), expected)
        memory.append(memory_of(staging.kept[optimizer]))
    assert memory[0] == memory[1] == memory[2]
    distributed.async_save(optimizer, model, folder / "last", keep=False).result()
    assert optimizer not in staging.kept


@pytest.mark.parametrize("layout", ["rows", "grid", "plain"])
def test_training_goes_on_and_the_memory_is_kept(tmp_path: Path, two_ranks: Ranks, layout: str) -> None:
    two_ranks.run(saves_while_training, tmp_path, layout)


def saves_two_at_once(folder: Path) -> None:
    """Of which the second is copied while the first is written."""
    made = [trained("rows") for _ in range(2)]
    for number in range(3):
        futures = [
            distributed.async_save(optimizer, model, folder / f"{number}-{index}")
            for index, (model, optimizer) in enumerate(made)
        ]
        for model, optimizer in made:
            train(model, optimizer)
    for future in futures:
        future.result()


def test_two_optimizers_at_once(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(saves_two_at_once, tmp_path)


def saves_what_has_grown(folder: Path) -> None:
    model = sharded("rows")
    optimizer = optimizer_of(model)
    for steps in (0, 1):
        train(model, optimizer, steps=steps)
        expected = whole(torchs(model, optimizer)) if steps else None
        distributed.async_save(optimizer, model, folder).result()
    assert_same(loaded(folder), expected)
    for entry in optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].to(torch.bfloat16)
        del entry["max_exp_avg_sq"]
    expected = whole(torchs(model, optimizer))
    distributed.async_save(optimizer, model, folder).result()
    read = torchs(model, optimizer)
    dcp.load(read, checkpoint_id=folder)
    assert_same(whole(read), expected)
    assert_same(sorted(read["state"]["bias"]), sorted(expected["state"]["bias"]))


def test_a_state_of_other_tensors_than_before(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(saves_what_has_grown, tmp_path / "folder")


def fails(folder: Path) -> None:
    model, optimizer = trained("rows")
    kept = whole(torchs(model, optimizer))
    distributed.async_save(optimizer, model, folder).result()
    train(model, optimizer)
    write = distributed.writer.write_entries
    if dist.get_rank() == 1:
        distributed.writer.write_entries = full_disk
    try:
        future = distributed.async_save(optimizer, model, folder)
        with pytest.raises(distributed.RanksError) as caught:
            future.result()
    finally:
        distributed.writer.write_entries = write
    assert caught.value.failures == {1: "OSError: [Errno 28] No space left on device"}
    assert_same(loaded(folder), kept)
    expected = whole(torchs(model, optimizer))
    distributed.async_save(optimizer, model, folder).result()
    assert_same(loaded(folder), expected)


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_failure_on_one_rank_reaches_the_futures_of_all(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(fails, tmp_path / "folder")


def saves_by_some(folder: Path) -> None:
    """Of four ranks, each pair for itself."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = pairs[dist.get_rank() // 2]
    model = sharded("plain")
    optimizer = optimizer_of(model)
    train(model, optimizer)
    place = folder / str(dist.get_rank() // 2)
    distributed.async_save(optimizer, model, place, process_group=own).result()
    distributed.save(optimizer, model, place, process_group=own)
    other = optimizer_of(model)
    distributed.load(other, model, place, process_group=own)
    assert_same(torchs(model, other), torchs(model, optimizer))
    assert saving.background_group(own) is saving.background_group(own)


def test_groups_of_some_of_the_ranks(tmp_path: Path, four_ranks: Ranks) -> None:
    four_ranks.run(saves_by_some, tmp_path)


def test_one_process_alone(tmp_path: Path) -> None:
    model, optimizer = trained("plain")
    expected = whole(torchs(model, optimizer))
    future = distributed.async_save(optimizer, model, tmp_path / "folder")
    train(model, optimizer)
    future.result()
    assert_same(loaded(tmp_path / "folder", "plain"), expected)
