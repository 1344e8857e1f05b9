"""What all ranks do together, so that all of them learn what went wrong on one."""

import traceback
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from fastopt.text import listed

T = TypeVar("T")


class RanksError(RuntimeError):
    """A save or a load failed on some rank; raised on every rank, with all that went wrong.

    On a rank that failed itself, its own error is the cause.
    """

    def __init__(self, doing: str, failures: Mapping[int, str]) -> None:
        super().__init__(doing, failures)
        self.doing = doing
        self.failures = failures
        """What went wrong, by rank in the process group: the error's type and text, with its notes."""

    def __str__(self) -> str:
        lines = [f"rank {rank}: {text}" for rank, text in self.failures.items()]
        return f"{self.doing} failed on {listed(list(map(str, self.failures)), len(lines))}: " + "\n".join(lines)


def agreed(group: dist.ProcessGroup | None, doing: str, work: Callable[[], T]) -> T:
    """Do something that every rank of a group does, and return what it returns here.

    Args:
        group: the process group; None for the default one. Without torch.distributed, this process is alone.
        doing: what is done, for the error.
        work: takes part in no collective, so that nobody waits for a rank that has failed.

    Raises:
        RanksError: it failed on some rank.
    """
    own: Exception | None = None
    result: T
    try:
        result = work()
    except Exception as error:
        own = error
    failures = gathered(group, own)
    if failures:
        raise RanksError(doing, failures) from own
    return result


def gathered(group: dist.ProcessGroup | None, own: Exception | None) -> dict[int, str]:
    """The errors of all ranks."""
    text = None if own is None else described(own)
    if not is_distributed():
        return {} if text is None else {0: text}
    texts: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)
    return {rank: text for rank, text in enumerate(texts) if text is not None}


def described(error: BaseException) -> str:
    """An error in one text, without where in the program it was."""
    return "".join(traceback.format_exception_only(error)).strip()


def is_distributed() -> bool:
    """Whether there are process groups."""
    return dist.is_available() and dist.is_initialized()
