"""What the options of a load cost, in time and in memory: an audit of every value, and a state that is given away."""

from functools import partial

import torch

import fastopt
from benchmarks import goals
from benchmarks.optimizers import NATIVE_BACKEND, SHARING, STOCK, LoadWork, load_work, loader, stock_loader
from benchmarks.question import Case, Question

AUDITED = "fastopt audit=True"
DONATED = "fastopt donate=True"


def random_load_work(parameters: int, elements: int, saved: str = "float32", param: str = "bfloat16") -> LoadWork:
    """A state with values as training leaves them: an audit of equal ones would find nothing new after the first."""
    work = load_work(parameters, elements, saved, param)
    generator = torch.Generator().manual_seed(0)
    for entry in work.state_dict["state"].values():
        entry["exp_avg"].normal_(generator=generator)
        entry["exp_avg_sq"].normal_(generator=generator).square_().add_(1e-3)
    return work


def case(saved: str, param: str, parameters: int = 8, elements: int = 16 * 2**20) -> Case:
    label = f"{saved} to {param}, {parameters:,} x 2 tensors of {elements:,} elements"
    return Case(label, {"parameters": parameters, "elements": elements, "saved": saved, "param": param})


CASES = [
    case("float32", "bfloat16"),
    case("float32", "float16"),
    case("bfloat16", "float32"),
    case("float32", "bfloat16", 512, 2**18),
    case("float32", "bfloat16", 30_000, 64),
]

SPREAD = (
    "processes of their own differ by what memory each gets, as much as the audit may cost; `python -m "
    "benchmarks.audit_cost` has both take turns in one process (audit_cost.json)"
)

QUESTION = Question(
    title="load_state_dict of AdamW with an audit, and given away",
    cases=CASES,
    quick=[Case(c.label, c.size | {"parameters": 2, "elements": 2**16}) for c in CASES],
    warm_up={"parameters": 2, "elements": 2**16},
    build=random_load_work,
    contenders=(
        stock_loader(rounds=lambda size, rounds: rounds if size["parameters"] < 10_000 else 1),
        loader(SHARING, partial(fastopt.load_state_dict, copy=False), NATIVE_BACKEND),
        loader(AUDITED, partial(fastopt.load_state_dict, copy=False, audit=True), NATIVE_BACKEND),
        loader(DONATED, partial(fastopt.load_state_dict, donate=True), NATIVE_BACKEND),
    ),
    baseline=STOCK,
    goals=[goals.near(case, AUDITED, SHARING, 1 / 1.1, SPREAD) for case in CASES],
)
