"""What is saved, `torch.load(weights_only=True)` reads; what it would not read is refused. It is the oracle itself."""

import collections
import copyreg
import datetime
import decimal
import enum
import fractions
import io
import os
import pathlib
import pickle
import pkgutil
import uuid

import numpy
import pytest
import torch
from torch.serialization import safe_globals
from torch.testing._internal.two_tensor import TwoTensor

import fastopt
from fastopt.files import dcp_tree, formats, torch_globals, torch_readable
from tests import dcp
from tests.oracle import TORCH_STATE_DICT, Comparison, adam, fingerprint, outcome, trained

pytestmark = pytest.mark.usefixtures("backend")

NAMES = ("a.pt", "a.dcp")
Named = collections.namedtuple("Named", "a b")


class Setting:
    """A class of the user's."""

    def __init__(self):
        self.value = 1.5


class Mapping(dict):
    """Another."""


class Level(enum.Enum):
    LOW = 1


class Sum:
    """One that wants its tensor to have values."""

    def __init__(self):
        self.tensor = torch.ones(3)

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.total = self.tensor.sum().item()


def with_attribute(value):
    tensor = torch.ones(3)
    tensor.attribute = value
    return tensor


def ordered(**attributes):
    value = collections.OrderedDict(a=torch.ones(2), b=[1])
    value.__dict__.update(attributes)
    return value


VALUES = {
    "float64": numpy.float64(0.25),
    "float32": numpy.float32(0.25),
    "int64": numpy.int64(3),
    "bool": numpy.bool_(True),
    "array": numpy.ones(3),
    "a dtype of numpy's": numpy.dtype("f4"),
    "below": {"a": [1, (numpy.float64(1), 2)]},
    "key": {numpy.int64(1): 2},
    "ordered": ordered(),
    "ordered with an attribute": ordered(extra=1),
    "ordered around another": collections.OrderedDict(a=numpy.float64(1)),
    "counter": collections.Counter("abca"),
    "default": collections.defaultdict(int, a=1),
    "empty default": collections.defaultdict(int),
    "sizes": torch.Size([1, 2]),
    "dtypes": (torch.float32, torch.bfloat16, torch.quint8, torch.float8_e8m0fnu),
    "device": torch.device("cpu"),
    "layout": torch.strided,
    "bytes": b"abc",
    "no bytes": b"",
    "bytearray": bytearray(b"abc"),
    "set": {1, "a"},
    "a set of others": {numpy.float64(1)},
    "frozenset": frozenset({1}),
    "complex": 1 + 2j,
    "long": 2 ** (255 * 8 - 1) - 1,
    "too long": 2 ** (255 * 8 - 1),
    "negative, too long": -(2 ** (255 * 8)),
    "true": True,
    "namedtuple": Named(1, 2),
    "deque": collections.deque([1], maxlen=3),
    "range": range(3),
    "slice": slice(1, 2),
    "ellipsis": ...,
    "decimal": decimal.Decimal(1),
    "fraction": fractions.Fraction(1, 3),
    "date": datetime.date(2020, 1, 1),
    "path": pathlib.PurePosixPath("a"),
    "uuid": uuid.UUID(int=1),
    "enum": Level.LOW,
    "class": Setting,
    "function": len,
    "object": Setting(),
    "mapping": Mapping(a=1),
    "empty mapping": Mapping(),
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "buffer": torch.nn.Buffer(torch.ones(3)),
    "attribute": with_attribute([1, "a"]),
    "attribute of numpy's": with_attribute(numpy.float64(1)),
    "subclass": TwoTensor(torch.ones(3), torch.zeros(3)),
    "in a list": [[TwoTensor(torch.ones(3), torch.zeros(3))]],
    "sparse": torch.eye(3).to_sparse(),
    "storage": torch.ones(3).untyped_storage(),
    "generator's state": torch.Generator().get_state(),
}


