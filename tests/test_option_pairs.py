"""Which options of a load go together: all pairs, and the table of them in the docs."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import fastopt
from tests.loads import saved
from tests.oracle import Bare, fingerprint, parameter

pytestmark = pytest.mark.usefixtures("backend")

BF16, F32 = torch.bfloat16, torch.float32
PAGE = Path(__file__).parent.parent / "docs" / "resuming.md"

OPTIONS = {
    "copy": {"copy": False},
    "policy": {"policy": {"m": BF16}},
    "device": {"device": {"m": "keep"}},
    "inplace": {"inplace": True},
    "auto": {"inplace": "auto"},
    "donate": {"donate": True},
    "audit": {"audit": True},
}
APART = {
    ("inplace", "policy"),
    ("device", "inplace"),
    ("auto", "policy"),
    ("auto", "device"),
    ("donate", "inplace"),
    ("auto", "donate"),
    ("audit", "inplace"),
    ("audit", "auto"),
}
PAIRS = [(a, b) for a in OPTIONS for b in OPTIONS if a < b and {a, b} != {"inplace", "auto"}]


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_every_pair_of_options_works_or_is_refused(pair):
    param = parameter(3, dtype=torch.float16)
    optimizer = Bare([param])
    held = torch.zeros(3)
    optimizer.state[param] = {"m": held}
    state_dict, options = saved({0: {"m": torch.full((3,), 1 / 3)}}), OPTIONS[pair[0]] | OPTIONS[pair[1]]
    if pair in APART:
        before = fingerprint(optimizer)
        with pytest.raises(ValueError, match=r"^(inplace|donate|audit): "):
            fastopt.load_state_dict(optimizer, state_dict, **options)
        assert fingerprint(optimizer) == before
        assert len(state_dict) == 2
        return
    fastopt.load_state_dict(optimizer, state_dict, **options)
    loaded = optimizer.state[param]["m"]
    assert (loaded is held) == ("inplace" in options)
    assert loaded.dtype == (BF16 if "policy" in options else F32 if "inplace" in options else torch.float16)
    assert torch.equal(loaded, torch.full((3,), 1 / 3).to(loaded.dtype))
    assert (state_dict == {}) == ("donate" in options)


NAMES = {
    "`copy=False`": "copy",
    "`policy`": "policy",
    "`device`": "device",
    "`inplace=True`": "inplace",
    '`inplace="auto"`': "auto",
    "`donate`": "donate",
    "`audit`": "audit",
}


def test_the_table_in_the_docs_is_right():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if re.match(r"\|.*`copy=False`|\| `", line)
    ]
    head, *body = [row for row in rows if set(row) & NAMES.keys()]
    said = {}
    for name, *cells in body:
        for other, cell in zip(head[1:], cells, strict=True):
            if cell:
                said[tuple(sorted((NAMES[name], NAMES[other])))] = cell
    assert said == {pair: "error" if pair in APART else "yes" for pair in PAIRS}


def test_all_options_are_in_the_table():
    options = set(inspect.signature(fastopt.load_state_dict).parameters) - {"optimizer", "state_dict"}
    assert options == set(NAMES.values()) - {"auto"}


def test_a_file_takes_all_options_but_those_about_who_else_holds_the_dict():
    options = inspect.signature(fastopt.load_state_dict).parameters
    of_files = inspect.signature(fastopt.load).parameters
    assert set(options) - set(of_files) == {"state_dict", "copy", "donate"}
    assert all(of_files[name].default == options[name].default for name in set(options) & set(of_files))
