"""The demo's figure."""

import math
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from loading import FASTOPT, LOADERS, STOCK, Measured
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

import fastopt

CAPTION_WIDTH = 140  # characters, at the caption's size
COLORS = {STOCK: "#8a8f98", FASTOPT: "#1668c7"}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
}


def draw(small: list[Measured], large: Measured, path: Path) -> None:
    """Write the figure: many small parameters to the left, few large ones to the right."""
    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(12, 5.2), width_ratios=(1.7, 1), layout="constrained", gridspec_kw={"wspace": 0.08}
        )
        draw_times(left, small)
        draw_rates(right, large)
        figure.supxlabel(textwrap.fill(caption(small), CAPTION_WIDTH), fontsize=9, color="#666666", x=0.01, ha="left")
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def caption(small: list[Measured]) -> str:
    """What was measured, on what."""
    backend = fastopt.backend()
    once = [f"{measured.size.parameters:,}" for measured in small if len(measured.seconds[STOCK]) == 1]
    exception = f" (stock torch once at {', '.join(once)})" if once else ""
    return (
        f"AdamW's float32 state loaded for bfloat16 parameters on the CPU, medians{exception}, "
        "to the right every round as a dot; "
        f"{backend.name} backend, {backend.threads} threads, torch {backend.torch}"
    )


def draw_times(axes: Axes, small: list[Measured]) -> None:
    """Load time against the number of parameters."""
    counts = [measured.size.parameters for measured in small]
    for name in LOADERS:
        medians = [measured.median(name) for measured in small]
        axes.plot(counts, medians, "o-", color=COLORS[name], linewidth=2.2, markersize=6)
        axes.annotate(
            f"{name}\n{readable(medians[-1])}",
            (counts[-1], medians[-1]),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=COLORS[name],
            fontweight="bold",
        )
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="load time")
    axes.set_title(f"{counts[-1]:,} small parameters: {small[-1].gain:,.0f} times as fast")
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: readable(seconds)))
    axes.set_ylim(*whole_decades([measured.median(name) for measured in small for name in LOADERS]))
    axes.grid(which="major", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.set_xlim(counts[0] * 0.85, counts[-1] * 2.3)


def draw_rates(axes: Axes, large: Measured) -> None:
    """GB/s of each contender: a bar for the median, a dot for each round."""
    for place, name in enumerate(LOADERS):
        rates = large.rates(name)
        axes.bar(place, large.median_rate(name), width=0.55, color=COLORS[name])
        axes.plot([place] * len(rates), rates, "o", color="white", markeredgecolor="#222222", markersize=5)
        axes.annotate(
            f"{large.median_rate(name):.1f} GB/s\n{readable(large.median(name))}",
            (place, max(rates)),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=COLORS[name],
            fontweight="bold",
        )
    axes.set_xticks(range(len(LOADERS)), LOADERS)
    axes.set_ylim(0, 1.2 * max(rate for name in LOADERS for rate in large.rates(name)))
    axes.set_ylabel("GB/s, read and written")
    axes.set_title(f"{large.size.parameters} large ({large.bytes_read / 1e9:.1f} GB): {large.gain:.1f} times as fast")


def whole_decades(values: list[float]) -> tuple[float, float]:
    """The powers of ten around all values."""
    return 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)))


def readable(seconds: float) -> str:
    """A time in the unit that fits it."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1000 * seconds:.3g} ms"
