"""The flat form of a state dict; torch's own, of `get_optimizer_state_dict`, is the oracle."""

import copy as copying

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import fastopt
from fastopt.flattened import is_flattened, unflattened
from tests.oracle import TORCH_STATE_DICT, Comparison, trained

pytestmark = pytest.mark.usefixtures("backend")


def made(model, **options):
    groups = [{"params": [model[0].weight, model[1].weight]}, {"params": [model[0].bias, model[1].bias], **options}]
    return torch.optim.AdamW(groups)


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def states_of(model, optimizer):
    return (
        get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
        for flat in (True, False)
    )


def test_it_is_the_nested_form_again(model):
    flat, nested = states_of(model, trained(made(model, lr=0.5)))
    assert is_flattened(flat)
    assert not is_flattened(nested)
    Comparison().same(unflattened(flat)["state"], nested["state"])
    groups = unflattened(flat)["param_groups"]
    assert groups == [{key: group[key] for key in groups[0]} for group in nested["param_groups"]]


@pytest.mark.parametrize("suffix", ["pt", "dcp"])
def test_it_is_loaded_from_any_file(model, tmp_path, suffix):
    optimizer = trained(made(model, lr=0.5))
    flat, _ = states_of(model, optimizer)
    fastopt.files.formats.write(tmp_path / f"checkpoint.{suffix}", {"model": {}, "optim": flat})
    again = made(model)
    fastopt.load(again, tmp_path / f"checkpoint.{suffix}", key="optim")
    Comparison().same(TORCH_STATE_DICT(again)["state"], TORCH_STATE_DICT(optimizer)["state"])
    assert again.param_groups[1]["lr"] == 0.5


def test_equal_groups_in_a_row_are_found_out(model, tmp_path):
    flat, _ = states_of(model, trained(made(model)))
    torch.save(flat, tmp_path / "flat.pt")
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fastopt.load(made(model), tmp_path / "flat.pt")


def test_nested_state_and_tensors_as_hyperparameters():
    flat = {
        "state.a.b.c.d": 1,
        "state.a.b.c.e.f": 2,
        "state.a.x": 3,
        "param_groups.a.b.lr": torch.tensor(1.0),
        "param_groups.a.lr": torch.tensor(1.0),
        "param_groups.g.lr": torch.tensor(2.0),
    }
    nested = unflattened(copying.deepcopy(flat))
    assert nested["state"] == {"a.b": {"c": {"d": 1, "e": {"f": 2}}}, "a": {"x": 3}}
    assert [group["params"] for group in nested["param_groups"]] == [["a.b", "a"], ["g"]]


def test_state_without_a_group():
    with pytest.raises(KeyError, match=r"there is state of 'b\.x', and no param group"):
        unflattened({"state.b.x": 1, "param_groups.a.lr": 1})


def test_what_is_not_flat():
    for value in (3, {}, {"state": {}, "param_groups": []}, {"state.a": 1}, {"param_groups.a.b": 1, "c": 2}):
        assert not is_flattened(value)
