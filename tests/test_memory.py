"""What loads cost in memory: nothing stays behind, nothing is copied twice."""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastopt

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
ROUNDS = 100
SLACK = 64 * MIB
CLEAR_REFS = Path("/proc/self/clear_refs")
PR_SET_THP_DISABLE = 41  # <sys/prctl.h>


def resident(field: str = "VmRSS") -> int:
    """Bytes by /proc: VmRSS for now, VmHWM for the most since the start."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def in_a_process(call: str, backend: str) -> Any:
    """The result of a call of one of this module's functions, in a process of its own."""
    code = f"import json; from tests.test_memory import *; print(json.dumps({call}))"
    variables = {**os.environ, "FASTOPT_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- nothing stays behind ----


def saved_state(sizes: list[int], dtype: torch.dtype) -> dict[Any, Any]:
    """State as a checkpoint holds it, with ids and values that are objects of their own."""
    return {
        f"saved id {index}": {
            "exp_avg": torch.ones(size, dtype=dtype),
            "exp_avg_sq": torch.ones(size, dtype=dtype),
            "step": torch.tensor(float(index)),
            "history": [torch.ones(3, dtype=dtype), float(index)],
            "nested": {"matrix": torch.ones(2, 2, dtype=dtype).t(), "integers": torch.arange(3)},
            "pair": (torch.ones(1, dtype=dtype), f"text {index}"),
        }
        for index, size in enumerate(sizes)
    }


def optimizer_over(sizes: list[int], dtype: torch.dtype) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes], momentum=0.9)


def state_dict_of(optimizer: torch.optim.Optimizer, state: dict[Any, Any]) -> dict[str, Any]:
    [group] = optimizer.state_dict()["param_groups"]
    return {"state": state, "param_groups": [group | {"params": list(state)}]}


