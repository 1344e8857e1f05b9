"""`fastopt.check`; where it can, what torch makes of the same dict is the oracle."""

import copy as copying
import random
import time
import warnings

import numpy
import pytest
import torch

import fastopt
from fastopt.inspection.shapes import SHAPED_BY_RULE
from tests.loads import saved
from tests.oracle import TORCH_STATE_DICT, Bare, adam, fingerprint, parameter, torch_load, train, trained

pytestmark = pytest.mark.usefixtures("backend")

NAN, INF = float("nan"), float("inf")


def fresh(optimizer):
    """An optimizer of the same class, settings and shapes, without state."""
    groups = [
        {**group, "params": [torch.nn.Parameter(torch.zeros_like(p)) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return type(optimizer)(groups)


def state_of(optimizer):
    return copying.deepcopy(TORCH_STATE_DICT(optimizer))


def texts(problems, kind=None):
    return [str(problem) for problem in problems if kind in (None, problem.kind)]


def places(problems):
    return {(problem.kind, problem.saved_id, problem.key) for problem in problems}


def dense_optimizers():
    names = [name for name in vars(torch.optim) if isinstance(getattr(torch.optim, name), type)]
    return [n for n in names if issubclass(getattr(torch.optim, n), torch.optim.Optimizer) and n != "Optimizer"]


def make(name):
    options = {"SGD": {"lr": 0.1, "momentum": 0.9}, "RMSprop": {"momentum": 0.9, "centered": True}}
    if name in ("Adam", "AdamW"):
        options[name] = {"amsgrad": True}
    torch.manual_seed(0)
    shapes = [(3, 4), (4, 3), (2, 2), (8, 1)] if name == "Muon" else [(3, 4), (4, 3), (5,), (1,), ()]
    optimizer = getattr(torch.optim, name)([parameter(*shape) for shape in shapes], **options.get(name, {"lr": 0.1}))
    train(optimizer, grad=torch.Tensor.to_sparse if name == "SparseAdam" else torch.clone)
    return optimizer


@pytest.mark.parametrize("name", dense_optimizers())
def test_a_state_that_fits_has_no_problem(name):
    optimizer = make(name)
    for target in (optimizer, fresh(optimizer)):
        assert fastopt.check(target, state_of(optimizer), finite=True) == []


@pytest.mark.parametrize("name", dense_optimizers())
def test_the_rule_of_torchs_optimizers_is_what_they_do(name):
    optimizer = make(name)
    by_rule = all(
        value.numel() == 1 or value.shape == param.shape
        for param, state in optimizer.state.items()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ) and not any(isinstance(value, list) for state in optimizer.state.values() for value in state.values())
    assert (type(optimizer) in SHAPED_BY_RULE) == by_rule


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "fresh"])
def test_reordered_parameters_are_found_where_torch_fails_only_in_the_step(is_trained):
    saved_state = state_of(trained(adam((2, 3), (3, 2), (4,))))
    optimizer = adam((3, 2), (2, 3), (4,))
    if is_trained:
        train(optimizer)
    problems = fastopt.check(optimizer, saved_state)
    assert places(problems) == {("shape", i, key) for i in (0, 1) for key in ("exp_avg", "exp_avg_sq")}
    assert "parameter 0, saved under id 0, exp_avg: float32 [2, 3] on cpu" in str(problems[0])
    assert str(problems[0]).endswith("parameter of shape [3, 2]")
    torch_load(optimizer, saved_state, copy=True)  # which torch takes without a word
    with pytest.raises(RuntimeError):
        train(optimizer)


def test_one_element_where_a_tensor_belongs_is_found_and_step_is_not():
    saved_state = state_of(trained(adam((1,), (3,))))
    problems = fastopt.check(adam((3,), (1,)), saved_state)
    assert places(problems) == {("shape", i, key) for i in (0, 1) for key in ("exp_avg", "exp_avg_sq")}


def test_what_the_optimizer_holds_now_decides():
    optimizer = Bare([parameter(3, 4), parameter(5)])
    first, second = optimizer.param_groups[0]["params"]
    optimizer.state[first] = {"m": torch.zeros(3, 4), "row": torch.zeros(3)}
    optimizer.state[second] = {"m": torch.zeros(5), "row": torch.zeros(5)}
    good = saved({0: {"m": torch.zeros(3, 4), "row": torch.zeros(3)}, 1: {"m": torch.zeros(5)}}, (0, 1))
    assert places(fastopt.check(optimizer, good)) == {("structure", 1, "row")}
    good["state"][1]["row"] = torch.zeros(5)
    assert fastopt.check(optimizer, good) == []
    bad = saved({0: {"m": torch.zeros(4, 3), "row": torch.zeros(7)}, 1: {"row": torch.zeros(7)}}, (0, 1))
    wanted = {("structure", 1, "m"), ("shape", 0, "m"), ("shape", 1, "row")}
    assert places(fastopt.check(optimizer, bad)) == wanted


def test_of_an_unknown_optimizer_most_of_the_state_decides():
    params = [parameter(2, 3) for _ in range(4)]
    shapes = [(2, 3), (2, 3), (2, 3), (3, 2)]
    state = {i: {"m": torch.zeros(shape), "factor": torch.zeros(2)} for i, shape in enumerate(shapes)}
    assert places(fastopt.check(Bare(params), saved(state, range(4)))) == {("shape", 3, "m")}


def test_of_an_unknown_optimizer_shapes_in_another_order_are_found():
    params = [parameter(2, 3), parameter(3, 2), parameter(5)]
    state = {i: {"m": torch.zeros(shape)} for i, shape in enumerate([(5,), (2, 3), (3, 2)])}
    assert places(fastopt.check(Bare(params), saved(state, range(3)))) == {("shape", i, "m") for i in range(3)}


def test_factored_blockwise_and_listed_state_passes():
    params = [parameter(6, 4), parameter(256)]
    state = {
        0: {"row": torch.zeros(6), "codes": torch.zeros(6, 4, dtype=torch.uint8), "absmax": torch.zeros(3)},
        1: {"row": None, "codes": torch.zeros(256, dtype=torch.uint8), "absmax": torch.zeros(1)},
    }
    state[0]["map"] = state[1]["map"] = torch.zeros(256)
    state[0]["old"] = [torch.zeros(7), {"m": torch.zeros(9)}]
    assert fastopt.check(Bare(params), saved(state, (0, 1))) == []


def test_shapes_can_be_left_out():
    problems = fastopt.check(adam((3, 2), (4,)), state_of(trained(adam((2, 3), (4,)))), shapes=False)
    assert problems == []


def test_every_problem_of_the_structure_is_listed():
    optimizer = torch.optim.SGD(
        [{"params": [parameter(2)]}, {"params": [parameter(2), parameter(3)]}], lr=0.1, momentum=0.9
    )
    groups = [
        {"params": [0, 0, [1]], "lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0},
        {"params": [1, 2], "dampening": 0, "weight_decay": 0},
    ]
    problems = fastopt.check(optimizer, {"state": {7: {}, "shared": {}, 2: torch.zeros(1)}, "param_groups": groups})
    assert texts(problems) == [
        "structure: parameters of group 0: 3 saved, 1 in the optimizer",
        "structure: param group 1 has no 'lr', which is 0.1 in the optimizer",
        "structure: param group 1 has no 'momentum', which is 0.9 in the optimizer",
        "structure: saved id 0 stands twice in the groups",
        "structure: saved id [1] in param group 0 is not hashable",
        "structure: state under id 7, which stands in no group",
        "structure: parameter 2, saved under id 2: its state is float32 [1] on cpu, not a dict",
    ]


@pytest.mark.parametrize(
    ("state_dict", "text"),
    [
        (None, "the state dict is a NoneType, not a dict"),
        ("optimizer.pt", "the state dict is a str, not a dict"),
        ({}, "'param_groups' is missing"),
        ({"param_groups": 3, "state": {}}, "'param_groups' is a int, not a list"),
        ({"param_groups": []}, "'state' is missing"),
        ({"param_groups": [], "state": []}, "'state' is a list, not a dict"),
        ({"param_groups": [], "state": {}}, "param groups: 0 saved, 1 in the optimizer"),
        ({"param_groups": [None], "state": {}}, "param group 0 has no list 'params'"),
        ({"param_groups": [{"lr": 1}], "state": {0: {}}}, "param group 0 has no list 'params'"),
    ],
)
def test_no_dict_is_too_odd(state_dict, text):
    assert any(text in one for one in texts(fastopt.check(Bare([parameter(2)]), state_dict, finite=True)))


def test_what_younger_versions_added_is_no_problem():
    saved_state = state_of(trained(adam()))
    for group in saved_state["param_groups"]:
        for key in ("foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"):
            del group[key]
    optimizer = adam()
    assert fastopt.check(optimizer, saved_state) == []
    torch_load(optimizer, saved_state, copy=True)
    train(optimizer)


@pytest.mark.parametrize("missing", ["betas", "lr", "eps"])
def test_a_missing_hyperparameter_is_found_where_torch_fails_only_in_the_step(missing):
    saved_state = state_of(trained(adam()))
    del saved_state["param_groups"][1][missing]
    optimizer = adam()
    [problem] = fastopt.check(optimizer, saved_state)
    assert problem.key == missing
    torch_load(optimizer, saved_state, copy=True)
    with pytest.raises(KeyError, match=missing):
        train(optimizer)


def test_names_stand_in_the_text():
    optimizer = Bare([("body.weight", parameter(2, 3)), ("head.weight", parameter(4))])
    state = {0: {"m": torch.zeros(4)}, 1: {"m": torch.zeros(2, 3)}}
    problems = fastopt.check(optimizer, saved(state, (0, 1)))
    assert "parameter 1 'head.weight', saved under id 1, m:" in str(problems[1])


def test_complex_state_of_a_real_parameter_is_found():
    state = {0: {"m": torch.zeros(2, dtype=torch.complex64), "step": torch.zeros(2, dtype=torch.complex64)}}
    [problem] = fastopt.check(Bare([parameter(2)]), saved(state))
    assert (problem.kind, problem.key) == ("dtype", "m")
    optimizer = Bare([parameter(2)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of it once in a process
        torch_load(optimizer, saved(state), copy=True)
    assert not optimizer.state[optimizer.param_groups[0]["params"][0]]["m"].is_complex()
    assert fastopt.check(Bare([parameter(2, dtype=torch.complex64)]), saved(state)) == []


def test_state_without_values_is_found():
    state_dict = saved({0: {"m": torch.zeros(2, device="meta")}})
    [problem] = fastopt.check(Bare([parameter(2)]), state_dict)
    assert (problem.kind, problem.saved_id, problem.key) == ("values", 0, "m")
    with pytest.raises(NotImplementedError):
        torch_load(Bare([parameter(2)]), state_dict, copy=False)
    assert fastopt.check(Bare([torch.nn.Parameter(torch.zeros(2, device="meta"))]), state_dict) == []


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [3, 1 << 16, (1 << 20) + 7], ids=str)
def test_values_that_are_not_finite_are_counted(dtype, size):
    good, bad = torch.ones(size).to(dtype), torch.ones(size)
    bad[0], bad[size // 2], bad[-1] = NAN, INF, -INF
    bad = bad.to(dtype)
    state = {i: {"m": good, "step": torch.tensor(1)} for i in range(5)}
    state[3] = {"m": bad}
    problems = fastopt.check(Bare([parameter(2) for _ in range(5)]), saved(state, range(5)), shapes=False, finite=True)
    [problem] = [one for one in problems if one.kind == "values"]
    assert (problem.saved_id, problem.key) == (3, "m")
    assert str(problem).endswith("holds 1 NaN and 2 inf")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(
    "make_tensor",
    [
        lambda: torch.tensor([[1.0, NAN], [2.0, 3.0]]).T,
        lambda: torch.tensor([0.0, NAN]).to_sparse(),
        lambda: torch.tensor([[0.0, NAN]]).to_sparse_csr(),
        lambda: torch.tensor([1.0, NAN]).expand(4, 2),
        lambda: torch.nn.Parameter(torch.tensor([NAN])),
        lambda: torch.tensor(NAN),
    ],
)
def test_nans_are_found_in_tensors_of_all_kinds_and_at_any_depth(make_tensor):
    state = {0: {"deep": [1, {"deeper": (None, make_tensor())}]}, "shared": {"x": torch.ones(2)}}
    [problem] = fastopt.check(Bare([parameter(2)]), saved(state), finite=True)
    assert "deep[1]['deeper'][1]" in str(problem)
    assert "NaN" in str(problem)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_has_no_floats_is_not_looked_at():
    state = {
        0: {
            "codes": torch.tensor([255], dtype=torch.uint8),
            "flag": torch.tensor([True]),
            "empty": torch.zeros(0),
            "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "text": "nan",
        }
    }
    assert fastopt.check(Bare([parameter(2)]), saved(state), finite=True) == []


def test_hyperparameters_that_are_nan_are_found():
    optimizer = Bare([parameter(2)], lr=0.1, betas=(0.9, 0.99), t=torch.tensor(1.0), limit=INF)
    bad = saved({}, lr=NAN, betas=(0.9, NAN), t=torch.tensor(NAN), limit=INF)
    assert [problem.key for problem in fastopt.check(optimizer, bad, finite=True)] == ["lr", "betas", "t"]
    assert fastopt.check(optimizer, bad) == []


def test_nothing_changes_and_no_hook_runs():
    optimizer = trained(adam())
    saved_state = state_of(optimizer)
    calls = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append(1))
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append(1))
    before = fingerprint(optimizer), fingerprint(saved_state)
    fastopt.check(optimizer, saved_state, finite=True)
    fastopt.check(optimizer, {"state": {5: {"m": torch.zeros(2)}}, "param_groups": []})
    assert (fingerprint(optimizer), fingerprint(saved_state)) == before
    assert calls == []


def test_it_can_refuse_in_torchs_own_pre_hook():
    optimizer = adam((3, 2), (2, 3))

    def refuse(optimizer, state_dict):
        if problems := fastopt.check(optimizer, state_dict):
            raise ValueError("\n".join(map(str, problems)))

    optimizer.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(ValueError, match="belongs to a parameter of shape"):
        optimizer.load_state_dict(state_of(trained(adam((2, 3), (3, 2)))))
    assert not optimizer.state


def test_an_optimizer_is_asked_for():
    with pytest.raises(TypeError, match="optimizer is a dict"):
        fastopt.check({}, {})


def test_time_is_linear_and_memory_bounded():
    count = 50_000
    optimizer = Bare([parameter(2) for _ in range(count)])
    order = random.Random(0).sample(range(count), count)
    state = {i: {"m": torch.zeros(2), "v": torch.zeros(2)} for i in order}
    started = time.perf_counter()
    assert fastopt.check(optimizer, saved(state, range(count)), finite=True) == []
    assert time.perf_counter() - started < 20


def test_a_load_that_went_wrong_is_found_afterwards():
    optimizer = adam((3, 2), (2, 3))
    wrong = state_of(trained(adam((2, 3), (3, 2))))
    torch_load(optimizer, wrong, copy=True)
    assert len(fastopt.check(optimizer, wrong)) == 4


def test_low_rank_state_of_the_matrices_passes():
    params = [parameter(64, 8), *(parameter(64) for _ in range(5))]
    state = {i: {"m": torch.zeros(2, 8) if i == 0 else torch.zeros(64)} for i in range(6)}
    assert fastopt.check(Bare(params), saved(state, range(6))) == []


def test_an_odd_step_is_the_only_problem():
    optimizer = adam((3, 2), (2, 3))
    bad = state_of(trained(adam((3, 2), (2, 3))))
    bad["state"][0]["step"] = torch.ones(2)
    assert places(fastopt.check(optimizer, bad)) == {("shape", 0, "step")}


def test_time_is_linear_in_the_number_of_keys():
    count = 20_000
    optimizer = Bare([parameter(2) for _ in range(count)])
    state = {i: {f"key {i}": torch.zeros(2)} for i in range(count)}
    started = time.perf_counter()
    assert fastopt.check(optimizer, saved(state, range(count))) == []
    assert time.perf_counter() - started < 10


def test_an_iterator_is_not_used_up():
    items = iter([1, 2])
    fastopt.check(Bare([parameter(2)]), saved({0: {"m": items}}), finite=True)
    assert list(items) == [1, 2]


# ---- names ----


def named(*names, saved_as=None, **state):
    """An optimizer of parameters of one shape, and a dict for it whose parameters have names of their own."""
    optimizer = torch.optim.SGD([(name, parameter(2)) for name in names], lr=0.1)
    state_dict = TORCH_STATE_DICT(optimizer)
    if saved_as is not None:
        state_dict["param_groups"][0]["param_names"] = list(saved_as)
    return optimizer, state_dict


@pytest.mark.parametrize(
    ("saved_as", "text"),
    [
        ("ba", "names: parameter 0 'a' was 'b', parameter 1 'b' was 'a'; the same names in other places. A load"),
        ("ac", "names: parameter 1 'b' was 'c'; only saved: 'c'; only in the optimizer: 'b'. A load goes by place; "),
    ],
)
def test_other_names_are_found_where_every_shape_fits(saved_as, text):
    optimizer, state_dict = named("a", "b", saved_as=saved_as)
    [problem] = fastopt.check(optimizer, state_dict)
    assert problem.kind == "names"
    assert str(problem).startswith(text)
    assert str(problem).endswith("fastopt.match goes by names")
    torch_load(optimizer, state_dict, copy=True)  # without a word, and takes the names over


def test_names_in_other_groups_are_found():
    optimizer = torch.optim.SGD([{"params": [("a", parameter(2))]}, {"params": [("b", parameter(2))]}], lr=0.1)
    state_dict = state_of(torch.optim.SGD([("b", parameter(2)), ("a", parameter(2))], lr=0.1))
    assert texts(fastopt.check(optimizer, state_dict), "names") == [
        "names: the same names in other places. A load goes by place; fastopt.match goes by names"
    ]


def test_names_of_one_side_alone_and_the_same_ones_are_no_problem():
    optimizer, state_dict = named("a", "b")
    assert fastopt.check(optimizer, state_dict) == []
    del state_dict["param_groups"][0]["param_names"]
    assert fastopt.check(optimizer, state_dict) == []
    optimizer, state_dict = named("a", "b", saved_as="ba")
    assert fastopt.check(torch.optim.SGD([parameter(2), parameter(2)], lr=0.1), state_dict) == []
    assert fastopt.check(optimizer, fastopt.match(state_dict, optimizer)) == []


def test_thousands_of_other_names_are_one_short_line():
    names = [f"layer.{index}" for index in range(5000)]
    optimizer, state_dict = named(*names, saved_as=[f"module.{name}" for name in names])
    started = time.perf_counter()
    [problem] = fastopt.check(optimizer, state_dict)
    assert time.perf_counter() - started < 5
    assert len(str(problem)) < 700
    assert "and 4,995 more" in str(problem)


# ---- entries ----

Sequential = torch.nn.Sequential


def of_layers(make=torch.optim.AdamW, **options):
    """An optimizer of two layers, a matrix and a vector each, as those have that people train."""
    torch.manual_seed(0)
    model = Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    return make(model.named_parameters(), **options)


def damaged(damage):
    state_dict = state_of(trained(of_layers()))
    damage(state_dict["state"])
    return state_dict


def delete(index, key):
    def damage(state):
        del state[index][key]

    return damage


def put(index, key, value):
    def damage(state):
        state[index][key] = value

    return damage


def put_whole(index, value):
    def damage(state):
        state[index] = value

    return damage


MATRIX = torch.zeros(8, 4)
ENTRIES = {
    "a moment is missing": (delete(0, "exp_avg"), "exp_avg", "has no 'exp_avg', which others of its group have"),
    "the step is missing": (delete(3, "step"), "step", "has no 'step', which others of its group have"),
    "None": (put(0, "exp_avg", None), "exp_avg", ", exp_avg: None, where a dense tensor of shape [8, 4] belongs"),
    "a number": (put(0, "exp_avg_sq", 0.0), "exp_avg_sq", ", exp_avg_sq: 0.0, where a dense tensor of shape [8, 4]"),
    "a list": (put(0, "exp_avg", MATRIX.tolist()), "exp_avg", ", exp_avg: of type list, where a dense tensor"),
    "a dict": (put(0, "exp_avg", {"a": MATRIX}), "exp_avg", ", exp_avg: of type dict, where a dense tensor"),
    "sparse": (put(0, "exp_avg", MATRIX.to_sparse()), "exp_avg", ", exp_avg: sparse_coo float32 [8, 4] on cpu, where"),
    "no dict": (put_whole(0, None), None, ": its state is None, not a dict"),
    "a tensor": (put_whole(0, torch.ones(1)), None, ": its state is float32 [1] on cpu, not a dict"),
}


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "fresh"])
@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_unlike_the_others_is_found_where_torch_fails_in_the_load_or_in_the_step(name, is_trained):
    damage, key, text = ENTRIES[name]
    optimizer, state_dict = of_layers(), damaged(damage)
    if is_trained:
        train(optimizer)
    [problem] = fastopt.check(optimizer, state_dict)
    assert (problem.kind, problem.key) == ("structure", key)
    assert f"parameter {problem.saved_id} " in str(problem)
    assert text in str(problem)

    def load_and_step():
        torch_load(optimizer, state_dict, copy=True)
        train(optimizer)

    with pytest.raises((KeyError, TypeError, AttributeError, IndexError, NotImplementedError)):
        load_and_step()


