"""Files that are either the old one or the new one, whole."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastopt.files.beside import new_file, remove_abandoned, sync_folder, umask


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends, and leaves it as it was if the block fails.

    The bytes are written beside `path` and are on the disk before they get its name, so that a crash or a loss of power
    at any moment leaves one of the two files whole. A file that is replaced hands its permissions on; a symbolic link
    stays one, and its target is replaced. What a process that was killed has left is removed, see Note [Abandoned].

    Raises:
        OSError: the file cannot be written; a note names `path`.
    """
    try:
        target = Path(path).resolve()
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        with new_file(target) as file:
            try:
                remove_abandoned(target, file.name)
                yield file
                file.flush()
                os.fchmod(file.fileno(), target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~umask())
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
