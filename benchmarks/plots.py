"""The two kinds of plots: time over a size, and bandwidth of contenders side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from benchmarks.results import Results, Row

mpl.use("agg")

Plot = Callable[[Results, Path], None]


def time_over(size: str, *contenders: str) -> Plot:
    """Time over one of the case's sizes, both logarithmic; the band goes from the fastest to the slowest round."""

    def plot(results: Results, path: Path) -> None:
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for contender in contenders:
            rows = [row for row in results.rows if row.contender == contender]
            xs = [row.size[size] for row in rows]
            axes.plot(xs, [row.median for row in rows], marker="o", label=contender)
            axes.fill_between(xs, [min(row.seconds) for row in rows], [max(row.seconds) for row in rows], alpha=0.2)
        axes.set(xscale="log", yscale="log", xlabel=size, ylabel="seconds")
        axes.set_title(results.title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend()
        save(figure, path)

    return plot


def bandwidth_over(size: str) -> Plot:
    """GB/s over one of the case's sizes; the band goes from the slowest to the fastest round."""

    def plot(results: Results, path: Path) -> None:
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for contender in dict.fromkeys(row.contender for row in results.rows):
            rows = [row for row in results.rows if row.contender == contender]
            xs = [row.size[size] for row in rows]
            axes.plot(xs, [row.bandwidth(row.median) for row in rows], marker="o", label=contender)
            slowest, fastest = ([row.bandwidth(pick(row.seconds)) for row in rows] for pick in (max, min))
            axes.fill_between(xs, slowest, fastest, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set(ylim=(0, None), xlabel=size, ylabel="GB/s, read and written")
        axes.set_title(results.title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend()
        save(figure, path)

    return plot


def bandwidth(results: Results, path: Path) -> None:
    """GB/s of every contender, one panel a case; the whiskers go from the slowest to the fastest round."""
    cases = list(dict.fromkeys(row.case for row in results.rows))
    figure, panels = plt.subplots(
        len(cases), squeeze=False, figsize=(7, 0.6 + sum(0.4 + 0.35 * len(rows_of(results, c)) for c in cases))
    )
    for axes, case in zip(panels[:, 0], cases, strict=True):
        rows = rows_of(results, case)
        medians = [row.bandwidth(row.median) for row in rows]
        slowest = [median - row.bandwidth(max(row.seconds)) for median, row in zip(medians, rows, strict=True)]
        fastest = [row.bandwidth(min(row.seconds)) - median for median, row in zip(medians, rows, strict=True)]
        axes.barh([row.contender for row in rows], medians, xerr=[slowest, fastest], capsize=3)
        axes.invert_yaxis()
        axes.set_title(case, fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    panels[-1, 0].set_xlabel("GB/s, read and written")
    figure.suptitle(results.title, fontsize=10)
    figure.set_layout_engine("constrained")
    save(figure, path)


def rows_of(results: Results, case: str) -> list[Row]:
    return [row for row in results.rows if row.case == case]


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
