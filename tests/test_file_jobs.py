"""Loads that read a file where they cast it, and not through the mapping that its tensors lie in."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import fastopt
from fastopt.files import formats, safetensors_file
from tests.dcp import save_in_chunks, torch_save

ROOT = Path(__file__).parent.parent

ELEMENTS = 300_001  # of which the mapping alone would be read in pages


def adamw(dtype: torch.dtype = torch.bfloat16) -> torch.optim.AdamW:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(ELEMENTS, dtype=dtype)) for _ in range(3)])


FORMATS = ["state.pt", "state.safetensors", "state.dcp", "torchs.dcp", "sharded.dcp"]
"""A name each; the last two are written by torch, one of them as if by two ranks."""


def content_to_save() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    state = {
        index: {"step": torch.tensor(3.0), "exp_avg": torch.randn(ELEMENTS, generator=generator)} for index in range(3)
    }
    return {"state": state, "param_groups": adamw().state_dict()["param_groups"]}


def saved(path: Path) -> Path:
    content = content_to_save()
    if path.name == "torchs.dcp":
        torch_save(content, path)
    elif path.name == "sharded.dcp":
        save_in_chunks(content, path)
    else:
        formats.write(path, content)
    return path


def adamw_of(path: Path) -> torch.optim.AdamW:
    optimizer = adamw()
    fastopt.load(optimizer, path)
    return optimizer


def file_with_the_data(path: Path) -> Path:
    [file] = path.glob("*.distcp") if path.is_dir() else [path]
    return file


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(tmp_path / request.param)


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [entry["exp_avg"] for entry in optimizer.state.values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("audit", [False, True])
def test_a_file_is_loaded_as_torch_loads_it(backend: str, dtype: torch.dtype, audit: bool, path: Path) -> None:
    ours, theirs = adamw(dtype), adamw(dtype)
    fastopt.load(ours, path, audit=audit)
    theirs.load_state_dict(content_to_save())
    for one, other in zip(moments(ours), moments(theirs), strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_hook_or_a_transform_wrote_is_loaded(backend: str, name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / name)

    def doubled(state_dict):
        for entry in state_dict["state"].values():
            entry["exp_avg"].mul_(2)
        return state_dict

    hooked, transformed, expected = adamw(), adamw(), adamw()
    hooked.register_load_state_dict_pre_hook(lambda _, state_dict: doubled(state_dict))
    fastopt.load(hooked, path)
    fastopt.load(transformed, path, transform=doubled)
    expected.load_state_dict(doubled(content_to_save()))
    for optimizer in (hooked, transformed):
        assert all(map(torch.equal, moments(optimizer), moments(expected)))


@pytest.mark.parametrize("inplace", [False, True, "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_that_is_cut_short_meanwhile_is_an_error(
    backend: str, dtype: torch.dtype, inplace: bool | Literal["auto"], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "python" and path.name not in FORMATS[3:]:
        pytest.skip("torch reads through a mapping, whose end kills the process")
    file = file_with_the_data(path)
    optimizer = adamw(dtype)
    if inplace:
        optimizer.load_state_dict(content_to_save())
    read_and_then(monkeypatch, lambda: os.truncate(file, file.stat().st_size // 2))
    with pytest.raises(OSError, match="the file has ended before") as error:
        fastopt.load(optimizer, path, inplace=inplace)
    notes = " ".join(error.value.__notes__)
    assert str(file) in notes
    assert "exp_avg" in notes or "step" in notes
    assert bool(optimizer.state) == bool(inplace)


def read_and_then(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Has a file change once its tensors are known, and before they are read."""

    def read_and_change(*arguments, read=formats.read):
        content = read(*arguments)
        change()
        return content

    monkeypatch.setattr(formats, "read", read_and_change)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
def test_a_file_that_is_written_to_meanwhile_is_an_error(
    backend: str, name: str, inplace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    fastopt.save(filled := adamw_of(saved(tmp_path / "other.pt")), path)

    def change() -> None:
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(bytes(1000))
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # two changes may come in one tick of the clock

    read_and_then(monkeypatch, change)
    optimizer = filled if inplace else adamw()
    with pytest.raises(fastopt.CheckpointError, match=f"{name} was changed while it was being read") as error:
        fastopt.load(optimizer, path, inplace=inplace)
    assert inplace == any("filled: " in note for note in error.value.__notes__)
    assert inplace == bool(optimizer.state)


@pytest.mark.parametrize("fate", ["replaced", "removed"])
def test_a_file_that_another_takes_the_place_of_is_read_to_its_end(
    backend: str, fate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, empty = saved(tmp_path / "state.pt"), adamw()
    expected = moments(adamw_of(path))
    read_and_then(monkeypatch, path.unlink if fate == "removed" else lambda: fastopt.save(empty, path))
    optimizer = adamw()
    fastopt.load(optimizer, path)
    assert all(map(torch.equal, moments(optimizer), expected))


def test_a_safetensors_file_that_is_cut_short_while_it_is_verified_is_an_error(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, checksums = saved(tmp_path / "state.safetensors"), safetensors_file.checksums

    def cut(*arguments):
        os.truncate(path, path.stat().st_size // 2)
        return checksums(*arguments)

    monkeypatch.setattr(safetensors_file, "checksums", cut)
    optimizer = adamw()
    with pytest.raises(OSError, match="the file has ended before"):
        fastopt.load(optimizer, path, verify=True)
    assert not optimizer.state


PEAK = """
import resource, sys, torch, fastopt
params = [torch.nn.Parameter(torch.zeros(1 << 22, dtype=torch.bfloat16)) for _ in range(24)]
optimizer = torch.optim.SGD(params, lr=1, momentum=0.9)
small = torch.optim.SGD([torch.zeros(1)], momentum=0.9)
fastopt.save(small, sys.argv[2])
fastopt.load(small, sys.argv[2])  # imports what it needs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = fastopt.load(optimizer, sys.argv[1])
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((loaded - before) / 1024 - report.bytes_written / 2**20)
fastopt.load(optimizer, sys.argv[1], inplace=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.dcp", "torchs.dcp"])
def test_memory_is_that_of_the_results(name: str, tmp_path: Path) -> None:
    """The pages of a mapping that have been looked at would be memory of the process as well."""
    state = {index: {"momentum_buffer": torch.full((1 << 22,), 1.5)} for index in range(24)}
    groups = torch.optim.SGD([torch.zeros(1) for _ in range(24)], lr=1, momentum=0.9).state_dict()["param_groups"]
    path = tmp_path / name
    (torch_save if name == "torchs.dcp" else write)({"state": state, "param_groups": groups}, path)
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"small{path.suffix}")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, filled = map(float, done.stdout.split())
    assert loaded < 64
    assert filled < 64


def write(content: dict[str, Any], path: Path) -> None:
    formats.write(path, content)
