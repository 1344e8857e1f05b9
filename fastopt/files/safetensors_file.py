"""Files of the safetensors library, with all of a state that is no tensor in their metadata.

docs/formats.md says what is in such a file. The library reads them; what is written here is its header, as no version
of the library writes tensor after tensor.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fastopt.backends import current
from fastopt.chunked import ChunkedTensor, row_major
from fastopt.collector import paused_collector
from fastopt.errors import CheckpointError
from fastopt.files import metadata
from fastopt.files.atomic import replacing
from fastopt.files.checksums import checksums
from fastopt.files.in_file import Copies, Elements, OpenFile, Tensors
from fastopt.files.metadata import Json, Path, place
from fastopt.files.staging import Entry, write_tensors
from fastopt.text import counted, some

VERSION = "1"
"""Of what is in the metadata."""

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
"""The dtypes that the format has, and their names in it."""

DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}

LONGEST_HEADER = 100_000_000
"""Bytes; the library reads no longer one."""

UNKNOWN_CHECKSUM = "00000000"
"""What stands in for a checksum until the tensor is written; all are as long as this."""


def write(path: str | os.PathLike[str], content: Any, dtypes: Mapping[int, torch.dtype] | None = None) -> None:
    """Replace a file by one that holds `content`, tensor after tensor, whatever device they are on.

    Extra memory: that of `write_tensors`, and of the header. Each tensor is written for itself, in row-major order,
    with a checksum; the order of its dimensions in memory is noted. Objects that stand twice are written once; tensors
    that share memory no longer do when they are read.

    Args:
        path: the file; replaced as a whole and at once.
        content: containers and values as `metadata.encode` takes them. Tensors are strided ones of no subclass.
        dtypes: the dtype that a tensor gets in the file, by its `id`; all others keep theirs.

    Raises:
        TypeError, ValueError: something in the content has no place in this format; the text says what and where.
        OSError: the file cannot be written.

    After any error the file is as it was.
    """
    with paused_collector():
        names = _Names(dtypes or {})
        tree = metadata.encode(content, names.refer)
        # Wide elements first, so that each tensor is aligned without gaps, which the format does not have.
        tensors = sorted(names.tensors.values(), key=lambda tensor: -tensor.dtype.itemsize)
        fields = fields_of(tensors)
        header = header_of(tree, fields)
    if len(header) > LONGEST_HEADER:
        raise ValueError(
            f"{os.fspath(path)}: {counted(len(tensors), 'tensor')} make a header of {len(header):,} bytes, and "
            f"safetensors reads none beyond {LONGEST_HEADER:,}; save it as a .pt file"
        )
    with replacing(path) as file:
        write_data(file.fileno(), 8 + len(header), tensors)
        header = header_of(tree, fields)
        file.write(len(header).to_bytes(8, "little") + header)


class _Named:
    """A tensor of the file."""

    __slots__ = ("dtype", "name", "reference", "size", "tensor")

    def __init__(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        self.name = name
        self.tensor = tensor
        self.dtype = dtype
        self.reference: dict[str, Json] = {"$tensor": name, "crc32": UNKNOWN_CHECKSUM}
        """What stands for it in the metadata."""
        self.size = tensor.numel() * dtype.itemsize
        """Bytes in the file."""


class _Names:
    """Gives tensors names, and finds those that the format cannot hold."""

    def __init__(self, dtypes: Mapping[int, torch.dtype]) -> None:
        self.dtypes = dtypes
        self.tensors: dict[int, _Named] = {}
        self.taken = {"__metadata__"}

    def refer(self, tensor: torch.Tensor, path: Path) -> dict[str, Json]:
        """What stands for a tensor in the metadata."""
        known = self.tensors.get(id(tensor))
        if known is not None:
            return known.reference
        dtype = self.dtypes.get(id(tensor), tensor.dtype)
        check(tensor, dtype, path)
        named = self.tensors[id(tensor)] = _Named(self.name(path), tensor, dtype)
        if tensor.requires_grad:
            named.reference["requires_grad"] = True
        if (strides := odd_strides(tensor)) is not None:
            named.reference["strides"] = list(strides)
        return named.reference

    def name(self, path: Path) -> str:
        """The keys with dots between them, and a number after it where another tensor has that name."""
        readable = ".".join(map(str, path))
        if not readable.isascii():
            readable = readable.encode("utf-8", "backslashreplace").decode()
        name, number = readable, 2
        while name in self.taken:
            name, number = f"{readable}~{number}", number + 1
        self.taken.add(name)
        return name


def check(tensor: torch.Tensor, dtype: torch.dtype, path: Path) -> None:
    """Refuse what cannot be written as this dtype, before anything is."""
    if type(tensor) is not torch.Tensor:
        kind = type(tensor).__name__
        raise TypeError(f"{place(path)} is a {kind}; a safetensors file holds plain tensors alone")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{place(path)} is a {kind} tensor; a safetensors file holds strided ones alone")
    if dtype not in DTYPES:
        raise TypeError(
            f"{place(path)} is to be saved as {dtype}, which safetensors does not have; a .pt file can hold it"
        )
    if tensor.is_meta:
        raise ValueError(f"{place(path)} is on the meta device and has no values")
    if not (count := tensor.numel()):
        return
    last = count - 1
    if not tensor.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.dtype.itemsize
    if (there := tensor.untyped_storage().nbytes()) < needed:
        raise ValueError(
            f"{place(path)} needs {needed:,} bytes of memory and has {there:,}: its storage has been released"
        )


def odd_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The strides of a copy, which are those of the tensor with any gaps and overlaps closed; None if row-major."""
    shape = tensor.shape
    if tensor.is_contiguous() and 0 not in shape and 1 not in shape:
        return None
    strides = torch.empty_like(tensor, device="meta").stride()
    return None if strides == row_major(shape) else strides


