"""Folders of torch.distributed.checkpoint, read and written by one process."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.serialization import safe_globals

from fastopt.chunked import ChunkedTensor, Part
from fastopt.collector import paused_collector
from fastopt.errors import CheckpointError, UnsafeGlobalsError
from fastopt.files import dcp_metadata
from fastopt.files.atomic_folder import replacing_folder
from fastopt.files.dcp_metadata import Chunk, Index, Place, TensorEntry
from fastopt.files.dcp_shards import Known, Shard
from fastopt.files.dcp_tree import check_reversible, leaves, tree
from fastopt.files.torch_file import SafeGlobal, check_alignment
from fastopt.files.torch_readable import check_readable


def read(path: str | os.PathLike[str], allowed: Iterable[SafeGlobal] = ()) -> Any:
    """What a folder holds, on the CPU, however many ranks wrote it; no code of its files runs.

    Tensors are not read yet: they lie in mappings of the files, and what is never looked at is never read. One that was
    saved in several chunks is a `ChunkedTensor`, and so is one at a byte that its dtype is not aligned to, which in
    torch's folders is most; small ones of these are copied, as `fastopt.files.in_file` has it. While tensors are in use
    the files must not be cut short: to look at one in a mapping would kill the process (SIGBUS). A load of the native
    backend, and any of a `ChunkedTensor`, reads the files instead. All other values are read, and in memory.

    Dicts have strings as keys, as torch.distributed.checkpoint saves no others; but the ids of an optimizer's state
    are what its groups say. Of a checkpoint that was saved without flattening it, the keys are those of its entries.

    Args:
        path: the folder.
        allowed: classes and functions that it may name besides those of `torch.load(weights_only=True)`.

    Raises:
        OSError: a file of it cannot be opened.
        UnsafeGlobalsError: it names classes or functions that are not allowed; the text lists them.
        CheckpointError: it is no such folder, or damaged; the text names file and entry.
    """
    folder, allowed = Path(path), list(allowed)
    with paused_collector():
        before = identity(folder)
        index = dcp_metadata.read(folder, allowed)
        with safe_globals(allowed):
            found = read_places(folder, index)
        if identity(folder) != before:
            raise CheckpointError(f"{folder} was replaced while it was being read")
        try:
            return tree((path, content_of(index, name, found)) for name, path in index.paths.items())
        except CheckpointError as error:
            raise CheckpointError(f"{folder / dcp_metadata.NAME} is damaged: {error}") from error


def identity(folder: Path) -> tuple[int, ...] | None:
    """What becomes another when a checkpoint is saved to the folder; every save replaces this file, as the last one."""
    try:
        status = (folder / dcp_metadata.NAME).stat()
    except OSError:
        return None  # an error that reading it finds as well
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


class Wanted(NamedTuple):
    """Something that a file holds, and what it is: a chunk of a tensor, or a value."""

    place: Place
    name: str
    dtype: torch.dtype | None = None
    sizes: tuple[int, ...] = ()
    is_part: bool = False
    """Whether it is one of several chunks."""


def wanted_by_file(index: Index) -> dict[str, list[Wanted]]:
    """What each file holds, in its order."""
    by_file: dict[str, list[Wanted]] = defaultdict(list)
    for name, entry in index.entries.items():
        if isinstance(entry, TensorEntry):
            for chunk in entry.chunks:
                wanted = Wanted(chunk.place, name, entry.dtype, chunk.sizes, len(entry.chunks) > 1)
                by_file[chunk.place.file].append(wanted)
        else:
            by_file[entry.place.file].append(Wanted(entry.place, name))
    for in_file in by_file.values():
        in_file.sort(key=lambda one: one.place)
    return by_file


def read_places(folder: Path, index: Index) -> dict[Place, Any]:
    """What is at each place, file by file and in their order.

    Raises:
        UnsafeGlobalsError: values name what is not allowed; the error is about all of them.
        CheckpointError: something is damaged.
    """
    known = Known()
    found: dict[Place, Any] = {}
    unsafe: dict[str, str] = {}
    for file, wanted in wanted_by_file(index).items():
        shard = opened(folder / file, wanted, known)
        tensors = []
        for place, name, dtype, sizes, is_part in wanted:
            if dtype is not None:
                shard.add_tensor(place, name, dtype, sizes, is_part)
                tensors.append(place)
                continue
            try:
                found[place] = shard.value(place, name)
            except UnsafeGlobalsError as error:
                for global_name in error.names:
                    unsafe.setdefault(global_name, error.where)
        try:
            found.update(zip(tensors, shard.tensors.all(), strict=True))
        except (OSError, ValueError) as error:  # all has been found in order: it is another file by now
            raise CheckpointError(f"{shard.path} has changed while it was being read: {error}") from error
    if unsafe:
        raise UnsafeGlobalsError(next(iter(unsafe.values())), sorted(unsafe))
    return found


def verify(path: str | os.PathLike[str], allowed: Iterable[SafeGlobal] = ()) -> None:
    """Hold all data of a folder against its checksums, which torch writes with every entry.

    Raises:
        OSError: a file of it cannot be opened.
        UnsafeGlobalsError: its metadata names classes or functions that are not allowed.
        CheckpointError: it is damaged; the text names file and entry.
    """
    folder = Path(path)
    for file, wanted in wanted_by_file(dcp_metadata.read(folder, allowed)).items():
        shard = opened(folder / file, wanted, Known())
        for one in wanted:
            shard.verify(one.place, one.name)


def opened(path: Path, wanted: Sequence[Wanted], known: Known) -> Shard:
    """A file that may hold these."""
    try:
        shard = Shard(path, known)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing, which holds entry {wanted[0].name!r} and maybe others") from error
    shard.check([(one.place, one.name) for one in wanted])
    return shard


def content_of(index: Index, name: str, found: dict[Place, Any]) -> Any:
    """The value or tensor that an entry is."""
    entry = index.entries[name]
    if not isinstance(entry, TensorEntry):
        return found[entry.place]
    if len(entry.chunks) == 1:
        return found[entry.chunks[0].place]
    return ChunkedTensor(entry.size, entry.dtype, [part for chunk in entry.chunks for part in parts(chunk, found)])


def parts(chunk: Chunk, found: dict[Place, Any]) -> Sequence[Part]:
    """The elements of a chunk, and where they begin."""
    tensor = found[chunk.place]
    if isinstance(tensor, ChunkedTensor):  # of one part, at a byte where nothing but bytes can be read
        return [(chunk.offsets, elements) for _, elements in tensor.parts]
    return [(chunk.offsets, tensor)]


def write(
    path: str | os.PathLike[str], content: Mapping[str, Any], dtypes: Mapping[int, torch.dtype] | None = None
) -> None:
    """Replace a folder by one that torch.distributed.checkpoint reads, in any number of processes.

    All of it is written beside `path`, is on the disk, and takes its place in one step; see `replacing_folder`. Only a
    folder that holds nothing but a checkpoint is replaced.

    Args:
        path: the folder.
        content: dicts, nested, with strings as keys, and an optimizer's ids. Tensors may be anywhere, on any device;
            beside tensors and dicts, lists are taken apart if they hold some, and all else is saved by `torch.save`.
        dtypes: the dtype that a tensor gets in the folder, by its `id`; all others keep theirs. Tensors named here are
            strided ones of no subclass that have values.

    Raises:
        OSError: it cannot be written, or holds other files.
        TypeError: a key would not come back as it is, or `torch.load(weights_only=True)` would not read a value.
        ValueError: two entries have one name (`{"a.b": …}` beside `{"a": {"b": …}}`), or a tensor is a part of one that
            several processes hold; or `check_alignment` has it.

    After any error it is as it was.
    """
    from fastopt.files import dcp_writer  # half a second, which is for those who save such a folder to wait

    check_alignment()
    if not isinstance(content, Mapping):
        raise TypeError(f"a folder of torch.distributed.checkpoint holds a dict, not a {type(content).__name__}")
    with paused_collector():
        entries = list(leaves(content))
        check_reversible(content, tree(entries))
        check_readable((path, as_saved(value)) for path, value in entries)
    with replacing_folder(path, is_own) as folder:
        dcp_writer.save(folder, entries, dtypes or {})


def as_saved(value: Any) -> Any:
    """What `torch.save` gets of an entry: of a tensor no attributes, and of a sharded one plain parts."""
    if not isinstance(value, torch.Tensor):
        return value
    return None if hasattr(value, "__create_write_items__") else value.detach()


def is_own(name: str) -> bool:
    """Whether a file is one of a checkpoint's, by its name; one that a save left unfinished is, as well."""
    return name.endswith((dcp_metadata.NAME, f"{dcp_metadata.NAME}.tmp", ".distcp"))
