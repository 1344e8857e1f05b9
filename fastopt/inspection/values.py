"""The numbers in tensors, looked at a few megabytes at a time. Call these where gradients are off."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

CHUNK = 1 << 20
"""Elements that are looked at in one piece, where that makes no copy of them."""

SMALLEST = 5e-324
"""The smallest positive float64."""

SMALL_CHUNK = 1 << 16
"""Elements that are compared in one piece; its float64 temporaries stay in the cache, and in malloc's hands."""


Advance = Callable[[int], None]
"""Is called with the bytes of what has been looked at, tensor by tensor, small ones some megabytes at a time."""


def unwatched(_: int) -> None:
    """An `Advance` that nobody looks at."""


COMPARED_WIDE = (torch.uint16, torch.uint32, torch.uint64)
"""Dtypes that torch has few operations for."""

NUMBERS = {
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128, torch.complex32),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool, *COMPARED_WIDE),
}
"""Dtypes whose elements are numbers that torch can look at."""


def numbers(tensor: torch.Tensor) -> torch.Tensor | None:
    """The numbers that a tensor holds in memory, as a tensor of real ones; None where there are none to look at.

    Those of a sparse tensor are its values, without their places. Tensors that are quantized, nested, or on the meta
    device have none.
    """
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        tensor = tensor.values()
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested or tensor.dtype not in NUMBERS:
        return None
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def pieces(*tensors: torch.Tensor, size: int = CHUNK) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one shape, in step, in flat pieces of so many elements at most; only pieces are ever copied."""
    first = tensors[0]
    if all(tensor.is_contiguous() for tensor in tensors):
        yield from zip(*(torch.split(tensor.reshape(-1), size) for tensor in tensors), strict=True)
    elif first.numel() <= size:
        yield tuple(tensor.reshape(-1) for tensor in tensors)
    elif first.shape[0] == 1:
        yield from pieces(*(tensor.squeeze(0) for tensor in tensors), size=size)
    else:
        rows = max(1, size * first.shape[0] // first.numel())
        for slices in zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True):
            yield from pieces(*slices, size=size)


@dataclass
class ValueRange:
    """The smallest and the largest finite value of tensors, and how many are not finite."""

    minimum: float = float("inf")
    maximum: float = float("-inf")
    nan: int = 0
    inf: int = 0

    def add(self, other: "ValueRange") -> None:
        """Take in the values of another."""
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        self.nan += other.nan
        self.inf += other.inf


def value_range(tensor: torch.Tensor) -> ValueRange:
    """The range of the numbers of a tensor, as `numbers` returns them."""
    total = ValueRange()
    for (piece,) in pieces(tensor):
        if piece.numel():
            total.add(piece_range(piece))
    return total


def piece_range(piece: torch.Tensor) -> ValueRange:
    """The same for a flat piece that is not empty."""
    low, high = extremes(piece)
    if piece.is_floating_point() and not (low.isfinite() and high.isfinite()):
        wide = piece.to(torch.float64)
        nan, inf = (int(mask.count_nonzero()) for mask in (wide.isnan(), wide.isinf()))
        finite = wide[wide.isfinite()]
        if not finite.numel():
            return ValueRange(nan=nan, inf=inf)
        low, high = extremes(finite)
        return ValueRange(low.item(), high.item(), nan, inf)
    return ValueRange(low.item(), high.item())


def extremes(piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest value, both NaN if any is; reads once, at the memory's speed."""
    if piece.is_floating_point() and piece.dtype.itemsize == 1:
        piece = piece.to(torch.float32)  # torch does not order floats of 8 bits
    elif piece.dtype in COMPARED_WIDE:
        piece = piece.to(torch.float64)
    low, high = torch.aminmax(piece)
    return low, high


