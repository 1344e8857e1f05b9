"""Trainings by other people's trainers: every test runs under `fastopt.install()`, on each backend, in each mode."""

from collections.abc import Iterator

import pytest
import torch

import fastopt


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Sums in one order, whatever a trainer does to threads, and torch's default mode afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def installed(backend: str, copy: bool) -> Iterator[None]:
    """The drop-in, for the whole of a test that resumes."""
    with fastopt.installed(copy=copy):
        yield
