"""`fastopt.save(…, background=True)`: order, errors and memory."""

import concurrent.futures
import copy as copying
import gc
import os
import threading
import time
import typing
import weakref

import pytest
import torch

import fastopt
from fastopt import background, checkpoint
from fastopt.files import formats
from tests.oracle import TORCH_STATE_DICT, Comparison, adam, train, trained

pytestmark = pytest.mark.usefixtures("backend")

SOON = 0.1
"""Seconds in which what does not wait is done."""
AT_LAST = 30
"""Seconds after which something hangs."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "optimizer.pt"


@pytest.fixture(autouse=True)
def nothing_left_over():
    yield
    all_over()
    assert not background.saves.take_failed()


def all_over():
    """Waits until no save is under way."""
    until = time.monotonic() + AT_LAST
    while background.saves.unfinished:
        assert time.monotonic() < until
        time.sleep(0.001)


class Gate:
    """Files are synced only while it is open."""

    def __init__(self):
        self.event = threading.Event()
        self.waiting = 0
        self.most_waiting = 0
        self.lock = threading.Lock()

    def fsync(self, fd, sync=os.fsync):
        with self.lock:
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
        assert self.event.wait(AT_LAST)
        with self.lock:
            self.waiting -= 1
        sync(fd)

    def reached(self):
        """Waits until a save has come to the gate."""
        until = time.monotonic() + AT_LAST
        while not self.waiting:
            assert time.monotonic() < until
            time.sleep(0.001)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(os, "fsync", gate.fsync)
    yield gate
    gate.event.set()


def state_of(optimizer):
    return copying.deepcopy(TORCH_STATE_DICT(optimizer))


def assert_holds(path, state):
    Comparison().same(torch.load(path, weights_only=True), state)


def in_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    return thread


# ---- what is written ----


def test_the_state_of_the_call_is_written_while_training_goes_on(path, gate):
    optimizer = trained(adam())
    expected = state_of(optimizer)
    future = fastopt.save(optimizer, path, background=True)
    gate.reached()
    train(optimizer, seed=1)
    optimizer.param_groups[0]["lr"] = 7
    assert not future.done()
    assert not path.exists()
    gate.event.set()
    report = future.result(AT_LAST)
    assert isinstance(report, fastopt.SaveReport)
    assert (report.path, report.tensors, report.bytes_written) == (str(path), 9, path.stat().st_size)
    assert_holds(path, expected)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_the_dtypes_and_the_report_are_those_of_a_save_at_once(path, name):
    dtype = {"exp_avg": torch.bfloat16, "exp_av": torch.float16}
    optimizer = trained(adam())
    at_once = fastopt.save(optimizer, path.with_name(name), dtype=dtype)
    report = fastopt.save(optimizer, path.with_name(f"background-{name}"), dtype=dtype, background=True).result(AT_LAST)
    assert path.with_name(f"background-{name}").read_bytes() == path.with_name(name).read_bytes()
    assert report.casts == at_once.casts
    assert report.casts[torch.float32, torch.bfloat16].tensors == 3
    assert report.unused_patterns == at_once.unused_patterns == ["exp_av"]


def test_background_may_be_a_variable():
    """To type checkers as well: an overload takes any bool, and returns either."""
    kinds = [typing.get_type_hints(overload)["background"] for overload in typing.get_overloads(fastopt.save)]
    assert kinds == [typing.Literal[False], typing.Literal[True], bool]


def test_a_dtype_that_makes_no_policy_is_an_error_at_once(path):
    with pytest.raises(ValueError, match="int8"):
        fastopt.save(trained(adam()), path, dtype=torch.int8, background=True)


# ---- order ----


def test_the_last_of_several_saves_to_a_path_stays(path):
    optimizers = [trained(adam(), seed=seed) for seed in range(3)]
    for _ in range(5):
        futures = [fastopt.save(optimizer, path, background=True) for optimizer in optimizers]
        concurrent.futures.wait(futures, AT_LAST)
        assert_holds(path, state_of(optimizers[-1]))


def test_a_save_waits_for_one_to_its_path_in_the_background(path, gate):
    first, second = trained(adam()), trained(adam(), seed=1)
    future = fastopt.save(first, path, background=True)
    thread = in_thread(lambda: fastopt.save(second, path))
    thread.join(SOON)
    assert thread.is_alive()
    gate.event.set()
    thread.join(AT_LAST)
    assert future.done()
    assert_holds(path, state_of(second))


def test_one_in_the_background_waits_for_a_save_to_its_path(path, gate):
    first, second = trained(adam()), trained(adam(), seed=1)
    thread = in_thread(lambda: fastopt.save(first, path))
    gate.reached()
    future = fastopt.save(second, path, background=True)
    with pytest.raises(TimeoutError):
        future.result(SOON)
    assert gate.waiting == 1
    gate.event.set()
    future.result(AT_LAST)
    thread.join(AT_LAST)
    assert_holds(path, state_of(second))


def test_paths_are_compared_with_their_links_resolved(path, gate):
    link = path.with_name("link.pt")
    link.symlink_to(path)
    first, second = trained(adam()), trained(adam(), seed=1)
    fastopt.save(first, path, background=True)
    future = fastopt.save(second, link, background=True)
    gate.event.set()
    future.result(AT_LAST)
    assert_holds(path, state_of(second))
    assert link.is_symlink()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.dcp"])
def test_a_load_waits_for_saves_to_its_path(path, gate, name):
    path = path.with_name(name)
    link = path.with_name(f"link-{name}")
    link.symlink_to(path)
    optimizers = [trained(adam(), seed=seed) for seed in range(2)]
    futures = [fastopt.save(optimizer, path, background=True) for optimizer in optimizers]
    loaded = adam()
    thread = in_thread(lambda: fastopt.load(loaded, link))
    thread.join(SOON)
    assert thread.is_alive()
    gate.event.set()
    thread.join(AT_LAST)
    assert all(future.done() for future in futures)
    assert not fastopt.diff(loaded, optimizers[-1])


def test_a_load_waits_for_a_save_of_another_thread(path, gate):
    optimizer, loaded = trained(adam()), adam()
    threads = [in_thread(lambda: fastopt.save(optimizer, path))]
    gate.reached()
    threads.append(in_thread(lambda: fastopt.load(loaded, path)))
    threads[1].join(SOON)
    assert threads[1].is_alive()
    gate.event.set()
    for thread in threads:
        thread.join(AT_LAST)
    Comparison().same(state_of(loaded), state_of(optimizer))


def test_a_load_from_another_path_waits_for_nothing(path, gate):
    gate.event.set()
    optimizer = trained(adam())
    fastopt.save(optimizer, path.with_name("other.pt"))
    gate.event.clear()
    fastopt.save(optimizer, path, background=True)
    gate.reached()
    fastopt.load(adam(), path.with_name("other.pt"))
    assert gate.waiting == 1


def test_a_load_within_a_save_does_not_wait_for_it(path, monkeypatch):
    """As a signal's handler does that interrupts one."""
    first, second, sync = trained(adam()), trained(adam(), seed=1), os.fsync
    fastopt.save(first, path)

    def interrupted(fd):
        monkeypatch.setattr(os, "fsync", sync)
        fastopt.load(second, path)
        sync(fd)

    monkeypatch.setattr(os, "fsync", interrupted)
    thread = in_thread(lambda: fastopt.save(trained(adam(), seed=2), path))
    thread.join(AT_LAST)
    assert not thread.is_alive()
    Comparison().same(state_of(second), state_of(first))


