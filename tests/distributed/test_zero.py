"""An optimizer whose state is dealt out among the ranks, through fastopt and through torch."""

import copy as copying
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastopt
from tests.distributed.ranks import Ranks
from tests.distributed.trainings import assert_same

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it compiles something in an old way
    from torch.distributed.optim import ZeroRedundancyOptimizer

pytestmark = pytest.mark.usefixtures("backend")


def zero(dtype: torch.dtype) -> ZeroRedundancyOptimizer:
    """AdamW, with the state of each parameter on one of the ranks."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(7, 3).to(dtype)) for _ in range(5)]
    return ZeroRedundancyOptimizer(params, optimizer_class=torch.optim.AdamW, lr=0.25)


def gathered(optimizer: ZeroRedundancyOptimizer) -> dict[str, Any]:
    optimizer.consolidate_state_dict(to=0)
    content = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(content, src=0)
    assert content[0] is not None
    return content[0]


def step(optimizer: ZeroRedundancyOptimizer) -> None:
    for group in optimizer.param_groups:
        for seed, param in enumerate(group["params"]):
            param.grad = torch.full_like(param, float(seed + 1))
    optimizer.step()


def loads_zero() -> None:
    saving = zero(torch.float32)
    step(saving)
    content = gathered(saving)
    assert len(content["state"]) == 5
    with fastopt.installed():
        assert_same(gathered(saving), content)
    for dtype in (torch.float32, torch.bfloat16):
        expected, actual = zero(dtype), zero(dtype)
        expected.load_state_dict(copying.deepcopy(content))
        with fastopt.installed():
            actual.load_state_dict(copying.deepcopy(content))
        assert_same(gathered(actual), gathered(expected))
        if dtype is torch.float32:  # it keeps the saved dtypes, which its step cannot use for parameters of another
            step(expected)
            step(actual)
            assert_same(gathered(actual), gathered(expected))


def test_a_state_that_is_dealt_out_among_ranks(two_ranks: Ranks) -> None:
    two_ranks.run(loads_zero)
