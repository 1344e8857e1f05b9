"""What the native and the pure-Python backend both offer, and what they ask of the rules."""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Protocol

import torch

from fastopt.files.checksums import Checksum
from fastopt.files.staging import Entry

PlaceInFile = tuple[int, int, torch.dtype, Sequence[int], Sequence[int] | None, int, bool]
"""Where a tensor is in a file: (offset, bytes, dtype, size, strides, first, is copied).

The first two are those of its storage. No strides are those of row-major order. `first` is the element of the storage
that is its first. What is not copied lies in a mapping, and is aligned to its dtype.
"""

BoxInFile = tuple[int, int, torch.dtype, Sequence[int], torch.Tensor]
"""A box of elements in a file, and the tensor to fill with them: (descriptor, offset, dtype, steps, target).

The offset is the byte of the first element; the steps say how many elements the next one along each dimension is after
it. The target is a tensor of the box's sizes, detached, of any strides and dtype, on any device.
"""

Group = dict[str, Any]
State = defaultdict[Any, Any]

BETWEEN = 64
"""Files of `torch.save` within a file begin at multiples of so many bytes, as the tensors in them do."""


class Rules(Protocol):
    """How one value of a saved state becomes a value of the optimizer: `fastopt.casting.Cast`, seen from below."""

    memo: dict[int, Any] | None
    """The memo of `copy.deepcopy` where the optimizer must share nothing with the saved dict; None where it may."""

    audits: bool
    """Whether casts from one dtype to another are audited."""

    gives: bool
    """Whether what nobody else refers to may be lost when it has been cast."""

    reads_files: bool
    """Whether tensors that lie in a mapped file still hold what the file does, and may be read from there."""

    @property
    def rule_of(self) -> Callable[[Any, bool], tuple[Any, Any]] | None:
        """State key, whether the tensor's own key is `"step"` -> (dtype, device), as `fastopt.policy.Rule` has them.

        None where the reference's rules hold.
        """

    @property
    def hosted_on_device(self) -> Set[Any]:
        """Saved ids whose `step` belongs on the parameter's device, in float32."""

    def entry(self, param: torch.Tensor, value: Any, saved_id: Any, key: Any = None, state_key: Any = None) -> Any:
        """The value under `key`, within what a parameter's state has under `state_key`, or its whole state; errors name
        the parameter.
        """

    def unclaimed(self, saved_id: Any, value: Any) -> Any:
        """The state under an id that belongs to no parameter."""

    def keep(self, value: Any) -> Any:
        """A value, or a key, that needs no cast."""

    def count(self, casts: Sequence[tuple[torch.dtype, torch.dtype, int, int, int]], copied: int, shared: int) -> None:
        """Adds what a backend did without asking to the report.

        Args:
            casts: (from, to, tensors, bytes read, bytes written).
            copied: how many of those were copied without a cast.
            shared: tensors taken over as they are.
        """

    def count_audits(self, audits: Sequence[tuple[Any, torch.dtype, torch.dtype, *tuple[float, ...]]]) -> None:
        """Adds what a backend audited by itself: (state key, from, to, and the fields of `AuditCount`)."""


class Backend(Protocol):
    """The operations on many tensors at once. All results are the same whichever backend computes them."""

    name: str

    def index_state(
        self, param_lists: list[list[torch.Tensor]], state: Mapping[Any, Any]
    ) -> tuple[list[list[int]], dict[Any, Any]]:
        """Numbers the parameters over all groups, and keys the state by number."""

    def id_map(self, saved_lists: list[list[Any]], param_lists: list[list[torch.Tensor]]) -> dict[Any, torch.Tensor]:
        """Saved id -> parameter."""

    def cast_state(self, saved_state: Mapping[Any, Any], id_map: dict[Any, torch.Tensor], rules: Rules) -> State:
        """The optimizer's new state, by the rules."""

    def copy_(
        self,
        dsts: list[torch.Tensor],
        srcs: list[torch.Tensor],
        non_blocking: bool,
        begun: list[list[int]],
        reads_files: bool = False,
    ) -> None:
        """`dst.copy_(src)` for each pair, after all pairs have been checked.

        `reads_files`: whether sources that lie in a mapped file still hold what the file does, and may be read there.

        `begun` gets the indices of pairs that are copied together, before their first byte is written: after an error
        all in it are copied, but the last of these lists perhaps in part.
        """

    def to(self, tensors: list[torch.Tensor], options: dict[str, Any], copy: bool) -> list[torch.Tensor]:
        """`tensor.to(**options, copy=copy)` for each."""

    def write_torch_files(
        self, fd: int, contents: list[Any], dtypes: Mapping[int, torch.dtype], start: int = 0
    ) -> list[tuple[int, int]]:
        """What `torch.save` writes for each content, one after the other: `fastopt.files.torch_file.write` says more.

        Args:
            fd: an open file, which holds nothing from `start` on.
            contents: one for each of the files in it.
            dtypes: as in `fastopt.files.torch_file.write`.
            start: a multiple of `BETWEEN`.

        Returns:
            Where each is: its offset, a multiple of `BETWEEN`, and its bytes.
        """

    def write_small(self, fd: int, entries: list[Entry]) -> list[int | None]:
        """Write to a file what of the entries is small, where that is faster than `write_tensors`.

        Args:
            fd: a file that is open for writing.
            entries: (offset, tensor, final dtype) each, in the order of their offsets.

        Returns:
            The CRC-32 of what was written for each; None for those that are left to `write_tensors`.

        Raises:
            OSError: the file could not be written.
        """

    crc32: Checksum
    """As `zlib.crc32`."""

    def tensors_in_file(
        self, descriptor: int, path: str | os.PathLike[str], places: list[PlaceInFile]
    ) -> list[torch.Tensor]:
        """Tensors that lie in a private mapping of a file, or are copied out of it, each in a storage of its own.

        Args:
            descriptor: the file, open. It may be closed afterwards.
            path: its name.
            places: where they are.

        Raises:
            OSError: the file cannot be mapped or read, or ends before what is copied.
            ValueError: a tensor is not within its bytes, or these are not within the file.
        """

    def read_into(self, descriptor: int, offset: int, dtype: torch.dtype, target: torch.Tensor) -> None:
        """Fill a tensor with what stands in a file from an offset on, in row-major order, as this dtype.

        Raises:
            OSError: the file cannot be read, or ends before that.
        """

    def read_boxes(self, entries: list[BoxInFile]) -> None:
        """Fill tensors with boxes of what stands in files, cast to their dtypes; what lies between is not written.

        Args:
            entries: best in the order of their places in the files.

        Raises:
            OSError: a file cannot be read, or ends before that.
        """

    def new_tensors(self, specs: list[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
        """New contiguous tensors on the CPU, sizes and dtype each, that hold anything; the caller fills them."""

    def file_range(self, tensor: torch.Tensor) -> tuple[int, int, int, bytes] | None:
        """Where the storage of a tensor lies in a file that is read in place of the tensor's memory.

        Returns:
            The file's descriptor, the offset, the bytes, and the file's name; None where it lies in none.
        """

    def read_torch_file(self, path: str | os.PathLike[str]) -> tuple[Any] | None:
        """What a file of `torch.save` holds, as `torch.load(path, "cpu", weights_only=True, mmap=True)` gives it.

        In a tuple of one; None where the file is torch's to read or to refuse. Nothing has been done then.

        Raises:
            ValueError: a tensor is larger than its record in the file.
        """