@pytest.mark.parametrize("copied", [True, False])
def test_many_loads_leave_nothing_resident(backend: str, copied: bool) -> None:
    sizes = [24 * MIB // 4, *[1000] * 200, 1 * MIB, 9 * MIB, 3, 7 * MIB]
    optimizer = optimizer_over(sizes, torch.bfloat16)
    saved = state_dict_of(optimizer, saved_state(sizes, torch.float32))
    written = sum(2 * 2 * size for size in sizes)
    for _ in range(ROUNDS // 5):
        fastopt.load_state_dict(optimizer, saved, copy=copied)
    settled = resident()
    for _ in range(ROUNDS):
        fastopt.load_state_dict(optimizer, saved, copy=copied)
    assert resident() - settled < written, "more than one state stayed behind"


def test_values_given_back_leave_nothing_resident(backend: str) -> None:
    if backend == "python":
        pytest.skip("what torch's allocator gives back is malloc's to keep")
    sources = [torch.ones(MIB // 4, dtype=torch.float32) for _ in range(4)] * 64
    before = resident()
    results = fastopt.to(sources, dtype=torch.bfloat16)
    written = sum(result.nbytes for result in results)
    assert resident() - before > written // 2
    for result in results:
        result.untyped_storage().resize_(0)
    assert resident() - before < written // 4, "tensors without values keep their memory"


class Refuses(list[Any]):
    """A container that cannot be rebuilt."""

    def __init__(self, items: Any = ()) -> None:
        super().__init__(items)
        if any(isinstance(item, torch.Tensor) and item.dtype == torch.bfloat16 for item in self):
            raise ArithmeticError("no room for such a tensor")


def everything_in(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from everything_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from everything_in(item)


def counts(objects: list[Any]) -> list[int]:
    gc.collect()
    return [sys.getrefcount(item) for item in objects]


def changes(objects: list[Any], before: list[int]) -> list[str]:
    after = counts(objects)
    return [
        f"{type(item).__name__} {item!r:.60}: {old} -> {new}"
        for item, old, new in zip(objects, before, after, strict=True)
        if old != new
    ]


def counted(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> list[Any]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    held = {id(item): item for item in [*everything_in(saved), *params]}
    return [item for item in held.values() if not is_everybodys(item)]


def is_everybodys(item: Any) -> bool:
    """Whether Python keeps one such object for all who use its value: small numbers, and names, which are interned."""
    return isinstance(item, bool | int | None) or (isinstance(item, str) and item.isidentifier())


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loads_keep_no_reference(backend: str, copied: bool, dtype: torch.dtype) -> None:
    sizes = [3, 0, 700, 5]
    optimizer = optimizer_over(sizes, dtype)
    saved = state_dict_of(optimizer, saved_state(sizes, torch.float32))
    saved["state"]["of no parameter"] = {"kept": torch.ones(3)}
    fastopt.load_state_dict(optimizer, saved, copy=copied)
    objects = counted(optimizer, saved)
    before = counts(objects)
    for _ in range(5):
        fastopt.load_state_dict(optimizer, saved, copy=copied)
    assert changes(objects, before) == []


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("place", [0, 2, -1])
def test_failing_loads_keep_no_reference(backend: str, copied: bool, place: int) -> None:
    sizes = [3, 0, 700, 5]
    optimizer = optimizer_over(sizes, torch.bfloat16)
    saved = state_dict_of(optimizer, saved_state(sizes, torch.float32))
    fastopt.load_state_dict(optimizer, saved, copy=copied)
    list(saved["state"].values())[place]["refused"] = Refuses([torch.ones(2)])
    objects = counted(optimizer, saved)
    before = counts(objects)
    for _ in range(5):
        with pytest.raises(ArithmeticError, match="no room"):
            fastopt.load_state_dict(optimizer, saved, copy=copied)
    assert changes(objects, before) == []


def test_failing_loads_free_what_they_made(backend: str) -> None:
    sizes = [24 * MIB, 1000]
    optimizer = optimizer_over(sizes, torch.bfloat16)
    saved = state_dict_of(optimizer, saved_state(sizes, torch.float32))
    list(saved["state"].values())[-1]["refused"] = Refuses([torch.ones(2)])
    before = resident()
    for _ in range(10):
        with pytest.raises(ArithmeticError):
            fastopt.load_state_dict(optimizer, saved)
    gc.collect()
    assert resident() - before < SLACK


# ---- nothing is copied twice ----


def measure_peak(saved_dtype: str, param_dtype: str, copied: bool) -> dict[str, int]:
    """Loads a state of some hundred MiB, large tensors and small ones, and measures; for a process of its own."""
    sizes = [8 * MIB] * 5 + [MIB // 3] * 6 + [500] * 5000
    optimizer = optimizer_over(sizes, getattr(torch, param_dtype))
    state = {index: {"exp_avg": torch.ones(n, dtype=getattr(torch, saved_dtype))} for index, n in enumerate(sizes)}
    saved = state_dict_of(optimizer, state)
    fastopt.load_state_dict(optimizer_over([1], torch.float32), {"state": {}, "param_groups": [{"params": [0]}]})
    gc.collect()
    before = resident()
    report = fastopt.load_state_dict(optimizer, saved, copy=copied)
    return {"extra": resident("VmHWM") - before, "written": report.bytes_written}


@pytest.mark.parametrize(
    ("saved_dtype", "param_dtype", "copied"),
    [
        ("float32", "bfloat16", True),
        ("bfloat16", "float32", True),
        ("float32", "float32", True),
        ("float32", "float32", False),
    ],
)
def test_a_load_takes_no_more_than_its_results(backend: str, saved_dtype: str, param_dtype: str, copied: bool) -> None:
    measured = in_a_process(f"measure_peak({saved_dtype!r}, {param_dtype!r}, {copied})", backend)
    assert (measured["written"] == 0) == (not copied)
    assert measured["extra"] <= measured["written"] + SLACK


def measure_peak_of_odd_sizes() -> dict[str, int]:
    """Loads tensors of GPT-2's shapes, that fill the last of their huge pages to a third, and large pieces of slabs."""
    sizes = [3072 * 768] * 48 + [2304 * 768] * 24
    optimizer = optimizer_over(sizes, torch.bfloat16)
    state = {index: {"exp_avg": torch.ones(n), "exp_avg_sq": torch.ones(n)} for index, n in enumerate(sizes)}
    saved = state_dict_of(optimizer, state)
    fastopt.load_state_dict(optimizer_over([1], torch.float32), {"state": {}, "param_groups": [{"params": [0]}]})
    gc.collect()
    CLEAR_REFS.write_text("5")  # the most since now
    before = resident()
    report = fastopt.load_state_dict(optimizer, saved)
    return {"extra": resident("VmHWM") - before, "written": report.bytes_written}


def test_huge_pages_take_no_more_than_the_results(backend: str) -> None:
    measured = in_a_process("measure_peak_of_odd_sizes()", backend)
    assert measured["extra"] <= measured["written"] + SLACK


def measure_donated(saved_dtype: str, param_dtype: str) -> dict[str, int]:
    sizes = [8 * MIB] * 12 + [MIB // 3] * 6 + [500] * 1000
    optimizer = optimizer_over(sizes, getattr(torch, param_dtype))
    state = {index: {"exp_avg": torch.ones(n, dtype=getattr(torch, saved_dtype))} for index, n in enumerate(sizes)}
    saved = state_dict_of(optimizer, state)
    fastopt.load_state_dict(optimizer_over([1], torch.float32), {"state": {}, "param_groups": [{"params": [0]}]})
    gc.collect()
    CLEAR_REFS.write_text("5")  # the most since now
    before = resident()
    report = fastopt.load_state_dict(optimizer, saved, donate=True)
    return {"extra": resident("VmHWM") - before, "read": report.bytes_read, "written": report.bytes_written}


@pytest.mark.parametrize(("saved_dtype", "param_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_donated_state_is_never_in_memory_twice(backend: str, saved_dtype: str, param_dtype: str) -> None:
    measured = in_a_process(f"measure_donated({saved_dtype!r}, {param_dtype!r})", backend)
    assert min(measured["read"], measured["written"]) > 2 * SLACK
    assert measured["extra"] <= max(measured["written"] - measured["read"], 0) + SLACK


def measure_donated_keys() -> dict[str, int]:
    optimizer = optimizer_over([16 * MIB], torch.bfloat16)
    saved = state_dict_of(optimizer, {0: {f"key {i}": torch.ones(16 * MIB) for i in range(8)}})
    fastopt.load_state_dict(optimizer_over([1], torch.float32), {"state": {}, "param_groups": [{"params": [0]}]})
    gc.collect()
    CLEAR_REFS.write_text("5")  # the most since now
    before = resident()
    report = fastopt.load_state_dict(optimizer, saved, donate=True)
    return {"extra": resident("VmHWM") - before, "read": report.bytes_read, "written": report.bytes_written}


def test_the_tensors_of_one_donated_parameter_are_released_one_by_one(backend: str) -> None:
    measured = in_a_process("measure_donated_keys()", backend)
    assert measured["written"] == 256 * MIB
    assert measured["extra"] <= SLACK


def measure_large_donated(saved_dtype: str, param_dtype: str) -> dict[str, int]:
    optimizer = optimizer_over([64 * MIB], getattr(torch, param_dtype))
    state = {0: {key: torch.ones(64 * MIB, dtype=getattr(torch, saved_dtype)) for key in ("exp_avg", "exp_avg_sq")}}
    saved = state_dict_of(optimizer, state)
    del state
    fastopt.load_state_dict(optimizer_over([1], torch.float32), {"state": {}, "param_groups": [{"params": [0]}]})
    gc.collect()
    CLEAR_REFS.write_text("5")  # the most since now
    before = resident()
    report = fastopt.load_state_dict(optimizer, saved, donate=True)
    extra = resident("VmHWM") - before
    assert all(bool((value == 1).all()) for state in optimizer.state.values() for value in state.values())
    return {"extra": extra, "read": report.bytes_read, "written": report.bytes_written}


@pytest.mark.parametrize(("saved_dtype", "param_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_one_large_donated_parameter_is_never_in_memory_twice(saved_dtype: str, param_dtype: str) -> None:
    measured = in_a_process(f"measure_large_donated({saved_dtype!r}, {param_dtype!r})", "native")
    assert min(measured["read"], measured["written"]) >= 256 * MIB
    assert measured["extra"] <= max(measured["written"] - measured["read"], 0) + SLACK


def measure_in_place() -> dict[str, int]:
    sizes = [8 * MIB] * 5 + [500] * 5000
    optimizer = optimizer_over(sizes, torch.bfloat16)
    saved = {index: {"exp_avg": torch.ones(size)} for index, size in enumerate(sizes)}
    fastopt.load_state_dict(optimizer, state_dict_of(optimizer, saved))
    fastopt.load_state_dict(optimizer, state_dict_of(optimizer, saved), inplace=True)
    gc.collect()
    CLEAR_REFS.write_text("5")  # the most since now
    before = resident()
    report = fastopt.load_state_dict(optimizer, state_dict_of(optimizer, saved), inplace=True)
    return {"extra": resident("VmHWM") - before, "written": report.bytes_written}


def test_a_load_in_place_takes_nothing(backend: str) -> None:
    measured = in_a_process("measure_in_place()", backend)
    assert measured["written"] > 80 * MIB
    assert measured["extra"] < 8 * MIB  # lists of 5,000 entries


# ---- without huge pages ----


def load_without_huge_pages() -> dict[str, int]:
    """Loads large tensors in a process that the system gives no huge pages."""
    assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
    sizes = [8 * MIB, 9 * MIB + 3]
    optimizer = optimizer_over(sizes, torch.bfloat16)
    state = {index: {"exp_avg": torch.arange(float(size))} for index, size in enumerate(sizes)}
    fastopt.load_state_dict(optimizer, state_dict_of(optimizer, state))
    loaded = [entry["exp_avg"] for entry in optimizer.state.values()]
    [huge] = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "AnonHugePages" in line]
    right = all(torch.equal(a, b["exp_avg"].bfloat16()) for a, b in zip(loaded, state.values(), strict=True))
    return {"right": right, "huge": int(huge.split()[1])}


def test_without_huge_pages_all_works(backend: str) -> None:
    assert in_a_process("load_without_huge_pages()", backend) == {"right": True, "huge": 0}
