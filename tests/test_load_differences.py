"""What differs from torch on purpose in `load_state_dict()`, and what its errors add."""

import collections
from collections import deque

import numpy
import pytest
import torch

import fastopt
from tests.loads import Point, saved, tensor
from tests.oracle import TORCH_LOAD_STATE_DICT, Bare, Comparison, assert_same_error, outcome, parameter, torch_load

pytestmark = pytest.mark.usefixtures("backend")


def test_str_stays_the_string_it_is(copy):
    optimizer = Bare([parameter(2)])
    value = {"name": "adam", "list": ["a", ("b",), {"c"}], "sub": type("Str", (str,), {})("s"), "np": numpy.str_("n")}
    fastopt.load_state_dict(optimizer, saved({0: value}), copy=copy)
    torchs = Bare([parameter(2)])
    torch_load(torchs, saved({0: {"name": "adam"}}), copy=copy)
    (loaded,), (loaded_by_torch,) = optimizer.state.values(), torchs.state.values()
    assert loaded_by_torch["name"].startswith("<generator")
    assert loaded == value
    assert list(map(type, loaded.values())) == list(map(type, value.values()))


def test_bare_str_as_the_whole_state(copy):
    optimizer = Bare([parameter(2)])
    fastopt.load_state_dict(optimizer, saved({0: "state"}), copy=copy)
    assert list(optimizer.state.values()) == ["state"]


@pytest.mark.parametrize("value", [range(2, 9, 3), Point(1, 2), numpy.arange(3), numpy.array("text"), numpy.zeros(())])
def test_kept_where_torch_raises(value, copy):
    with pytest.raises(TypeError):
        torch_load(Bare([parameter(2)]), saved({0: {"a": value}}), copy=copy)
    optimizer = Bare([parameter(2)])
    fastopt.load_state_dict(optimizer, saved({0: {"a": value, "list": [value]}}), copy=copy)
    ((loaded, (item,)),) = (state.values() for state in optimizer.state.values())
    for result in (loaded, item):
        assert type(result) is type(value)
        assert repr(result) == repr(value)
    if isinstance(value, numpy.ndarray):
        assert loaded is item
        assert (loaded is value) != copy
        assert numpy.shares_memory(loaded, value) != copy


def test_namedtuple_is_rebuilt_with_its_fields_cast(copy):
    optimizer = Bare([parameter(2)])
    value = Point(tensor(2, dtype=torch.float64), [tensor(2)])
    fastopt.load_state_dict(optimizer, saved({0: value}), copy=copy)
    as_tuple = Bare([parameter(2)])
    torch_load(as_tuple, saved({0: tuple(value)}), copy=copy)
    (loaded,), (expected,) = optimizer.state.values(), as_tuple.state.values()
    assert type(loaded) is Point
    Comparison().same(tuple(loaded), expected)


@pytest.mark.parametrize("maxlen", [None, 3, 5])
def test_deque_keeps_maxlen(maxlen, copy):
    value = deque([tensor(2, dtype=torch.float64), 1, tensor(2)], maxlen)
    optimizer, torchs = Bare([parameter(2)]), Bare([parameter(2)])
    fastopt.load_state_dict(optimizer, saved({0: value}), copy=copy)
    torch_load(torchs, saved({0: value}), copy=copy)
    (loaded,), (expected,) = optimizer.state.values(), torchs.state.values()
    assert type(loaded) is collections.deque
    assert loaded.maxlen == maxlen
    Comparison().same(list(loaded), list(expected))


class Counted(list):
    """A list that knows how often it was searched."""

    searches = 0

    def __contains__(self, item):
        Counted.searches += 1
        return super().__contains__(item)

    def __deepcopy__(self, memo):
        return list(self)


def test_id_lists_are_not_searched_for_every_tensor(copy):
    params = [parameter(2) for _ in range(20)]
    state = {i: {"step": tensor(), "a": tensor(2), "b": tensor(2, dtype=torch.float64)} for i in range(20)}
    state_dict = saved(state, range(20), capturable=True)
    state_dict["param_groups"][0]["params"] = Counted(range(20))
    Counted.searches = 0
    TORCH_LOAD_STATE_DICT(Bare(params), state_dict)
    searched_by_torch, Counted.searches = Counted.searches, 0
    fastopt.load_state_dict(Bare(params), state_dict, copy=copy)
    assert searched_by_torch >= len(params)
    assert Counted.searches == 0


def test_errors_name_parameter_key_dtype_and_shape(copy):
    weight, bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    broken = torch.empty(5, 7, dtype=torch.float16, device="meta")
    state_dict = saved({"w": {"exp_avg": tensor(2, 2)}, "b": {"first": tensor(2), "broken": broken}}, ["w", "b"])
    optimizer, torchs = Bare([("net.weight", weight), ("net.bias", bias)]), Bare([weight, bias])
    _, expected = outcome(lambda: torch_load(torchs, state_dict, copy=copy))
    _, error = outcome(lambda: fastopt.load_state_dict(optimizer, state_dict, copy=copy))
    assert_same_error(error, expected)
    notes = "\n".join(error.__notes__)
    for named in ("parameter 1", "'net.bias'", "'b'", "'broken'", "float16", "[5, 7]", "bfloat16", "[2]"):
        assert named in notes, notes


@pytest.mark.parametrize("wrap", [lambda t: [t], lambda t: {"deep": {"er": t}}, lambda t: t, lambda t: {1: {t}}])
def test_errors_in_nested_values_are_named_as_well(wrap, copy):
    optimizer = Bare([parameter(2), parameter(3)])
    broken = torch.empty(5, 7, dtype=torch.float16, device="meta")
    _, error = outcome(lambda: fastopt.load_state_dict(optimizer, saved({0: {}, 1: wrap(broken)}, (0, 1)), copy=copy))
    notes = "\n".join(error.__notes__)
    for named in ("parameter 1", "float16", "[5, 7]", "float32", "[3]"):
        assert named in notes, notes
