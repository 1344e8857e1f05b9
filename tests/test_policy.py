"""`policy=` and `device=`. The oracle is torch's own load with a rule of the test's in place of torch's."""

import copy as copying
import math
from collections import defaultdict, deque
from fnmatch import fnmatchcase

import pytest
import torch
from torch.optim import Optimizer

import fastopt
from tests.loads import saved, tensor
from tests.oracle import Bare, Comparison, assert_nothing_shared, assert_same_load, fingerprint, parameter, torch_load

pytestmark = pytest.mark.usefixtures("backend")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
POLICIES = {
    "reference": "reference",
    "keep": "keep",
    "float-only": "float-only",
    "a dtype": BF16,
    "a wider dtype": F64,
    "by key": {"exp_avg": BF16, "exp_avg_sq": "keep", "*": "reference"},
    "the name before the pattern": {"exp_*": "keep", "exp_avg": F64},
    "the first pattern": {"exp_a*": F16, "exp_*": "keep", "*": "float-only"},
    "patterns of all kinds": {"m[ab]?k": "keep", "[!m]odes": F64},
    "the step by name": {"step": F16, "exp_avg": "keep"},
    "only the step": {"step": "keep"},
    "nothing": {},
}


def flat_state():
    return {
        "step": torch.tensor(257.0),
        "exp_avg": tensor(3, 4),
        "exp_avg_sq": tensor(3, 4, dtype=F16, seed=1),
        "max": tensor(4, 3, dtype=F64, seed=2).t(),
        "codes": tensor(7, dtype=torch.uint8),
        "mask": tensor(3, 4, dtype=torch.bool),
        "small": tensor(3, dtype=torch.float8_e4m3fn),
        "none": None,
        "number": 0.5,
    }


def rule_of(policy, key):
    """The documented look-up, in other words."""
    patterns = policy if isinstance(policy, dict) else {"*": policy}
    if key in patterns or key == "step":
        return patterns.get(key, "step")
    return next((patterns[p] for p in patterns if fnmatchcase(str(key), p)), "reference")


def torchs_load_by(policy, monkeypatch):
    """torch's method, casting by a policy."""

    def process(param, value, param_id, param_groups, key=None):
        rule = rule_of(policy, key)
        if isinstance(rule, torch.dtype):
            return value.to(dtype=rule) if value.is_floating_point() else value
        if rule == "step":
            on_device = any(g.get("capturable") or g.get("fused") for g in param_groups if param_id in g["params"])
            return value.to(dtype=F32) if on_device else value
        if rule == "keep" or (rule == "float-only" and not value.is_floating_point()):
            return value
        return value.to(param.dtype) if param.is_floating_point() else value

    def load(optimizer, state_dict, copy):
        with monkeypatch.context() as patch:
            patch.setattr(Optimizer, "_process_value_according_to_param_policy", staticmethod(process))
            torch_load(optimizer, state_dict, copy=copy)

    return load


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("param_dtype", [F32, BF16, F16, torch.complex64, torch.int64])
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_torchs_load_with_another_rule(name, param_dtype, capturable, copy, monkeypatch):
    policy, param = POLICIES[name], parameter(3, 4, dtype=param_dtype)
    state_dict = saved({0: flat_state()}, capturable=capturable)
    actual, expected = Bare([param]), Bare([param])
    torchs_load_by(policy, monkeypatch)(expected, state_dict, copy)
    before = fingerprint(state_dict)
    fastopt.load_state_dict(actual, state_dict, copy=copy, policy=policy)
    assert fingerprint(state_dict) == before
    assert_same_load(actual, expected, given=state_dict, given_to_torch=state_dict, copy=copy)


@pytest.mark.parametrize("options", [{}, {"policy": None}, {"policy": "reference"}, {"policy": {}, "device": {}}])
def test_the_default_is_the_reference(options, copy):
    param, state_dict = parameter(3, 4, dtype=BF16), saved({0: flat_state()})
    actual, expected = Bare([param]), Bare([param])
    torch_load(expected, state_dict, copy=copy)
    fastopt.load_state_dict(actual, state_dict, copy=copy, **options)
    assert_same_load(actual, expected, given=state_dict, given_to_torch=state_dict, copy=copy)