def fields_of(tensors: list[_Named]) -> str:
    """What the header says of tensors that follow each other."""
    fields, position = {}, 0
    for tensor in tensors:
        end = position + tensor.size
        shape = list(tensor.tensor.shape)
        fields[tensor.name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    return as_json(fields)


def header_of(tree: Json, fields: str) -> bytes:
    """The header of a file; its length does not depend on the checksums."""
    content = as_json(tree)
    about = {"fastopt": VERSION, "crc32": f"{zlib.crc32(content.encode()):08x}", "content": content}
    rest = f",{fields[1:]}" if fields != "{}" else "}"
    header = f'{{"__metadata__":{as_json(about)}{rest}'.encode()
    return header + b" " * (-len(header) % 8)


def as_json(value: Json) -> str:
    """Without white space."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def write_data(fd: int, start: int, tensors: list[_Named]) -> None:
    """Write tensors from a place in the file on, and note their checksums."""
    entries: list[Entry] = []
    for tensor in tensors:
        entries.append((start, tensor.tensor, tensor.dtype))
        start += tensor.size
    crcs = current().write_small(fd, entries)
    name = ""

    def left() -> Iterator[Entry]:
        nonlocal name
        for tensor, entry, crc in zip(tensors, entries, crcs, strict=True):
            if crc is None:
                name = tensor.name
                yield entry

    try:
        rest = iter(write_tensors(fd, left(), current().crc32))
    except RuntimeError as error:
        error.add_note(f"while writing {name!r}")
        raise
    for tensor, crc in zip(tensors, crcs, strict=True):
        tensor.reference["crc32"] = f"{next(rest) if crc is None else crc:08x}"


def read(path: str | os.PathLike[str], verify: bool = False) -> Any:
    """What a file holds that `write` wrote, on the CPU.

    The tensors are not read yet: they lie in a private mapping of the file. Those that had another order of dimensions
    in memory, or that others than `write` have left at a byte that their dtype is not aligned to, are each a
    `ChunkedTensor`, and small ones of these are copied, as `fastopt.files.in_file` has it. While tensors are in use the
    file must not be cut short: to look at one in the mapping would kill the process (SIGBUS). A load of the native
    backend, and any of a `ChunkedTensor`, reads the file instead.

    Args:
        path: the file.
        verify: whether the data of all tensors is read and held against its checksums.

    Raises:
        OSError: the file cannot be opened.
        ImportError: the safetensors library is not installed.
        CheckpointError: the file is damaged, or `write` did not write it; the text names it, and what in it is wrong.
    """
    try:
        with paused_collector():
            about, tensors = opened(path)
            content = metadata.decode(content_of(about, tensors.places), tensors.resolve)
        if unused := sorted(tensors.places.keys() - tensors.crcs.keys()):
            raise ValueError(f"its metadata does not say where {some(unused)} belong")
        if verify:
            tensors.verify()
    except ValueError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    return content


def opened(path: str | os.PathLike[str]) -> tuple[dict[str, str], "_Tensors"]:
    """The metadata and the tensors of a file, which are not read yet.

    The library reads the header, and sees to it that the tensors follow each other without gaps up to the file's end.
    """
    library, name = safetensors(), None
    file = OpenFile(path)
    try:
        with library.safe_open(os.fsdecode(path), framework="pt") as found:
            about: dict[str, str] = found.metadata() or {}
            entries = []
            for name in found.offset_keys():
                entry = found.get_slice(name)
                entries.append((name, entry.get_dtype(), entry.get_shape()))
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        where = "" if name is None else f", tensor {name!r}"
        raise ValueError(f"no valid safetensors file{where}: {reason}") from error
    if not os.path.samestat(os.fstat(file.descriptor), os.stat(path)):
        raise ValueError("it was replaced while it was being read")
    header = int.from_bytes(os.pread(file.descriptor, 8, 0), "little")
    refuse_duplicates(os.pread(file.descriptor, header, 8), len(entries))
    return about, _Tensors(file, 8 + header, entries)


def refuse_duplicates(header: bytes, count: int) -> None:
    """Refuse a header in which a name stands twice; of two tensors at one place the library takes the last.

    Args:
        header: one that the library could read.
        count: its tensors.
    """
    if header.count(b'"data_offsets"') != count or b"\\u" in header:  # seldom, and then most often for a name's sake
        json.loads(header, object_pairs_hook=metadata.without_duplicates)


def safetensors() -> ModuleType:
    """The library; reading needs it, and nothing else of fastopt does."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "reading a .safetensors file needs the safetensors library: pip install safetensors"
        ) from error
    return safetensors


