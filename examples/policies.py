"""Resumes one training under several cast policies, and draws how far each leaves the run that never stopped.

A small GPT in bfloat16 is trained by an Adam that keeps its moments in float32, as mixed-precision trainers do. torch's
`load_state_dict` casts these moments to bfloat16; `policy="keep"` does not. Takes two minutes.
Writes `docs/resuming.png`.
"""

import copy as copying
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from gpt import GPT, Shape
from matplotlib import pyplot
from torch.nn import functional
from torch.optim import Optimizer
from training import batch_of, read_corpus

import fastopt

SHAPE = Shape(layers=2, heads=4, width=64)
STEPS = 200
"""Steps before the interruption, and after it."""

POLICIES: dict[str, Any] = {
    "reference (as torch)": "reference",
    'exp_avg to bfloat16, "keep" for exp_avg_sq': {"exp_avg": torch.bfloat16, "exp_avg_sq": "keep"},
    '"keep"': "keep",
}
FIGURE = Path(__file__).parent.parent / "docs" / "resuming.png"


class WideAdam(Optimizer):
    """Adam whose moments are float32, whatever the dtype of the parameters; it takes them as they were loaded."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
                state["step"] += 1
                grad = param.grad.float()
                first = state["exp_avg"].mul_(beta1).add_(grad.to(state["exp_avg"].dtype), alpha=1 - beta1)
                second = (
                    state["exp_avg_sq"].mul_(beta2).add_((grad * grad).to(state["exp_avg_sq"].dtype), alpha=1 - beta2)
                )
                step = state["step"].item()
                denominator = (second.float() / (1 - beta2**step)).sqrt_().add_(group["eps"])
                param.sub_((group["lr"] / (1 - beta1**step) * first.float() / denominator).to(param.dtype))


def losses(model: GPT, optimizer: Optimizer, corpus: torch.Tensor, steps: Iterable[int]) -> list[float]:
    """Train over the given steps; the loss of each."""
    found = []
    for step in steps:
        inputs, targets = batch_of(corpus, step)
        loss = functional.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def fresh() -> tuple[GPT, WideAdam]:
    """A new model in bfloat16 and its optimizer."""
    torch.manual_seed(0)
    model = GPT(SHAPE).bfloat16()
    return model, WideAdam(model.named_parameters())


def main() -> int:
    """Train, resume under each policy, draw."""
    corpus = read_corpus(1 << 20)
    model, optimizer = fresh()
    losses(model, optimizer, corpus, range(STEPS))
    checkpoint = copying.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    uninterrupted = losses(model, optimizer, corpus, range(STEPS, 2 * STEPS))

    resumed = {}
    for name, policy in POLICIES.items():
        model, optimizer = fresh()
        model.load_state_dict(checkpoint["model"])
        fastopt.load_state_dict(optimizer, checkpoint["optimizer"], policy=policy)
        resumed[name] = losses(model, optimizer, corpus, range(STEPS, 2 * STEPS))
        gaps = [abs(one - other) for one, other in zip(resumed[name], uninterrupted, strict=True)]
        sys.stdout.write(f"{name}: largest difference of a loss {max(gaps):.3g}\n")
    draw(uninterrupted, resumed, FIGURE)
    exact = resumed['"keep"'] == uninterrupted
    sys.stdout.write(f'"keep" is the uninterrupted run, to the last bit: {exact}; wrote {FIGURE.name}\n')
    return 0 if exact else 1


def draw(uninterrupted: list[float], resumed: dict[str, list[float]], path: Path) -> None:
    """Write the figure: the losses above, their distance from the uninterrupted run below."""
    steps = range(STEPS, 2 * STEPS)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(10, 7), sharex=True, layout="constrained")
    above.plot(steps, uninterrupted, color="black", linewidth=3, alpha=0.3, label="never stopped")
    for name, found in resumed.items():
        above.plot(steps, found, linewidth=1, label=name)
        below.plot(steps, [one - other for one, other in zip(found, uninterrupted, strict=True)], label=name)
    above.set(ylabel="loss")
    below.set(xlabel=f"step; the run was resumed after {STEPS}", ylabel="loss minus loss of the run that never stopped")
    above.legend(frameon=False)
    below.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
