"""Tensors in files, which are read where their elements are needed."""

import math
import os
from collections.abc import Sequence

import torch

from fastopt.backends import current
from fastopt.backends.interface import PlaceInFile
from fastopt.chunked import ChunkedTensor, is_dense, row_major
from fastopt.text import counted

SMALL = 64 * 1024
"""Bytes of a tensor that may be read before it is needed."""

COPIED = 128 * 2**20
"""Bytes of such tensors that are in memory at most."""


class OpenFile:
    """A file that stays open while anything in it may be read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for someone to write to it

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Elements:
    """The elements of a tensor without gaps, in a file from any byte on; a `Source` of a `ChunkedTensor`.

    Note [Alignment]: torch's operations must not be given memory at an address that is no multiple of an element's
    size. Compilers make loops that step to a multiple of a vector's size and load from there on with instructions that
    fail anywhere else; from such an address they never get there, and the process dies. Bytes can be read to where they
    are aligned.

    Args:
        file: the file.
        offset: the byte that they begin at.
        dtype, size, stride: those of the tensor.
        name: what an error says that they are.
    """

    def __init__(
        self, file: OpenFile, offset: int, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], name: str
    ) -> None:
        self.file, self.offset, self.dtype, self.shape, self.name = file, offset, dtype, torch.Size(size), name
        self.order = sorted(range(len(size)), key=lambda dimension: (-stride[dimension], dimension))
        """The dimensions, the outermost in the file first."""

    def copy_into(self, target: torch.Tensor) -> None:
        """Copy the elements into a tensor of the same shape, cast to its dtype.

        Raises:
            OSError: the file cannot be read, or has been cut short; a note names it, and the entry.
        """
        try:
            current().read_into(self.file.descriptor, self.offset, self.dtype, target.permute(self.order))
        except OSError as error:
            error.add_note(f"entry {self.name!r} of {os.fspath(self.file.path)}")
            raise


class Tensors:
    """Tensors at known places of a file, which become tensors all at once.

    One that can lie in a mapping of the file does, and is not read yet. One at a byte that its dtype is not aligned to,
    or in another order than it had, cannot: while `Copies` has room, small ones are read, and the rest are `Elements`.
    """

    def __init__(self, file: OpenFile, copies: "Copies") -> None:
        self.file = file
        self.copies = copies
        self.places: list[PlaceInFile] = []
        self.found: list[torch.Tensor | None] = []

    def add(
        self,
        offset: int,
        nbytes: int,
        dtype: torch.dtype,
        size: Sequence[int],
        stride: Sequence[int] | None,
        first: int,
        name: str,
        is_part: bool = False,
    ) -> None:
        """The next tensor.

        Args:
            offset: where its storage begins in the file.
            nbytes: the bytes of the storage.
            dtype: the tensor's.
            size: the tensor's.
            stride: its strides; None for those of row-major order.
            first: the element of the storage that is its first.
            name: what an error says that it is.
            is_part: whether it is a part of a tensor that is put together, which is never mapped.
        """
        is_copied = False
        if is_part or offset % dtype.itemsize:
            is_compact = stride is None or is_dense(size, stride)
            if not (is_compact and nbytes == math.prod(size) * dtype.itemsize) or self.copies.admit(nbytes):
                is_copied = True  # with gaps in any case, and torch saves none
            else:
                steps = row_major(size) if stride is None else stride
                whole = Elements(self.file, offset, dtype, size, steps, name)
                self.found.append(ChunkedTensor(size, dtype, [([0] * len(size), whole)], steps))
                return
        self.places.append((offset, nbytes, dtype, size, stride, first, is_copied))
        self.found.append(None)

    def all(self) -> list[torch.Tensor]:
        """All of them, in their order.

        Raises:
            OSError: the file cannot be read, or has been cut short.
            ValueError: a tensor is not within its file.
        """
        found = iter(
            current().tensors_in_file(self.file.descriptor, self.file.path, self.places) if self.places else ()
        )
        return [next(found) if tensor is None else tensor for tensor in self.found]


class Copies:
    """How much may be read before it is needed."""

    def __init__(self) -> None:
        self.left = COPIED

    def admit(self, nbytes: int) -> bool:
        """Whether so many bytes may be, which are then."""
        if not nbytes <= min(SMALL, self.left):
            return False
        self.left -= nbytes
        return True


def where_cut_short(tensor: torch.Tensor) -> str | None:
    """What a file lacks that has been cut short since a tensor was found in it; None where that is not so."""
    if (found := current().file_range(tensor)) is None:
        return None
    descriptor, offset, nbytes, path = found
    size = os.fstat(descriptor).st_size  # it is open as long as the tensor lives
    if offset + nbytes <= size:
        return None
    return (
        f"is at bytes {offset:,} to {offset + nbytes:,} of {os.fsdecode(path)}, which has {counted(size, 'byte')} now"
    )
