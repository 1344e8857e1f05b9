"""The kinds of goals that questions have."""

from collections.abc import Sequence

from benchmarks.question import Case, Goal, Target
from benchmarks.results import Results


def faster(case: Case, contender: str, over: str, times: float, reason: str = "") -> Goal:
    def measure(results: Results) -> float | None:
        return results.speedup(case.label, contender, over)

    return Goal(f"{case.label}: {contender} over {over}", Target(times, "x"), measure, reason)


def near(case: Case, contender: str, floor: str, share: float, reason: str = "") -> Goal:
    """How much of the floor's speed a contender reaches."""

    def measure(results: Results) -> float | None:
        return results.speedup(case.label, contender, floor)

    return Goal(f"{case.label}: {contender}, of the speed of {floor}", Target(share), measure, reason)


def cpu_time(case: Case, contender: str, tensors: int, microseconds: float) -> Goal:
    def measure(results: Results) -> float | None:
        row = results.row(case.label, contender)
        return row.cpu_seconds / tensors * 1e6 if row else None

    return Goal(f"{case.label}: {contender}, CPU time a tensor", Target(microseconds, " us", at_most=True), measure)


def memory_beside_results(case: Case, contender: str, most: float) -> Goal:
    """How many bytes a contender takes besides those of its results."""

    def measure(results: Results) -> float | None:
        row = results.row(case.label, contender)
        return (row.added_rss - row.measurements[0].bytes_written) / 1e6 if row else None

    target = Target(most / 1e6, " MB", at_most=True)
    return Goal(f"{case.label}: {contender}, memory besides results", target, measure)


def constant(cases: Sequence[Case], contender: str, per: str, within: float, reason: str = "") -> Goal:
    """The time per unit of the size `per` is the same in all cases, as far as the largest over the smallest says."""

    def measure(results: Results) -> float | None:
        rows = [row for case in cases if (row := results.row(case.label, contender))]
        if len(rows) < len(cases):
            return None
        times: list[float] = [row.median / row.size[per] for row in rows]
        return max(times) / min(times)

    span = f"{cases[0].label} to {cases[-1].label}"
    target = Target(within, "x", at_most=True)
    return Goal(f"{span}: spread of {contender}'s time over {per}", target, measure, reason)
