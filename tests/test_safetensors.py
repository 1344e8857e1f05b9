"""Files of the safetensors library; the library itself and torch's own state dicts are the oracle."""

import copy as copying
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import safetensors
import torch

import fastopt
from fastopt import backends
from fastopt.files import safetensors_file, staging
from tests.oracle import (
    TORCH_STATE_DICT,
    Comparison,
    adam,
    assert_same_load,
    fingerprint,
    torch_load,
    train,
    trained,
)
from tests.test_optimizers import EVERY, build, quietly_train

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path):
    return tmp_path / "optimizer.safetensors"


def there_and_back(path, content, **options):
    safetensors_file.write(path, content, **options)
    return safetensors_file.read(path, verify=True)


def separate(value, memo=None):
    """A copy in which no two containers and no two tensors share anything, but a tensor that stands twice."""
    memo = {} if memo is None else memo
    if isinstance(value, torch.Tensor):
        memo.setdefault(id(value), value.detach().clone().requires_grad_(value.requires_grad))
        return memo[id(value)]
    if type(value) is dict:
        return {key: separate(item, memo) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([separate(item, memo) for item in value])
    return value


# ---- roundtrips ----


@EVERY
def test_the_state_of_every_optimizer(backend, path, name, options, dtype):
    optimizer = build(name, options, dtype)
    quietly_train(optimizer, name, skip=(1,))
    fastopt.save(optimizer, path)
    saved = separate(TORCH_STATE_DICT(optimizer))
    Comparison().same(separate(safetensors_file.read(path, verify=True)), saved)

    actual, expected = (build(name, options, dtype, seed=1) for _ in range(2))
    fastopt.load(actual, path, verify=True)
    torch_load(expected, saved, copy=True)
    assert_same_load(actual, expected, copy=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_load_casts(backend, path, dtype):
    optimizer = trained(adam())
    fastopt.save(optimizer, path)
    actual, expected = adam(dtype=dtype), adam(dtype=dtype)
    report = fastopt.load(actual, path)
    torch_load(expected, separate(TORCH_STATE_DICT(optimizer)), copy=True)
    assert_same_load(actual, expected, copy=True)
    assert report.tensors == 9


def test_training_goes_on_as_without_the_file(backend, path):
    optimizer = trained(adam(amsgrad=True))
    fastopt.save(optimizer, path)
    resumed = adam(amsgrad=True)
    with torch.no_grad():
        for group, other in zip(optimizer.param_groups, resumed.param_groups, strict=True):
            for param, copy in zip(group["params"], other["params"], strict=True):
                copy.copy_(param)
    fastopt.load(resumed, path)
    for one in (optimizer, resumed):
        train(one, seed=3)
    Comparison().same(separate(TORCH_STATE_DICT(resumed)), separate(TORCH_STATE_DICT(optimizer)))
    Comparison().same(
        [p.detach() for g in resumed.param_groups for p in g["params"]],
        [p.detach() for g in optimizer.param_groups for p in g["params"]],
    )


DTYPES = [dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)]


@pytest.mark.parametrize("dtype", sorted(safetensors_file.DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 4), (2, 3, 4)], ids=str)
def test_dtypes(path, dtype, shape):
    raw = torch.randint(1, 120, (*shape, dtype.itemsize), dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape) if dtype is not torch.bool else (raw % 2).view(shape).bool()
    for value in (tensor, tensor.unsqueeze(0).expand(2, *shape)):
        back = there_and_back(path, {"state": {0: value}})["state"][0]
        assert (back.dtype, back.shape) == (value.dtype, value.shape)
        assert there_and_back(path, [back.clone()])[0].view(-1).view(torch.uint8).tolist() == (
            value.contiguous().view(-1).view(torch.uint8).tolist()
        )


@pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:torch.quantize_per_tensor")
def test_dtypes_that_the_format_lacks_are_refused(path):
    refused = []
    for dtype in set(DTYPES) - safetensors_file.DTYPES.keys():
        try:
            tensor = torch.empty(2, dtype=dtype)
        except (RuntimeError, TypeError):  # none that a plain tensor can have
            continue
        refused.append(dtype)
        with pytest.raises(TypeError, match=r"^state\[3\]\['foo'\] is "):
            safetensors_file.write(path, {"state": {3: {"foo": tensor}}})
    assert torch.complex128 in refused
    assert not list(path.parent.iterdir())


