"""Zip archives whose records are mapped into memory as they stand in the file."""

import os
import zipfile
from itertools import pairwise

LOCAL_HEADER = 30
"""Bytes before a record's name, which its data follow."""


def check_records(path: str | os.PathLike[str]) -> None:
    """Raise an error where the records of an archive cannot be mapped, or not each for itself.

    `torch.load(mmap=True)` does not look: it takes the bytes that stand at a record's place for the record, be they
    compressed or another's.

    Raises:
        OSError: the file cannot be opened.
        zipfile.BadZipFile: its directory is damaged.
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


def _end(record: zipfile.ZipInfo) -> int:
    return record.header_offset + LOCAL_HEADER + len(record.filename) + max(record.file_size, record.compress_size)