def torch_reads(value):
    """Whether torch saves a value, and reads it again."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
    except TypeError:
        return False
    file.seek(0)
    _, error = outcome(lambda: torch.load(file, weights_only=True))
    assert error is None or isinstance(error, pickle.UnpicklingError)
    return error is None


def with_value(value, where):
    optimizer = trained(adam())
    holder = optimizer.param_groups[1] if where == "group" else optimizer.state[optimizer.param_groups[0]["params"][0]]
    holder["odd"] = value
    return optimizer


@pytest.mark.parametrize("where", ["group", "state"])
@pytest.mark.parametrize("value", VALUES.values(), ids=list(VALUES))
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_what_torch_would_not_read_is_refused(tmp_path, where, value):
    path = tmp_path / "a.pt"
    fastopt.save(trained(adam()), path)
    before = path.read_bytes()
    _, error = outcome(lambda: fastopt.save(with_value(value, where), path))
    if torch_reads(value):
        assert error is None
        torch.load(path, weights_only=True)
    else:
        assert type(error) is TypeError
        assert ("param_groups[1]['odd']" if where == "group" else "state[0]['odd']") in str(error)
        assert "is of type " in str(error)
        assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("value", VALUES.values(), ids=list(VALUES))
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_so_it_is_with_folders(tmp_path, value):
    """Whose entries torch saves and reads one by one; of tensors it saves the values alone."""
    if isinstance(value, torch.Tensor) and value.is_sparse:
        pytest.skip("a folder holds no sparse tensors")
    entries = [entry for _, entry in dcp_tree.leaves({"odd": value})]
    entries = [entry.detach() if isinstance(entry, torch.Tensor) else entry for entry in entries]
    path = tmp_path / "a.dcp"
    fastopt.save(trained(adam()), path)
    before = (path / ".metadata").read_bytes()
    _, error = outcome(lambda: fastopt.save(with_value(value, "group"), path))
    if all(map(torch_reads, entries)) and value is not VALUES["key"]:
        assert error is None
        formats.read(path, verify=True)
    else:
        assert type(error) is TypeError
        assert "param_groups[1]['odd']" in str(error).replace("['param_groups']", "param_groups")
        assert (path / ".metadata").read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_the_error_says_where_and_what_and_what_to_do(tmp_path):
    optimizer = with_value(numpy.float64(0.25), "group")
    with pytest.raises(TypeError) as caught:
        fastopt.save(optimizer, tmp_path / "a.pt")
    assert str(caught.value) == (
        "param_groups[1]['odd'] is of type numpy.float64, and torch.load(weights_only=True) would not read the file: "
        "it would name numpy._core.multiarray.scalar, numpy.dtype, numpy.dtypes.Float64DType; save another value, or "
        "allow these by torch.serialization.add_safe_globals, here and where the file is loaded"
    )
    assert caught.value.__notes__ == [f"while writing {tmp_path / 'a.pt'}"]
    optimizer = with_value([1, {numpy.int64(3): 1}], "group")
    with pytest.raises(
        TypeError, match=r"the key np\.int64\(3\) of param_groups\[1\]\['odd'\]\[1\] is of type numpy\.int64"
    ):
        fastopt.save(optimizer, tmp_path / "a.pt")


@pytest.mark.parametrize(
    "save",
    [
        lambda optimizer, path: fastopt.save(optimizer, path, background=True).result(),
        lambda optimizer, path: fastopt.snapshot(optimizer).save(path),
        lambda optimizer, path: fastopt.save(optimizer, path, dtype=torch.bfloat16),
    ],
)
def test_every_way_to_save_refuses(tmp_path, save):
    with pytest.raises(TypeError, match=r"numpy\.float64"):
        save(with_value(numpy.float64(1), "group"), tmp_path / "a.pt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value", [Setting(), Sum(), numpy.float64(0.25), {"a": [Setting()]}], ids=lambda v: type(v).__name__
)
def test_what_the_user_has_allowed_is_saved(tmp_path, name, value):
    optimizer, loaded = with_value(value, "group"), adam()
    with pytest.raises(TypeError):
        fastopt.save(optimizer, tmp_path / name)
    allowed = [Setting, Sum, numpy._core.multiarray.scalar, numpy.dtype, numpy.dtypes.Float64DType]
    with safe_globals(allowed):
        fastopt.save(optimizer, tmp_path / name)
        fastopt.load(loaded, tmp_path / name)
    assert type(loaded.param_groups[1]["odd"]) is type(value)
    with pytest.raises(fastopt.UnsafeGlobalsError):
        fastopt.load(loaded, tmp_path / name)
    fastopt.load(loaded, tmp_path / name, safe_globals=allowed)


def test_what_is_allowed_and_not_read_all_the_same_is_refused(tmp_path):
    """torch puts items into no other dicts than its own three kinds."""
    with safe_globals([Mapping]), pytest.raises(TypeError, match="SETITEM"):
        fastopt.save(with_value(Mapping(a=1), "group"), tmp_path / "a.pt")


def test_an_object_that_cannot_be_pickled_is_named(tmp_path):
    optimizer = with_value([1, lambda: 0], "state")
    with pytest.raises(Exception, match="pickle") as caught:
        fastopt.save(optimizer, tmp_path / "a.pt")
    assert "at state[0]['odd'][1]" in caught.value.__notes__
    assert os.listdir(tmp_path) == []


def test_torchs_next_load_does_not_validate_what_was_looked_at(tmp_path):
    fastopt.save(with_value(with_attribute(torch.eye(3).to_sparse()), "group"), tmp_path / "a.pt")
    assert torch._utils._sparse_tensors_to_validate == []


def test_a_plain_state_is_not_pickled_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_readable, "pickled", lambda _: pytest.fail("it is"))
    fastopt.save(with_value(ordered(), "state"), tmp_path / "a.pt")
    fastopt.save(with_value(torch.nn.Parameter(torch.ones(1)), "state"), tmp_path / "a.pt")


# ---- what a file needs ----

NEEDY = {
    "scalar": numpy.float64(0.25),
    "scalars": [numpy.float32(1), numpy.int8(2), numpy.bool_(True), numpy.float32(2)],
    "array": numpy.ones(3),
    "text": numpy.str_("a"),
    "structured": numpy.zeros(2, dtype=[("a", "f4")]),
    "object": Setting(),
    "objects": {"a": Setting(), "b": (numpy.float64(1), TwoTensor(torch.ones(1), torch.ones(1)))},
    "enum": Level.LOW,
}


@pytest.mark.parametrize("kind", ["zip", "legacy", "dcp"])
@pytest.mark.parametrize("value", NEEDY.values(), ids=list(NEEDY))
def test_all_that_a_file_needs_is_listed_at_once(tmp_path, kind, value):
    path = tmp_path / "a"
    saved = TORCH_STATE_DICT(trained(adam()))
    content = {**saved, "odd": value}
    if kind == "dcp":
        dcp.torch_save(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    optimizer = adam()
    before = fingerprint(optimizer)
    with pytest.raises(fastopt.UnsafeGlobalsError, match=r"pass them as safe_globals=\[\.\.\.\]") as caught:
        fastopt.load(optimizer, path)
    assert isinstance(caught.value, pickle.UnpicklingError)
    assert str(path) in caught.value.where
    assert fingerprint(optimizer) == before
    fastopt.load(optimizer, path, safe_globals=[pkgutil.resolve_name(name) for name in caught.value.names])
    Comparison().same(TORCH_STATE_DICT(optimizer)["state"].keys(), saved["state"].keys())
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.names) == (str(caught.value), caught.value.names)


def test_only_what_is_not_allowed_yet_is_listed(tmp_path):
    odd = [
        Setting(),
        numpy.float64(1),
        {1},
        1j,
        b"a",
        bytearray(b"a"),
        ordered(),
        torch.Size([1]),
        torch.eye(2).to_sparse(),
    ]
    torch.save({"state": {}, "param_groups": [], "odd": odd}, tmp_path / "a.pt")
    with pytest.raises(fastopt.UnsafeGlobalsError) as caught:
        fastopt.load(adam(), tmp_path / "a.pt", safe_globals=[Setting, numpy.dtype])
    assert list(caught.value.names) == ["numpy._core.multiarray.scalar", "numpy.dtypes.Float64DType"]


def test_what_names_are_looked_for_in_calls_nothing(monkeypatch):
    """Not by a number of `copyreg` either, which goes past `find_class` once the process has used it."""
    called = []
    monkeypatch.setitem(copyreg._extension_cache, 0x70, lambda: called.append(1))
    assert torch_globals.unsafe_globals_in(b"\x80\x02\x82\x70)R.") == []
    assert not called
