"""Folders of torch.distributed.checkpoint; torch's own reader and writer are the oracle."""

import collections
import copy as copying
import io
import itertools
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import fastopt
from fastopt.backends import python
from fastopt.chunked import ChunkedTensor
from fastopt.files import dcp_folder, dcp_writer, in_file, staging
from tests import oracle
from tests.dcp import metadata_of, save_in_chunks, torch_content, torch_load, torch_save
from tests.oracle import TORCH_STATE_DICT, Comparison, adam, assert_same_load, bits, parameter, train, trained

pytestmark = pytest.mark.usefixtures("backend")

ROOT = Path(__file__).parent.parent
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64

OPTIMIZERS = {
    "Adam": lambda params: torch.optim.Adam(params, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.5), foreach=False),
    "NAdam": torch.optim.NAdam,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "RMSprop": lambda params: torch.optim.RMSprop(params, momentum=0.5, centered=True),
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "SGD": lambda params: torch.optim.SGD(params, momentum=0.9),
}


def state_of(optimizer):
    return copying.deepcopy(TORCH_STATE_DICT(optimizer))


def zeroed(value):
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: zeroed(item) for key, item in value.items()}
    return value


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoint.dcp"


# ---- what torch wrote ----


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_torch_saved_is_loaded_as_torch_loads_it(folder, name, dtype):
    def made(dtype):
        params = [parameter(*shape, dtype=dtype) for shape in ((3, 4), (5,), (), (2, 3, 2))]
        return OPTIMIZERS[name](params)

    saved = state_of(trained(made(F32)))
    torch_save(saved, folder)
    actual, expected = made(dtype), made(dtype)
    fastopt.load(actual, folder)
    oracle.torch_load(expected, torch_load({**saved, "state": zeroed(saved["state"])}, folder), copy=True)
    assert_same_load(actual, expected, copy=True)


def test_states_that_are_no_tensors_keep_their_types(folder):
    saved = state_of(trained(adam()))
    saved["state"][0].update(none=None, flag=True, count=3, rate=float("-inf"), text="a.b", pair=(1, (2.5, None)))
    saved["state"][0].update(shape=torch.Size([2]), dtype=F32, items=[1, "x"], tensors=[torch.ones(2), 3], empty=[])
    saved["state"][2]["deep"] = {"er": {"tensor": torch.arange(3), "number": 1j}}
    saved["param_groups"][0].update({"with.dot": 1, "nested": {"a": 1}})
    torch_save(saved, folder)
    Comparison().same(dcp_folder.read(folder), saved)


def test_lists_of_tensors_are_lists_again(folder):
    params = [parameter(3), parameter(2)]
    optimizer = torch.optim.LBFGS(params)
    optimizer.step(lambda: backwards(params))
    saved = state_of(optimizer)
    torch_save(saved, folder)
    Comparison().same(dcp_folder.read(folder), saved)
    again = torch.optim.LBFGS([parameter(3), parameter(2)])
    fastopt.load(again, folder)
    Comparison().same(TORCH_STATE_DICT(again), saved)


def backwards(params):
    for param in params:
        param.grad = None
    loss = sum((param**2).sum() for param in params)
    loss.backward()
    return loss


def test_an_optimizer_without_state(folder):
    torch_save(TORCH_STATE_DICT(adam()), folder)
    assert dcp_folder.read(folder)["state"] == {}
    optimizer = trained(adam())
    fastopt.load(optimizer, folder)
    assert not optimizer.state


