"""`audit=True`: what torch's own cast does to each value, counted one by one in numpy, is the oracle."""

import math

import numpy
import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"

import fastopt
from fastopt import audit as auditing
from fastopt.backends import backend as backend_in_use
from tests.loads import FLOATING, saved, tensor
from tests.oracle import Bare, assert_same_load, fingerprint, parameter

pytestmark = pytest.mark.usefixtures("backend")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ONE = saved({0: {"m": torch.ones(3)}})


class Odd(torch.Tensor):
    """What its numbers mean is its own affair, and it can only be cast."""

    @classmethod
    def of(cls, size):
        return torch.ones(size).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.reshape, torch.split):
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


PAIRS = [(source, target) for source in FLOATING for target in FLOATING if source != target]


def expected(value, dtype):
    """One value after the other."""
    seen = fastopt.AuditCount()
    normal = torch.finfo(value.dtype).smallest_normal if value.is_floating_point() else 0
    after = value.to(dtype).double().reshape(-1).numpy()
    for was, now in zip(value.double().reshape(-1).numpy(), after, strict=True):
        seen.values += 1
        seen.nan += bool(math.isnan(was))
        seen.inf += bool(math.isinf(was))
        seen.overflowed += bool(math.isfinite(was) and math.isinf(now))
        seen.underflowed += bool(was != 0 and now == 0)
        seen.subnormal += bool(0 < abs(now) < torch.finfo(dtype).smallest_normal and abs(was) >= normal)
        if math.isfinite(was) and math.isfinite(now) and now != 0:
            with numpy.errstate(over="ignore"):
                seen.largest_error = max(seen.largest_error, float(abs(was - now) / abs(was)))
    return seen


def audit_of(value, dtype, **options):
    optimizer = Bare([parameter(3, dtype=dtype)])
    report = fastopt.load_state_dict(optimizer, saved({0: {"m": value}}), audit=True, **options)
    return report.audit


def assert_same_audit(actual, wanted):
    counts = ("values", "overflowed", "underflowed", "subnormal", "nan", "inf")
    assert {name: getattr(actual, name) for name in counts} == {name: getattr(wanted, name) for name in counts}
    assert actual.largest_error == pytest.approx(wanted.largest_error, rel=1e-6)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("size", [0, 1, 7, 511, 513, 1500])
def test_bit_patterns_of_all_kinds(source, target, size):
    value = tensor(size, dtype=source)
    [(key, seen)] = audit_of(value, target).items()
    assert key == ("m", source, target)
    assert_same_audit(seen, expected(value, target))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_edges(source, target):
    limits = [torch.finfo(dtype) for dtype in FLOATING]
    edges = [f(x) for x in limits for f in (lambda x: x.max, lambda x: x.smallest_normal, lambda x: x.tiny * x.eps)]
    near = [edge * factor for edge in edges for factor in (0.25, 0.5, 0.75, 1 - 1e-3, 1, 1 + 1e-3, 1.5)]
    values = torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan, *near], dtype=F64)
    value = torch.cat([values, -values]).to(source)
    assert_same_audit(audit_of(value, target)["m", source, target], expected(value, target))


