"""The data of `torch.save`'s zip files, held against its checksums by all threads."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastopt.errors import CheckpointError, NoChecksumsError
from fastopt.files.archive import HEADER, data_start
from fastopt.files.checksums import combined
from fastopt.text import listed

CHUNK = 4 << 20
"""Bytes that a thread reads at a time."""

MOST_THREADS = 32
"""However many torch has: with a chunk each they take 128 MiB."""

SHOWN = 5
"""Damaged records that an error names."""


def verify(path: str | os.PathLike[str]) -> None:
    """Hold the data of a file against the checksums that a zip file has of each of its records.

    All of the file's data is read, through memory of bounded size.

    Raises:
        OSError: the file cannot be opened.
        NoChecksumsError: it has none, as files from before torch 1.6 and those written under
            `torch.serialization.set_crc32_options(False)`.
        CheckpointError: it is damaged; the text names the records and, where the rest of the file says it, the tensors
            that they belong to.
    """
    with open(path, "rb") as file:
        try:
            is_zip = zipfile.is_zipfile(file)
            if is_zip:
                with zipfile.ZipFile(file) as archive:
                    records = archive.infolist()
                    damaged = damaged_records(archive, file.fileno(), records)
                    damaged.sort(key=lambda record: record.header_offset)
                    offsets = [offset_of(file.fileno(), record) for record in damaged[:SHOWN]]
        except Exception as error:  # zipfile has many for what it cannot read, OSError among them
            raise CheckpointError(f"{os.fspath(path)} is damaged: {error}") from error
    if not is_zip:
        raise NoChecksumsError(f"{os.fspath(path)} has no checksums: it is no zip file, or not a whole one")
    if damaged and not any(record.CRC for record in records):
        raise NoChecksumsError(f"{os.fspath(path)} has no checksums: they were turned off when it was saved")
    if damaged:
        tensors = tensors_by_offset(path)
        shown = [described(record, tensors.get(offset)) for record, offset in zip(damaged, offsets, strict=False)]
        verb = "is" if len(damaged) == 1 else "are"
        raise CheckpointError(
            f"{os.fspath(path)}: {listed(shown, len(damaged))} {verb} damaged: the checksum is not the saved one"
        )


def damaged_records(archive: zipfile.ZipFile, fd: int, records: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """The records whose data has another checksum than the saved one."""
    damaged = [
        record for record in records if record.compress_type != zipfile.ZIP_STORED and not unpacks(archive, record)
    ]
    stored = [record for record in records if record.compress_type == zipfile.ZIP_STORED]
    groups, large = grouped(stored, archive.start_dir)
    with ThreadPoolExecutor(min(torch.get_num_threads(), MOST_THREADS)) as pool:
        for found in pool.map(partial(damaged_in, fd), groups):
            damaged += found
        damaged += [record for record in large if checksum(fd, record, pool) != record.CRC]
    return damaged


def unpacks(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    """Whether a compressed record holds what it should; torch writes none, and zipfile checks as it reads."""
    try:
        with archive.open(record) as file:
            while file.read(CHUNK):
                pass
    except (zipfile.BadZipFile, zlib.error):
        return False
    return True


Group = tuple[int, int, list[zipfile.ZipInfo]]
"""Records that lie in a part of the file, from and to."""


def grouped(records: list[zipfile.ZipInfo], end: int) -> tuple[list[Group], list[zipfile.ZipInfo]]:
    """Small records that are read together, and the large ones; `end` is where the directory of the file begins."""
    records = sorted(records, key=lambda record: record.header_offset)
    limits = [*(record.header_offset for record in records[1:]), end][: len(records)]
    groups: list[Group] = []
    large = []
    for record, limit in zip(records, limits, strict=True):
        begin = record.header_offset
        if limit - begin > CHUNK:
            large.append(record)
        elif groups and groups[-1][1] == begin and limit - groups[-1][0] <= CHUNK:
            first, _, members = groups[-1]
            members.append(record)
            groups[-1] = (first, limit, members)
        else:
            groups.append((begin, limit, [record]))
    return groups, large


def damaged_in(fd: int, group: Group) -> list[zipfile.ZipInfo]:
    """The damaged records of a group."""
    begin, limit, records = group
    memory = memoryview(read_all(fd, begin, limit - begin))
    damaged = []
    for record in records:
        start = record.header_offset - begin
        start += data_start(record, memory[start : start + HEADER.size])
        data = memory[start : start + record.file_size]
        if len(data) != record.file_size or zlib.crc32(data) != record.CRC:
            damaged.append(record)
    return damaged


def checksum(fd: int, record: zipfile.ZipInfo, pool: ThreadPoolExecutor) -> int:
    """The checksum of a large record's data, chunk by chunk."""
    begin = offset_of(fd, record)
    end = begin + record.file_size
    if end > os.fstat(fd).st_size:
        raise zipfile.BadZipFile(f"the record {record.filename} ends behind the end of the file")
    parts = [(start, min(CHUNK, end - start)) for start in range(begin, end, CHUNK)]
    total = 0
    for crc, (_, count) in zip(pool.map(lambda part: zlib.crc32(read_all(fd, *part)), parts), parts, strict=True):
        total = combined(total, crc, count)
    return total


def offset_of(fd: int, record: zipfile.ZipInfo) -> int:
    """Where in the file the data of a record begins."""
    return record.header_offset + data_start(record, read_all(fd, record.header_offset, HEADER.size))


def read_all(fd: int, offset: int, count: int) -> bytes:
    """A part of a file."""
    data = os.pread(fd, count, offset) if offset >= 0 else b""
    while 0 < len(data) < count and (more := os.pread(fd, count - len(data), offset + len(data))):
        data += more
    if len(data) != count:
        raise zipfile.BadZipFile("it is shorter than its directory says")
    return data


def described(record: zipfile.ZipInfo, tensors: list[str] | None) -> str:
    """A record, and the tensors that lie in it."""
    return f"{record.filename} ({', '.join(tensors)})" if tensors else record.filename


def tensors_by_offset(path: str | os.PathLike[str]) -> dict[int, list[str]]:
    """Where in a file the data of its tensors begins, and which these are; nothing where the file does not say."""
    found: dict[int, list[str]] = {}
    try:
        with FakeTensorMode():  # so that no data is read, and storages know where theirs is
            content = torch.load(path, weights_only=True)
        for place, tensor in tensors_below(content):
            if (offset := tensor.untyped_storage()._checkpoint_offset) is not None:
                found.setdefault(offset, []).append(place)
    except Exception:  # no better than what is about to be raised
        found.clear()
    return found


def tensors_below(content: Any, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a content, with the keys that lead to them."""
    if isinstance(content, torch.Tensor):
        yield place, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from tensors_below(value, f"{place}.{key}" if place else str(key))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from tensors_below(value, f"{place}.{index}" if place else str(index))
