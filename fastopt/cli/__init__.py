"""The command line: `fastopt info`, `inspect`, `diff`, `verify`, `convert`, `bench`; or `python -m fastopt …`."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import fastopt
from fastopt import startup
from fastopt.backends import backend
from fastopt.cli import bench, convert, look
from fastopt.cli.outcome import FAILED, SAME, Outcome


def command() -> int:
    """The process of `fastopt`: Ctrl-C ends it with a line, and not with a traceback, whenever it comes."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main()
        signal.signal(signal.SIGINT, startup.end)
    except KeyboardInterrupt:
        startup.end()
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    try:
        options = parser().parse_args(arguments)
        outcome: Outcome = options.run(options)
        write(f"{outcome.text}\n")
    except KeyboardInterrupt:
        sys.stderr.write(startup.LAST_WORDS)
        return startup.INTERRUPTED
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
    quoted = type(error) is KeyError and error.args  # which shows its text as a text in Python
    message = str(error.args[0]) if quoted else str(error)
    parts = [message or type(error).__name__, *getattr(error, "__notes__", [])]
    return "; ".join(" ".join(part.split()) for part in parts)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with arguments in a line, as all errors are said."""

    def error(self, message: str) -> NoReturn:
        """Exit."""
        self.exit(FAILED, f"fastopt: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    result = Parser(prog="fastopt", description="Load, save, cast and move PyTorch optimizer states.")
    result.add_argument("--version", action="version", version=f"fastopt {fastopt.__version__}")
    commands = result.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    info = commands.add_parser("info", help="which backend is in use, why, and what it runs on")
    info.set_defaults(run=lambda options: Outcome(str(backend()), SAME))
    for add in (look.add_inspect, look.add_diff, look.add_verify, convert.add, bench.add):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="JSON, for programs")
    return result
