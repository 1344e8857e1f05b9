"""The command line: `fastopt info`, `inspect`, `diff`, `verify`, `convert`, `bench`; or `python -m fastopt …`."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastopt.backends import backend
from fastopt.cli import bench, convert, look
from fastopt.cli.outcome import FAILED, SAME, Outcome

INTERRUPTED = 130
"""The exit code after Ctrl-C, as a shell has it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        outcome: Outcome = options.run(options)
        write(f"{outcome.text}\n")
    except KeyboardInterrupt:
        sys.stderr.write("fastopt: interrupted\n")
        return INTERRUPTED
    except Exception as error:
        sys.stderr.write(f"fastopt: {in_a_line(error)}\n")
        return FAILED
    return outcome.code


def write(text: str) -> None:
    """Write the results; whoever has read enough of them may close the pipe."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at exit goes there


def in_a_line(error: Exception) -> str:
    """What went wrong, notes included."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(" ".join([message or type(error).__name__, *getattr(error, "__notes__", [])]).split())


class Parser(argparse.ArgumentParser):
    """Says what is wrong with arguments in a line, as all errors are said."""

    def error(self, message: str) -> NoReturn:
        """Exit."""
        self.exit(FAILED, f"fastopt: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    result = Parser(prog="fastopt", description="Load, save, cast and move PyTorch optimizer states.")
    commands = result.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    info = commands.add_parser("info", help="which backend is in use, why, and what it runs on")
    info.set_defaults(run=lambda options: Outcome(str(backend()), SAME))
    for add in (look.add_inspect, look.add_diff, look.add_verify, convert.add, bench.add):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="JSON, for programs")
    return result
