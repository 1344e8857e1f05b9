"""The zip file of `torch.save`, made by torch's own writer around data that others write.

torch's writer would take a checksum of all data and write it, in one thread, one after the other. Here it is told the
sizes alone, and passes over the data; the checksums it could not know are put into what it wrote.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.serialization import config

from fastopt.files.staging import write_all, write_tensors
from fastopt.files.torch_pickle import Stored, records_of

DESCRIPTOR, ENTRY = b"PK\x07\x08", b"PK\x01\x02"
"""What follows the data of a record, and what the directory has of it, begin with these."""

CRC_IN_DESCRIPTOR, CRC_IN_ENTRY = 4, 16
"""Where the checksum stands in each."""

ENTRY_HEAD = struct.Struct("<28x3H12x")
"""An entry of the directory up to its name, with the lengths of what follows: name, extra field, comment."""


def write(fd: int, content: Any, dtypes: Mapping[int, torch.dtype]) -> None:
    """Write what `torch.save(content, …)` would to an empty file; see `records_of` for `dtypes`.

    Extra memory: that of `write_tensors`, of the pickle, and some hundred bytes a storage.
    """
    records = records_of(content, dtypes)
    outline = _Outline()
    writer = torch._C.PyTorchFileWriter(outline, True, config.save.storage_alignment)  # type: ignore[call-overload]
    stored: dict[int, Stored] = {}
    for index, (name, data) in enumerate(records):
        if isinstance(data, Stored):
            writer.write_record_metadata(name, data.size)
            if data.size:
                stored[index] = data
        else:
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    if [size for _, size in outline.gaps] != [data.size for data in stored.values()]:
        raise RuntimeError("torch's writer has left other room for the storages than it was told to")
    entries = ((offset, *data) for (offset, _), data in zip(outline.gaps, stored.values(), strict=True))
    crcs = write_tensors(fd, entries)
    outline.fill_in(dict(zip(stored, crcs, strict=True)))
    for offset, piece in outline.pieces():
        write_all(fd, memoryview(piece), offset)


class _Outline:
    """A file to torch's writer, which keeps all that is no data of a storage."""

    def __init__(self) -> None:
        self.position = 0
        self.gaps: list[tuple[int, int]] = []
        """Where the data of storages goes: offset and size, in bytes."""
        self.between: list[bytearray] = [bytearray()]
        """What stands before, between and after the gaps."""
        self.directory = 0
        """Where in the last of these the directory of the zip file begins."""

    def write(self, data: memoryview) -> int:
        """Called by torch."""
        if data[:4] == ENTRY:
            self.directory = len(self.between[-1])
        self.between[-1] += data
        self.position += len(data)
        return len(data)

    def seek(self, count: int, whence: int) -> int:
        """Called by torch to pass over data."""
        if whence != os.SEEK_CUR:
            raise RuntimeError("torch's writer goes back in the file")
        self.gaps.append((self.position, count))
        self.between.append(bytearray())
        self.position += count
        return self.position

    def fill_in(self, crcs: dict[int, int]) -> None:
        """Put checksums in where torch could not know them; they are by the index of the record."""
        for piece, crc in zip(self.between[1:], crcs.values(), strict=True):
            if piece[:4] != DESCRIPTOR:
                raise RuntimeError("torch's writer has left no room for a checksum")
            struct.pack_into("<I", piece, CRC_IN_DESCRIPTOR, crc)
        last, position = self.between[-1], self.directory
        for index in range(max(crcs, default=-1) + 1):
            if last[position : position + 4] != ENTRY:
                raise RuntimeError("torch's writer has left a directory of another form")
            if index in crcs:
                struct.pack_into("<I", last, position + CRC_IN_ENTRY, crcs[index])
            position += ENTRY_HEAD.size + sum(ENTRY_HEAD.unpack_from(last, position))

    def pieces(self) -> Iterator[tuple[int, bytearray]]:
        """What torch wrote, and where."""
        position = 0
        for index, piece in enumerate(self.between):
            yield position, piece
            position += len(piece)
            if index < len(self.gaps):
                position += self.gaps[index][1]
