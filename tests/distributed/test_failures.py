"""What goes wrong on one rank: all of them learn of it, nothing is half done, and nobody waits for ever."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from fastopt import distributed
from fastopt.files import dcp_writer
from tests.distributed.ranks import RankFailedError, Ranks
from tests.distributed.trainings import assert_same, optimizer_of, sharded, torchs, train, trained, whole

pytestmark = pytest.mark.usefixtures("backend")


def saved(folder: Path, layout: str = "rows") -> Any:
    model, optimizer = trained(layout)
    distributed.save(optimizer, model, folder)
    return whole(torchs(model, optimizer))


def refused(folder: Path) -> tuple[str, dict[int, str]]:
    """The error of a load, by which the optimizer has not changed, and that of torch's load through the reader."""
    model, optimizer = trained("rows", "AdamW")
    train(model, optimizer)
    before = whole(torchs(model, optimizer))
    with pytest.raises(distributed.RanksError) as caught:
        distributed.load(optimizer, model, folder)
    assert_same(whole(torchs(model, optimizer)), before)
    assert (caught.value.__cause__ is not None) == (torch.distributed.get_rank() in caught.value.failures)
    with pytest.raises(CheckpointException):
        dcp.load(torchs(model, optimizer), storage_reader=distributed.FastReader(folder))
    return str(caught.value), dict(caught.value.failures)


def file_of(folder: Path, rank: int) -> Path:
    [file] = folder.glob(f"__{rank}_*.distcp")
    return file


