"""Every optimizer of the installed torch: save, load into another one, go on training; as with torch itself."""

import copy as copying
import functools
import inspect
import warnings

import pytest
import torch

import fastopt
from tests.oracle import (
    TORCH_STATE_DICT,
    Comparison,
    assert_same_error,
    assert_same_load,
    fingerprint,
    outcome,
    parameter,
    torch_load,
    train,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
CLASSES = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
OPTIONS = {
    "SGD": [{"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "fused": True}],
    "Adam": [{"amsgrad": True}, {"lr": torch.tensor(0.01)}],
    "AdamW": [{"amsgrad": True, "weight_decay": 0.1}],
    "Adagrad": [{"initial_accumulator_value": 0.5}],
    "RMSprop": [{"momentum": 0.9, "centered": True}],
    "LBFGS": [{"line_search_fn": "strong_wolfe", "history_size": 3}],
    "NAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
}
SWITCHES = ("foreach", "fused", "capturable")


def variants():
    """Each optimizer plain, with the options above, and with each of the switches that it has."""
    for name, kind in CLASSES.items():
        known = inspect.signature(kind).parameters
        yield name, {}
        yield from ((name, options) for options in OPTIONS.get(name, ()))
        yield from ((name, {switch: True}) for switch in SWITCHES if switch in known)


def params_for(name, dtype, seed):
    shapes = [(4, 3), (2, 5), (3, 3)] if name == "Muon" else [(4, 3), (5,), (), (2, 3, 2)]
    params = [parameter(*shape, dtype=dtype) for shape in shapes]
    with torch.no_grad():
        for param in params:
            param.mul_(0.1 * (1 + seed))
    return params


def build(name, options, dtype, *, seed=0, named=False):
    """The optimizer with two groups, where it takes more than one."""
    members = params_for(name, dtype, seed)
    if named:
        members = [(f"block.{index}.weight", param) for index, param in enumerate(members)]
    groups = [{"params": members}]
    if name != "LBFGS":
        groups = [{"params": members[:-1]}, {"params": members[-1:], "lr": 0.05}]
    return CLASSES[name](groups, **copying.deepcopy(options))


def grad_for(name):
    return torch.Tensor.to_sparse if name == "SparseAdam" else torch.clone


def quietly_train(optimizer, name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(optimizer, grad=grad_for(name), **options)


@functools.cache
def supported():
    """(optimizer, options, dtype) for all that this torch can step with on the CPU."""
    found = []
    for name, options in variants():
        for dtype in DTYPES:
            _, error = outcome(lambda name=name, o=options, d=dtype: quietly_train(build(name, o, d), name, steps=1))
            if error is None:
                found.append((name, options, dtype))
    return found


def label(value):
    if isinstance(value, dict):
        return "+".join(value) or "plain"
    return str(value).removeprefix("torch.")


EVERY = pytest.mark.parametrize(("name", "options", "dtype"), supported(), ids=label)
COPY = pytest.mark.parametrize("copy", [True, False], ids=["copied", "shared"])


def test_every_optimizer_is_among_the_cases():
    assert {name for name, options, dtype in supported() if dtype is torch.float32 and not options} == set(CLASSES)


def saved(name, options, dtype, **built):
    optimizer = build(name, options, dtype, **built)
    quietly_train(optimizer, name, skip=(1,))
    return fastopt.state_dict(optimizer)


def load_twins(name, options, dtype, state_dict, *, copy, **built):
    """What fastopt and torch load from a copy each of the same dict, compared; for torch to go on with."""
    given, given_to_torch = copying.deepcopy(state_dict), copying.deepcopy(state_dict)
    actual, expected = (build(name, options, dtype, seed=1, **built) for _ in range(2))
    lists = [group["params"] for group in actual.param_groups]
    before = fingerprint(given)
    report = fastopt.load_state_dict(actual, given, copy=copy)
    assert fingerprint(given) == before
    torch_load(expected, given_to_torch, copy=copy)
    assert_same_load(actual, expected, given=given, given_to_torch=given_to_torch, copy=copy)
    assert all(group["params"] is listed for group, listed in zip(actual.param_groups, lists, strict=True))
    return actual, expected, report


@EVERY
@COPY
def test_save_load_and_go_on(backend, name, options, dtype, copy):
    optimizer = build(name, options, dtype)
    quietly_train(optimizer, name, skip=(1,))
    comparison = Comparison()
    comparison.optimizers(optimizer, optimizer)
    state_dict = fastopt.state_dict(optimizer)
    comparison.same(state_dict, TORCH_STATE_DICT(optimizer))

    actual, expected, _ = load_twins(name, options, dtype, state_dict, copy=copy)
    for skip in ((), (0,)):
        # A fused SGD of torch 2.13 refuses a list of which only some have momentum: then so after both loads.
        _, ours = outcome(lambda skip=skip: quietly_train(actual, name, steps=1, seed=3, skip=skip))
        _, torchs = outcome(lambda skip=skip: quietly_train(expected, name, steps=1, seed=3, skip=skip))
        assert_same_error(ours, torchs)
        Comparison().optimizers(actual, expected)


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n, options, d in supported() if not options], ids=label)
@COPY
def test_load_into_another_dtype(backend, name, dtype, copy):
    if dtype is torch.complex64:
        others = (torch.complex128,)
    else:
        others = [other for other in DTYPES if other.is_floating_point and other is not dtype]
    state_dict = saved(name, {}, dtype)
    for other in others:
        load_twins(name, {}, other, state_dict, copy=copy)


@pytest.mark.parametrize("name", CLASSES)
@COPY
def test_named_parameters(backend, name, copy):
    state_dict = saved(name, {}, torch.float32, named=True)
    assert "param_names" in state_dict["param_groups"][0]
    for named in (True, False):
        load_twins(name, {}, torch.float32, state_dict, copy=copy, named=named)
    load_twins(name, {}, torch.float32, saved(name, {}, torch.float32), copy=copy, named=True)


def has(name, option):
    return option in inspect.signature(CLASSES[name]).parameters


@pytest.mark.parametrize(
    ("name", "flag"), [(name, flag) for flag in ("capturable", "fused") for name in CLASSES if has(name, flag)]
)
@COPY
def test_step_of_a_capturable_or_fused_group(backend, name, flag, copy):
    state_dict = saved(name, {}, torch.float32)
    for group in state_dict["param_groups"]:
        group[flag] = True
    for state in state_dict["state"].values():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float64)
    load_twins(name, {}, torch.bfloat16, state_dict, copy=copy)


@pytest.mark.parametrize("name", CLASSES)
@COPY
def test_parameters_without_state_are_reported(backend, name, copy):
    _, expected, report = load_twins(name, {}, torch.float32, saved(name, {}, torch.float32), copy=copy)
    params = [param for group in expected.param_groups for param in group["params"]]
    assert report.missing == [index for index, param in enumerate(params) if param not in expected.state]


@pytest.mark.parametrize("name", [name for name in CLASSES if has(name, "lr") and name not in ("LBFGS", "Muon")])
@COPY
def test_tensor_lr(backend, name, copy):
    optimizer = build(name, {}, torch.float32)
    quietly_train(optimizer, name)
    state_dict = fastopt.state_dict(optimizer)
    for group in state_dict["param_groups"]:
        group["lr"] = torch.tensor(0.01)
    actual, _, _ = load_twins(name, {}, torch.float32, state_dict, copy=copy)
    assert all(isinstance(group["lr"], torch.Tensor) for group in actual.param_groups)
