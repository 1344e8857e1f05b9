"""Python's garbage collector during a load: paused, and afterwards as it was."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import fastopt
from fastopt.collector import paused_collector

from .oracle import adam, trained


@contextmanager
def collections() -> Iterator[list[str]]:
    seen: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        seen.append(phase)

    gc.callbacks.append(note)
    try:
        yield seen
    finally:
        gc.callbacks.remove(note)


@pytest.fixture(params=[True, False], ids=["on", "off"])
def collector(request) -> Iterator[bool]:
    was_on = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if was_on else gc.disable)()


def test_does_not_run_during_a_load(backend, collector):
    source = trained(adam(*[(2,)] * 3000))
    target = adam(*[(2,)] * 3000, dtype=torch.bfloat16)
    state_dict = source.state_dict()
    gc.collect()
    with collections() as seen:
        fastopt.load_state_dict(target, state_dict, copy=True)
    assert seen.count("start") <= 1  # the one that falls due when the pause is over; unpaused, there are 13 and more
    assert gc.isenabled() is collector


@pytest.fixture
def many() -> Iterator[tuple[torch.optim.Optimizer, dict]]:
    """A load that makes 16,000 objects for the collector to look after, after a full collection."""
    was_on = gc.isenabled()
    gc.enable()
    state_dict = trained(adam(*[(2,)] * 4000)).state_dict()
    target = adam(*[(2,)] * 4000, dtype=torch.bfloat16)
    gc.collect()
    yield target, state_dict
    (gc.enable if was_on else gc.disable)()


def test_many_loaded_objects_are_old_at_once(backend, many):
    target, state_dict = many
    with collections() as seen:
        fastopt.load_state_dict(target, state_dict, copy=True)
    assert seen == []
    old = set(map(id, gc.get_objects(generation=2)))
    assert all(id(tensor) in old for entry in target.state.values() for tensor in entry.values())
    assert gc.get_freeze_count() == 0


def test_objects_are_aged_once_before_a_full_collection(backend, many):
    target, state_dict = many
    fastopt.load_state_dict(target, state_dict, copy=True)
    target.state.clear()  # or it would die in the pause, and there would be no more objects after it than before
    with collections() as seen:
        fastopt.load_state_dict(target, state_dict, copy=True)
    assert "start" in seen


@pytest.fixture
def never_due() -> Iterator[None]:
    """The collector is on, and does not run by itself: what is young stays so."""
    threshold = gc.get_threshold()
    gc.set_threshold(0)
    yield
    gc.set_threshold(*threshold)


def is_old(kept: object) -> bool:
    return id(kept) in set(map(id, gc.get_objects(generation=2)))


def test_objects_made_before_a_call_are_left_young(backend, many, never_due):
    made_before = [[] for _ in range(20_000)]
    fastopt.to([torch.ones(2)], dtype=torch.bfloat16)
    assert not is_old(made_before[0])


def test_a_failed_load_ages_nothing(backend, many, never_due):
    target, state_dict = many
    kept = []

    def fail(state):
        raise RuntimeError("late")

    target.__setstate__ = fail
    with pytest.raises(RuntimeError, match="late"):
        fastopt.load_state_dict(target, state_dict, copy=True)
    assert not is_old(kept)
    del target.__setstate__
    fastopt.load_state_dict(target, state_dict, copy=True)
    assert is_old(kept)


def test_frozen_objects_stay_frozen(backend, many):
    target, state_dict = many
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        fastopt.load_state_dict(target, state_dict, copy=True)
        assert gc.get_freeze_count() > frozen / 2
    finally:
        gc.unfreeze()


def test_is_as_it_was_after_an_error(backend, collector):
    optimizer = trained(adam((2,)))
    broken = optimizer.state_dict()
    broken["param_groups"][0]["params"].append(7)
    with pytest.raises(ValueError, match="doesn't match the size"):
        fastopt.load_state_dict(optimizer, broken)
    assert gc.isenabled() is collector


def test_hooks_run_with_the_collector_as_it_was(backend, collector):
    seen = []
    optimizer = trained(adam((2,)))
    optimizer.register_load_state_dict_pre_hook(lambda *args: seen.append(gc.isenabled()))
    optimizer.register_load_state_dict_post_hook(lambda *args: seen.append(gc.isenabled()))
    fastopt.load_state_dict(optimizer, optimizer.state_dict())
    assert seen == [collector, collector]


def test_nested_pauses_end_with_the_outer(collector):
    with paused_collector():
        with paused_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() is collector
