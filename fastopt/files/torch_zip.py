"""The zip file of `torch.save`, made by torch's own writer around data that others write.

torch's writer would take a checksum of all data and write it, in one thread, one after the other. Of large storages it
is told the size alone here, and passes over the data; the checksums that it could not know are put in afterwards.
"""

import os
import struct
from collections.abc import Mapping

import torch
from torch.utils.serialization import config

from fastopt.files.staging import CHUNK, SMALL, write_all, write_tensors
from fastopt.files.torch_pickle import Stored, bytes_of, records_of
from fastopt.files.torch_readable import check_readable

DESCRIPTOR, ENTRY = b"PK\x07\x08", b"PK\x01\x02"
"""What follows the data of a record, and what the directory has of it, begin with these."""

CRC_IN_DESCRIPTOR, CRC_IN_ENTRY = 4, 16
"""Where the checksum stands in each."""

ENTRY_HEAD = struct.Struct("<28x3H12x")
"""An entry of the directory up to its name, with the lengths of what follows: name, extra field, comment."""


def write(fd: int, content: object, dtypes: Mapping[int, torch.dtype], start: int = 0) -> int:
    """Write what `torch.save(content, …)` would to a file that holds nothing from `start` on; returns its bytes.

    See `records_of` for `dtypes`. Extra memory: that of `write_tensors` and of the pickle, and some hundred bytes a
    storage.

    Raises:
        TypeError: `torch.load(weights_only=True)` would not read it.
    """
    check_readable([((), content)])
    records = records_of(content, dtypes)
    outline = _Outline(fd, start)
    writer = torch._C.PyTorchFileWriter(outline, True, config.save.storage_alignment)  # type: ignore[call-overload]
    large: dict[int, Stored] = {}
    for index, (name, data) in enumerate(records):
        outline.raise_failure()
        if isinstance(data, bytes | str):
            writer.write_record(name, data, len(data))
            continue
        size = data.size if isinstance(data, Stored) else data.nbytes()
        if size < SMALL:
            writer.write_record(name, data.in_memory() if isinstance(data, Stored) else data, size)
        else:
            writer.write_record_metadata(name, size)
            large[index] = data if isinstance(data, Stored) else Stored(bytes_of(data), torch.uint8)
    outline.is_at_end = True
    writer.write_end_of_file()
    outline.raise_failure()
    if [size for _, size in outline.gaps] != [data.size for data in large.values()]:
        raise RuntimeError("torch's writer has left other room for the storages than it was told to")
    entries = ((start + offset, *data) for (offset, _), data in zip(outline.gaps, large.values(), strict=True))
    crcs = write_tensors(fd, entries)
    outline.finish(dict(zip(large, crcs, strict=True)))
    return outline.position


class _Outline:
    """A file to torch's writer, which leaves gaps for data that others write.

    torch's writer ends the process if its file raises while the writer is taken down after an error. So `write` and
    `seek` raise nothing; what fails in them is kept, and from then on they do nothing.
    """

    def __init__(self, fd: int, start: int = 0) -> None:
        self.fd = fd
        self.start = start
        """Where in the file this begins; all other places count from there."""
        self.position = 0
        self.gaps: list[tuple[int, int]] = []
        """Offset and size, in bytes."""
        self.is_behind_gap = False
        self.piece = bytearray()
        """What ends at the position, and is not written yet."""
        self.is_at_end = False
        """Whether torch writes what follows the last record: then all is kept."""
        self.directory = 0
        """Where in the piece the directory of the zip file begins."""
        self.failure: BaseException | None = None

    def raise_failure(self) -> None:
        """Raise what has failed."""
        if self.failure is not None:
            raise self.failure

    def write(self, data: memoryview) -> int:
        """Called by torch."""
        try:
            if self.failure is None:
                self.append(data)
        except BaseException as error:
            self.failure = error
        return len(data)

    def seek(self, count: int, whence: int) -> int:
        """Called by torch to pass over data."""
        try:
            if self.failure is None:
                self.leave(count, whence)
        except BaseException as error:
            self.failure = error
        return self.position

    def append(self, data: memoryview) -> None:
        """Take what torch writes."""
        if self.is_behind_gap and data[:4] != DESCRIPTOR:
            raise RuntimeError("torch's writer leaves no room for a checksum")
        self.is_behind_gap = False
        if self.is_at_end and data[:4] == ENTRY:
            self.directory = len(self.piece)
        elif not self.is_at_end and len(self.piece) >= CHUNK:
            self.flush()
        self.piece += data
        self.position += len(data)

    def leave(self, count: int, whence: int) -> None:
        """Leave a gap."""
        if whence != os.SEEK_CUR:
            raise RuntimeError("torch's writer goes back in the file")
        self.flush()
        self.gaps.append((self.position, count))
        self.is_behind_gap = True
        self.position += count

    def flush(self) -> None:
        """Write what is kept."""
        self.write_at(self.position - len(self.piece), self.piece)
        self.piece = bytearray()

    def finish(self, crcs: Mapping[int, int]) -> None:
        """Put checksums in where torch could not know them; they are by the index of the record."""
        position = self.directory
        for index in range(max(crcs, default=-1) + 1):
            if self.piece[position : position + 4] != ENTRY:
                raise RuntimeError("torch's writer has left a directory of another form")
            if index in crcs:
                struct.pack_into("<I", self.piece, position + CRC_IN_ENTRY, crcs[index])
            position += ENTRY_HEAD.size + sum(ENTRY_HEAD.unpack_from(self.piece, position))
        self.flush()
        for (offset, size), crc in zip(self.gaps, crcs.values(), strict=True):
            self.write_at(offset + size + CRC_IN_DESCRIPTOR, struct.pack("<I", crc))

    def write_at(self, position: int, data: bytes | bytearray) -> None:
        """Write to the file."""
        write_all(self.fd, memoryview(data), self.start + position)
