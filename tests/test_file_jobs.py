"""Loads that read a file where they cast it, and not through the mapping that its tensors lie in."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastopt
from fastopt.files import formats, torch_file

ELEMENTS = 300_001  # of which the mapping alone would be read in pages


def adamw(dtype: torch.dtype = torch.bfloat16) -> torch.optim.AdamW:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(ELEMENTS, dtype=dtype)) for _ in range(3)])


def saved(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {
        index: {"step": torch.tensor(3.0), "exp_avg": torch.randn(ELEMENTS, generator=generator)} for index in range(3)
    }
    torch.save({"state": state, "param_groups": adamw().state_dict()["param_groups"]}, path)
    return path


def adamw_of(path: Path) -> torch.optim.AdamW:
    optimizer = adamw()
    fastopt.load(optimizer, path)
    return optimizer


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [entry["exp_avg"] for entry in optimizer.state.values()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("audit", [False, True])
def test_a_file_is_loaded_as_torch_loads_it(backend: str, dtype: torch.dtype, audit: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "state.pt")
    ours, theirs = adamw(dtype), adamw(dtype)
    fastopt.load(ours, path, audit=audit)
    theirs.load_state_dict(torch.load(path, weights_only=True))
    for one, other in zip(moments(ours), moments(theirs), strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)


def test_what_a_hook_or_a_transform_wrote_is_loaded(backend: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "state.pt")

    def doubled(state_dict):
        for entry in state_dict["state"].values():
            entry["exp_avg"].mul_(2)
        return state_dict

    hooked, transformed, expected = adamw(), adamw(), adamw()
    hooked.register_load_state_dict_pre_hook(lambda _, state_dict: doubled(state_dict))
    fastopt.load(hooked, path)
    fastopt.load(transformed, path, transform=doubled)
    expected.load_state_dict(doubled(torch.load(path, weights_only=True)))
    for optimizer in (hooked, transformed):
        assert all(map(torch.equal, moments(optimizer), moments(expected)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_that_is_cut_short_meanwhile_is_an_error(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fastopt.backend().name != "native":
        pytest.skip("torch reads through a mapping, whose end kills the process")
    path = saved(tmp_path / "state.pt")
    read = torch_file.read

    def read_and_cut(*arguments):
        content = read(*arguments)
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
        return content

    monkeypatch.setattr(torch_file, "read", read_and_cut)
    optimizer = adamw(dtype)
    with pytest.raises(OSError, match="the file has ended before") as error:
        fastopt.load(optimizer, path)
    assert any(str(path) in note for note in error.value.__notes__)
    assert not optimizer.state


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
