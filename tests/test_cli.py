"""The command line."""

import json

import pytest
import torch

from fastopt.cli import main
from tests.oracle import adam, trained


@pytest.fixture
def files(tmp_path):
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(trained(adam()).state_dict(), first)
    torch.save({"optimizer": trained(adam(), seed=1).state_dict(), "epoch": 1}, second)
    return str(first), str(second)


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_info(capsys):
    assert main(["info"]) == 0
    assert "backend" in capsys.readouterr().out


def test_inspect(files, capsys):
    assert main(["inspect", files[0], "--values"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 parameters in 2 groups")
    assert "exp_avg_sq" in out
    assert main(["inspect", files[1], "--key", "optimizer", "--values", "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["keys"]["exp_avg"]["tensors"] == 3
    assert found["keys"]["exp_avg"]["range"]["nan"] == 0


def test_json_is_strict(tmp_path, capsys):
    path = tmp_path / "a.pt"
    state = {0: {"m": torch.tensor([float("nan")])}}
    torch.save(
        {"state": state, "param_groups": [{"params": [0], "lr": torch.tensor(1.0), "limit": float("inf")}]}, path
    )
    assert main(["inspect", str(path), "--values", "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["groups"][0]["hyperparameters"] == {"lr": "tensor(1.)", "limit": "inf"}
    assert found["keys"]["m"]["range"]["minimum"] == "inf"


def test_diff(files, tmp_path, capsys):
    assert main(["diff", files[0], files[0]]) == 0
    assert capsys.readouterr().out == "no difference, 9 tensors compared\n"
    other = tmp_path / "c.pt"
    torch.save(torch.load(files[1], weights_only=True)["optimizer"], other)
    assert main(["diff", files[0], str(other)]) == 1
    assert "exp_avg" in capsys.readouterr().out
    assert main(["diff", files[0], str(other), "--json"]) == 1
    assert strict(capsys.readouterr().out)["keys"]["step"]["different"] == 0


@pytest.mark.parametrize("arguments", [["inspect", "nowhere.pt"], ["diff", "nowhere.pt", "nowhere.pt"]])
def test_an_error_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastopt: ")
    assert "nowhere.pt" in error
    assert error.count("\n") == 1


def test_a_checkpoint_without_a_key_says_where_the_state_is(files, capsys):
    assert main(["inspect", files[1]]) == 2
    assert capsys.readouterr().err.endswith("is no state dict; pass key='optimizer'\n")


def test_a_file_that_is_none_is_an_error_of_one_line(tmp_path, capsys):
    path = tmp_path / "text.pt"
    path.write_text("no checkpoint")
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "text.pt" in error