def not_finite(tensors: Sequence[torch.Tensor], advance: Advance = unwatched) -> dict[int, ValueRange]:
    """The range of each tensor with NaNs or infinities, by its place among those given, which `numbers` returned."""
    found: dict[int, ValueRange] = {}
    for batch in batches(tensors):
        if not is_finite(joined(tensors, batch)):
            for place in batch:
                seen = value_range(tensors[place])
                if seen.nan or seen.inf:
                    found[place] = seen
        advance(bytes_in(tensors, batch))
    return dict(sorted(found.items()))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite."""
    if not tensor.is_floating_point():
        return True
    return all(bool(bound.isfinite()) for (piece,) in pieces(tensor) if piece.numel() for bound in extremes(piece))


def total_range(tensors: Sequence[torch.Tensor], advance: Advance = unwatched) -> ValueRange:
    """The range over all tensors, which `numbers` returned."""
    total = ValueRange()
    for batch in batches(tensors):
        total.add(value_range(joined(tensors, batch)))
        advance(bytes_in(tensors, batch))
    return total


def bytes_in(tensors: Sequence[torch.Tensor], batch: Sequence[int]) -> int:
    """Bytes of the values of several."""
    return sum(tensors[place].numel() * tensors[place].element_size() for place in batch)


def joined(tensors: Sequence[torch.Tensor], batch: Sequence[int]) -> torch.Tensor:
    """One tensor of the values of several."""
    if len(batch) == 1:
        return tensors[batch[0]]
    return torch.cat([tensors[place].reshape(-1) for place in batch])


def batches(tensors: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """The places of all tensors that are not empty: large ones alone, small ones together by dtype and device.

    A call for each small one would cost more than its bytes.
    """
    gathered: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
    sizes: dict[tuple[torch.dtype, torch.device], int] = defaultdict(int)
    for place, tensor in enumerate(tensors):
        size = tensor.numel()
        if size > CHUNK:
            yield [place]
        elif size:
            kind = tensor.dtype, tensor.device
            if sizes[kind] + size > CHUNK:
                yield gathered.pop(kind)
                sizes[kind] = 0
            gathered[kind].append(place)
            sizes[kind] += size
    yield from gathered.values()


@dataclass
class Difference:
    """How the values of two tensors of one shape differ."""

    values: int = 0
    different: int = 0
    """Values that are not equal; NaNs are equal to one another."""
    absolute: float = 0.0
    """The largest |a - b|; infinite where one of two different values is NaN or infinite."""
    relative: float = 0.0
    """The largest |a - b| / max(|a|, |b|), which is at most 2; infinite like `absolute`."""


def difference(one: torch.Tensor, other: torch.Tensor) -> Difference:
    """The difference of two tensors of one shape, as `numbers` returns them."""
    if one.dtype == other.dtype and one.device == other.device and torch.equal(one, other):
        return Difference(one.numel())
    total = Difference(one.numel())
    for a, b in pieces(one, other, size=SMALL_CHUNK):
        if a.numel():
            seen = piece_difference(a.cpu(), b.cpu())
            total.different += seen.different
            total.absolute = max(total.absolute, seen.absolute)
            total.relative = max(total.relative, seen.relative)
    return total


def piece_difference(a: torch.Tensor, b: torch.Tensor) -> Difference:
    """The difference of two flat pieces that are not empty, in float64."""
    wide_a, wide_b = a.to(torch.float64), b.to(torch.float64)
    gaps = (wide_a - wide_b).abs_()
    scales = torch.maximum(wide_a.abs(), wide_b.abs())
    different = gaps != 0
    if not extremes(gaps)[1].isfinite():
        same = (wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())
        gaps = gaps.masked_fill_(same, 0.0).nan_to_num_(float("inf"), float("inf"))
        scales.masked_fill_(~scales.isfinite(), 1.0)
        different = ~same
    elif a.dtype == b.dtype and not a.is_floating_point():
        different = a != b  # int64 has values that float64 has not
    ratios = gaps / scales.clamp_min_(SMALLEST)
    return Difference(a.numel(), int(different.sum()), gaps.max().item(), ratios.max().item())
