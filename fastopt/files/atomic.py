"""Files that are either the old one or the new one, whole."""

import contextlib
import errno
import fcntl
import os
import platform
import re
import tempfile
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

DAY = 86_400
"""Seconds after which a temporary file that nobody has written to is abandoned, wherever it came from."""


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
        with _temporary(target) as file:
            try:
                _remove_abandoned(target, file)
                yield file
                file.flush()
                os.fchmod(file.fileno(), target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
                os.fsync(file.fileno())
                os.replace(file.name, target)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name)
                raise
        _sync_folder(target.parent)
    except Exception as error:
        error.add_note(f"while writing {os.fspath(path)}")
        raise


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# Note [Abandoned]
#
# A process that is killed while it writes leaves its temporary file, `.NAME.` and 16 characters, beside NAME. The next
# one that writes NAME removes it, but must not take one that another process is writing right now. So whoever writes
# one holds a lock on it (flock), which ends with the process however that ends. Between making the file and locking it
# somebody may take it for abandoned; it has no name then, and the next one is made.
#
# On some networked file systems a host does not see the locks of others. The first 8 of the 16 characters therefore
# stand for the kernel; what was written under another one, elsewhere or before a restart, is abandoned if it has not
# changed for a day. Where there are no locks at all nothing is removed.


def _temporary(target: Path) -> BinaryIO:
    """A new file beside the target, locked."""
    while True:
        # NamedTemporaryFile gives 0600; what is created anew gets what the umask leaves, as with open().
        file = tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.{_kernel()}", delete=False)  # noqa: SIM115
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file  # type: ignore[return-value]
        file.close()


def _remove_abandoned(target: Path, file: BinaryIO) -> None:
    """Remove what others have begun to write for the target, and never will end; `file` is the one being written."""
    now = os.fstat(file.fileno()).st_mtime  # by the file system's clock
    temporary = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]{{8}})[a-z0-9_]{{8}}")
    with os.scandir(target.parent) as entries:
        found = [(entry.path, match) for entry in entries if (match := temporary.fullmatch(entry.name))]
    for path, match in found:
        if path == file.name:
            continue
        with contextlib.suppress(OSError), open(path, "r+b") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if match[1] == _kernel() or now - os.fstat(other.fileno()).st_mtime > DAY:
                os.unlink(path)


@cache
def _kernel() -> str:
    """8 digits for the running kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return f"{zlib.crc32(platform.node().encode()):08x}"
