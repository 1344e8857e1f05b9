"""DTensors among what is loaded, copied and cast: as torch does it, and without an operation of torch's on any."""

import copy as copying
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.profiler import ProfilerActivity, profile

import fastopt
from fastopt import backends
from tests.distributed.ranks import Ranks
from tests.distributed.trainings import assert_same, optimizer_of, sharded, train, trained

pytestmark = pytest.mark.usefixtures("backend")

F32, BF16 = torch.float32, torch.bfloat16
CUT = 1
"""The index of a parameter of 5 rows and 4 columns."""
LAYOUTS = ["rows", "columns", "grid", "hybrid", "fsdp"]


class Counting(profile):
    """Notes the copies and casts that torch is asked for, one by one."""

    def __init__(self) -> None:
        super().__init__(activities=[ProfilerActivity.CPU])

    @property
    def seen(self) -> list[str]:
        return [event.name for event in self.events() if event.name in ("aten::to", "aten::clone", "aten::copy_")]


def no_operation_on_dtensors(counting: Counting) -> None:
    assert not counting.seen or backends.backend().name == "python", counting.seen


def values_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return list(optimizer.state.values())


def loads(layout: str, name: str, saved: torch.dtype, dtype: torch.dtype) -> None:
    content = trained(layout, name, saved)[1].state_dict()
    expected, actual = (optimizer_of(sharded(layout, dtype), name) for _ in range(2))
    expected.load_state_dict(copying.copy(content))
    before = copying.deepcopy(content)
    for copy in (False, True):
        with Counting() as counting:
            report = fastopt.load_state_dict(actual, content, copy=copy)
        no_operation_on_dtensors(counting)
        assert_same(values_of(actual), values_of(expected))
        parts = [tensor for entry in values_of(actual) for tensor in entry.values() if isinstance(tensor, DTensor)]
        assert all(not part.requires_grad for part in parts)
        written = sum(part.to_local().nbytes for part in parts)
        if saved != dtype:
            count = report.casts[saved, dtype]
            assert (count.tensors, count.bytes_written) == (len(parts), written)
        elif copy:
            assert report.copied == report.tensors
        memory = {tensor.to_local().data_ptr() for tensor in parts if tensor.to_local().numel()}
        given = {t.to_local().data_ptr() for e in content["state"].values() for t in e.values() if type(t) is DTensor}
        assert bool(memory & given) == (saved == dtype and not copy)
    assert_same(content, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_of_dtensors_is_loaded_as_torch_loads_it(layout: str, four_ranks: Ranks) -> None:
    for name in ("AdamW", "SGD"):
        for saved, dtype in ((F32, BF16), (BF16, F32), (F32, F32)):
            four_ranks.run(loads, layout, name, saved, dtype)


def two_dimensions(dtype: torch.dtype) -> torch.nn.Module:
    """Tensor parallel within, FSDP around: strided shards where both cut the same dimension."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)).to(dtype)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return model


def loads_in_two_dimensions() -> None:
    models = [two_dimensions(dtype) for dtype in (F32, BF16, BF16)]
    saving, expected, actual = (torch.optim.AdamW(model.parameters()) for model in models)
    models[0](torch.ones(4, 8)).square().mean().backward()
    saving.step()
    content = saving.state_dict()
    placements = {type(one).__name__ for entry in values_of(saving) for one in entry["exp_avg"].placements}
    assert "_StridedShard" in placements
    expected.load_state_dict(content)
    fastopt.load_state_dict(actual, content)
    assert_same(values_of(actual), values_of(expected))
    restored = copying.deepcopy(values_of(actual))
    snapshot = fastopt.snapshot(actual)
    fastopt.cast_state(actual, F32)
    snapshot.restore()
    assert_same(values_of(actual), restored)


def test_tensor_parallel_and_fsdp(four_ranks: Ranks) -> None:
    four_ranks.run(loads_in_two_dimensions)


def odd_placements() -> list[torch.Tensor]:
    """A sum that is pending, other placements than the parameter's, a full tensor, one that autograd knows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = torch.arange(20.0).view(5, 4) / 3
    gradual = distribute_tensor(values, mesh, [Shard(0)])
    return [
        DTensor.from_local(values, mesh, [Partial()]),
        distribute_tensor(values, mesh, [Replicate()]),
        distribute_tensor(values, mesh, [Shard(1)]),
        values,
        distribute_tensor(values.t(), mesh, [Shard(0)]).t(),
        gradual.requires_grad_(),
    ]


def loads_odd_placements() -> None:
    model = sharded("rows", BF16)
    content = trained("rows")[1].state_dict()
    for copy in (False, True):
        for value in odd_placements():
            content["state"][CUT]["exp_avg"] = value
            expected, actual = optimizer_of(model), optimizer_of(model)
            expected.load_state_dict(content)
            fastopt.load_state_dict(actual, content, copy=copy)
            assert_same(values_of(actual), values_of(expected))


def test_other_placements_and_full_tensors_stay_what_they_are_as_in_torch(two_ranks: Ranks) -> None:
    two_ranks.run(loads_odd_placements)


def loads_by_policy() -> None:
    content = trained("rows")[1].state_dict()
    kept, mixed = (optimizer_of(sharded("rows", BF16)) for _ in range(2))
    with Counting() as counting:
        fastopt.load_state_dict(kept, content, policy="keep")
        fastopt.load_state_dict(mixed, content, policy={"exp_avg": torch.float16, "*": "keep"}, audit=True)
    no_operation_on_dtensors(counting)
    for entry, saved in zip(values_of(kept), content["state"].values(), strict=True):
        assert_same(entry, saved)
    for entry, saved in zip(values_of(mixed), content["state"].values(), strict=True):
        assert_same(entry["exp_avg"], saved["exp_avg"].to(torch.float16))
        assert_same(entry["exp_avg_sq"], saved["exp_avg_sq"])


def test_policies(two_ranks: Ranks) -> None:
    two_ranks.run(loads_by_policy)


def audits() -> tuple[int, int]:
    content = trained("rows")[1].state_dict()
    for entry in content["state"].values():
        entry["exp_avg_sq"].to_local().fill_(1e-9)
    optimizer = optimizer_of(sharded("rows", torch.float16))
    report = fastopt.load_state_dict(optimizer, content, audit=True)
    count = report.audit["exp_avg_sq", F32, torch.float16]
    here = sum(entry["exp_avg_sq"].to_local().numel() for entry in values_of(optimizer))
    assert count.values == count.underflowed == here
    return count.values, sum(entry["exp_avg_sq"].numel() for entry in values_of(optimizer))


def test_each_rank_audits_its_own_part(two_ranks: Ranks) -> None:
    counts = two_ranks.run(audits)
    replicated = 1  # the number among the parameters is whole on both
    assert sum(values for values, _ in counts) == counts[0][1] + replicated


def fills() -> None:
    content = trained("rows")[1].state_dict()
    optimizer = trained("rows", dtype=BF16)[1]
    held = [entry["exp_avg"] for entry in values_of(optimizer)]
    addresses = [tensor.to_local().data_ptr() for tensor in held]
    versions = [tensor._version for tensor in held]
    expected = optimizer_of(sharded("rows", BF16))
    expected.load_state_dict(content)
    with Counting() as counting:
        fastopt.load_state_dict(optimizer, content, inplace=True)
    no_operation_on_dtensors(counting)
    assert_same(values_of(optimizer), values_of(expected))
    now = [entry["exp_avg"] for entry in values_of(optimizer)]
    assert all(one is other for one, other in zip(now, held, strict=True))
    assert [tensor.to_local().data_ptr() for tensor in now] == addresses
    assert all(tensor._version > before for tensor, before in zip(now, versions, strict=True))


def test_parts_are_filled_in_place(two_ranks: Ranks) -> None:
    two_ranks.run(fills)


def refuses_to_fill() -> None:
    content = trained("rows")[1].state_dict()
    optimizer = trained("rows")[1]
    before = copying.deepcopy(values_of(optimizer))
    for value in odd_placements()[1:4]:
        content["state"][CUT]["exp_avg"] = value
        with pytest.raises(ValueError, match=r"state\['exp_avg'\], which is a DTensor placed by .* and not a "):
            fastopt.load_state_dict(optimizer, content, inplace=True)
        assert_same(values_of(optimizer), before)


def test_other_placements_are_not_filled(two_ranks: Ranks) -> None:
    two_ranks.run(refuses_to_fill)


def donates() -> None:
    content = trained("rows")[1].state_dict()
    expected, actual = (optimizer_of(sharded("rows", BF16)) for _ in range(2))
    expected.load_state_dict(content)
    fastopt.load_state_dict(actual, content, donate=True)
    assert_same(values_of(actual), values_of(expected))
    assert not content


def test_given_away(two_ranks: Ranks) -> None:
    two_ranks.run(donates)


def goes_back() -> None:
    model, optimizer = trained("rows")
    before = copying.deepcopy(values_of(optimizer))
    with Counting() as counting:
        snapshot = fastopt.snapshot(optimizer)
        small = fastopt.snapshot(optimizer, dtype=BF16)
    no_operation_on_dtensors(counting)
    train(model, optimizer)
    held = values_of(optimizer)[CUT]["exp_avg"]
    with Counting() as counting:
        snapshot.restore(inplace=True)
    no_operation_on_dtensors(counting)
    assert_same(values_of(optimizer), before)
    assert values_of(optimizer)[CUT]["exp_avg"] is held
    small.restore()
    for entry, saved in zip(values_of(optimizer), before, strict=True):
        assert_same(entry["exp_avg"], saved["exp_avg"].to(BF16).to(F32))


def test_snapshots(two_ranks: Ranks) -> None:
    two_ranks.run(goes_back)


def copies_and_casts() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = [distribute_tensor(torch.arange(12.0).view(4, 3) / (i + 3), mesh, [Shard(i % 2)]) for i in range(4)]
    tensors.append(torch.ones(3))
    with Counting() as counting:
        halves = fastopt.to(tensors, dtype=BF16)
        same = fastopt.to(tensors, dtype=F32)
        copies = fastopt.to(tensors, dtype=F32, copy=True)
    no_operation_on_dtensors(counting)
    assert_same(halves, [tensor.to(BF16) for tensor in tensors])
    assert all(one is other for one, other in zip(same, tensors, strict=True))
    assert_same(copies, tensors)
    with Counting() as counting:
        fastopt.copy_(copies, halves)
    no_operation_on_dtensors(counting)
    assert_same(copies, [half.to(F32) for half in halves])
    versions = [copy._version for copy in copies]
    with pytest.raises(ValueError, match="entry 4"):
        fastopt.copy_(copies, [*halves[:4], torch.ones(4)])
    assert [copy._version for copy in copies] == versions
    assert_same(copies, [half.to(F32) for half in halves])
    whole = distribute_tensor(torch.zeros(4, 3), mesh, [Replicate()])
    fastopt.copy_([whole], tensors[:1])  # another placement: torch's copy
    assert_same(whole.to_local(), tensors[0].full_tensor())


def test_batches(two_ranks: Ranks) -> None:
    two_ranks.run(copies_and_casts)
