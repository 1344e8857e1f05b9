"""Damaged and malicious folders of torch.distributed.checkpoint: nothing runs, one error names file and entry."""

import collections
import contextlib
import copy as copying
import copyreg
import io
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import _StorageInfo

import fastopt
from fastopt.errors import CheckpointError
from fastopt.files import dcp_folder, dcp_metadata, dcp_shards
from tests.dcp import doctor, metadata_of, torch_save
from tests.oracle import TORCH_STATE_DICT, adam, fingerprint, trained

pytestmark = pytest.mark.usefixtures("backend")

EXP_AVG = "state.0.exp_avg"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint; what is executed leaves a file in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch_save(copying.deepcopy(TORCH_STATE_DICT(trained(adam()))), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refused(folder, error=CheckpointError, **options):
    """The text of the error of a load, which leaves the optimizer as it was and executes nothing."""
    optimizer = trained(adam(), seed=4)
    before = fingerprint(optimizer)
    with pytest.raises(error) as caught:
        fastopt.load(optimizer, folder, **options)
    assert fingerprint(optimizer) == before
    assert not Path("executed").exists()
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert str(folder) in text
    assert "frame #" not in text
    return text


# ---- code ----


class Evil:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


PLACES = {
    "planner_data": lambda metadata: setattr(metadata, "planner_data", {"a": Evil()}),
    "storage_meta": lambda metadata: setattr(metadata.storage_meta, "checkpoint_id", Evil()),
    "storage_data": lambda metadata: metadata.storage_data.update(a=Evil()),
    "entry": lambda metadata: metadata.state_dict_metadata.update(a=Evil()),
    "version": lambda metadata: setattr(metadata, "version", Evil()),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_code_of_the_metadata_runs(folder, place):
    doctor(folder, PLACES[place])
    text = refused(folder, pickle.UnpicklingError)
    assert ".metadata names builtins.exec, which loading a checkpoint does not import" in text
    assert "safe_globals=[...]" in text


def test_all_that_the_metadata_names_is_listed(folder):
    doctor(folder, lambda metadata: setattr(metadata, "planner_data", [Evil(), os.system, Setting()]))
    text = refused(folder, pickle.UnpicklingError)
    assert "names builtins.exec, posix.system, tests.test_dcp_bad_input.Setting, which" in text


def glob(name):
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


METADATA, SIZE = "torch.distributed.checkpoint.metadata", "torch.Size"
ATTRIBUTES = b"N}X\x0c\x00\x00\x00__setstate__K\x01s\x86b"  # (None, {"__setstate__": 1}): setattr, in a pickle


@pytest.mark.parametrize(
    "name",
    [f"{METADATA}.{name}" for name in ("Metadata", "MetadataIndex", "TensorProperties", "_MEM_FORMAT_ENCODING")]
    + [SIZE, "torch.float32", "builtins.getattr", "pathlib.PosixPath", "torch.serialization._get_layout"],
)
def test_a_pickle_cannot_change_a_class_or_function(folder, name):
    module, _, attribute = name.rpartition(".")
    owner = getattr(__import__(module, fromlist=["_"]), attribute)
    before = dir(owner), getattr(owner, "__setstate__", None)
    (folder / ".metadata").write_bytes(b"\x80\x02" + glob(name) + ATTRIBUTES + b".")
    refused(folder)
    assert (dir(owner), getattr(owner, "__setstate__", None)) == before


@pytest.mark.parametrize(
    "calls",
    [
        glob(f"{METADATA}.Metadata") + b"X\x04\x00\x00\x00evil\x85R",
        glob("builtins.getattr") + glob("torch.float32") + b"X\x0b\x00\x00\x00__reduce_ex__\x86RK\x02\x85R",
        glob(SIZE) + b"X\x04\x00\x00\x00evil\x85R",
        glob("torch.load") + b"X\x04\x00\x00\x00evil\x85R",
        glob("torch.distributed.checkpoint.metadata.os.system") + b"X\x10\x00\x00\x00touch executed  \x85R",
        b"P1\n",
        b"\x82\x01",
    ],
)
def test_calls_of_a_pickle_do_nothing(folder, calls):
    (folder / ".metadata").write_bytes(b"\x80\x04" + calls + b".")
    refused(folder, (CheckpointError, pickle.UnpicklingError))


@pytest.mark.parametrize("code", [b"\x82\x70", b"\x83\x70\0", b"\x84\x70\0\0\0"])
def test_what_the_process_knows_by_a_number_is_not_called(folder, code):
    """Once a pickle of somebody else's has used such a number, no `find_class` is asked for it any more."""
    arguments = b"X\x08\0\0\0executedX\x01\0\0\0w\x86"
    copyreg.add_extension("builtins", "open", 0x70)
    try:
        pickle.loads(b"\x80\x02\x82\x70.")
        (folder / ".metadata").write_bytes(b"\x80\x04" + code + arguments + b"R.")
        assert "a number of the process's" in refused(folder)
    finally:
        copyreg.remove_extension("builtins", "open", 0x70)
        copyreg.clear_extension_cache()


def rewritten(folder, name, content):
    """Put other bytes in the place of an entry, at the end of a file."""
    file = folder / "__0_0.distcp"
    offset = file.stat().st_size
    with open(file, "ab") as stream:
        stream.write(content)

    def change(metadata):
        [index] = [index for index in metadata.storage_data if index.fqn == name]
        metadata.storage_data[index] = _StorageInfo(file.name, offset, len(content))

    doctor(folder, change)


def zipped(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("entry", ["param_groups.0.lr", EXP_AVG])
def test_no_code_of_an_entry_runs(folder, entry):
    rewritten(folder, entry, zipped([torch.ones(3, 4), Evil()]))
    text = refused(folder, pickle.UnpicklingError)
    assert f"__0_0.distcp: entry '{entry}', at bytes" in text
    assert "names builtins.exec, which loading a checkpoint does not import" in text


class Setting:
    """A class that checkpoints of this test name."""


def test_classes_can_be_allowed(folder):
    rewritten(folder, "param_groups.0.lr", zipped(Setting()))
    assert "names tests.test_dcp_bad_input.Setting" in refused(folder, pickle.UnpicklingError)
    content = dcp_folder.read(folder, [Setting])
    assert type(content["param_groups"][0]["lr"]) is Setting
    doctor(folder, lambda metadata: setattr(metadata.storage_meta, "modules", [Setting()]))
    refused(folder, pickle.UnpicklingError)
    fastopt.load(adam(), folder, safe_globals=[Setting])
    fastopt.load(adam(), folder, safe_globals=[(Setting, "tests.test_dcp_bad_input.Setting")])


# ---- files ----


def test_a_folder_that_is_none(tmp_path):
    assert "it is empty" in refused_read(tmp_path)
    (tmp_path / "__0.metadata").touch()
    assert "use_collectives=False" in refused_read(tmp_path)
    (tmp_path / "__0.metadata").rename(tmp_path / "other")
    assert "it has no .metadata" in refused_read(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        dcp_folder.read(tmp_path / "nowhere")
    with pytest.raises(OSError, match="other"):
        dcp_folder.read(tmp_path / "other")


def refused_read(folder):
    with pytest.raises(CheckpointError) as caught:
        dcp_folder.read(folder)
    return str(caught.value)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_file_that_was_cut_short(folder, file, share):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(share * len(whole))])
    assert file in refused(folder)


def test_a_file_that_is_missing(folder):
    (folder / "__0_0.distcp").unlink()
    assert "__0_0.distcp is missing, which holds entry 'param_groups.0.lr'" in refused(folder)
    (folder / "__0_0.distcp").mkdir()
    assert "__0_0.distcp is no file" in refused(folder)
    (folder / "__0_0.distcp").rmdir()
    os.mkfifo(folder / "__0_0.distcp")
    assert "__0_0.distcp is no file" in refused(folder)


def test_no_permission(folder, monkeypatch):
    def denied(path, flags):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", denied)  # the tests may run as root, who is permitted everything
    assert "__0_0.distcp" in refused(folder, PermissionError)


def read_and_used(folder):
    """Read a folder and all of its tensors."""
    content = dcp_folder.read(folder)
    for entry in content.get("state", {}).values():
        for value in entry.values() if isinstance(entry, dict) else ():
            copying.deepcopy(value)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_random_bytes(folder, file):
    """Whatever byte is another: an error that names the file, or a checkpoint."""
    generator = random.Random(0)
    whole = (folder / file).read_bytes()
    outcomes = collections.Counter()
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (folder / file).write_bytes(damaged)
        try:
            read_and_used(folder)
            outcomes["read"] += 1
        except (CheckpointError, pickle.UnpicklingError) as error:
            assert str(folder) in str(error)  # noqa: PT017
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 20
    assert not Path("executed").exists()


def test_a_flipped_bit_is_found_where_one_asks(folder):
    dcp_folder.verify(folder)
    data = dcp_folder.read(folder)["state"][0]["exp_avg"].numpy().tobytes()
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    content[content.index(data)] ^= 1
    (folder / "__0_0.distcp").write_bytes(content)
    dcp_folder.read(folder)
    text = refused(folder, verify=True)
    assert f"__0_0.distcp: entry '{EXP_AVG}'" in text
    assert "checksum" in text


def test_a_folder_that_is_replaced_while_it_is_read(folder, monkeypatch):
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    read = dcp_metadata.read

    def read_and_replace(*arguments):
        index = read(*arguments)
        folder.rename(folder.with_name("old"))
        other.rename(folder)
        return index

    monkeypatch.setattr(dcp_metadata, "read", read_and_replace)
    assert "was replaced while it was being read" in refused(folder)


# ---- metadata ----


def place_of(metadata, name=EXP_AVG):
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def chunk(offsets, sizes):
    return records.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def chunked(*boxes):
    """Say that a tensor is in these chunks, all of which are where it is."""

    def change(metadata):
        entry, place = metadata.state_dict_metadata[EXP_AVG], place_of(metadata)
        entry.chunks = [chunk(offsets, sizes) for offsets, sizes in boxes]
        for offsets, _ in boxes:
            metadata.storage_data[records.MetadataIndex(EXP_AVG, offsets)] = place

    return change


def set_place(**values):
    return lambda metadata: [setattr(place_of(metadata), name, value) for name, value in values.items()]


def set_entry(**values):
    return lambda metadata: [
        setattr(metadata.state_dict_metadata[EXP_AVG], name, value) for name, value in values.items()
    ]


def planner(**values):
    return lambda metadata: metadata.planner_data.update({name.replace("__", "."): v for name, v in values.items()})


WRONG = {
    "beyond the file": (
        set_place(offset=10**6),
        "exp_avg' is at bytes 1,000,000 to .*, and the file has",
    ),
    "huge": (set_place(offset=2**63 - 1), "is at bytes"),
    "too huge": (set_place(offset=2**64), "the place of entry 'state.0.exp_avg' are"),
    "negative": (set_place(offset=-1), "the place of entry 'state.0.exp_avg' are"),
    "negative length": (set_place(length=-1), "the place of entry 'state.0.exp_avg' are"),
    "too long": (set_place(length=10**6), "overlap|is at bytes"),
    "too short": (set_place(length=100), "entry 'state.0.exp_avg', at bytes .* is damaged"),
    "nothing": (set_place(length=0), "entry 'state.0.exp_avg', at bytes .* is damaged"),
    "a float": (set_place(offset=1.0), "the place of entry 'state.0.exp_avg' are"),
    "shifted": (
        lambda metadata: setattr(place_of(metadata), "offset", place_of(metadata).offset + 8),
        "overlap|damaged",
    ),
    "overlapping bytes": (lambda metadata: setattr(place_of(metadata), "offset", 0), "the bytes of entries .* overlap"),
    "absolute": (set_place(relative_path="/etc/passwd"), "is the file '/etc/passwd', which is not in the folder"),
    "outside": (set_place(relative_path="../x"), r"is the file '\.\./x', which is not in the folder"),
    "no name": (set_place(relative_path=""), "is the file '', which is not in the folder"),
    "no str": (set_place(relative_path=3), "the place of entry 'state.0.exp_avg' is a int, not a str"),
    "extension": (
        set_place(transform_descriptors=["stream.zstd/1"]),
        r"through extensions \(\['stream.zstd/1'\]\)",
    ),
    "another dtype": (
        set_entry(properties=records.TensorProperties(torch.float64)),
        r"entry 'state.0.exp_avg', at .* it is float32 \[3, 4\], and by the metadata float64 \[3, 4\]",
    ),
    "no dtype": (set_entry(properties=None), "what entry 'state.0.exp_avg' has as properties is no TensorProperties"),
    "another size": (
        set_entry(size=torch.Size([3, 5])),
        "the chunks of .* hold 12 of its 15 elements",
    ),
    "a smaller size": (
        set_entry(size=torch.Size([3, 3])),
        r"chunk at \[0, 0\] of .*, \[3, 4\], is not within",
    ),
    "other dimensions": (set_entry(size=torch.Size([12])), "has other dimensions than its sizes"),
    "no size": (set_entry(size=None), "the sizes of entry 'state.0.exp_avg' are None, not sizes"),
    "no chunks": (set_entry(chunks=[]), "the chunks of entry 'state.0.exp_avg' hold 0 of its 12 elements"),
    "chunks of no kind": (set_entry(chunks=[1]), "a chunk of entry 'state.0.exp_avg' is no ChunkStorageMetadata"),
    "another shape": (chunked(((0, 0), (3, 2)), ((0, 2), (3, 2))), "it is float32|the bytes of entries"),
    "overlapping chunks": (
        chunked(((0, 0), (2, 4)), ((1, 0), (2, 4))),
        r"\[0, 0\] and \[1, 0\] of .* overlap",
    ),
    "twice": (chunked(((0, 0), (3, 4)), ((0, 0), (3, 4))), r"chunks at \[0, 0\] and \[0, 0\] of .* overlap"),
    "a gap": (chunked(((0, 0), (1, 4)), ((2, 0), (1, 4))), "hold 8 of its 12 elements"),
    "no place": (
        lambda metadata: metadata.storage_data.pop(records.MetadataIndex(EXP_AVG, [0, 0])),
        "it does not say where the chunk at .* of entry 'state.0.exp_avg' is",
    ),
    "no place of a value": (
        lambda metadata: metadata.storage_data.pop(records.MetadataIndex("param_groups.0.lr")),
        "it does not say where entry 'param_groups.0.lr' is",
    ),
    "no storage": (lambda metadata: setattr(metadata, "storage_data", None), "storage_data is a NoneType, not a dict"),
    "no entries": (lambda metadata: setattr(metadata, "state_dict_metadata", 3), "state_dict_metadata is a int"),
    "a strange entry": (lambda metadata: metadata.state_dict_metadata.update(a=1), "entry 'a' is a int, neither"),
    "a value for a tensor": (
        lambda metadata: metadata.state_dict_metadata.update({EXP_AVG: records.BytesStorageMetadata()}),
        "it does not say where entry 'state.0.exp_avg' is",
    ),
    "a path that is none": (planner(state__0__exp_avg="abc"), "the path of entry 'state.0.exp_avg' is 'abc'"),
    "an empty path": (planner(state__0__exp_avg=()), "the path of entry"),
    "a path of floats": (planner(state__0__exp_avg=("state", 1.5)), "the path of entry"),
    "a deep path": (planner(state__0__exp_avg=("a",) * 10**5), "the path of entry"),
    "a place that is taken": (planner(state__0__exp_avg=("state", "0", "step")), "stands where another one does"),
    "a place within another": (planner(state__0__exp_avg=("state", "0", "step", "x")), "stands where another one does"),
    "a huge index": (planner(state__0__exp_avg=("list", 10**12)), "the items of list 'list' are"),
    "a negative index": (planner(state__0__exp_avg=("list", -1)), "the items of list 'list' are"),
}


@pytest.mark.parametrize("what", WRONG)
def test_metadata_that_is_wrong(folder, what):
    change, text = WRONG[what]
    doctor(folder, change)
    with pytest.raises(CheckpointError, match=text):
        dcp_folder.read(folder)
    refused(folder)


def chained(content):
    """A list in a list, twice each, and so on: as a text, it is as long as there are atoms."""
    for _ in range(100):
        content = [content, content]
    return content


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02N" + b"r\xff\xff\xff\xffN.",
        b"\x80\x02Np4294967295\nN.",
        b"\x80\x04\x96" + bytes([255] * 7) + b"\x00abc.",
        b"\x80\x04\x8d" + bytes([255] * 8) + b"abc.",
        b"\x80\x04X\xff\xff\xff\xffabc.",
        b"\x80\x04\x95" + bytes([255] * 8) + b"N.",
        b"cposix\nsystem",
        b"\x80\x04N",
        pickle.dumps(chained(1)),
        pickle.dumps({"a": 10**5000}),
    ],
)
def test_a_pickle_asks_for_no_more_memory_than_it_has(folder, content):
    (folder / ".metadata").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_what_is_shown_of_a_value_is_short(folder):
    doctor(folder, set_place(offset=chained(1)))
    assert len(refused(folder)) < 1000
    doctor(folder, set_place(offset=10**5000))
    assert "are (" in refused(folder) or "a tuple" in refused(folder)


