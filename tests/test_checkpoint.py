"""`fastopt.save` and `fastopt.load`; `torch.save`, `torch.load` and torch's own load are the oracle."""

import collections
import copy as copying
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastopt
from tests.oracle import (
    TORCH_STATE_DICT,
    Comparison,
    adam,
    assert_same_load,
    fingerprint,
    outcome,
    torch_load,
    train,
    trained,
)

pytestmark = pytest.mark.usefixtures("backend")

ROOT = Path(__file__).parent.parent
BF16, F32 = torch.bfloat16, torch.float32


def state_of(optimizer):
    return copying.deepcopy(TORCH_STATE_DICT(optimizer))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "optimizer.pt"


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_torch_saved_is_loaded_as_torch_loads_it(path, dtype, legacy):
    torch.save(state_of(trained(adam())), path, _use_new_zipfile_serialization=not legacy)
    actual, expected = adam(dtype=dtype), adam(dtype=dtype)
    report = fastopt.load(actual, path)
    torch_load(expected, torch.load(path, weights_only=True), copy=True)
    assert_same_load(actual, expected, copy=True)
    assert report.tensors == 9
    assert report.seconds > 0


def test_what_is_saved_torch_loads(path):
    optimizer = trained(adam())
    report = fastopt.save(optimizer, path)
    Comparison().same(torch.load(path, weights_only=True), TORCH_STATE_DICT(optimizer))
    assert (report.tensors, report.bytes_written) == (9, path.stat().st_size)
    assert str(report).startswith("saved 9 tensors in ")
    again = adam()
    fastopt.load(again, path)
    for one in (optimizer, again):
        train(one, seed=3)
    Comparison().same(TORCH_STATE_DICT(again)["state"].keys(), TORCH_STATE_DICT(optimizer)["state"].keys())


def test_the_optimizer_shares_nothing_with_the_file(path):
    optimizer = trained(adam())
    fastopt.save(optimizer, path)
    loaded = adam()
    fastopt.load(loaded, path)
    before = state_of(loaded)
    size = path.stat().st_size
    path.write_bytes(bytes(size))  # the same file, other bytes
    Comparison().same(TORCH_STATE_DICT(loaded), before)
    path.unlink()
    train(loaded)


@pytest.mark.parametrize(
    ("key", "wrap"),
    [
        ("optimizer", lambda saved: {"model": {}, "optimizer": saved}),
        ("optimizer_states.0", lambda saved: {"optimizer_states": [saved, {}], "epoch": 3}),
        ("optimizers.adam.main", lambda saved: {"optimizers": {"adam": {"main": saved}}}),
        ("a.b", lambda saved: {"a.b": saved, "a": {"b": 1}}),
        ("ranks.7", lambda saved: {"ranks": {7: saved}}),
    ],
)
def test_a_state_within_a_checkpoint(path, key, wrap):
    saved = state_of(trained(adam()))
    torch.save(wrap(saved), path)
    optimizer = adam()
    fastopt.load(optimizer, path, key=key)
    Comparison().same(TORCH_STATE_DICT(optimizer), saved)
    before = fingerprint(optimizer)
    with pytest.raises(KeyError, match="is no state dict") as caught:
        fastopt.load(optimizer, path)
    assert repr(key) in str(caught.value) or key == "a.b"
    with pytest.raises(KeyError, match=r"has no state dict at 'nowhere\.5'"):
        fastopt.load(optimizer, path, key="nowhere.5")
    assert fingerprint(optimizer) == before


def test_options_are_those_of_a_load(path):
    fastopt.save(trained(adam()), path)
    optimizer = trained(adam(dtype=BF16), seed=1)
    report = fastopt.load(optimizer, path, policy={"exp_avg": "keep"}, audit=True)
    assert {key for key, _, _ in report.audit} == {"exp_avg_sq"}
    before = [value.data_ptr() for state in optimizer.state.values() for value in state.values()]
    assert fastopt.load(optimizer, path, inplace=True).filled == 9
    assert [value.data_ptr() for state in optimizer.state.values() for value in state.values()] == before


def test_a_state_is_made_to_fit(path):
    first = torch.nn.Linear(3, 4)
    optimizer = trained(torch.optim.AdamW(first.named_parameters()))
    fastopt.save(optimizer, path)
    reordered = torch.optim.AdamW(list(first.named_parameters())[::-1])
    fastopt.load(reordered, path, transform=lambda saved: fastopt.match(saved, reordered))
    assert not fastopt.diff(reordered, optimizer)


class Evil:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_no_code_of_a_file_runs(path, legacy, monkeypatch):
    monkeypatch.chdir(path.parent)
    torch.save({**state_of(trained(adam())), "evil": Evil()}, path, _use_new_zipfile_serialization=not legacy)
    optimizer = adam()
    before = fingerprint(optimizer)
    with pytest.raises(pickle.UnpicklingError) as caught:
        fastopt.load(optimizer, path)
    assert "exec" in str(caught.value)
    assert path.name in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert fingerprint(optimizer) == before
    assert not Path("executed").exists()


class Setting:
    """A class that checkpoints of this test name."""


