"""The kinds of goals that questions have."""

from collections.abc import Sequence

from benchmarks.question import Case, Goal
from benchmarks.results import Results


def faster(case: Case, contender: str, over: str, times: float) -> Goal:
    def measure(results: Results) -> float | None:
        return results.speedup(case.label, contender, over)

    return Goal(f"{case.label}: {contender} over {over}", f"at least {times:g}x", measure)


def near(case: Case, contender: str, floor: str, share: float) -> Goal:
    """How much of the floor's speed a contender reaches."""

    def measure(results: Results) -> float | None:
        return results.speedup(case.label, contender, floor)

    return Goal(f"{case.label}: {contender}, of the speed of {floor}", f"at least {share:.2f}", measure)


def cpu_time(case: Case, contender: str, tensors: int, microseconds: float) -> Goal:
    def measure(results: Results) -> float | None:
        row = results.row(case.label, contender)
        return row.cpu_seconds / tensors * 1e6 if row else None

    return Goal(f"{case.label}: {contender}, CPU time a tensor", f"at most {microseconds:g} us", measure)


def constant(cases: Sequence[Case], contender: str, per: str, within: float) -> Goal:
    """The time per unit of the size `per` is the same in all cases, as far as the largest over the smallest says."""

    def measure(results: Results) -> float | None:
        rows = [row for case in cases if (row := results.row(case.label, contender))]
        if len(rows) < len(cases):
            return None
        times: list[float] = [row.median / row.size[per] for row in rows]
        return max(times) / min(times)

    span = f"{cases[0].label} to {cases[-1].label}"
    return Goal(f"{span}: spread of {contender}'s time over {per}", f"at most {within:g}x", measure)
