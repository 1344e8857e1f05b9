"""Files of torch.save that torch did not write: byte for byte what torch itself would have written."""

import collections
import io
import os
import pickle
import resource
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.serialization import config

import fastopt
from fastopt import backends
from fastopt.files import formats, staging, torch_file, torch_pickle, torch_zip
from tests import test_load_odd_tensors
from tests.oracle import TORCH_STATE_DICT, Bare, Comparison, adam, assert_same_error, fingerprint, outcome, parameter
from tests.test_optimizers import EVERY, build, quietly_train

pytestmark = pytest.mark.usefixtures("backend")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ID = "archive/.data/serialization_id"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "optimizer.pt"


def torchs_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def without_id(data):
    """A file without the number that torch makes of its checksums, and without that number's own checksum."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info, text = archive.getinfo(ID), archive.read(ID)
    for varying in (text, info.CRC.to_bytes(4, "little")):
        data = data.replace(varying, bytes(len(varying)))
    return data


def assert_same_file(path, content):
    """The file is torch's for the content, and torch's readers read it."""
    data = path.read_bytes()
    assert without_id(data) == without_id(torchs_file(content))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    torch_file.verify(path)


def assert_same_written(path, content, dtypes=None, expected=None):
    """What is written is what torch writes for `expected`, or for the content; errors are torch's.

    And what torch itself would not read by `weights_only=True` is refused.
    """
    _, ours = outcome(lambda: torch_file.write(path, content, dtypes))
    data, torchs = outcome(lambda: torchs_file(content if expected is None else expected))
    if torchs is None:
        _, unread = outcome(lambda: torch.load(io.BytesIO(data), weights_only=True))
        if isinstance(unread, pickle.UnpicklingError):
            torchs = ours
            assert isinstance(ours, TypeError)
            assert "torch.load(weights_only=True) would not read the file" in str(ours)
    assert_same_error(ours, torchs)
    if torchs is None:
        assert_same_file(path, content if expected is None else expected)
    else:
        assert not path.exists()


# ---- Optimizers ----


@EVERY
def test_every_optimizer(path, name, options, dtype):
    optimizer = build(name, options, dtype, named=True)
    quietly_train(optimizer, name, skip=(1,))
    saved = TORCH_STATE_DICT(optimizer)
    fastopt.save(optimizer, path)
    assert_same_file(path, saved)
    for mmap in (False, True):
        Comparison().same(torch.load(path, weights_only=True, mmap=mmap), saved)


def test_pythons_own_check_of_zip_files(path):
    fastopt.save(adam(), path)
    done = subprocess.run([sys.executable, "-m", "zipfile", "-t", path], capture_output=True, text=True, check=True)
    assert done.stdout == "Done testing\n"


# ---- Tensors ----


def quantized(*shape):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.randn(shape), 0.1, 3, torch.quint8)


def with_hook():
    leaf = torch.ones(3, requires_grad=True)
    leaf.register_hook(lambda grad: grad)
    return leaf


def two_dtypes():
    base = torch.arange(8.0)
    return [base, base.view(torch.int32)]


def two_storages():
    memory = bytearray(64)
    return [torch.frombuffer(memory, dtype=F32), torch.frombuffer(memory, dtype=torch.int32)]


def resized_away():
    tensor = torch.ones(5)
    tensor.untyped_storage().resize_(0)
    return tensor


MORE = {
    "quantized": lambda: quantized(3, 4),
    "complex": lambda: torch.randn(5, dtype=torch.complex64),
    "conjugated": lambda: torch.randn(5, dtype=torch.complex64).conj(),
    "imaginary part of a conjugated": lambda: torch.randn(5, dtype=torch.complex64).conj().imag,
    "on meta": lambda: torch.ones(3, device="meta"),
    "a subclass": lambda: TwoTensor(torch.ones(3), torch.zeros(3)),
    "compressed sparse": lambda: torch.eye(3).to_sparse_csr(),
    "float8": lambda: torch.randn(9).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.tensor([1, 2, 65535], dtype=torch.uint16),
    "no leaf": lambda: torch.ones(3, requires_grad=True) * 2,
    "with a hook": with_hook,
    "viewed as two dtypes": two_dtypes,
    "two storages of two dtypes": two_storages,
    "resized away": resized_away,
    "of inference mode": lambda: torch.inference_mode()(torch.ones)(3),
    "empty": lambda: [torch.empty(0), torch.empty(0, 5), torch.empty(3, 0, dtype=torch.int64)],
    "a storage": lambda: torch.ones(4).untyped_storage(),
    "all dtypes": lambda: [
        torch.arange(5).to(dtype)
        for dtype in (F32, F64, F16, BF16, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
    ],
    "double complex": lambda: torch.randn(5, dtype=torch.complex128),
}


@pytest.mark.parametrize("name", [*test_load_odd_tensors.odd_tensors(F32), *MORE])
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:backward hook")
def test_odd_tensors(path, name):
    value = MORE[name]() if name in MORE else test_load_odd_tensors.odd_tensors(F32)[name]
    assert_same_written(path, {"first": torch.ones(2), "odd": value, "again": [value], "last": torch.zeros(20_000)})


def test_what_torch_warns_of(path):
    content = {"odd": with_hook()}
    with pytest.warns(UserWarning, match="backward hook"):
        torch_file.write(path, content)


def test_storages_stay_shared(path):
    base, large = torch.randn(100), torch.randn(50_000)
    content = {
        "views": [base[:10], base[5:], base.view(10, 10).t(), base],
        "large": (large[7:], large),
        "many": [torch.full((3,), float(i)) for i in range(300)],
    }
    content["again"] = [*content["many"], *content["views"], content["many"][11][1:], content["large"]]
    assert_same_written(path, content)
    Comparison().same(torch.load(path, weights_only=True), content)


def test_devices_other_than_the_cpu(path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "is_elsewhere", lambda tensor: True)
    backends.use("python")  # the native one leaves them to it
    shared = torch.randn(40_000)
    content = {"a": shared, "b": shared[5:], "c": torch.randn(3), "d": torch.ones(7).to(torch.float8_e5m2)}
    assert_same_written(path, {**content, "e": MORE["quantized"](), "f": torch.eye(2).to_sparse()})
    path.unlink()
    assert_same_written(path, two_dtypes())


def test_torchs_own_way_to_the_cpu_is_not_taken(path, monkeypatch):
    """It would ask for the data of what only stands in for a storage."""
    backends.use("python")
    seen, save = [], torch.serialization._save

    def watched(*arguments):
        seen.append(config.save.use_pinned_memory_for_d2h)
        save(*arguments)

    monkeypatch.setattr(torch.serialization, "_save", watched)
    config.save.use_pinned_memory_for_d2h = True
    try:
        torch_file.write(path, [torch.ones(3)])
        assert config.save.use_pinned_memory_for_d2h is True
    finally:
        config.save.use_pinned_memory_for_d2h = False
    assert seen == [False]


# ---- Everything else ----


def within_itself(kind):
    value = kind()
    value.append(value) if kind is list else value.update(me=value)
    return value


def nested(depth):
    value = torch.ones(1)
    for level in range(depth):
        value = [value] if level % 2 else {"below": value}
    return value


Named = collections.namedtuple("Named", "a b")
shared_list, shared_text = [1, torch.ones(2)], "".join(["a text", " of its own"])
CONTENTS = {
    "numbers": [0, 1, 255, 256, 65535, 65536, -1, -128, -129, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1],
    "long numbers": [2**40, 2**55, -(2**55), 2**63 - 1, -(2**63), 2**63, 2**64, -(2**70), 10**30],
    "floats": [0.0, -0.0, 1e-300, float("inf"), float("-inf"), float("nan"), 0.1],
    "constants": [None, True, False, (), [], {}, ""],
    "texts": ["", "a", "é", "語", "a" * 300, "\0", "\ud800", "0", "7", "10", "11", "storage", "cpu", "torch"],
    "keys": {"0": 1, 0: 2, None: 3, True: 4, (1, 2): 5, 1.5: 6, "cpu": 7},
    "tuples": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (1, (2, (3, [4])))],
    "the same twice": [shared_list, shared_list, (shared_list,), shared_text, {shared_text: shared_text}],
    "complex": [1j],
    "bytes": [b"", b"ab"],
    "sets": [{1, 2}, frozenset("a")],
    "ordered": collections.OrderedDict(a=torch.ones(1)),
    "default": collections.defaultdict(dict, {1: {"a": torch.ones(1)}}),
    "named": [Named(1, 2)],
    "sizes": torch.Size([1, 2]),
    "dtypes": [F32, torch.device("cpu")],
    "a list within itself": within_itself(list),
    "a dict within itself": within_itself(dict),
    "deep": nested(40),
    "deeper": nested(90),
    "a tensor alone": torch.arange(3),
    "nothing that pickles": {"a": lambda: 0},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents(path, name):
    content = CONTENTS[name]
    assert_same_written(path, content)
    assert_same_written(path, [torch.ones(3), content, content, torch.zeros(2)])


@pytest.mark.parametrize("count", [999, 1000, 1001, 2000, 2001])
def test_long_containers(path, count):
    """At multiples of a thousand entries, pickle itself adds a thousand, and then none."""
    content = {
        "dict": {i: torch.tensor(i) for i in range(count)},
        "list": list(range(count)),
        "texts": [str(i) for i in range(count)],
    }
    torch_file.write(path, content)
    Comparison().same(torch.load(path, weights_only=True), content)
    torch_file.verify(path)


def test_a_small_state_is_pickled_natively(path, backend, monkeypatch):
    """So that what is compared above is not torch's own path twice."""
    seen = []
    monkeypatch.setattr(backends.python, "write_torch_files", lambda *_: seen.append(1))
    torch_file.write(path, {"a": [torch.ones(2), (1, "a", None, 2.5)]})
    assert bool(seen) == (backend == "python")


