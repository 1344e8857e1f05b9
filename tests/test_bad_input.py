"""Input that cannot be loaded: torch's own error, and the optimizer exactly as it was."""

import copy as copying
import gc
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastopt
from tests.oracle import (
    TORCH_STATE_DICT,
    Bare,
    Comparison,
    adam,
    assert_same_error,
    fingerprint,
    outcome,
    parameter,
    torch_load,
    trained,
)

pytestmark = pytest.mark.usefixtures("backend")


def saved():
    return trained(adam(), seed=1).state_dict()


def load_both(make_optimizer, state_dict, copy, *, text=True):
    """fastopt's error, which is torch's; neither changed the optimizer."""
    errors = []
    for load in (fastopt.load_state_dict, torch_load):
        optimizer = make_optimizer()
        before = fingerprint(optimizer)
        _, error = outcome(lambda load=load, o=optimizer: load(o, state_dict, copy=copy))
        assert error is not None
        assert fingerprint(optimizer) == before
        errors.append(error)
    assert_same_error(*errors, text=text)
    return errors[0]


def change(**changes):
    """A good state dict with entries replaced; None removes one."""

    def make():
        state_dict = saved()
        for key, value in changes.items():
            if value is None:
                del state_dict[key]
            else:
                state_dict[key] = value(state_dict[key])
        return state_dict

    return make


def change_group(**changes):
    def changed(groups):
        groups[0] = {key: value for key, value in (groups[0] | changes).items() if value is not None}
        return groups

    return change(param_groups=changed)


def broken_last(value):
    """Good values first, so that what was done before the error shows."""

    def changed(state):
        state[2] = {"good": torch.ones(3, dtype=torch.float64), **state[2], "broken": value}
        return state

    return change(state=changed)


class Hashless:
    __hash__ = None


BAD = {
    "too few groups": change(param_groups=lambda groups: groups[:-1]),
    "too many groups": change(param_groups=lambda groups: [*groups, {"params": []}]),
    "no groups": change(param_groups=lambda groups: []),
    "too few parameters": change_group(params=[0]),
    "too many parameters": change_group(params=[0, 1, 5]),
    "no parameters": change_group(params=[]),
    "missing param_groups": change(param_groups=None),
    "missing state": change(state=None),
    "missing params": change_group(params=None),
    "groups that are None": change(param_groups=lambda groups: [None, None]),
    "groups without a length": change(param_groups=lambda groups: 3),
    "groups that are a dict": change(param_groups=lambda groups: dict(enumerate(groups))),
    "params without a length": change_group(params=3),
    "params that are a set": change_group(params={0, 1, 2}),
    "state that is a list": change(state=lambda state: list(state.values())),
    "state that is a tensor": change(state=lambda state: torch.ones(2)),
    "state that is a str": change(state=lambda state: "state"),
    "state that is a number": change(state=lambda state: 1),
    "unhashable ids": change_group(params=[[0], [1]]),
    "ids without a hash": change_group(params=[Hashless(), 1]),
    "saved state on meta": broken_last(torch.empty(2, 2, device="meta")),
    "saved state on meta in a list": broken_last([torch.empty(2, 2, device="meta")]),
    "an iterator": broken_last(iter([1])),
    "a list": lambda: [1, 2],
    "None": lambda: None,
    "a number": lambda: 1,
    "an empty dict": dict,
    "a str": lambda: "state dict",
}


# A text of Python's own that holds an address.
WORDED_OTHERWISE = {"an iterator"}


@pytest.mark.parametrize("name", BAD)
def test_torchs_error_and_an_untouched_optimizer(name, copy):
    error = load_both(lambda: trained(adam()), BAD[name](), copy, text=name not in WORDED_OTHERWISE)
    assert not isinstance(error, AssertionError | SystemError)


def test_group_size_error_names_the_group(copy):
    error = load_both(lambda: trained(adam()), change_group(params=[0])(), copy)
    assert error.__notes__ == ["parameters of group 0: 1 saved, 2 in the optimizer"]


def test_group_number_error_names_both_numbers(copy):
    error = load_both(lambda: trained(adam()), BAD["too few groups"](), copy)
    assert error.__notes__ == ["param groups: 1 saved, 2 in the optimizer"]


FILE_FIRST = "load the file first, e.g. torch.load(path, weights_only=True)"


