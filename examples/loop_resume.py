"""A loop by hand, stopped and resumed to the bit: GradScaler, a schedule and an average of the weights beside fastopt.

Half precision by autocast, on the CPU. Takes seconds. Exits with 1 where a loss is not that of the run that never
stopped.
"""

import sys
import tempfile
from pathlib import Path

import torch
from checks import WrongResultError, require_same_losses
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastopt

STEPS = 20
FEATURES = 32


class Training:
    """All that a checkpoint of such a loop has to hold."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=3e-3)
        self.schedule = CosineAnnealingLR(self.optimizer, STEPS)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        # Too large at first, so that steps are left out and the scale is part of what has to be resumed.
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=4)

    def step(self, number: int) -> float:
        """One step over the batch of that number; returns its loss."""
        inputs = torch.randn(64, FEATURES, generator=torch.Generator().manual_seed(number))
        with torch.autocast("cpu", dtype=torch.float16):
            predicted = self.model(inputs).squeeze(1)
        loss = torch.nn.functional.mse_loss(predicted.float(), inputs.sum(1).sin())
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.average.update_parameters(self.model)
        return loss.item()

    def save(self, folder: Path) -> None:
        """The optimizer to a file of its own, which fastopt replaces as a whole; the rest as torch saves it."""
        rest = {name: getattr(self, name).state_dict() for name in ("model", "schedule", "average", "scaler")}
        torch.save(rest, folder / "training.pt")
        fastopt.save(self.optimizer, folder / "optimizer.pt")

    def resume(self, folder: Path) -> fastopt.LoadReport:
        """What `save` has written."""
        for name, state in torch.load(folder / "training.pt", weights_only=True).items():
            getattr(self, name).load_state_dict(state)
        return fastopt.load(self.optimizer, folder / "optimizer.pt", verify=True)


def main() -> None:
    """Compare a run in one go with one that was stopped."""
    torch.set_num_threads(1)  # sums in one order
    whole = Training()
    expected = [whole.step(number) for number in range(STEPS)]

    with tempfile.TemporaryDirectory() as name:
        stopped = Training()
        losses = [stopped.step(number) for number in range(STEPS // 2)]
        stopped.save(Path(name))
        resumed = Training()
        print(resumed.resume(Path(name)))
        losses += [resumed.step(number) for number in range(STEPS // 2, STEPS)]

    require_same_losses("the resumed run", expected, losses)
    for kept, average in zip(whole.average.parameters(), resumed.average.parameters(), strict=True):
        if not torch.equal(kept, average):
            raise WrongResultError("the averages of the weights differ")
    print(
        f"{STEPS} steps, stopped after {STEPS // 2}: every loss and the average are those of the run that never stopped"
    )


if __name__ == "__main__":
    try:
        main()
    except WrongResultError as error:
        sys.exit(str(error))
