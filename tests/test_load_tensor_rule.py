"""The tensor rule of `load_state_dict()`: dtypes, steps, policies; torch's own method on a twin is the oracle."""

import itertools

import pytest
import torch
from torch.optim import Optimizer

import fastopt
from tests.loads import FLOATING, load_both, saved, tensor
from tests.oracle import TORCH_STATE_DICT, Bare, adam, leaves, parameter, torch_load, trained

pytestmark = pytest.mark.usefixtures("backend")

SAVED = (
    *FLOATING,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.complex32,
)


# 7. The tensor rule.


@pytest.mark.parametrize("key", ["step", "value", 0, None])
@pytest.mark.parametrize("param_dtype", [*FLOATING, torch.float8_e4m3fn, torch.complex64, torch.int32, torch.bool])
def test_every_saved_dtype(param_dtype, key, copy):
    params = [parameter(2, dtype=param_dtype) for _ in SAVED]
    state = {i: {key: tensor(65, dtype=dtype, seed=i)} for i, dtype in enumerate(SAVED)}
    for flags in ({}, {"fused": True}):
        load_both(lambda: Bare(params), saved(state, range(len(SAVED)), **flags), copy)


FLAGS = (
    {},
    {"capturable": True},
    {"fused": True},
    {"capturable": False, "fused": None},
    {"capturable": 1},
    {"fused": []},
)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("current", FLAGS[:3])
def test_step_follows_the_saved_group(flags, current, copy):
    params = [parameter(2, dtype=dtype) for dtype in FLOATING]
    step = {"step": tensor(dtype=torch.float64), "nested": {"step": tensor(2, dtype=torch.int64)}}
    state_dict = saved(dict.fromkeys(range(len(params)), step), range(len(params)), **flags)
    load_both(lambda: Bare(params, **current), state_dict, copy)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_first_group_with_the_id_decides_about_step(order, copy):
    flags = [{"capturable": True}, {}, {"fused": True}]
    params = [parameter(2) for _ in range(6)]
    ids = [[7, "a"], [1.0, 7], ["a", 1]]
    groups = [{"params": ids[i], **flags[i]} for i in order]
    step = {"step": tensor(dtype=torch.float64)}
    state_dict = {"state": {7: step, "a": step, True: step}, "param_groups": groups}

    def make_optimizer():
        return Bare([{"params": params[i : i + 2]} for i in (0, 2, 4)])

    load_both(make_optimizer, state_dict, copy)


def test_a_complex_source_warns_as_torch_does(copy):
    param = parameter(2)
    state_dict = saved({0: {"a": tensor(2, dtype=torch.complex64), "b": tensor(2, dtype=torch.complex64)}})
    torch.set_warn_always(True)
    try:
        with pytest.warns(UserWarning, match="imaginary") as torchs:
            torch_load(Bare([param]), state_dict, copy=copy)
        with pytest.warns(UserWarning, match="imaginary") as ours:
            fastopt.load_state_dict(Bare([param]), state_dict, copy=copy)
    finally:
        torch.set_warn_always(False)
    assert len(ours) == len(torchs)


def test_policy_of_a_subclass_is_ignored(copy):
    class Own(Bare):
        @staticmethod
        def _process_value_according_to_param_policy(*args):
            raise NotImplementedError

    params = [parameter(2)]
    load_both(lambda: Own(params), saved({0: {"a": tensor(2, dtype=torch.float64)}}), copy)


def keep_dtype(param, value, param_id, param_groups, key=None):
    return value.to(device=param.device)


def cast_by_its_arguments(param, value, param_id, param_groups, key=None):
    own = next(group for group in param_groups if param_id in group["params"])
    return value.to(own["wanted"]) if key == "exp_avg" else value


@pytest.mark.parametrize("policy", [keep_dtype, cast_by_its_arguments])
def test_policy_patched_on_optimizer_takes_effect(policy, copy, monkeypatch):
    monkeypatch.setattr(Optimizer, "_process_value_according_to_param_policy", staticmethod(policy))
    state = {"exp_avg": tensor(2), "step": tensor(dtype=torch.int64), "list": [tensor(2, dtype=torch.float64)]}
    state_dict = saved({"id": state}, ["id"], wanted=torch.float16)
    optimizer, report = load_both(lambda: Bare([parameter(2, dtype=torch.bfloat16)]), state_dict, copy)
    loaded = [leaf for leaf in leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]
    assert torch.bfloat16 not in {t.dtype for t in loaded}
    assert report.tensors == len(loaded)


def test_wrapper_around_torchs_policy_takes_effect(copy, monkeypatch):
    torchs, seen = Optimizer._process_value_according_to_param_policy, []

    def watched(param, value, param_id, param_groups, key=None):
        seen.append((param_id, key))
        return torchs(param, value, param_id, param_groups, key)

    monkeypatch.setattr(Optimizer, "_process_value_according_to_param_policy", staticmethod(watched))
    load_both(lambda: adam(dtype=torch.float64), TORCH_STATE_DICT(trained(adam())), copy)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] != []