# ---- The container ----


@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_alignment_is_torchs_setting(path, alignment):
    before = config.save.storage_alignment
    config.save.storage_alignment = alignment
    try:
        assert_same_written(path, [torch.ones(3), torch.ones(30_000), torch.ones(5)])
    finally:
        config.save.storage_alignment = before


@pytest.mark.parametrize("size", [2**32 - 2, 2**32 - 1, 2**32, 2**32 + 5])
def test_beyond_32_bits(tmp_path, size, monkeypatch):
    """What stands around large records, without their data: both files have holes in its place."""
    mapped = torch.from_file(str(tmp_path / "zeros"), shared=True, size=size, dtype=torch.uint8)
    content = [torch.ones(2), mapped, torch.ones(3), mapped.new_empty(0), torch.ones(70_000)]
    skipped = lambda fd, entries, crc32=None: [0 for _ in entries]  # noqa: E731
    monkeypatch.setattr(torch_zip, "write_tensors", skipped)
    monkeypatch.setattr("fastopt.backends.native.write_tensors", skipped)
    with open(tmp_path / "ours", "wb") as file:
        backends.current().write_torch_files(file.fileno(), [content], {})
    with open(tmp_path / "torchs", "wb") as file, torch.serialization.skip_data():
        torch.save(content, file)
    assert outline(tmp_path / "ours") == outline(tmp_path / "torchs")


