"""The process of a contender as the first rank of a gloo group, and the other ranks, which it starts."""

import atexit
import gc
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """So many ranks that do the same thing at the same time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pipes: list[Connection] = []
        self.folder = tempfile.TemporaryDirectory(prefix="fastopt-benchmark-ranks-")
        store = os.path.join(self.folder.name, "store")
        context = multiprocessing.get_context("spawn")
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(theirs, rank, size, store), daemon=True).start()
            theirs.close()
            self.pipes.append(ours)
        join(0, size, store)
        atexit.register(self.close)

    def everywhere(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function at the top of a module on all ranks; returns the result of this one when all are done."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        result = function(*arguments)
        for rank, pipe in enumerate(self.pipes, start=1):
            if (error := pipe.recv()) is not None:
                raise RuntimeError(f"rank {rank}: {error}")
        return result

    def close(self) -> None:
        """Have all ranks leave the group."""
        for pipe in self.pipes:
            pipe.send((leave, ()))
        leave()
        for pipe in self.pipes:
            pipe.recv()
        self.folder.cleanup()


@cache
def ranks(size: int) -> Ranks:
    """The ranks of this process, which are started once."""
    return Ranks(size)


def join(rank: int, size: int, store: str) -> None:
    """Become a rank; one alone needs no group."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    if size > 1:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)


def leave() -> None:
    """Leave the group, after all that refers to it."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    """What the process of another rank does."""
    join(rank, size, store)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            function(*arguments)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())
