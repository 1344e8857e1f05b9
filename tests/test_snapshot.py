"""`fastopt.snapshot`; a deep copy of the optimizer, taken at the same time, is the oracle."""

import copy as copying
import os
import resource
import stat
from pathlib import Path

import pytest
import torch

import fastopt
from fastopt.files import formats
from tests.oracle import (
    TORCH_STATE_DICT,
    Bare,
    Comparison,
    adam,
    assert_nothing_shared,
    fingerprint,
    parameter,
    train,
    trained,
)

pytestmark = pytest.mark.usefixtures("backend")

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = ((3, 4), (), (0,), (5,))
OPTIMIZERS = {
    "Adam": lambda params: torch.optim.Adam(params, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "SGD without state": lambda params: torch.optim.SGD(params, lr=0.1),
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "NAdam": torch.optim.NAdam,
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1),
    "AdamW with a tensor lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(1e-3)),
}


def make(name, dtype=F32):
    torch.manual_seed(0)
    return trained(OPTIMIZERS[name]([parameter(*shape, dtype=dtype) for shape in SHAPES]))


def assert_same_state(actual, expected):
    """Values, types and order, but not the sharing of storages: copies of views are tensors of their own."""
    Comparison().same(actual, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_does_not_touch_it(name):
    optimizer = make(name)
    expected = copying.deepcopy(TORCH_STATE_DICT(optimizer))
    before = fingerprint(optimizer)
    snapshot = fastopt.snapshot(optimizer)
    assert fingerprint(optimizer) == before
    assert_nothing_shared(optimizer, snapshot.state_dict())
    train(optimizer, seed=1)
    optimizer.param_groups[0]["lr"] = 7
    assert_same_state(snapshot.state_dict(), expected)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restoring_brings_every_bit_back_as_often_as_wanted(name, dtype):
    optimizer, twin = make(name, dtype), make(name, dtype)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    values = [param.detach().clone() for param in params]
    snapshot = fastopt.snapshot(optimizer)
    expected = copying.deepcopy(TORCH_STATE_DICT(optimizer))
    train(twin, seed=3)
    for _ in range(2):
        train(optimizer, seed=1)
        optimizer.param_groups[0]["lr"] = 7
        snapshot.restore()
        assert_same_state(TORCH_STATE_DICT(optimizer), expected)
        assert_nothing_shared(optimizer, snapshot.state_dict())
        with torch.no_grad():
            for param, value in zip(params, values, strict=True):
                param.copy_(value)
        train(optimizer, seed=3)  # goes on as if nothing had been
        assert_same_state(TORCH_STATE_DICT(optimizer), TORCH_STATE_DICT(twin))


def test_state_wider_than_its_parameter_stays_wide():
    optimizer = trained(adam(dtype=BF16))
    for state in optimizer.state.values():
        state["exp_avg_sq"] = torch.full_like(state["exp_avg_sq"], 1 + 2**-20, dtype=F32)
    expected = copying.deepcopy(TORCH_STATE_DICT(optimizer))
    snapshot = fastopt.snapshot(optimizer)
    optimizer.state.clear()
    report = snapshot.restore()
    assert_same_state(TORCH_STATE_DICT(optimizer), expected)
    assert all(source is target for source, target in report.casts)


def test_from_before_the_first_step():
    optimizer = adam()
    snapshot = fastopt.snapshot(optimizer)
    train(optimizer)
    assert optimizer.state
    snapshot.restore()
    assert not optimizer.state


def addresses(optimizer):
    return [(id(tensor), tensor.data_ptr()) for state in optimizer.state.values() for tensor in state.values()]


def test_in_place_the_tensors_stay_the_ones_they_are():
    optimizer = trained(adam())
    expected = copying.deepcopy(TORCH_STATE_DICT(optimizer))
    snapshot = fastopt.snapshot(optimizer)
    train(optimizer, seed=1)
    held = addresses(optimizer)
    snapshot.restore(inplace=True)
    assert addresses(optimizer) == held
    assert_same_state(TORCH_STATE_DICT(optimizer), expected)


def test_in_place_what_is_not_held_is_an_error_and_changes_nothing():
    optimizer = trained(adam())
    snapshot = fastopt.snapshot(optimizer)
    optimizer.state.clear()
    before = fingerprint(optimizer)
    with pytest.raises(ValueError, match="the optimizer holds no tensor at state"):
        snapshot.restore(inplace=True)
    assert fingerprint(optimizer) == before


def test_in_place_where_there_is_something_to_fill():
    optimizer = trained(adam((3, 4), (5,)))
    expected = copying.deepcopy(TORCH_STATE_DICT(optimizer))
    for dtype in (None, BF16):
        snapshot = fastopt.snapshot(optimizer, dtype=dtype)
        first, second = (param for group in optimizer.param_groups for param in group["params"])
        optimizer.state[first]["exp_avg"] = torch.zeros(3)
        held = optimizer.state[second]["exp_avg"].zero_()
        report = snapshot.restore(inplace="auto")
        assert report.replaced == [(0, "state['exp_avg']")]
        assert optimizer.state[second]["exp_avg"] is held
        assert optimizer.state[first]["exp_avg"].dtype is F32
        if dtype is None:
            assert_same_state(TORCH_STATE_DICT(optimizer), expected)


@pytest.mark.parametrize("inplace", ["always", 1, None])
def test_other_words_than_auto_are_refused(inplace):
    with pytest.raises(ValueError, match="is neither a bool nor 'auto'"):
        fastopt.snapshot(trained(adam())).restore(inplace=inplace)


def test_a_tensor_lr_is_restored_in_place():
    optimizer = make("AdamW with a tensor lr")
    lr = optimizer.param_groups[0]["lr"]
    snapshot = fastopt.snapshot(optimizer)
    lr.fill_(9)
    snapshot.restore(inplace=True)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(1e-3)


def test_other_groups_by_now_are_an_error_and_change_nothing():
    optimizer = trained(adam())
    snapshot = fastopt.snapshot(optimizer)
    optimizer.add_param_group({"params": [parameter(2)]})
    before = fingerprint(optimizer)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        snapshot.restore()
    assert fingerprint(optimizer) == before


def test_copies_in_a_narrower_dtype():
    optimizer = trained(adam())
    live = TORCH_STATE_DICT(optimizer)["state"]
    expected = {
        index: {key: value if key == "step" else value.to(BF16) for key, value in state.items()}
        for index, state in copying.deepcopy(live).items()
    }
    snapshot = fastopt.snapshot(optimizer, dtype=BF16)
    assert_same_state(snapshot.state_dict()["state"], expected)
    snapshot.restore()
    for index, state in TORCH_STATE_DICT(optimizer)["state"].items():
        for key, value in state.items():
            assert value.dtype is F32
            assert torch.equal(value, expected[index][key].to(F32))


def test_dtypes_by_key_leave_the_others():
    snapshot = fastopt.snapshot(trained(adam(dtype=BF16)), dtype={"exp_avg": F32})
    for state in snapshot.state_dict()["state"].values():
        assert {key: value.dtype for key, value in state.items()} == {"step": F32, "exp_avg": F32, "exp_avg_sq": BF16}


@pytest.mark.parametrize("dtype", [None, BF16])
def test_state_of_any_structure(dtype):
    param, other = parameter(3), parameter(2)
    optimizer = Bare([param, other])
    shared = torch.rand(3)
    optimizer.state[param] = {"history": [shared, (shared, torch.rand(2))], "deep": {"m": shared}, "name": "x", 5: None}
    optimizer.state[other] = {"parts": {shared}, "codes": torch.arange(3, dtype=torch.uint8)}
    optimizer.state["of no parameter"] = {"t": torch.rand(2)}
    expected = copying.deepcopy(dict(optimizer.state))
    snapshot = fastopt.snapshot(optimizer, dtype=dtype)
    assert_nothing_shared(optimizer, snapshot.state_dict())
    shared.zero_()
    if dtype is None:
        state = snapshot.state_dict()["state"]
        assert_same_state([state[0], state[1], state["of no parameter"]], list(expected.values()))
        assert state[0]["history"][0] is state[0]["deep"]["m"]
    snapshot.restore()
    restored, original = optimizer.state[param]["history"][1][1], next(iter(expected.values()))["history"][1][1]
    assert restored.dtype is F32
    assert torch.allclose(restored, original, rtol=2**-8)


def test_hooks_of_saving_and_loading_run():
    optimizer = trained(adam())
    optimizer.register_state_dict_post_hook(lambda _, saved: {"wrapped": saved["state"], **saved, "extra": [1]})
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append(saved["extra"]))
    snapshot = fastopt.snapshot(optimizer)
    snapshot.restore()
    assert seen == [[1]]


