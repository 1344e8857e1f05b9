"""Files that are damaged, mislead, or are not torch's: one error that names the file, and nothing changed."""

import contextlib
import copy as copying
import os
import random
import struct
import warnings
import zipfile

import pytest
import torch

import fastopt
from fastopt.files import torch_file
from tests.oracle import TORCH_STATE_DICT, Comparison, adam, fingerprint, outcome, trained
from tests.test_memory import CLEAR_REFS, MIB, resident
from tests.torch_files import (
    boundaries,
    by_torch,
    natively,
    pack_anew,
    records_of,
    rewrite,
    set_in_directory,
    start_of_directory,
)

pytestmark = pytest.mark.usefixtures("backend")

METHOD, COMPRESSED_SIZE, SIZE, FLAGS, NAME_LENGTH, HEADER = 10, 20, 24, 8, 28, 42  # in a directory's entry


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "optimizer.pt"
    torch.save(TORCH_STATE_DICT(trained(adam())), path)
    return path


@pytest.fixture(scope="module")
def optimizer():
    return trained(adam(), seed=4)


def assert_refused(optimizer, path, match=""):
    """The load raises an error that names the file, and leaves the optimizer as it was."""
    before = fingerprint(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, about odd files
        with pytest.raises(Exception, match=match) as caught:
            fastopt.load(optimizer, path)
    assert str(path) in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert fingerprint(optimizer) == before


# ---- cut short ----


def test_cut_at_every_boundary(path, optimizer):
    whole = path.read_bytes()
    for place in boundaries(path)[:-1]:
        for length in {max(place - 1, 0), place, place + 1}:
            path.write_bytes(whole[:length])
            assert_refused(optimizer, path)


def test_cut_anywhere(path, optimizer):
    whole = path.read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 150):
        path.write_bytes(whole[:length])
        assert_refused(optimizer, path)


# ---- bits that flipped ----


def regions(path):
    records, end = records_of(path), path.stat().st_size
    pickle = records["data.pkl"].header_offset
    data = records["data/0"].header_offset
    return {
        "pickle": range(pickle, records[".format_version"].header_offset),
        "headers": range(data, records["data/1"].header_offset),
        "directory": range(start_of_directory(path), end),
    }


@pytest.mark.parametrize("region", ["pickle", "headers", "directory"])
def test_flipped_bits(path, optimizer, region, backend):
    """Torch knows no checksums, so what is read may be wrong; but it is what torch reads, or an error.

    Of a directory that gives a record two sizes, torch reads memory that nobody has written to.
    """
    whole = path.read_bytes()
    places = regions(path)[region]
    chosen = random.Random(1)
    for place in chosen.sample(places, min(len(places), 400)):
        changed = bytearray(whole)
        changed[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(changed)
        value, error = outcome(lambda: torch_file.read(path))
        if error is not None:
            assert_refused(optimizer, path)
        else:
            expected, torchs = outcome(lambda: by_torch(path))
            if torchs is None:
                Comparison().same(value, expected)
            else:
                assert region == "directory", f"byte {place}: read, and torch raises {torchs!r}"


def test_flipped_bits_of_values_are_values(path):
    info = records_of(path)["data/1"]
    changed = bytearray(path.read_bytes())
    changed[info.header_offset + 64] ^= 1
    path.write_bytes(changed)
    Comparison().same(torch_file.read(path), by_torch(path))


# ---- a directory that misleads ----


def extent_of(path, name):
    info = records_of(path)[name]
    return info.header_offset, info.file_size


@pytest.mark.parametrize("size", [2**20, 2**31 - 1, 2**32 - 2, 2**32 - 1])
def test_a_record_that_ends_beyond_the_file(path, optimizer, size):
    for field in (COMPRESSED_SIZE, SIZE):
        set_in_directory(path, "data/3", field, struct.pack("<I", size))
    assert_refused(optimizer, path, match="data/3, .* ends beyond" if size < 2**32 - 1 else "")


@pytest.mark.parametrize("offset", [2**20, 2**31, 2**32 - 2])
def test_a_record_that_lies_outside_of_the_file(path, optimizer, offset):
    set_in_directory(path, "data/3", HEADER, struct.pack("<I", offset))
    assert_refused(optimizer, path, match="ends beyond")


def test_records_that_overlap(path, optimizer):
    begin, _ = extent_of(path, "data/4")
    set_in_directory(path, "data/3", HEADER, struct.pack("<I", begin))
    assert_refused(optimizer, path, match=r"records .*data/3 and .*data/4 overlap")


def test_a_record_within_another(path, optimizer):
    for field in (COMPRESSED_SIZE, SIZE):
        set_in_directory(path, "data/2", field, struct.pack("<I", 200))
    assert_refused(optimizer, path, match=r"data/2 and .* overlap")


def test_a_header_that_shifts_its_data_beyond_the_file(path, optimizer):
    last = max((info for info in records_of(path).values()), key=lambda info: info.header_offset)
    for name in ("data/8", "data.pkl", last.filename.partition("/")[2]):
        begin, _ = extent_of(path, name)
        changed = bytearray(path.read_bytes())
        changed[begin + 28 : begin + 30] = b"\xff\xff"
        path.write_bytes(changed)
    assert_refused(optimizer, path)


def test_a_tensor_whose_bytes_are_shifted_beyond_the_file(path, optimizer):
    begin, _ = extent_of(path, "data/8")
    changed = bytearray(path.read_bytes())
    changed[begin + 28 : begin + 30] = b"\xff\xff"
    path.write_bytes(changed)
    assert_refused(optimizer, path)


def test_a_record_that_is_smaller_than_its_tensor(path, optimizer, backend):
    for field in (COMPRESSED_SIZE, SIZE):
        set_in_directory(path, "data/0", field, struct.pack("<I", 2))
    if backend == "native":
        assert_refused(optimizer, path, match="record data/0 has 2 bytes, and 4 are asked of it")
    else:  # torch does not look
        Comparison().same(torch_file.read(path), by_torch(path))


@pytest.mark.parametrize("other", ["data/4", "DATA/4"])
def test_a_name_that_stands_twice(path, optimizer, other):
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("data/4")]
        [size] = [info.file_size for info in archive.infolist() if info.filename == name]
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(name.replace("data/4", other), bytes(size))
    assert_refused(optimizer, path, match=f"{other} stands twice")


