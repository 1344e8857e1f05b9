"""Loading into the tensors that the optimizer already holds."""

import copy
from collections import deque
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import fastopt

from .loads import assert_filled_as_the_note_says
from .oracle import Bare, adam, assert_nothing_shared, fingerprint, leaves, parameter, torch_load, trained

SHAPES = ((3, 4), (), (0,), (5,))
OPTIMIZERS = {
    "Adam": lambda params: torch.optim.Adam(params, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "ASGD": torch.optim.ASGD,
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1),
}
# ASGD keeps numbers in float32 whatever its parameters are, and an ordinary load narrows them; LBFGS in bfloat16 takes
# another path, and has a history of another length.
NOT_NARROWED = {"ASGD", "LBFGS"}


def tensors(optimizer: Optimizer) -> list[torch.Tensor]:
    return [leaf for leaf in leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]


def addresses(optimizer: Optimizer) -> list[tuple[int, int]]:
    return [(id(tensor), tensor.data_ptr()) for tensor in tensors(optimizer)]


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[Optimizer, Optimizer, dict[str, Any]]:
    """Two trained twins, and another state for them."""
    torch.manual_seed(0)
    make = OPTIMIZERS[name]
    source = trained(make([parameter(*shape) for shape in SHAPES]))
    first, second = (trained(make([parameter(*shape, dtype=dtype) for shape in SHAPES])) for _ in range(2))
    return first, second, copy.deepcopy(source.state_dict())


def with_state(state: Any, *shape: int) -> Bare:
    param = parameter(*shape)
    optimizer = Bare([param])
    optimizer.state[param] = state
    return optimizer


