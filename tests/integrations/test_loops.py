"""Loops written by hand, with all that stands beside an optimizer in one: scaler, schedule, averages, accumulation."""

import pytest
import torch
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from tests.integrations import toy

pytestmark = [
    pytest.mark.usefixtures("installed"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]


class Loop:
    """Steps over one batch; what it holds is saved as one checkpoint."""

    def __init__(self, mixed=False, averaging="ema", accumulate=1):
        self.net = toy.model()
        self.optimizer = torch.optim.AdamW(self.net.named_parameters(), lr=0.01, amsgrad=True)
        ema = averaging == "ema"
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9) if ema else None)
        cosine = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizer, 4)
        self.schedule = cosine if ema else SWALR(self.optimizer, swa_lr=0.001, anneal_epochs=3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2, enabled=mixed)
        self.mixed = mixed
        self.accumulate = accumulate
        self.batches = toy.data().tensors

    def steps(self, count):
        losses = []
        for _ in range(count):
            for part in range(self.accumulate):
                inputs, targets = (tensor[part :: self.accumulate] for tensor in self.batches)
                with torch.autocast("cpu", dtype=torch.float16, enabled=self.mixed):
                    loss = toy.loss_of(self.net, inputs, targets) / self.accumulate
                self.scaler.scale(loss).backward()
                losses.append(loss.item())
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.net)
            self.schedule.step()
        return losses

    @property
    def parts(self):
        return {
            "net": self.net,
            "optimizer": self.optimizer,
            "average": self.average,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "scaled"])
@pytest.mark.parametrize("averaging", ["ema", "swa"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loop_that_stopped(tmp_path, mixed, averaging, accumulate):
    whole = Loop(mixed, averaging, accumulate)
    wanted = whole.steps(8)

    begun = Loop(mixed, averaging, accumulate)
    losses = begun.steps(4)
    torch.save({name: part.state_dict() for name, part in begun.parts.items()}, tmp_path / "checkpoint.pt")
    resumed = Loop(mixed, averaging, accumulate)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, part in resumed.parts.items():
        part.load_state_dict(checkpoint[name])
    losses += resumed.steps(4)

    assert losses == wanted
    for one, other in zip(resumed.average.parameters(), whole.average.parameters(), strict=True):
        assert torch.equal(one, other)
