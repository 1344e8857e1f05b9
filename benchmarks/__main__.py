"""Run the benchmarks: `python -m benchmarks [--only QUESTION ...] [--rounds N] [--quick] [--output DIR]`."""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import questions
from benchmarks.question import AnyQuestion
from benchmarks.report import markdown
from benchmarks.results import Results
from benchmarks.runner import ROOT, ask, turns


def main() -> int:
    arguments = parse()
    output = arguments.output or ROOT / ("build/benchmarks" if arguments.quick else "benchmarks/results")
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    output.mkdir(parents=True, exist_ok=True)
    asked = {name: questions.find(name) for name in arguments.only or questions.names()}
    failed = False
    with progress_bar() as progress:
        total = sum(len(list(turns(question, rounds, arguments.quick))) for question in asked.values())
        task = progress.add_task("", total=total)
        announced = 0

        def announce(turn: str) -> None:
            nonlocal announced
            progress.update(task, description=turn, completed=announced)
            announced += 1

        for name, question in asked.items():
            results = ask(name, question, rounds, arguments.quick, announce)
            write(results, question, output)
            failed = failed or bool(results.failures)
            progress.stop()  # or it would wrap the table's lines
            sys.stdout.write(markdown(results) + "\n")
            sys.stdout.flush()
            progress.start()
        progress.update(task, completed=total)
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="QUESTION", action="append", choices=questions.names())
    parser.add_argument("--rounds", metavar="N", type=positive, help="of every contender; default: 5, with --quick: 1")
    parser.add_argument("--quick", action="store_true", help="small cases, to see that everything runs")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="default: benchmarks/results; with --quick: build/benchmarks"
    )
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def progress_bar() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def write(results: Results, question: AnyQuestion, output: Path) -> None:
    results.write(output / f"{results.name}.json")
    (output / f"{results.name}.md").write_text(markdown(results))
    if question.plot is not None and results.rows:
        question.plot(results, output / f"{results.name}.png")


if __name__ == "__main__":
    sys.exit(main())
