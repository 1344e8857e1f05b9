from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch

def index_state(
    param_lists: list[list[torch.Tensor]], state: dict[Any, Any]
) -> tuple[list[list[int]], dict[Any, Any]]: ...
def id_map(saved_lists: list[list[Any]], param_lists: list[list[torch.Tensor]]) -> dict[Any, torch.Tensor]: ...
def cast_state(
    saved_state: dict[Any, Any],
    id_map: dict[Any, torch.Tensor],
    hosted_on_device: Set[Any] | None,
    rule_of: Callable[[Any, bool], tuple[Any, Any]] | None,
    memo: dict[int, Any] | None,
    state: defaultdict[Any, Any],
    audits: bool,
    gives: bool,
    reads_files: bool,
    dtensors: tuple[Any, ...] | None,
) -> (
    tuple[
        list[tuple[Any, Any, torch.Tensor | None, Any, Any, Any, Any]],
        list[tuple[torch.dtype, torch.dtype, int, int, int]],
        int,
        int,
        list[tuple[Any, torch.dtype, torch.dtype, int, int, int, int, int, int, float]],
    ]
    | None
): ...
def copy_plain(
    dsts: list[torch.Tensor],
    srcs: list[torch.Tensor],
    non_blocking: bool,
    reads_files: bool,
    leave: Callable[[list[int]], None],
    begun: list[list[int]],
) -> bool: ...
def to_plain(
    tensors: list[torch.Tensor], dtype: torch.dtype | None, device: torch.device | None, copy: bool
) -> list[Any]: ...
def write_torch_files(
    file: int,
    contents: list[Any],
    first: int,
    dtypes: dict[int, torch.dtype],
    start: int,
    alignment: int,
    write_tensors: Callable[[list[tuple[int, torch.Tensor, torch.dtype]]], list[int]],
) -> list[tuple[int, int]]: ...
def crc32(data: Any, before: int = 0) -> int: ...
def write_small(file: int, entries: list[tuple[int, torch.Tensor, torch.dtype]]) -> list[int | None]: ...
def read_torch_file(path: bytes) -> tuple[Any] | None: ...
def tensors_in_file(
    descriptor: int,
    path: bytes,
    places: list[tuple[int, int, torch.dtype, Sequence[int], Sequence[int] | None, int, bool]],
) -> list[torch.Tensor]: ...
def read_into(descriptor: int, offset: int, dtype: torch.dtype, target: torch.Tensor) -> bool: ...
def read_boxes(entries: list[tuple[int, int, torch.dtype, Sequence[int], torch.Tensor]]) -> list[int]: ...
def new_tensors(specs: list[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]: ...
def file_range(tensor: torch.Tensor) -> tuple[int, int, int, bytes] | None: ...
def cast_buffer(src: Any, src_dtype: str, dst: Any, dst_dtype: str, streaming: bool) -> None: ...
def cpu_targets() -> list[str]: ...
def cpu_target() -> str: ...
def use_cpu_target(name: str) -> None: ...
def build_info() -> dict[str, str | None]: ...