def test_an_encrypted_record(path, optimizer):
    set_in_directory(path, "data/2", FLAGS, struct.pack("<H", 1))
    begin, _ = extent_of(path, "data/2")
    changed = bytearray(path.read_bytes())
    changed[begin + 6] |= 1
    path.write_bytes(changed)
    assert_refused(optimizer, path, match="data/2 is encrypted")


def test_records_packed_anew_but_not_compressed_are_read(path):
    expected = copying.deepcopy(by_torch(path))  # the file is written over
    rewrite(path)
    Comparison().same(torch_file.read(path), expected)


@pytest.mark.parametrize("past", [0, 1, 2, 4, 8])
def test_tensors_that_are_not_aligned_in_the_file_are_in_memory(path, past):
    """Torch's operations may kill the process where they are not: a clone of complex128 does, on some machines."""
    dtypes = [torch.complex128, torch.float64, torch.complex64, torch.float32, torch.bfloat16, torch.uint8]
    content = [torch.arange(1001).to(dtype) for dtype in dtypes]
    torch.save(content, path)
    pack_anew(path, past)
    read = torch_file.read(path)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in read)
    assert all(map(torch.equal, [tensor.clone() for tensor in read], content))
    assert (natively(path) is not None) == (past == 0)
    torch.save(content[3:], path)
    pack_anew(path, past)
    assert (natively(path) is not None) == (past % 4 == 0)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_records(path, optimizer, method):
    """With mmap, torch would take the compressed bytes for values."""
    rewrite(path, method)
    assert_refused(optimizer, path, match="is compressed; torch.save stores records as they are")


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs Linux to know the most memory since a moment")
@pytest.mark.parametrize("bomb", ["data.pkl", "data/1", "version", "byteorder"])
def test_a_zip_bomb(path, optimizer, bomb):
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if name.partition("/")[2] == bomb:
                info = zipfile.ZipInfo(name)
                info.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(info, "w") as record:
                    for _ in range(256):
                        record.write(bytes(MIB))
            else:
                archive.writestr(name, data)
    assert path.stat().st_size < MIB
    CLEAR_REFS.write_text("5")  # the most since now
    before = resident()
    assert_refused(optimizer, path, match=f"{bomb} is compressed")
    assert resident("VmHWM") - before < 64 * MIB


# ---- no file of torch's ----


def safetensors_bytes():
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return struct.pack("<Q", len(header)) + header + bytes(4)


FOREIGN = {
    "empty": b"",
    "one byte": b"P",
    "text": b"learning_rate = 0.1\n" * 40,
    "json": b'{"state": {}, "param_groups": []}',
    "safetensors": safetensors_bytes(),
    "zeros": bytes(4096),
    "an empty zip": b"PK\5\6" + bytes(18),
    "the head of a zip": b"PK\3\4" + bytes(26),
    "an elf": b"\x7fELF" + bytes(60),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("content", FOREIGN)
def test_another_format_behind_the_suffix(tmp_path, optimizer, content, suffix):
    path = tmp_path / f"optimizer{suffix}"
    path.write_bytes(FOREIGN[content])
    assert_refused(optimizer, path)


def test_a_zip_of_something_else(tmp_path, optimizer):
    path = tmp_path / "optimizer.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letters/a.txt", "a" * 100)
    assert_refused(optimizer, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a" * 100)
    assert_refused(optimizer, path)


def test_torchscript(tmp_path, optimizer):
    path = tmp_path / "optimizer.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    assert natively(path) is None
    assert_refused(optimizer, path)


def test_a_missing_file(tmp_path, optimizer):
    assert_refused(optimizer, tmp_path / "nowhere.pt", match="No such file")


def test_a_directory(tmp_path, optimizer):
    (tmp_path / "folder.pt").mkdir()
    assert_refused(optimizer, tmp_path / "folder.pt")


@contextlib.contextmanager
def as_nobody():
    """Root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_no_permission(path, optimizer):
    path.chmod(0)
    with as_nobody():
        assert_refused(optimizer, path, match="Permission denied")
