"""The fuzzer's damaged files with fixed seeds."""

import random
import subprocess
import sys

import pytest

from tests.fuzz import differential, readers
from tests.fuzz.mutations import MUTATIONS, mutated
from tests.torch_files import write_archive

FILES = 400


@pytest.mark.parametrize("kind", readers.FORMATS)
def test_damaged_files(backend, tmp_path, kind):
    whole = readers.whole_files(tmp_path)[kind]
    optimizer, path, results = readers.some_optimizer(), tmp_path / "damaged", []
    for seed in range(FILES):
        results.append(readers.attempt(optimizer, path, mutated(whole, seed), kind, verify=bool(seed % 2)))
        if results[-1] == "loaded":
            optimizer = readers.some_optimizer()
    assert results.count("loaded") < FILES / 2
    assert readers.attempt(optimizer, path, whole, kind, verify=kind != "legacy") == "loaded"


@pytest.mark.parametrize("kind", differential.KINDS)
def test_damaged_files_are_what_they_are_to_torch(backend, tmp_path, kind):
    whole, path, results = differential.Whole(tmp_path), tmp_path / "damaged", []
    for seed in range(FILES):
        differential.KINDS[kind](whole, random.Random(seed), path)
        results.append(differential.held_against_torch(path, kind))
    assert results.count("read, and loaded") > FILES / 20
    assert results.count("refused") > FILES / 20
    path.write_bytes(whole.file)
    assert differential.held_against_torch(path, kind) == "read, and loaded"


def test_the_comparison_with_torch_notices(tmp_path, monkeypatch):
    whole, path = differential.Whole(tmp_path), tmp_path / "whole.pt"
    theirs = differential.by_torch(path)
    monkeypatch.setattr(differential, "by_torch", lambda _: {**theirs, "param_groups": []})
    with pytest.raises(AssertionError, match="param_groups"):
        differential.held_against_torch(path, "headers")
    write_archive(path, whole.pickle, {**whole.records, "byteorder": b"middle"})
    monkeypatch.undo()
    monkeypatch.setattr(differential.torch_file, "read", lambda _: theirs)
    with pytest.raises(AssertionError, match="torch raises"):
        differential.held_against_torch(path, "pickle")


def test_a_seed_makes_one_file():
    whole = bytes(range(256)) * 10
    assert [mutated(whole, seed) for seed in range(50)] == [mutated(whole, seed) for seed in range(50)]
    assert len({mutated(whole, seed) for seed in range(50)}) > 45
    assert len(MUTATIONS) == 8


def test_the_fuzzer_runs_and_ends(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz.readers", "--seconds", "1", "--seed", "7"]
    done = subprocess.run(command, cwd=readers.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "files, seed 7" in done.stdout


@pytest.mark.parametrize("bad", ["raises", "writes", "unnamed"])
def test_the_fuzzer_notices(tmp_path, monkeypatch, bad):
    def load(optimizer, path, verify):
        if bad == "writes":
            optimizer.param_groups[0]["lr"] = 7
        raise (
            KeyError("x") if bad == "raises" else readers.fastopt.CheckpointError("" if bad == "unnamed" else str(path))
        )

    monkeypatch.setattr(readers.fastopt, "load", load)
    with pytest.raises(AssertionError):
        readers.attempt(readers.some_optimizer(), tmp_path / "a", b"", "safetensors", verify=False)