def test_strides_and_memory_that_is_shared(path):
    base = torch.arange(120.0).view(2, 3, 4, 5)
    content = {
        "channels last": base.to(memory_format=torch.channels_last),
        "one by one": torch.ones(4, 3, 1, 1).to(memory_format=torch.channels_last),
        "transposed": base[0, 0].t(),
        "permuted": base.permute(3, 1, 0, 2),
        "slice": base[:, :, 1:3, ::2],
        "expanded": base[:1].expand(3, 3, 4, 5),
        "again": base,
        "base": base,
        "row": base[0],
        "gradient": torch.ones(2, requires_grad=True),
        "empty": torch.zeros(0, 3).t(),
        "conjugated": torch.randn(3, 3, dtype=torch.complex64).conj(),
        "negated": torch.randn(3, 3, dtype=torch.complex64).conj().imag,
    }
    back = there_and_back(path, content)
    Comparison().same(back, separate(content) | {"conjugated": content["conjugated"].resolve_conj().clone()})
    assert back["again"] is back["base"]
    assert back["channels last"].is_contiguous(memory_format=torch.channels_last)


def test_dtypes_in_the_file_are_chosen_by_tensor(path):
    a, b, c = torch.rand(1000), torch.rand(7), torch.rand(3)
    back = there_and_back(path, {"a": a, "b": b, "c": c}, dtypes={id(a): torch.bfloat16, id(b): torch.float64})
    Comparison().same(back, {"a": a.bfloat16(), "b": b.double(), "c": c.clone()})
    with pytest.raises(TypeError, match=r"^a is to be saved as torch\.complex128, which safetensors does not have"):
        safetensors_file.write(path, {"a": a}, dtypes={id(a): torch.complex128})


def tensors_of_all_kinds():
    tensors = {f"{count}": torch.randn(count) * 1e5 for count in (0, 1, 7, 4095, 4096, 8191, 8192, 30_000)}
    tensors.update({str(dtype): torch.arange(5).to(dtype) for dtype in (torch.float64, torch.bool, torch.int16)})
    tensors.update(
        transposed=torch.randn(5, 7).t(), sliced=torch.randn(40)[3:30:2], expanded=torch.ones(1, 3).expand(4, 3)
    )
    tensors.update(
        conjugated=torch.randn(3, dtype=torch.complex64).conj(), part=torch.randn(9)[2:5], number=torch.tensor(2.5)
    )
    return tensors


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64, torch.float8_e5m2], ids=str)
def test_small_tensors_are_written_as_the_others_are(path, dtype):
    """Natively and many at once, or by the code that writes all that is larger."""
    tensors = tensors_of_all_kinds()
    dtypes = {id(tensor): dtype for name, tensor in tensors.items() if dtype and name != "conjugated"}
    before, found = backends.backend().name, []
    try:
        for name in ("native", "python"):
            backends.use(name)
            safetensors_file.write(path, tensors, dtypes)
            found.append(path.read_bytes())
    finally:
        backends.use(before)
    assert found[0] == found[1]


def test_small_tensors_are_written_natively(path, backend, monkeypatch):
    left = []
    monkeypatch.setattr(safetensors_file, "write_tensors", lambda _, rest, crc32: left.extend(rest) or [0] * len(left))
    a, b = torch.ones(5), torch.ones(70, 50)
    safetensors_file.write(path, {"a": a, "b": b, "large": torch.ones(5000)}, {id(b): torch.bfloat16})
    assert len(left) == (1 if backend == "native" else 3)