def saved(state: Any) -> dict[str, Any]:
    return {"state": {0: state}, "param_groups": [{"params": [0]}]}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in OPTIMIZERS]
    + [(name, torch.bfloat16) for name in sorted(OPTIMIZERS.keys() - NOT_NARROWED)],
)
def test_same_tensors_with_the_values_of_an_ordinary_load(backend, name, dtype):
    ours, torchs, state_dict = pair(name, dtype)
    before = addresses(ours)
    report = fastopt.load_state_dict(ours, state_dict, inplace=True)
    torch_load(torchs, state_dict, copy=True)
    assert addresses(ours) == before
    assert report.filled == len(before) > 0
    for actual, expected in zip(tensors(ours), tensors(torchs), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    assert_nothing_shared(ours, state_dict)
    assert f"filled {report.filled} in place" in str(report)


def test_held_tensors_keep_their_dtype(backend):
    """float32 moments under a bfloat16 parameter are what an ordinary load would narrow."""
    param = parameter(3, dtype=torch.bfloat16)
    optimizer = Bare([param])
    moment = torch.zeros(3)
    optimizer.state[param] = {"exp_avg": moment}
    fastopt.load_state_dict(optimizer, saved({"exp_avg": torch.full((3,), 1 / 3)}), inplace=True)
    assert optimizer.state[param]["exp_avg"] is moment
    assert torch.equal(moment, torch.full((3,), 1 / 3))


def test_strided_and_differentiable_tensors(backend):
    held = torch.zeros(4, 6)[:, ::2]
    leaf = torch.zeros(3, requires_grad=True)
    optimizer = with_state({"a": held, "b": leaf})
    values = saved({"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(3)})
    fastopt.load_state_dict(optimizer, values, inplace=True)
    assert torch.equal(held, values["state"][0]["a"])
    assert torch.equal(leaf.detach(), torch.ones(3))


def test_nested_containers_are_rebuilt_around_the_held_tensors(backend):
    held = [torch.zeros(2) for _ in range(4)]
    state = {"list": [held[0], (held[1], 7)], "deque": deque([held[2]], maxlen=3), "dict": {"x": held[3]}, "n": 1}
    optimizer = with_state(state)
    fresh = [torch.full((2,), float(i)) for i in range(4)]
    fastopt.load_state_dict(
        optimizer,
        saved({"list": [fresh[0], (fresh[1], 8)], "deque": deque([fresh[2]]), "dict": {"x": fresh[3]}, "n": {1, 2}}),
        inplace=True,
    )
    [loaded] = optimizer.state.values()
    found = [loaded["list"][0], loaded["list"][1][0], loaded["deque"][0], loaded["dict"]["x"]]
    assert all(one is other for one, other in zip(found, held, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(found, fresh, strict=True))
    assert loaded["list"][1][1] == 8
    assert loaded["n"] == {1, 2}


def test_the_optimizers_own_live_state_dict(backend):
    optimizer = trained(adam((3,), (4, 2)))
    before, values = addresses(optimizer), [tensor.clone() for tensor in tensors(optimizer)]
    report = fastopt.load_state_dict(optimizer, optimizer.state_dict(), inplace=True)
    assert (report.filled, report.shared, report.bytes_written) == (0, 6, 0)
    assert str(report).splitlines()[1:] == ["  left 6 as they were"]
    assert addresses(optimizer) == before
    assert all(torch.equal(one, other) for one, other in zip(tensors(optimizer), values, strict=True))


def test_state_of_no_parameter_is_kept_as_in_any_load(backend):
    optimizer = with_state({"a": torch.zeros(2)})
    unclaimed = torch.ones(2)
    state_dict = saved({"a": torch.ones(2)})
    state_dict["state"]["other"] = {"b": unclaimed}
    report = fastopt.load_state_dict(optimizer, state_dict, inplace=True)
    assert report.unexpected == ["other"]
    assert optimizer.state["other"]["b"] is not unclaimed
    assert torch.equal(optimizer.state["other"]["b"], unclaimed)


MISMATCHES = {
    "no state": (lambda: None, {"a": torch.ones(2)}, r"no tensor at state\['a'\].*float32 \[2\]"),
    "a key": (lambda: {"b": torch.zeros(2)}, {"a": torch.ones(2)}, r"no tensor at state\['a'\]"),
    "a number": (lambda: {"a": 1.0}, {"a": torch.ones(2)}, r"no tensor at state\['a'\]"),
    "an item": (lambda: {"a": [torch.zeros(2)]}, {"a": [torch.ones(2)] * 2}, r"no tensor at state\['a'\]\[1\]"),
    "a shape": (lambda: {"a": torch.zeros(2, 1)}, {"a": torch.ones(2)}, r"float32 \[2, 1\].*state\['a'\].*\[2\]"),
    "a set": (lambda: {"a": {1}}, {"a": {torch.ones(2)}}, r"state\['a'\] is a set of tensors"),
    "no values": (lambda: {"a": torch.zeros(2)}, {"a": torch.ones(2, device="meta")}, "on meta.*has no values"),
    "a whole state": (lambda: torch.zeros(3), torch.ones(2), r"float32 \[3\] on cpu at state, where float32 \[2\]"),
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_a_mismatch_names_the_place_and_changes_nothing(backend, kind):
    build, value, text = MISMATCHES[kind]
    fits, params = torch.zeros(3), [parameter(3), parameter(3)]
    optimizer = Bare(params)
    optimizer.state[params[0]] = {"a": fits}
    if (held := build()) is not None:
        optimizer.state[params[1]] = held
    state_dict = {"state": {0: {"a": torch.ones(3)}, 1: value}, "param_groups": [{"params": [0, 1], "lr": 7.0}]}
    before = [fingerprint(optimizer.state), fingerprint(optimizer.param_groups)]
    with pytest.raises(ValueError, match=text) as caught:
        fastopt.load_state_dict(optimizer, state_dict, inplace=True)
    assert "parameter 1" in "".join(caught.value.__notes__)
    assert [fingerprint(optimizer.state), fingerprint(optimizer.param_groups)] == before


def test_overlapping_tensors_are_refused_before_anything_is_written(backend):
    memory = torch.zeros(6)
    optimizer = with_state({"a": memory[:4], "b": memory[2:]})
    with pytest.raises(ValueError, match="overlap") as caught:
        fastopt.load_state_dict(optimizer, saved({"a": torch.ones(4), "b": torch.ones(4)}), inplace=True)
    notes = "\n".join(caught.value.__notes__)
    assert "state['a'] of parameter 0" in notes
    assert "state['b'] of parameter 0" in notes
    assert not memory.any()


def test_one_tensor_in_two_places(backend):
    """Filled once from one saved tensor; from two, nothing says which of them it should hold."""
    step, value = torch.zeros(()), torch.tensor(3.0)
    optimizer = with_state({"a": step, "b": step})
    report = fastopt.load_state_dict(optimizer, saved({"a": value, "b": value}), inplace=True)
    assert report.filled == 1
    [state] = optimizer.state.values()
    assert state["a"] is state["b"] is step
    assert step == 3
    with pytest.raises(ValueError, match=r"held at state\['b'\] is held elsewhere too"):
        fastopt.load_state_dict(optimizer, saved({"a": value, "b": torch.tensor(4.0)}), inplace=True)
    assert step == 3


def test_a_failing_group_check_changes_nothing(backend):
    optimizer = trained(adam((3,)))
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][0]["exp_avg"].fill_(7)
    broken["param_groups"][0]["params"].append(9)
    before = fingerprint(optimizer.state)
    with pytest.raises(ValueError, match="doesn't match the size"):
        fastopt.load_state_dict(optimizer, broken, inplace=True)
    assert fingerprint(optimizer.state) == before


def test_version_counters_move(backend):
    """What autograd saved of a held tensor must be known to have changed."""
    optimizer = trained(adam((3,)))
    before = [tensor._version for tensor in tensors(optimizer)]
    fastopt.load_state_dict(optimizer, copy.deepcopy(optimizer.state_dict()), inplace=True)
    assert all(tensor._version > version for tensor, version in zip(tensors(optimizer), before, strict=True))


def inference_tensor():
    with torch.inference_mode():
        return torch.zeros(3)


UNWRITABLE = {
    "inference": (inference_tensor, torch.ones(3), "which only inference mode may write"),
    "expanded": (lambda: torch.zeros(1).expand(3), torch.ones(3), "which is expanded, many elements in one place"),
    "sparse held": (
        lambda: torch.eye(3).to_sparse(),
        torch.ones(3, 3),
        "which is torch.sparse_coo and not torch.strid",
    ),
    "sparse saved": (lambda: torch.eye(3), torch.eye(3).to_sparse(), "which is torch.strided and not torch.sparse_coo"),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_what_torch_will_not_write_is_known_before_anything_is_written(backend, kind):
    make, value, text = UNWRITABLE[kind]
    params = [parameter(3), parameter(3)]
    optimizer, first, odd = Bare(params), torch.zeros(2), make()
    optimizer.state[params[0]] = {"a": first}
    optimizer.state[params[1]] = {"a": odd}
    state_dict = {"state": {0: {"a": torch.ones(2)}, 1: {"a": value}}, "param_groups": [{"params": [0, 1]}]}
    with pytest.raises(ValueError, match=text):
        fastopt.load_state_dict(optimizer, state_dict, inplace=True)
    assert not first.any()
    report = fastopt.load_state_dict(optimizer, state_dict, inplace="auto")
    assert report.replaced == [(1, "state['a']")]
    assert optimizer.state[params[0]]["a"] is first
    assert optimizer.state[params[1]]["a"] is not odd
    assert torch.equal(optimizer.state[params[1]]["a"].to_dense(), value.to_dense())


@pytest.mark.parametrize("shared", [True, False])
def test_strided_tensors_of_the_optimizers_own_change_places(backend, shared):
    memory = torch.arange(24.0).reshape(6, 4)
    held = [memory[:, :1], memory[:, 1:2], memory.clone()[:, 2:3] if shared else torch.zeros(6, 1)]
    values = [tensor.clone() for tensor in held]
    params = [parameter(3) for _ in held]
    optimizer = Bare(params)
    for param, tensor in zip(params, held, strict=True):
        optimizer.state[param] = {"a": tensor}
    live = optimizer.state_dict()
    state = {index: live["state"][(index + 1) % 3] for index in range(3)}
    fastopt.load_state_dict(optimizer, {**live, "state": state}, inplace=True)
    for index, tensor in enumerate(held):
        assert optimizer.state[params[index]]["a"] is tensor
        assert torch.equal(tensor, values[(index + 1) % 3])
    fastopt.load_state_dict(optimizer, optimizer.state_dict(), inplace=True)
    assert all(torch.equal(tensor, values[(index + 1) % 3]) for index, tensor in enumerate(held))


# ---- what cannot be taken back ----


class Stubborn(torch.Tensor):
    """A tensor that takes its turn in being written, and may refuse to: what it holds then is half of it."""

    left = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_ and isinstance(args[0], cls):
            cls.left -= 1
            if cls.left < 0:
                args[0].as_subclass(torch.Tensor)[:1] = 9
                raise KeyboardInterrupt if cls.left < -1 else ArithmeticError("stuck")
        return super().__torch_function__(func, types, args, kwargs or {})


def optimizer_with_odd_tensors():
    params = [parameter(4) for _ in range(5)]
    optimizer = Bare(params)
    for index, param in enumerate(params):
        held = {key: torch.full((4,), float(index)) for key in ("a", "b", "c")}
        held["b"] = held["b"].as_subclass(Stubborn) if index != 2 else held["b"]
        optimizer.state[param] = held
    return optimizer


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("auto", [True, "auto"])
def test_a_failure_in_the_middle_says_what_is_filled_and_what_is_not(backend, turn, auto, monkeypatch):
    optimizer, twin = optimizer_with_odd_tensors(), optimizer_with_odd_tensors()
    state = {index: {key: torch.full((4,), 10.0 + index) for key in ("a", "b", "c")} for index in range(5)}
    state_dict = {"state": state, "param_groups": [{"params": list(range(5)), "lr": 3.0}]}
    monkeypatch.setattr(Stubborn, "left", turn)
    with pytest.raises(ArithmeticError, match="stuck") as caught:
        fastopt.load_state_dict(optimizer, state_dict, inplace=auto)
    assert_filled_as_the_note_says(caught.value, optimizer, twin, state_dict)
    index = [0, 1, 3, 4][turn]
    note = caught.value.__notes__[-1]
    assert f"filled in part, wholly or not at all: state['b'] of parameter {index}." in note
    monkeypatch.setattr(Stubborn, "left", 9)
    fastopt.load_state_dict(optimizer, state_dict, inplace=auto)
    assert [value[0].item() for value in tensors(optimizer)] == [10.0 + index for index in range(5) for _ in range(3)]


def test_places_of_many_parameters_are_ranges(backend, monkeypatch):
    params = [parameter(2) for _ in range(300)]
    optimizer, saved_state = Bare(params), {}
    for index, param in enumerate(params):
        optimizer.state[param] = {"a": torch.zeros(2)} if index % 100 else {}
        saved_state[index] = {"a": torch.ones(2)} if index % 100 else {}
    monkeypatch.setattr(Bare, "__setstate__", lambda self, state: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        fastopt.load_state_dict(
            optimizer, {"state": saved_state, "param_groups": [{"params": list(range(300))}]}, inplace=True
        )
    [note] = caught.value.__notes__
    assert "of 297 tensors, filled: state['a'] of parameter 1-99, 101-199, 201-299. All else" in note


# ---- inplace="auto" ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_auto_fills_all_that_true_would_fill(backend, name):
    ours, strict, state_dict = pair(name)
    before = addresses(ours)
    report = fastopt.load_state_dict(ours, state_dict, inplace="auto")
    fastopt.load_state_dict(strict, state_dict, inplace=True)
    assert addresses(ours) == before
    assert report.replaced == []
    assert all(torch.equal(one, other) for one, other in zip(tensors(ours), tensors(strict), strict=True))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"Adagrad"}))  # which holds state from the start
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_loads_into_an_optimizer_without_state_as_ever(backend, name, dtype):
    _, _, state_dict = pair(name)
    ours, torchs = (OPTIMIZERS[name]([parameter(*shape, dtype=dtype) for shape in SHAPES]) for _ in range(2))
    report = fastopt.load_state_dict(ours, state_dict, inplace="auto")
    torch_load(torchs, state_dict, copy=True)
    assert len(report.replaced) == len(tensors(ours)) == report.tensors > report.filled == 0
    for actual, expected in zip(tensors(ours), tensors(torchs), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    assert_nothing_shared(ours, state_dict)


def test_auto_refuses_what_has_no_values(backend):
    held = torch.zeros(2)
    optimizer = with_state({"a": held})
    with pytest.raises(NotImplementedError, match="meta"):
        fastopt.load_state_dict(optimizer, saved({"a": torch.ones(2, device="meta")}), inplace="auto")
    assert [state["a"] is held for state in optimizer.state.values()] == [True]


@pytest.mark.parametrize("kind", sorted(MISMATCHES.keys() - {"no values"}))
def test_auto_replaces_what_does_not_fit_and_says_where(backend, kind):
    build, value, _ = MISMATCHES[kind]
    fits, params = torch.zeros(3), [parameter(3), parameter(3)]
    optimizer = Bare(params)
    optimizer.state[params[0]] = {"a": fits, "step": torch.tensor(1.0)}
    if (held := build()) is not None:
        optimizer.state[params[1]] = held
    state = {0: {"a": torch.ones(3), "step": torch.tensor(2, dtype=torch.int64)}, 1: value}
    state_dict = {"state": state, "param_groups": [{"params": [0, 1]}]}
    report = fastopt.load_state_dict(optimizer, state_dict, inplace="auto")
    loaded = optimizer.state[params[0]]
    assert loaded["a"] is fits
    assert fits.tolist() == [1, 1, 1]
    assert loaded["step"].dtype is torch.float32
    assert loaded["step"] == 2
    replaced = [leaf for leaf in leaves(optimizer.state[params[1]]) if isinstance(leaf, torch.Tensor)]
    assert [saved_id for saved_id, _ in report.replaced] == [1]
    assert report.replaced[0][1].startswith("state")
    assert f"replaced 1, which had nothing to fill: {report.replaced[0][1]} of id 1" in str(report)
    assert len(replaced) >= 1
    assert all((leaf == 1).all() for leaf in replaced)
    assert_nothing_shared(optimizer, state_dict)


def test_auto_keeps_the_rule_of_the_step(backend):
    param = parameter(3, dtype=torch.bfloat16)
    optimizer = Bare([param])
    value = {"step": torch.tensor(257.0), "deep": {"step": torch.tensor(257.0)}, "list": [torch.tensor(257.0)]}
    fastopt.load_state_dict(optimizer, saved(value), inplace="auto")
    state = optimizer.state[param]
    assert state["step"] == state["deep"]["step"] == 257
    assert state["list"][0].dtype is torch.bfloat16


def test_auto_of_a_tensor_held_twice_fills_the_first(backend):
    step = torch.zeros(())
    optimizer = with_state({"a": step, "b": step})
    fastopt.load_state_dict(optimizer, saved({"a": torch.tensor(3.0), "b": torch.tensor(4.0)}), inplace="auto")
    [state] = optimizer.state.values()
    assert state["a"] is step
    assert (state["a"], state["b"]) == (3, 4)


@pytest.mark.parametrize("inplace", ["always", 1, None])
def test_other_words_are_refused(backend, inplace):
    optimizer = with_state({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"inplace: .* is neither a bool nor 'auto'"):
        fastopt.load_state_dict(optimizer, saved({"a": torch.ones(2)}), inplace=inplace)


# ---- hyperparameters that are tensors ----


def with_tensor_lr(lr=0.1, groups=1, **options):
    """An AdamW as one is that a graph was captured of; each of its groups has an lr of its own."""
    params = [parameter(3) for _ in range(groups)]
    return torch.optim.AdamW(
        [{"params": [param], "lr": torch.tensor(lr)} for param in params], lr=1.0, foreach=False, **options
    )


@pytest.mark.parametrize("inplace", [True, "auto"])
@pytest.mark.parametrize("value", [torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), 0.25, 1], ids=repr)
def test_a_tensor_lr_is_filled_and_stays_where_it_is(backend, inplace, value):
    optimizer = trained(with_tensor_lr(groups=2))
    held = [group["lr"] for group in optimizer.param_groups]
    addresses_before = [tensor.data_ptr() for tensor in held]
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        group["lr"] = value
    given = fingerprint(state_dict)
    report = fastopt.load_state_dict(optimizer, state_dict, inplace=inplace)
    assert all(group["lr"] is one for group, one in zip(optimizer.param_groups, held, strict=True))
    assert [tensor.data_ptr() for tensor in held] == addresses_before
    assert [tensor.dtype for tensor in held] == [torch.float32] * 2
    assert [tensor.item() for tensor in held] == [float(value)] * 2
    assert (report.filled, report.replaced) == (8, [])
    assert fingerprint(state_dict) == given


def test_tensors_in_a_tuple_of_hyperparameters_are_filled(backend):
    betas = (torch.tensor(0.5), 0.9)
    optimizer = Bare([parameter(2)], betas=betas, scales=torch.zeros(3), note="x")
    state_dict = {"state": {}, "param_groups": [{"params": [0], "note": "y", "scales": torch.ones(3)}]}
    state_dict["param_groups"][0]["betas"] = (torch.tensor(0.25), 0.99)
    report = fastopt.load_state_dict(optimizer, state_dict, inplace=True)
    [group] = optimizer.param_groups
    assert group["betas"][0] is betas[0]
    assert group["betas"] == (0.25, 0.99)
    assert group["scales"].tolist() == [1, 1, 1]
    assert group["note"] == "y"
    assert report.filled == 2


def test_a_parameter_is_no_hyperparameter(backend):
    """Its id is a number, and it a tensor of one element."""
    param = parameter(1)
    optimizer = Bare([param])
    fastopt.load_state_dict(optimizer, {"state": {}, "param_groups": [{"params": [7]}]}, inplace=True)
    assert optimizer.param_groups[0]["params"][0] is param
    assert param.item() == 1


def test_a_held_number_becomes_what_was_saved(backend):
    optimizer, value = Bare([parameter(2)], lr=0.1), torch.tensor(0.5)
    state_dict = {"state": {}, "param_groups": [{"params": [0], "lr": value}]}
    fastopt.load_state_dict(optimizer, state_dict, inplace=True)
    assert optimizer.param_groups[0]["lr"] == value
    assert optimizer.param_groups[0]["lr"] is not value


@pytest.mark.parametrize(
    ("held", "value", "text"),
    [
        (
            torch.zeros(3),
            torch.ones(2),
            r"holds float32 \[3\] on cpu at param_groups\[0\]\['lr'\], where float32 \[2\]",
        ),
        (inference_tensor(), torch.ones(3), r"param_groups\[0\]\['lr'\], which only inference mode may write"),
    ],
    ids=["a shape", "inference"],
)
def test_a_hyperparameter_that_does_not_fit(backend, held, value, text):
    param = parameter(2)
    optimizer = Bare([param], lr=held)
    optimizer.state[param] = {"a": torch.zeros(2)}
    state_dict = {"state": {0: {"a": torch.ones(2)}}, "param_groups": [{"params": [0], "lr": value}]}
    before = fingerprint(optimizer.state), fingerprint(optimizer.param_groups)
    with pytest.raises(ValueError, match=text):
        fastopt.load_state_dict(optimizer, state_dict, inplace=True)
    assert (fingerprint(optimizer.state), fingerprint(optimizer.param_groups)) == before
    report = fastopt.load_state_dict(optimizer, state_dict, inplace="auto")
    assert report.replaced == [(None, "param_groups[0]['lr']")]
    assert "replaced 1, which had nothing to fill: param_groups[0]['lr']" in str(report).splitlines()[-1]
    assert torch.equal(optimizer.param_groups[0]["lr"], value)
    assert optimizer.param_groups[0]["lr"] is not value


@pytest.mark.parametrize(("held", "value"), [(torch.tensor(3), 0.5), (torch.zeros(2), 0.5), (torch.tensor(0.5), None)])
def test_what_a_tensor_cannot_stand_for_replaces_it(backend, held, value):
    optimizer = Bare([parameter(2)], h=held)
    fastopt.load_state_dict(optimizer, {"state": {}, "param_groups": [{"params": [0], "h": value}]}, inplace=True)
    assert optimizer.param_groups[0]["h"] is value


def test_an_lr_that_two_groups_share(backend):
    lr = torch.tensor(0.1)
    optimizer = Bare([{"params": [parameter(2)]}, {"params": [parameter(2)]}], lr=lr)
    groups = [{"params": [0], "lr": torch.tensor(0.5)}, {"params": [1], "lr": torch.tensor(0.5)}]
    report = fastopt.load_state_dict(optimizer, {"state": {}, "param_groups": groups}, inplace=True)
    assert report.filled == 1
    assert all(group["lr"] is lr for group in optimizer.param_groups)
    assert lr == 0.5
    groups[1]["lr"] = 0.75
    with pytest.raises(ValueError, match=r"held at param_groups\[1\]\['lr'\] is held elsewhere too"):
        fastopt.load_state_dict(optimizer, {"state": {}, "param_groups": groups}, inplace=True)
    assert lr == 0.5
    fastopt.load_state_dict(optimizer, {"state": {}, "param_groups": groups}, inplace="auto")
    assert [group["lr"] for group in optimizer.param_groups] == [lr, 0.75]


def test_a_failure_names_the_hyperparameters_that_are_filled(backend, monkeypatch):
    optimizer = trained(with_tensor_lr(groups=2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in state_dict["param_groups"]:
        group["lr"] = torch.tensor(7.0)
    monkeypatch.setattr(torch.optim.AdamW, "__setstate__", lambda self, state: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        fastopt.load_state_dict(optimizer, state_dict, inplace=True)
    [note] = caught.value.__notes__
    assert note.startswith("inplace: of 8 tensors, filled: ")
    assert note.endswith("param_groups[0]['lr'], param_groups[1]['lr']. All else of the optimizer is as it was")
    assert [group["lr"] for group in optimizer.param_groups] == [7, 7]
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))


def test_hyperparameters_that_overlap_are_refused_by_name(backend):
    memory = torch.zeros(3)
    optimizer = Bare([parameter(2)], a=memory[:2], b=memory[1:])
    group = {"params": [0], "a": torch.ones(2), "b": torch.full((2,), 2.0)}
    with pytest.raises(ValueError, match="overlaps") as caught:
        fastopt.load_state_dict(optimizer, {"state": {}, "param_groups": [group]}, inplace=True)
    assert {note.partition(": ")[2] for note in caught.value.__notes__} == {
        "param_groups[0]['a']",
        "param_groups[0]['b']",
    }
    assert not memory.any()
