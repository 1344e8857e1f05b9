"""Every test of behaviour asks for `backend`, and so runs once on each."""

from collections.abc import Iterator

import pytest

from fastopt import backends


@pytest.fixture(params=["native", "python"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    before = backends.backend().name
    backends.use(request.param)
    assert backends.current().name == request.param
    yield request.param
    backends.use(before)
