"""Loading the states of real models: a few large tensors, and many of every size."""

from benchmarks import goals, plots
from benchmarks.dcp import DCP_LOADER
from benchmarks.models import MODELS
from benchmarks.optimizers import (
    COPYING,
    FASTOPT_LOADERS,
    FLOOR_FRESH,
    FOREACH_FRESH,
    LINEAR_LOADER,
    SHARING,
    STOCK,
    LoadWork,
    stock_loader,
    work_of_shapes,
)
from benchmarks.question import Case, Question


def build(model: str, parameters: int | None = None) -> LoadWork:
    """The AdamW state of a model in float32, for parameters in bfloat16; of the last `parameters` only if given."""
    shapes = list(MODELS[model]())
    return work_of_shapes(shapes[-parameters:] if parameters else shapes, "float32", "bfloat16")


CASES = [Case(name, {"model": name}) for name in MODELS]

QUESTION = Question(
    title="load_state_dict of AdamW, the parameters of a model, float32 to bfloat16",
    cases=CASES,
    quick=[Case(f"the end of {name}", {"model": name, "parameters": 40}) for name in MODELS],
    warm_up={"parameters": 2},
    build=build,
    contenders=(stock_loader(), LINEAR_LOADER, FOREACH_FRESH, DCP_LOADER, *FASTOPT_LOADERS, FLOOR_FRESH),
    baseline=STOCK,
    goals=[goals.near(case, name, FLOOR_FRESH.name, 0.85) for case in CASES for name in (SHARING, COPYING)],
    plot=plots.bandwidth,
)
