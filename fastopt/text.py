"""Numbers and lists as people read them, in reports and on the terminal."""

from collections.abc import Sequence
from typing import Any

import torch

SHOWN = 5
"""Entries of a list that are printed."""


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")


def counted(count: int, noun: str) -> str:
    """`1 tensor`, `2,000 tensors`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(count: float) -> str:
    """Bytes, in units of powers of a thousand."""
    return scaled(count, ("B", "kB", "MB", "GB"))


def duration(seconds: float) -> str:
    """Seconds, from microseconds up."""
    return scaled(1e6 * seconds, ("us", "ms", "s"))


def scaled(value: float, units: Sequence[str]) -> str:
    """Three digits of a value, in the first unit that has room for it; each unit is a thousand of the one before."""
    for unit in units:
        if value < 999.5:  # what rounds to a thousand would be printed as 1e+03
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{1000 * value:,.0f} {units[-1]}"


def some(items: Sequence[Any]) -> str:
    """The first items of a list, and how many there are besides."""
    return listed([repr(item) for item in items[:SHOWN]], len(items))


def listed(shown: Sequence[str], count: int) -> str:
    """The first of so many."""
    text = ", ".join(shown)
    return text if count <= len(shown) else f"{text} and {count - len(shown):,} more"


def ranges(numbers: Sequence[int]) -> str:
    """All of some numbers in rising order, neighbours together: `0-3, 7`."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines: its columns are as wide as they need; rows may lack their last cells."""
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
