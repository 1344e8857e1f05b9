"""Checksums of torch.save's files, held against their data."""

import os
import zipfile

import pytest
import torch

import fastopt
from fastopt import CheckpointError
from fastopt.files import torch_checks, torch_file
from tests.oracle import adam, fingerprint, trained

CHUNK = 20_000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(torch_checks, "CHUNK", CHUNK)


CONTENT = {
    "state": {0: {"small": torch.rand(5), "large": torch.rand(3 * CHUNK)}, 1: {"small": torch.rand(7)}},
    "list": [torch.rand(2), (torch.rand(3),)],
    "empty": torch.empty(0),
}
CONTENT["again"] = CONTENT["list"][0]
PLACES = {
    "data/0": "state.0.small",
    "data/1": "state.0.large",
    "data/2": "state.1.small",
    "data/3": "list.0, again",
    "data/4": "list.1.0",
}


@pytest.fixture(params=["torch", "native", "python"])
def path(request, tmp_path):
    path = tmp_path / "optimizer.pt"
    if request.param == "torch":
        with open(path, "wb") as file:  # to a file, torch writes the same names as fastopt
            torch.save(CONTENT, file)
    else:
        before = fastopt.backend().name
        fastopt.backends.use(request.param)
        torch_file.write(path, CONTENT)
        fastopt.backends.use(before)
    return path


def infos(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: info for info in archive.infolist()}


def place_of(path, name):
    """Where the data of a record begins."""
    info = infos(path)[f"archive/{name}"]
    header = path.read_bytes()[info.header_offset :][:30]
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_whole_file(path):
    torch_file.verify(path)


@pytest.mark.parametrize("name", [*PLACES, "data.pkl", "version", ".data/serialization_id"])
@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_a_flipped_bit_is_found_and_named(path, name, part):
    size = infos(path)[f"archive/{name}"].file_size
    flip(path, place_of(path, name) + int(part * (size - 1)), bit=3)
    with pytest.raises(CheckpointError, match="is damaged: the checksum") as caught:
        torch_file.verify(path)
    tensors = f" ({PLACES[name]})" if name in PLACES else ""
    assert f"{path}: archive/{name}{tensors} is damaged" in str(caught.value)


def test_all_that_is_damaged_is_named(path):
    for name in PLACES:
        flip(path, place_of(path, name))
    flip(path, place_of(path, "version"))
    with pytest.raises(CheckpointError, match=r"archive/data/0 \(state\.0\.small\), .* and 1 more are damaged"):
        torch_file.verify(path)


def test_tensors_are_not_named_where_the_pickle_is_damaged(path):
    flip(path, place_of(path, "data.pkl"))
    flip(path, place_of(path, "data/2"))
    with pytest.raises(CheckpointError, match=r"archive/data\.pkl, archive/data/2 are damaged"):
        torch_file.verify(path)


@pytest.mark.parametrize("name", ["data/1", "data/2"])
def test_a_record_that_is_not_where_the_directory_says(path, name):
    flip(path, infos(path)[f"archive/{name}"].header_offset)
    with pytest.raises(CheckpointError, match=f"there is no record archive/{name}"):
        torch_file.verify(path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_file_that_was_cut_short(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="has no checksums: it is no zip file, or not a whole one") as caught:
        torch_file.verify(path)
    assert str(path) in str(caught.value)


def test_data_that_is_cut_out(path):
    """The end is there, and what it speaks of is not."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3] + whole[len(whole) // 2 :])
    with pytest.raises(CheckpointError, match=str(path)):
        torch_file.verify(path)


@pytest.mark.parametrize("name", ["data/1", "data/2"])
@pytest.mark.parametrize("more", [10**6, 2**62])
def test_records_that_are_longer_than_their_place(path, monkeypatch, name, more):
    """As in a directory that was tampered with."""
    grouped = torch_checks.grouped

    def longer(records, end):
        for record in records:
            record.file_size += more if record.filename.endswith(name) else 0
        return grouped(records, end)

    monkeypatch.setattr(torch_checks, "grouped", longer)
    with pytest.raises(CheckpointError, match=f"archive/{name}"):
        torch_file.verify(path)


def test_checksums_that_were_turned_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(CONTENT, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(CheckpointError, match=r"a\.pt has no checksums: they were turned off"):
        torch_file.verify(tmp_path / "a.pt")


def test_a_file_that_was_packed_again(path, tmp_path):
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for info in archive.infolist():
            packed.writestr(info.filename, archive.read(info))
    torch_file.verify(tmp_path / "z.pt")
    info = infos(tmp_path / "z.pt")["archive/data/1"]
    flip(tmp_path / "z.pt", info.header_offset + info.compress_size // 2)
    with pytest.raises(CheckpointError, match="archive/data/1"):
        torch_file.verify(tmp_path / "z.pt")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_file.verify(tmp_path / "nowhere.pt")


@pytest.mark.usefixtures("backend")
def test_nothing_is_loaded_from_a_damaged_file(tmp_path):
    path = tmp_path / "optimizer.pt"
    fastopt.save(trained(adam()), path)
    optimizer = trained(adam(), seed=5)
    fastopt.load(optimizer, path, verify=True)
    before = fingerprint(optimizer)
    flip(path, place_of(path, "data/1"))
    with pytest.raises(CheckpointError, match=r"data/1 \(state\.0\.exp_avg\) is damaged"):
        fastopt.load(optimizer, path, verify=True)
    assert fingerprint(optimizer) == before
    assert os.path.exists(path)
