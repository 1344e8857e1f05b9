"""Files that are either the old one or the new one, whole."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastopt.files.beside import new_file, remove_abandoned, sync_folder


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends, and leaves it as it was if the block fails.

    The bytes are written beside `path` and are on the disk before they get its name, so that a crash or a loss of power
    at any moment leaves one of the two files whole. A file that is replaced hands its permissions on; a symbolic link
    stays one, and its target is replaced. What a process that was killed has left is removed, see Note [Abandoned].

    Raises:
        FileExistsError: there is a device, a pipe or a socket at `path`.
        OSError: the file cannot be written; a note names `path`.
    """
    try:
        target = Path(path).resolve()
        permissions = permissions_of(target)
        with new_file(target, 0o666 if permissions is None else permissions | 0o600) as file:
            try:
                remove_abandoned(target, file.name)
                yield file
                file.flush()
                if permissions not in (None, permissions_of(Path(file.name))):
                    os.fchmod(file.fileno(), permissions)
                os.fsync(file.fileno())
                os.replace(file.name, target)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name)
                raise
        sync_folder(target.parent)
    except Exception as error:
        error.add_note(f"while writing {os.fspath(path)}")
        raise


def permissions_of(path: Path) -> int | None:
    """The permissions of a file; None where there is none.

    Raises:
        OSError: there is something else, which a file must not replace: /dev/null, say.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "it is not replaced, as it is no regular file", os.fspath(path))
    return stat.S_IMODE(mode) & 0o777
