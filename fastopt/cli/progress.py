"""A bar for what takes long, on a terminal."""

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

from fastopt.text import duration, size

SECONDS = 0.1
"""Between two pictures of the bar, and before the first."""

CLEAR = "\r\x1b[K"
"""Empties the line of a terminal."""

CELLS = 24


class Progress:
    """Shows how many of so many bytes are done while a `with` block runs; nothing where stderr is no terminal.

    What it shows is what it was told: no bar moves on by itself.
    """

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self.shows = self.stream.isatty()
        self.done = 0
        self.started = self.shown = time.monotonic()

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        self.done += count
        now = time.monotonic()
        if self.shows and now - self.shown >= SECONDS:
            self.shown = now
            columns = shutil.get_terminal_size().columns
            self.stream.write(CLEAR + self.line(now - self.started)[: columns - 1])
            self.stream.flush()

    def line(self, seconds: float) -> str:
        """The bar after so many seconds."""
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        cells = ("#" * int(share * CELLS)).ljust(CELLS)
        left = seconds * (1 / share - 1) if share else float("inf")
        text = f"[{cells}] {share:4.0%}  {size(self.done)} of {size(self.total)}, {size(self.done / seconds)}/s"
        return f"{text}, {duration(left)} left" if share else text

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown != self.started:
            self.stream.write(CLEAR)
            self.stream.flush()
