"""What the tests of this folder run on: a GPU, or the stand-in for one, which has no kernels but fastopt's own."""

import pytest
import torch

IS_STAND_IN = torch.cuda.is_available() and torch.cuda.get_device_name() == "stand-in"

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or IS_STAND_IN, reason="no GPU")


def random_values(count: int, dtype: torch.dtype, device: str = "cuda") -> torch.Tensor:
    """Random bits, so every kind of number: infinite, subnormal, NaN."""
    if dtype is torch.bool:
        return (torch.rand(count) > 0.5).to(device)
    return torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype).to(device)


def zeros(count: int, dtype: torch.dtype, device: str = "cuda") -> torch.Tensor:
    """Zeros, moved to their device."""
    return torch.zeros(count, dtype=dtype).to(device)


def assert_same_bits_but_for_nan(actual: torch.Tensor, expected: torch.Tensor) -> None:
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.dtype == expected.dtype
    if actual.dtype.is_floating_point and actual.dtype.itemsize > 1:
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan)
        actual, expected = actual[~nan], expected[~nan]
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
