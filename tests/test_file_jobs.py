"""Loads that read a file where they cast it, and not through the mapping that its tensors lie in."""

from pathlib import Path

import pytest
import torch

import fastopt
from fastopt.files import torch_file

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
