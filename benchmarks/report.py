"""Results as Markdown."""

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.results import GoalResult, Results, Row

COLUMNS = (
    "case",
    "contender",
    "rounds",
    "median",
    "min",
    "max",
    "CPU",
    "speed",
    "GB/s",
    "peak RSS",
    "added RSS",
)


def markdown(results: Results) -> str:
    lines = [f"## {results.name}: {results.title}", "", *(f"- {line}" for line in str(results.machine).split("\n")), ""]
    lines += table(COLUMNS, (cells(results, row) for row in results.rows))
    lines += ["", f"Speed is over {results.baseline}. GB/s counts bytes of tensors read and written.", ""]
    if results.goals:
        lines += [*table(("goal", "target", "measured", ""), map(goal_cells, results.goals)), ""]
        lines += reasons(results.goals)
    if results.failures:
        lines += ["Failed:", "", *(f"- {failure}" for failure in results.failures), ""]
    return "\n".join(lines)


def cells(results: Results, row: Row) -> tuple[str, ...]:
    return (
        row.case,
        row.contender,
        str(len(row.measurements)),
        duration(row.median),
        duration(min(row.seconds)),
        duration(max(row.seconds)),
        duration(row.cpu_seconds),
        ratio(results.speedup(row.case, row.contender, results.baseline)),
        f"{row.bandwidth(row.median):.3g}" if row.bytes_moved else "-",
        f"{row.peak_rss / 1e6:,.0f} MB",
        f"{row.added_rss / 1e6:,.0f} MB",
    )


def goal_cells(goal: GoalResult) -> tuple[str, ...]:
    met = {None: "not measured", True: "met", False: "not met"}[goal.met]
    return goal.goal, goal.target, number(goal.measured), met


def reasons(goals: Sequence[GoalResult]) -> Iterator[str]:
    """Why goals are not met, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for goal in goals:
        if goal.reason:
            by_reason.setdefault(goal.reason, []).append(goal.goal)
    for reason, texts in by_reason.items():
        yield f"- {'; '.join(texts)}: {reason}"
    if by_reason:
        yield ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    body = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in body) for column in range(len(header))]
    body.insert(1, ["-" * width for width in widths])
    for row in body:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}x" if value >= 100 else f"{value:.3g}x"
