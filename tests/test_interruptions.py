"""A KeyboardInterrupt at any line: the optimizer is as it was, or loaded, or the error says what is not."""

import copy as copying
import gc
import linecache
import sys
from pathlib import Path

import pytest
import torch

import fastopt
from tests.loads import assert_filled_as_the_note_says
from tests.oracle import Comparison, adam, fingerprint, trained

PACKAGE = str(Path(fastopt.__file__).parent)
TORCHS = torch.optim.Adam.__setstate__.__code__.co_filename

pytestmark = pytest.mark.usefixtures("backend")


def interrupted(call, at, kind=KeyboardInterrupt):
    """What a call raises that fails before its `at`-th line within fastopt or Adam, and whether it has so many.

    None where it goes on: a description that fails must not hide the error that it describes.
    """
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        name = frame.f_code.co_filename
        if not (name.startswith(PACKAGE) or name == TORCHS):
            return None
        # Python looks for signals where a function begins and after a call: not between the last call of a block and
        # the `__exit__` of its `with`, or the first call of its `finally`.
        line = linecache.getline(name, frame.f_lineno).strip()
        if event == "line" and not line.startswith(("with ", "gc.enable()")):
            lines += 1
            if lines == at:
                raise kind
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except kind as error:
        return error, True
    finally:
        sys.settrace(before)
    return None, lines >= at


def make(seed, dtype=torch.float32):
    optimizer = trained(adam((3, 4), (), (5,), dtype=dtype), seed=seed)
    for index, group in enumerate(optimizer.param_groups):
        group["param_names"] = [f"{index}.{position}" for position in range(len(group["params"]))]
    return optimizer


def taken_apart(saved):
    """A dict that can be given away."""
    return {**saved, "state": dict(saved["state"])}


ACTIONS = {
    "copied": lambda optimizer, saved: fastopt.load_state_dict(optimizer, saved),
    "shared": lambda optimizer, saved: fastopt.load_state_dict(optimizer, saved, copy=False),
    "by a policy": lambda optimizer, saved: fastopt.load_state_dict(optimizer, saved, policy={"exp_*": "keep"}),
    "in place": lambda optimizer, saved: fastopt.load_state_dict(optimizer, saved, inplace=True),
    "auto": lambda optimizer, saved: fastopt.load_state_dict(optimizer, saved, inplace="auto"),
    "donated": lambda optimizer, saved: fastopt.load_state_dict(optimizer, taken_apart(saved), donate=True),
    "installed": lambda optimizer, saved: optimizer.load_state_dict(saved),
    "moved": lambda optimizer, saved: fastopt.to_device(optimizer, "cpu:0"),
    "cast": lambda optimizer, saved: fastopt.cast_state(optimizer, torch.bfloat16),
    "snapshot": lambda optimizer, saved: fastopt.snapshot(optimizer),
    "matched": lambda optimizer, saved: fastopt.load_state_dict(optimizer, fastopt.match(saved, optimizer)),
    "audited": lambda optimizer, saved: fastopt.load_state_dict(optimizer, saved, policy=torch.float16, audit=True),
    "from a file": lambda optimizer, saved: fastopt.load(optimizer, "saved.pt"),
    "from a file, in place": lambda optimizer, saved: fastopt.load(optimizer, "saved.pt", inplace=True),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, KeyboardInterrupt) for name in ACTIONS),
        *((name, MemoryError) for name in ("copied", "in place", "donated", "cast", "from a file")),
    ],
)
def test_a_failure_at_any_line_leaves_all_or_nothing(name, kind, tmp_path, monkeypatch):
    act = ACTIONS[name]
    monkeypatch.chdir(tmp_path)
    saved = copying.deepcopy(make(1).state_dict())
    given = fingerprint(saved)
    torch.save(saved, "saved.pt")
    done = make(0)
    with fastopt.installed():
        act(done, saved)
        at, unchanged, changed = 0, 0, 0
        while True:
            at += 1
            optimizer = make(0)
            before = fingerprint(optimizer)
            error, reached = interrupted(lambda optimizer=optimizer: act(optimizer, saved), at, kind)
            assert gc.isenabled()
            assert torch.is_grad_enabled()
            assert fingerprint(saved) == given
            if not reached:
                break
            if fingerprint(optimizer) == before:
                unchanged += 1
                continue
            changed += 1
            if any(note.startswith("inplace: ") for note in getattr(error, "__notes__", ())):
                assert_filled_as_the_note_says(error, optimizer, make(0), saved)
            else:
                Comparison().optimizers(optimizer, done)
    assert at > 100
    assert unchanged > 0.8 * at
    assert name == "snapshot" or changed > 0


@pytest.mark.parametrize("inplace", [False, True])
def test_an_error_of_setstate_is_taken_back(inplace):
    class Refusing(torch.optim.Adam):
        refuses = False

        def __setstate__(self, state):
            super().__setstate__(state)
            self.mark = 1
            if self.refuses:
                raise RuntimeError("no")

    params = [torch.nn.Parameter(torch.ones(3))]
    optimizer = trained(Refusing(params))
    saved = copying.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 7
    optimizer.refuses = True
    state, groups, before = optimizer.state, optimizer.param_groups, fingerprint(optimizer.param_groups)
    with pytest.raises(RuntimeError, match="no") as caught:
        fastopt.load_state_dict(optimizer, saved, inplace=inplace)
    assert optimizer.state is state
    assert optimizer.param_groups is groups
    assert fingerprint(optimizer.param_groups) == before
    assert not hasattr(optimizer, "mark")
    if inplace:
        assert caught.value.__notes__ == [
            "inplace: of 3 tensors, filled: state['step'] of parameter 0, state['exp_avg'] of parameter 0, "
            "state['exp_avg_sq'] of parameter 0. All else of the optimizer is as it was"
        ]
    optimizer.refuses = False
    fastopt.load_state_dict(optimizer, saved, inplace=inplace)
    assert optimizer.param_groups[0]["lr"] == 7