@pytest.mark.parametrize(
    ("state_dict", "note"),
    [
        ("ck.pt", f"state_dict is a str, not a dict; {FILE_FIRST}"),
        (pathlib.PurePosixPath("ck.pt"), f"state_dict is a PurePosixPath, not a dict; {FILE_FIRST}"),
        (None, "state_dict is None, not a dict"),
        ([1, 2], "state_dict is a list, not a dict"),
    ],
    ids=str,
)
def test_what_is_no_state_dict_is_named(state_dict, note, copy):
    error = load_both(lambda: trained(adam()), state_dict, copy)
    assert error.__notes__ == [note]


def without(key):
    def changed(state):
        del state[1][key]
        return state

    return changed


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (lambda state: state | {1: None}, "is None, not a dict"),
        (lambda state: state | {1: torch.ones(2)}, "is float32 [2] on cpu, not a dict"),
        (lambda state: state | {1: 3}, "is an int, not a dict"),
        (without("step"), "has no 'step'"),
    ],
)
@pytest.mark.parametrize("inplace", [False, "auto"])
def test_an_entry_that_the_optimizer_itself_refuses_names_its_parameter(changed, found, inplace):
    def make():
        return torch.optim.AdamW([("a", parameter(3, 4)), ("b", parameter(2))])

    state_dict = change(state=changed)()
    state_dict["param_groups"] = TORCH_STATE_DICT(make())["param_groups"]
    actual, expected = make(), make()
    before = fingerprint(actual)
    _, error = outcome(lambda: fastopt.load_state_dict(actual, state_dict, inplace=inplace))
    _, torchs = outcome(lambda: torch_load(expected, state_dict, copy=True))
    assert_same_error(error, torchs)
    assert f"the state of parameter 1 'b' (float32 [2] on cpu), saved under id 1, {found}" in error.__notes__
    assert fingerprint(actual) == before


@pytest.mark.parametrize(
    ("state_dict", "note"),
    [
        ({}, "the dict is empty, as one is that was given away to a load (donate=True)"),
        ({"state": {}}, "the dict holds 'state'"),
        (
            {"model": {}, "optimizer": saved(), "epoch": 3},
            "the dict holds 'model', 'optimizer', 'epoch'; an optimizer's state dict is at 'optimizer'",
        ),
        (dict.fromkeys(range(9)), "the dict holds 0, 1, 2, 3, 4, 5, 6, 7 and more"),
    ],
    ids=["given away", "no groups", "a whole checkpoint", "many keys"],
)
def test_a_dict_that_is_no_state_dict_says_what_it_is(state_dict, note, copy):
    error = load_both(lambda: trained(adam()), state_dict, copy)
    assert error.__notes__ == [note]
    for call in (
        lambda: fastopt.summary(state_dict),
        lambda: fastopt.diff(adam(), state_dict),
        lambda: fastopt.diff(state_dict, adam()),
        lambda: fastopt.match(state_dict, adam()),
    ):
        with pytest.raises(KeyError) as caught:
            call()
        assert caught.value.__notes__ == [note]


@pytest.mark.parametrize("call", [fastopt.summary, lambda path: fastopt.diff(path, adam())])
def test_a_file_name_is_no_state(call):
    with pytest.raises(TypeError, match=r"'ck\.pt' is a str, neither an optimizer nor a state dict; `fastopt inspect`"):
        call("ck.pt")


def test_swapped_arguments_are_named(copy):
    optimizer = trained(adam())
    before = fingerprint(optimizer)
    _, ours = outcome(lambda: fastopt.load_state_dict(saved(), optimizer, copy=copy))
    _, torchs = outcome(lambda: torch_load(saved(), optimizer, copy=copy))
    assert_same_error(ours, torchs)
    assert ours.__notes__ == [
        "optimizer is a dict, not a torch.optim.Optimizer",
        "state_dict is an Adam, not a dict",
    ]
    assert fingerprint(optimizer) == before


def test_a_model_in_place_of_its_optimizer_is_named(copy):
    _, error = outcome(lambda: fastopt.load_state_dict(torch.nn.Linear(2, 2), saved(), copy=copy))
    assert error.__notes__ == ["optimizer is a Linear, not a torch.optim.Optimizer"]


@pytest.mark.parametrize(
    "call",
    [
        fastopt.state_dict,
        fastopt.to_device,
        lambda optimizer: fastopt.cast_state(optimizer, "reference"),
        fastopt.snapshot,
        lambda optimizer: fastopt.save(optimizer, "never.pt"),
    ],
    ids=["state_dict", "to_device", "cast_state", "snapshot", "save"],
)
def test_what_is_no_optimizer_is_named_everywhere(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong, kind in ((torch.nn.Linear(2, 2), "a Linear"), (saved(), "a dict"), (None, "None")):
        with pytest.raises(AttributeError) as caught:
            call(wrong)
        assert caught.value.__notes__ == [f"optimizer is {kind}, not a torch.optim.Optimizer"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "kind"), [("no", "a str"), (1, "an int"), (None, "None")])
