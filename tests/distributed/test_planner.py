"""What a rank plans to save, held to torch's planner."""

import pytest
from torch.distributed.checkpoint import DefaultSavePlanner

from fastopt import distributed
from fastopt.distributed.planner import KnownPlaces
from tests.distributed.ranks import Ranks
from tests.distributed.trainings import trained

pytestmark = pytest.mark.usefixtures("backend")


def plans_as_torch_does(layout: str) -> int:
    model, optimizer = trained(layout)
    content = distributed.state_dict(optimizer, model)
    plans = []
    for planner in (KnownPlaces(), DefaultSavePlanner()):
        planner.set_up_planner(content, is_coordinator=True)
        plans.append(planner.create_local_plan())
    assert plans[0] == plans[1]
    return len(plans[0].items)


@pytest.mark.parametrize("layout", ["fsdp", "rows", "columns", "grid", "hybrid", "plain"])
def test_the_same_plan(four_ranks: Ranks, layout: str) -> None:
    assert min(four_ranks.run(plans_as_torch_does, layout)) > 30
