"""What fastopt does, end to end: a training that resumes to the bit, and large states beside stock torch.

Takes up to three minutes and 6 GB of memory. Exits with 1 where a result is not exactly stock torch's.
"""

import contextlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import training
from checks import WrongResultError, require_same_losses
from loading import FASTOPT, LOADERS, STOCK, Measured, Size, float32_state, measure, size_for_memory
from plot import draw, readable
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from torch.optim import Optimizer

import fastopt

OUTPUT = Path(__file__).resolve().parents[1] / "demo-output"
CORPUS_BYTES = 2_000_000
STEPS = 20
BFLOAT16_STEPS = 3
SMALL = [Size(parameters, elements=64) for parameters in (1_000, 3_000, 10_000, 30_000)]
LARGE_ELEMENTS = 16 << 20
LARGE_MEMORY = 4_800_000_000
ROUNDS = 3
LARGE_ROUNDS = 5
STOCK_ONCE_FROM = 10_000  # stock torch takes seconds for these, and up to half a minute at 30,000

WIDTH_OF_A_FILE = 100

T = TypeVar("T")
console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def main() -> int:
    """Run the demo; returns the exit code."""
    started = time.perf_counter()
    console.print(str(fastopt.backend()))
    try:
        demonstrate_training()
        demonstrate_loading()
    except WrongResultError as error:
        console.print(f"[bold red]not stock torch's result:[/] {error}")
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    console.print(f"total time {time.perf_counter() - started:.0f} s, peak memory {peak / 1e9:.2f} GB")
    return 0


