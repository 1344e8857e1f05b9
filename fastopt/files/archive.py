"""Zip archives whose records are mapped into memory as they stand in the file."""

import os
import struct
import zipfile
from itertools import pairwise

HEADER = struct.Struct("<4s22x2H")
"""What a record begins with: its signature, and the lengths of the name and of the extra field that follow."""

SIGNATURE = b"PK\x03\x04"

WIDEST = 16
"""Bytes of the largest element, which is what all may need to be aligned to."""


def check_records(path: str | os.PathLike[str]) -> bool:
    """Raise an error where the records of an archive cannot be mapped, or not each for itself.

    `torch.load(mmap=True)` does not look: it takes the bytes that stand at a record's place for the record, be they
    compressed or another's.

    Returns:
        Whether tensors can lie in the mapping: torch's operations may kill the process where their elements are not
        aligned. torch.save aligns them, and others who pack its records do not.

    Raises:
        OSError: the file cannot be opened.
        zipfile.BadZipFile: its directory is damaged, or a header.
        ValueError: a record is compressed or encrypted, stands twice, ends beyond the records, or overlaps another; the
            text names it.
    """
    with zipfile.ZipFile(path) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        end = archive.start_dir
    names = set()
    for record in records:
        name = record.filename.lower()  # torch's reader does not tell case
        if name in names:
            raise ValueError(f"record {record.filename} stands twice in the archive")
        names.add(name)
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            how = "encrypted" if record.flag_bits & 1 else "compressed"
            raise ValueError(f"record {record.filename} is {how}; torch.save stores records as they are")
        if _end(record) > end:
            raise ValueError(
                f"record {record.filename}, {record.file_size:,} bytes at {record.header_offset:,}, ends beyond the "
                f"records of the archive, which end at {end:,}"
            )
    for first, second in pairwise(records):
        if _end(first) > second.header_offset:
            raise ValueError(f"records {first.filename} and {second.filename} overlap in the archive")
    return _are_aligned(path, records)


def data_start(record: zipfile.ZipInfo, header: bytes | memoryview) -> int:
    """Where the data of a record begins, behind its header's first byte."""
    signature, name, extra = HEADER.unpack(header)
    if signature != SIGNATURE:
        raise zipfile.BadZipFile(f"there is no record {record.filename} where its directory says")
    return HEADER.size + int(name) + int(extra)


def _end(record: zipfile.ZipInfo) -> int:
    return record.header_offset + HEADER.size + len(record.filename) + max(record.file_size, record.compress_size)


def _are_aligned(path: str | os.PathLike[str], records: list[zipfile.ZipInfo]) -> bool:
    with open(path, "rb", buffering=0) as file:
        return all(
            (begin + data_start(record, os.pread(file.fileno(), HEADER.size, begin))) % WIDEST == 0
            for record in records
            if "/data/" in record.filename and (begin := record.header_offset) >= 0
        )
