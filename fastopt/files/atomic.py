"""Files that are either the old one or the new one, whole."""

import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import stat
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
        FileExistsError: there is a device, a pipe or a socket at `path`.
        OSError: the file cannot be written; a note names `path`.
    """
    try:
        target = Path(path).resolve()
        permissions = permissions_of(target)
        with _temporary(target, 0o666 if permissions is None else permissions | 0o600) as file:
            try:
                _remove_abandoned(target, file)
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


def sync_folder(path: Path) -> None:
    """See to it that the names in a folder are on the disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync no folders, some of FUSE
            raise
    finally:
        os.close(folder)


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


def _temporary(target: Path, permissions: int) -> BinaryIO:
    """A new file beside the target, locked; the umask takes from its permissions, as from those of any new file."""

    def create(path: str, flags: int) -> int:
        return os.open(path, flags, permissions)

    while True:
        name = os.fspath(target.with_name(f".{target.name}.{_kernel()}{secrets.token_hex(4)}"))
        try:
            file = open(name, "x+b", opener=create)  # noqa: SIM115, as it is the caller's
        except FileExistsError:
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
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