def test_its_dicts_are_new_ones_in_each_call():
    optimizer = trained(adam())
    snapshot = fastopt.snapshot(optimizer)
    first = snapshot.state_dict()
    first["state"][0].clear()
    first["param_groups"][0].clear()
    del first["state"][1]
    assert_same_state(snapshot.state_dict(), copying.deepcopy(TORCH_STATE_DICT(optimizer)))


def test_the_meta_device_would_lose_the_values():
    with pytest.raises(ValueError, match="no values"):
        fastopt.snapshot(adam(), device="meta")


def test_it_says_what_it_holds():
    assert repr(fastopt.snapshot(trained(adam((1000, 250))))) == "<fastopt.Snapshot of Adam: 3 tensors, 2.0 MB>"


# ---- files ----


def test_a_file_is_what_torch_loads(tmp_path: Path):
    optimizer = trained(adam())
    expected = copying.deepcopy(TORCH_STATE_DICT(optimizer))
    snapshot = fastopt.snapshot(optimizer)
    path = tmp_path / "optimizer.pt"
    for _ in range(2):  # anew, and over what is there
        snapshot.save(path)
        assert_same_state(torch.load(path, weights_only=True), expected)
    assert os.listdir(tmp_path) == ["optimizer.pt"]


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.dcp"])
def test_the_name_says_the_format_as_for_a_save(tmp_path: Path, name: str):
    optimizer = make("Adam")
    path, other = tmp_path / name, tmp_path / f"1{name[1:]}"
    expected = fastopt.save(optimizer, other)
    report = fastopt.snapshot(optimizer).save(path)
    assert formats.format_of(path) == formats.format_of(other)
    assert not fastopt.diff(formats.read(path, verify=True), optimizer)
    assert (report.tensors, report.bytes_written) == (expected.tensors, expected.bytes_written)
    assert report.path == str(path)
    assert str(report).startswith(f"saved {expected.tensors} tensors in ")


