"""The checkpoints that commands read, and the options that say how."""

import argparse
import pkgutil
import shlex

from fastopt.checkpoint import read_state_dict
from fastopt.errors import NoChecksumsError, NoStateDictError, UnsafeGlobalsError
from fastopt.files.torch_file import SafeGlobal
from fastopt.state_dict import StateDict


class NeedsOptionError(Exception):
    """A checkpoint is not read without an option that was not given; nothing is wrong with it."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of all commands that read checkpoints."""
    command.add_argument("--key", help="where in a larger checkpoint the state is: optimizer, optimizer_states.0")
    command.add_argument(
        "--safe-global",
        action="append",
        default=[],
        type=imported,
        metavar="MODULE.NAME",
        help="a class or function that the file may name, and that is imported for it; may be given several times",
    )


def imported(name: str) -> SafeGlobal:
    """A class or function, with the name that it has in the file."""
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # whatever the import of a module raises
        raise argparse.ArgumentTypeError(f"cannot import {name!r}: {error}") from error
    if not callable(found):
        raise argparse.ArgumentTypeError(f"{name!r} is no class or function")
    return found, name


def read(
    options: argparse.Namespace, path: str, key: str | None, *, verify: bool = False, key_option: str = "--key"
) -> StateDict:
    """The state in a checkpoint.

    Args:
        options: those of `add_options`.
        path: the checkpoint.
        key: where in it the state is.
        verify: whether its checksums are looked at.
        key_option: the option that `key` came from.

    Raises:
        NeedsOptionError: there is no state at the key, but elsewhere; or the file names what was not allowed.
        Exception: what `read_state_dict` raises.
    """
    try:
        return read_state_dict(path, key, options.safe_global, verify)
    except NoStateDictError as error:
        if not error.candidates:
            raise
        keys = " or ".join(f"{key_option} {shlex.quote(candidate)}" for candidate in error.candidates)
        raise NeedsOptionError(f"{error.what}; pass {keys}") from error
    except UnsafeGlobalsError as error:
        allowed = " ".join(f"--safe-global {shlex.quote(name)}" for name in error.names)
        raise NeedsOptionError(f"{error.what}; if you trust them, pass {allowed}") from error


def verified(options: argparse.Namespace, path: str, key: str | None) -> tuple[StateDict, bool]:
    """The state in a checkpoint, and whether it has been held against checksums: not all have some."""
    try:
        return read(options, path, key, verify=True), True
    except NoChecksumsError:
        return read(options, path, key), False
