"""What casts do to values: what overflows, what vanishes, and how much is rounded away."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch

from fastopt.dtensors import local

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
    """What a cast has done; None where it is not of real numbers in memory that can be looked at.

    Of a DTensor, each process looks at its own part.
    """
    source, result = local(source), local(result)
    if not (is_readable(source) and is_readable(result) and result.is_floating_point()):
        return None
    total = AuditCount()
    device = result.device if result.is_cuda else torch.device("cpu")  # others may not have float64
    with torch.no_grad():
        for before, after in zip(chunks(source, device), chunks(result, device), strict=True):
            total.add(audited_chunk(before, after, smallest_normal(source.dtype), smallest_normal(result.dtype)))
    return total


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds real numbers, and nothing but them: a subclass has its own ideas of what they mean."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_meta or tensor.is_complex() or tensor.is_quantized)


def chunks(tensor: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
    """The elements in order, some at a time, in float64 on a device; nothing where there are none."""
    for part in torch.split(tensor.detach().reshape(-1), CHUNK) if tensor.numel() else ():
        yield part.to(device=device).to(torch.float64)


def smallest_normal(dtype: torch.dtype) -> float:
    """The smallest normal number; integers have no subnormal ones."""
    return torch.finfo(dtype).smallest_normal if dtype.is_floating_point else 0.0


def audited_chunk(before: torch.Tensor, after: torch.Tensor, normal: float, new_normal: float) -> AuditCount:
    """The same of values in float64; `normal` and `new_normal` are the smallest normal numbers of the two dtypes."""
    was, now = before.abs(), after.abs()
    counted = {
        "overflowed": was.isfinite() & now.isinf(),
        "underflowed": (was != 0) & (now == 0),
        "subnormal": (now != 0) & (now < new_normal) & (was >= normal),
        "nan": was.isnan(),
        "inf": was.isinf(),
    }
    rounded = was.isfinite() & now.isfinite() & (now != 0)
    error = torch.where(rounded, (before - after).abs() / was, 0.0).amax()
    # All at once, as each number that a GPU is asked for is waited for; float64 has all integers up to 2**53.
    *counts, largest_error = torch.stack([*(mask.sum().double() for mask in counted.values()), error]).tolist()
    return AuditCount(before.numel(), **dict(zip(counted, map(int, counts), strict=True)), largest_error=largest_error)
