"""The command line: `fastopt info`, `inspect` and `diff`, also as `python -m fastopt …`."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from fastopt.backends import backend
from fastopt.checkpoint import read_state_dict
from fastopt.inspection import diff, summary

SAME, DIFFERENT, FAILED = 0, 1, 2
"""Exit codes, as those of `diff`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        text, code = options.run(options)
    except Exception as error:
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        text = " ".join([message, *getattr(error, "__notes__", [])])
        sys.stderr.write(f"fastopt: {' '.join(text.split())}\n")
        return FAILED
    sys.stdout.write(f"{text}\n")
    return int(code)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    result = argparse.ArgumentParser(prog="fastopt", description="Load, save, cast and move PyTorch optimizer states.")
    commands = result.add_subparsers(dest="command", required=True, metavar="command")

    info_command = commands.add_parser("info", help="which backend is in use, why, and what it runs on")
    info_command.set_defaults(run=lambda options: (backend(), SAME))

    inspect_command = commands.add_parser("inspect", help="what the state in a file holds")
    inspect_command.add_argument("file")
    inspect_command.add_argument("--values", action="store_true", help="look at the values too: min, max, NaN, inf")
    inspect_command.set_defaults(run=run_inspect)

    diff_command = commands.add_parser("diff", help="how the states in two files differ; exits with 1 if they do")
    diff_command.add_argument("a")
    diff_command.add_argument("b")
    diff_command.set_defaults(run=run_diff)

    for command in (inspect_command, diff_command):
        command.add_argument("--key", help="where in a larger checkpoint the state is: optimizer, optimizer_states.0")
        command.add_argument("--json", action="store_true", help="JSON instead of a table")
    return result


def run_inspect(options: argparse.Namespace) -> tuple[Any, int]:
    """Describe the state in a file."""
    found = summary(read_state_dict(options.file, options.key), values=options.values)
    return as_json(found.to_dict()) if options.json else found, SAME


def run_diff(options: argparse.Namespace) -> tuple[Any, int]:
    """Compare the states in two files."""
    found = diff(read_state_dict(options.a, options.key), read_state_dict(options.b, options.key))
    return as_json(found.to_dict()) if options.json else found, DIFFERENT if found else SAME


def as_json(value: Any) -> str:
    """Strict JSON: what it has no word for (NaN, infinity, tensors) becomes a string."""
    return json.dumps(plain(value), indent=2, allow_nan=False, default=str)


def plain(value: Any) -> Any:
    """The same, with strings in place of the floats that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