def test_the_report_has_the_casts_of_the_copy(tmp_path: Path):
    snapshot = fastopt.snapshot(trained(adam()), dtype={"exp_avg": BF16, "nothing": BF16})
    report = snapshot.save(tmp_path / "a.safetensors")
    assert {pair: count.tensors for pair, count in report.casts.items()} == {(F32, BF16): 3}
    assert report.unused_patterns == ["nothing"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "optimizer.pt"
    path.write_bytes(b"old")
    snapshot = fastopt.snapshot(trained(adam((1000, 1000))))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            snapshot.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["optimizer.pt"]


def test_permissions_and_links(tmp_path: Path):
    snapshot = fastopt.snapshot(adam())
    before = os.umask(0o027)
    try:
        snapshot.save(tmp_path / "new.pt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.pt").stat().st_mode) == 0o640
    (tmp_path / "new.pt").chmod(0o604)
    (tmp_path / "link.pt").symlink_to("new.pt")
    snapshot.save(str(tmp_path / "link.pt"))
    assert (tmp_path / "link.pt").is_symlink()
    assert stat.S_IMODE((tmp_path / "new.pt").stat().st_mode) == 0o604
    assert torch.load(tmp_path / "new.pt", weights_only=True)["state"] == {}


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        fastopt.snapshot(adam()).save(tmp_path / "missing" / "optimizer.pt")


# ---- reports ----


def test_the_report_says_what_was_copied():
    snapshot = fastopt.snapshot(trained(adam()), dtype={"exp_avgg": BF16})
    assert snapshot.report.seconds > 0
    assert str(snapshot.report).startswith("copied 9 tensors in ")
    assert str(snapshot.report).endswith("no key of the state fits 'exp_avgg', given in dtype")
    for internal in ("fate", "done", "options", "{:,}"):
        assert internal not in repr(snapshot.report)


def test_the_casts_are_audited():
    optimizer = trained(adam())
    for state in optimizer.state.values():
        state["exp_avg_sq"].mul_(1e-12)
    report = fastopt.snapshot(optimizer, dtype=torch.float16, audit=True).report
    values = sum(state["exp_avg_sq"].numel() for state in optimizer.state.values())
    assert report.audit["exp_avg_sq", F32, torch.float16].underflowed == values
    assert fastopt.snapshot(optimizer, dtype=torch.float16).report.audit is None


def test_an_error_says_what_was_being_done():
    optimizer = trained(adam())
    optimizer.state[optimizer.param_groups[0]["params"][0]]["broken"] = iter([1])
    with pytest.raises(TypeError) as caught:
        fastopt.snapshot(optimizer)
    assert caught.value.__notes__[-1].startswith("while copying the state of parameter 0 ")
