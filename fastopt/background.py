"""Saves in the background: their order, and what becomes of their errors.

Each has a thread of its own, which first waits for the saves that come before it:

- Saves in the background are written one after the other, in the order in which they were asked for. They share a disk,
  and the sooner one is done, the sooner the memory of its copy is free.
- Saves to one path, in the background or not, are done in that order as well, so that the last one stays.

An error that nobody asks the Future about is raised by the next save, or is written to stderr at exit, where saves that
are under way are finished first. A process that is forked meanwhile has no such threads: its saves begin anew.
"""

import concurrent.futures.thread  # before `_register_atexit`: of what is registered there, the last runs first
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from multiprocessing.util import Finalize
from typing import Any, TextIO, TypeVar

from fastopt.errors import BackgroundSaveError

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that the end of the process waits for saves without saying so."""


class Save(Future[T]):
    """A save that was asked for."""

    def __init__(self, path: str | os.PathLike[str], thread: int | None = None) -> None:
        super().__init__()
        self.path = os.path.realpath(path)
        self.thread = thread
        """Who saves, unless that is done in the background."""

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As that of any Future; whoever asks takes the error over."""
        error = super().exception(timeout)
        saves.asked(self)
        return error

    def result(self, timeout: float | None = None) -> T:
        """As that of any Future; whoever asks takes the error over."""
        self.exception(timeout)
        return super().result()

    def comes_after(self, other: "Save[Any]") -> bool:
        """Whether it waits for one that was asked for before.

        Not for one of the thread that asks: a signal's handler may have interrupted it in the middle of that.
        """
        if other.done() or other.thread == threading.get_ident():
            return False
        return self.path == other.path or (self.thread is None and other.thread is None)


class Saves:
    """The saves of this process that are not over, and those that failed and that nobody has asked about."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a signal's handler may save, too
        self.unfinished: dict[Save[Any], Any] = {}
        """In the order in which they were asked for; with the owner of what is saved in the background."""
        self.failed: list[Save[Any]] = []
        self.writers: list[threading.Thread] = []
        """Threads that may not have ended; a save is over somewhat before its thread is."""
        self.given_up = False
        """Whether somebody interrupted the wait at exit."""
        self.exit_is_prepared = False

    def enter(self, save: Save[Any], owner: Any = None) -> list[Save[Any]]:
        """Take up a save; returns those that it has to wait for."""
        with self.lock:
            before = self.before(save)
            self.unfinished[save] = owner
            return before

    def before(self, save: Save[Any]) -> list[Save[Any]]:
        """Those that a save has to wait for."""
        with self.lock:
            return [other for other in self.unfinished if save.comes_after(other)]

    def leave(self, save: Save[Any]) -> None:
        """Let go of a save."""
        with self.lock:
            self.unfinished.pop(save, None)

    def drop(self, save: Save[Any]) -> None:
        """Let go of a save that has not begun; others may wait for it already."""
        with self.lock:
            if save.cancel():
                save.set_running_or_notify_cancel()
                self.leave(save)

    def of(self, owner: Any) -> list[Save[Any]]:
        """Saves in the background that are not over."""
        with self.lock:
            return [save for save, saved in self.unfinished.items() if saved is owner]

    def asked(self, save: Save[Any]) -> None:
        """Somebody knows what became of a save."""
        with self.lock:
            if save in self.failed:
                self.failed.remove(save)

    def take_failed(self, but: Future[Any] | None = None, path: str | None = None) -> list[Save[Any]]:
        """Those that nobody has asked about so far: all, or those to a path."""
        with self.lock:
            taken = [save for save in self.failed if save is not but and path in (None, save.path)]
            self.failed = [save for save in self.failed if save not in taken]
            return taken

    def run(self, save: Save[T], before: list[Save[Any]], work: Callable[[], T]) -> None:
        """What the thread of a save does."""
        concurrent.futures.wait(before)
        with self.lock:
            begins = save in self.unfinished and save.set_running_or_notify_cancel()
        if begins:
            try:
                save.set_result(work())
            except BaseException as error:
                del work, before
                forget_locals(error)
                with self.lock:
                    self.failed.append(save)
                save.set_exception(error)
        self.leave(save)

    def start(self, save: Save[T], owner: Any, work: Callable[[], T]) -> None:
        """Take up a save in the background."""
        thread = threading.Thread(daemon=True)  # what waits for it at exit can be interrupted
        try:
            thread = threading.Thread(target=self.run, args=(save, self.enter(save, owner), work), daemon=True)
            with self.lock:  # before it starts: an interruption may come once it has
                self.writers = [*filter(may_run, self.writers), thread]
            thread.start()
        except BaseException:
            if not thread.is_alive():
                self.drop(save)
            raise

    def finish(self) -> None:
        """Wait for all in the background, at the end of the process, until somebody interrupts that."""
        if self.given_up:
            return
        try:
            self.join_writers(PATIENCE)
            if left := [save.path for save in list(self.unfinished)]:
                write_error(f"fastopt: at exit, finishing the save to {', '.join(left)}")
            self.join_writers()
        except KeyboardInterrupt:
            self.given_up = True

    def join_writers(self, seconds: float | None = None) -> None:
        """Wait for the threads, so many seconds in all."""
        until = None if seconds is None else time.monotonic() + seconds
        for thread in filter(threading.Thread.is_alive, self.writers):
            thread.join(None if until is None else max(0.0, until - time.monotonic()))


saves = Saves()


def may_run(thread: threading.Thread) -> bool:
    """Whether a thread has not ended."""
    return thread.ident is None or thread.is_alive()


def in_background(
    owner: Any, path: str | os.PathLike[str], take: Callable[[], Any], write: Callable[[Any], T]
) -> Future[T]:
    """Take a copy of what is to be saved, here and now, and write it in a thread.

    Args:
        owner: what is saved. Its previous save in the background is waited for, so that there is never more than one
            copy of it.
        path: where the copy is written to.
        take: returns the copy.
        write: writes it; returns the result of the Future.
    """
    concurrent.futures.wait(saves.of(owner))
    copy = take()
    prepare_exit()
    save: Save[T] = Save(path)
    # No lambda: the frame of one would hold the copy, cleared or not, for as long as the error of the save lives.
    saves.start(save, owner, partial(write, copy))
    return save


@contextlib.contextmanager
def in_turn(path: str | os.PathLike[str]) -> Iterator[None]:
    """A save to a path in the calling thread: after all to it that were asked for before, and before all later ones."""
    save: Save[None] = Save(path, threading.get_ident())
    try:
        concurrent.futures.wait(saves.enter(save))
        yield
    finally:
        save.set_result(None)
        saves.leave(save)


def await_saves(path: str | os.PathLike[str]) -> None:
    """Wait for the saves to a path that were asked for before, so that it can be read.

    Raises:
        BackgroundSaveError: the path does not hold what was to be saved there, as that failed, and nobody has asked
            about it.
    """
    reader: Save[None] = Save(path, threading.get_ident())
    concurrent.futures.wait(saves.before(reader))
    raise_failed(saves.take_failed(path=reader.path), f"nothing is loaded from {os.fspath(path)}, which is as it was")


def raise_unasked(fate: str, present: Future[Any] | None = None) -> None:
    """Raise what went wrong in earlier saves, unless somebody asked.

    Args:
        fate: what becomes of the save that finds out, for the error.
        present: that save, where it is in the background.

    Raises:
        BackgroundSaveError: caused by the first of those errors.
    """
    raise_failed(saves.take_failed(present), fate)


def raise_failed(failed: list[Save[Any]], fate: str) -> None:
    """Raise an error, caused by the first of those of some saves, if there are any."""
    if failed:
        texts = [failure(save) for save in failed]
        error = BackgroundSaveError(f"{texts[0]}; {fate}")
        for text in texts[1:]:
            error.add_note(text)
        raise error from failed[0].exception()


def failure(save: Save[Any]) -> str:
    """How a save failed, in a line."""
    error = save.exception()
    lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
    return f"a save in the background, to {save.path}, failed: {' '.join(' '.join(lines).split())}"


def forget_locals(error: BaseException | None) -> None:
    """Clear the frames that an error holds, and with them the copy of the state."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


