"""Processes that are the ranks of a gloo group, and do what a test asks of all of them at once."""

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

SECONDS = 60.0
"""Until what the ranks do is taken for a deadlock."""


class RankFailedError(AssertionError):
    """A function has failed on some rank, or has not come to its end."""


class Ranks:
    """So many processes, started when they are first asked, and anew after one has died.

    What they are asked to do is a function at the top of a module, and its arguments; they call it all together.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """Call a function on every rank; returns the results in the order of the ranks.

        Raises:
            RankFailedError: it raised something on a rank, killed it, or took longer than that.
        """
        if not self.processes:
            self.start()
        from fastopt import backends

        for pipe in self.pipes:
            pipe.send((backends.backend().name, function, arguments))
        outcomes = self.outcomes(seconds)
        failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text is not None]
        if failures:
            self.stop()
            raise RankFailedError("\n".join(failures))
        return [result for _, result in outcomes]

    def outcomes(self, seconds: float) -> list[tuple[str | None, Any]]:
        """What each rank has to say, or what has become of it."""
        found: dict[int, tuple[str | None, Any]] = {}
        left = dict(enumerate(self.pipes))
        while left and (ready := wait(list(left.values()), seconds)):
            for rank, pipe in [(rank, pipe) for rank, pipe in left.items() if pipe in ready]:
                try:
                    found[rank] = pipe.recv()
                except EOFError:
                    self.processes[rank].join()
                    found[rank] = f"it ended with exit code {self.processes[rank].exitcode}", None
                del left[rank]
        return [found.get(rank, (f"it was not done after {seconds} s", None)) for rank in range(self.size)]

    def start(self) -> None:
        """Start the processes, and have them find each other."""
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="fastopt-ranks-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, self.size, f"{self.folder.name}/store"))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self, seconds: float = 5.0) -> None:
        """Have the processes end, and kill those that do not."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
                process.join()
        if self.processes:
            self.folder.cleanup()
        self.processes, self.pipes = [], []


def serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    """What a process does."""
    import torch
    import torch.distributed as dist

    from fastopt import backends

    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(2)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    while True:
        try:
            backend, function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            backends.use(backend)
            pipe.send((None, function(*arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
    gc.collect()  # what refers to the group goes before it
    dist.destroy_process_group()