def test_a_state_within_a_checkpoint(folder):
    saved = state_of(trained(adam()))
    model = {"layer.0.weight": torch.randn(3, 4), "layer.0.bias": torch.ones(3)}
    torch_save({"model": model, "optimizers": [saved, saved], "epoch": 3}, folder)
    for key in ("optimizers.0", "optimizers.1"):
        optimizer = adam()
        fastopt.load(optimizer, folder, key=key)
        Comparison().same(TORCH_STATE_DICT(optimizer), saved)
    with pytest.raises(KeyError, match=r"no state dict; pass key='optimizers\.0' or 'optimizers\.1'"):
        fastopt.load(adam(), folder)
    content = dcp_folder.read(folder)
    assert content["epoch"] == 3
    Comparison().same(content["model"], model)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_the_form_of_get_optimizer_state_dict(folder, flat):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))

    def made():
        return torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5}])

    optimizer = trained(made())
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    torch_save({"model": model.state_dict(), "optim": saved}, folder)
    Comparison().same(dcp_folder.read(folder)["optim"], saved)
    again = made()
    fastopt.load(again, folder, key="optim")
    Comparison().same(TORCH_STATE_DICT(again)["state"], TORCH_STATE_DICT(optimizer)["state"])
    reordered = torch.optim.AdamW(list(model.named_parameters())[::-1])
    fastopt.load(reordered, folder, key="optim", transform=lambda saved: fastopt.match(saved, reordered, strict=False))
    for param in model.parameters():
        Comparison().same(reordered.state[param], optimizer.state[param])


def test_without_flattening_entries_are_the_content(folder):
    saved = state_of(trained(adam()))
    planner = torch_dcp_planner(flatten_state_dict=False)
    torch_save(saved, folder, planner=planner)
    assert metadata_of(folder).planner_data is None
    Comparison().same(dcp_folder.read(folder), saved)


def torch_dcp_planner(**options):
    return torch.distributed.checkpoint.DefaultSavePlanner(**options)


def test_several_files_and_one_for_each_entry(folder):
    saved = state_of(trained(adam()))
    for single, threads in ((True, 3), (False, 1)):
        writer = torch.distributed.checkpoint.FileSystemWriter(
            folder / str(single), single_file_per_rank=single, thread_count=threads
        )
        torch_save(saved, folder / str(single), storage_writer=writer)
        assert len(list((folder / str(single)).glob("*.distcp"))) > 2
        Comparison().same(dcp_folder.read(folder / str(single)), saved)


LAYOUTS = {
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "channels_last": lambda: torch.arange(48.0).reshape(2, 3, 4, 2).to(memory_format=torch.channels_last),
    "sliced": lambda: torch.arange(20.0)[3:17:2],
    "expanded": lambda: torch.ones(1, 3).expand(2, 3),
    "empty": lambda: torch.empty(3, 0, 2),
    "number": lambda: torch.tensor(2.5),
}