def load_value(value, dtype=BF16, **options):
    param = parameter(3, 4, dtype=dtype)
    optimizer = Bare([param])
    fastopt.load_state_dict(optimizer, saved({0: value}), **options)
    return optimizer.state[param]


def dtypes(value):
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, dict):
        return {key: dtypes(item) for key, item in value.items()}
    return [dtypes(item) for item in value]


@pytest.mark.parametrize("container", [list, tuple, deque])
def test_the_rule_of_a_state_key_holds_at_any_depth(container):
    value = {
        "history": container([tensor(2), {"step": torch.tensor(257.0), "other": tensor(2)}, [tensor(2)]]),
        "nested": {"history": tensor(2), "deep": defaultdict(dict, history=tensor(2)), "step": torch.tensor(257.0)},
        "other": tensor(2),
    }
    result = load_value(value, policy={"history": "keep"})
    assert dtypes(result) == {
        "history": [F32, {"step": F32, "other": F32}, [F32]],
        "nested": {"history": BF16, "deep": {"history": BF16}, "step": F32},
        "other": BF16,
    }


@pytest.mark.parametrize("value", [tensor(3), [tensor(3)]])
def test_a_state_that_is_no_dict_is_fitted_by_the_star_alone(value):
    for policy, expected in (({"*": "keep"}, F32), ({"?*": "keep"}, BF16), ("keep", F32), (F16, F16)):
        result = load_value(value, policy=policy)
        assert (result[0] if isinstance(result, list) else result).dtype is expected


def test_keys_that_are_no_strings_are_fitted_by_the_star_alone():
    value = {1: tensor(3), ("a", 2): tensor(3), None: tensor(3)}
    assert set(dtypes(load_value(value, policy={"1": "keep", "?": "keep"})).values()) == {BF16}
    assert set(dtypes(load_value(value, policy="keep")).values()) == {F32}


def test_in_a_list_there_is_no_step():
    value = {"step": [torch.tensor(257.0)]}
    assert dtypes(load_value(value)) == {"step": [BF16]}
    assert dtypes(load_value(value, policy="keep")) == {"step": [F32]}
    assert dtypes(load_value(value, policy={"step": F16, "*": "keep"})) == {"step": [F16]}


def test_the_step_counts_on_whatever_the_patterns_say():
    for policy in (BF16, {"*": BF16}, {"s*": BF16, "?tep": F16}):
        step = load_value({"step": torch.tensor(257.0), "state": tensor(3)}, policy=policy)["step"]
        assert (step.dtype, step.item()) == (F32, 257)
    assert load_value({"step": torch.tensor(257.0)}, policy={"step": BF16})["step"].item() == 256


def test_values_are_rounded_once():
    # Above the middle of two bfloat16 by less than the parameter's float16 can say: it would make the middle of it.
    value = torch.tensor([1 + 2**-8 + 2**-14, -(1 + 2**-8 + 2**-14)])
    assert value.to(F16).to(BF16).tolist() == [1, -1]
    assert load_value({"m": value}, dtype=F16, policy={"m": BF16})["m"].tolist() == [1 + 2**-7, -(1 + 2**-7)]


def test_codes_of_a_quantized_optimizer_stay():
    codes = torch.arange(256, dtype=torch.uint8)
    value = {"state1": codes, "qmap1": tensor(256), "absmax1": torch.tensor([3.0])}
    assert load_value(value)["state1"].dtype is BF16  # an index into a table no more
    kept = load_value(value, policy="float-only")
    assert kept["state1"].dtype is torch.uint8
    assert torch.equal(kept["state1"], codes)
    assert kept["qmap1"].dtype is kept["absmax1"].dtype is BF16


# ---- device: the meta device stands for another one ----


def on_meta(param):
    return torch.nn.Parameter(param.detach().to("meta"))