def outline(path):
    """All of a file but the data of storages, and the number that is made of checksums."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        ends = [info.header_offset for info in infos[1:]] + [archive.start_dir]
        found = [os.path.getsize(path), archive.start_dir]
        for info, end in zip(infos, ends, strict=True):
            file.seek(info.header_offset)
            header = file.read(30)
            header += file.read(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"))
            file.seek(info.header_offset + len(header) + info.file_size)
            descriptor = file.read(end - file.tell())
            hidden = "/data/" in info.filename or info.filename == ID
            found.append((info.filename, info.file_size, None if hidden else info.CRC, header, info.extra))
            found.append(len(descriptor) if hidden else descriptor)
            found.append((descriptor[:4], descriptor[8:]))
        file.seek(archive.start_dir)
        directory = bytearray(file.read())
    position = 0
    for info in infos:
        directory[position + 16 : position + 20] = bytes(4)
        position += 46 + len(info.filename) + len(info.extra)
    return [*found, bytes(directory)]


# ---- Casts ----


def floating():
    return {
        "plain": torch.randn(70, 9),
        "large": torch.randn(300, 700) * 1e5,
        "transposed": torch.randn(30, 7).t(),
        "large and transposed": torch.randn(300, 700).t(),
        "permuted": torch.randn(4, 5, 6).permute(2, 0, 1),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "sliced": torch.randn(10, 10)[::2, 1:],
        "expanded": torch.randn(1, 4).expand(50, 4),
        "at an offset": torch.randn(10)[3:],
        "a scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "one row": torch.randn(1, 5).t(),
        "double": torch.randn(11, dtype=F64),
        "half": torch.randn(11).half(),
        "integers": torch.arange(7),
    }


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64, torch.float8_e4m3fn], ids=str)
def test_casts_are_those_of_to(path, dtype):
    content = floating()
    dtypes = {id(tensor): dtype for tensor in content.values()}
    expected = {name: tensor.to(dtype) for name, tensor in content.items()}
    expected = {name: tensor.clone() if tensor is content[name] else tensor for name, tensor in expected.items()}
    kept = [name for name, tensor in content.items() if tensor.dtype == dtype]
    for name in kept:  # these keep their storages
        expected[name] = content[name]
    assert_same_written(path, content, dtypes, expected)


@pytest.mark.parametrize("name", floating())
def test_a_cast_of_one_among_others(path, name):
    content = floating()
    again = [content[name], content]
    expected = {**content, name: content[name].to(BF16)}
    assert_same_written(path, [again], {id(content[name]): BF16}, [[expected[name], expected]])


def saved_as(optimizer, path, dtype):
    """The file, and what torch would save if the state had these dtypes."""
    report = fastopt.save(optimizer, path, dtype=dtype)
    content = torch.load(path, weights_only=True)
    Comparison().same(content, fastopt.snapshot(optimizer, dtype=dtype).state_dict())
    return content["state"], report


def trained_adam():
    optimizer = adam(amsgrad=True)
    quietly_train(optimizer, "Adam")
    return optimizer


@pytest.mark.parametrize("dtype", [BF16, F16, F64, F32])
def test_saving_as_another_dtype(path, dtype):
    optimizer = trained_adam()
    before = fingerprint(optimizer)
    state, report = saved_as(optimizer, path, dtype)
    assert {value.dtype for value in state[0].values()} == {F32, dtype}
    assert state[0]["step"].dtype is F32
    assert fingerprint(optimizer) == before
    counts = {pair: count.tensors for pair, count in report.casts.items()}
    assert counts == ({} if dtype is F32 else {(F32, dtype): 9})
    assert report.tensors == 12
    assert report.bytes_written == path.stat().st_size
    assert ("cast 9 from float32 to" in str(report)) == (dtype is not F32)


def test_dtypes_by_key(path):
    state, report = saved_as(trained_adam(), path, {"exp_avg": BF16, "max_*": F16, "momentum": F16})
    assert {key: value.dtype for key, value in state[1].items()} == {
        "step": F32,
        "exp_avg": BF16,
        "exp_avg_sq": F32,
        "max_exp_avg_sq": F16,
    }
    assert report.unused_patterns == ["momentum"]
    assert "no key of the state fits 'momentum', given in dtype" in str(report)
    state, _ = saved_as(trained_adam(), path, {"step": BF16})
    assert state[0]["step"].dtype is BF16


@EVERY
def test_every_optimizer_as_another_dtype(path, name, options, dtype):
    optimizer = build(name, options, dtype)
    quietly_train(optimizer, name, skip=(1,))
    saved_as(optimizer, path, BF16)


def test_state_of_any_structure_as_another_dtype(path):
    param = parameter(3)
    optimizer = Bare([param])
    twice = torch.rand(5)
    optimizer.state[param] = {
        "list": [twice, (twice, torch.arange(3))],
        "twice": twice,
        "deep": {"step": torch.rand(2), "m": torch.rand(2)},
        "requires grad": torch.ones(3, requires_grad=True),
        "attribute": torch.nn.Parameter(torch.rand(4)),
        "neg": torch._neg_view(torch.rand(4)),
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.rand(3, dtype=torch.complex64),
        "name": "x",
    }
    optimizer.state["of no parameter"] = {"t": torch.rand(2)}
    fastopt.save(optimizer, path, dtype={"list": BF16, "*": F16})
    state = torch.load(path, weights_only=True)["state"]
    assert [value.dtype for value in (state[0]["list"][0], state[0]["twice"], state[0]["deep"]["m"])] == [
        BF16,
        F16,
        F16,
    ]
    assert [value.dtype for value in (state[0]["deep"]["step"], state["of no parameter"]["t"])] == [F32, F32]
    assert [state[0][key].dtype for key in ("sparse", "complex", "neg")] == [F16, torch.complex64, F16]
    assert torch.equal(state[0]["neg"], optimizer.state[param]["neg"].to(F16))
    assert state[0]["requires grad"].requires_grad


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to:
            raise RuntimeError("this one is not cast")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_tensor_that_cannot_be_cast_is_named(path):
    optimizer = trained_adam()
    first = next(iter(optimizer.state.values()))
    first["exp_avg"] = first["exp_avg"].as_subclass(Refusing)
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="not cast") as caught:
        fastopt.save(optimizer, path, dtype=BF16)
    notes = " ".join(caught.value.__notes__)
    assert "while saving the state of parameter 0" in notes
    assert "'exp_avg'" in notes
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("dtype", [torch.int8, "half", {"exp_avg": 3}, {1: BF16}])
def test_what_is_no_dtype_leaves_the_file(path, dtype):
    path.write_bytes(b"old")
    with pytest.raises((ValueError, TypeError)):
        fastopt.save(trained_adam(), path, dtype=dtype)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["a.safetensors", "a.dcp"])
def test_other_formats_cast_as_well(tmp_path, name):
    optimizer = trained_adam()
    report = fastopt.save(optimizer, tmp_path / name, dtype=BF16)
    loaded = adam(amsgrad=True)
    fastopt.load(loaded, tmp_path / name, policy="keep")
    assert not fastopt.diff(loaded, fastopt.snapshot(optimizer, dtype=BF16).state_dict())
    assert report.casts[F32, BF16].tensors == 9


PEAK = """
import resource, sys, torch, fastopt
params = [torch.nn.Parameter(torch.zeros(1 << 22)) for _ in range(24)]
optimizer = torch.optim.SGD(params, lr=1, momentum=0.9)
for param in params:
    optimizer.state[param]["momentum_buffer"] = torch.ones(1 << 22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastopt.save(optimizer, sys.argv[1], dtype=eval(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("dtype", ["None", "torch.float64"])
@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
def test_memory_is_bounded(path, backend, dtype):
    environment = {**os.environ, "FASTOPT_BACKEND": backend}
    command = [sys.executable, "-c", PEAK, str(path), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert path.stat().st_size > 400e6
    assert float(done.stdout) < 200


# ---- Errors ----


@pytest.mark.parametrize("shapes", [((1000, 1000),), ((50,),) * 2000], ids=["large", "small"])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_an_error_in_the_middle_leaves_the_old_file(path, shapes, share):
    optimizer = adam(*shapes)
    quietly_train(optimizer, "Adam", steps=1)
    fastopt.save(optimizer, path)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), limit[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            fastopt.save(optimizer, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_cast_that_fails_leaves_the_old_file(path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    optimizer = adam((300, 300))
    quietly_train(optimizer, "Adam")
    path.write_bytes(b"old")
    monkeypatch.setattr(staging._Writer, "cast", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        fastopt.save(optimizer, path, dtype=BF16)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


def test_a_writer_of_torchs_that_does_other_things_is_refused(path):
    with open(path, "wb") as file:
        outline = torch_zip._Outline(file.fileno())
        outline.seek(5, os.SEEK_CUR)
        outline.write(memoryview(b"PK\3\4 and no descriptor"))
        with pytest.raises(RuntimeError, match="no room for a checksum"):
            outline.raise_failure()
        outline = torch_zip._Outline(file.fileno())
        outline.seek(5, os.SEEK_SET)
        with pytest.raises(RuntimeError, match="goes back"):
            outline.raise_failure()
        with pytest.raises(RuntimeError, match="directory of another form"):
            torch_zip._Outline(file.fileno()).finish({0: 5})


def test_room_of_another_size_is_refused(path, monkeypatch):
    backends.use("python")
    monkeypatch.setattr(torch_zip._Outline, "seek", lambda *_: 0)
    with pytest.raises(RuntimeError, match="other room"):
        torch_file.write(path, torch.ones(30_000))
    assert not path.exists()


def test_an_interruption_is_passed_on(path, monkeypatch):
    """Also out of torch's writer, which would end the process."""
    backends.use("python")
    monkeypatch.setattr(torch_zip, "CHUNK", 1000)
    calls = iter([None] * 5)

    def interrupted(*_):
        if next(calls, 0) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch_zip, "write_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        torch_file.write(path, [torch.ones(5000) for _ in range(10)])
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("alignment", [0, 0xFFFF - 31, 1 << 17])
@pytest.mark.parametrize("name", ["a.pt", "a.dcp"])
def test_an_alignment_that_makes_files_that_nobody_can_read(tmp_path, backend, name, alignment):
    """With zero, torch.save ends the process; with a large one it writes such files without a word."""
    path = tmp_path / name
    formats.write(path, {"a": torch.ones(3)})
    with config.patch({"save.storage_alignment": alignment}), pytest.raises(ValueError, match="storage_alignment is"):
        formats.write(path, {"a": torch.zeros(3)})
    assert formats.read(path, verify=True)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("alignment", [1, 4096, 0xFFFF - 32])
def test_other_alignments(tmp_path, backend, alignment):
    content = [torch.arange(count) for count in (1, 3, 20_000, 7)]
    with config.patch({"save.storage_alignment": alignment}):
        torch_file.write(tmp_path / "a.pt", content)
    for mmap in (False, True):
        assert all(map(torch.equal, torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap), content))
    torch_file.verify(tmp_path / "a.pt")
    assert all(map(torch.equal, torch_file.read(tmp_path / "a.pt"), content))
