"""Files that `torch.save` wrote."""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.serialization import safe_globals
from torch.utils.serialization import config

from fastopt.backends import current
from fastopt.collector import paused_collector
from fastopt.errors import CheckpointError, UnsafeGlobalsError
from fastopt.files.archive import SIGNATURE, check_records
from fastopt.files.atomic import replacing
from fastopt.files.torch_checks import verify as verify
from fastopt.files.torch_globals import unsafe_globals

LARGEST_ALIGNMENT = 0xFFFF - 32
"""Bytes; that of storages in a file."""

SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]
"""A class or function that a file may name; or one and the name that it has in the file."""


def read(path: str | os.PathLike[str], allowed: Iterable[SafeGlobal] = ()) -> Any:
    """What a file holds, on the CPU; no code of the file's runs.

    The tensors are not read yet: they lie in a mapping of the file, and what is never looked at is never read. While
    they are in use the file must not be cut short, which would kill the process (SIGBUS). Files from before torch 1.6
    are read as a whole, and so are those behind the name of a .safetensors file, and archives that others have packed
    anew, in which tensors are not aligned.

    The native backend reads what is plain (tensors, numbers, strings in dicts, lists and tuples) by itself, far faster
    where there are very many small tensors, and leaves every file that holds anything else to torch.

    Args:
        path: the file.
        allowed: classes and functions that it may name besides those of `torch.load(weights_only=True)`.

    Raises:
        OSError: the file cannot be opened.
        UnsafeGlobalsError: it names classes or functions that are not allowed; the text lists them.
        CheckpointError: it was cut short, or has texts that are none.
        ValueError: its records are no ordinary ones of torch's, as `check_records` says, or a tensor is larger than its
            record (which torch does not look at, and so the pure-Python backend does not either).
        Exception: whatever else torch raises for a file that is damaged or not its own.

    Each has a note that names the file.
    """
    allowed = list(allowed)
    try:
        with paused_collector():
            if (plain := current().read_torch_file(path)) is not None:
                return plain[0]
            if is_zip := zipfile.is_zipfile(path):
                can_be_mapped = check_records(path)
            elif begins_as_zip(path):
                raise CheckpointError(f"{os.fspath(path)} was cut short: a zip file has its directory at the end")
            with safe_globals(allowed):
                if os.fsdecode(path).endswith(".safetensors"):  # torch would go by the name, not by what is in the file
                    with open(path, "rb") as file:
                        return torch.load(file, map_location="cpu", weights_only=True)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip and can_be_mapped)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file, safe_globals(allowed):
            if names := unsafe_globals(file):
                raise UnsafeGlobalsError(os.fspath(path), names) from error
        error.add_note(f"while reading {os.fspath(path)}")
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{os.fspath(path)} is damaged: {error}") from error
    except Exception as error:
        error.add_note(f"while reading {os.fspath(path)}")
        raise


def write(path: str | os.PathLike[str], content: Any, dtypes: Mapping[int, torch.dtype] | None = None) -> None:
    """Replace a file by what `torch.save` would write, with its data written and summed by all threads.

    The tensors may lie on any device, and go to the file piece by piece: extra memory is that of `write_tensors`, of
    the pickle, and some hundred bytes a tensor. Only tensors of subclasses and other odd kinds that lie on another
    device are brought to the CPU as a whole, as torch does.

    Args:
        path: the file; replaced as a whole and at once.
        content: whatever torch can save, and load with `weights_only=True`. It must not change meanwhile.
        dtypes: the dtype that a tensor gets in the file, by its `id`, as if `tensor.to(dtype)` stood in its place; all
            others keep theirs. Tensors named here are strided ones of no subclass that have values.

    Raises:
        OSError: the file cannot be written.
        TypeError: `torch.load(weights_only=True)` would not read it; the text says which value, and of what type.
        ValueError: torch's setting for the alignment of storages makes files that nobody can read.
        Exception: what `torch.save` raises for content that it cannot save.

    After any error the file is as it was.
    """
    check_alignment()
    with replacing(path) as file:
        current().write_torch_files(file.fileno(), [content], dtypes or {})


def check_alignment() -> None:
    """Refuse an alignment that torch's own writer does not: by zero it divides, and files of a large one are lost.

    Data is aligned by a field of up to 65,535 bytes before it, which holds 32 of other things.
    """
    alignment = config.save.storage_alignment
    if not 1 <= alignment <= LARGEST_ALIGNMENT:
        raise ValueError(
            f"torch.utils.serialization.config.save.storage_alignment is {alignment:,}; a file that can be read again "
            f"has one of 1 to {LARGEST_ALIGNMENT:,} bytes"
        )


def begins_as_zip(path: str | os.PathLike[str]) -> bool:
    """Whether a file was to become a zip file; torch has an OSError for some of those that have no end."""
    with open(path, "rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE
