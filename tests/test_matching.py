"""`fastopt.match`; the oracle is a run of stock torch that goes on without a change of its parameters."""

import copy as copying
import functools
import random
import re
import time

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastopt
from tests.loads import tensor
from tests.oracle import (
    TORCH_LOAD_STATE_DICT,
    TORCH_STATE_DICT,
    Bare,
    Comparison,
    fingerprint,
    parameter,
    train,
    trained,
)

pytestmark = pytest.mark.usefixtures("backend")

LOADS = {"torch": TORCH_LOAD_STATE_DICT, "fastopt": fastopt.load_state_dict}


@pytest.fixture(params=LOADS)
def load(request, backend):
    return LOADS[request.param]


class Net(torch.nn.Module):
    """A small model whose layers are made, and so numbered, in a given order."""

    def __init__(self, layers=("first", "second", "head")):
        super().__init__()
        for layer in layers:
            self.add_module(layer, torch.nn.Linear(4, 1 if layer == "head" else 4))

    def forward(self, batch):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(batch)))))


def losses(model, optimizer, *, seed, steps=3):
    """Steps of a small regression; its losses, bit by bit."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def adamw(named, **options):
    return torch.optim.AdamW(named, **{"lr": 0.01, "weight_decay": 0.1, **options})


def trained_net(make=lambda model: adamw(model.named_parameters())):
    torch.manual_seed(0)
    model = Net()
    optimizer = make(model)
    losses(model, optimizer, seed=1)
    return model, optimizer


def decayed(model):
    """Groups with and without weight decay, biases before weights."""
    named = list(model.named_parameters())
    return [
        {"params": [(n, p) for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
        {"params": [(n, p) for n, p in named if n.endswith("weight")], "weight_decay": 0.1},
    ]


def resumed(model, make, layers=("first", "second", "head")):
    """A model with the same weights, and an optimizer made for it that has not stepped."""
    new = Net(layers)
    new.load_state_dict(model.state_dict())
    return new, make(new)


def by_name(optimizer, named=None):
    """The live state of each parameter by its name."""
    names = {param: name for name, param in named} if named else {}
    for group in optimizer.param_groups if not named else ():
        names.update(zip(group["params"], group["param_names"], strict=True))
    return {names[param]: optimizer.state[param] for param in names if param in optimizer.state}


def assert_same_by_name(actual, expected):
    assert actual.keys() == expected.keys()
    for name, state in expected.items():
        Comparison().same(dict(actual[name]), dict(state), name)


def saved_by(optimizer):
    return copying.deepcopy(TORCH_STATE_DICT(optimizer))


def moments(*names, params=None, seed=0, **group):
    """A state dict of one group whose parameters have these names."""
    ids = list(range(len(names))) if params is None else params
    state = {saved_id: {"m": tensor(2, seed=seed + i)} for i, saved_id in enumerate(ids)}
    return {"state": state, "param_groups": [{"lr": 0.5, **group, "param_names": list(names), "params": ids}]}


def bare(*names, lr=0.5, **group):
    """An optimizer of one named group."""
    return Bare([{"params": [(name, parameter(2)) for name in names], **group}], lr=lr)


# ---- training goes on ----


def test_reordered(load):
    model, optimizer = trained_net()
    state_dict = saved_by(optimizer)
    new_model, new = resumed(model, lambda m: adamw(m.named_parameters(), lr=1.0), ("head", "second", "first"))
    load(new, fastopt.match(state_dict, new))
    assert new.param_groups[0]["param_names"] == [name for name, _ in new_model.named_parameters()]
    assert new.param_groups[0]["lr"] == 0.01
    assert_same_by_name(by_name(new), by_name(optimizer))
    assert losses(new_model, new, seed=2) == losses(model, optimizer, seed=2)
    assert_same_by_name(by_name(new), by_name(optimizer))


@pytest.mark.parametrize("named", [True, False])
def test_one_group_from_two_and_two_from_one(load, named):
    def whole(model):
        params = model.named_parameters() if named else model.parameters()
        return adamw(params, weight_decay=0.0)

    def split(model):
        groups = [{"params": g["params"]} for g in decayed(model)]
        return adamw(groups, weight_decay=0.0)

    for make, remake in ((whole, split), (split, whole)) if named else ((split, whole),):
        model, optimizer = trained_net(make)
        new_model, new = resumed(model, remake)
        load(new, fastopt.match(saved_by(optimizer), new, named_parameters=new_model.named_parameters()))
        assert ("param_names" in new.param_groups[0]) is named
        assert_same_by_name(by_name(new, new_model.named_parameters()), by_name(optimizer))
        assert losses(new_model, new, seed=2) == losses(model, optimizer, seed=2)


def test_decay_by_group_is_taken_over_in_another_order(load):
    model, optimizer = trained_net(lambda model: adamw(decayed(model)))
    new_model, new = resumed(model, lambda m: adamw(decayed(m)[::-1], weight_decay=7), ("second", "head", "first"))
    load(new, fastopt.match(saved_by(optimizer), new))
    assert [group["weight_decay"] for group in new.param_groups] == [0.1, 0.0]
    assert_same_by_name(by_name(new), by_name(optimizer))
    assert losses(new_model, new, seed=2) == losses(model, optimizer, seed=2)


def test_layers_added(load):
    _, optimizer = trained_net()
    model = Net(("first", "inserted", "second", "head"))
    new = adamw(model.named_parameters())
    with pytest.raises(ValueError, match=r"not in the state dict: 'inserted\.weight', 'inserted\.bias'$"):
        fastopt.match(saved_by(optimizer), new)
    load(new, fastopt.match(saved_by(optimizer), new, strict=False))
    assert_same_by_name(by_name(new), by_name(optimizer))
    losses(model, new, seed=2)


def test_layers_removed(load):
    _, optimizer = trained_net()
    model = Net(("second", "first"))
    new = adamw(model.named_parameters())
    with pytest.raises(ValueError, match=r"not in the optimizer: 'head\.weight', 'head\.bias'$"):
        fastopt.match(saved_by(optimizer), new)
    load(new, fastopt.match(saved_by(optimizer), new, strict=False))
    left = {name: state for name, state in by_name(optimizer).items() if not name.startswith("head")}
    assert_same_by_name(by_name(new), left)


def test_layers_frozen_when_saved(load):
    torch.manual_seed(0)
    model = Net()
    model.first.requires_grad_(False)
    optimizer = adamw(model.named_parameters())
    losses(model, optimizer, seed=1)
    new_model, new = resumed(model, lambda m: adamw(m.named_parameters()), ("head", "first", "second"))
    new_model.first.requires_grad_(False)
    load(new, fastopt.match(saved_by(optimizer), new))
    assert len(new.state) == 4
    assert_same_by_name(by_name(new), by_name(optimizer))
    assert losses(new_model, new, seed=2) == losses(model, optimizer, seed=2)


def test_layers_frozen_and_left_out_since(load):
    model, optimizer = trained_net()
    new_model, new = resumed(model, lambda m: adamw((n, p) for n, p in m.named_parameters() if "first" not in n))
    load(new, fastopt.match(saved_by(optimizer), new, strict=False))
    model.first.requires_grad_(False)
    new_model.first.requires_grad_(False)
    assert losses(new_model, new, seed=2) == losses(model, optimizer, seed=2)


@pytest.mark.parametrize(
    "rename",
    [
        {f"first.{kind}": f"stem.{kind}" for kind in ("weight", "bias")},
        lambda name: name.replace("first", "stem"),
        [(r"^first\.", "entry."), (re.compile(r"(entry)(\.\w+)$"), r"stem\2")],
    ],
    ids=["dict", "function", "patterns"],
)
def test_renamed(load, rename):
    _, optimizer = trained_net()
    new = adamw(Net(("head", "stem", "second")).named_parameters())
    load(new, fastopt.match(saved_by(optimizer), new, rename=rename))
    expected = {name.replace("first", "stem"): state for name, state in by_name(optimizer).items()}
    assert_same_by_name(by_name(new), expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrapper_s_prefix(load, prefix):
    _, optimizer = trained_net(lambda model: adamw((prefix + n, p) for n, p in model.named_parameters()))
    state_dict = saved_by(optimizer)
    new = adamw(Net().named_parameters())
    load(new, fastopt.match(state_dict, new, rename=[(rf"^{re.escape(prefix)}", "")]))
    assert_same_by_name(by_name(new), {n.removeprefix(prefix): s for n, s in by_name(optimizer).items()})
    fastopt.match(saved_by(new), optimizer, rename=lambda name: prefix + name)


HOOKS = {
    "itself": fastopt.match,
    "with options": functools.partial(fastopt.match, strict=False),
    "called": lambda optimizer, state_dict: fastopt.match(state_dict, optimizer),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("method", ["torch's", "fastopt's", "installed"])
def test_as_a_pre_hook(method, hook):
    model, optimizer = trained_net()
    new_model, new = resumed(model, lambda m: adamw(decayed(m), weight_decay=0.1), ("head", "second", "first"))
    for group in new.param_groups:
        group["weight_decay"] = 7
    new.register_load_state_dict_pre_hook(HOOKS[hook])
    state_dict = saved_by(optimizer)
    before = fingerprint(state_dict)
    if method == "fastopt's":
        assert fastopt.load_state_dict(new, state_dict).missing == []
    elif method == "installed":
        with fastopt.installed():
            new.load_state_dict(state_dict)
    else:
        TORCH_LOAD_STATE_DICT(new, state_dict)
    assert fingerprint(state_dict) == before
    assert_same_by_name(by_name(new), by_name(optimizer))
    assert losses(new_model, new, seed=2) == losses(model, optimizer, seed=2)
    fastopt.load_state_dict(new, new.state_dict())  # its own state fits as it is


# ---- what the result holds ----


def test_an_optimizer_that_did_not_change_gets_what_was_saved():
    _, optimizer = trained_net(lambda model: adamw(decayed(model)))
    state_dict = TORCH_STATE_DICT(optimizer)
    result = fastopt.match(state_dict, optimizer)
    Comparison().same(result, state_dict)
    assert [list(group) for group in result["param_groups"]] == [list(group) for group in state_dict["param_groups"]]


def test_nothing_is_copied_and_nothing_changed():
    _, optimizer = trained_net()
    state_dict = {"version": [1], **saved_by(optimizer), "extra": {"of": "mine"}}
    state_dict["state"]["global"] = {"clip": tensor(1)}
    new = adamw(decayed(Net(("head", "added", "first", "second"))))
    losses_of_new = {param: {"step": torch.tensor(1.0), "exp_avg": torch.rand(2)} for param in params_of(new)}
    new.state.update(losses_of_new)
    before, new_before = fingerprint(state_dict), fingerprint(new)
    result = fastopt.match(state_dict, new, strict=False)
    assert fingerprint(state_dict) == before
    assert fingerprint(new) == new_before
    assert list(result) == ["version", "state", "param_groups", "extra"]
    assert result["extra"] is state_dict["extra"]
    assert result["state"] is not state_dict["state"]
    assert result["state"]["global"] is state_dict["state"]["global"]
    old = dict(zip(state_dict["param_groups"][0]["param_names"], range(6), strict=True))
    for index, (name, param) in enumerate(zip(names_of(new), params_of(new), strict=True)):
        source = state_dict["state"][old[name]] if name in old else new.state[param]
        assert result["state"][index] is source
    assert [group["params"] for group in result["param_groups"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def names_of(optimizer):
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def test_groups_are_those_of_the_optimizer_as_torch_numbers_them():
    optimizer = Bare([{"params": [("c", parameter(2))]}, {"params": [("a", parameter(2))]}], lr=0.1)
    optimizer.param_groups.insert(1, {"params": [], "lr": 0.1})
    result = fastopt.match(moments("a", "b", "c"), optimizer, strict=False)
    expected = [group["params"] for group in TORCH_STATE_DICT(optimizer)["param_groups"]]
    assert [group["params"] for group in result["param_groups"]] == expected == [[0], [], [1]]
    assert [group["lr"] for group in result["param_groups"]] == [0.5, 0.1, 0.5]


def test_a_saved_parameter_without_state_has_none():
    optimizer = bare("a", "b")
    optimizer.state[params_of(optimizer)[0]] = {"m": tensor(2)}
    state_dict = moments("b", "a")
    del state_dict["state"][1]
    result = fastopt.match(state_dict, optimizer)
    assert result["state"] == {1: state_dict["state"][0]}


def test_what_was_not_saved_and_has_no_state_gets_none():
    optimizer = bare("a", "b")
    result = fastopt.match(moments("b"), optimizer, strict=False)
    assert list(result["state"]) == [1]
    assert len(optimizer.state) == 0  # a defaultdict, in which a look-up would leave something


@pytest.mark.parametrize("named", [True, False])
def test_ids_that_are_names(load, named):
    state_dict = moments("b", "a", params=["b", "a"])
    del state_dict["param_groups"][0]["param_names"]
    params = {"a": parameter(2), "b": parameter(2)}
    optimizer = Bare(params.items() if named else params.values(), lr=0.1)
    result = fastopt.match(state_dict, optimizer, named_parameters=None if named else params)
    assert list(result["state"]) == [0, 1]
    assert result["state"][0] is state_dict["state"]["a"]
    assert ("param_names" in result["param_groups"][0]) is named
    load(optimizer, result)


def test_param_names_come_before_ids_and_given_names_before_the_groups():
    optimizer = bare("x", "y")
    given = [("b", params_of(optimizer)[1]), ("other", parameter(2)), ("a", params_of(optimizer)[0])]
    state_dict = moments("a", "b", params=["b", "a"])
    result = fastopt.match(state_dict, optimizer, named_parameters=iter(given))
    assert result["state"][0] is state_dict["state"]["b"]
    assert result["param_groups"][0]["param_names"] == ["x", "y"]


def test_the_order_of_the_keys_is_that_of_the_first_saved_group():
    optimizer = Bare([("a", parameter(2)), ("b", parameter(2))], x=0, y=0, z=0)
    groups = [
        {"z": 1, "params": ["b"], "y": 2, "x": 3},
        {"x": 3, "y": 2, "z": 1, "params": ["a"]},
    ]
    [group] = fastopt.match({"state": {}, "param_groups": groups}, optimizer)["param_groups"]
    assert list(group.items()) == [("z", 1), ("y", 2), ("x", 3), ("param_names", ["a", "b"]), ("params", [0, 1])]


def test_state_of_no_parameter():
    optimizer = bare("b", "a")
    state_dict = moments("a", "b")
    kept = {"global": tensor(1), (0, 1): 5, None: {"m": tensor(2)}}
    state_dict["state"].update({**kept, 7: 1, True: 2} | {9: 3})
    state_dict["param_groups"][0]["params"] = [0, 5]  # what stands under 1 is of no parameter, too
    with pytest.raises(ValueError, match=r"state under ids that stand in no saved group: 1, 7, 9$"):
        fastopt.match(state_dict, optimizer)
    result = fastopt.match(state_dict, optimizer, strict=False)
    assert list(result["state"]) == [1, *kept]
    assert all(result["state"][key] is value for key, value in kept.items())


# ---- hyperparameters ----


def merged(*values, strict=True, present="present"):
    """What becomes of one hyperparameter of saved groups that are one group now."""
    names = [f"p{index}" for index in range(len(values))]
    groups = [{"h": value, "params": [name]} for name, value in zip(names, values, strict=True)]
    optimizer = Bare([(name, parameter(2)) for name in names], h=present)
    [group] = fastopt.match({"state": {}, "param_groups": groups}, optimizer, strict=strict)["param_groups"]
    return group["h"]


class Incomparable:
    def __eq__(self, other):
        raise RuntimeError("no")

    __hash__ = None

    def __repr__(self):
        return "Incomparable()"


def same_values():
    return {
        "numbers": (0.1, 0.1),
        "None": (None, None),
        "tuples": ((0.9, 0.99), (0.9, 0.99)),
        "tensors": (torch.tensor(0.1), torch.tensor(0.1)),
        "larger tensors": (torch.arange(3.0), torch.arange(3.0)),
        "tensors in a tuple": ((torch.arange(3), 1), (torch.arange(3), 1)),
        "arrays in a dict": ({"a": numpy.arange(3)}, {"a": numpy.arange(3)}),
        "three": (1, 1, 1),
        "an object that is not comparable": (it := Incomparable(), it),
    }


def different_values():
    return {
        "numbers": (0.1, 0.2),
        "the last of three": (1, 1, 2),
        "a tensor and a number": (torch.tensor(0.5), 0.5),
        "a number and a tensor": (0.5, torch.tensor(0.5)),
        "tensors": (torch.arange(3.0), torch.arange(3.0) + 1),
        "shapes": (torch.ones(3), torch.ones(1)),
        "tensors on meta": (torch.ones(3, device="meta"), torch.ones(3, device="meta")),
        "lengths": ((1, 2), (1, 2, 3)),
        "a list and a tuple": ([1, 2], (1, 2)),
        "keys": ({"a": 1}, {"b": 1}),
        "arrays": (numpy.arange(3), numpy.arange(3) + 1),
        "a dict and something else": ({}, 0),
        "objects that are not comparable": (Incomparable(), Incomparable()),
    }


@pytest.mark.parametrize("name", same_values())
def test_hyperparameters_that_agree(name):
    values = same_values()[name]
    assert merged(*values) is values[0]


@pytest.mark.parametrize("name", different_values())
def test_hyperparameters_that_disagree(name):
    values = different_values()[name]
    with pytest.raises(ValueError, match="param group 0 would have 'h' = ") as caught:
        merged(*values)
    for index, value in enumerate(values):
        assert f"{value!r} (saved group {index})" in str(caught.value)
    assert merged(*values, strict=False) == "present"


def test_a_hyperparameter_that_only_some_have():
    optimizer = Bare([("a", parameter(2)), ("b", parameter(2))], x=1)
    for present in (True, False):
        groups = [{"x": 2, "params": ["a"]}, {"x": 2, "warm": True, "params": ["b"]}][:: 1 if present else -1]
        state_dict = {"state": {}, "param_groups": groups}
        number = groups.index({"x": 2, "params": ["a"]})
        with pytest.raises(ValueError, match=rf"'warm' = .*none \(saved group {number}\)"):
            fastopt.match(state_dict, optimizer)
        [group] = fastopt.match(state_dict, optimizer, strict=False)["param_groups"]
        assert group == {"x": 2, "param_names": ["a", "b"], "params": [0, 1]}


def test_a_tensor_lr_goes_on(load):
    model, optimizer = trained_net(lambda model: adamw(decayed(model), lr=torch.tensor(0.02), foreach=False))
    optimizer.param_groups[1]["weight_decay"] = 0.0
    new_model, new = resumed(model, lambda m: adamw(m.named_parameters(), lr=torch.tensor(1.0), foreach=False))
    load(new, fastopt.match(saved_by(optimizer), new))
    assert new.param_groups[0]["lr"].item() == torch.tensor(0.02).item()
    assert losses(new_model, new, seed=2) == losses(model, optimizer, seed=2)


def test_a_new_group_keeps_its_hyperparameters():
    groups = [{"params": [("new", parameter(2))], "lr": 7, "own": 1}, {"params": [("a", parameter(2))], "own": 2}]
    optimizer = Bare(groups, lr=0.1)
    result = fastopt.match(moments("a"), optimizer, strict=False)["param_groups"]
    assert result[0] == {"param_names": ["new"], "lr": 7, "own": 1, "params": [0]}
    assert result[1] == {"lr": 0.5, "param_names": ["a"], "params": [1]}


# ---- errors ----


def test_all_problems_are_listed():
    state_dict = moments("a", "gone", "b.old")
    state_dict["state"][12] = {}
    state_dict["param_groups"].append({"lr": 0.25, "param_names": ["c"], "params": [3]})
    optimizer = bare("a", "c", "new 1", "new 2")
    with pytest.raises(ValueError, match="match: the state dict does not fit") as caught:
        fastopt.match(state_dict, optimizer, rename={"b.old": "b", "unused": "u"})
    assert str(caught.value).splitlines()[1:] == [
        "  in the optimizer, but not in the state dict: 'new 1', 'new 2'",
        "  in the state dict, but not in the optimizer: 'gone', 'b' (saved as 'b.old')",
        "  state under ids that stand in no saved group: 12",
        "  param group 0 would have 'lr' = 0.5 (saved group 0) and 0.25 (saved group 1)",
        "  in rename, but not in the state dict: 'unused'",
    ]
    assert fastopt.match(state_dict, optimizer, rename={"unused": "u"}, strict=False)


def test_saved_names_are_needed():
    state_dict = saved_by(torch.optim.SGD([parameter(2)], lr=0.1))
    with pytest.raises(ValueError, match="saved param group 0 has no names, as it was saved by an optimizer"):
        fastopt.match(state_dict, bare("a"))
    state_dict["param_groups"][0]["param_names"] = ["a"]  # as the text says
    fastopt.match(state_dict, bare("a"))


def test_the_optimizers_names_are_needed():
    optimizer = torch.optim.SGD([parameter(2), parameter(3)], lr=0.1)
    with pytest.raises(ValueError, match=r"group 0 of the optimizer has no names; pass named_parameters=model\.named"):
        fastopt.match(moments("a"), optimizer)
    with pytest.raises(ValueError, match=r"no name for the optimizer's parameter 1 of param group 0 \(float32 \[3\]"):
        fastopt.match(moments("a"), optimizer, named_parameters={"a": params_of(optimizer)[0]})


def twice_in_the_optimizer():
    optimizer = bare("a", "b")
    optimizer.param_groups[0]["params"][1] = optimizer.param_groups[0]["params"][0]
    return optimizer


def with_names(optimizer, *names):
    optimizer.param_groups[0]["param_names"] = list(names)
    return optimizer


def test_what_stands_twice_or_not_in_parallel_is_an_error():
    one, two = parameter(2), parameter(2)
    unnamed = Bare([one, two], lr=0.5)
    for state_dict, optimizer, options, text in (
        (moments("a", "a"), bare("a"), {}, "the name 'a' stands twice in the saved groups"),
        (
            moments("a", "b", params=[3, 3]),
            bare("a"),
            {},
            "one parameter stands twice in the saved groups: as 'a' and 'b'",
        ),
        (moments("a"), with_names(bare("a", "b"), "a", "a"), {}, "the name 'a' stands twice in the optimizer"),
        (moments("a"), twice_in_the_optimizer(), {}, "one parameter stands twice in the optimizer: as 'a' and 'b'"),
        (
            moments("a"),
            unnamed,
            {"named_parameters": [("a", one), ("a", two)]},
            "the name 'a' stands twice in named_parameters",
        ),
        (
            moments("a"),
            unnamed,
            {"named_parameters": [("a", one), ("b", two), ("c", one)]},
            "one parameter stands twice in named_parameters: as 'a' and 'c'",
        ),
        (moments("a", params=[0, 1]), bare("a"), {}, "saved param group 0 has 2 params, but 1 param_names"),
        (moments("a"), with_names(bare("a"), "a", "b"), {}, "group 0 of the optimizer has 1 params, but 2 param_names"),
        (moments("a", "b"), bare("a"), {"rename": {"a": "b"}}, "rename makes 'b' of both 'a' and 'b'"),
        (moments("a"), bare("a"), {"by": "shape"}, "by='shape'; parameters are matched by 'name'"),
    ):
        before = fingerprint(state_dict), fingerprint(optimizer)
        for strict in (True, False):
            with pytest.raises(ValueError, match=re.escape(text)):
                fastopt.match(state_dict, optimizer, strict=strict, **options)
        assert (fingerprint(state_dict), fingerprint(optimizer)) == before


@pytest.mark.parametrize("rename", ["^module.", (r"^module\.", ""), 3, ["a", "b"]])
def test_patterns_that_are_no_pairs_are_refused(rename):
    with pytest.raises(TypeError, match="is no sequence of pairs"):
        fastopt.match(moments("a"), bare("a"), rename=rename)


@pytest.mark.parametrize(
    ("rename", "text"),
    [
        ([("a", "b", "c")], r"\('a', 'b', 'c'\) in rename is no pair \(regular expression, replacement\)"),
        ([3], "3 in rename is no pair"),
        (lambda name: None, "rename makes None of 'a', which is no str"),
        ({"a": 3}, "rename makes 3 of 'a', which is no str"),
    ],
)
def test_renames_of_other_kinds_are_named(rename, text):
    with pytest.raises(TypeError, match=text):
        fastopt.match(moments("a"), bare("a"), rename=rename)


@pytest.mark.parametrize(
    ("rename", "error", "note"),
    [
        ([("x", "y"), ("(", "b")], re.error, "match: in the pair ('(', 'b') of rename"),
        ([("a", r"\1")], re.error, r"match: in the pair ('a', '\\1') of rename"),
        ([(3, "b")], TypeError, "match: in the pair (3, 'b') of rename"),
        (lambda name: 1 / 0, ZeroDivisionError, "match: while renaming 'a'"),
    ],
)
def test_what_fails_in_a_rename_is_named(rename, error, note):
    with pytest.raises(error) as caught:
        fastopt.match(moments("a"), bare("a"), rename=rename)
    assert note in caught.value.__notes__


def test_named_parameters_of_other_kinds_are_named():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state_dict = saved_by(torch.optim.SGD(Net().named_parameters(), lr=0.1))
    for wrong, kind in (
        (model, "is a Net"),
        (torch.nn.Sequential(model), "is a Sequential"),
        (3, "is a int"),
        (model.parameters(), "holds a Parameter that is no pair"),
        (list(model.parameters()), "holds a Parameter that is no pair"),
        ([name for name, _ in model.named_parameters()], "holds a str that is no pair"),
    ):
        with pytest.raises(TypeError, match=rf"named_parameters {kind}.*pass model\.named_parameters\(\)"):
            fastopt.match(state_dict, optimizer, named_parameters=wrong)
    fastopt.match(state_dict, optimizer, named_parameters=model.named_parameters())


def test_other_arguments_of_other_kinds_are_named():
    with pytest.raises(TypeError, match="strict: 'no' is a str, not a bool"):
        fastopt.match(moments("a"), bare("a"), strict="no")
    with pytest.raises(TypeError, match="match: 'state' is a list, not a dict"):
        fastopt.match({**moments("a"), "state": [{}]}, bare("a"))


# ---- shapes ----


def linear(*shape):
    return torch.nn.Linear(*shape, bias=False)


def test_state_of_another_shape_is_a_problem_and_stays_out_without_strict():
    old = trained(
        adamw(torch.nn.ModuleDict({"a": linear(4, 4), "b": linear(4, 3), "gone": linear(2, 2)}).named_parameters())
    )
    grown = torch.nn.ModuleDict({"b": linear(4, 3), "a": linear(4, 5), "new": linear(1, 1)})
    state_dict = saved_by(old)
    with pytest.raises(ValueError, match="does not fit") as caught:
        fastopt.match(state_dict, adamw(grown.named_parameters()))
    assert str(caught.value).splitlines()[1:] == [
        "  in the optimizer, but not in the state dict: 'new.weight'",
        "  in the state dict, but not in the optimizer: 'gone.weight'",
        "  shaped unlike their parameter 'a.weight' [5, 4]: exp_avg [4, 4], exp_avg_sq [4, 4]",
    ]
    for is_trained in (False, True):
        new = adamw(grown.named_parameters())
        if is_trained:
            train(new)
        report = fastopt.MatchReport()
        result = fastopt.match(state_dict, new, strict=False, report=report)
        assert fastopt.check(new, result) == []
        _, a, _ = params_of(new)
        assert result["state"][0] is state_dict["state"][1]
        assert result["state"].get(1) is (new.state[a] if is_trained else None)
        assert (report.missing, report.unexpected, report.misshapen, report.others) == (
            ["new.weight"],
            ["gone.weight"],
            ["a.weight"],
            [],
        )
        assert str(report).splitlines() == [
            "not saved, present state kept: 'new.weight'",
            "not in the optimizer, dropped: 'gone.weight'",
            "saved in another shape, present state kept: 'a.weight'",
        ]
        fastopt.load_state_dict(new, result)
        train(new)


def test_factored_state_passes_by_name():
    old = trained(torch.optim.Adafactor(torch.nn.ModuleDict({"a": linear(4, 6), "b": linear(3, 5)}).named_parameters()))
    new = torch.optim.Adafactor(torch.nn.ModuleDict({"b": linear(3, 5), "a": linear(4, 6)}).named_parameters())
    report = fastopt.MatchReport(missing=["of before"])
    fastopt.match(saved_by(old), new, report=report)
    assert report == fastopt.MatchReport()
    assert str(report) == "everything fits"


def test_the_report_has_all_that_the_error_has():
    state_dict = moments("a", "gone", "b.old")
    state_dict["state"][12] = {}
    report = fastopt.MatchReport()
    with pytest.raises(ValueError, match="gone"):
        fastopt.match(state_dict, bare("a", "c"), rename={"b.old": "b", "unused": "u"}, report=report)
    assert (report.missing, report.unexpected) == (["c"], ["gone", "b.old"])
    assert report.others == [
        "state under ids that stand in no saved group: 12",
        "in rename, but not in the state dict: 'unused'",
    ]
    many = fastopt.MatchReport(missing=[f"p{index}" for index in range(1000)])
    assert str(many) == "not saved, present state kept: 'p0', 'p1', 'p2', 'p3', 'p4' and 995 more"


@pytest.mark.parametrize("key", ["state", "param_groups", "params"])
def test_what_is_no_state_dict_is_a_key_error(key):
    state_dict = moments("a")
    del (state_dict["param_groups"][0] if key == "params" else state_dict)[key]
    with pytest.raises(KeyError, match=key):
        fastopt.match(state_dict, bare("a"))


def test_arguments_of_other_kinds_are_named():
    with pytest.raises(AttributeError) as caught:
        fastopt.match(moments("a"), Net())
    assert caught.value.__notes__ == ["optimizer is a Net, not a torch.optim.Optimizer"]
    with pytest.raises(TypeError) as caught:
        fastopt.match("optimizer.pt", bare("a"))
    assert "torch.load" in caught.value.__notes__[0]


# ---- many ----


def cut(names, places):
    """Named parameters in groups that end at these places; torch takes no empty group beside named ones."""
    ends = sorted({place % len(names) for place in places} - {0})
    return [names[a:b] for a, b in zip([0, *ends], [*ends, len(names)], strict=True)]


def grouped(names, places, lr):
    return Bare([{"params": [(name, parameter(2)) for name in group]} for group in cut(names, places)], lr=lr)


NAMES = [f"p{index}" for index in range(12)]


@given(
    order=st.permutations(NAMES),
    saved_places=st.lists(st.integers(0, 20), max_size=4),
    places=st.lists(st.integers(0, 20), max_size=4),
    kept=st.sets(st.sampled_from(NAMES), min_size=1),
    stepped=st.sets(st.sampled_from(NAMES)),
)
def test_any_order_and_any_groups(order, saved_places, places, kept, stepped):
    first = grouped(NAMES, saved_places, lr=1)
    for seed, (name, param) in enumerate(zip(NAMES, params_of(first), strict=True)):
        if name in stepped:
            first.state[param] = {"m": tensor(2, seed=seed)}
    state_dict = saved_by(first)
    left = [name for name in order if name in kept]
    second = grouped(left, places, lr=2)
    result = fastopt.match(state_dict, second, strict=len(kept) == len(NAMES))
    for index, name in enumerate(left):
        assert result["state"].get(index) is state_dict["state"].get(NAMES.index(name))
    for load in LOADS.values():
        load(second, result)
        assert_same_by_name(by_name(second), {name: s for name, s in by_name(first).items() if name in kept})
        assert {group["lr"] for group in second.param_groups} == {1}


def test_time_is_linear():
    names = [f"layers.{index}.weight" for index in range(100_000)]
    params = [torch.nn.Parameter(torch.empty(0)) for _ in names]
    shuffled = random.Random(0).sample(range(len(names)), len(names))
    optimizer = Bare([{"params": [(names[i], params[i]) for i in shuffled]}], lr=0.5)
    state_dict = {
        "state": {i: {"m": None} for i in range(len(names))},
        "param_groups": [{"lr": 0.5, "param_names": ["module." + n for n in names], "params": list(range(len(names)))}],
    }
    started = time.perf_counter()
    result = fastopt.match(state_dict, optimizer, rename=[(r"^module\.", "")])
    assert time.perf_counter() - started < 5
    assert all(result["state"][index] is state_dict["state"][i] for index, i in enumerate(shuffled))
