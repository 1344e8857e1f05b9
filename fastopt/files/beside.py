"""What is written beside a file or a folder before it gets its name, and what is left of that by killed processes."""

import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO

DAY = 86_400
"""Seconds after which a temporary that nobody has written to is abandoned, wherever it came from."""

# Note [Abandoned]
#
# A process that is killed while it writes leaves its temporary file or folder, `.NAME.` and 16 characters, beside NAME.
# The next one that writes NAME removes it, but must not take one that another process is writing right now. So whoever
# writes one holds a lock on it (flock), which ends with the process however that ends. Between making it and locking it
# somebody may take it for abandoned; it has no name then, and the next one is made.
#
# On some networked file systems a host does not see the locks of others. The first 8 of the 16 characters therefore
# stand for the kernel; what was written under another one, elsewhere or before a restart, is abandoned if it has not
# changed for a day. Where there are no locks at all nothing is removed.


def new_file(target: Path, permissions: int) -> BinaryIO:
    """A new file beside the target, locked; the umask takes from its permissions, as from those of any new file."""

    def create(path: str, flags: int) -> int:
        return os.open(path, flags, permissions)

    while True:
        path = _new_name(target)
        try:
            file = open(path, "x+b", opener=create)  # noqa: SIM115, as it is the caller's
        except FileExistsError:
            continue
        if _is_locked_in_time(file, path):
            return file
        file.close()


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A new folder beside the target, locked until the block ends, wherever it is by then."""
    while True:
        path = _new_name(target)
        try:
            os.mkdir(path)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except (FileExistsError, FileNotFoundError):
            if not target.parent.is_dir():
                raise
            continue
        try:
            if _is_locked_in_time(descriptor, path):
                yield Path(path)
                return
        finally:
            os.close(descriptor)


def _is_locked_in_time(file: IO[bytes] | int, path: str) -> bool:
    """Lock what was made, and say whether it still has its name."""
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(file if isinstance(file, int) else file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def remove_abandoned(target: Path, own: str | os.PathLike[str]) -> None:
    """Remove what others have begun to write for the target, and never will end.

    Args:
        target: a file or a folder that is to be replaced, or was.
        own: what is being written for it here; it has just been made or changed.
    """
    now = os.stat(own).st_mtime  # by the file system's clock
    temporary = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]{{8}})[a-z0-9_]{{8}}(\.old)?")
    with os.scandir(target.parent) as entries:
        found = [(entry, match) for entry in entries if (match := temporary.fullmatch(entry.name))]
    for entry, match in found:
        if entry.name == os.path.basename(own):
            continue
        with contextlib.suppress(OSError), _opened(entry) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if match[1] == _kernel() or now - _last_change(entry, descriptor) > DAY:
                remove(entry.path)


@contextlib.contextmanager
def _opened(entry: os.DirEntry[str]) -> Iterator[int]:
    # Some file systems lock no file that is not open for writing; no folder can be.
    descriptor = os.open(entry.path, os.O_RDONLY if entry.is_dir(follow_symlinks=False) else os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _last_change(entry: os.DirEntry[str], descriptor: int) -> float:
    """When a file, or anything in a folder, was last written to."""
    times = [os.fstat(descriptor).st_mtime]
    if entry.is_dir(follow_symlinks=False):
        with os.scandir(entry.path) as inside:
            times += [inner.stat(follow_symlinks=False).st_mtime for inner in inside]
    return max(times)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file, or a folder and all in it, of which others may remove parts meanwhile."""
    if not os.path.isdir(path) or os.path.islink(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return

    def pass_over(_: object, __: str, info: tuple[type[BaseException], BaseException, object]) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]

    shutil.rmtree(path, onerror=pass_over)


def sync_folder(path: Path) -> None:
    """See to it that the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync no folders, some of FUSE
            raise
    finally:
        os.close(descriptor)


def _new_name(target: Path) -> str:
    return os.fspath(target.with_name(f".{target.name}.{_kernel()}{secrets.token_hex(4)}"))


@cache
def _kernel() -> str:
    """8 digits for the running kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return f"{zlib.crc32(platform.node().encode()):08x}"
