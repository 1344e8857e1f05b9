"""Small tensors that every rank needs as a whole: each is read by one rank, which tells the others.

Note [Shared reads]: of each parameter there is a `step`, in a file of `torch.save` of its own within a rank's file. If
every rank read every one, a thousand ranks would read a few bytes from a hundred thousand places each, and what holds
them would have to answer a hundred million times. So they are dealt out, and handed round in one piece.
"""

import hashlib
from collections.abc import Sequence

import torch.distributed as dist

from fastopt.distributed.ranks import is_distributed
from fastopt.distributed.targets import Target
from fastopt.files.checksums import memory_of, writable_memory_of

MOST_BYTES = 4096
"""Of a tensor that is shared: larger ones are read faster than they are handed round."""


class Deal:
    """Who of a group reads what.

    Args:
        group: the process group; None for the default one.
        targets: what this rank needs.
    """

    def __init__(self, group: dist.ProcessGroup | None, targets: Sequence[Target]) -> None:
        self.group = group
        small = [target for target in targets if is_small(target)]
        self.shared = small if is_same_everywhere(group, small) else []
        """What all ranks need, in one order; nothing where they do not need the same."""
        dealt = {id(target) for target in self.shared}
        self.own = [target for target in targets if id(target) not in dealt]
        """What this rank has to read."""
        if self.shared:
            self.own += self.of_rank(dist.get_rank(group))

    def of_rank(self, rank: int) -> list[Target]:
        """What of the shared ones a rank reads."""
        return self.shared[rank :: dist.get_world_size(self.group)]

    def hand_round(self) -> None:
        """Give the others what this rank has read, and take what they have; all ranks have read theirs."""
        if not self.shared:
            return
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        contents: list[bytes] = [b""] * size
        dist.all_gather_object(
            contents, b"".join(memory_of(target.memory) for target in self.of_rank(rank)), group=self.group
        )
        for other in range(size):
            begin = 0
            for target in self.of_rank(other) if other != rank else []:
                memory = writable_memory_of(target.memory)
                memory[:] = contents[other][begin : begin + len(memory)]
                begin += len(memory)


def is_small(target: Target) -> bool:
    """Whether a tensor is small, and of the CPU's."""
    memory = target.memory
    is_here = memory.device.type == "cpu" and memory.is_contiguous()
    return target.is_plain and is_here and 0 < memory.nbytes <= MOST_BYTES


def is_same_everywhere(group: dist.ProcessGroup | None, targets: Sequence[Target]) -> bool:
    """Whether all ranks of a group, of which there are several, need the same tensors in the same dtypes."""
    if not is_distributed() or dist.get_world_size(group) == 1:
        return False
    digest = hashlib.sha256()
    for target in targets:
        digest.update(f"{target.stored.name}\0{target.memory.dtype}\0".encode())
    found: list[bytes] = [b""] * dist.get_world_size(group)
    dist.all_gather_object(found, digest.digest(), group=group)
    return len(set(found)) == 1
