"""PyTorch Lightning: a fit that stops and resumes from its own checkpoint is the fit that never stopped."""

import pytest
import torch
from torch.utils.data import DataLoader

from tests.integrations import toy

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the trainer's own advice
    pytest.mark.usefixtures("installed"),
]


def module(make_optimizer):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = toy.model()
            self.losses = []

        def training_step(self, batch, _):
            loss = toy.loss_of(self.net, *batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = make_optimizer(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)]

    return Module()


def trainer(folder, epochs, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


OPTIMIZERS = [
    lambda params: torch.optim.AdamW(params, lr=0.01),
    lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS, ids=["adamw", "fused", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_fit(tmp_path, make_optimizer, accumulate):
    loader = DataLoader(toy.data(), batch_size=8)
    whole = module(make_optimizer)
    trainer(tmp_path, 4, accumulate_grad_batches=accumulate).fit(whole, loader)

    begun = module(make_optimizer)
    first = trainer(tmp_path, 2, accumulate_grad_batches=accumulate)
    first.fit(begun, loader)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = module(make_optimizer)
    trainer(tmp_path, 4, accumulate_grad_batches=accumulate).fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")

    assert begun.losses + resumed.losses == whole.losses
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
