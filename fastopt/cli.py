"""The command line: `fastopt info`, also as `python -m fastopt info`."""

import argparse
import sys
from collections.abc import Sequence

from fastopt.backends import backend


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fastopt", description="Load, save, cast and move PyTorch optimizer states.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="which backend is in use, why, and what it runs on")
    parser.parse_args(arguments)
    sys.stdout.write(f"{backend()}\n")
    return 0