def test_classes_can_be_allowed(path):
    torch.save({"optimizer": state_of(trained(adam())), "setting": Setting()}, path)
    optimizer = adam()
    with pytest.raises(pickle.UnpicklingError, match=r"names tests\.test_checkpoint\.Setting, which") as caught:
        fastopt.load(optimizer, path, key="optimizer")
    assert "safe_globals=[...]" in str(caught.value)
    fastopt.load(optimizer, path, key="optimizer", safe_globals=[Setting])
    assert len(optimizer.state) == 3


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (Setting, "safe_globals is <class 'tests.test_checkpoint.Setting'>, and not a list of classes and functions"),
        ("tests.Setting", "safe_globals is 'tests.Setting', and not a list"),
        (3, "safe_globals is 3, and not a list"),
        (["tests.Setting"], "safe_globals[0] is 'tests.Setting', and not a class or function"),
        ([Setting, 3], "safe_globals[1] is 3, and not a class or function"),
        ([(Setting, 3)], "and not a class or function, nor a tuple of one and its name in the file"),
        ((Setting, "tests.Setting"), "safe_globals[1] is 'tests.Setting', and not"),
        ([(Setting, "a", "b")], "nor a tuple of one and its name in the file"),
    ],
)
def test_what_cannot_be_allowed(path, given, text):
    fastopt.save(trained(adam()), path)
    with pytest.raises(TypeError, match=re.escape(text)):
        fastopt.load(adam(), path, safe_globals=given)


@pytest.mark.parametrize("key", [3, ["optimizer"], b"optimizer", ("optimizer", 0)])
def test_a_key_that_is_none(path, key):
    torch.save({"optimizer": state_of(trained(adam())), 3: 4}, path)
    with pytest.raises(TypeError, match=rf"key is {re.escape(repr(key))}, a {type(key).__name__}, and not a str"):
        fastopt.load(adam(), path, key=key)


@pytest.mark.parametrize("key", ["optimizer.", ".optimizer", "optimizer..", "", "optimizer.state."])
def test_a_key_with_too_many_dots(path, key):
    torch.save({"optimizer": state_of(trained(adam()))}, path)
    with pytest.raises(fastopt.NoStateDictError, match="has no state dict at") as caught:
        fastopt.load(adam(), path, key=key)
    assert str(caught.value) == f"{path} has no state dict at {key!r}; pass key='optimizer'"
    assert isinstance(caught.value, KeyError)


def test_no_flipped_bit_is_an_error_of_unicode(path):
    """Of those in headers and in the directory, whose names zip files have as texts, and of those in the pickle."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    fastopt.save(optimizer, path)
    whole = path.read_bytes()
    seen = collections.Counter()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x80]) + whole[position + 1 :])
        _, error = outcome(lambda: fastopt.load(optimizer, path))
        assert not isinstance(error, UnicodeError), position
        assert error is None or str(path) in "".join([str(error), *getattr(error, "__notes__", [])])
        seen[type(error)] += 1
    assert seen[fastopt.CheckpointError] > 10


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_file_that_was_cut_short_is_named(path, share, legacy):
    torch.save(state_of(trained(adam())), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    optimizer = trained(adam(), seed=4)
    before = fingerprint(optimizer)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fastopt.load(optimizer, path)
    assert str(path) in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert fingerprint(optimizer) == before


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastopt.load(adam(), "nowhere.pt")


@pytest.mark.parametrize("content", [3, [], {}, {"model": 1, "epoch": 2}, torch.zeros(3)], ids=str)
def test_a_file_without_a_state_says_what_it_has(path, content):
    torch.save(content, path)
    with pytest.raises(KeyError, match="is no state dict"):
        fastopt.load(adam(), path)


def test_an_error_of_the_load_names_the_file(path):
    fastopt.save(trained(adam((3,), (4,))), path)
    with pytest.raises(ValueError, match="parameter group") as caught:
        fastopt.load(adam((3,), (4,), (5,)), path)
    assert str(path) in "".join(caught.value.__notes__)


def test_a_failing_save_leaves_the_old_file(path):
    optimizer = trained(adam())
    fastopt.save(optimizer, path)
    before = path.read_bytes()
    optimizer.param_groups[0]["odd"] = lambda: None  # nothing pickle can write
    with pytest.raises(Exception):  # noqa: B017, PT011
        fastopt.save(optimizer, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


PEAK = """
import resource, sys, torch, fastopt
from pathlib import Path
path = sys.argv[1]
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
params = [torch.nn.Parameter(torch.zeros(1 << 22, dtype=torch.bfloat16)) for _ in range(24)]
optimizer = torch.optim.SGD(params, lr=1, momentum=0.9)
peaks = []
fastopt.casting.Cast.commit = lambda self, commit=fastopt.casting.Cast.commit: (peaks.append(anonymous()), commit(self))
before = anonymous()
report = fastopt.load(optimizer, path)
print(peaks[0] - before - report.bytes_written / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to know the memory of a process")
def test_no_copy_of_the_file_is_made_in_memory(path, backend):
    state = {i: {"momentum_buffer": torch.full((1 << 22,), 1.5)} for i in range(24)}
    groups = torch.optim.SGD([torch.zeros(1) for _ in range(24)], lr=1, momentum=0.9).state_dict()["param_groups"]
    torch.save({"state": state, "param_groups": groups}, path)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        cwd=ROOT,
        env={"FASTOPT_BACKEND": backend, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 380 * 2**20
    assert float(done.stdout) < 64


def test_a_file_like_object_is_refused_with_torchs_words():
    with pytest.raises(TypeError):
        fastopt.load(adam(), io.BytesIO())