def test_an_option_that_is_no_bool_is_refused_and_nothing_changes(value, kind):
    optimizer, state_dict = trained(adam()), saved()
    before = fingerprint(optimizer), fingerprint(state_dict)
    method = torch.optim.Optimizer.load_state_dict
    for option, call in (
        ("copy", lambda: fastopt.load_state_dict(optimizer, state_dict, copy=value)),
        ("donate", lambda: fastopt.load_state_dict(optimizer, state_dict, donate=value)),
        ("audit", lambda: fastopt.load_state_dict(optimizer, state_dict, audit=value)),
        ("strict", lambda: fastopt.match(state_dict, optimizer, strict=value)),
        ("shapes", lambda: fastopt.check(optimizer, state_dict, shapes=value)),
        ("finite", lambda: fastopt.check(optimizer, state_dict, finite=value)),
        ("values", lambda: fastopt.summary(optimizer, values=value)),
        ("audit", lambda: fastopt.cast_state(optimizer, "reference", audit=value)),
        ("audit", lambda: fastopt.snapshot(optimizer, audit=value)),
        ("copy", lambda: fastopt.install(copy=value)),
        ("copy", lambda: fastopt.installed(copy=value).__enter__()),
        ("copy", lambda: fastopt.to([torch.ones(2)], copy=value)),
        ("non_blocking", lambda: fastopt.copy_([torch.ones(2)], [torch.ones(2)], non_blocking=value)),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == f"{option}: {value!r} is {kind}, not a bool"
    assert (fingerprint(optimizer), fingerprint(state_dict)) == before
    assert torch.optim.Optimizer.load_state_dict is method


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("state that is a list", "'state' is a list, not a dict"),
        ("state that is a tensor", "'state' is a Tensor, not a dict"),
        ("groups that are a dict", "'param_groups' is a dict, not a list"),
    ],
)
def test_state_and_groups_of_other_kinds_are_named(name, note, copy):
    assert note in load_both(lambda: trained(adam()), BAD[name](), copy).__notes__


@pytest.mark.parametrize("call", [fastopt.summary, lambda model: fastopt.diff(model, adam())])
def test_a_model_is_no_state(call):
    with pytest.raises(TypeError) as caught:
        call(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert str(caught.value) == "state is a Sequential, neither an optimizer nor a state dict"


def test_an_error_with_right_arguments_gets_no_note_about_them(copy):
    error = load_both(lambda: trained(adam()), BAD["missing state"](), copy)
    assert error.__notes__ == ["the dict holds 'param_groups'"]


@pytest.mark.parametrize("ids", [["a", "b", "c"], [(1,), None, 2.5]])
def test_ids_of_another_type_are_no_error(ids, copy):
    state_dict = saved()
    state_dict["state"] = dict(zip(ids, state_dict["state"].values(), strict=True))
    for group, part in zip(state_dict["param_groups"], (ids[:-1], ids[-1:]), strict=True):
        group["params"] = part
    actual, expected = adam(), adam()
    fastopt.load_state_dict(actual, state_dict, copy=copy)
    torch_load(expected, state_dict, copy=copy)
    Comparison().optimizers(actual, expected)


def test_params_on_meta_are_no_error(copy):
    def make_optimizer():
        return Bare([torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(3)])

    state_dict = saved() | {"param_groups": [{"params": [0, 1, 2]}]}
    actual, expected = make_optimizer(), make_optimizer()
    fastopt.load_state_dict(actual, state_dict, copy=copy)
    torch_load(expected, state_dict, copy=copy)
    Comparison().optimizers(actual, expected)


def one_value(value):
    return {
        "state": {0: {"good": torch.ones(3, dtype=torch.float64), "broken": value}},
        "param_groups": [{"params": [0]}],
    }


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint32])
def test_quantized_tensors(dtype, copy):
    param = parameter(3)
    value = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, dtype)
    load_both(lambda: Bare([param]), one_value(value), copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that is not there")
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
def test_parameter_on_a_device_that_is_not_there(value_dtype, copy):
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.empty(3, device="cuda", dtype=torch.bfloat16))
    load_both(lambda: Bare([param]), one_value(torch.ones(3, dtype=value_dtype)), copy)