# ---- the end of the process ----


def prepare_exit() -> None:
    """Have saves finished, and errors reported, at exit."""
    if saves.exit_is_prepared:
        return
    saves.exit_is_prepared = True
    # Before the pools of concurrent.futures, which a save may be using, refuse work: by the hook that they use as well.
    getattr(threading, "_register_atexit", lambda _: None)(finish)
    # Runs with atexit's functions, and in children that multiprocessing has forked, where those do not.
    Finalize(None, report, exitpriority=0)


def finish() -> None:
    """Wait for the saves that are under way."""
    saves.finish()


def report() -> None:
    """Write to stderr what went wrong and nobody has asked about, and have the process fail."""
    saves.finish()
    lines = [failure(save) for save in saves.take_failed()]
    if saves.given_up:
        lines += [f"the save to {save.path} was not finished: interrupted" for save in saves.unfinished]
    for line in lines:
        write_error(f"fastopt: {line}")
    if lines and sys.stderr is not None:
        sys.stderr = FailsToFlush(sys.stderr)


def write_error(line: str) -> None:
    """Write a line to stderr, if there is one."""
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")


class FailsToFlush:
    """A stderr that cannot be flushed: Python flushes it last of all, and where that fails the exit code is 120.

    An exit code cannot be chosen any more by then, short of `os._exit`, which would keep others from their own ends.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def flush(self) -> None:
        """Flush, and fail."""
        self.stream.flush()
        raise OSError("a save in the background failed")


# ---- forks ----


def begin_anew() -> None:
    """In a process that was just forked: its saves are its parent's, and their locks may be held for ever."""
    global saves
    orphans, saves = saves.unfinished, Saves()
    for save in orphans:
        Future.__init__(save)
        save.set_exception(RuntimeError(f"the process that this one was forked from does the save to {save.path}"))


os.register_at_fork(after_in_child=begin_anew)
