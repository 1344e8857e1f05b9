"""PyTorch Lightning under fastopt: a fit that is stopped and resumed to the bit, by a CheckpointIO that maps its files.

Needs `pip install lightning`. Takes seconds. Exits with 1 where a loss is not that of the run that never stopped.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from checks import WrongResultError, require_same_losses
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader, TensorDataset

import fastopt

EPOCHS = 4
FEATURES = 32


class MappedCheckpointIO(TorchCheckpointIO):
    """Lightning's own files, mapped when they are read: state goes from the file to where it belongs, once.

    For a local file; and with `fastopt.install(copy=True)`, as what an optimizer shared with the map would change with
    the file.
    """

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The checkpoint, its tensors not read yet."""
        return torch.load(path, map_location=map_location, mmap=True, weights_only=weights_only is not False)


class Regression(lightning.LightningModule):
    """A small model that keeps its losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(FEATURES, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The loss of a batch, which is kept."""
        inputs, targets = batch
        loss = torch.nn.functional.mse_loss(self.net(inputs).squeeze(1), targets)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, over epochs."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def fit(epochs: int, folder: Path, resume_from: Path | None = None) -> tuple[Regression, lightning.Trainer]:
    """A fit up to so many epochs, and its trainer."""
    inputs = torch.randn(256, FEATURES, generator=torch.Generator().manual_seed(0))
    batches = DataLoader(TensorDataset(inputs, inputs.sum(1).sin()), batch_size=32)
    module = Regression()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        plugins=[MappedCheckpointIO()],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches, ckpt_path=resume_from)
    return module, trainer


def main() -> None:
    """Compare a fit in one go with one that was stopped."""
    torch.set_num_threads(1)  # sums in one order
    fastopt.install(copy=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, _ = fit(EPOCHS, folder)
        stopped, trainer = fit(EPOCHS // 2, folder)
        trainer.save_checkpoint(folder / "half.ckpt")
        resumed, _ = fit(EPOCHS, folder, folder / "half.ckpt")
    require_same_losses("the resumed fit", whole.losses, stopped.losses + resumed.losses)
    print(f"{EPOCHS} epochs, stopped after {EPOCHS // 2}: every loss is that of the fit that never stopped")


if __name__ == "__main__":
    try:
        main()
    except WrongResultError as error:
        sys.exit(str(error))
