"""Asks a question: every contender in a process of its own, in alternating order, over several rounds."""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.files import FOLDER
from benchmarks.machine import this_machine
from benchmarks.question import AnyQuestion, Case, Contender
from benchmarks.results import Measurement, Results, Row

ROOT = Path(__file__).resolve().parent.parent

Turn = tuple[Case, Contender[Any]]


def cases_of(question: AnyQuestion, quick: bool) -> list[Case]:
    return list(question.quick if quick else question.cases)


def turns(question: AnyQuestion, rounds: int, quick: bool) -> Iterator[Turn]:
    """Who is measured when: case by case, and every other round backwards, so that drift strikes all alike."""
    for case in cases_of(question, quick):
        for index in range(rounds):
            order = question.contenders if index % 2 == 0 else reversed(question.contenders)
            for contender in order:
                if index < contender.rounds(case.size, rounds):
                    yield case, contender


def ask(name: str, question: AnyQuestion, rounds: int, quick: bool, announce: Callable[[str], None]) -> Results:
    """Run all turns; `announce` is told of each before it starts. A contender that fails is left out from then on."""
    with tempfile.TemporaryDirectory(prefix="fastopt-benchmark-") as folder:
        return ask_in(folder, name, question, rounds, quick, announce)


def ask_in(
    folder: str, name: str, question: AnyQuestion, rounds: int, quick: bool, announce: Callable[[str], None]
) -> Results:
    """With a folder for the files that contenders read or write."""
    results = Results(name, question.title, question.baseline, this_machine())
    measured: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    failed: set[tuple[str, str]] = set()
    for case, contender in turns(question, rounds, quick):
        announce(f"{name}: {case.label}, {contender.name}")
        key = case.label, contender.name
        if key in failed:
            continue
        try:
            measured[key].append(measure_in_process(name, case, contender, folder))
        except ContenderError as error:
            failed.add(key)
            results.failures.append(f"{case.label}, {contender.name}: {error}")
    for case in cases_of(question, quick):
        for contender in question.contenders:
            if measurements := measured.get((case.label, contender.name)):
                results.rows.append(Row(case.label, case.size, contender.name, measurements))
    results.goals = [goal.result(results) for goal in question.goals]
    return results


class ContenderError(RuntimeError):
    """A contender's process did not come to its end."""


def measure_in_process(name: str, case: Case, contender: Contender[Any], folder: str) -> Measurement:
    command = [sys.executable, "-m", "benchmarks.contender", "--question", name, "--contender", contender.name]
    finished = subprocess.run(
        [*command, "--size", json.dumps(case.size)],
        cwd=ROOT,
        env={**os.environ, FOLDER: folder, **contender.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        lines = finished.stderr.strip().splitlines()
        raise ContenderError(f"exit code {finished.returncode}: {lines[-1] if lines else 'no error text'}")
    return Measurement(**json.loads(finished.stdout.splitlines()[-1]))