def content_of(about: Mapping[str, str], tensors: Mapping[str, object]) -> str:
    """The metadata that `write` wrote, whole."""
    if "fastopt" not in about:
        raise ValueError(
            f"it holds {counted(len(tensors), 'tensor')} ({some(sorted(tensors))}), and not the param_groups and types "
            "of a state, which only fastopt.save writes into a .safetensors file"
        )
    if about["fastopt"] != VERSION:
        raise ValueError(f"its metadata is of version {about['fastopt']!r}; this fastopt reads {VERSION!r}")
    content = about.get("content", "")
    if about.get("crc32") != f"{zlib.crc32(content.encode()):08x}":
        raise ValueError("its metadata is damaged: the checksum is not the saved one")
    return content


class _Place(NamedTuple):
    """Where in a file a tensor is, in row-major order."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: list[int]


class _Tensors:
    """The tensors of a file, and what its metadata says of them.

    Args:
        file: the file.
        start: where their data begins.
        entries: the name, the format's name for the dtype, and the shape of each, in the order of their data.
    """

    def __init__(self, file: OpenFile, start: int, entries: Iterable[tuple[str, str, list[int]]]) -> None:
        self.file = file
        self.copies = Copies()
        self.places: dict[str, _Place] = {}
        self.crcs: dict[str, str] = {}
        """Of the tensors that the metadata names."""
        self.odd: dict[str, torch.Tensor] = {}
        """Those that are not as they are in the file."""
        found = Tensors(file, self.copies)
        for name, of_format, shape in entries:
            if (dtype := DTYPE_OF.get(of_format)) is None:
                raise ValueError(f"tensor {name!r} is {of_format}, a dtype that torch does not have")
            nbytes = math.prod(shape) * dtype.itemsize
            self.places[name] = _Place(start, nbytes, dtype, shape)
            found.add(start, nbytes, dtype, shape, None, 0, name)
            start += nbytes
        if start != os.fstat(file.descriptor).st_size:
            raise ValueError("it has changed while it was being read")
        self.tensors = dict(zip(self.places, found.all(), strict=True))

    def resolve(self, reference: dict[str, Json]) -> torch.Tensor:
        """The tensor that an object of the metadata stands for; the same one each time."""
        name = reference["$tensor"]
        if not isinstance(name, str) or name not in self.tensors:
            raise ValueError(f"its metadata refers to the tensor {name!r}, which is not there")
        if len(reference) == 2 and "crc32" in reference:
            self.crcs[name] = reference["crc32"]
            return self.tensors[name]
        if name not in self.odd:
            try:
                attributes = {key: value for key, value in reference.items() if key != "$tensor"}
                self.odd[name] = self.restored(name, **attributes)
            except (TypeError, RuntimeError, OverflowError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(f"what its metadata says of {name!r} does not fit: {reason}") from error
            self.crcs[name] = reference["crc32"]
        return self.odd[name]

    def restored(
        self, name: str, *, crc32: str, strides: list[int] | None = None, requires_grad: bool = False
    ) -> torch.Tensor:
        """A tensor of the file, as it was when it was saved; `crc32` is not looked at."""
        tensor, place = self.tensors[name], self.places[name]
        if strides is not None and not check_strides(place.shape, strides):
            whole = Elements(self.file, place.offset, place.dtype, place.shape, row_major(place.shape), name)
            tensor = ChunkedTensor(place.shape, place.dtype, [([0] * len(place.shape), whole)], strides)
            if requires_grad or self.copies.admit(place.nbytes):
                tensor = tensor.whole()
        elif strides is not None:
            tensor = tensor.as_strided(place.shape, strides).data
        return tensor.requires_grad_() if requires_grad else tensor

    def verify(self) -> None:
        """Refuse data whose checksum is not the saved one."""
        ranges = [self.places[name][:2] for name in self.crcs]
        found = zip(self.crcs.items(), checksums(self.file.descriptor, ranges), strict=True)
        if damaged := [name for (name, crc), actual in found if crc != f"{actual:08x}"]:
            raise ValueError(f"the data of {some(damaged)} is damaged: the checksum is not the saved one")


def check_strides(shape: Sequence[int], strides: list[int]) -> bool:
    """Whether strides are another way to say that a tensor is in row-major order; raise if they are no dense one's."""
    if len(strides) != len(shape):
        raise TypeError(f"{len(strides)} strides for {len(shape)} dimensions")
    dims = [dim for dim, size in enumerate(shape) if size != 1]
    in_order = row_major(shape)
    if 0 in shape or all(strides[dim] == in_order[dim] for dim in dims):
        return True
    expected = 1
    for dim in sorted(dims, key=lambda dim: strides[dim]):
        if strides[dim] != expected:
            raise TypeError(f"the strides {strides} for the shape {shape}")
        expected *= shape[dim]
    return False
