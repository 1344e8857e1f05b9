"""Bringing what is written to the disk while more is written, so that the sync at the end has little left."""

import ctypes
import sys

_BEGIN = 2  # SYNC_FILE_RANGE_WRITE of Linux: start, and do not wait

_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def begin_writeback(fd: int, offset: int, count: int) -> None:
    """Ask that a part of a file goes to the disk now; no more than a hint, and nothing where the system has none.

    Errors of the disk are not lost by it: the sync at the end reports them.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, count, _BEGIN)
