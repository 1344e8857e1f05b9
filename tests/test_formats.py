"""Which format a checkpoint has, by what is in it and by its name."""

import os
import stat
from pathlib import Path

import pytest
import torch

import fastopt
from fastopt.files import formats
from tests.oracle import TORCH_STATE_DICT, Comparison, adam, fingerprint, trained

pytestmark = pytest.mark.usefixtures("backend")

NAMES = {"torch": "a.pt", "safetensors": "a.safetensors"}


def saved(folder, name, legacy=False):
    optimizer = trained(adam())
    if legacy:
        torch.save(TORCH_STATE_DICT(optimizer), folder / name, _use_new_zipfile_serialization=False)
    else:
        fastopt.save(optimizer, folder / name)
    return optimizer


def refused(path, message):
    optimizer = trained(adam())
    before = fingerprint(optimizer)
    with pytest.raises(fastopt.CheckpointError, match=message) as caught:
        fastopt.load(optimizer, path)
    assert os.fspath(path) in str(caught.value)
    assert fingerprint(optimizer) == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.pt", "torch"),
        ("a.pth", "torch"),
        ("a.bin", "torch"),
        ("a.ckpt", "torch"),
        ("a", "torch"),
        ("a.safetensors", "safetensors"),
        ("a.dcp", "dcp"),
        ("a.pt/", "dcp"),
        ("a.SafeTensors", "safetensors"),
        ("a.DCP", "dcp"),
        ("a.PT", "torch"),
    ],
)
def test_a_name_says_how_it_is_written(tmp_path, name, expected):
    assert formats.format_for(name) == expected
    assert formats.format_for(tmp_path) == "dcp"
    if expected != "dcp":
        saved(tmp_path, name)
        assert formats.format_of(tmp_path / name) == expected


@pytest.mark.parametrize("written", NAMES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", "", ".txt"])
def test_what_is_in_a_file_decides_and_not_its_name(tmp_path, written, suffix):
    optimizer = saved(tmp_path, NAMES[written])
    path = (tmp_path / NAMES[written]).rename(tmp_path / f"other{suffix}")
    loaded = adam()
    fastopt.load(loaded, path, verify=True)
    assert not fastopt.diff(loaded, optimizer)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_from_before_torch_1_6(tmp_path, suffix):
    optimizer = saved(tmp_path, f"old{suffix}", legacy=True)
    loaded = adam()
    fastopt.load(loaded, tmp_path / f"old{suffix}")
    Comparison().same(TORCH_STATE_DICT(loaded), TORCH_STATE_DICT(optimizer))
    with pytest.raises(fastopt.CheckpointError, match="has no checksums"):
        fastopt.load(loaded, tmp_path / f"old{suffix}", verify=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{}", "is no checkpoint"),
        (b"P", "is no checkpoint"),
        (b"\0" * 100, "is no checkpoint"),
        (b"not a checkpoint at all", "is no checkpoint"),
        (b"\x80\x05}.", "is no checkpoint"),
        (b"\x80\x05\0\0\0\0\0\0", "is no checkpoint"),
        (b"\xff" * 8 + b"{}", "no valid safetensors file"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, suffix, content, message):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    refused(path, message)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    refused(tmp_path, "folder without a .metadata file")
    (tmp_path / "a.safetensors").mkdir()
    refused(tmp_path / "a.safetensors", "folder without a .metadata file")


def test_what_is_not_there(tmp_path):
    for suffix in NAMES.values():
        with pytest.raises(FileNotFoundError, match="nowhere"):
            fastopt.load(adam(), tmp_path / "nowhere" / suffix)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            fastopt.save(trained(adam()), tmp_path / "nowhere" / suffix)


SAVES = {
    "save": lambda path: fastopt.save(trained(adam()), path),
    "save in the background": lambda path: fastopt.save(trained(adam()), path, background=True).result(),
    "snapshot": lambda path: fastopt.snapshot(trained(adam())).save(path),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=list(SAVES))
@pytest.mark.parametrize("name", [*NAMES.values(), "a.dcp"])
@pytest.mark.parametrize("by_link", [False, True], ids=["itself", "link"])
def test_a_pipe_is_not_replaced(tmp_path, save, name, by_link):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / name
    path.symlink_to("pipe") if by_link else (tmp_path / "pipe").rename(path)
    with pytest.raises(FileExistsError, match="neither a file nor a folder") as caught:
        save(path)
    assert f"while writing {path}" in caught.value.__notes__
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert path.is_symlink() == by_link
    assert len(os.listdir(tmp_path)) == 1 + by_link


@pytest.mark.parametrize("save", SAVES.values(), ids=list(SAVES))
@pytest.mark.parametrize("name", [*NAMES.values(), "a.dcp"])
def test_the_name_that_was_asked_for_is_in_the_error(tmp_path, save, name):
    """And not that of the temporary file beside it."""
    path = tmp_path / "missing" / name
    with pytest.raises(FileNotFoundError) as caught:
        save(path)
    assert str(caught.value) == f"[Errno 2] there is no folder {path.parent}: '{path}'"


@pytest.mark.parametrize("save", SAVES.values(), ids=list(SAVES))
@pytest.mark.parametrize("name", [*NAMES.values(), "a.dcp"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, save, name):
    (tmp_path / "there").mkdir()
    path = tmp_path / name
    path.symlink_to(Path("there") / name)
    for _ in range(2):
        save(path)
        assert path.is_symlink()
        assert not (tmp_path / "there" / name).is_symlink()
        assert formats.format_of(tmp_path / "there" / name) == formats.format_for(name)
        assert sorted(os.listdir(tmp_path)) == sorted([name, "there"])
    assert os.listdir(tmp_path / "there") == [name]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "neither a file nor a folder")


@pytest.mark.parametrize("name", NAMES.values())
def test_a_file_that_may_not_be_read(tmp_path, name, monkeypatch):
    saved(tmp_path, name)
    path = tmp_path / name
    path.chmod(0)
    optimizer = trained(adam())
    before = fingerprint(optimizer)
    if os.access(path, os.R_OK):  # as root, for whom permissions do not count

        def denied(file, *_):
            raise PermissionError(13, "Permission denied", os.fspath(file))

        monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(PermissionError, match=name):
        fastopt.load(optimizer, path)
    assert fingerprint(optimizer) == before
    monkeypatch.undo()
    assert stat.S_IMODE(path.stat().st_mode) == 0


def test_a_checksum_of_a_torch_file(tmp_path):
    saved(tmp_path, "a.pt")
    path = tmp_path / "a.pt"
    raw = bytearray(path.read_bytes())
    value = trained(adam()).state_dict()["state"][0]["exp_avg"].numpy().tobytes()
    raw[raw.index(value)] ^= 1
    path.write_bytes(raw)
    fastopt.load(adam(), path)
    optimizer = adam()
    with pytest.raises(fastopt.CheckpointError, match=r"a\.pt: .*/data/\d+ \(state\.0\.exp_avg\) is damaged"):
        fastopt.load(optimizer, path, verify=True)
    assert not optimizer.state