@pytest.mark.parametrize("name", ENTRIES)
def test_what_the_optimizer_holds_tells_where_no_other_parameter_does(name):
    damage, key, _ = ENTRIES[name]
    optimizer = trained(torch.optim.AdamW([parameter(8, 4)]))
    state_dict = {**state_of(optimizer), "state": {0: state_of(optimizer)["state"][0]}}
    state_dict["state"][3] = state_dict["state"][0]
    damage(state_dict["state"])
    state_dict["state"] = {0: state_dict["state"][3 if "step" in name else 0]}
    assert places(fastopt.check(optimizer, state_dict)) == {("structure", 0, key)}


def test_most_parameters_of_an_unknown_optimizer_decide():
    params = [parameter(2, 3), parameter(3), parameter(3, 2), parameter(2)]
    state = {i: {"m": torch.zeros_like(param), "n": 3} for i, param in enumerate(params)}
    assert fastopt.check(Bare(params), saved(state, range(4))) == []
    del state[0]["n"]
    state[3]["m"] = None
    assert places(fastopt.check(Bare(params), saved(state, range(4)))) == {("structure", 0, "n"), ("structure", 3, "m")}


def variants():
    layers = {
        "Adam without amsgrad": lambda: of_layers(torch.optim.Adam),
        "AdamW, amsgrad": lambda: of_layers(amsgrad=True),
        "AdamW, fused": lambda: of_layers(fused=True),
        "AdamW, a tensor lr": lambda: of_layers(lr=torch.tensor(0.1), foreach=False),
        "SGD without momentum": lambda: of_layers(torch.optim.SGD, lr=0.1),
        "SGD with momentum": lambda: of_layers(torch.optim.SGD, lr=0.1, momentum=0.9),
        "RMSprop without momentum": lambda: of_layers(torch.optim.RMSprop),
        "Adafactor, eps": lambda: of_layers(torch.optim.Adafactor, eps=(1e-30, 1e-3)),
        "Adafactor": lambda: of_layers(torch.optim.Adafactor),
        "LBFGS": lambda: torch.optim.LBFGS([parameter(3, 4), parameter(5)], line_search_fn="strong_wolfe"),
        "LBFGS, plain": lambda: torch.optim.LBFGS([parameter(3, 4), parameter(5)], max_eval=7),
        "NAdam": lambda: of_layers(torch.optim.NAdam, momentum_decay=0),
    }
    return layers