def test_the_library_reads_it_under_readable_names(path):
    optimizer = trained(adam())
    fastopt.save(optimizer, path)
    with safetensors.safe_open(path, framework="pt") as file:
        names = set(file.keys())
        found = {name: file.get_tensor(name) for name in names}
        about = file.metadata()
    for index, state in TORCH_STATE_DICT(optimizer)["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(found.pop(f"state.{index}.{key}"), value, rtol=0, atol=0)
    assert found == {}
    assert about["fastopt"] == "1"
    assert json.loads(about["content"])["param_groups"][1]["lr"] == 0.5


def test_tensors_are_aligned(path):
    content = {
        name: torch.zeros(3, dtype=d) for name, d in [("a", torch.uint8), ("b", torch.float64), ("c", torch.half)]
    }
    for tensor in there_and_back(path, content).values():
        assert tensor.data_ptr() % tensor.element_size() == 0


def test_names_that_collide_are_numbered(path):
    content = {
        "a": {"b": torch.tensor(0), 0: torch.tensor(1), "0": torch.tensor(2)},
        "a.b": torch.tensor(3),
        "a.b~2": torch.tensor(4),
        "__metadata__": torch.tensor(5),
        "": torch.tensor(6),
        "data_offsets": torch.tensor(8),
        '\ud800 ☃ \0 "': torch.tensor(7),
    }
    Comparison().same(there_and_back(path, content), separate(content))
    with safetensors.safe_open(path, framework="pt") as file:
        assert {"a.b", "a.b~2", "a.0", "a.0~2", "__metadata__~2"} <= set(file.keys())


@pytest.mark.parametrize(
    "content", [{}, [], None, 3, {"state": {}, "param_groups": []}, {"a": torch.empty(0)}], ids=str
)
def test_small_contents(path, content):
    Comparison().same(there_and_back(path, content), separate(content))


def test_many_tensors_are_loaded_natively(path):
    """The library's tensors are views, which the native walk leaves to the slow rules for what is not plain."""
    content = there_and_back(path, {"a": torch.ones(3), "b": torch.ones(2, 3).t(), "c": torch.ones(3, 1, 1)[:, :, ::2]})
    assert [tensor._base for tensor in content.values()] == [None] * 3


# ---- memory ----

LAZY = """
import resource, sys, torch
from fastopt.files import safetensors_file
def memory():
    return {l.split()[0]: int(l.split()[1]) >> 10 for l in open("/proc/self/status") if l.startswith("Rss")}
before = memory()
content = safetensors_file.read(sys.argv[1])
after = memory()
print(after["RssAnon:"] - before["RssAnon:"], after["RssFile:"] - before["RssFile:"])
assert content["a"][12345] == 1
"""

PEAK = """
import resource, sys, torch
from fastopt.files import safetensors_file
tensors = {i: torch.full((1 << 24,), 1.5).view(1 << 12, 1 << 12) for i in range(4)}
tensors[2] = tensors[2][:, ::2]
tensors[3] = tensors[3].t()
torch.zeros(1 << 22).bfloat16()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
safetensors_file.write(sys.argv[1], tensors, {id(t): torch.float64 for t in tensors.values()})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def run(code, path):
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to know the memory of a process")
def test_tensors_are_not_read_by_reading(path):
    safetensors_file.write(path, {"a": torch.ones(1 << 25)})  # 128 MiB
    anonymous, mapped = run(LAZY, path)
    assert anonymous < 16
    assert mapped < 32  # the library itself


def test_writing_takes_no_copy_in_memory(path):
    [grown] = run(PEAK, path)
    assert path.stat().st_size > 440 * 2**20
    assert grown < 64


# ---- what cannot be written ----


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, r"state\[0\]\['bad'\] is of type builtins.set"),
        (torch.zeros(2).as_subclass(Subclass), r"state\[0\]\['bad'\] is a Subclass"),
        (torch.nn.Parameter(torch.zeros(2)), r"state\[0\]\['bad'\] is a Parameter"),
        (torch.eye(2).to_sparse(), r"state\[0\]\['bad'\] is a sparse_coo tensor"),
        (torch.zeros(2, device="meta"), r"state\[0\]\['bad'\] is on the meta device"),
    ],
    ids=["set", "subclass", "parameter", "sparse", "meta"],
)
def test_what_has_no_place_is_named_and_the_file_stays(path, value, message):
    optimizer = trained(adam())
    fastopt.save(optimizer, path)
    before = path.read_bytes()
    next(iter(optimizer.state.values()))["bad"] = value
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        fastopt.save(optimizer, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_released_storage_is_named(path):
    tensor = torch.zeros(100)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^state\[0\] needs 400 bytes of memory and has 0"):
        safetensors_file.write(path, {"state": {0: tensor}})


def test_a_header_that_the_library_would_not_read(path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "LONGEST_HEADER", 100)
    with pytest.raises(ValueError, match=r"1 tensor make a header of .* save it as a \.pt file"):
        safetensors_file.write(path, {"a": torch.zeros(1)})
    assert not path.exists()


def test_a_failing_cast_names_the_tensor(path, monkeypatch):
    def failing(self, entry, offset, piece, dtype):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(staging._Writer, "cast", failing)
    tensor = torch.zeros(30_000)  # more than is written natively
    with pytest.raises(RuntimeError) as caught:
        safetensors_file.write(path, {"a": torch.ones(2), "b": tensor}, {id(tensor): torch.half})
    assert "while writing 'b'" in caught.value.__notes__
    assert not list(path.parent.iterdir())


def test_a_disk_that_is_full(path, monkeypatch):
    optimizer = trained(adam())
    fastopt.save(optimizer, path)
    before = path.read_bytes()

    def failing(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging.os, "pwrite", failing)
    monkeypatch.setattr(backends.current(), "write_small", failing)
    with pytest.raises(OSError, match="No space left"):
        fastopt.save(optimizer, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


# ---- what cannot be read ----


def header_of(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def sealed(content, **changes):
    """The metadata of a file with this content, whose checksum is right."""
    text = content if isinstance(content, str) else json.dumps(content)
    return {"fastopt": "1", "crc32": f"{zlib.crc32(text.encode()):08x}", "content": text, **changes}


def whole_file():
    state = {
        i: {"step": torch.tensor(3.0), "exp_avg": torch.arange(40.0) + i, "codes": torch.arange(5)} for i in range(3)
    }
    groups = [{"lr": 0.1, "betas": (0.9, 0.999), "params": ids} for ids in ([0, 1], [2])]
    return {"state": state, "param_groups": groups}


def offsets(index, value):
    def change(header, data):
        entry = header["state.1.exp_avg"]
        entry["data_offsets"][index] = value(entry["data_offsets"][index], len(data))

    return change


def entry(**changes):
    return lambda header, data: header["state.1.exp_avg"].update(changes)


def metadata_of(change):
    def apply(header, data):
        content = json.loads(header["__metadata__"]["content"])
        change(content)
        header["__metadata__"] = sealed(content)

    return apply


def reference(**changes):
    return metadata_of(lambda content: content["state"]["$dict"][1][1]["exp_avg"].update(changes))


HEADERS = {
    "begin before": offsets(0, lambda old, size: old - 4),
    "begin later": offsets(0, lambda old, size: old + 4),
    "end before": offsets(1, lambda old, size: old - 4),
    "end later": offsets(1, lambda old, size: old + 4),
    "negative": offsets(0, lambda old, size: -8),
    "outside": offsets(1, lambda old, size: size + 8),
    "huge": offsets(1, lambda old, size: 2**63),
    "beyond 64 bits": offsets(1, lambda old, size: 2**64 + old),
    "fraction": offsets(0, lambda old, size: old + 0.5),
    "backwards": entry(data_offsets=[200, 40]),
    "one offset": entry(data_offsets=[40]),
    "overlapping": lambda header, data: header["state.1.exp_avg"].update(header["state.0.exp_avg"]),
    "unknown dtype": entry(dtype="Q8"),
    "another dtype": entry(dtype="F64"),
    "dtype that torch lacks": entry(dtype="F6_E2M3"),
    "negative shape": entry(shape=[-40]),
    "too many": entry(shape=[41]),
    "overflowing": entry(shape=[2**62, 2**62]),
    "huge shape of nothing": entry(shape=[0, 2**64 - 1]),
    "shape that is none": entry(shape="40"),
    "missing shape": lambda header, data: header["state.1.exp_avg"].pop("shape"),
    "missing tensor": lambda header, data: header.pop("state.1.exp_avg"),
    "renamed tensor": lambda header, data: header.update(other=header.pop("state.1.exp_avg")),
    "a tensor that is none": lambda header, data: header.update({"state.1.exp_avg": 3}),
    "no metadata": lambda header, data: header.pop("__metadata__"),
    "metadata that is none": lambda header, data: header.update(__metadata__=[1]),
    "metadata of numbers": lambda header, data: header["__metadata__"].update(fastopt=1),
    "another version": lambda header, data: header["__metadata__"].update(fastopt="2"),
    "other metadata": lambda header, data: header.update(__metadata__={"format": "pt"}),
    "no content": lambda header, data: header["__metadata__"].pop("content"),
    "no checksum of it": lambda header, data: header["__metadata__"].pop("crc32"),
    "changed content": lambda header, data: header["__metadata__"].update(
        content=header["__metadata__"]["content"].replace("0.1", "0.2")
    ),
    "content that is no JSON": lambda header, data: header.update(__metadata__=sealed("{")),
    "content without tensors": lambda header, data: header.update(__metadata__=sealed({"state": {}})),
    "content nested deeply": lambda header, data: header.update(__metadata__=sealed("[" * 100_000)),
    "unknown tag": metadata_of(lambda content: content.update(param_groups={"$code": "1"})),
    "a tensor that is not there": reference(**{"$tensor": "nowhere"}),
    "a tensor without a name": reference(**{"$tensor": ["state.1.exp_avg"]}),
    "an unknown attribute": reference(layout="sparse"),
    "strides that overlap": reference(strides=[0]),
    "strides outside": reference(strides=[2]),
    "negative strides": reference(strides=[-1]),
    "huge strides": reference(strides=[2**63]),
    "too few strides": reference(strides=[]),
    "too many strides": reference(strides=[1, 1]),
    "strides that are none": reference(strides="1"),
    "strides of None": reference(strides=[None]),
    "a gradient of integers": metadata_of(
        lambda content: content["state"]["$dict"][1][1]["codes"].update(requires_grad=True)
    ),
    "no checksum": metadata_of(lambda content: content["state"]["$dict"][1][1]["codes"].pop("crc32")),
}


def refused(path, raw, **options):
    """The error of loading these bytes, which has to name the file and to leave the optimizer as it was."""
    path.write_bytes(raw)
    optimizer = trained(adam((40,), (40,), (40,)))
    before = fingerprint(optimizer)
    with pytest.raises(fastopt.CheckpointError) as caught:
        fastopt.load(optimizer, path, **options)
    assert fingerprint(optimizer) == before
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


@pytest.fixture
def raw(path):
    safetensors_file.write(path, whole_file())
    return path.read_bytes()


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(backend, path, raw, name):
    header, data = header_of(raw)
    HEADERS[name](header, data)
    refused(path, with_header(header, data))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("overlapping", "invalid offset for tensor `state."),
        ("huge shape of nothing", "no valid safetensors file"),
        ("missing shape", "missing field `shape`"),
        ("no metadata", "9 tensors ('state.0.codes', "),
        ("renamed tensor", "refers to the tensor 'state.1.exp_avg', which is not there"),
        ("content without tensors", "does not say where 'state.0.codes', "),
        ("another version", "its metadata is of version '2'; this fastopt reads '1'"),
        ("changed content", "its metadata is damaged"),
        ("strides that overlap", "what its metadata says of 'state.1.exp_avg' does not fit"),
        ("unknown tag", "['$code']"),
    ],
)
def test_errors_say_what_is_wrong(path, raw, name, message):
    header, data = header_of(raw)
    HEADERS[name](header, data)
    assert message in refused(path, with_header(header, data))


@pytest.mark.parametrize("length", [0, 1, 2, 7, 100, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_of_another_length(path, raw, length):
    header, data = header_of(raw)
    refused(path, with_header(header, data, length))


def test_duplicate_keys(path, raw):
    header, data = header_of(raw)
    text = json.dumps(header)
    for name in ("state.1.exp_avg", "__metadata__"):
        again = f"{json.dumps(name)}: {json.dumps(header[name])}"
        assert name in refused(path, with_header(f"{text[:-1]}, {again}}}".encode(), data))
    hidden = json.dumps(header["state.1.exp_avg"]).replace("data_offsets", "data\\u005foffsets")
    assert "'state.1.exp_avg' stands twice" in refused(
        path, with_header(f'{text[:-1]}, "state.1.exp_avg": {hidden}}}'.encode(), data)
    )
    lr = header["__metadata__"]["content"].replace('"lr":0.1', '"lr":0.1,"lr":0.2')
    assert lr != header["__metadata__"]["content"]
    header["__metadata__"] = sealed(lr)
    assert "'lr' stands twice" in refused(path, with_header(header, data))


def boundaries(raw):
    """Where the parts of a file begin and end."""
    length = int.from_bytes(raw[:8], "little")
    header, _ = header_of(raw)
    ends = [8 + length + end for name, one in header.items() if name != "__metadata__" for end in one["data_offsets"]]
    return sorted({0, 1, 7, 8, 9, 8 + length // 2, 8 + length - 1, 8 + length, *ends} - {len(raw)})


def test_a_file_that_was_cut_short(path, raw):
    places = boundaries(raw)
    assert len(places) > 15
    for place in [*places, *(place + 1 for place in places), *(place - 1 for place in places[1:])]:
        if place < len(raw):
            refused(path, raw[:place])


def test_a_file_with_more_than_it_says(path, raw):
    for more in (b"\0", bytes(8), raw):
        refused(path, raw + more)


def test_bits_that_flipped_in_the_data_are_found_when_asked(backend, path, raw):
    header, data = header_of(raw)
    start = len(raw) - len(data)
    for name, about in header.items():
        if name != "__metadata__":
            for place in {about["data_offsets"][0], about["data_offsets"][1] - 1}:
                flipped = bytearray(raw)
                flipped[start + place] ^= 0x10
                assert f"the data of '{name}' is damaged" in refused(path, bytes(flipped), verify=True)
                fastopt.load(adam((40,), (40,), (40,)), path)  # unread, as nobody asked


def test_every_bit_of_the_header_counts(path, raw):
    """No flipped bit of the header goes unnoticed where the data is verified."""
    _, data = header_of(raw)
    expected = separate(safetensors_file.read(path))
    for place in range(len(raw) - len(data)):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = safetensors_file.read(path, verify=True)
        except fastopt.CheckpointError:
            continue
        Comparison().same(separate(found), expected)  # a space of the padding that became another white space


def test_a_file_without_metadata_is_refused(path):
    import safetensors.torch

    safetensors.torch.save_file({"state.0.exp_avg": torch.zeros(3), "state.0.step": torch.tensor(1.0)}, path)
    text = refused(path, path.read_bytes())
    assert "2 tensors ('state.0.exp_avg', 'state.0.step'), and not the param_groups" in text


def test_a_file_that_the_library_wrote_again_is_read(path, raw):
    import safetensors.torch

    with safetensors.safe_open(path, framework="pt") as file:
        tensors, about = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    again = path.with_name("again.safetensors")
    safetensors.torch.save_file(dict(reversed(tensors.items())), again, about)
    Comparison().same(safetensors_file.read(again, verify=True), safetensors_file.read(path))


def test_tensors_that_are_not_aligned_are_read(path, raw):
    header, data = header_of(raw)
    for pad in range(8):
        path.write_bytes(with_header(json.dumps(header).encode() + b" " * pad, data))
        for state in safetensors_file.read(path, verify=True)["state"].values():
            assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in state.values())


def test_without_the_library_reading_says_so_and_writing_works(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    fastopt.save(trained(adam()), path)
    with pytest.raises(ImportError, match="needs the safetensors library: pip install safetensors"):
        fastopt.load(adam(), path)


def test_the_optimizer_shares_nothing_with_the_file(backend, path):
    fastopt.save(trained(adam()), path)
    loaded = adam()
    fastopt.load(loaded, path)
    before = copying.deepcopy(TORCH_STATE_DICT(loaded))
    path.write_bytes(os.urandom(path.stat().st_size))
    Comparison().same(TORCH_STATE_DICT(loaded), before)
