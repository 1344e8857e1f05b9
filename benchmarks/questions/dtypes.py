"""Loading a few large tensors from one dtype to another, and copying them without a cast."""

from copy import deepcopy

from benchmarks import goals, plots
from benchmarks.optimizers import COPYING, FASTOPT_LOADERS, FLOOR_FRESH, STOCK, load_work, stock_loader
from benchmarks.question import Case, Contender, Question

COPY = "copy.deepcopy and stock torch"


def case(saved: str, param: str) -> Case:
    return Case(f"{saved} to {param}", {"parameters": 8, "elements": 16 * 2**20, "saved": saved, "param": param})


CASTS = [
    case("float32", "float16"),
    case("float16", "float32"),
    case("bfloat16", "float32"),
    case("float64", "float32"),
]
UNCHANGED = case("float32", "float32")

QUESTION = Question(
    title="load_state_dict of AdamW, 8 x 2 tensors of 16 Mi elements, by dtype",
    cases=[*CASTS, UNCHANGED],
    quick=[Case(c.label, c.size | {"parameters": 2, "elements": 2**16}) for c in (*CASTS, UNCHANGED)],
    warm_up={"parameters": 2, "elements": 2**16},
    build=load_work,
    contenders=(
        stock_loader(),
        Contender(COPY, lambda work: lambda: work.optimizer.load_state_dict(deepcopy(work.state_dict))),
        *FASTOPT_LOADERS,
        FLOOR_FRESH,
    ),
    baseline=STOCK,
    goals=[
        *(goals.near(case, COPYING, FLOOR_FRESH.name, 0.85) for case in CASTS),
        goals.near(UNCHANGED, COPYING, FLOOR_FRESH.name, 0.9),
        goals.faster(UNCHANGED, COPYING, COPY, 1),
    ],
    plot=plots.bandwidth,
)