def test_reference_cycles(copy):
    for cycle in ({}, []):
        if isinstance(cycle, dict):
            cycle["self"] = cycle
        else:
            cycle.append(cycle)
        for value in (cycle, {"inner": cycle}, [cycle]):
            param = parameter(3)
            error = load_both(lambda p=param: Bare([p]), one_value(value), copy, text=False)
            assert isinstance(error, RecursionError)


CYCLE_OF_TWO_WAYS = """
    import torch, fastopt
    fastopt.backends.use({backend!r})
    cycle = {{}}
    cycle["left"] = cycle["right"] = cycle
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    state_dict = optimizer.state_dict() | {{"state": {{0: cycle}}}}
    try:
        fastopt.load_state_dict(optimizer, state_dict, copy={copy})
    except RecursionError:
        print("raised")
"""


def test_cycle_with_two_ways_ends(backend, copy):
    """As torch goes only one way before it gives up, the number of ways must not matter."""
    script = textwrap.dedent(CYCLE_OF_TWO_WAYS.format(backend=backend, copy=copy))
    root = pathlib.Path(fastopt.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, cwd=root, check=True
    )
    assert done.stdout.strip() == "raised"


def test_optimizer_without_groups(copy):
    def make_optimizer():
        optimizer = trained(adam())
        del optimizer.param_groups
        return optimizer

    _, ours = outcome(lambda: fastopt.load_state_dict(make_optimizer(), saved(), copy=copy))
    _, torchs = outcome(lambda: torch_load(make_optimizer(), saved(), copy=copy))
    assert isinstance(torchs, AttributeError)
    assert_same_error(ours, torchs)
    _, ours = outcome(lambda: fastopt.state_dict(make_optimizer()))
    _, torchs = outcome(lambda: torch.optim.Optimizer.state_dict(make_optimizer()))
    assert_same_error(ours, torchs)


def test_object_that_is_no_optimizer(copy):
    _, ours = outcome(lambda: fastopt.load_state_dict(object(), saved(), copy=copy))
    assert isinstance(ours, AttributeError)
    assert ours.__notes__ == ["optimizer is an object, not a torch.optim.Optimizer"]


def test_groups_that_changed_size_since_the_optimizer_was_built(copy):
    def make_optimizer():
        optimizer = trained(adam())
        optimizer.param_groups[0]["params"].pop()
        return optimizer

    load_both(make_optimizer, saved(), copy)


def test_error_in_a_hook(copy):
    def make_optimizer():
        optimizer = trained(adam())
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, given: given["none"])
        return optimizer

    load_both(make_optimizer, saved(), copy)


class Uncopyable:
    def __deepcopy__(self, memo):
        raise ZeroDivisionError("not to be copied")


@pytest.mark.parametrize("place", ["state", "unknown", "groups"])
def test_values_that_cannot_be_copied(place):
    state_dict = saved()
    if place == "groups":
        state_dict["param_groups"][0]["extra"] = Uncopyable()
    else:
        state_dict["state"][2 if place == "state" else "unknown"] = {"broken": Uncopyable()}
    error = load_both(lambda: trained(adam()), state_dict, copy=True)
    assert isinstance(error, ZeroDivisionError)


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="needs /proc")
def test_failing_loads_leak_nothing(copy):
    params = [parameter(1 << 14, dtype=torch.bfloat16) for _ in range(8)]
    state = {i: {"exp_avg": torch.ones(1 << 14), "list": [torch.ones(1 << 10)]} for i in range(len(params))}
    state[len(params) - 1]["broken"] = torch.empty(3, device="meta")
    optimizer = Bare(params)
    state_dict = {"state": state, "param_groups": [{"params": list(range(len(params)))}]}

    def fail(times):
        for _ in range(times):
            with pytest.raises(NotImplementedError):
                fastopt.load_state_dict(optimizer, state_dict, copy=copy)

    fail(20)
    tensors, resident = live_tensors(), resident_bytes()
    times = 1000
    fail(times)
    one_load = sum(param.nbytes for param in params)
    assert live_tensors() == tensors
    assert resident_bytes() - resident < times * one_load / 10


def test_optimizer_can_be_used_after_an_error(copy):
    optimizer = trained(adam())
    twin = copying.deepcopy(optimizer)
    outcome(lambda: fastopt.load_state_dict(optimizer, BAD["saved state on meta"](), copy=copy))
    trained(optimizer, seed=4)
    trained(twin, seed=4)
    Comparison().optimizers(optimizer, twin)
    state_dict = saved()
    fastopt.load_state_dict(optimizer, state_dict, copy=copy)
    torch_load(twin, state_dict, copy=True)
    Comparison().optimizers(optimizer, twin)
