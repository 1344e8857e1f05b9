"""Files of the safetensors library, with all of a state that is no tensor in their metadata.

docs/formats.md says what is in such a file. The library reads them; what is written here is its header, as no version
of the library writes tensor after tensor.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch

from fastopt.collector import paused_collector
from fastopt.errors import CheckpointError
from fastopt.files import metadata
from fastopt.files.atomic import replacing
from fastopt.files.checksums import checksums
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
        if (strides := dense_strides(tensor)) != row_major_strides(tensor.shape):
            named.reference["strides"] = list(strides)
        return named.reference

    def name(self, path: Path) -> str:
        """The keys with dots between them, and a number after it where another tensor has that name."""
        name = readable = ".".join(map(str, path)).encode("utf-8", "backslashreplace").decode()
        number = 2
        while name in self.taken:
            name, number = f"{readable}~{number}", number + 1
        self.taken.add(name)
        return name


def check(tensor: torch.Tensor, dtype: torch.dtype, path: Path) -> None:
    """Refuse what cannot be written as this dtype, before anything is."""
    where = place(path)
    if type(tensor) is not torch.Tensor:
        raise TypeError(f"{where} is a {type(tensor).__name__}; a safetensors file holds plain tensors alone")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{where} is a {kind} tensor; a safetensors file holds strided ones alone")
    if dtype not in DTYPES:
        raise TypeError(f"{where} is to be saved as {dtype}, which safetensors does not have; a .pt file can hold it")
    if tensor.is_meta:
        raise ValueError(f"{where} is on the meta device and has no values")
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.dtype.itemsize if tensor.numel() else 0
    if (there := tensor.untyped_storage().nbytes()) < needed:
        raise ValueError(f"{where} needs {needed:,} bytes of memory and has {there:,}: its storage has been released")


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a copy: those of the tensor, with any gaps and overlaps closed."""
    if tensor.is_contiguous() and not {0, 1} & set(tensor.shape):
        return row_major_strides(tensor.shape)
    return torch.empty_like(tensor, device="meta").stride()


def row_major_strides(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a new tensor."""
    strides, stride = [0] * len(shape), 1
    for dim in range(len(shape) - 1, -1, -1):
        strides[dim] = stride
        stride *= max(shape[dim], 1)
    return tuple(strides)


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
    name = ""

    def entries() -> Iterator[Entry]:
        nonlocal name
        position = start
        for tensor in tensors:
            name = tensor.name
            yield position, tensor.tensor, tensor.dtype
            position += tensor.size

    try:
        crcs = write_tensors(fd, entries())
    except RuntimeError as error:
        error.add_note(f"while writing {name!r}")
        raise
    for tensor, crc in zip(tensors, crcs, strict=True):
        tensor.reference["crc32"] = f"{crc:08x}"


def read(path: str | os.PathLike[str], verify: bool = False) -> Any:
    """What a file holds that `write` wrote, on the CPU.

    The tensors are not read yet: they lie in a private mapping of the file, in row-major order. Only those that had
    another order of dimensions in memory are brought into it, and so read. While tensors are in use the file must not
    be cut short, which would kill the process (SIGBUS).

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
            about, tensors = open_tensors(path)
            refuse_duplicates(path, len(tensors))
            found = _Tensors(tensors)
            content = metadata.decode(content_of(about, tensors), found.resolve)
        if unused := sorted(tensors.keys() - found.resolved.keys()):
            raise ValueError(f"its metadata does not say where {some(unused)} belong")
        if verify:
            found.verify()
    except ValueError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error
    return content


def open_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata and the tensors of a file, which are not read yet."""
    library, name, tensors = safetensors(), None, {}
    try:
        with library.safe_open(os.fsdecode(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, as it is no mapping
                tensors[name] = file.get_tensor(name).data  # the library's are views, which are no plain tensors
            return file.metadata() or {}, tensors
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]  # torch adds the frames of its C++
        where = "" if name is None else f", tensor {name!r}"
        raise ValueError(f"no valid safetensors file{where}: {reason}") from error


def refuse_duplicates(path: str | os.PathLike[str], count: int) -> None:
    """Refuse a header in which a name stands twice; of two tensors at one place the library takes the last.

    Args:
        path: a file that the library could open.
        count: its tensors.
    """
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
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


def content_of(about: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
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


class _Tensors:
    """The tensors of a file, and what its metadata says of them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.resolved: dict[str, torch.Tensor] = {}
        self.crcs: dict[str, str] = {}

    def resolve(self, reference: dict[str, Json]) -> torch.Tensor:
        """The tensor that an object of the metadata stands for; the same one each time."""
        name = reference["$tensor"]
        if not isinstance(name, str) or name not in self.tensors:
            raise ValueError(f"its metadata refers to the tensor {name!r}, which is not there")
        if name not in self.resolved:
            try:
                attributes = {key: value for key, value in reference.items() if key != "$tensor"}
                self.resolved[name] = restored(self.tensors[name], **attributes)
            except (TypeError, RuntimeError, OverflowError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(f"what its metadata says of {name!r} does not fit: {reason}") from error
            self.crcs[name] = reference["crc32"]
        return self.resolved[name]

    def verify(self) -> None:
        """Refuse data whose checksum is not the saved one."""
        tensors = [self.tensors[name] for name in self.crcs]
        found = zip(self.crcs.items(), checksums(tensors), strict=True)
        if damaged := [name for (name, crc), actual in found if crc != f"{actual:08x}"]:
            raise ValueError(f"the data of {some(damaged)} is damaged: the checksum is not the saved one")


def restored(
    tensor: torch.Tensor, *, crc32: str, strides: list[int] | None = None, requires_grad: bool = False
) -> torch.Tensor:
    """A tensor of the file, as it was when it was saved; `crc32` is not looked at."""
    if tensor.data_ptr() % tensor.element_size():
        tensor = tensor.clone()  # others than `write` may leave them unaligned
    if strides is not None:
        tensor = with_strides(tensor, strides)
    return tensor.requires_grad_() if requires_grad else tensor


def with_strides(tensor: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """The same values in another order of dimensions: a view where that is none."""
    if len(strides) != tensor.dim():
        raise TypeError(f"{len(strides)} strides for {tensor.dim()} dimensions")
    dims = [dim for dim, size in enumerate(tensor.shape) if size != 1]
    if tensor.numel() == 0 or all(strides[dim] == tensor.stride(dim) for dim in dims):
        return tensor.as_strided(tensor.shape, strides)
    expected = 1
    for dim in sorted(dims, key=lambda dim: strides[dim]):
        if strides[dim] != expected:
            raise TypeError(f"the strides {strides} for the shape {list(tensor.shape)}")
        expected *= tensor.shape[dim]
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