def test_a_missing_file_is_named_on_every_rank(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(saved, tmp_path / "folder")
    gone = file_of(tmp_path / "folder", 1)
    gone.unlink()
    for text, failures in two_ranks.run(refused, tmp_path / "folder"):
        assert 1 in failures
        assert f"rank 1: fastopt.errors.CheckpointError: {gone} is missing, which holds entry '" in text


def test_a_file_that_is_cut_short_is_named_on_every_rank(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(saved, tmp_path / "folder")
    short = file_of(tmp_path / "folder", 1)
    os.truncate(short, short.stat().st_size - 5000)
    for text, failures in two_ranks.run(refused, tmp_path / "folder"):
        assert 1 in failures
        assert f"{short} is damaged or cut short: entry 'state." in text


def test_a_file_of_other_bytes_is_named(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(saved, tmp_path / "folder")
    damaged = file_of(tmp_path / "folder", 0)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    for text, failures in two_ranks.run(refused, tmp_path / "folder"):
        assert 0 in failures
        assert str(damaged) in text
        assert "it is no zip file" in text


def test_a_folder_without_metadata(tmp_path: Path, two_ranks: Ranks) -> None:
    (tmp_path / "folder").mkdir()
    for text, failures in two_ranks.run(refused, tmp_path / "folder"):
        assert list(failures) == [0, 1]
        assert "is no checkpoint: it is empty" in text


def other_parameters(folder: Path) -> tuple[str, str, str]:
    """Errors of loads into an optimizer whose parameters are others than those that were saved."""
    texts = []
    model = sharded("rows")
    model.register_parameter("new", torch.nn.Parameter(torch.ones(3)))
    stranger = torch.nn.Parameter(torch.ones(3))
    reshaped = sharded("rows")
    reshaped.bias = torch.nn.Parameter(torch.ones(3))
    for one, params in ((model, model.parameters()), (model, [stranger])):
        with pytest.raises(distributed.RanksError) as caught:
            distributed.load(torch.optim.AdamW(params), one, folder)
        texts.append(str(caught.value))
    with pytest.raises(ValueError, match="none of the model's") as refused_name:
        distributed.state_dict(torch.optim.AdamW([stranger]), model)
    return texts[0], texts[1], str(refused_name.value)


def test_parameters_that_were_not_saved_are_named(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(saved, tmp_path / "folder")
    for unsaved, stranger, named in two_ranks.run(other_parameters, tmp_path / "folder"):
        assert "parameter 'new' (float32 [3] on cpu) was not saved" in unsaved
        assert "parameter 0 of the optimizer (float32 [3] on cpu) is none of the model's" in stranger
        assert "parameter 0 of the optimizer (float32 [3] on cpu) is none of the model's" in named


class Odd:
    """What `torch.load(weights_only=True)` would not read."""


def saves_what_is_not_read(folder: Path) -> str:
    model, optimizer = trained("rows")
    if torch.distributed.get_rank() == 1:
        optimizer.param_groups[0]["odd"] = Odd()
    with pytest.raises(distributed.RanksError) as caught:
        distributed.save(optimizer, model, folder)
    assert list(caught.value.failures) == [1]
    return str(caught.value)


def test_a_value_that_no_load_would_read_is_not_saved(tmp_path: Path, two_ranks: Ranks) -> None:
    kept = two_ranks.run(saved, tmp_path / "folder")[0]
    for text in two_ranks.run(saves_what_is_not_read, tmp_path / "folder"):
        assert "rank 1: TypeError" in text
        assert "odd" in text
    assert_same(two_ranks.run(loaded, tmp_path / "folder")[0], kept)


def reads_what_is_not_allowed(folder: Path) -> str:
    model, optimizer = trained("rows")
    optimizer.param_groups[0]["odd"] = Odd()
    dcp.save(torchs(model, optimizer), checkpoint_id=folder)
    with pytest.raises(distributed.RanksError) as caught:
        distributed.load(optimizer, model, folder)
    with pytest.raises(CheckpointException, match="UnsafeGlobalsError"):
        dcp.load(torchs(model, optimizer), storage_reader=distributed.FastReader(folder))
    distributed.load(optimizer, model, folder, safe_globals=[Odd])
    assert type(optimizer.param_groups[0]["odd"]) is Odd
    dcp.load(torchs(model, optimizer), storage_reader=distributed.FastReader(folder, safe_globals=[Odd]))
    return str(caught.value)


def test_classes_that_are_not_allowed_are_listed(tmp_path: Path, two_ranks: Ranks) -> None:
    for text in two_ranks.run(reads_what_is_not_allowed, tmp_path / "folder"):
        assert "names tests.distributed.test_failures.Odd" in text


def loaded(folder: Path) -> Any:
    model = sharded("rows")
    optimizer = optimizer_of(model)
    distributed.load(optimizer, model, folder)
    return whole(torchs(model, optimizer))


def fails_to_write(folder: Path) -> dict[int, str]:
    model, optimizer = trained("rows")
    train(model, optimizer)
    write = dcp_writer.write_entries
    if torch.distributed.get_rank() == 1:
        distributed.writer.write_entries = full_disk
    try:
        with pytest.raises(distributed.RanksError) as caught:
            distributed.save(optimizer, model, folder)
    finally:
        distributed.writer.write_entries = write
    return dict(caught.value.failures)


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_rank_that_cannot_write_leaves_the_checkpoint_as_it_was(tmp_path: Path, two_ranks: Ranks) -> None:
    folder = tmp_path / "folder"
    kept = two_ranks.run(saved, folder)[0]
    files = sorted(os.listdir(folder))
    for failures in two_ranks.run(fails_to_write, folder):
        assert failures == {1: "OSError: [Errno 28] No space left on device"}
    assert set(files) <= set(os.listdir(folder))
    assert_same(two_ranks.run(loaded, folder)[0], kept)
    two_ranks.run(saved, folder)
    assert len(os.listdir(folder)) == len(files)


def is_killed(folder: Path) -> None:
    model, optimizer = trained("rows")
    train(model, optimizer)
    if torch.distributed.get_rank() == 1:
        distributed.writer.write_entries = end
    distributed.save(optimizer, model, folder)


def end(fd: int, *_: Any) -> None:
    os.write(fd, b"half of it")
    os._exit(9)


def test_a_rank_that_is_killed_leaves_the_checkpoint_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    ranks = Ranks(2)
    try:
        kept = ranks.run(saved, folder)[0]
        files = sorted(os.listdir(folder))
        with pytest.raises(RankFailedError, match="rank 1: it ended with exit code 9"):
            ranks.run(is_killed, folder, seconds=30)
        assert set(files) < set(os.listdir(folder))
        assert_same(ranks.run(loaded, folder)[0], kept)
        ranks.run(saved, folder)
        assert len(os.listdir(folder)) == len(files)
    finally:
        ranks.stop()


def refuses_rank_local_metadata(folder: Path) -> None:
    model, optimizer = trained("rows")
    with pytest.raises(ValueError, match="use_collectives=False"):
        dcp.save(torchs(model, optimizer), storage_writer=distributed.FastWriter(folder), use_collectives=False)


def test_a_save_without_collectives_is_refused(tmp_path: Path, two_ranks: Ranks) -> None:
    two_ranks.run(refuses_rank_local_metadata, tmp_path / "folder")
