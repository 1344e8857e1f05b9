"""Every test of behaviour asks for `backend`, and so runs once on each; with `copy`, it loads copied and shared."""

from collections.abc import Iterator

import pytest

from fastopt import backends

# What fails in these shows its values, as what fails in a test does.
pytest.register_assert_rewrite("tests.batches", "tests.gpu.device", "tests.loads")


@pytest.fixture(params=["native", "python"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    before = backends.backend().name
    backends.use(request.param)
    assert backends.current().name == request.param
    yield request.param
    backends.use(before)


@pytest.fixture(params=[True, False], ids=["copied", "shared"])
def copy(request: pytest.FixtureRequest) -> bool:
    return request.param