@pytest.mark.parametrize(("source", "target"), [(F32, BF16), (F32, F16), (F64, F16), (F16, F32)])
def test_the_odd_value_in_a_large_ordinary_tensor_is_found_wherever_it_is(source, target, monkeypatch):
    monkeypatch.setattr(auditing, "CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    value = torch.rand(200_001, generator=generator).add(0.5).to(source)
    places = torch.randperm(value.numel(), generator=generator)[:40]
    value[places] = torch.tensor([1e-30, 1e30, 0, math.nan, math.inf, -1e-7, 1e5, 3e-5], dtype=F64).to(source).repeat(5)
    assert_same_audit(audit_of(value, target)["m", source, target], expected(value, target))


def test_tensors_under_one_key_are_counted_together_and_keys_apart():
    params = [parameter(3, dtype=BF16) for _ in range(3)]
    value = {"a": tensor(5), "b": [tensor(3), {"c": tensor(2)}], "step": torch.tensor(3.0), "d": tensor(4, dtype=BF16)}
    state = {0: value, 1: {"a": tensor(2000, seed=1)}, 2: tensor(3, seed=2)}
    report = fastopt.load_state_dict(Bare(params), saved(state, params=range(3)), audit=True)
    counts = {key: seen.values for key, seen in report.audit.items()}
    assert counts == {("a", F32, BF16): 2005, ("b", F32, BF16): 5, (None, F32, BF16): 3}


@pytest.mark.parametrize("options", [{"copy": False}, {"policy": {"m": F16}}, {"donate": True}])
def test_other_options_do_not_matter(options):
    value = tensor(3000)
    dtype = F16 if "policy" in options else BF16
    assert_same_audit(audit_of(value, BF16, **options)["m", F32, dtype], expected(value, dtype))


@pytest.mark.parametrize("value", [torch.arange(300), tensor(40, dtype=torch.float8_e5m2), tensor(9, 9).t()[::2]])
def test_what_has_no_kernel(value):
    [(key, seen)] = audit_of(value, BF16).items()
    assert key == ("m", value.dtype, BF16)
    assert_same_audit(seen, expected(value, BF16))


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("value", [tensor(3, dtype=torch.complex64), torch.eye(3).to_sparse(), Odd.of(5)], ids=str)
def test_what_cannot_be_looked_at_is_loaded_all_the_same_and_counted(value):
    optimizer = Bare([parameter(3, dtype=BF16)])
    state_dict = saved({0: {"m": value, "n": torch.ones(3)}})
    report = fastopt.load_state_dict(optimizer, state_dict, copy=False, audit=True)
    assert {key for key, _, _ in report.audit} == {"n"}
    assert report.unaudited == 1
    assert "  not audited, as not plain real numbers: 1 tensor" in str(report).splitlines()
    assert next(iter(optimizer.state.values()))["m"].dtype is BF16


def test_on_a_device_without_values_there_is_nothing_to_look_at():
    report = fastopt.load_state_dict(
        Bare([torch.nn.Parameter(torch.ones(3, dtype=BF16, device="meta"))]), ONE, audit=True
    )
    assert (report.audit, report.unaudited, report.emptied) == ({}, 1, 1)


def test_under_the_fake_mode_there_is_nothing_to_look_at():
    with FakeTensorMode(allow_non_fake_inputs=True):
        state_dict = saved({0: {"m": torch.ones(3)}})
        report = fastopt.load_state_dict(Bare([parameter(3, dtype=BF16)]), state_dict, copy=False, audit=True)
    assert (report.audit, report.unaudited) == ({}, 1)


def test_of_a_distributed_tensor_each_process_looks_at_its_part():
    dist.init_process_group("fake", rank=1, world_size=4)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (4,))
        param = torch.nn.Parameter(DTensor.from_local(torch.zeros(3, dtype=F16), mesh, [Shard(0)]))
        part = torch.tensor([1.0, 1e-30, 1e30])
        optimizer = Bare([param])
        report = fastopt.load_state_dict(
            optimizer, saved({0: {"m": DTensor.from_local(part, mesh, [Shard(0)])}}), audit=True
        )
        assert_same_audit(report.audit["m", F32, F16], expected(part, F16))
        assert optimizer.state[param]["m"].dtype is F16
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_result_is_that_of_a_load_without(dtype, copy):
    state_dict = saved({0: {"a": tensor(5000), "b": tensor(7), "step": torch.tensor(3.0)}})
    param = parameter(3, dtype=dtype)
    one, other = Bare([param]), Bare([param])
    before = fingerprint(state_dict)
    fastopt.load_state_dict(one, state_dict, copy=copy, audit=True)
    fastopt.load_state_dict(other, state_dict, copy=copy)
    assert fingerprint(state_dict) == before
    assert_same_load(one, other, given=state_dict, given_to_torch=state_dict, copy=copy)


def test_without_there_is_no_audit():
    report = fastopt.load_state_dict(Bare([parameter(3, dtype=BF16)]), saved({0: {"m": tensor(3)}}))
    assert report.audit is None
    assert "audit" not in str(report)


