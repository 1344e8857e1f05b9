"""Random nested states of all that a state can hold; the installed torch says what becomes of them.

What torch damages or refuses, and fastopt keeps on purpose, is disguised for torch as something that it lets pass; the
comparison takes the disguise off again.
"""

import copy as copying
from collections import OrderedDict, defaultdict, deque, namedtuple

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastopt
from tests.oracle import (
    Bare,
    Disguise,
    assert_same_error,
    assert_same_load,
    disguise_type,
    fingerprint,
    leaves,
    outcome,
    parameter,
    torch_load,
)

Point = namedtuple("Point", "x y")
MAXLEN = 7


class BoundedDeque(deque):
    """Stands for a deque of a maxlen, which torch drops."""


class PointAsTuple(tuple):
    """Stands for a Point, for which torch raises."""


disguise_type(PointAsTuple, Point)
disguise_type(BoundedDeque, deque, MAXLEN)

PARAM_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int32,
)
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float32,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int64,
    torch.bool,
    torch.complex64,
)
SHAPES = ((), (0,), (3,), (2, 3), (4, 1, 2), (0, 5), (33,))


@st.composite
def dense_tensors(draw, dtypes=DTYPES):
    """Any bits, as NaN and infinities are values too."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def with_attribute(tensor):
    tensor.note = ["attached", tensor.dtype]
    return tensor


def with_grad(tensor):
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.clone().requires_grad_()


VIEWS = {
    "transposed": lambda t: t.mT if t.dim() >= 2 else t,
    "sliced": lambda t: t[..., ::2] if t.dim() else t,
    "tail": lambda t: t[1:] if t.dim() else t,
    "expanded": lambda t: t.unsqueeze(0).expand(3, *t.shape),
    "flat": lambda t: t.reshape(-1),
    "alias": lambda t: t.view(t.shape),
    "conj": lambda t: t.conj(),
    "real": lambda t: torch.view_as_real(t) if t.is_complex() else t,
    "neg": lambda t: torch._neg_view(t) if t.dtype in (torch.float32, torch.float64, torch.complex64) else t,
    "Parameter": lambda t: torch.nn.Parameter(t.detach(), requires_grad=False),
    "Buffer": lambda t: torch.nn.Buffer(t.detach()),
    "attribute": lambda t: with_attribute(t.clone()),
    "requires grad": with_grad,
    "no leaf": lambda t: with_grad(t) * 1,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse() if t.dim() and t.dtype in (torch.float32, torch.bfloat16, torch.int64) else t,
    "compressed": lambda t: t.to_sparse_csr() if t.dim() == 2 and t.dtype is torch.float32 else t,
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 3, torch.quint8) if t.dtype is torch.float32 else t,
}
HARMLESS = sorted(set(VIEWS) - {"meta", "no leaf", "compressed", "quantized"})


def tensors(pool):
    """A tensor of the pool itself, again and again, or a view of one."""

    def view(name, index):
        viewed, _ = outcome(lambda: VIEWS[name](pool[index % len(pool)]))
        return pool[index % len(pool)] if viewed is None else viewed

    index = st.integers(0, 50)
    names = st.one_of(*[st.sampled_from(HARMLESS)] * 12, st.sampled_from(sorted(VIEWS)))
    return st.one_of(index.map(lambda i: pool[i % len(pool)]), st.builds(view, names, index))


ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([2, 3]), int, numpy.float32(1.5), numpy.int64(3)]),
    st.builds(range, st.integers(0, 5), st.integers(0, 9)),
)
HASHABLE = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.tuples(st.integers(), st.text(max_size=1)))
ARRAYS = st.builds(
    lambda n, dtype: numpy.arange(n).astype(dtype), st.integers(0, 4), st.sampled_from(["f4", "i8", "U2", "?"])
)
KEYS = st.one_of(st.sampled_from(["step", "exp_avg", "a", "b"]), HASHABLE, st.floats(allow_nan=False))


def containers(items):
    lists = st.lists(items, max_size=4)
    dicts = st.dictionaries(KEYS, items, max_size=4)
    return st.one_of(
        lists,
        lists.map(tuple),
        lists.map(deque),
        lists.map(lambda values: deque(values, MAXLEN)),
        st.builds(Point, items, items),
        dicts,
        dicts,
        dicts.map(OrderedDict),
        dicts.map(lambda entries: defaultdict(list, entries)),
        st.sets(HASHABLE, max_size=3),
        st.frozensets(HASHABLE, max_size=3),
        items.map(lambda value: [value, value]),
    )


@st.composite
def states(draw):
    """(dtypes of the parameters, a state dict)"""
    pool = draw(st.lists(dense_tensors(), min_size=1, max_size=4))
    values = st.recursive(st.one_of(tensors(pool), tensors(pool), ATOMS, ARRAYS), containers, max_leaves=8)
    dtypes = draw(st.lists(st.sampled_from(PARAM_DTYPES), min_size=1, max_size=4))
    entries = st.one_of(st.dictionaries(KEYS, values, max_size=5), st.dictionaries(KEYS, values, max_size=5), values)
    ids = st.one_of(st.integers(0, len(dtypes)), st.sampled_from(["unknown", 2.0, True, (1, 2)]))
    state = draw(st.dictionaries(ids, entries, max_size=5))
    state = draw(st.sampled_from([dict, OrderedDict]))(state)
    flags = draw(st.sampled_from([{}, {}, {"capturable": True}, {"fused": True}]))
    group = {"params": list(range(len(dtypes))), **flags, "extra": draw(ATOMS)}
    return dtypes, {"state": state, "param_groups": [group]}


class Disguising:
    """The same state for torch: around the same tensors, and where one object stands twice, again one."""

    def __init__(self):
        self.known = {}

    def __call__(self, value):
        if id(value) not in self.known:
            self.known[id(value)] = self.disguised(value)
        return self.known[id(value)]

    def disguised(self, value):
        if isinstance(value, str | range | numpy.ndarray):
            return Disguise(value)
        if isinstance(value, Point):
            return PointAsTuple(map(self, value))
        if isinstance(value, deque):
            return (deque if value.maxlen is None else BoundedDeque)(map(self, value), value.maxlen)
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, {key: self(item) for key, item in value.items()})
        if isinstance(value, dict):
            return type(value)((key, self(item)) for key, item in value.items())
        if isinstance(value, list | tuple | set | frozenset) and not isinstance(value, torch.Size):
            return type(value)(map(self, value))
        return value


def disguised(state_dict):
    return {"state": Disguising()(state_dict["state"]), "param_groups": state_dict["param_groups"]}


def loaded(load, dtypes, state_dict, copy):
    optimizer = Bare([parameter(2, dtype=dtype) for dtype in dtypes])
    before = fingerprint(optimizer)
    _, error = outcome(lambda: load(optimizer, state_dict, copy=copy))
    if error is not None:
        assert fingerprint(optimizer) == before
    return optimizer, error


@pytest.mark.parametrize("copy", [True, False], ids=["copied", "shared"])
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(case=states())
def test_any_state_is_loaded_as_torch_loads_it(backend, copy, case):
    dtypes, state_dict = case
    given_to_torch = disguised(state_dict)
    before = fingerprint(state_dict)
    actual, error = loaded(fastopt.load_state_dict, dtypes, state_dict, copy)
    expected, torchs = loaded(torch_load, dtypes, given_to_torch, copy)
    assert_same_error(error, torchs, text=False)
    assert fingerprint(state_dict) == before
    assert_same_load(actual, expected, given=state_dict, given_to_torch=given_to_torch, copy=copy)


def fields(report):
    counts = {pair: vars(count) for pair, count in report.casts.items()}
    return counts, report.copied, report.shared, report.missing, report.unexpected, report.emptied


@pytest.mark.parametrize("copy", [True, False], ids=["copied", "shared"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=states())
def test_reports_of_both_backends_are_the_same(copy, case):
    dtypes, state_dict = case
    reports = []
    before = fastopt.backend().name
    for name in ("native", "python"):
        fastopt.backends.use(name)
        optimizer = Bare([parameter(2, dtype=dtype) for dtype in dtypes])
        report, error = outcome(lambda o=optimizer: fastopt.load_state_dict(o, copying.copy(state_dict), copy=copy))
        reports.append(type(error) if error else fields(report))
        if error is None and copy is False:
            known = [v for k, v in optimizer.state.items() if isinstance(k, torch.Tensor)]
            assert report.tensors == sum(isinstance(leaf, torch.Tensor) for leaf in leaves(known))
    fastopt.backends.use(before)
    assert reports[0] == reports[1]