def test_state_may_stay_where_it_is(copy):
    param, state_dict = on_meta(parameter(3, 4, dtype=BF16)), saved({0: flat_state()})
    for device in ("keep", "cpu", torch.device("cpu"), {"*": "cpu"}):
        optimizer = Bare([param])
        report = fastopt.load_state_dict(optimizer, state_dict, copy=copy, policy="keep", device=device)
        comparison = Comparison()
        comparison.same(dict(optimizer.state[param]), state_dict["state"][0], "state")
        assert report.emptied == 0
        assert (report.shared == 0) is copy
        if copy:
            assert_nothing_shared(optimizer, state_dict)


def test_state_is_cast_for_a_parameter_elsewhere():
    param, value = on_meta(parameter(3, 4, dtype=BF16)), {"m": tensor(3, 4), "step": torch.tensor(1.0)}
    optimizer = Bare([param])
    fastopt.load_state_dict(optimizer, saved({0: value}), device="cpu")
    state = optimizer.state[param]
    assert not state["m"].is_meta
    assert torch.equal(state["m"].view(torch.int16), value["m"].to(BF16).view(torch.int16))
    assert state["step"].dtype is F32


def test_state_goes_to_the_device_of_its_key():
    value = {"exp_avg": tensor(3), "exp_avg_sq": tensor(3), "other": tensor(3), "step": torch.tensor(1.0)}
    state = load_value(value, device={"exp_avg": "meta", "exp_*": "keep"})
    assert {key: item.device.type for key, item in state.items()} == {
        "exp_avg": "meta",
        "exp_avg_sq": "cpu",
        "other": "cpu",
        "step": "cpu",
    }
    assert {item.dtype for key, item in state.items() if key != "step"} == {BF16}
    assert load_value(value, device="meta")["step"].device.type == "cpu"
    assert load_value(value, device={"step": "meta"})["step"].device.type == "meta"


def test_cpu_with_an_index_is_what_torch_makes_of_it():
    value = {"m": tensor(3)}
    assert load_value(value, device="cpu:0")["m"].device == tensor(3).to("cpu:0").device


# ---- what is refused, and what is reported ----


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"policy": "keeps"}, ValueError, "policy: 'keeps' is none of 'reference', 'keep', 'float-only'"),
        ({"policy": {"exp_avg": "step"}}, ValueError, "policy['exp_avg']: 'step' is none of"),
        ({"policy": torch.uint8}, ValueError, "policy: torch.uint8 is no floating dtype"),
        ({"policy": {"m": torch.complex64}}, ValueError, "policy['m']: torch.complex64 is no floating dtype"),
        ({"policy": 3}, TypeError, "policy: 3 is a int"),
        ({"policy": "bfloat16"}, ValueError, "policy: 'bfloat16' is a str; pass torch.bfloat16"),
        ({"policy": {"m": "torch.half"}}, ValueError, "policy['m']: 'torch.half' is a str; pass torch.half"),
        ({"policy": {3: "keep"}}, TypeError, "policy: the pattern 3 is a int, not a str"),
        ({"device": {None: "cpu"}}, TypeError, "device: the pattern None is a NoneType"),
        ({"device": "params"}, RuntimeError, "device: 'params' is neither 'param' nor 'keep', nor a device"),
        ({"device": {"m": []}}, TypeError, "device['m']: [] is neither"),
        ({"device": "step"}, RuntimeError, "device: 'step' is neither"),
        ({"policy": "keep", "inplace": True}, ValueError, "inplace: the tensors to fill have their dtypes"),
        ({"device": "keep", "inplace": True}, ValueError, "inplace: the tensors to fill have their dtypes"),
    ],
)
def test_what_makes_no_policy_is_refused(options, kind, text):
    param = parameter(3)
    optimizer = Bare([param])
    optimizer.state[param] = {"m": tensor(3)}
    before = fingerprint(optimizer)
    with pytest.raises(kind) as caught:
        fastopt.load_state_dict(optimizer, saved({0: {"m": tensor(3)}}), **options)
    assert any(text in line for line in (str(caught.value), *getattr(caught.value, "__notes__", ())))
    assert fingerprint(optimizer) == before