@pytest.mark.parametrize("writer", [torch_save, lambda content, path: dcp_folder.write(path, content)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(folder, writer, layout, monkeypatch):
    monkeypatch.setattr(in_file, "COPIED", 0)
    monkeypatch.setattr(python, "PIECE", 8)
    tensors = {"a" * length: LAYOUTS[layout]() for length in range(1, 9)}
    writer(tensors, folder)
    content, expected = dcp_folder.read(folder), torch_content(folder)
    strides = LAYOUTS[layout]().clone().stride()
    for name, tensor in tensors.items():
        assert torch.equal(expected[name], tensor)
        assert torch.equal(content[name], tensor)
        assert torch.equal(content[name].to(BF16), tensor.to(BF16))
        assert content[name].stride() == content[name].to(BF16).stride() == strides
        assert writer is torch_save or not isinstance(content[name], ChunkedTensor)


DTYPES = [
    value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
    and (value.is_floating_point or value.is_complex or value in (torch.bool, torch.int64, torch.uint8))
    and value not in (torch.float4_e2m1fn_x2, torch.complex32)
]


@pytest.mark.parametrize("copied", [0, in_file.COPIED], ids=["deferred", "copied"])
@pytest.mark.parametrize("target", [F32, BF16, torch.float16, F64])
def test_tensors_at_any_byte_are_cast_like_others(folder, target, copied, monkeypatch):
    """In torch's folders a tensor begins at any byte, which its dtype is then not aligned to."""
    state = {
        index: {f"{shift}": torch.randn(1031, dtype=F64).to(dtype) for shift in range(4)}
        for index, dtype in enumerate(dict.fromkeys(DTYPES))
    }
    groups = [{"params": list(state)}]
    torch_save({"state": state, "param_groups": groups}, folder)
    monkeypatch.setattr(in_file, "COPIED", copied)
    monkeypatch.setattr(python, "PIECE", 1000)
    content = dcp_folder.read(folder)
    deferred = sum(isinstance(t, ChunkedTensor) for entry in content["state"].values() for t in entry.values())
    assert deferred == 0 if copied else deferred > len(state)
    actual, expected = (oracle.Bare([parameter(1031, dtype=target) for _ in state]) for _ in range(2))
    with oracle.warnings.catch_warnings():
        oracle.warnings.simplefilter("ignore")  # that the imaginary part is lost
        fastopt.load(actual, folder)
        oracle.torch_load(expected, {"state": state, "param_groups": groups}, copy=True)
    assert_same_load(actual, expected, copy=True)


# ---- what several ranks wrote ----


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folders of two ranks, see `tests/dcp_ranks.py`."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.dcp_ranks", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def made_for(folder, name, dtype=F32):
    """An optimizer of the same shapes and groups as the ranks had."""
    saved = torch.load(folder / "whole.pt", weights_only=True)[name]
    shapes = [entry["exp_avg"].shape for entry in saved["state"].values()]
    params = iter([parameter(*shape, dtype=dtype) for shape in shapes])
    groups = [{"params": list(itertools.islice(params, len(group["params"])))} for group in saved["param_groups"]]
    return torch.optim.AdamW(groups), saved


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("folder_name", "key", "name"), [("dcp", "optimizer", "dcp"), ("replicated", None, "replicated")]
)
def test_what_ranks_saved_is_loaded(sharded, folder_name, key, name, dtype):
    actual, saved = made_for(sharded, name, dtype)
    expected, _ = made_for(sharded, name, dtype)
    report = fastopt.load(actual, sharded / folder_name, key=key, audit=True)
    oracle.torch_load(expected, saved, copy=True)
    assert_same_load(actual, expected, copy=True)
    assert report.tensors == 12
    if dtype == BF16:
        assert report.audit["exp_avg", F32, BF16].values == sum(
            entry["exp_avg"].numel() for entry in saved["state"].values()
        )


def test_what_ranks_saved_in_the_flat_form(sharded):
    actual, saved = made_for(sharded, "dcp")
    fastopt.load(actual, sharded / "flat")
    Comparison().same(TORCH_STATE_DICT(actual), saved)


def test_sharded_tensors_fill_held_ones(sharded):
    optimizer, saved = made_for(sharded, "dcp")
    train(optimizer)
    before = [value.data_ptr() for entry in optimizer.state.values() for value in entry.values()]
    report = fastopt.load(optimizer, sharded / "dcp", key="optimizer", inplace=True)
    assert report.filled == 12
    assert [value.data_ptr() for entry in optimizer.state.values() for value in entry.values()] == before
    Comparison().same(TORCH_STATE_DICT(optimizer)["state"], saved["state"])


def test_sharded_tensors_are_looked_at_and_written_like_others(sharded, folder):
    optimizer, saved = made_for(sharded, "dcp")
    content = dcp_folder.read(sharded / "dcp")["optimizer"]
    assert isinstance(content["state"][0]["exp_avg"], ChunkedTensor)
    assert not fastopt.check(optimizer, content, finite=True)
    assert not fastopt.diff(content, saved)
    assert str(fastopt.summary(content, values=True)) == str(fastopt.summary(saved, values=True))
    dcp_folder.write(folder, content)
    Comparison().same(dcp_folder.read(folder), saved)
    torch.save(content, folder / "again.pt")
    Comparison().same(torch.load(folder / "again.pt", weights_only=True), saved)


# ---- what fastopt writes ----


def test_what_is_saved_torch_loads(folder):
    optimizer = trained(adam())
    saved = state_of(optimizer)
    report = fastopt.save(optimizer, folder)
    loaded = torch_load({**saved, "state": zeroed(saved["state"])}, folder)
    Comparison().same(loaded["state"], saved["state"])
    assert loaded["param_groups"] == saved["param_groups"]
    assert report.bytes_written == sum(file.stat().st_size for file in folder.iterdir())
    assert sorted(file.name for file in folder.iterdir()) == [".metadata", "__0_0.distcp"]
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    again = adam()
    fastopt.load(again, folder, verify=True)
    Comparison().same(TORCH_STATE_DICT(again)["state"], saved["state"])
    assert TORCH_STATE_DICT(again)["param_groups"] == saved["param_groups"]


def bits_of(tensors):
    return {name: (tensor.dtype, tensor.stride(), bits(tensor).tobytes()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16, F64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(7, 9), (300, 700)], ids=["small", "large"])
def test_tensors_are_cast_while_they_are_written(folder, dtype, shape):
    tensors = {name: make() for name, make in LAYOUTS.items()}
    tensors.update(
        a=torch.randn(shape) * 1e5, b=torch.randn(shape).t(), c=torch.randn(shape)[::2, 1:], d=torch.randn(5)
    )
    dcp_folder.write(folder, tensors, {id(tensor): dtype for name, tensor in tensors.items() if name != "d"})
    expected = {name: tensor.to(dtype).clone() if name != "d" else tensor for name, tensor in tensors.items()}
    by_torch = torch_content(folder)
    assert {name: bits(by_torch[name]).tobytes() for name in tensors} == {
        name: bits(tensor).tobytes() for name, tensor in expected.items()
    }
    assert bits_of(dcp_folder.read(folder)) == bits_of(expected)
    found = {name: entry.properties.dtype for name, entry in metadata_of(folder).state_dict_metadata.items()}
    assert found == {name: tensor.dtype for name, tensor in expected.items()}
    dcp_folder.verify(folder)


@pytest.mark.parametrize("dtype", [BF16, F64, {"exp_avg": torch.float16, "step": F64}])
def test_a_save_casts_by_the_rule_of_all_formats(folder, tmp_path, dtype):
    optimizer = trained(adam((400, 300), (5,), amsgrad=True))
    report = fastopt.save(optimizer, folder, dtype=dtype)
    expected = fastopt.snapshot(optimizer, dtype=dtype).state_dict()
    Comparison().same(torch_load({**expected, "state": zeroed(expected["state"])}, folder)["state"], expected["state"])
    in_file = fastopt.save(optimizer, tmp_path / "state.pt", dtype=dtype)
    assert report.casts == in_file.casts
    assert report.casts
    loaded = adam((400, 300), (5,), amsgrad=True)
    fastopt.load(loaded, folder, policy="keep", verify=True)
    assert not fastopt.diff(loaded, expected)


def test_a_cast_that_fails_leaves_the_old_folder(folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    optimizer = trained(adam((300, 300)))
    fastopt.save(optimizer, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(staging._Writer, "cast", fail)
    with pytest.raises(RuntimeError, match="no memory") as caught:
        fastopt.save(optimizer, folder, dtype=BF16)
    assert any("while writing 'state.0.step' to" in note for note in caught.value.__notes__)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_each_entry_is_as_torch_writes_it(folder, monkeypatch):
    """Whatever their number, and whether they are written together or one is torch's to pickle."""
    monkeypatch.setattr(dcp_writer, "MOST_ENTRIES", 7)
    content = {f"t{index}": torch.randn(index * 977 % 23_000) for index in range(40)}
    content.update({f"v{index}": (index, "x" * index, [1.5, None]) for index in range(20)})
    content.update(odd={1, 2}, size=torch.Size([1]), last=torch.ones(3))
    dcp_folder.write(folder, content)
    [file] = folder.glob("*.distcp")
    raw, end = file.read_bytes(), 0
    for index, place in metadata_of(folder).storage_data.items():
        assert end <= place.offset < end + 64
        assert place.offset % 64 == 0
        assert raw[end : place.offset] == bytes(place.offset - end)
        end = place.offset + place.length
        alone = io.BytesIO()
        torch.save(content[index.fqn], alone)
        assert without_ids(raw[place.offset : end]) == without_ids(alone.getvalue())
    assert end == len(raw)


def without_ids(raw):
    """A file of `torch.save` without the numbers that it makes of its checksums, and their checksums."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        record = archive.getinfo("archive/.data/serialization_id")
        number, crc = archive.read(record), record.CRC.to_bytes(4, "little")
    return raw.replace(number, b"").replace(crc, b"")


def test_entries_have_the_names_that_torch_gives_them(folder, tmp_path):
    content = {
        "a": {"b": [1, 2], "c": [torch.ones(1), [torch.ones(1)], [3]], "d": (torch.ones(1), 2), "e.f": {"g": None}},
        "h": [{"i": 1}, [[{"j": 2}]], "k"],
        "l": collections.OrderedDict(m=collections.defaultdict(int, n=1)),
    }
    dcp_folder.write(folder, content)
    torch_save(content, tmp_path / "torch")
    ours, theirs = metadata_of(folder), metadata_of(tmp_path / "torch")
    assert ours.planner_data == theirs.planner_data
    assert list(ours.planner_data) == list(theirs.planner_data)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert repr(torch_content(folder)) == repr(torch_content(tmp_path / "torch"))
    assert repr(dcp_folder.read(folder)) == repr(torch_content(folder))


def test_empty_dicts_stay(folder):
    content = {"state": {0: {}, 1: {"a": torch.ones(1), "b": {}}}, "param_groups": [{"params": [0, 1], "more": [{}]}]}
    dcp_folder.write(folder, content)
    Comparison().same(dcp_folder.read(folder), content)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"a": {1: 2}}, r"the key 1 of \['a'\] is a int, and would come back as '1'"),
        ({"state": {0: {}}, "param_groups": [{"params": ["0"]}]}, r"the key 0 of \['state'\] is a int"),
        ({"state": {0: {True: 1}}, "param_groups": [{"params": [0]}]}, r"the key True of \['state'\]\[0\] is a bool"),
        ({"list": [{None: 1}]}, r"the key None of \['list'\]\[0\] is a NoneType"),
        ({"param_groups": [{"params": [0]}]}, "has param_groups and no state"),
        ([1], "holds a dict, not a list"),
    ],
    ids=str,
)
def test_what_would_come_back_as_something_else_is_refused(folder, content, text):
    with pytest.raises(TypeError, match=text):
        dcp_folder.write(folder, content)
    assert not folder.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"a.b": 1, "a": {"b": 2}},
        {"a": {"b": 1}, "a.b": 2},
        {"a": {1: 1, "1": 2}},
        {"a": {"b": {}, "b.c": 1}, "a.b": {"c": 2}},
    ],
)
def test_two_entries_of_one_name_are_refused(folder, content):
    with pytest.raises((ValueError, TypeError), match=r"'a\.b|'a\.1'"):
        dcp_folder.write(folder, content)
    assert not folder.exists()


def test_what_is_nested_too_deep_is_refused(folder):
    content = {}
    for _ in range(200):
        content = {"a": content}
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        dcp_folder.write(folder, content)


def test_what_cannot_be_pickled_leaves_the_old_folder(folder):
    optimizer = trained(adam())
    fastopt.save(optimizer, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    optimizer.param_groups[0]["odd"] = lambda: None
    with pytest.raises(Exception, match=r"pickle|Can't get") as caught:
        fastopt.save(optimizer, folder)
    assert not isinstance(caught.value, AssertionError)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_a_part_of_a_tensor_is_not_saved(folder):
    """A process without the others would write its own part, and a checkpoint that looks whole."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PART, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "holds 6 of the 12 elements of 'state.0.exp_avg'" in done.stdout
    assert not folder.exists()


PART = """
import sys, torch
from torch.testing._internal.distributed.fake_pg import FakeStore
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from fastopt.files import dcp_folder
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
mesh = init_device_mesh("cpu", (2,))
part = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])
try:
    dcp_folder.write(sys.argv[1], {"state": {0: {"exp_avg": part}}, "param_groups": [{"params": [0]}]})
except ValueError as error:
    print(error)
"""


# ---- memory and time ----

PEAK = """
import resource, sys, torch, fastopt
from pathlib import Path
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
params = [torch.nn.Parameter(torch.zeros(1 << 22, dtype=torch.bfloat16)) for _ in range(12)]
optimizer = torch.optim.SGD(params, lr=1, momentum=0.9)
peaks = []
fastopt.casting.Cast.commit = lambda self, commit=fastopt.casting.Cast.commit: (peaks.append(anonymous()), commit(self))
fastopt.to([torch.zeros(1)], dtype=torch.bfloat16)
before = anonymous()
report = fastopt.load(optimizer, sys.argv[1])
print(peaks[0] - before - report.bytes_written / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to know the memory of a process")
@pytest.mark.parametrize("chunks", [1, 2], ids=["whole", "sharded"])
def test_no_copy_of_the_files_is_made_in_memory(folder, backend, chunks):
    state = {i: {"momentum_buffer": torch.full((1 << 22,), 1.5)} for i in range(12)}
    groups = torch.optim.SGD([torch.zeros(1) for _ in range(12)], lr=1, momentum=0.9).state_dict()["param_groups"]
    if chunks == 1:
        torch_save({"state": state, "param_groups": groups}, folder)
    else:
        save_in_chunks({"state": state, "param_groups": groups}, folder)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)],
        cwd=ROOT,
        env={"FASTOPT_BACKEND": backend, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sum(file.stat().st_size for file in folder.iterdir()) > 190 * 2**20
    assert float(done.stdout) < 64


SAVING = """
import resource, sys, torch, fastopt
params = [torch.nn.Parameter(torch.zeros(1 << 22)) for _ in range(24)]
optimizer = torch.optim.SGD(params, lr=1, momentum=0.9)
for param in params:
    optimizer.state[param]["momentum_buffer"] = torch.ones(1 << 22)
fastopt.save(torch.optim.SGD([torch.zeros(1)]), sys.argv[1])  # imports what it needs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fastopt.save(optimizer, sys.argv[1], dtype=eval(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
@pytest.mark.parametrize("dtype", ["None", "torch.float64"])
def test_memory_of_a_save_is_bounded(folder, backend, dtype):
    environment = {"FASTOPT_BACKEND": backend, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", SAVING, str(folder), dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(file.stat().st_size for file in folder.iterdir()) > 400e6
    assert float(done.stdout) < 200


def test_tensors_in_chunks_are_what_they_were(folder):
    saved = state_of(trained(adam((4, 3), (6,), (2,))))
    for entry in saved["state"].values():
        del entry["step"]
    save_in_chunks(saved, folder)
    content = dcp_folder.read(folder)
    Comparison().same(copying.deepcopy(content)["state"], {i: saved["state"][i] for i in range(3)})


def test_time_is_linear_in_the_number_of_entries(folder):
    seconds = []
    for count in (500, 4000):
        saved = {
            "state": {i: {"a": torch.ones(2)} for i in range(count)},
            "param_groups": [{"params": list(range(count))}],
        }
        torch_save(saved, folder)
        started = time.perf_counter()
        dcp_folder.read(folder)
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < 40 * seconds[0] + 0.5


def test_values_in_memory_are_their_own(folder):
    """What many entries hold alike is read once, and must not be one object where it can change."""
    torch_save({"a": [[1], [1]], "b": [[1], [1]], "t": (1, (2,)), "u": (1, (2,))}, folder)
    content = dcp_folder.read(folder)
    content["a"][0].append(2)
    assert content["b"] == [[1], [1]]
    assert bits(torch.tensor(content["t"][0])).size


@pytest.mark.parametrize("writer", [torch_save, lambda content, path: dcp_folder.write(path, content)])
def test_large_entries(folder, writer):
    """Those that are read through a window of the file, tensors and values."""
    content = {"a": torch.randn(200_000), "b": (torch.randn(30_000), "x" * 100_000), "c": torch.randn(300, 200).t()}
    writer(content, folder)
    dcp_folder.verify(folder)
    found = dcp_folder.read(folder)
    assert torch.equal(found["a"], content["a"])
    assert torch.equal(found["b"][0], content["b"][0])
    assert found["b"][1] == content["b"][1]
    assert torch.equal(found["c"], content["c"])
    assert found["c"].stride() == (1, 200)
