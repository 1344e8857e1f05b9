"""Loading the same number of bytes in tensors of every size, from the walk's cost to the memory's."""

from benchmarks import plots
from benchmarks.optimizers import (
    FASTOPT_LOADERS,
    FLOOR_FRESH,
    FOREACH_FRESH,
    LINEAR,
    LINEAR_LOADER,
    load_work,
    stock_loader,
)
from benchmarks.question import Case, Question, Size


def cases(total: int, *elements: int) -> list[Case]:
    return [Case(f"{count:,} elements", {"parameters": total // count, "elements": count}) for count in elements]


def stock_rounds(size: Size, rounds: int) -> int:
    """Its time grows with the square of the number of parameters."""
    return rounds if size["parameters"] <= 2**13 else 0


QUESTION = Question(
    title="load_state_dict of AdamW, 2 x 64 Mi elements in all, float32 to bfloat16",
    cases=cases(2**26, *(4**power for power in range(4, 13))),
    quick=cases(2**14, 4**4, 4**6),
    warm_up={"parameters": 4},
    build=load_work,
    contenders=(stock_loader(stock_rounds), LINEAR_LOADER, FOREACH_FRESH, *FASTOPT_LOADERS, FLOOR_FRESH),
    baseline=LINEAR,
    plot=plots.bandwidth_over("elements"),
)
