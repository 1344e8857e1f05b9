"""Hugging Face Accelerate: `save_state` and `load_state`."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.integrations import toy

accelerate = pytest.importorskip("accelerate")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("installed")]


class Run:
    """A loop over prepared objects, as Accelerate's guide has it."""

    def __init__(self, accumulate=1):
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        net = toy.model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
        loader = DataLoader(toy.data(), batch_size=8)
        self.net, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            net, optimizer, scheduler, loader
        )

    def epoch(self):
        losses = []
        for inputs, targets in self.loader:
            with self.accelerator.accumulate(self.net):
                loss = toy.loss_of(self.net, inputs, targets)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loaded_state(tmp_path, accumulate):
    whole = Run(accumulate)
    wanted = [whole.epoch() for _ in range(3)]

    begun = Run(accumulate)
    losses = [begun.epoch()]
    begun.accelerator.save_state(str(tmp_path))
    resumed = Run(accumulate)
    resumed.accelerator.load_state(str(tmp_path))
    losses += [resumed.epoch() for _ in range(2)]

    assert losses == wanted