def stepped(make, **options):
    optimizer = make()
    return trained(optimizer, **options) if options["steps"] else optimizer


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("skip", [(), (0,), (1, 2)], ids=str)
@pytest.mark.parametrize("name", variants())
def test_states_that_are_ragged_for_a_reason_pass(name, skip, steps):
    make = variants()[name]
    skip = () if "LBFGS" in name else skip
    state_dict = state_of(stepped(make, steps=steps, skip=skip))
    for others in ((), (0,), (3,)):
        optimizer = stepped(make, steps=2, skip=() if "LBFGS" in name else others)
        assert fastopt.check(optimizer, state_dict, finite=True) == []
    assert fastopt.check(make(), state_dict, finite=True) == []


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.AdamW, [{}, {"amsgrad": True}, {"fused": True}]),
        (torch.optim.RMSprop, [{}, {"momentum": 0.9}, {"centered": True}]),
        (torch.optim.SGD, [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_optimizer_of_other_settings_now_passes(make, settings):
    """The load takes the saved settings over, so that only the keys which those ask for are read."""
    for saved_by in settings:
        for now in settings:
            state_dict = state_of(trained(of_layers(make, **saved_by)))
            optimizer = trained(of_layers(make, **now))
            assert fastopt.check(optimizer, state_dict) == []
            torch_load(optimizer, state_dict, copy=True)
            train(optimizer)


def test_momentum_that_is_not_there_yet_passes():
    """`SGD` makes a buffer where it finds None, or nothing; and keeps a sparse one for a sparse gradient."""
    optimizer = of_layers(torch.optim.SGD, lr=0.1, momentum=0.9)
    for value in ({"momentum_buffer": None}, {}, {"momentum_buffer": MATRIX.to_sparse()}):
        state_dict = state_of(trained(of_layers(torch.optim.SGD, lr=0.1, momentum=0.9)))
        state_dict["state"][0] = value
        assert fastopt.check(optimizer, state_dict) == []


def test_state_that_comes_later_passes():
    params = [parameter(3, 2), parameter(2, 3), parameter(4)]
    state = {i: {"m": torch.zeros_like(param)} for i, param in enumerate(params)}
    state[1]["late"] = torch.zeros(2, 3)
    optimizer = Bare(params)
    assert fastopt.check(optimizer, saved(state, range(3))) == []
    for param in params:
        optimizer.state[param] = {"m": torch.zeros_like(param), "later": torch.zeros_like(param)}
    assert fastopt.check(optimizer, saved(state, range(3))) == []


@pytest.mark.parametrize(
    ("ids", "keys", "text"),
    [
        ((0, 1), ("0", "1"), "structure: state under '0', '1', where the groups have the ids 0, 1"),
        (("0", "1"), (0, 1), "structure: state under 0, 1, where the groups have the ids '0', '1'"),
        (
            (0, 1),
            ("a.weight", "a.bias"),
            "structure: state under 'a.weight', 'a.bias', where the groups have the ids 0",
        ),
        ((0, 1), (0, "1"), "structure: state under '1', where the groups have the ids 1"),
    ],
)
def test_state_under_ids_of_another_type_is_found(ids, keys, text):
    state = {key: {"m": torch.zeros(2)} for key in keys}
    [problem] = fastopt.check(Bare([parameter(2), parameter(2)]), saved(state, ids))
    assert str(problem).startswith(text)


def test_state_of_the_whole_optimizer_passes():
    optimizer = Bare([parameter(2), parameter(2)])
    state = {"shared": {"n": 1}, "1": {"n": 2}, 0: {"m": torch.zeros(2)}, 1: {"m": torch.zeros(2)}}
    assert fastopt.check(optimizer, saved(state, (0, 1))) == []
    assert fastopt.check(optimizer, saved({"shared": {"n": 1}}, (0, 1))) == []


# ---- hyperparameters ----


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", "0.1"),
        ("lr", None),
        ("lr", [0.1]),
        ("lr", torch.ones(3)),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("betas", None),
        ("betas", ("0.9", 0.999)),
        ("amsgrad", "False"),
    ],
    ids=str,
)
def test_a_hyperparameter_of_another_kind_is_found(key, value):
    state_dict = state_of(trained(of_layers()))
    state_dict["param_groups"][0][key] = value
    [problem] = fastopt.check(of_layers(), state_dict)
    assert (problem.kind, problem.key) == ("structure", key)
    assert str(problem).startswith(f"structure: {key!r} of param group 0 is ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 1),
        ("lr", torch.tensor(0.1)),
        ("lr", numpy.float32(0.1)),
        ("betas", [0.9, 0.99]),
        ("betas", (torch.tensor(0.9), 0.99)),
        ("foreach", True),
        ("fused", None),
        ("amsgrad", 0),
        ("weight_decay", 0),
        ("initial_lr", "new"),
    ],
    ids=str,
)
def test_a_hyperparameter_of_a_kind_that_works_passes(key, value):
    state_dict = state_of(trained(of_layers()))
    state_dict["param_groups"][0][key] = value
    assert fastopt.check(of_layers(), state_dict) == []


def test_what_a_constructor_takes_none_for_may_be_none():
    class Clipped(torch.optim.SGD):
        def __init__(self, params, lr, clip=None):
            super().__init__(params, lr)
            for group in self.param_groups:
                group["clip"] = clip

    def clipped(clip):
        return Clipped([parameter(2)], 0.1, clip)

    assert fastopt.check(clipped(1.0), state_of(clipped(None))) == []
    assert fastopt.check(clipped(None), state_of(clipped(1.0))) == []
    assert [problem.key for problem in fastopt.check(clipped(1.0), state_of(clipped("1")))] == ["clip"]