def test_a_second_moment_that_vanishes_is_found_before_the_loss_explodes():
    """A model in float16, resumed from float32 moments: torch casts them without a word."""

    def losses(optimizer, model, steps):
        found = []
        for seed in range(steps):
            batch = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)).to(model.weight.dtype)
            optimizer.zero_grad()
            loss = 1e-3 * (model(batch) - batch[:, :4]).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-8)
    start = losses(optimizer, model, 50)[-1]
    state_dict = optimizer.state_dict()

    half = torch.nn.Linear(8, 4).to(F16)
    half.load_state_dict(model.state_dict())
    resumed = torch.optim.Adam(half.parameters(), lr=1e-3, eps=1e-8)
    report = fastopt.load_state_dict(resumed, state_dict, audit=True)
    vanished = report.audit["exp_avg_sq", F32, F16].underflowed
    values = sum(state["exp_avg_sq"].numel() for state in state_dict["state"].values())
    assert values // 2 < vanished <= values
    [warning] = [line for line in str(report).splitlines() if "WARNING" in line]
    assert f"root of exp_avg_sq, and {vanished:,} of it became zero" in warning

    kept = torch.nn.Linear(8, 4).to(F16)
    kept.load_state_dict(model.state_dict())
    careful = torch.optim.Adam(kept.parameters(), lr=1e-3, eps=1e-8, foreach=False)
    report = fastopt.load_state_dict(careful, state_dict, policy="keep", audit=True)
    assert report.audit == {}
    assert "WARNING" not in str(report)

    exploded = losses(resumed, half, 3)
    assert not all(loss < 10 * start for loss in exploded)


def test_the_report_says_what_was_lost():
    value = torch.tensor([1.0, 1e30, 1e-30, 1e-7, math.nan, math.inf, -math.inf])
    optimizer = Bare([parameter(7, dtype=F16)])
    report = fastopt.load_state_dict(optimizer, saved({0: {"m": value, "ok": torch.ones(3)}}), audit=True)
    lines = str(report).splitlines()
    assert any(
        "audit of 7 values of m, float32 to float16: 1 overflowed to infinity, 1 underflowed to zero" in line
        and "1 became subnormal, 1 were NaN, 2 were infinite" in line
        for line in lines
    )
    assert "  audit of 3 values of ok, float32 to float16: none lost, largest relative error 0" in lines
    assert report.audit["m", F32, F16].lost == 3
    assert backend_in_use().name in lines[0]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, -0x400000], ids=hex)
@pytest.mark.parametrize("target", [torch.float64, BF16, F16], ids=str)
def test_nans_of_all_bits_hide_nothing(bits, target):
    value = torch.ones(4096)
    value[5] = math.inf
    value.view(torch.int32)[5 + 16] = bits  # the same lane of a vector
    optimizer = Bare([parameter(3, dtype=target)])
    report = fastopt.load_state_dict(optimizer, saved({0: {"m": value}}), audit=True)
    [count] = report.audit.values()
    assert (count.values, count.nan, count.inf) == (4096, 1, 1)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_lone_nan_is_found_wherever_it_is(source, target):
    """All of its bits are set, as in those that CUDA makes: rounded as a number it would be zero."""
    places = [0, 40, 1024, 1025, 1039, 1050, 1052]
    value = torch.ones(len(places), 1053, dtype=source)
    words = value.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[source.itemsize])
    for row, place in zip(words, places, strict=True):
        row[place] = torch.iinfo(words.dtype).max
    optimizer = Bare([parameter(3, dtype=target)])
    state = {f"row {place}": row.clone() for row, place in zip(value, places, strict=True)}
    report = fastopt.load_state_dict(optimizer, saved({0: state}), audit=True)
    assert [(seen.values, seen.nan) for seen in report.audit.values()] == [(1053, 1)] * len(places)


@pytest.mark.parametrize("target", [BF16, F16], ids=str)
def test_zeros_are_neither_lost_nor_do_they_hide_what_is(target):
    value = torch.zeros(5000)
    value[100:200] = 1 + 2**-9
    value[4000] = 1e-42
    optimizer = Bare([parameter(3, dtype=target)])
    report = fastopt.load_state_dict(optimizer, saved({0: {"m": value}}), audit=True)
    [count] = report.audit.values()
    assert (count.underflowed, count.overflowed) == (1, 0)