def test_patterns_that_fit_no_key_are_reported():
    optimizer, state_dict = Bare([parameter(3)]), saved({0: {"exp_avg": tensor(3), "step": torch.tensor(1.0)}})
    policy = {"exp_avgs": "keep", "exp_avg": "keep", "m*": BF16, "*": "reference"}
    report = fastopt.load_state_dict(optimizer, state_dict, policy=policy, device={"step": "cpu", "z": "cpu"})
    assert report.unused_patterns == ["exp_avgs", "m*", "z"]
    assert "no key of the state fits 'exp_avgs', 'm*', 'z', given in policy or device" in str(report)
    assert fastopt.load_state_dict(optimizer, state_dict, policy="keep").unused_patterns == []


def test_many_keys_keep_their_rules():
    keys = [f"key {i}" for i in range(50)]
    value = {key: torch.full((2,), 1.0) for key in keys}
    params = [parameter(2, dtype=BF16) for _ in range(20)]
    optimizer = Bare(params)
    state = {i: copying.deepcopy(value) for i in range(20)}
    fastopt.load_state_dict(optimizer, saved(state, params=range(20)), policy={"key ?": "keep", "key 3*": F16})
    for param in params:
        found = dtypes(dict(optimizer.state[param]))
        assert found == {k: F32 if len(k) == 5 else F16 if k.startswith("key 3") else BF16 for k in keys}


# ---- a run that goes on ----


class WideAdam(Optimizer):
    """Adam whose moments are float32 whatever its parameters are."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(param, dtype=F32) for _ in range(2))
                state["step"] += 1
                grad, (beta1, beta2), step = param.grad.to(F32), group["betas"], state["step"].item()
                m = state["exp_avg"].to(F32).lerp_(grad, 1 - beta1)
                v = state["exp_avg_sq"].to(F32).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                state["exp_avg"].copy_(m)
                state["exp_avg_sq"].copy_(v)
                denominator = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
                param.add_((m / denominator).mul_(-group["lr"] / (1 - beta1**step)).to(param.dtype))


def run(steps, checkpoint=None, **options):
    """Losses of a bfloat16 model with float32 moments, from the beginning or from a checkpoint, and a checkpoint."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 16).to(BF16)
    targets = torch.randn(64, 1).to(BF16)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(BF16)
    optimizer = WideAdam(model.parameters(), lr=3e-3)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        fastopt.load_state_dict(optimizer, checkpoint["optimizer"], **options)
    losses = []
    for _ in range(steps):
        loss = (model(inputs) - targets).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, copying.deepcopy({"model": model.state_dict(), "optimizer": fastopt.state_dict(optimizer)})


def test_wide_moments_under_narrow_parameters_survive_a_resume():
    uninterrupted, _ = run(400)
    first, checkpoint = run(200)
    assert first == uninterrupted[:200]
    for policy in ("keep", {"exp_avg*": F32}, {"*": F64, "exp_avg*": "keep"}):
        assert run(200, checkpoint, policy=policy)[0] == uninterrupted[200:]
    for policy in ("reference", "float-only", BF16, {"exp_avg": BF16, "exp_avg_sq": "keep", "*": "reference"}):
        narrowed, _ = run(200, checkpoint, policy=policy)
        assert narrowed != uninterrupted[200:]  # what the reference does to them
        assert all(abs(a - b) < 0.1 * b + 0.01 for a, b in zip(narrowed, uninterrupted[200:], strict=True))
    assert all(map(math.isfinite, narrowed))


@pytest.mark.parametrize("call", [fastopt.snapshot, lambda o, dtype: fastopt.save(o, "never.pt", dtype=dtype)])
@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        ("bfloat16", "dtype: 'bfloat16' is a str; pass torch.bfloat16"),
        (torch.int8, "dtype: torch.int8 is no floating dtype"),
        ({"exp_avg": "narrow"}, "dtype['exp_avg']: 'narrow' is none of"),
        ({3: BF16}, "dtype: the pattern 3 is a int"),
    ],
    ids=str,
)
def test_what_leaves_an_optimizer_is_refused_by_the_name_of_its_argument(call, dtype, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError)) as caught:
        call(Bare([parameter(3)]), dtype=dtype)
    assert str(caught.value).startswith(text)
    assert list(tmp_path.iterdir()) == []
