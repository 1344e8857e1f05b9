"""What was measured, and the numbers that follow from it."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine


@dataclass(frozen=True)
class Measurement:
    """One call in one process."""

    seconds: float
    cpu_seconds: float
    """Of all threads, in user and system mode."""
    peak_rss: int
    """The most bytes the process held during the call, its input included."""
    added_rss: int
    """How many of them it did not hold before."""
    bytes_read: int
    bytes_written: int
    backend: str
    """The backend that fastopt had in this process."""


@dataclass(frozen=True)
class Row:
    """All measurements of one contender in one case."""

    case: str
    size: dict[str, Any]
    contender: str
    measurements: Sequence[Measurement]

    @property
    def seconds(self) -> list[float]:
        return [measurement.seconds for measurement in self.measurements]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(measurement.cpu_seconds for measurement in self.measurements)

    @property
    def peak_rss(self) -> float:
        return statistics.median(measurement.peak_rss for measurement in self.measurements)

    @property
    def added_rss(self) -> float:
        return statistics.median(measurement.added_rss for measurement in self.measurements)

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written, the same in every round."""
        return self.measurements[0].bytes_read + self.measurements[0].bytes_written

    def bandwidth(self, seconds: float) -> float:
        """GB/s, read and written."""
        return self.bytes_moved / seconds / 1e9

    def summary(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "size": self.size,
            "contender": self.contender,
            "median_seconds": self.median,
            "min_seconds": min(self.seconds),
            "max_seconds": max(self.seconds),
            "cpu_seconds": self.cpu_seconds,
            "gigabytes_per_second": self.bandwidth(self.median),
            "peak_rss": self.peak_rss,
            "added_rss": self.added_rss,
            "measurements": [asdict(measurement) for measurement in self.measurements],
        }


@dataclass(frozen=True)
class GoalResult:
    goal: str
    target: str
    measured: float | None
    """A ratio or an amount; None where one of its parts was not measured."""
    met: bool | None
    reason: str
    """Why it is not met, as far as that is known."""


@dataclass
class Results:
    """The answer to one question."""

    name: str
    title: str
    baseline: str
    machine: Machine
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    goals: list[GoalResult] = field(default_factory=list)

    def row(self, case: str, contender: str) -> Row | None:
        return next((row for row in self.rows if (row.case, row.contender) == (case, contender)), None)

    def speedup(self, case: str, contender: str, over: str) -> float | None:
        """How many times faster one contender is than another."""
        ours, theirs = self.row(case, contender), self.row(case, over)
        return theirs.median / ours.median if ours and theirs else None

    def write(self, path: Path) -> None:
        content = {
            "question": self.name,
            "title": self.title,
            "baseline": self.baseline,
            "machine": asdict(self.machine),
            "rows": [row.summary() for row in self.rows],
            "goals": [asdict(goal) for goal in self.goals],
            "failures": self.failures,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
