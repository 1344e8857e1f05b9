"""The `.metadata` of a torch.distributed.checkpoint folder: what it holds and where, read without running its code."""

import io
import math
import os
import pickle
import pickletools
import re
import reprlib
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from fastopt.errors import CheckpointError, UnsafeGlobalsError
from fastopt.files.torch_file import SafeGlobal

NAME = ".metadata"

DEEPEST = 100
"""Levels of containers in a checkpoint."""

CHECKPOINT, FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
METADATA = f"{CHECKPOINT}.Metadata"
INDEX = f"{CHECKPOINT}.MetadataIndex"
TENSOR = f"{CHECKPOINT}.TensorStorageMetadata"
CHUNK = f"{CHECKPOINT}.ChunkStorageMetadata"
VALUE = f"{CHECKPOINT}.BytesStorageMetadata"
INFO = f"{FILESYSTEM}._StorageInfo"
RECORDS = (METADATA, INDEX, TENSOR, CHUNK, VALUE, f"{CHECKPOINT}.StorageMeta", INFO)
"""Classes of torch's that are pickled as their fields."""
PROPERTIES = f"{CHECKPOINT}.TensorProperties"
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")

WHERE = "entry {!r}"
WHERE_PLACE = "the place of entry {!r}"
"""How errors name an entry."""

KeyPath = tuple[str | int, ...]
"""Where in the content an entry stands: keys of dicts and indices of lists."""


class Place(NamedTuple):
    """Where the bytes of something are."""

    file: str
    """Relative to the folder."""
    offset: int
    length: int


class Chunk(NamedTuple):
    """A part of a tensor: a box of its elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


class TensorEntry(NamedTuple):
    """A tensor; its chunks, in the order of their offsets, cover each of its elements once."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: list[Chunk]


class ValueEntry(NamedTuple):
    """Anything else."""

    place: Place


class Index(NamedTuple):
    """What a folder holds."""

    entries: dict[str, TensorEntry | ValueEntry]
    paths: dict[str, KeyPath]
    """Of all entries, in the order in which they were saved."""


def read(folder: Path, allowed: Iterable[SafeGlobal] = ()) -> Index:
    """What a folder holds; everything in it fits together.

    Args:
        folder: the folder.
        allowed: classes and functions that the file may name besides those of torch.distributed.checkpoint.

    Raises:
        OSError: the file cannot be opened.
        UnsafeGlobalsError: it names classes or functions that are not allowed; the text lists them.
        CheckpointError: it is damaged, or not of this kind; the text names the entry.
    """
    path = folder / NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no checkpoint: {what_is_there(folder)}") from error
    unpickler = Unpickler(content, allowed)
    try:
        check_operations(content)
        metadata = unpickler.load()
    except Exception as error:  # pickle has many for what it cannot read
        if not unpickler.forbidden:
            raise CheckpointError(f"{path} is damaged: {error or type(error).__name__}") from error
    if unpickler.forbidden:
        raise UnsafeGlobalsError(str(path), sorted(unpickler.forbidden))
    return indexed(Reader(path, unpickler.records), metadata)


def what_is_there(folder: Path) -> str:
    """Why a folder has no `.metadata`, as far as its files say."""
    names = os.listdir(folder)
    if not names:
        return "it is empty"
    if any(name.endswith(NAME) for name in names):
        return f"each rank wrote a {NAME} of its own (use_collectives=False), which only torch.distributed reads"
    return f"it has no {NAME}, which a save that was interrupted lacks as well"


# ---- unpickling ----


