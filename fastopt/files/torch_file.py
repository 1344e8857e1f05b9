"""Files that `torch.save` wrote."""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from fastopt.errors import CheckpointError
from fastopt.files.atomic import replacing

SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]
"""A class or function that a file may name; or one and the name that it has in the file."""


def read(path: str | os.PathLike[str], allowed: Iterable[SafeGlobal] = ()) -> Any:
    """What a file holds, on the CPU; no code of the file's runs.

    The tensors are not read yet: they lie in a mapping of the file, and what is never looked at is never read. While
    they are in use the file must not be cut short, which would kill the process (SIGBUS). Files from before torch 1.6
    are read as a whole, and so are those behind the name of a .safetensors file.

    Args:
        path: the file.
        allowed: classes and functions that it may name besides those of `torch.load(weights_only=True)`.

    Raises:
        OSError: the file cannot be opened.
        pickle.UnpicklingError: it names classes or functions that are not allowed; the text lists them.
        Exception: whatever torch raises for a file that is damaged or not its own, with a note that names the file.
    """
    allowed = list(allowed)
    try:
        is_zip = zipfile.is_zipfile(path)
        with safe_globals(allowed):
            if os.fsdecode(path).endswith(".safetensors"):  # torch would go by the name, and not by what is in the file
                with open(path, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if is_zip and (names := forbidden_globals(path, allowed)):
            raise pickle.UnpicklingError(
                f"{os.fspath(path)} names {', '.join(names)}, which loading a file does not import; if you trust "
                "them, pass them as safe_globals=[...]"
            ) from error
        error.add_note(f"while reading {os.fspath(path)}")
        raise
    except Exception as error:
        error.add_note(f"while reading {os.fspath(path)}")
        raise


def write(path: str | os.PathLike[str], content: Any) -> None:
    """Replace a file by one that `torch.load(path, weights_only=True)` reads.

    Raises:
        OSError: the file cannot be written.
        Exception: what torch raises for content that it cannot save.

    After any error it is as it was.
    """
    with replacing(path) as file:
        torch.save(content, file)


def verify(path: str | os.PathLike[str]) -> None:
    """Hold the data of a file against the checksums that a zip file has.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it has none, as before torch 1.6; or it is damaged, and the text names an entry.
    """
    with open(path, "rb") as file:
        try:
            is_zip = zipfile.is_zipfile(file)
            damaged = zipfile.ZipFile(file).testzip() if is_zip else None
        except Exception as error:  # zipfile has many for what it cannot read, OSError among them
            raise CheckpointError(f"{os.fspath(path)} is damaged: {error}") from error
    if not is_zip:
        raise CheckpointError(f"{os.fspath(path)} has no checksums: it is no zip file, or not a whole one")
    if damaged is not None:
        raise CheckpointError(f"{os.fspath(path)}: {damaged} is damaged: the checksum is not the saved one")


def forbidden_globals(path: str | os.PathLike[str], allowed: list[SafeGlobal]) -> list[str]:
    """The classes and functions that a file names and must not; none where it is too damaged to tell."""
    try:
        with safe_globals(allowed):
            return sorted(get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []
