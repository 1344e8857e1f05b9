"""The files of a torch.distributed.checkpoint folder that hold its bytes: zips of `torch.save`, one after another."""

# ruff: noqa: D102 (the methods that every file has)

import contextlib
import io
import math
import os
import pickle
import stat
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fastopt.errors import CheckpointError, UnsafeGlobalsError
from fastopt.files.dcp_metadata import Place
from fastopt.files.in_file import Copies, OpenFile, Tensors
from fastopt.files.torch_globals import unsafe_globals
from fastopt.text import dtype_name

SMALL = 64 * 1024
"""Bytes of what is read at once, to look for the tensor in it."""

MOST_OUTLINES = 4
"""Outlines of one length that are known at a time."""

LARGEST_PICKLE = 64 * 1024
"""Bytes of the pickle that goes with a tensor, which says its dtype, shape and strides."""

Result = TypeVar("Result")


class Layout(NamedTuple):
    """What the pickle of a tensor says."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    first: int
    """The storage's element that is the tensor's first."""
    nbytes: int
    """The size of the storage."""


class Outline:
    """All of a small zip file but the bytes of its tensor, and what follows from those: checksums, and torch's id.

    torch's reader and unpickler take their time. Most entries of a folder have one outline, byte for byte, and what
    these two have found in one of them, they would in the others.
    """

    def __init__(self, content: bytes, layout: Layout, begin: int) -> None:
        self.layout = layout
        self.begin = begin
        """Where the tensor's storage begins."""
        self.pieces: list[tuple[int, bytes]] = []
        """What is the same, and where."""
        end = 0
        for start, stop in sorted(self.differing(content)):
            self.pieces.append((end, content[end:start]))
            end = stop
        self.pieces.append((end, content[end:]))

    @staticmethod
    def differing(content: bytes) -> Iterator[tuple[int, int]]:
        """The parts of a zip file that depend on what the tensor holds."""
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records, directory = archive.infolist(), archive.start_dir
        for record in records:
            if record.filename.endswith(("/data/0", "/.data/serialization_id")):
                name, extra = struct.unpack_from("<2H", content, record.header_offset + 26)
                begin = record.header_offset + 30 + name + extra
                end = begin + record.file_size
                yield begin, end
                if content[end : end + 4] == b"PK\x07\x08":
                    yield end + 4, end + 8
                yield directory + 16, directory + 20
            name, extra, comment = struct.unpack_from("<3H", content, directory + 28)
            directory += 46 + name + extra + comment

    def fits(self, content: bytes) -> bool:
        """Whether a zip file of the same length has this outline."""
        return all(content.startswith(piece, start) for start, piece in self.pieces)


class Known:
    """What was learnt from one entry and holds for others."""

    def __init__(self) -> None:
        self.outlines: dict[int, list[Outline]] = defaultdict(list)
        """By the length of the zip file."""
        self.layouts: dict[bytes, Layout] = {}
        """By the pickle that says so."""
        self.values: dict[bytes, Any] = {}
        """By their bytes, where nothing could change them."""
        self.copies = Copies()