class Unpickler(pickle.Unpickler):
    """Unpickles nothing but plain values and stand-ins for torch's records, which hold their fields.

    Note [Stand-ins]: a pickle can call what it is given, and set attributes of it: of an instance, but of a class or a
    function as well, for the whole process. So it is never given one of torch's own. All that it gets is made for it
    alone, and does nothing; what is read from its attributes is checked like any other data.
    """

    def __init__(self, content: bytes, allowed: Iterable[SafeGlobal]) -> None:
        super().__init__(io.BytesIO(content))
        self.records: dict[str, type] = {name: type(name, (), {}) for name in RECORDS}
        self.records[PROPERTIES] = stand_in(PROPERTIES)  # these are pickled as a tuple
        self.known: dict[str, Any] = {
            **self.records,
            "torch.Size": lambda items=(): tuple(items),
            "torch.serialization._get_layout": lambda name: name,
            f"{CHECKPOINT}._MEM_FORMAT_ENCODING": lambda value: value,
            "builtins.getattr": lambda owner, name: name,  # how some Pythons pickle the enum above
            # Where the checkpoint was saved, which nobody asks for.
            **{f"{module}.{name}": lambda *parts: parts for module in ("pathlib", "pathlib._local") for name in PATHS},
            **{str(dtype): dtype for dtype in DTYPES},
        }
        self.allowed = dict(map(named, allowed))
        self.forbidden: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle gets for a name: a stand-in, a dtype, or what the user allows."""
        full_name = f"{module}.{name}"
        if full_name in self.known:
            return self.known[full_name]
        if full_name in self.allowed:
            return self.allowed[full_name]
        self.forbidden.add(full_name)
        return stand_in(full_name)  # to go on, and find all of them


def check_operations(content: bytes) -> None:
    """Raise if a pickle asks for more memory than its size warrants, or for what the unpickler gives without asking.

    The unpickler makes room for as many objects as an index says (opcodes PUT, LONG_BINPUT), and touches it: up to 64
    GiB for one flipped bit. An index that is honest is less than the number of opcodes, and so less than their bytes.

    What the process has registered under a number (copyreg.add_extension), and has used once, the unpickler takes from
    a table of the process and hands out past `find_class`: a function, which the pickle can call.

    Raises:
        ValueError: an index or a length is too large, the pickle ends within an opcode, or names something by a number.
    """
    position, end = 0, len(content)
    while (position := FIXED_EXTENTS.match(content, position).end()) < end:  # type: ignore[union-attr]
        code = content[position : position + 1]
        position += 1
        if code == b".":
            return
        if code in EXTENSIONS:
            raise ValueError("it names something by a number of the process's")
        extent = OPCODES[code].n if code in OPCODES else 0
        if code in b"pr":
            check_index(content[position:], code, end)
        if extent == pickletools.UP_TO_NEWLINE:
            for _ in range(2 if code in b"ci" else 1):
                position = content.index(b"\n", position) + 1
        elif extent >= 0:
            position += extent
        else:
            width = LENGTHS[extent]
            position += width + int.from_bytes(content[position : position + width], "little")
    raise ValueError("it is cut short")


def check_index(content: bytes, code: bytes, end: int) -> None:
    """Raise if an index, a line or four bytes, is larger than it can be."""
    index = int(content[: content.index(b"\n")]) if code == b"p" else int.from_bytes(content[:4], "little")
    if not index < end:
        raise ValueError(f"it numbers an object {index}, in {end} bytes")


OPCODES = {opcode.code.encode("latin-1"): opcode.arg for opcode in pickletools.opcodes if opcode.arg}
"""Those that have an argument; its size `n` is negative where the argument itself says how large it is."""
LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
"""Bytes of the number that says how many there are."""


EXTENSIONS = (b"\x82", b"\x83", b"\x84")
"""The opcodes that name something by a number of the process's: EXT1, EXT2, EXT4."""


def fixed_extents() -> re.Pattern[bytes]:
    """All opcodes in a row whose size is no question, and short texts: with these, a pickle is scanned in no time."""
    sizes: dict[int, bytes] = defaultdict(bytes)
    for opcode in pickletools.opcodes:
        size = opcode.arg.n if opcode.arg else 0
        if size >= 0 and opcode.code not in ".r" and opcode.code.encode("latin-1") not in EXTENSIONS:
            sizes[size] += re.escape(opcode.code.encode("latin-1"))
    ways = [b"[%s].{%d}" % (codes, size) for size, codes in sorted(sizes.items())]
    texts = b"|".join(b"%s.{%d}" % (re.escape(bytes([length])), length) for length in range(256))
    return re.compile(b"(?:%s|\x8c(?:%s))*+" % (b"|".join(ways), texts), re.DOTALL)


FIXED_EXTENTS = fixed_extents()

DTYPES = tuple(value for value in vars(torch).values() if isinstance(value, torch.dtype))


def stand_in(name: str) -> type:
    """A class that takes whatever a pickle gives its instances, and keeps their state."""

    def set_state(self: Any, state: Any) -> None:
        self.__dict__["state"] = state

    return type(name, (), {"__new__": lambda cls, *_: object.__new__(cls), "__setstate__": set_state})


def named(allowed: SafeGlobal) -> tuple[str, Any]:
    """What a user allows, under the name that a pickle has for it."""
    if isinstance(allowed, tuple):
        return allowed[1], allowed[0]
    return f"{allowed.__module__}.{allowed.__qualname__}", allowed


# ---- what was unpickled ----


def shown(value: Any) -> str:
    """A value that may be anything, and of any size, as an error shows it."""
    try:
        return reprlib.repr(value)
    except Exception:
        return f"a {type(value).__name__}"


