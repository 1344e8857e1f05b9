"""Loading and saving a state that is sharded over ranks, in folders of torch.distributed.checkpoint."""

from collections.abc import Callable

from benchmarks import goals, plots, sharded
from benchmarks.optimizers import NATIVE_BACKEND
from benchmarks.question import Case, Contender, Question, Size
from benchmarks.sharded import ShardedWork

LOAD, SAVE, STALL = "load", "save", "stall"
MORE_MEMORY = 0.3e9
"""Bytes that a load may take besides its results, a rank."""


def contender(
    name: str, action: str, prepare: Callable[[], Callable[[], object]], environment: dict[str, str] | None = None
) -> Contender[ShardedWork]:
    def rounds(size: Size, rounds: int) -> int:
        return rounds if size["action"] == action else 0

    return Contender(name, sharded.on_all_ranks(prepare), environment or {}, rounds)


def case(action: str, size: int, parameters: int, elements: int) -> Case:
    by = f"saved by {sharded.SAVED_BY}, on {size}" if action == LOAD else f"on {size}"
    label = f"{action} {by}, {parameters:,} x 2 x {elements:,}"
    return Case(label, {"action": action, "size": size, "parameters": parameters, "elements": elements})


LARGE = {"parameters": 16, "elements": 2**24}
RESHARDED, UNSHARDED = case(LOAD, 4, **LARGE), case(LOAD, 1, **LARGE)
SAVED, STALLED = case(SAVE, 2, **LARGE), case(STALL, 2, **LARGE)
SMALL = {"parameters": 4, "elements": 2**14}

STOCK = contender("dcp.load, stock", LOAD, sharded.torch_load)
OURS = contender("fastopt.distributed.load", LOAD, sharded.our_load, NATIVE_BACKEND)
STOCK_FILLED = contender("dcp.load, stock, into a state", LOAD, sharded.torch_load_again)
FILLED = contender("dcp.load, FastReader, into a state", LOAD, sharded.torch_load_with_our_reader, NATIVE_BACKEND)
STOCK_SAVE = contender("dcp.save, stock", SAVE, sharded.torch_save)
OUR_SAVE = contender("fastopt.distributed.save", SAVE, sharded.our_save, NATIVE_BACKEND)
STOCK_STALL = contender("dcp.async_save, stock", STALL, sharded.torch_stall)
OUR_STALL = contender("fastopt.distributed.async_save, again", STALL, sharded.our_stall_again, NATIVE_BACKEND)

RESHARDED_FLOOR = (
    "four ranks share two cores, and the copy out of the page cache is most of what either does: reading the bytes and "
    "touching fresh memory for them takes half of stock's time already"
)
RAW_WRITE = (
    "one rank alone saves 1 GiB as fast as the raw write does (0.6 to 1.7 s against 1.1 to 3.9); two at once are "
    "slower than it, in the system's time for the page cache, and why is not known yet"
)

QUESTION = Question(
    title="AdamW's state in float32, sharded over ranks, in folders of torch.distributed.checkpoint",
    cases=[RESHARDED, UNSHARDED, SAVED, STALLED],
    quick=[case(LOAD, 4, **SMALL), case(LOAD, 1, **SMALL), case(SAVE, 2, **SMALL), case(STALL, 2, **SMALL)],
    warm_up={"parameters": 2, "elements": 64},
    build=sharded.build,
    contenders=(
        STOCK,
        OURS,
        STOCK_FILLED,
        FILLED,
        contender("floor, read and touch", LOAD, sharded.raw_read),
        STOCK_SAVE,
        OUR_SAVE,
        contender("floor, raw write and fsync", SAVE, sharded.raw_write),
        STOCK_STALL,
        contender("dcp.async_save, stock, its stager kept", STALL, sharded.torch_stall_again),
        contender("fastopt.distributed.async_save, first", STALL, sharded.our_stall, NATIVE_BACKEND),
        OUR_STALL,
        contender("floor, a copy into warm memory", STALL, sharded.copy_to_warm_memory),
    ),
    baseline=STOCK.name,
    goals=[
        *(goals.faster(case, OURS.name, STOCK.name, 3) for case in (RESHARDED, UNSHARDED)),
        *(goals.faster(case, FILLED.name, STOCK_FILLED.name, 3, RESHARDED_FLOOR) for case in (RESHARDED, UNSHARDED)),
        *(goals.memory_beside_results(case, OURS.name, MORE_MEMORY) for case in (RESHARDED, UNSHARDED)),
        goals.faster(SAVED, OUR_SAVE.name, STOCK_SAVE.name, 1.5, RAW_WRITE),
        goals.near(SAVED, OUR_SAVE.name, "floor, raw write and fsync", 1 / 1.15, RAW_WRITE),
        goals.faster(STALLED, OUR_STALL.name, STOCK_STALL.name, 2),
    ],
    plot=plots.bandwidth,
)