@pytest.mark.parametrize("waits", [True, False])
def test_a_load_does_not_take_what_is_there_for_what_could_not_be_saved(path, gate, monkeypatch, waits):
    """However soon it failed. The error is known then, and what is there can be loaded."""
    gate.event.set()
    first, second, loaded = trained(adam()), trained(adam(), seed=1), adam()
    fastopt.save(first, path)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *_: os.stat("/nowhere/at all"))
    gate.event.clear()
    fastopt.save(second, path, background=True)
    if not waits:
        gate.event.set()
        all_over()
    threading.Timer(SOON, gate.event.set).start()
    with pytest.raises(fastopt.BackgroundSaveError, match="nothing is loaded from") as caught:
        fastopt.load(loaded, path)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert not loaded.state
    monkeypatch.setattr(os, "replace", replace)
    fastopt.load(loaded, path)
    Comparison().same(state_of(loaded), state_of(first))
    fastopt.save(first, path)


def test_errors_of_other_paths_are_left_to_the_next_save(path):
    fastopt.save(trained(adam()), path)
    fastopt.save(trained(adam()), path.with_name("missing") / "a.pt", background=True)
    all_over()
    fastopt.load(adam(), path)
    with pytest.raises(fastopt.BackgroundSaveError, match="missing"):
        fastopt.save(trained(adam()), path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.dcp"])
def test_a_snapshot_is_saved_in_its_turn(path, gate, name):
    path = path.with_name(name)
    first, second = trained(adam()), trained(adam(), seed=1)
    future = fastopt.save(first, path, background=True)
    thread = in_thread(lambda: fastopt.snapshot(second).save(path))
    thread.join(SOON)
    assert thread.is_alive()
    gate.event.set()
    thread.join(AT_LAST)
    assert future.done()
    assert not fastopt.diff(formats.read(path), second)


def test_saving_a_snapshot_tells_what_failed_before(path):
    fastopt.save(trained(adam()), path.with_name("missing") / "a.pt", background=True)
    all_over()
    with pytest.raises(fastopt.BackgroundSaveError, match=r"missing.*is done"):
        fastopt.snapshot(trained(adam())).save(path)
    assert path.exists()


def test_a_save_to_another_path_waits_for_nothing(path, gate):
    first, second = trained(adam()), trained(adam(), seed=1)
    fastopt.save(first, path, background=True)
    gate.reached()
    thread = in_thread(lambda: fastopt.save(second, path.with_name("other.pt")))
    while gate.waiting < 2:
        time.sleep(0.001)
    gate.event.set()
    thread.join(AT_LAST)


def test_saves_in_the_background_are_written_one_after_the_other(path, gate):
    optimizers = [trained(adam(), seed=seed) for seed in range(4)]
    done = []
    futures = [fastopt.save(o, path.with_name(f"{i}.pt"), background=True) for i, o in enumerate(optimizers)]
    for index, future in enumerate(futures):
        future.add_done_callback(lambda _, index=index: done.append(index))
    gate.reached()
    gate.event.set()
    assert [future.result(AT_LAST).path[-4:] for future in futures] == ["0.pt", "1.pt", "2.pt", "3.pt"]
    assert done == [0, 1, 2, 3]
    assert gate.most_waiting == 1


def test_one_that_waits_for_its_turn_can_be_cancelled(path, gate):
    first, second = trained(adam()), trained(adam(), seed=1)
    running = fastopt.save(first, path, background=True)
    gate.reached()
    waiting = fastopt.save(second, path, background=True)
    assert waiting.cancel()
    assert not running.cancel()
    gate.event.set()
    running.result(AT_LAST)
    all_over()
    assert_holds(path, state_of(first))


def test_a_save_within_a_save_does_not_wait_for_it(path, monkeypatch):
    """As that of a signal's handler, which runs in the middle of whatever the thread is at."""
    optimizer, inner = trained(adam()), []

    def fsync(fd, sync=os.fsync):
        if not inner:
            inner.append(None)
            inner[0] = fastopt.save(optimizer, path, background=True)
            inner[0].result(AT_LAST)
            fastopt.save(optimizer, path)
        sync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    fastopt.save(optimizer, path)
    assert inner[0].done()
    assert_holds(path, state_of(optimizer))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


# ---- memory ----


@pytest.fixture
def snapshots(monkeypatch):
    """Weak references to a tensor of each snapshot that saves take."""
    taken = []

    def snapshot(*arguments, take=checkpoint.snapshot, **options):
        result = take(*arguments, **options)
        taken.append(weakref.ref(result.state_dict()["state"][0]["exp_avg"].untyped_storage()))
        return result

    monkeypatch.setattr(checkpoint, "snapshot", snapshot)
    return taken


def test_an_optimizer_has_one_copy_at_most(path, gate, snapshots):
    optimizer = trained(adam())
    fastopt.save(optimizer, path, background=True)
    gate.reached()
    futures = []
    thread = in_thread(lambda: futures.append(fastopt.save(optimizer, path.with_name("b.pt"), background=True)))
    thread.join(SOON)
    assert thread.is_alive()
    assert len(snapshots) == 1
    gate.event.set()
    thread.join(AT_LAST)
    futures[0].result(AT_LAST)
    assert len(snapshots) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_a_copy_is_freed_once_it_is_written_or_not(path, snapshots, fails):
    future = fastopt.save(trained(adam()), path / "nowhere" if fails else path, background=True)
    all_over()
    until = time.monotonic() + AT_LAST
    while snapshots[0]() is not None:  # the thread itself ends a moment later
        assert time.monotonic() < until
        time.sleep(0.001)
    assert len(snapshots) == 1
    assert (future.exception() is not None) == fails


# ---- errors ----


def failed_save(path):
    future = fastopt.save(trained(adam()), path.parent / "nowhere" / "lost.pt", background=True)
    concurrent.futures.wait([future], AT_LAST)
    return future


def test_an_error_is_raised_by_the_future_and_is_known_then(path):
    future = failed_save(path)
    with pytest.raises(FileNotFoundError, match="nowhere") as caught:
        future.result()
    assert f"while writing {path.parent / 'nowhere' / 'lost.pt'}" in caught.value.__notes__
    fastopt.save(trained(adam()), path)


def test_an_error_that_was_looked_at_is_known(path):
    assert isinstance(failed_save(path).exception(), FileNotFoundError)
    fastopt.save(trained(adam()), path)


@pytest.mark.parametrize("in_background", [False, True])
def test_an_error_that_nobody_asked_about_is_raised_by_the_next_save_which_is_done(path, in_background):
    failed_save(path)
    gc.collect()
    optimizer = trained(adam(), seed=1)
    with pytest.raises(fastopt.BackgroundSaveError) as caught:
        fastopt.save(optimizer, path, background=in_background)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert "lost.pt, failed: FileNotFoundError" in str(caught.value)
    assert f"the save to {path} {'goes on in the background' if in_background else 'is done'}" in str(caught.value)
    fastopt.save(optimizer, path)
    assert_holds(path, state_of(optimizer))


def test_its_own_error_is_not_that_of_an_earlier_save(path, monkeypatch):
    """However soon it comes."""

    def in_background(*arguments, start=checkpoint.in_background):
        future = start(*arguments)
        all_over()
        return future

    monkeypatch.setattr(checkpoint, "in_background", in_background)
    future = fastopt.save(trained(adam()), path / "nowhere", background=True)
    assert isinstance(future.exception(), FileNotFoundError)


def test_all_errors_are_told(path, gate):
    fastopt.save(trained(adam()), path, background=True)
    for _ in range(3):
        fastopt.save(trained(adam()), path.parent / "nowhere" / "lost.pt", background=True)
    gate.event.set()
    all_over()
    with pytest.raises(fastopt.BackgroundSaveError) as caught:
        fastopt.save(trained(adam()), path)
    assert len(caught.value.__notes__) == 2
    assert all("lost.pt, failed: FileNotFoundError" in note for note in caught.value.__notes__)


def test_a_wait_that_times_out_asks_for_nothing(path, gate):
    future = fastopt.save(trained(adam()), path, background=True)
    for ask in (future.result, future.exception):
        with pytest.raises(TimeoutError):
            ask(0.01)
    path.mkdir()  # what is now in the way
    gate.event.set()
    concurrent.futures.wait([future], AT_LAST)
    with pytest.raises(fastopt.BackgroundSaveError, match="IsADirectoryError"):
        fastopt.save(trained(adam()), path.with_name("other.pt"))


def test_a_copy_that_fails_fails_at_once(path, monkeypatch):
    def refuse(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(checkpoint, "snapshot", refuse)
    with pytest.raises(MemoryError):
        fastopt.save(trained(adam()), path, background=True)


def test_a_thread_that_does_not_start_is_an_error_and_no_wait(path, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="start new thread"):
        fastopt.save(trained(adam()), path, background=True)


def test_a_save_that_waits_for_one_whose_thread_does_not_start_goes_on(path, monkeypatch):
    waiting = []

    def refuse(self, start=threading.Thread.start):
        monkeypatch.undo()
        waiting.append(in_thread(lambda: fastopt.save(trained(adam()), path)))
        waiting[0].join(SOON)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="start new thread"):
        fastopt.save(trained(adam()), path, background=True)
    waiting[0].join(AT_LAST)
    assert not waiting[0].is_alive()
    assert path.exists()


def test_a_path_is_that_of_the_call_wherever_the_process_goes(path, gate, monkeypatch):
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(path.parent)
    optimizers = [trained(adam(), seed=seed) for seed in range(2)]
    first = fastopt.save(optimizers[0], "other.pt", background=True)
    gate.reached()
    second = fastopt.save(optimizers[1], path.name, background=True)  # which waits for its turn
    monkeypatch.chdir(elsewhere)
    gate.event.set()
    assert [first.result(AT_LAST).path, second.result(AT_LAST).path] == ["other.pt", path.name]
    assert_holds(path, state_of(optimizers[1]))
    assert not list(elsewhere.iterdir())