def demonstrate_training() -> None:
    """Train, save, and resume in every way."""
    console.rule("A training that resumes to the bit")
    corpus = training.read_corpus(CORPUS_BYTES)
    model, optimizer = training.fresh(seed=0)
    console.print(
        f"A GPT of {sum(param.numel() for param in model.parameters()) / 1e6:.1f} million parameters learns "
        f"{len(corpus) / 1e6:.1f} MB of source code from Python's standard library."
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        uninterrupted = train("uninterrupted", model, optimizer, corpus, range(2 * STEPS))
        save_half_way(checkpoint, corpus, uninterrupted)
        resume_in_float32(checkpoint, corpus, uninterrupted)
        resume_in_bfloat16(checkpoint, corpus, uninterrupted)


def save_half_way(checkpoint: Path, corpus: torch.Tensor, uninterrupted: Sequence[float]) -> None:
    """Train the first half once more, up to the checkpoint."""
    model, optimizer = training.fresh(seed=0)
    losses = train("up to the checkpoint", model, optimizer, corpus, range(STEPS))
    require_same_losses("a second run from the same seed", uninterrupted[:STEPS], losses)
    training.save(model, optimizer, checkpoint)


def resume_in_float32(checkpoint: Path, corpus: torch.Tensor, uninterrupted: Sequence[float]) -> None:
    """Resume with either loader: both must go on as if nothing had happened."""
    columns = {"uninterrupted": uninterrupted[STEPS:]}
    for name, load in LOADERS.items():
        model, optimizer, _ = training.resume(checkpoint, load, torch.float32)
        columns[name] = train(f"resumed by {name}", model, optimizer, corpus, range(STEPS, 2 * STEPS))
        require_same_losses(f"the run resumed by {name}", columns["uninterrupted"], columns[name])
    show_losses(f"{STEPS} losses after the checkpoint, all equal to the last bit", columns, shown=(0, 1, 2, STEPS - 1))


def resume_in_bfloat16(checkpoint: Path, corpus: torch.Tensor, uninterrupted: Sequence[float]) -> None:
    """Resume a model that has become bfloat16: the state follows, in the same way with either loader."""
    steps = range(STEPS, STEPS + BFLOAT16_STEPS)
    columns = {"float32, uninterrupted": uninterrupted[steps.start : steps.stop]}
    for name, load in LOADERS.items():
        model, optimizer, report = training.resume(checkpoint, load, torch.bfloat16)
        if report is not None:
            console.print(str(report), markup=False)
        columns[name] = train(f"resumed in bfloat16 by {name}", model, optimizer, corpus, steps)
    require_same_losses("the run resumed in bfloat16 by fastopt", columns[STOCK], columns[FASTOPT])
    show_losses("Resumed in bfloat16, both loaders equal to the last bit", columns, shown=range(BFLOAT16_STEPS))


def train(
    title: str, model: torch.nn.Module, optimizer: Optimizer, corpus: torch.Tensor, steps: Sequence[int]
) -> list[float]:
    """Train with a progress bar; returns the losses."""
    losses = []
    with one_thread(), training_progress() as progress:
        task = progress.add_task(title, total=len(steps), note="")
        for loss in training.train(model, optimizer, corpus, steps):
            losses.append(loss)
            progress.update(task, advance=1, note=f"loss {loss:.4f}")
    return losses


def training_progress() -> Progress:
    """A bar that shows the loss and stays."""
    return Progress(
        TextColumn("{task.description:36}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Work on one thread: where others use the cores too, a small model waits longer for a second than that saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def show_losses(title: str, columns: dict[str, Sequence[float]], shown: Sequence[int]) -> None:
    """A table of losses side by side, in full precision."""
    table = Table("step", *columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in shown:
        table.add_row(str(STEPS + row), *(repr(losses[row]) for losses in columns.values()))
    console.print(table)


def demonstrate_loading() -> None:
    """Load float32 states into optimizers over bfloat16 parameters, with stock torch and with fastopt."""
    console.rule("Large states: float32 loaded for bfloat16 parameters")
    torch.manual_seed(0)
    small = [measure_size(size, 1 if size.parameters >= STOCK_ONCE_FROM else ROUNDS, ROUNDS) for size in SMALL]
    large = measure_size(size_for_memory(LARGE_ELEMENTS, LARGE_MEMORY), LARGE_ROUNDS, LARGE_ROUNDS)
    show_measured([*small, large])
    OUTPUT.mkdir(exist_ok=True)
    figure = OUTPUT / "load.png"
    draw(small, large, figure)
    console.print(f"Every state loaded by fastopt was equal to stock torch's, value by value.\nplot: {figure}")


def measure_size(size: Size, stock_rounds: int, fastopt_rounds: int) -> Measured:
    """Measure a state of a given size."""
    title = f"{size.parameters:,} parameters of {size.elements:,}"
    rounds = {STOCK: stock_rounds, FASTOPT: fastopt_rounds}
    state = dict(track(f"{title}: making a state", float32_state(size), size.parameters))
    measured = measure(state, size, rounds, waiting=lambda name: spinner(f"{title}: {name} loads"))
    console.print(f"{title} elements:")
    for name, seconds in measured.seconds.items():
        console.print(f"  {name:12} {readable(measured.median(name)):>7}, {spread(seconds)}")
    return measured


def spread(seconds: Sequence[float]) -> str:
    """What a median stands for."""
    if len(seconds) == 1:
        return "loaded once"
    return f"the median of {len(seconds)} rounds of {readable(min(seconds))} to {readable(max(seconds))}"


def show_measured(states: Sequence[Measured]) -> None:
    """A table of all loads."""
    table = Table(
        "parameters x elements",
        "read",
        "written",
        *LOADERS,
        "gain",
        title="Median load times",
        pad_edge=False,
        padding=(0, 1),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for measured in states:
        table.add_row(
            f"{measured.size.parameters:,} x {measured.size.elements:,}",
            f"{measured.bytes_read / 1e6:,.4g} MB",
            f"{measured.bytes_written / 1e6:,.4g} MB",
            *(readable(measured.median(name)) for name in LOADERS),
            f"{measured.gain:,.1f} x",
        )
    console.print(table)


def track(title: str, items: Iterable[T], total: int) -> Iterator[T]:
    """The items, while a progress bar follows them."""
    with passing_progress(title, BarColumn(bar_width=24), MofNCompleteColumn()) as progress:
        yield from progress.track(items, task_id=progress.add_task(title, total=total))


@contextlib.contextmanager
def spinner(title: str) -> Iterator[None]:
    """A clock that runs, for what cannot say how far it has come."""
    with passing_progress(title, SpinnerColumn()) as progress:
        progress.add_task(title, total=None)
        yield


def passing_progress(title: str, *columns: ProgressColumn) -> Progress:
    """A progress display that leaves no trace."""
    return Progress(
        TextColumn("{task.description}"),
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=4,  # seldom, as what is measured meanwhile shares the interpreter
    )


if __name__ == "__main__":
    sys.exit(main())