class Window(io.RawIOBase):
    """The bytes of a place in a file, as a file of its own."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self.descriptor, self.offset, self.length = descriptor, offset, length
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence] + offset
        if position < 0:
            raise ValueError("it points to before its beginning")
        self.position = position
        return position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self.length - self.position, 0))
        content = os.pread(self.descriptor, wanted, self.offset + self.position)
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


class Shard:
    """One file, whose tensors are not read yet."""

    def __init__(self, path: Path, known: Known) -> None:
        self.path = path
        self.known = known
        self.file = OpenFile(path)
        status = os.fstat(self.file.descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no file")
        self.size = status.st_size
        self.tensors = Tensors(self.file, known.copies)

    def check(self, places: Sequence[tuple[Place, str]]) -> None:
        """Raise unless the places, sorted, lie within the file and apart from each other; each is that of an entry."""
        end, before = 0, ""
        for place, name in places:
            if place.offset < end:
                raise CheckpointError(f"{self.path} is damaged: the bytes of entries {before!r} and {name!r} overlap")
            end, before = place.offset + place.length, name
            if end > self.size:
                raise CheckpointError(
                    f"{self.path} is damaged or cut short: entry {name!r} is at bytes {place.offset:,} to {end:,}, and "
                    f"the file has {self.size:,}"
                )

    def add_tensor(
        self, place: Place, name: str, dtype: torch.dtype, size: tuple[int, ...], is_part: bool = False
    ) -> None:
        """Find the tensor at a place, and make it one of `tensors`.

        Raises:
            CheckpointError: there is no plain tensor of this dtype and size.
        """
        layout, offset = self.located(place, name, dtype, size)
        nbytes = layout.nbytes
        if math.prod(size) == 0:
            offset = nbytes = 0
        self.tensors.add(offset, nbytes, dtype, size, layout.stride, layout.first, name, is_part)

    def located(self, place: Place, name: str, dtype: torch.dtype, size: tuple[int, ...]) -> tuple[Layout, int]:
        """What is known of the tensor at a place, and the byte of the file at which its storage begins.

        Raises:
            CheckpointError: there is no plain tensor of this dtype and size.
        """
        layout, begin = self.found(place, name, lambda stream: self.in_zip(stream, place), self.outlined)
        if (layout.dtype, layout.size) != (dtype, size):
            raise CheckpointError(
                f"{self.where(place, name)} is damaged: it is {dtype_name(layout.dtype)} {list(layout.size)}, and by "
                f"the metadata {dtype_name(dtype)} {list(size)}"
            )
        return layout, place.offset + begin

    def value(self, place: Place, name: str) -> Any:
        """The value at a place, read as `torch.load(weights_only=True)` reads it.

        Raises:
            UnsafeGlobalsError: it names classes or functions that are not allowed.
            CheckpointError: there is none.
        """
        return self.found(place, name, self.loaded, self.known_value)[0]

    def known_value(self, content: bytes) -> tuple[Any] | None:
        """A value that was read before; in a tuple, as it may be None."""
        return (self.known.values[content],) if content in self.known.values else None

    def loaded(self, stream: Any) -> tuple[Any]:
        """A value that is read now."""
        result = loaded(stream)
        if isinstance(stream, io.BytesIO) and is_constant(result):
            self.known.values[stream.getvalue()] = result
        return (result,)

    def verify(self, place: Place, name: str) -> None:
        """Raise unless the bytes at a place are those that were saved, as their checksums have it."""
        self.found(place, name, check_sums)

    def found(
        self,
        place: Place,
        name: str,
        read: Callable[[Any], Result],
        known: Callable[[bytes], Result | None] = lambda content: None,
    ) -> Result:
        """What `read` finds in the file that is at a place, or what is known of its bytes; errors name the entry."""
        if place.length <= SMALL:
            content = os.pread(self.file.descriptor, place.length, place.offset)
            if (result := known(content)) is not None:
                return result
            stream: Any = io.BytesIO(content)
        else:
            stream = Window(self.file.descriptor, place.offset, place.length)
        where = self.where(place, name)
        try:
            if stream.read(4) != b"PK\x03\x04":  # torch would take it for a file of another kind
                raise CheckpointError("it is no zip file")
            stream.seek(0)
            return read(stream)
        except pickle.UnpicklingError as error:
            raise refusal(where, stream, error) from error
        except OSError:
            raise
        except Exception as error:  # torch has many for what it cannot read
            raise CheckpointError(f"{where} is damaged: {first_line(error)}") from error

    def where(self, place: Place, name: str) -> str:
        """An entry, for an error."""
        return f"{self.path}: entry {name!r}, at bytes {place.offset:,} to {place.offset + place.length:,},"

    def outlined(self, content: bytes) -> tuple[Layout, int] | None:
        """What is known of an entry by its outline."""
        for outline in self.known.outlines.get(len(content), ()):
            if outline.fits(content):
                return outline.layout, outline.begin
        return None

    def in_zip(self, stream: Any, place: Place) -> tuple[Layout, int]:
        """What torch's zip file at a place says of its tensor, and where in it the tensor's storage begins."""
        reader = torch._C.PyTorchFileReader(stream)
        layout = self.layout(reader, stream)
        if math.prod(layout.size) == 0:
            return layout, 0
        begin = int(reader.get_record_offset("data/0"))  # type: ignore[attr-defined]
        check_record(reader, stream, begin, layout, place)
        if isinstance(stream, io.BytesIO) and len(self.known.outlines[place.length]) < MOST_OUTLINES:
            with contextlib.suppress(Exception):  # zipfile does not read all that torch does
                self.known.outlines[place.length].append(Outline(stream.getvalue(), layout, begin))
        return layout, begin

    def layout(self, reader: Any, stream: Any) -> Layout:
        """What the pickle says; torch reads it, unless it has read the same before."""
        if reader.get_record_size("data.pkl") > LARGEST_PICKLE:
            raise CheckpointError("its pickle is too large for a tensor's")
        content = reader.get_record("data.pkl")
        if reader.has_record("byteorder") and reader.get_record("byteorder") != b"little":
            raise CheckpointError("its bytes are in another machine's order")
        if (layout := self.known.layouts.get(content)) is None:
            layout = self.known.layouts[content] = layout_read(stream)
        return layout


def layout_read(stream: Any) -> Layout:
    """What the pickle says, as torch reads it."""
    stream.seek(0)
    tensor = torch.load(stream, map_location="meta", weights_only=True)
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
        raise CheckpointError(f"it is a {type(tensor).__name__}, not a plain tensor")
    if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
        raise CheckpointError("it is no plain tensor, but one of a computation")
    size, stride, first = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    nbytes = tensor.untyped_storage().nbytes()
    last = first + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    if tensor.numel() and not max(tensor.numel(), last + 1) * tensor.element_size() <= nbytes:
        raise CheckpointError("it has more elements than its storage")
    return Layout(tensor.dtype, size, stride, first, nbytes)


def check_record(reader: Any, stream: Any, begin: int, layout: Layout, place: Place) -> None:
    """Raise unless the storage lies at this offset as it is, not compressed."""
    stream.seek(reader.get_record_header_offset("data/0") + 8)  # the local header's flags and method: two bytes each
    if stream.read(2) != b"\0\0":
        raise CheckpointError("its storage is compressed")
    if reader.get_record_size("data/0") != layout.nbytes or begin + layout.nbytes > place.length:
        raise CheckpointError("its storage does not have the size that its pickle says")


def loaded(stream: Any) -> Any:
    """A value that `torch.save` wrote."""
    reader = torch._C.PyTorchFileReader(stream)
    total = sum(map(reader.get_record_size, reader.get_all_records()))
    stream.seek(0, os.SEEK_END)
    if total > stream.tell():
        raise CheckpointError("it is compressed")  # to what size, nobody knows
    stream.seek(0)
    return torch.load(stream, map_location="cpu", weights_only=True)


def check_sums(stream: Any) -> None:
    """Read the zip file that `torch.save` wrote, and compare its checksums."""
    with zipfile.ZipFile(stream) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise CheckpointError("it is compressed")
        if damaged := archive.testzip():
            raise CheckpointError(f"the checksum of its {damaged} is another")


def refusal(where: str, stream: Any, error: pickle.UnpicklingError) -> Exception:
    """The error for an entry that torch does not unpickle: it lists what is not allowed, if that is why."""
    if names := unsafe_globals(stream):
        return UnsafeGlobalsError(where.rstrip(","), names)
    return CheckpointError(f"{where} is damaged: {first_line(error)}")


def first_line(error: Exception) -> str:
    """The text of an error without what torch adds for its developers."""
    return str(error).partition("\n")[0] or type(error).__name__


def is_constant(value: Any) -> bool:
    """Whether a value cannot change, so that one object does for all places where it stands."""
    if isinstance(value, tuple):
        return type(value) is tuple and all(map(is_constant, value))
    return value is None or type(value) in (bool, int, float, complex, str, torch.dtype)
