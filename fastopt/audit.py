"""What casts do to values: what overflows, what vanishes, and how much is rounded away."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch

CHUNK = 1 << 20
"""Elements that are compared at a time, in float64."""


@dataclass
class AuditCount:
    """Values cast under one key from one dtype to another. Signs do not matter."""

    values: int = 0
    overflowed: int = 0
    """Finite values that became infinite."""
    underflowed: int = 0
    """Values that became zero, and were not."""
    subnormal: int = 0
    """Values that were normal numbers of their dtype, and became subnormal ones of the new dtype."""
    nan: int = 0
    """NaNs that were there before the cast."""
    inf: int = 0
    """Infinities that were there before the cast."""
    largest_error: float = 0.0
    """The largest relative rounding error, of values that stayed finite and did not become zero."""

    @property
    def lost(self) -> int:
        """Values of which nothing or little is left: those that overflowed, underflowed, or became subnormal."""
        return self.overflowed + self.underflowed + self.subnormal

    def add(self, other: "AuditCount") -> None:
        """Count another's values as well."""
        *counts, error = (one + two for one, two in zip(astuple(self), astuple(other), strict=True))
        error = max(self.largest_error, other.largest_error)
        self.__init__(*counts, error)  # type: ignore[misc]


def audited(source: torch.Tensor, result: torch.Tensor) -> AuditCount | None:
    """What a cast has done; None where it is not of real numbers in memory that can be looked at."""
    if not (is_readable(source) and is_readable(result) and result.is_floating_point()):
        return None
    total = AuditCount()
    with torch.no_grad():
        for before, after in zip(chunks(source), chunks(result), strict=True):
            total.add(audited_chunk(before, after, smallest_normal(source.dtype), smallest_normal(result.dtype)))
    return total


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds real numbers, one after the other."""
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_complex() or tensor.is_quantized)


def chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements in order, some at a time, in float64 on the CPU."""
    for part in torch.split(tensor.detach().reshape(-1), CHUNK):
        yield part.to(device="cpu").to(torch.float64)


def smallest_normal(dtype: torch.dtype) -> float:
    """The smallest normal number; integers have no subnormal ones."""
    return torch.finfo(dtype).smallest_normal if dtype.is_floating_point else 0.0


def audited_chunk(before: torch.Tensor, after: torch.Tensor, normal: float, new_normal: float) -> AuditCount:
    """The same of values in float64; `normal` and `new_normal` are the smallest normal numbers of the two dtypes."""
    was, now = before.abs(), after.abs()
    rounded = was.isfinite() & now.isfinite() & (now != 0)
    errors = ((before - after).abs() / was)[rounded]
    return AuditCount(
        values=before.numel(),
        overflowed=count(was.isfinite() & now.isinf()),
        underflowed=count((was != 0) & (now == 0)),
        subnormal=count((now != 0) & (now < new_normal) & (was >= normal)),
        nan=count(was.isnan()),
        inf=count(was.isinf()),
        largest_error=errors.max().item() if errors.numel() else 0.0,
    )


def count(mask: torch.Tensor) -> int:
    """How many are True."""
    return int(mask.count_nonzero())
