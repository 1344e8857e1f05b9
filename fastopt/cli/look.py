"""The commands that look at files: `inspect`, `diff` and `verify`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastopt.casting import bytes_of
from fastopt.cli import sources
from fastopt.cli.outcome import DIFFERENT, SAME, Outcome, as_json
from fastopt.cli.progress import Progress
from fastopt.cli.sources import NeedsOptionError
from fastopt.inspection import Problem, diff, summary
from fastopt.inspection.flaws import flaws
from fastopt.inspection.places import places
from fastopt.state_dict import StateDict
from fastopt.text import counted, size

Commands = Any
"""What `add_subparsers` returns, whose type argparse keeps to itself."""

Command = argparse.ArgumentParser

SHOWN = 20
"""Flaws that `verify` prints; --json has them all."""


# ---- inspect ----


def add_inspect(commands: Commands) -> Command:
    """Add the command `inspect`."""
    command: Command = commands.add_parser("inspect", help="what the state in a file holds")
    command.add_argument("file")
    sources.add_options(command)
    command.add_argument("--values", action="store_true", help="look at the values too: min, max, NaN, inf")
    command.set_defaults(run=inspect)
    return command


def inspect(options: argparse.Namespace) -> Outcome:
    """Describe the state in a file."""
    saved = sources.read(options, options.file, options.key)
    found = summary(saved)
    if options.values:
        with Progress(found.bytes) as progress:
            found = summary(saved, values=True, advance=progress.advance)
    return Outcome(as_json(found.to_dict()) if options.json else str(found), SAME)


# ---- diff ----


def add_diff(commands: Commands) -> Command:
    """Add the command `diff`."""
    command: Command = commands.add_parser("diff", help="how the states in two files differ; exits with 1 if they do")
    command.add_argument("a")
    command.add_argument("b")
    sources.add_options(command)
    command.add_argument("--key-b", metavar="KEY", help="the same in B, if it differs; '' for the file itself")
    command.set_defaults(run=run_diff)
    return command


def run_diff(options: argparse.Namespace) -> Outcome:
    """Compare the states in two files."""
    key_b = options.key if options.key_b is None else options.key_b or None
    a = sources.read(options, options.a, options.key)
    b = sources.read(options, options.b, key_b, key_option="--key-b")
    with Progress(summary(a).bytes + summary(b).bytes) as progress:
        found = diff(a, b, advance=progress.advance)
    return Outcome(as_json(found.to_dict()) if options.json else str(found), DIFFERENT if found else SAME)


# ---- verify ----


def add_verify(commands: Commands) -> Command:
    """Add the command `verify`."""
    command: Command = commands.add_parser(
        "verify", help="whether a file is whole and its state sound; exits with 1 if not"
    )
    command.add_argument("file")
    sources.add_options(command)
    command.set_defaults(run=verify)
    return command


def verify(options: argparse.Namespace) -> Outcome:
    """Check the structure of a file, its checksums, and whether all values are finite."""
    try:
        saved, has_checksums = sources.verified(options, options.file, options.key)
    except (OSError, MemoryError, KeyError, ImportError, NeedsOptionError):  # says nothing about what is in the file
        raise
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        return verdict(options, [Problem("damage", f"{error} {notes}".strip())])
    tensors = tensors_in(saved)
    with Progress(sum(map(bytes_of, tensors))) as progress:
        found = flaws(saved, advance=progress.advance)
    return verdict(options, found, tensors, has_checksums)


def tensors_in(saved: StateDict) -> list[torch.Tensor]:
    """All tensors of the state, however odd the rest is."""
    state = saved["state"]
    entries = state.values() if isinstance(state, Mapping) else ()
    return [place.value for entry in entries for place in places(entry) if isinstance(place.value, torch.Tensor)]


def verdict(
    options: argparse.Namespace,
    found: Sequence[Problem],
    tensors: Sequence[torch.Tensor] = (),
    has_checksums: bool = True,
) -> Outcome:
    """What `verify` says."""
    code = DIFFERENT if found else SAME
    if options.json:
        about = {
            "file": options.file,
            "sound": not found,
            "tensors": len(tensors),
            "bytes": sum(map(bytes_of, tensors)),
            "checksums": has_checksums,
            "flaws": [{"kind": flaw.kind, "text": flaw.text} for flaw in found],
        }
        return Outcome(as_json(about), code)
    if not found:
        checksums = "checksums match" if has_checksums else "the file has no checksums"
        about_all = f"{counted(len(tensors), 'tensor')}, {size(sum(map(bytes_of, tensors)))}"
        return Outcome(f"{options.file} is sound: {about_all}, all values finite, {checksums}", code)
    lines = [f"{options.file} has {counted(len(found), 'flaw')}", *(f"  {flaw}" for flaw in found[:SHOWN])]
    if len(found) > SHOWN:
        lines.append(f"  and {len(found) - SHOWN:,} more")
    return Outcome("\n".join(lines), code)
