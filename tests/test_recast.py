"""`fastopt.to_device` and `fastopt.cast_state`; a load of the optimizer's own state by torch is the oracle."""

import copy as copying

import pytest
import torch

import fastopt
from tests.oracle import TORCH_STATE_DICT, Bare, Comparison, fingerprint, parameter, torch_load, train, trained

pytestmark = pytest.mark.usefixtures("backend")

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SHAPES = ((3, 4), (), (0,), (5,))
OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW, capturable": lambda params: capturable(torch.optim.AdamW(params)),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "ASGD": torch.optim.ASGD,
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1),
    "Adafactor": torch.optim.Adafactor,
}


def capturable(optimizer):
    """As its groups say; torch itself steps such an optimizer on an accelerator alone."""
    train(optimizer)
    optimizer.param_groups[0]["capturable"] = True
    return optimizer


def make(name):
    torch.manual_seed(0)
    shapes = [shape for shape in SHAPES if shape != (0,) or name != "Adafactor"]  # which divides by the size
    optimizer = OPTIMIZERS[name]([parameter(*shape) for shape in shapes])
    return optimizer if name.endswith("capturable") else trained(optimizer)


def cast_params(optimizer, dtype):
    """What `model.to(dtype)` does: the parameters stay the objects that they are."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.data, param.grad = param.data.to(dtype), None


def identities(optimizer):
    groups = optimizer.param_groups
    return [id(groups), *map(id, groups), *(id(value) for group in groups for value in group.values())]


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_reference_casts_as_a_load_of_ones_own_state(name, dtype):
    actual, expected = make(name), make(name)
    for optimizer in (actual, expected):
        cast_params(optimizer, dtype)
    groups = identities(actual)
    torch_load(expected, TORCH_STATE_DICT(expected), copy=False)
    report = fastopt.cast_state(actual, "reference")
    Comparison().same(TORCH_STATE_DICT(actual), TORCH_STATE_DICT(expected))
    assert identities(actual) == groups
    assert report.tensors > 0
    assert report.seconds > 0
    if dtype is F32:
        assert report.shared == report.tensors
        assert f"left {report.shared} as they were" in str(report)


def test_what_needs_no_cast_stays_the_same_object():
    optimizer = make("AdamW")
    before = [{key: id(value) for key, value in state.items()} for state in optimizer.state.values()]
    fastopt.cast_state(optimizer, {"exp_avg": BF16})
    fastopt.to_device(optimizer)
    for state, ids in zip(optimizer.state.values(), before, strict=True):
        assert state["exp_avg"].dtype is BF16
        assert [id(state[key]) == ids[key] for key in ("step", "exp_avg", "exp_avg_sq")] == [True, False, True]


def test_the_step_counts_on():
    optimizer = make("AdamW")
    fastopt.cast_state(optimizer, BF16)
    dtypes = {key: value.dtype for key, value in optimizer.state[optimizer.param_groups[0]["params"][0]].items()}
    assert dtypes == {"step": F32, "exp_avg": BF16, "exp_avg_sq": BF16}
    fastopt.cast_state(optimizer, {"step": F64, "*": F32})
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].dtype is F64


def test_training_goes_on_with_a_model_cast_in_the_middle():
    actual, expected = make("AdamW"), make("AdamW")
    for optimizer in (actual, expected):
        cast_params(optimizer, F64)
    fastopt.cast_state(actual, "reference")
    torch_load(expected, copying.deepcopy(TORCH_STATE_DICT(expected)), copy=True)
    for optimizer in (actual, expected):
        train(optimizer, seed=5)
    Comparison().same(TORCH_STATE_DICT(actual), TORCH_STATE_DICT(expected))


@pytest.mark.parametrize("device", ["cpu:0", {"exp_avg*": "cpu:0"}])
def test_state_moves_to_a_device_or_by_key(device):
    # On the CPU a tensor says "cpu" wherever it was sent, but is a new one: that it has moved can be seen.
    optimizer = make("AdamW")
    before = copying.deepcopy(TORCH_STATE_DICT(optimizer))
    objects = [dict(state) for state in optimizer.state.values()]
    fastopt.to_device(optimizer, device)
    Comparison().same(TORCH_STATE_DICT(optimizer), before)
    moved = {
        key
        for state, old in zip(optimizer.state.values(), objects, strict=True)
        for key in state
        if state[key] is not old[key]
    }
    assert moved == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("device", ["meta", {"exp_avg_sq": "meta"}, "param"])
def test_values_are_not_lost_to_the_meta_device(device):
    param = torch.nn.Parameter(torch.zeros(3, device="meta" if device == "param" else "cpu"))
    optimizer = Bare([param])
    optimizer.state[param] = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    before = fingerprint(optimizer.state)
    with pytest.raises(ValueError, match="would go to the meta device"):
        fastopt.to_device(optimizer, device)
    assert fingerprint(optimizer.state) == before


def test_a_failure_leaves_the_optimizer_as_it_was():
    class Refusing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.to:
                raise RuntimeError("no")
            return super().__torch_function__(func, types, args, kwargs or {})

    params = [parameter(3), parameter(3)]
    optimizer = Bare(params)
    optimizer.state[params[0]] = {"a": torch.ones(3)}
    optimizer.state[params[1]] = {"b": torch.ones(3).as_subclass(Refusing)}
    state, before = optimizer.state, {param: dict(values) for param, values in optimizer.state.items()}
    with pytest.raises(RuntimeError, match="no") as caught:
        fastopt.cast_state(optimizer, BF16)
    assert "key 'b'" in "\n".join(caught.value.__notes__)
    assert optimizer.state is state
    assert all(state[param][key] is value for param, values in before.items() for key, value in values.items())


def test_misspelled_keys_are_reported_and_wrong_rules_refused():
    optimizer = make("AdamW")
    assert fastopt.cast_state(optimizer, {"exp_av": BF16}).unused_patterns == ["exp_av"]
    assert fastopt.to_device(optimizer, {"exp_av": "cpu"}).unused_patterns == ["exp_av"]
    with pytest.raises(ValueError, match="no floating dtype"):
        fastopt.cast_state(optimizer, torch.int32)


def test_state_that_belongs_to_no_parameter_is_kept():
    param, extra = parameter(3), torch.ones(2)
    optimizer = Bare([param])
    optimizer.state[param] = {"a": torch.ones(3)}
    optimizer.state["extra"] = extra
    report = fastopt.cast_state(optimizer, BF16)
    assert optimizer.state["extra"] is extra
    assert report.unexpected == ["extra"]


def test_the_casts_are_audited_as_those_of_a_load():
    actual, expected = make("AdamW"), make("AdamW")
    for optimizer in (actual, expected):
        for state in optimizer.state.values():
            state["exp_avg_sq"].mul_(1e-12)
    report = fastopt.cast_state(actual, torch.float16, audit=True)
    policy = {"step": "keep", "*": torch.float16}
    wanted = fastopt.load_state_dict(expected, TORCH_STATE_DICT(expected), policy=policy, audit=True)
    assert report.audit == wanted.audit
    assert report.audit["exp_avg_sq", F32, torch.float16].underflowed > 0
    assert "WARNING: steps divide by the root of exp_avg_sq" in str(report)
    assert fastopt.cast_state(actual, F32).audit is None


def test_reports_and_notes_say_what_was_done():
    optimizer = make("AdamW")
    assert str(fastopt.cast_state(optimizer, {"exp_av": BF16})).endswith(
        "no key of the state fits 'exp_av', given in policy"
    )
    assert str(fastopt.to_device(optimizer, {"exp_av": "cpu"})).endswith("fits 'exp_av', given in device")
    assert str(fastopt.to_device(optimizer)).startswith("recast 12 tensors in ")
    optimizer.state[optimizer.param_groups[0]["params"][0]]["broken"] = iter([1])
    for call in (lambda: fastopt.to_device(optimizer, "cpu"), lambda: fastopt.cast_state(optimizer, BF16)):
        with pytest.raises(TypeError) as caught:
            call()
        assert caught.value.__notes__[-1].startswith("while recasting the state of parameter 0 ")
