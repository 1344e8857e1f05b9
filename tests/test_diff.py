"""`fastopt.diff` and `fastopt.summary`; torch's arithmetic in float64 is the oracle."""

import copy as copying
import inspect
import json
import tracemalloc
from collections import Counter

import pytest
import torch

import fastopt
from tests.loads import saved, values
from tests.oracle import TORCH_STATE_DICT, Bare, adam, fingerprint, parameter, train, trained

pytestmark = pytest.mark.usefixtures("backend")

NAN, INF = float("nan"), float("inf")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def one(tensor):
    return saved({0: {"m": tensor}})


def both(a, b):
    result = fastopt.diff(one(a), one(b))
    return result, result.keys.get("m")


@pytest.mark.parametrize("value", values().values(), ids=values().keys())
def test_a_state_does_not_differ_from_itself_nor_from_its_copy(value):
    state_dict = saved({0: value})
    for other in (state_dict, copying.deepcopy(state_dict)):
        if not any(isinstance(item, object) and "Opaque" in repr(type(item)) for item in flat(value)):
            assert not fastopt.diff(state_dict, other), str(fastopt.diff(state_dict, other))


def flat(value):
    return value.values() if isinstance(value, dict) else [value]


def test_an_optimizer_is_compared_with_its_dict():
    optimizer = trained(adam())
    saved_state = copying.deepcopy(TORCH_STATE_DICT(optimizer))
    assert not fastopt.diff(optimizer, saved_state)
    assert str(fastopt.diff(optimizer, saved_state)) == "no difference, 9 tensors compared"
    train(optimizer)
    result = fastopt.diff(optimizer, saved_state)
    assert result
    assert set(result.keys) == {"step", "exp_avg", "exp_avg_sq"}
    assert result.keys["step"].absolute == 2
    json.dumps(result.to_dict())


@pytest.mark.parametrize("a_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("b_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (300, 500), (1, 3, 70_000)], ids=str)
def test_differences_are_those_of_float64(a_dtype, b_dtype, shape):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(shape, generator=generator).to(a_dtype)
    b = torch.where(torch.rand(shape, generator=generator) < 0.5, a.double(), a.double() * 1.5).to(b_dtype)
    result, seen = both(a, b)
    gaps = (a.double() - b.double()).abs()
    scales = torch.maximum(a.double().abs(), b.double().abs())
    assert (seen.tensors, seen.values, seen.different) == (1, a.numel(), int((gaps != 0).sum()))
    assert seen.absolute == gaps.max().item()
    assert seen.relative == (gaps / scales).nan_to_num(0.0).max().item()
    assert seen.same == (a_dtype == b_dtype and not seen.different)
    assert seen.dtypes == ({} if a_dtype == b_dtype else {(a_dtype, b_dtype): 1})
    assert bool(result) == (not seen.same)


@pytest.mark.parametrize(
    ("a", "b", "different", "absolute", "relative"),
    [
        ([NAN, 1.0], [NAN, 1.0], 0, 0, 0),
        ([NAN, 1.0], [NAN, 2.0], 1, 1, 0.5),
        ([NAN, 1.0], [0.0, 1.0], 1, INF, INF),
        ([INF, 1.0], [INF, 3.0], 1, 2, 2 / 3),
        ([INF, 1.0], [-INF, 1.0], 1, INF, INF),
        ([INF, 1.0], [5.0, 1.0], 1, INF, INF),
        ([0.0, -0.0], [-0.0, 0.0], 0, 0, 0),
        ([1.0, 0.0], [-1.0, 0.0], 1, 2, 2),
        ([1e-45, 0.0], [0.0, 0.0], 1, 1.401298464324817e-45, 1),
    ],
)
def test_odd_values(a, b, different, absolute, relative):
    seen = both(torch.tensor(a), torch.tensor(b))[1]
    assert (seen.different, seen.absolute, seen.relative) == (different, absolute, relative)