@pytest.mark.parametrize("protocol", range(6))
def test_metadata_of_any_protocol(folder, protocol):
    before = repr(dcp_folder.read(folder))
    metadata = metadata_of(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=protocol))
    if protocol > 1:  # before, classes need a function of copyreg's, which DCP never had them use
        assert repr(dcp_folder.read(folder)) == before
    else:
        assert "_reconstructor" in refused(folder, pickle.UnpicklingError)


@pytest.mark.parametrize("content", [3, None, [], {}, "text", torch.Size([3]), records.StorageMeta()], ids=str)
def test_metadata_of_another_kind(folder, content):
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    assert ".metadata is damaged" in refused(folder)


# ---- entries ----


def compressed(content, bomb=0):
    """A zip file of torch's, compressed, with as many zeros at the end of its pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            data = old.read(record)
            new.writestr(record.filename, data + bytes(bomb) if record.filename.endswith("data.pkl") else data)
    return stream.getvalue()


def larger(content):
    """The tensor of a zip file, made larger in its pickle."""
    return content.replace(b"K\x03K\x04\x86", b"K\x09K\x04\x86")


ENTRIES = {
    "no zip": (EXP_AVG, lambda: b"PK\x03\x04 and nothing more", "is damaged"),
    "zeros": (EXP_AVG, lambda: bytes(2000), "is damaged"),
    "no tensor": (EXP_AVG, lambda: zipped([1]), "it is a list, not a plain tensor"),
    "a parameter": (EXP_AVG, lambda: zipped(torch.nn.Parameter(torch.ones(3, 4))), "not a plain tensor"),
    "a sparse tensor": (EXP_AVG, lambda: zipped(torch.ones(3, 4).to_sparse()), "not a plain tensor"),
    "a gradient": (EXP_AVG, lambda: zipped(torch.ones(3, 4, requires_grad=True)), "one of a computation"),
    "another shape": (EXP_AVG, lambda: zipped(torch.ones(4, 3)), r"it is float32 \[4, 3\], and by the metadata"),
    "more than the storage": (EXP_AVG, lambda: larger(zipped(torch.ones(3, 4))), "damaged"),
    "expanded": (EXP_AVG, lambda: zipped(torch.ones(1).expand(3, 4)), "it has more elements than its storage"),
    "compressed": (EXP_AVG, lambda: compressed(zipped(torch.ones(3, 4))), "its storage is compressed"),
    "a bomb": (EXP_AVG, lambda: compressed(zipped(torch.ones(3, 4)), 10**7), "its pickle is too large"),
    "a bomb for a value": ("param_groups.0.lr", lambda: compressed(zipped(0.5), 10**7), "it is compressed"),
    "a value that is none": ("param_groups.0.lr", lambda: b"abc", "is damaged"),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_an_entry_that_is_wrong(folder, what):
    name, content, text = ENTRIES[what]
    rewritten(folder, name, content())
    with pytest.raises(CheckpointError, match=text) as caught:
        dcp_folder.read(folder)
    assert f"__0_0.distcp: entry '{name}', at bytes" in str(caught.value)
    refused(folder)


def test_a_record_that_lies_about_its_place(folder):
    """The local header says how long its name is; from there on, the storage would reach beyond the entry."""
    content = bytearray(zipped(torch.ones(3, 4)))
    header = content.index(b"archive/data/0") - 30
    content[header + 28 : header + 30] = struct.pack("<H", 60_000)
    rewritten(folder, EXP_AVG, bytes(content))
    assert "does not have the size that its pickle says" in refused(folder) or "damaged" in refused(folder)


def test_bytes_of_another_machine(folder):
    content = zipped(torch.ones(3, 4))
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream := io.BytesIO(), "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, b"big" if record.filename.endswith("byteorder") else old.read(record))
    rewritten(folder, EXP_AVG, stream.getvalue())
    assert "its bytes are in another machine's order" in refused(folder)


def test_a_large_entry_that_is_damaged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = copying.deepcopy(TORCH_STATE_DICT(trained(adam())))
    saved["large"] = (torch.zeros(30_000), "x" * 100_000)
    torch_save(saved, tmp_path / "checkpoint")
    place = place_of(metadata_of(tmp_path / "checkpoint"), "large")
    content = bytearray((tmp_path / "checkpoint" / "__0_0.distcp").read_bytes())
    for offset in range(place.length - 30, place.length):  # where the zip file says where its directory is
        damaged = bytearray(content)
        damaged[place.offset + offset] ^= 255
        (tmp_path / "checkpoint" / "__0_0.distcp").write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            dcp_folder.read(tmp_path / "checkpoint")
    damaged = bytearray(content)
    damaged[place.offset : place.offset + place.length] = bytes(place.length)
    (tmp_path / "checkpoint" / "__0_0.distcp").write_bytes(damaged)
    assert "entry 'large', at bytes" in refused(tmp_path / "checkpoint")
    rewritten(tmp_path / "checkpoint", "large", zipped((torch.zeros(30_000), Evil())))
    assert "names builtins.exec" in refused(tmp_path / "checkpoint", pickle.UnpicklingError)


def test_what_is_like_another_entry_is_looked_at_all_the_same(tmp_path, monkeypatch):
    """What was learnt from an entry holds for those that are the same to the byte, and for no others."""
    folder = tmp_path / "alike"
    torch_save({"a": torch.arange(6.0), "b": torch.arange(6.0) + 1}, folder)
    [file] = folder.glob("*.distcp")
    whole = file.read_bytes()
    second = max(metadata_of(folder).storage_data.values(), key=lambda place: place.offset)

    def result():
        try:
            return {name: tensor.tolist() for name, tensor in dcp_folder.read(folder).items()}
        except Exception as error:
            return type(error), str(error)

    for position in range(second.offset, second.offset + second.length):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        found = result()
        with monkeypatch.context() as alone:
            alone.setattr(dcp_shards, "MOST_OUTLINES", 0)
            assert found == result(), position
