"""The fuzzer's damaged files with fixed seeds."""

import subprocess
import sys

import pytest

from tests.fuzz import readers
from tests.fuzz.mutations import MUTATIONS, mutated

FILES = 400


@pytest.mark.parametrize("kind", readers.FORMATS)
def test_damaged_files(backend, tmp_path, kind):
    whole = readers.whole_files(tmp_path)[kind]
    optimizer, path = readers.some_optimizer(), tmp_path / "damaged"
    results = [
        readers.attempt(optimizer, path, mutated(whole, seed), kind, verify=bool(seed % 2)) for seed in range(FILES)
    ]
    assert results.count("loaded") < FILES / 2
    assert readers.attempt(optimizer, path, whole, kind, verify=kind != "legacy") == "loaded"


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