class Reader:
    """Checks of values that may be anything, with errors that say where.

    `where` is text with a `{!r}` for `name`, which is put in where there is an error alone.
    """

    def __init__(self, path: Path, records: Mapping[str, type]) -> None:
        self.path = path
        self.records = records

    def wrong(self, what: str) -> CheckpointError:
        """The error for something that is not as it must be."""
        return CheckpointError(f"{self.path} is damaged: {what}")

    def fields(self, value: Any, record: str, where: str, name: str = "") -> Mapping[str, Any]:
        """The fields of a record."""
        if type(value) is not self.records[record]:
            raise self.wrong(f"{where.format(name)} is no {record.rpartition('.')[2]}")
        return vars(value)

    def is_record(self, value: Any, record: str) -> bool:
        """Whether it is a record of this class."""
        return type(value) is self.records[record]

    def of_type(self, value: Any, kind: type, where: str, name: str = "") -> Any:
        """The value, if it is of the type."""
        if type(value) is not kind:
            raise self.wrong(f"{where.format(name)} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def counts(self, value: Any, where: str, name: str = "") -> tuple[int, ...]:
        """A tuple of numbers from zero up, as sizes are."""
        if not isinstance(value, tuple):
            raise self.wrong(f"{where.format(name)} are {shown(value)}, not sizes")
        for item in value:
            if not is_count(item):
                raise self.wrong(f"{where.format(name)} are {shown(value)}, not sizes")
        return value


def is_count(value: Any) -> TypeGuard[int]:
    """Whether it is a number from zero up that fits into 64 bits."""
    return type(value) is int and 0 <= value < 2**63


def indexed(reader: Reader, metadata: Any) -> Index:
    """What the metadata says, checked."""
    fields = reader.fields(metadata, METADATA, "its content")
    places = dict(stored(reader, reader.of_type(fields.get("storage_data"), dict, "storage_data")))
    entries: dict[str, TensorEntry | ValueEntry] = {}
    for name, entry in reader.of_type(fields.get("state_dict_metadata"), dict, "state_dict_metadata").items():
        reader.of_type(name, str, "the name of an entry")
        if reader.is_record(entry, TENSOR):
            entries[name] = tensor_entry(reader, name, entry, places)
        elif reader.is_record(entry, VALUE):
            entries[name] = ValueEntry(place_of(reader, name, None, places))
        else:
            raise reader.wrong(f"entry {name!r} is a {type(entry).__name__}, neither a tensor nor a value")
    return Index(entries, dict(key_paths(reader, fields.get("planner_data"), entries)))


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a chunk begins in each dimension, and how long it is."""

Places = dict[tuple[str, tuple[int, ...] | None], Place]


def stored(
    reader: Reader, storage_data: Mapping[Any, Any]
) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], Place]]:
    """Where each chunk is, by the entry's name and the chunk's offsets, and each value, by its name and None."""
    files: set[str] = set()
    for index, info in storage_data.items():
        fields = reader.fields(index, INDEX, "a key of storage_data")
        name = reader.of_type(fields.get("fqn"), str, "the name of an entry")
        offsets = fields.get("offset")
        found = reader.fields(info, INFO, WHERE_PLACE, name)
        file = reader.of_type(found.get("relative_path"), str, WHERE_PLACE, name)
        if file not in files and not is_within(file):
            raise reader.wrong(f"{WHERE_PLACE.format(name)} is the file {file!r}, which is not in the folder")
        files.add(file)
        if found.get("transform_descriptors"):
            raise CheckpointError(
                f"{reader.path}: entry {name!r} was saved through extensions ({shown(found['transform_descriptors'])}),"
                " which fastopt does not read"
            )
        offset, length = found.get("offset"), found.get("length")
        if not (is_count(offset) and is_count(length)):
            raise reader.wrong(f"{WHERE_PLACE.format(name)} are {shown((offset, length))}, not sizes")
        key = (name, None if offsets is None else reader.counts(offsets, WHERE_PLACE, name))
        yield key, Place(file, offset, length)


def is_within(file: str) -> bool:
    """Whether a relative path stays in its folder."""
    return bool(file) and not os.path.isabs(file) and "\0" not in file and ".." not in Path(file).parts


def place_of(reader: Reader, name: str, offsets: tuple[int, ...] | None, places: Places) -> Place:
    """Where a chunk or value is."""
    try:
        return places[name, offsets]
    except KeyError:
        part = f"the chunk at {list(offsets)} of " if offsets else ""
        raise reader.wrong(f"it does not say where {part}entry {name!r} is") from None


def tensor_entry(reader: Reader, name: str, entry: Any, places: Places) -> TensorEntry:
    """A tensor, whose chunks are known to cover it."""
    fields = reader.fields(entry, TENSOR, WHERE, name)
    size = reader.counts(fields.get("size"), "the sizes of entry {!r}", name)
    boxes: list[Box] = []
    for chunk in reader.of_type(fields.get("chunks"), list, "the chunks of entry {!r}", name):
        of_chunk = reader.fields(chunk, CHUNK, "a chunk of entry {!r}", name)
        offsets = reader.counts(of_chunk.get("offsets"), "the offsets of a chunk of entry {!r}", name)
        sizes = reader.counts(of_chunk.get("sizes"), "the sizes of a chunk of entry {!r}", name)
        if not boxes or math.prod(sizes) > 0:  # else a rank whose part is empty
            boxes.append((offsets, sizes))
    if len(boxes) != 1 or boxes[0][1] != size or len(boxes[0][0]) != len(size) or any(boxes[0][0]):
        check_cover(reader, WHERE.format(name), size, boxes)
    chunks = sorted(Chunk(offsets, sizes, place_of(reader, name, offsets, places)) for offsets, sizes in boxes)
    return TensorEntry(dtype_of(reader, name, fields.get("properties")), size, chunks)


def dtype_of(reader: Reader, name: str, properties: Any) -> torch.dtype:
    """The dtype of a tensor, the first of its properties."""
    state = reader.fields(properties, PROPERTIES, "what entry {!r} has as properties", name).get("state")
    if not isinstance(state, tuple) or not state or not isinstance(state[0], torch.dtype):
        raise reader.wrong(f"the properties of entry {name!r} have no dtype")
    return state[0]


def check_cover(reader: Reader, where: str, size: tuple[int, ...], boxes: Sequence[Box]) -> None:
    """Raise unless the boxes cover each element of a tensor once: they lie in it, do not overlap, and are as large."""
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(size):
            raise reader.wrong(f"a chunk of {where} has other dimensions than its sizes {list(size)}")
        if any(offset + extent > end for offset, extent, end in zip(offsets, sizes, size, strict=True)):
            raise reader.wrong(f"the chunk at {list(offsets)} of {where}, {list(sizes)}, is not within {list(size)}")
    if len(boxes) > 1 and (pair := overlap(size, boxes)):
        raise reader.wrong(f"the chunks at {list(pair[0][0])} and {list(pair[1][0])} of {where} overlap")
    covered = sum(math.prod(sizes) for _, sizes in boxes)
    if covered != math.prod(size) or not boxes:
        raise reader.wrong(f"the chunks of {where} hold {covered} of its {math.prod(size)} elements")


def overlap(size: tuple[int, ...], boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that overlap, if any do: a sweep over the dimension that is cut into the most parts."""
    dimension = max(range(len(size)), key=lambda d: len({offsets[d] for offsets, _ in boxes}), default=None)
    if dimension is None:  # numbers without dimensions
        return boxes[0], boxes[1]
    active: list[tuple[int, int]] = []  # where boxes that were begun end, and which they are
    for index in sorted(range(len(boxes)), key=lambda i: boxes[i][0][dimension]):
        begin, extent = boxes[index][0][dimension], boxes[index][1][dimension]
        del active[: bisect_right(active, (begin, len(boxes)))]
        for _, other in active:
            if meet(boxes[index], boxes[other]):
                return boxes[other], boxes[index]
        insort(active, (begin + extent, index))
    return None


def meet(one: Box, other: Box) -> bool:
    """Whether two boxes have an element in common."""
    return all(a < b + n and b < a + m for a, m, b, n in zip(*one, *other, strict=True))


def key_paths(reader: Reader, planner_data: Any, names: Iterable[str]) -> Iterator[tuple[str, KeyPath]]:
    """The path of each entry, in the order in which they were saved; its name where no path was saved.

    Several ranks write the entries in an order of their own; the paths have that of the state dict.
    """
    paths = {} if planner_data is None else reader.of_type(planner_data, dict, "planner_data")
    left = dict.fromkeys(names)
    for name, path in paths.items():
        if name in left:
            del left[name]
            is_path = isinstance(path, tuple) and path and all(type(key) in (str, int) for key in path)
            if not is_path or len(path) > DEEPEST or type(path[0]) is not str:
                raise reader.wrong(f"the path of entry {name!r} is {shown(path)}")
            yield name, path
    for name in left:
        yield name, (name,)
