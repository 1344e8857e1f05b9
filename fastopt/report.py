"""What a load or a save did, for people and for programs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fastopt.audit import AuditCount
from fastopt.text import SHOWN, counted, dtype_name, duration, listed, size, some

ENOUGH_FOR_A_RATE = 1_000_000
"""Bytes moved from which a rate is printed; with fewer, a load's time is not that of its bytes."""

DIVISORS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "row_var", "col_var", "variance", "exp_inf")
"""State keys of second moments, by the root of which steps are divided, in torch's optimizers."""

SHARED = "shared {:,} with the dict that was loaded"
LEFT = "left {:,} as they were"
TAKEN_OVER = "took over {:,} as they were"


@dataclass
class CastCount:
    """Tensors taken from one dtype to another."""

    tensors: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass
class LoadReport:
    """What `load_state_dict` did. Prints as a few lines."""

    backend: str
    """`"native"` or `"python"`."""
    seconds: float = 0.0
    """Wall time, hooks and the optimizer's own `__setstate__` included."""
    casts: dict[tuple[torch.dtype, torch.dtype], CastCount] = field(default_factory=dict)
    """Tensors that were written anew, by saved and final dtype; equal ones where they were copied or moved."""
    copied: int = 0
    """Tensors that needed no cast and were copied, as `copy=True` asks."""
    shared: int = 0
    """Tensors that needed no cast and stay the objects that they are: of the dict, as `copy=False` allows and
    `donate=True` asks, or of the optimizer itself."""
    filled: int = 0
    """Tensors of the optimizer's own that were filled, as `inplace=True` asks; those of hyperparameters included."""
    missing: list[int] = field(default_factory=list)
    """Indices of the optimizer's parameters for which the dict holds no state."""
    unexpected: list[Any] = field(default_factory=list)
    """Keys of the saved state that belong to no parameter; they are kept, as torch keeps them."""
    renamed: list[tuple[int, str, str]] = field(default_factory=list)
    """Index, name and saved name of each parameter that was saved under another name: a load goes by place."""
    unused_patterns: list[str] = field(default_factory=list)
    """Keys and patterns of `policy` and `device` that fitted no key of the state."""
    replaced: list[tuple[Any, str]] = field(default_factory=list)
    """Saved id and place of each tensor that `inplace="auto"` could not fill, and put a new one there; of tensors among
    the hyperparameters None and the place."""
    audit: dict[tuple[Any, torch.dtype, torch.dtype], AuditCount] | None = None
    """What casts did to values, as `audit=True` asks: by state key, saved and final dtype."""
    unaudited: int = 0
    """Tensors that `audit=True` could not look at: complex, sparse, on the meta device, of classes of their own."""
    emptied: int = 0
    """Tensors whose values are gone, as they went to the meta device."""
    done: str = field(default="loaded", repr=False)
    """How it prints what was done: `"recast"` in `to_device` and `cast_state`, `"copied"` in `snapshot`."""
    fate: str = field(default=SHARED, repr=False)
    """How it prints what is `shared`."""
    options: str = field(default="policy or device", repr=False)
    """How it prints where `unused_patterns` were given."""

    @property
    def tensors(self) -> int:
        """Tensors loaded, shared ones included."""
        return self.shared + sum(count.tensors for count in self.casts.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read."""
        return sum(count.bytes_read for count in self.casts.values())

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor data written."""
        return sum(count.bytes_written for count in self.casts.values())

    def add(self, source: torch.dtype, target: torch.dtype, tensors: int, read: int, written: int) -> None:
        """Counts tensors that were written anew."""
        count = self.casts.setdefault((source, target), CastCount())
        count.tensors += tensors
        count.bytes_read += read
        count.bytes_written += written

    def add_audit(self, state_key: Any, source: torch.dtype, target: torch.dtype, seen: AuditCount | None) -> None:
        """Counts values that were cast; None: a tensor that could not be looked at."""
        if seen is None:
            self.unaudited += 1
        elif self.audit is not None:
            self.audit.setdefault((state_key, source, target), AuditCount()).add(seen)

    def __str__(self) -> str:
        moved = self.bytes_read + self.bytes_written
        rate = f", {size(moved / self.seconds)}/s" if moved >= ENOUGH_FOR_A_RATE and self.seconds else ""
        lines = [
            f"{self.done} {counted(self.tensors, 'tensor')} in {duration(self.seconds)} ({self.backend}): "
            f"read {size(self.bytes_read)}, wrote {size(self.bytes_written)}{rate}"
        ]
        for (source, target), count in self.casts.items():
            if source != target:
                lines.append(f"  cast {count.tensors:,} from {dtype_name(source)} to {dtype_name(target)}")
        if self.copied:
            lines.append(f"  copied {self.copied:,} unchanged")
        if self.shared:
            lines.append("  " + self.fate.format(self.shared))
        if self.filled:
            lines.append(f"  filled {self.filled:,} in place")
        if self.replaced:
            places = [
                f"{place} of id {saved_id!r}" if place.startswith("state") else place
                for saved_id, place in self.replaced[:SHOWN]
            ]
            lines.append(
                f"  replaced {len(self.replaced):,}, which had nothing to fill: {listed(places, len(self.replaced))}"
            )
        if self.missing:
            indices = "index" if len(self.missing) == 1 else "indices"
            lines.append(f"  no state for {counted(len(self.missing), 'parameter')}: {indices} {some(self.missing)}")
        if self.renamed:
            names = [f"{index} {own!r} was {saved!r}" for index, own, saved in self.renamed[:SHOWN]]
            lines.append(
                f"  loaded by place, {counted(len(self.renamed), 'parameter')} of other names: "
                f"{listed(names, len(self.renamed))}"
            )
        if self.unexpected:
            lines.append(f"  state of no parameter, kept: {some(self.unexpected)}")
        if self.unused_patterns:
            lines.append(f"  no key of the state fits {some(self.unused_patterns)}, given in {self.options}")
        if self.emptied:
            lines.append(f"  values lost to the meta device: {counted(self.emptied, 'tensor')}")
        for (state_key, source, target), seen in (self.audit or {}).items():
            lines += _audit_lines(state_key, f"{dtype_name(source)} to {dtype_name(target)}", seen)
        if self.unaudited:
            lines.append(f"  not audited, as not plain real numbers: {counted(self.unaudited, 'tensor')}")
        return "\n".join(lines)


@dataclass
class SaveReport:
    """What a save did. Prints as a few lines."""

    path: str
    tensors: int
    bytes_written: int
    """The size of the file, or of all files of a folder."""
    seconds: float
    casts: dict[tuple[torch.dtype, torch.dtype], CastCount] = field(default_factory=dict)
    """Tensors that have another dtype in the file, by their own and that one."""
    unused_patterns: list[str] = field(default_factory=list)
    """Keys and patterns of `dtype` that fitted no key of the state."""

    def __str__(self) -> str:
        rate = f", {size(self.bytes_written / self.seconds)}/s" if self.seconds else ""
        lines = [
            f"saved {counted(self.tensors, 'tensor')} in {duration(self.seconds)}: {self.path}, "
            f"{size(self.bytes_written)}{rate}"
        ]
        for (source, target), count in self.casts.items():
            lines.append(f"  cast {count.tensors:,} from {dtype_name(source)} to {dtype_name(target)}")
        if self.unused_patterns:
            lines.append(f"  no key of the state fits {some(self.unused_patterns)}, given in dtype")
        return "\n".join(lines)


def _audit_lines(state_key: Any, cast: str, seen: AuditCount) -> Iterator[str]:
    """What a cast did, and a warning where steps divide by values that it made zero."""
    found = {
        "overflowed to infinity": seen.overflowed,
        "underflowed to zero": seen.underflowed,
        "became subnormal": seen.subnormal,
        "were NaN": seen.nan,
        "were infinite": seen.inf,
    }
    counts = ", ".join(f"{count:,} {what}" for what, count in found.items() if count) or "none lost"
    yield (
        f"  audit of {counted(seen.values, 'value')} of {state_key}, {cast}: {counts}, "
        f"largest relative error {seen.largest_error:.2g}"
    )
    if state_key in DIVISORS and seen.underflowed:
        vanished = f"{seen.underflowed:,} of it became zero"
        yield f"  WARNING: steps divide by the root of {state_key}, and {vanished}: they may explode"
