"""Loads by many threads at once, and in processes that may have few files, no more threads, or that have forked."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastopt
from tests.oracle import adam, torch_load, trained

ROOT = Path(__file__).parent.parent
SHAPES = ((64, 32), (), (7,), (1,))


@pytest.mark.usefixtures("backend")
def test_a_thousand_loads_by_eight_threads(tmp_path):
    """Of distinct optimizers, from one dict and from one file; each has what torch's load makes of it."""
    path = tmp_path / "saved.pt"
    state_dict = trained(adam(*SHAPES)).state_dict()
    torch.save(state_dict, path)
    expected = trained(adam(*SHAPES, dtype=torch.bfloat16), seed=1)
    torch_load(expected, state_dict, copy=True)

    def load(number):
        optimizer = adam(*SHAPES, dtype=torch.bfloat16)
        if number % 3 == 0:
            fastopt.load(optimizer, path)
        else:
            fastopt.load_state_dict(optimizer, state_dict, copy=bool(number % 3 - 1))
        return optimizer

    with ThreadPoolExecutor(8) as threads:
        loaded = list(threads.map(load, range(1000)))
    for optimizer in loaded:
        for one, other in zip(optimizer.state.values(), expected.state.values(), strict=True):
            assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in other)
    assert len(loaded[0].state) == len(SHAPES)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("inplace", [False, True])
def test_two_threads_that_load_into_one_optimizer(inplace):
    """Not supported, as with torch: one of both loads wins, tensor by tensor in place, and nothing breaks."""
    optimizer = trained(adam(*SHAPES, dtype=torch.bfloat16))
    choices = []
    for value in (1.0, 2.0):
        state_dict = trained(adam(*SHAPES)).state_dict()
        for state in state_dict["state"].values():
            state["exp_avg"].fill_(value)
        choices.append(state_dict)

    def load(number):
        fastopt.load_state_dict(optimizer, choices[number % 2], inplace=inplace)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(load, range(200)))
    assert len(optimizer.state) == len(SHAPES)
    for state in optimizer.state.values():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert set(state["exp_avg"].flatten().tolist()) <= {1.0, 2.0}
    fastopt.load_state_dict(optimizer, choices[0], inplace=inplace)
    assert all(state["exp_avg"].unique().item() == 1.0 for state in optimizer.state.values())


HEAD = """
import os, resource, sys, threading, torch, fastopt
from tests.oracle import adam, fingerprint, trained
path = sys.argv[1]
shapes = ((300, 400), (), (7,), (500, 1000))
saved, target = trained(adam(*shapes)), trained(adam(*shapes, dtype=torch.bfloat16), seed=1)
expected = trained(adam(*shapes, dtype=torch.bfloat16), seed=1)
expected.load_state_dict(saved.state_dict())
def is_loaded(optimizer):
    return all(
        torch.equal(one[key], other[key])
        for one, other in zip(optimizer.state.values(), expected.state.values(), strict=True) for key in other
    )
"""

FORKED = """
fastopt.load_state_dict(target, saved.state_dict())
fastopt.save(saved, path)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own pool does not outlive a fork
    again = trained(adam(*shapes, dtype=torch.bfloat16), seed=2)
    fastopt.load_state_dict(again, saved.state_dict())
    in_child = is_loaded(again)
    fastopt.load(again, path)
    fastopt.save(again, path + ".child.pt")
    os._exit(0 if in_child and is_loaded(again) else 1)
assert os.waitpid(child, 0)[1] == 0
fastopt.load(target, path)
assert is_loaded(target)
"""

FEW_FILES = """
fastopt.save(saved, path)
fastopt.load(target, path)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
lowest = max(int(name) for name in os.listdir("/proc/self/fd"))
failed = 0
for margin in range(0, 8):
    before = fingerprint(target)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + margin, hard))
    for act in (lambda: fastopt.save(saved, path), lambda: fastopt.load(target, path)):
        try:
            act()
        except (OSError, RuntimeError) as error:  # the latter is torch's own reader's
            told = " ".join([str(error), *getattr(error, "__notes__", [])])
            assert path in told and (isinstance(error, RuntimeError) or error.errno == 24), told
            failed += 1
            assert fingerprint(target) == before
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
assert failed
fastopt.load(target, path)
assert is_loaded(target)
fastopt.save(saved, path)
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
"""

NO_THREADS = """
fastopt.save(saved, path)
start, failed = threading.Thread.start, 0
def refuse(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
before = fingerprint(target)
for act in (lambda: fastopt.save(saved, path, background=True), lambda: fastopt.load(target, path)):
    try:
        act()
    except RuntimeError as error:
        assert "thread" in str(error), error
        failed += 1
        assert fingerprint(target) == before
threading.Thread.start = start
assert failed
fastopt.load(target, path)
assert is_loaded(target)
assert fastopt.save(saved, path, background=True).result().bytes_written
"""


@pytest.mark.parametrize("body", [FORKED, FEW_FILES, NO_THREADS], ids=["forked", "few files", "no threads"])
def test_a_process_under(body, backend, tmp_path):
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs Linux to see open files")
    done = subprocess.run(
        [sys.executable, "-c", HEAD + body, str(tmp_path / "saved.pt")],
        cwd=ROOT,
        env={**os.environ, "FASTOPT_BACKEND": backend, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
