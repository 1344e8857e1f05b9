"""States as JSON and back, with their types."""

import collections
import enum
import json
import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from fastopt.files.metadata import DEPTH, decode, encode, place
from tests.oracle import Comparison


def refer(tensor, path):
    return {"$tensor": ".".join(map(str, path))}


def there_and_back(value):
    return decode(json.dumps(encode(value, refer), allow_nan=False), lambda reference: None)


VALUES = [
    None,
    True,
    0,
    -1,
    2**53,
    2**53 + 1,
    -(2**63),
    0.0,
    -0.0,
    0.1,
    5e-324,
    1e308,
    1.0,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "äöü ☃ \0 \ud800 \U0001f600 \"'",
    "$tensor",
    b"",
    b"\0\xff",
    [],
    (),
    {},
    [[1, (2.0, [None])], ()],
    {"a": {"b": [1]}, "": 1},
    {0: {"step": 1}, "0": 2, True: 3, None: 4, 2.5: 5, b"x": 6, (1, (2, "a")): 7},
    {"$tensor": "state.0.exp_avg"},
    {"$dict": [[1, 2]]},
    {"a": 1, "$b": 2},
    {math.inf: 1},
    torch.float32,
    torch.float8_e8m0fnu,
    torch.device("cuda", 3),
    torch.device("cpu"),
    torch.Size([2, 0, 3]),
    torch.Size([]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_and_their_types(value):
    for given_value in (value, [value], (value,), {"key": value}, {3: value}):
        back = there_and_back(given_value)
        Comparison().same(back, given_value)
        if isinstance(given_value, dict):
            assert list(back) == list(given_value)


def test_integers_beyond_what_python_prints():
    for value in (10**5000, -(10**5000)):
        assert there_and_back([value]) == [value]


ATOMS = some.none() | some.booleans() | some.integers() | some.floats() | some.text() | some.binary()
TREES = some.recursive(
    ATOMS,
    lambda inner: (
        some.lists(inner)
        | some.lists(inner).map(tuple)
        | some.dictionaries(some.text() | some.just("$int"), inner)
        | some.dictionaries(ATOMS.filter(lambda key: key == key), inner)
    ),
)


@given(TREES)
def test_any_tree(value):
    assert repr(there_and_back(value)) == repr(value)


def test_a_tensor_is_what_its_name_stands_for():
    tensor = torch.zeros(2)
    tree = encode({"state": {3: {"exp_avg": tensor}}}, refer)
    assert tree == {"state": {"$dict": [[3, {"exp_avg": {"$tensor": "state.3.exp_avg"}}]]}}
    found = decode(json.dumps(tree), lambda reference: {"state.3.exp_avg": tensor}[reference["$tensor"]])
    assert found["state"][3]["exp_avg"] is tensor


class Number(enum.IntEnum):
    ONE = 1


class Text(str):
    pass


Pair = collections.namedtuple("Pair", "a b")

REFUSED = [
    {1},
    frozenset(),
    1j,
    numpy.float64(1),
    numpy.zeros(2),
    Number.ONE,
    Text("a"),
    Pair(1, 2),
    collections.OrderedDict(a=1),
    collections.defaultdict(dict),
    collections.deque(),
    range(3),
    torch.strided,
    object(),
    max,
    torch.nn.Module,
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_other_types_are_refused_with_their_place(value):
    with pytest.raises(TypeError) as caught:
        encode({"state": {3: {"foo": [0, value]}}}, refer)
    kind = type(value)
    assert str(caught.value).startswith(f"state[3]['foo'][1] is of type {kind.__module__}.{kind.__qualname__}; ")


def test_keys_are_refused_with_their_place():
    with pytest.raises(TypeError, match=r"^state\[3\]\[frozenset\(\)\] is of type builtins\.frozenset"):
        encode({"state": {3: {frozenset(): 1}}}, refer)
    with pytest.raises(TypeError, match=r"^state\[3\] has a tensor as a key"):
        encode({"state": {3: {torch.zeros(1): 1}}}, refer)


def test_what_contains_itself_is_refused():
    value = {"state": {}}
    value["state"]["again"] = value
    with pytest.raises(
        ValueError, match=r"^state\['again'\]\['state'\] nests more than 64 levels deep, or contains itself"
    ):
        encode(value, refer)


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {1: value}])
def test_depth(wrap):
    value = 1
    for _ in range(DEPTH):
        value = wrap(value)
    assert there_and_back(value) == value
    for _ in range(2):
        value = wrap(value)
    with pytest.raises(ValueError, match="nests more than"):
        encode(value, refer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[Infinity]",
        '{"a": 1, "a": 2}',
        '{"$tuple": 3}',
        '{"$tuple": {}}',
        '{"$tuple": [], "$list": []}',
        '{"$dict": [[1, 2], [1, 3]]}',
        '{"$dict": [[1, 2], [true, 3]]}',
        '{"$dict": [[1]]}',
        '{"$dict": [[[], 1]]}',
        '{"$dict": {"a": 1}}',
        '{"$dict": ["ab", 7]}',
        '{"$int": 3}',
        '{"$int": "x"}',
        '{"$float": "1.5"}',
        '{"$float": []}',
        '{"$bytes": "?"}',
        '{"$bytes": 3}',
        '{"$dtype": "Tensor"}',
        '{"$dtype": "os"}',
        '{"$dtype": {}}',
        '{"$device": "nowhere:0"}',
        '{"$device": []}',
        '{"$size": [1.5]}',
        '{"$size": "12"}',
        '{"$eval": "1"}',
        '{"$": 1}',
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 100_000,
        "1" * 10_000,
    ],
    ids=lambda text: text[:30],
)
def test_what_was_not_encoded_is_an_error(text):
    with pytest.raises(ValueError):  # noqa: PT011
        decode(text, lambda reference: torch.zeros(1))


def test_places():
    assert place(("state", 3, "a b", 0)) == "state[3]['a b'][0]"
    assert place((0, "a")) == "[0]['a']"
    assert place(()) == "the content"
