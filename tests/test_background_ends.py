"""Saves in the background, seen from the ends of a process: exits, interruptions and forks. Each has a process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
AT_LAST = 60
"""Seconds after which something hangs."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "optimizer.pt"


HEAD = """
import os, signal, sys, threading, time, torch, fastopt
from pathlib import Path
from fastopt import background
background.PATIENCE = 60
path = Path(sys.argv[1])
params = [torch.nn.Parameter(torch.zeros(10)) for _ in range(3)]
optimizer = torch.optim.SGD(params, lr=1, momentum=0.9)
def step(value):
    for param in params:
        optimizer.state[param]["momentum_buffer"] = torch.full((10,), float(value))
sync, syncs = os.fsync, threading.Semaphore(0)
def slow(seconds):
    def fsync(fd):
        syncs.release()
        time.sleep(seconds)
        sync(fd)
    os.fsync = fsync
step(1)
"""


def start(path, body, backend="native"):
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + body, str(path)],
        cwd=ROOT,
        env={**os.environ, "FASTOPT_BACKEND": backend, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(path, body, backend="native"):
    process = start(path, body, backend)
    out, err = process.communicate(timeout=AT_LAST)
    return process.returncode, out, err


def value_in(path):
    [value] = {
        float(value)
        for entry in torch.load(path, weights_only=True)["state"].values()
        for value in entry["momentum_buffer"]
    }
    return value


def test_a_save_is_finished_at_exit(path, backend):
    body = "slow(0.3); fastopt.save(optimizer, path, background=True); syncs.acquire(); step(2)"
    assert run(path, body, backend) == (0, "", "")
    assert value_in(path) == 1


def test_a_save_that_takes_long_at_exit_says_so(path):
    code, _, err = run(path, "background.PATIENCE = 0.1; slow(0.5); fastopt.save(optimizer, path, background=True)")
    assert code == 0
    assert err == f"fastopt: at exit, finishing the save to {path}\n"
    assert value_in(path) == 1


def test_a_save_may_use_a_pool_of_threads_at_exit(path):
    body = """
from concurrent.futures import ThreadPoolExecutor
def fsync(fd):
    time.sleep(0.3)
    with ThreadPoolExecutor(2) as pool:
        pool.submit(sync, fd).result()
os.fsync = fsync
fastopt.save(optimizer, path, background=True)
"""
    assert run(path, body) == (0, "", "")
    assert value_in(path) == 1


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise KeyError('own')"])
def test_an_error_that_nobody_asked_about_fails_the_process(path, end):
    body = f"""
import atexit
atexit.register(print, "other's end", flush=True)
fastopt.save(optimizer, path / "nowhere" / "lost.pt", background=True)
print("said before")
{end}
"""
    code, out, err = run(path, body)
    assert code == 120
    assert out == "said before\nother's end\n"
    [line] = [line for line in err.splitlines() if line.startswith("fastopt: ")]
    assert "lost.pt, failed: FileNotFoundError" in line
    assert ("own" in err) == ("own" in end)


def test_an_error_that_somebody_asked_about_does_not(path):
    assert run(path, "fastopt.save(optimizer, path / 'nowhere' / 'lost.pt', background=True).exception()") == (
        0,
        "",
        "",
    )


INTERRUPT = "threading.Thread(target=lambda: (syncs.acquire(), os.kill(os.getpid(), signal.SIGINT))).start()\n"


def test_an_interrupted_wait_loses_no_save(path):
    body = INTERRUPT + (
        "slow(0.5)\n"
        "try: fastopt.save(optimizer, path, background=True).result()\n"
        "except KeyboardInterrupt: print('interrupted', path.exists())\n"
    )
    code, out, _ = run(path, body)
    assert (code, out) == (0, "interrupted False\n")
    assert value_in(path) == 1


def test_an_interruption_once_the_thread_has_started_loses_no_save(path):
    body = """
def interrupted(self, start=threading.Thread.start):
    start(self)
    raise KeyboardInterrupt
threading.Thread.start = interrupted
slow(0.5)
try: fastopt.save(optimizer, path, background=True)
except KeyboardInterrupt: print('interrupted', path.exists())
"""
    code, out, _ = run(path, body)
    assert (code, out) == (0, "interrupted False\n")
    assert value_in(path) == 1


def test_an_interrupted_wait_at_exit_ends_it_and_leaves_the_old_file(path):
    body = """
fastopt.save(optimizer, path)
step(2)
slow(30)
background.PATIENCE = 0.1
fastopt.save(optimizer, path, background=True)
"""
    process = start(path, body)
    assert process.stderr.readline() == f"fastopt: at exit, finishing the save to {path}\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 120
    assert err == f"fastopt: the save to {path} was not finished: interrupted\n"
    assert value_in(path) == 1


FORK = """
import gc
fastopt.save(optimizer, path)
step(2)
child_is_over = threading.Event()
def fsync(fd):
    syncs.release()
    child_is_over.wait()
    sync(fd)
os.fsync = fsync
future = fastopt.save(optimizer, path, background=True)
syncs.acquire()
child = os.fork()
if child == 0:
    os.fsync = sync
    try:
        future.result()
    except RuntimeError as error:
        print(error)
    gc.collect()
    step(3)
    fastopt.save(optimizer, path.with_name("child.pt"), background=True)
    sys.exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), future.done())
child_is_over.set()
print(future.result().path)
"""


def test_a_forked_process_neither_writes_nor_waits(path):
    code, out, err = run(path, FORK)
    assert (code, err) == (0, "")
    said = f"the process that this one was forked from does the save to {path}"
    assert out.splitlines() == [said, "5 False", str(path)]
    assert value_in(path) == 2
    assert value_in(path.with_name("child.pt")) == 3
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["child.pt", path.name]


MULTIPROCESSING = """
import multiprocessing
def work(path):
    slow(0.3)
    fastopt.save(optimizer, path, background=True)
def exit_code(path):
    child = multiprocessing.get_context("fork").Process(target=work, args=(path,))
    child.start()
    child.join()
    return child.exitcode
print(exit_code(path), exit_code(path.parent / "nowhere" / "lost.pt"))
"""


def test_children_of_multiprocessing_finish_their_saves_and_tell_their_errors(path):
    code, out, err = run(path, MULTIPROCESSING)
    assert (code, out) == (0, "0 1\n")
    assert "fastopt: a save in the background, to" in err
    assert "lost.pt, failed: FileNotFoundError" in err
    assert value_in(path) == 1
