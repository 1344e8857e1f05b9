"""Tensors of random bits, and their comparison."""

import torch


def random_values(count: int, dtype: torch.dtype, device: str = "cuda") -> torch.Tensor:
    """Random bits, so every kind of number: infinite, subnormal, NaN."""
    if dtype is torch.bool:
        return torch.rand(count, device=device) > 0.5
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, device=device).view(dtype)


def assert_same_bits_but_for_nan(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.device == expected.device
    if actual.dtype.is_floating_point and actual.dtype.itemsize > 1:
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan)
        actual, expected = actual[~nan], expected[~nan]
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
