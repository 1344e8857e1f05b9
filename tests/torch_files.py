"""Files as torch.save writes them, and such as it never would."""

import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastopt import _C

DIRECTORY_ENTRY = b"PK\1\2"


def by_torch(path: Path) -> Any:
    """What the installed torch reads."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def natively(path: Path) -> tuple[Any] | None:
    """What is read without torch's unpickler, in a tuple of one; None where that does not go."""
    return _C.read_torch_file(os.fsencode(path))


def write_archive(path: Path, pickle: bytes, records: dict[str, bytes] | None = None) -> None:
    """An archive by torch's own writer, around any pickle; it adds what torch's reader asks for."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", pickle, len(pickle))
    for name, data in (records or {}).items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()


def rewrite(path: Path, compression: int = zipfile.ZIP_STORED, without: str = "") -> None:
    """Packs the records of an archive anew, by the standard library."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            if name.partition("/")[2] != without:
                archive.writestr(name, data)


def pack_anew(path: Path, past: int) -> None:
    """Packs the records anew, each with its data so many bytes past a multiple of 64."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            info = zipfile.ZipInfo(name)
            field = (past - written(archive) - 30 - len(name) - 4) % 64
            info.extra = b"FB" + struct.pack("<H", field) + bytes(field)
            archive.writestr(info, data)


def written(archive: zipfile.ZipFile) -> int:
    assert archive.fp is not None
    return archive.fp.tell()


def records_of(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The directory, by the names that torch uses."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename.partition("/")[2]: info for info in archive.infolist()}


def start_of_directory(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        return archive.start_dir


def set_in_directory(path: Path, name: str, field: int, value: bytes) -> None:
    """Overwrites a field, given by its place in a directory's entry, of the record of that name."""
    data = bytearray(path.read_bytes())
    entry = data.index(DIRECTORY_ENTRY, start_of_directory(path))
    while True:
        name_length, extra, comment = struct.unpack_from("<HHH", data, entry + 28)
        if data[entry + 46 : entry + 46 + name_length].decode().endswith(f"/{name}"):
            data[entry + field : entry + field + len(value)] = value
            path.write_bytes(data)
            return
        entry += 46 + name_length + extra + comment


def boundaries(path: Path) -> list[int]:
    """Where a header, a record's data or a directory's entry begins or ends."""
    data = path.read_bytes()
    found = {0, start_of_directory(path), len(data)}
    for signature in (b"PK\3\4", DIRECTORY_ENTRY, b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\x08"):
        found.update(place for place in range(len(data)) if data.startswith(signature, place))
    for info in records_of(path).values():
        name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
        begin = info.header_offset + 30 + name + extra
        found |= {info.header_offset + 30, begin, begin + info.file_size}
    return sorted(found)
