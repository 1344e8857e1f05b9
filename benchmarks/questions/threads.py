"""Loading a few large tensors with one thread and with more."""

import os

from benchmarks import goals, plots
from benchmarks.optimizers import FASTOPT_LOADERS, FLOOR_FRESH, SHARING, STOCK, load_work, stock_loader
from benchmarks.question import Case, Question


def cases(elements: int) -> list[Case]:
    counts = sorted({1, 2, 4, 8, os.cpu_count() or 1} & set(range(1, (os.cpu_count() or 1) + 1)))
    return [
        Case(f"{threads} thread{'s' * (threads > 1)}", {"parameters": 8, "elements": elements, "threads": threads})
        for threads in counts
    ]


CASES = cases(16 * 2**20)

QUESTION = Question(
    title="load_state_dict of AdamW, 8 x 2 tensors of 16 Mi elements, float32 to bfloat16",
    cases=CASES,
    quick=cases(2**16),
    warm_up={"parameters": 2, "elements": 2**16},
    build=load_work,
    contenders=(stock_loader(), *FASTOPT_LOADERS, FLOOR_FRESH),
    baseline=STOCK,
    goals=[goals.near(CASES[0], SHARING, FLOOR_FRESH.name, 0.85)],
    plot=plots.bandwidth_over("threads"),
)
