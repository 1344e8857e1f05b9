"""The report of `load_state_dict()`: what was cast, copied and shared, what was missing and lost."""

import copy as copying
from collections import Counter

import pytest
import torch

import fastopt
from tests.loads import FunctionLog, load_both, saved, tensor, values
from tests.oracle import TORCH_STATE_DICT, Bare, adam, leaves, parameter, trained

pytestmark = pytest.mark.usefixtures("backend")


def test_report_counts_what_was_done(copy):
    def make_optimizer():
        optimizer = adam((3, 4), (5,), (6,), (2, 2))
        params = [p for group in optimizer.param_groups for p in group["params"]]
        params[1].data = params[1].data.bfloat16()
        params[2].data = params[2].data.double()
        return optimizer

    state_dict = copying.deepcopy(TORCH_STATE_DICT(trained(adam((3, 4), (5,), (6,), (2, 2)), skip=(3,))))
    state_dict["state"]["alien"] = {"a": tensor(2)}
    optimizer, report = load_both(make_optimizer, state_dict, copy)

    casts, unchanged = Counter(), Counter()
    read, written = 0, 0
    for state, loaded in zip(state_dict["state"].values(), optimizer.state.values(), strict=True):
        for before, after in zip(leaves(state), leaves(loaded), strict=True):
            if isinstance(before, torch.Tensor) and state is not state_dict["state"]["alien"]:
                (casts if before.dtype != after.dtype else unchanged)[before.dtype, after.dtype] += 1
                if before.dtype != after.dtype or copy:
                    read += before.nbytes
                    written += after.nbytes
    reported = {pair: count.tensors for pair, count in report.casts.items()}
    assert reported == casts | (unchanged if copy else {})
    assert (report.copied, report.shared) == ((unchanged.total(), 0) if copy else (0, unchanged.total()))
    assert report.tensors == casts.total() + unchanged.total()
    assert (report.bytes_read, report.bytes_written) == (read, written)
    assert (report.missing, report.unexpected) == ([3], ["alien"])
    assert report.emptied == 0
    assert report.seconds > 0
    assert report.backend == fastopt.backend().name

    text = str(report)
    for (before, after), count in casts.items():
        assert f"{count} from {str(before).removeprefix('torch.')} to {str(after).removeprefix('torch.')}" in text
    assert f"{'copied' if copy else 'shared'} {unchanged.total()}" in text
    for named in (fastopt.backend().name, "no state for 1 parameter: index 3", "'alien'"):
        assert named in text


def test_report_is_the_same_on_both_backends_for_all_kinds_of_values(backend, copy):
    value = values()
    _, report = load_both(lambda: Bare([parameter(3, 4)]), saved({0: value}), copy)
    with_python = Bare([parameter(3, 4)])
    with FunctionLog():
        watched = fastopt.load_state_dict(with_python, saved({0: value}), copy=copy)
    assert watched.backend == "python"
    for field in ("casts", "copied", "shared", "missing", "unexpected", "emptied"):
        assert getattr(report, field) == getattr(watched, field), field


def test_report_says_how_many_tensors_lost_their_values(copy):
    optimizer = Bare([torch.nn.Parameter(torch.empty(3, device="meta"))])
    report = fastopt.load_state_dict(optimizer, saved({0: {"a": tensor(3), "step": tensor()}}), copy=copy)
    assert report.emptied == 1
    assert "  values lost to the meta device: 1 tensor" in str(report).splitlines()


def test_long_lists_in_the_report_are_cut():
    optimizer = Bare([parameter(1) for _ in range(1000)])
    report = fastopt.load_state_dict(optimizer, saved({}, range(1000)))
    assert report.missing == list(range(1000))
    assert "  no state for 1,000 parameters: indices 0, 1, 2, 3, 4 and 995 more" in str(report).splitlines()
    assert len(str(report)) < len(str(report.missing))


def test_report_of_nothing():
    report = fastopt.load_state_dict(Bare([parameter(1)]), saved({}, [0]))
    assert (report.tensors, report.bytes_read, report.bytes_written, report.casts) == (0, 0, 0, {})
    assert str(report).startswith("loaded 0 tensors in ")


@pytest.mark.parametrize(
    ("seconds", "moved", "first_line"),
    [
        (0.0, 0, "loaded 1 tensor in 0 us (python): read 0 B, wrote 0 B"),
        (12.34e-6, 400_000, "loaded 1 tensor in 12.3 us (python): read 400 kB, wrote 400 kB"),
        (999.7e-6, 500_000, "loaded 1 tensor in 1 ms (python): read 500 kB, wrote 500 kB, 1 GB/s"),
        (0.0942, 3_880_000, "loaded 1 tensor in 94.2 ms (python): read 3.88 MB, wrote 3.88 MB, 82.4 MB/s"),
        (1.5, 999_600_000, "loaded 1 tensor in 1.5 s (python): read 1 GB, wrote 1 GB, 1.33 GB/s"),
        (1234.5, 10**13, "loaded 1 tensor in 1,234 s (python): read 10,000 GB, wrote 10,000 GB, 16.2 GB/s"),
    ],
)
def test_report_prints_times_and_sizes_in_units_that_fit(seconds, moved, first_line):
    report = fastopt.LoadReport("python", seconds)
    report.add(torch.float32, torch.float32, 1, moved, moved)
    assert str(report) == first_line


def test_report_names_missing_parameters_by_index():
    report = fastopt.LoadReport("python", missing=[0, 1, 2])
    assert "  no state for 3 parameters: indices 0, 1, 2" in str(report).splitlines()


def test_report_names_parameters_that_were_saved_under_other_names():
    names = [f"layer.{index}" for index in range(1000)]
    first = Bare([(name, parameter(1)) for name in names])
    state_dict = copying.deepcopy(TORCH_STATE_DICT(first))
    assert fastopt.load_state_dict(first, state_dict).renamed == []
    state_dict["param_groups"][0]["param_names"][3] = "other"
    report = fastopt.load_state_dict(first, state_dict)
    assert report.renamed == [(3, "layer.3", "other")]
    assert "  loaded by place, 1 parameter of other names: 3 'layer.3' was 'other'" in str(report).splitlines()
    assert first.param_groups[0]["param_names"][3] == "other"  # as torch does; so this is the time to say it
    swapped = Bare([(name, parameter(1)) for name in reversed(names)])
    report = fastopt.load_state_dict(swapped, TORCH_STATE_DICT(Bare([(name, parameter(1)) for name in names])))
    assert len(report.renamed) == 1000
    assert "1,000 parameters of other names: 0 'layer.999' was 'layer.0', " in str(report)


def test_names_of_groups_that_follow_have_the_indices_of_their_parameters():
    def grouped(*names):
        return Bare([{"params": [(name, parameter(1))]} for name in names])

    report = fastopt.load_state_dict(grouped("a", "b", "c"), TORCH_STATE_DICT(grouped("a", "c", "b")))
    assert report.renamed == [(1, "b", "c"), (2, "c", "b")]
