"""Loading the state of very many small parameters, where the work is in the walk and not in the bytes."""

from dataclasses import replace

from benchmarks import goals, plots
from benchmarks.optimizers import (
    COPYING,
    FASTOPT_LOADERS,
    LINEAR,
    LINEAR_LOADER,
    PYTHON,
    PYTHON_LOADER,
    SHARING,
    STOCK,
    load_work,
    stock_loader,
)
from benchmarks.question import Case, Question, Size

ELEMENTS = 64
TENSORS = 3  # of a parameter: its step and two moments
OURS = (SHARING, COPYING)
MORE_TENSORS = (
    "of 210 ms on a Xeon (Sapphire Rapids), 41 are AdamW.__setstate__, which linear torch runs as well, and 30 the "
    "clones of every step, which copy=True makes and linear torch does not: it shares them, as copy=False does. The "
    "rest is making the results (timers around the parts)"
)
OTHER_CACHES = (
    "a parameter takes longer the more of the saved tensors' own objects are not in the cache when the walk comes to "
    "them (perf at 100,000: look-ups in dicts and the first reads of those objects are the largest single costs)"
)


def cases(*counts: int) -> list[Case]:
    return [Case(f"{count:,} parameters", {"parameters": count, "elements": ELEMENTS}) for count in counts]


def stock_rounds(size: Size, rounds: int) -> int:
    """Half a minute at 30,000, minutes at 100,000, and hours at 1,000,000."""
    most = {10_000: rounds, 30_000: 2, 100_000: 1, 1_000_000: 0}
    return min(rounds, most.get(size["parameters"], rounds))


def others_rounds(size: Size, rounds: int) -> int:
    """Half a minute at 1,000,000, and as long to build what they load."""
    return rounds if size["parameters"] < 1_000_000 else min(rounds, 2)


CASES = cases(10_000, 30_000, 100_000, 1_000_000)

QUESTION = Question(
    title="load_state_dict of AdamW, 64 elements a parameter, float32 to bfloat16",
    cases=CASES,
    quick=cases(300, 1_000, 3_000),
    warm_up={"parameters": 10},
    build=load_work,
    contenders=(
        stock_loader(stock_rounds),
        replace(LINEAR_LOADER, rounds=others_rounds),
        *FASTOPT_LOADERS,
        replace(PYTHON_LOADER, rounds=others_rounds),
    ),
    baseline=STOCK,
    goals=(
        *(goals.faster(CASES[1], name, STOCK, 100) for name in OURS),
        *(goals.faster(CASES[2], name, STOCK, 700) for name in OURS),
        *(goals.faster(CASES[2], name, LINEAR, 5, MORE_TENSORS) for name in OURS),
        *(goals.cpu_time(CASES[2], name, TENSORS * CASES[2].size["parameters"], 1.3) for name in OURS),
        *(goals.constant(CASES, name, "parameters", 1.15, OTHER_CACHES) for name in OURS),
    ),
    plot=plots.time_over("parameters", STOCK, LINEAR, PYTHON, COPYING, SHARING),
)
