"""Folders that are either the old one or the new one, whole."""

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fastopt.files.beside import new_folder, remove, remove_abandoned, sync_folder

RENAME_EXCHANGE = 2
"""The flag of Linux's renameat2 that makes two names change places."""
AT_FDCWD = -100
"""The argument that makes it take paths as any other call does."""


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], is_own: Callable[[str], bool]) -> Iterator[Path]:
    """A folder to fill that takes the place of `path` when the block ends, and leaves it as it was if the block fails.

    It is made beside `path`, as `.NAME.` and 16 characters. Who fills it syncs the files; their names are synced here.
    An old folder is replaced in one step (Linux's renameat2), so that at any moment one of the two stands there, whole;
    and it goes. A kill before that step leaves an unfinished folder under the longer name, a kill after it the old one.
    Where the system or the file system has no such step, there are two: a kill between them leaves nothing at `path`,
    the new folder, whole, under the longer name, and the old one under the same with `.old`.

    What a process that was killed has left is removed, see Note [Abandoned]; but where there is nothing at `path`, not
    before the new folder stands there.

    A folder that is replaced hands its permissions on; a symbolic link stays one, and its target is replaced.

    Args:
        path: the folder.
        is_own: whether a file or folder in it, by its name, may go with it.

    Raises:
        FileExistsError: the old folder holds something that is not its own.
        NotADirectoryError: there is a file at `path`.
        OSError: the folder cannot be made or replaced; a note names `path`.
    """
    target = Path(path).resolve()
    try:
        check_replaceable(target, is_own)
        with new_folder(target) as fresh:
            try:
                is_replaced = target.is_dir()
                if is_replaced:
                    remove_abandoned(target, fresh)
                    fresh.chmod(target.stat().st_mode & 0o777)
                yield fresh
                sync_folder(fresh)
                check_replaceable(target, is_own)
                old = swap(fresh, target)
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
            sync_folder(target.parent)
            if old is not None:
                remove(old)
            if not is_replaced:
                remove_abandoned(target, target)
    except OSError as error:
        error.add_note(f"while writing {os.fspath(path)}")
        raise


def check_replaceable(target: Path, is_own: Callable[[str], bool]) -> None:
    """Raise if what is there is not for us to delete."""
    if not target.exists():
        return
    others = sorted(name for name in os.listdir(target) if not is_own(name))
    if others:
        raise FileExistsError(
            errno.EEXIST,
            f"the folder is not replaced, as it holds more than a checkpoint: {', '.join(others[:5])}",
            str(target),
        )


def swap(fresh: Path, target: Path) -> Path | None:
    """Give a folder the name of another, and say where that is now, if there was one."""
    try:
        os.rename(fresh, target)  # over nothing, or an empty folder
        return None
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if exchanged(fresh, target):
        return fresh
    old = fresh.with_name(f"{fresh.name}.old")
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(old, target)
        raise
    return old


def exchanged(one: Path, other: Path) -> bool:
    """Make two names change places in one step; False where this is not to be had."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
