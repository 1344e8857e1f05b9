"""The native backend: the extension for what is plain, the Python backend's rules for the rest.

Importing this module raises ImportError where the extension does not load or does not fit the installed torch, and
ValueError where FASTOPT_CPU_TARGET names no instruction set of this machine.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch.utils.serialization import config

from fastopt import _C, dtensors
from fastopt.backends import python
from fastopt.backends.interface import BoxInFile, PlaceInFile, Rules, State
from fastopt.files.staging import Entry, write_tensors

name = "native"
crc32 = _C.crc32


def _check_build() -> None:
    built = _C.build_info()["torch"]
    if str(built).split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(f"the extension was built for torch {built}, and torch {torch.__version__} is installed")
    if target := os.environ.get("FASTOPT_CPU_TARGET"):
        _C.use_cpu_target(target)


_check_build()


def _is_exactly_a_dict(mapping: Mapping[Any, Any]) -> TypeGuard[dict[Any, Any]]:
    return type(mapping) in (dict, defaultdict)


def index_state(
    param_lists: list[list[torch.Tensor]], state: Mapping[Any, Any]
) -> tuple[list[list[int]], dict[Any, Any]]:
    if not _is_exactly_a_dict(state):
        return python.index_state(param_lists, state)
    return _C.index_state(param_lists, state)


def id_map(saved_lists: list[list[Any]], param_lists: list[list[torch.Tensor]]) -> dict[Any, torch.Tensor]:
    return _C.id_map(saved_lists, param_lists)


def cast_state(saved_state: Mapping[Any, Any], id_map: dict[Any, torch.Tensor], rules: Rules) -> State:
    if not _is_exactly_a_dict(saved_state):
        return python.cast_state(saved_state, id_map, rules)
    state: State = defaultdict(dict)
    walked = _C.cast_state(
        saved_state,
        id_map,
        rules.hosted_on_device or None,
        rules.rule_of,
        rules.memo,
        state,
        rules.audits,
        rules.gives,
        rules.reads_files,
        dtensors.for_native(),
    )
    if walked is None:  # too odd for the native walk: what it has begun is dropped
        if rules.memo is not None:
            rules.memo.clear()
        return python.cast_state(saved_state, id_map, rules)
    deferred, casts, copied, shared, audits = walked
    rules.count(casts, copied, shared)
    rules.count_audits(audits)
    for container, slot, param, value, saved_id, key, state_key in deferred:
        if param is None:
            container[slot] = rules.unclaimed(saved_id, value)
        else:
            container[slot] = rules.entry(param, value, saved_id, key, state_key)
    return state


def copy_(
    dsts: list[torch.Tensor],
    srcs: list[torch.Tensor],
    non_blocking: bool,
    begun: list[list[int]],
    reads_files: bool = False,
) -> None:
    given = dsts
    if dtensors.are_among(dsts):
        dsts, srcs = parts_of_pairs(dsts, srcs)

    def leave_to_torch(indices: list[int]) -> None:
        for index in indices:
            python.check_pair(index, dsts[index], srcs[index])
        for index in indices:
            begun.append([index])
            python.copy_entry(index, dsts[index], srcs[index], non_blocking)

    try:
        if not _C.copy_plain(dsts, srcs, non_blocking, reads_files, leave_to_torch, begun):
            python.copy_(dsts, srcs, non_blocking, begun)
    finally:
        if begun and dsts is not given:
            for dst, written in zip(given, dsts, strict=True):
                if written is not dst:
                    torch.autograd.graph.increment_version(dst)


def to(tensors: list[torch.Tensor], options: dict[str, Any], copy: bool) -> list[torch.Tensor]:
    results = _C.to_plain(tensors, options.get("dtype"), options.get("device"), copy)
    left = [index for index, result in enumerate(results) if result is None]
    in_parts = [index for index in left if is_part_enough(tensors[index], options)]
    parts = [dtensors.local(tensors[index]) for index in in_parts]
    spec_of = dtensors.Specs()
    for index, part, result in zip(in_parts, parts, _C.to_plain(parts, options.get("dtype"), None, copy), strict=True):
        if result is part:
            results[index] = tensors[index]
        elif result is not None:
            results[index] = dtensors.placed(result, spec_of(dtensors.spec(tensors[index]), result.dtype))
    for index in left:
        if results[index] is None:
            results[index] = python.to_entry(index, tensors[index], options, copy)
    return results


def is_part_enough(tensor: Any, options: dict[str, Any]) -> bool:
    """Whether a cast is one of the part of a DTensor that is here, which stays on its device."""
    return dtensors.is_seen_through(tensor) and options.get("device", tensor.device) == tensor.device


def parts_of_pairs(dsts: list[torch.Tensor], srcs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parts of DTensors, in place of pairs whose copy is one of the parts."""
    dsts, srcs = list(dsts), list(srcs)
    for index, (dst, src) in enumerate(zip(dsts, srcs, strict=True)):
        if not (dtensors.is_seen_through(dst) and dtensors.is_seen_through(src)):
            continue
        if dst.shape == src.shape and dtensors.placed_alike(dst, src):
            dsts[index], srcs[index] = dtensors.local(dst), dtensors.local(src)
    return dsts, srcs


def write_torch_files(
    fd: int, contents: list[Any], dtypes: Mapping[int, torch.dtype], start: int = 0
) -> list[tuple[int, int]]:
    write_large, dtypes = partial(write_tensors, fd, crc32=crc32), dict(dtypes)
    places: list[tuple[int, int]] = []
    while True:
        alignment = config.save.storage_alignment
        places += _C.write_torch_files(fd, contents, len(places), dtypes, start, alignment, write_large)
        if len(places) == len(contents):
            return places
        start = python.start_after(places, start)  # the next one is not plain
        places += python.write_torch_files(fd, contents[len(places) : len(places) + 1], dtypes, start)
        start = python.start_after(places, start)


def write_small(fd: int, entries: list[Entry]) -> list[int | None]:
    return _C.write_small(fd, entries)


def tensors_in_file(descriptor: int, path: str | os.PathLike[str], places: list[PlaceInFile]) -> list[torch.Tensor]:
    return _C.tensors_in_file(descriptor, os.fsencode(path), places)


def read_into(descriptor: int, offset: int, dtype: torch.dtype, target: torch.Tensor) -> None:
    if not _C.read_into(descriptor, offset, dtype, target):
        python.read_into(descriptor, offset, dtype, target)


def read_boxes(entries: list[BoxInFile]) -> None:
    python.read_boxes([entries[index] for index in _C.read_boxes(entries)])


def new_tensors(specs: list[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
    return _C.new_tensors(specs)


def file_range(tensor: torch.Tensor) -> tuple[int, int, int, bytes] | None:
    return _C.file_range(tensor)


def read_torch_file(path: str | os.PathLike[str]) -> tuple[Any] | None:
    return _C.read_torch_file(os.fsencode(path))
