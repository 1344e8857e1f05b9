"""Which format a checkpoint has: what is in it says so when it is read, and its name when it is written."""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from fastopt.errors import CheckpointError
from fastopt.files import dcp_folder, safetensors_file, torch_file

Format = Literal["torch", "safetensors", "dcp"]

ZIP = b"PK\x03\x04"
"""What files of `torch.save` begin with."""

LEGACY = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""What those from before torch 1.6 have among their first bytes."""

DCP_METADATA = ".metadata"
"""The file that makes a folder one of torch.distributed.checkpoint."""

SUFFIXES = ".pt, .pth or .bin for torch.save's, .safetensors, and a folder with a .metadata file for DCP"


def read(path: str | os.PathLike[str], allowed: Iterable[torch_file.SafeGlobal] = (), verify: bool = False) -> Any:
    """What a checkpoint holds, whatever its format; its tensors are not read yet wherever the format allows.

    Args:
        path: the file or folder.
        allowed: classes and functions that it may name besides those of `torch.load(weights_only=True)`.
        verify: whether all of its data is read and held against its checksums.

    Raises:
        OSError: it is not there or cannot be opened.
        CheckpointError: it is no checkpoint, or a damaged one; or it has no checksums and was to be verified.
        Exception: what the module of its format raises besides.
    """
    found = format_of(path)
    if found == "safetensors":
        return safetensors_file.read(path, verify)
    if found == "dcp":
        if verify:
            dcp_folder.verify(path, allowed)
        return dcp_folder.read(path, allowed)
    if verify:
        torch_file.verify(path)
    return torch_file.read(path, allowed)


def write(path: str | os.PathLike[str], content: Any, dtypes: Mapping[int, torch.dtype] | None = None) -> None:
    """Replace a checkpoint, in the format that its name says; `dtypes` are those in the file, by the tensors' `id`.

    Raises:
        OSError: it cannot be written, or stands for what is neither a file nor a folder.
        Exception: what the module of its format raises for content that has no place in it.

    After any error it is as it was.
    """
    check_target(path)
    wanted = format_for(path)
    if wanted == "safetensors":
        safetensors_file.write(path, content, dtypes)
    elif wanted == "dcp":
        dcp_folder.write(path, content, dtypes)
    else:
        torch_file.write(path, content, dtypes)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise where no checkpoint can be put, or none must be, as a rename would replace a pipe or a device."""
    try:
        target = Path(os.fsdecode(path)).resolve()
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {target.parent}", os.fspath(path))
        if target.exists() and not (target.is_file() or target.is_dir()):
            what = "neither a file nor a folder, and is not replaced"
            raise FileExistsError(errno.EEXIST, f"{target} is {what}", os.fspath(path))
    except OSError as error:
        error.add_note(f"while writing {os.fspath(path)}")
        raise


def format_for(path: str | os.PathLike[str]) -> Format:
    """The format that a name stands for: .safetensors, a folder for DCP, and anything else for torch.save's."""
    name = os.fsdecode(path).lower()
    if name.endswith((os.sep, ".dcp")) or os.path.isdir(path):
        return "dcp"
    return "safetensors" if name.endswith(".safetensors") else "torch"


def format_of(path: str | os.PathLike[str]) -> Format:
    """The format of what is there, whatever its name.

    Raises:
        OSError: it is not there or cannot be opened.
        CheckpointError: it is none of these.
    """
    name = os.fspath(path)
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        if (Path(os.fsdecode(path)) / DCP_METADATA).is_file():
            return "dcp"
        raise CheckpointError(f"{name} is a folder without a {DCP_METADATA} file, and so no checkpoint")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for someone to write to it
        raise CheckpointError(f"{name} is neither a file nor a folder")
    with open(path, "rb") as file:
        begin = file.read(32)
    if not begin:
        raise CheckpointError(f"{name} is empty")
    if begin.startswith(ZIP):
        return "torch"
    if begin[8:9] == b"{":  # after eight bytes that say how long the header is
        return "safetensors"
    if LEGACY in begin:
        return "torch"
    raise CheckpointError(f"{name} is no checkpoint: it begins with {begin[:9]!r}; known are {SUFFIXES}")


def check_of_change(path: str | os.PathLike[str]) -> Callable[[], None]:
    """What raises if a file is written to from now on until it is called.

    What `torch.save` writes over an old file has a bit of both for a while. A file that another takes the place of, as
    every save of fastopt's does, stays what it is for those who have opened it. The folders of DCP are not looked at.

    Raises:
        OSError: the file is not there or cannot be opened.
        CheckpointError: by the check, where the size or the time of the last change is another.
    """
    if not os.path.isfile(path):
        return lambda: None
    with open(path, "rb") as file:  # on networked file systems, what has been opened is known best
        before = os.fstat(file.fileno())

    def check() -> None:
        try:
            now = os.stat(path)
        except OSError:  # it is gone, and stays for those who have opened it
            return
        if os.path.samestat(before, now) and (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
            raise CheckpointError(f"{os.fspath(path)} was changed while it was being read")

    return check


def size_of(path: str | os.PathLike[str]) -> int:
    """Bytes of a checkpoint, of all files of a folder."""
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path))
    return os.path.getsize(path)