def test_integers_beyond_those_of_float64_differ():
    seen = both(torch.tensor([2**62]), torch.tensor([2**62 + 1]))[1]
    assert seen.different == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes(dtype):
    a, b = torch.tensor([0.0, 1.0, 1.0]).to(dtype), torch.tensor([0.0, 1.0, 0.0]).to(dtype)
    assert not fastopt.diff(one(a), one(a.clone()))
    seen = both(a, b)[1]
    assert (seen.different, seen.absolute) == (1, 1)


def test_tensors_that_are_not_contiguous():
    a = torch.randn(900, 800).T
    b = a.contiguous()
    assert not fastopt.diff(one(a), one(b))
    b[5, 6] += 1
    assert both(a, b)[1].different == 1


def test_what_cannot_be_compared_is_said():
    sparse, dense = torch.eye(2).to_sparse(), torch.eye(2)
    result = fastopt.diff(one(sparse), one(dense))
    assert result.others == ["m of parameter 0: float32 [2, 2] on cpu and float32 [2, 2] on cpu, not compared"]
    assert fastopt.diff(one(dense), one(torch.eye(3))).others
    assert fastopt.diff(one(dense), one("text")).others
    assert not fastopt.diff(one(sparse), one(sparse))


def test_structure():
    a = {
        "state": {0: {"m": 1, "deep": [1, 2]}, 1: {}, "x": {"y": 1}},
        "param_groups": [{"params": [0, 1], "lr": 1, "b": 2}],
    }
    b = {"state": {4: {"deep": [1], "v": 1}}, "param_groups": [{"params": [4], "lr": 2, "c": 3}, {"params": []}]}
    result = fastopt.diff(a, b)
    assert result.only_in_a == [
        "'b' of param group 0",
        "parameter 1",
        "id 'x'",
        "m of parameter 0",
        "deep[1] of parameter 0",
    ]
    assert result.only_in_b == ["param group 1", "'c' of param group 0", "v of parameter 0"]
    assert result.others == ["'lr' of param group 0: 1 and 2"]
    assert "only in a: 'b' of param group 0" in str(result)


def test_named_parameters_are_compared_by_name():
    params = {name: parameter(2) for name in "xyz"}
    a, b = Bare(list(params.items())), Bare([(name, params[name]) for name in "zxy"])
    for optimizer in (a, b):
        for name, param in params.items():
            optimizer.state[param] = {"m": torch.full((2,), float(ord(name)))}
    assert not fastopt.diff(a, b)
    del b.param_groups[0]["param_names"]
    assert fastopt.diff(a, b).keys["m"].different == 6


def test_hyperparameters_that_are_nan_are_the_same():
    assert not fastopt.diff(saved({}, lr=NAN), saved({}, lr=float("nan")))


def test_long_lists_are_cut_in_print_and_not_in_the_result():
    result = fastopt.diff(saved({}, range(9)), saved({}, ()))
    assert len(result.only_in_a) == 9
    assert "and 4 more only in a" in str(result)


@pytest.mark.parametrize("call", [lambda a, b: fastopt.diff(a, b), lambda a, b: fastopt.summary(a, values=True)])
def test_nothing_changes(call):
    optimizer, other = trained(adam()), trained(adam(), seed=1)
    before = fingerprint(optimizer), fingerprint(other)
    call(optimizer, other)
    assert (fingerprint(optimizer), fingerprint(other)) == before


# ---- summary ----


def test_summary_counts():
    optimizer = trained(adam((3, 4), (5,), (), lr=0.25))
    result = fastopt.summary(optimizer, values=True)
    assert (result.parameters, result.with_state, result.tensors) == (3, 3, 9)
    assert result.bytes == sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert [group.parameters for group in result.groups] == [2, 1]
    seen = result.keys["exp_avg"]
    every = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
    assert (seen.tensors, seen.values, seen.dtypes) == (3, 18, {torch.float32: 3})
    assert (seen.range.minimum, seen.range.maximum) == (every.min().item(), every.max().item())
    assert "lr=0.25" in str(result)
    assert "exp_avg_sq" in str(result)
    json.dumps(result.to_dict())


@pytest.mark.parametrize("size", [1, 5, 3 << 19], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.uint8], ids=str)
def test_ranges(dtype, size):
    tensors = [torch.arange(size).remainder(200).to(dtype) + i for i in range(3)]
    if dtype.is_floating_point:
        tensors.append(torch.tensor([NAN, INF, -INF, 250.0]).to(dtype))
        tensors.append(torch.tensor([NAN]).to(dtype))
    result = fastopt.summary(saved({i: {"m": t} for i, t in enumerate(tensors)}, range(len(tensors))), values=True)
    seen = result.keys["m"].range
    every = torch.cat([t.double() for t in tensors])
    finite = every[every.isfinite()]
    assert (seen.minimum, seen.maximum) == (finite.min().item(), finite.max().item())
    assert (seen.nan, seen.inf) == (int(every.isnan().sum()), int(every.isinf().sum()))


def test_state_of_all_kinds_is_counted():
    every = values()
    result = fastopt.summary(saved(dict(enumerate(every.values())), range(len(every))), values=True)
    assert result.keys["step"].tensors > 1
    assert result.keys["i"].others == Counter(int=1)
    assert None in result.keys
    json.dumps({key: str(value) for key, value in result.to_dict().items()})
    assert len(str(result).splitlines()) == 3 + len(result.keys)


def test_an_empty_state():
    assert (
        str(fastopt.summary(saved({})))
        == "1 parameter in 1 group, 0 with state: 0 tensors, 0 B\n  group 0: 1 parameter"
    )
    assert not fastopt.diff(saved({}), saved({}))


def test_many_groups_are_cut_in_print():
    state_dict = {"state": {}, "param_groups": [{"params": [i], "lr": i} for i in range(12)]}
    assert "and 7 more groups" in str(fastopt.summary(state_dict))
    assert len(fastopt.summary(state_dict).groups) == 12


def test_python_holds_no_list_of_the_values():
    tensor = torch.zeros(1 << 22)
    tensor[5] = NAN
    tracemalloc.start()
    fastopt.summary(one(tensor), values=True)
    fastopt.diff(one(tensor), one(tensor.clone()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_integers(dtype):
    a, b = torch.tensor([1, 2], dtype=dtype), torch.tensor([1, 5], dtype=dtype)
    assert (both(a, b)[1].different, both(a, b)[1].absolute) == (1, 3)
    assert both(a, b.to(torch.int64))[1].different == 1
    seen = fastopt.summary(one(b), values=True).keys["m"].range
    assert (seen.minimum, seen.maximum) == (1, 5)


def test_equal_tensors_without_numbers_do_not_differ():
    sparse = torch.eye(3).to_sparse()
    assert not fastopt.diff(one(sparse), one(sparse.clone()))
    meta = torch.zeros(3, device="meta")
    assert not fastopt.diff(one(meta), one(meta.clone()))


def test_empty_containers_are_values():
    assert fastopt.diff(one([]), one({})).others == ["m of parameter 0: [] and {}"]
    assert fastopt.diff(one([]), saved({0: {}})).only_in_a == ["m of parameter 0"]


def test_the_smallest_numbers():
    seen = both(torch.tensor([5e-324], dtype=torch.float64), torch.tensor([1e-323], dtype=torch.float64))[1]
    assert seen.relative == 0.5


def test_names_that_are_none():
    state_dict = {"state": {}, "param_groups": [{"params": [0], "param_names": None}]}
    assert not fastopt.diff(state_dict, state_dict)


def test_an_infinite_difference_is_explained():
    line = "  inf: one of the two values is NaN or infinite, and the other is not that"
    assert str(both(torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]))[0]).splitlines()[-1] == line
    assert line not in str(both(torch.tensor([1.0, NAN]), torch.tensor([2.0, NAN]))[0])


@pytest.mark.parametrize("function", [fastopt.diff, fastopt.summary])
def test_a_signature_shows_no_address(function):
    assert " at 0x" not in str(inspect.signature(function))
