"""Trains the GPT on the sources of Python's standard library, saves it in mid-course and takes it up again.

Everything random depends on a seed or on the number of the step, so two runs over the same steps are the same run.
"""

import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, Shape
from torch.nn import functional
from torch.optim import AdamW, Optimizer

SHAPE = Shape()
BATCH = 4

Loader = Callable[[Optimizer, dict[str, Any]], Any]


def read_corpus(limit: int) -> torch.Tensor:
    """The first `limit` bytes of the standard library's top-level modules, as uint8."""
    text = bytearray()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += source.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def batch_of(corpus: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(corpus) - SHAPE.context, (BATCH, 1), generator=generator)
    windows = corpus[starts + torch.arange(SHAPE.context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def fresh(seed: int) -> tuple[GPT, AdamW]:
    """A new model and its optimizer; weight decay goes to the matrices alone."""
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    named = list(model.named_parameters())
    groups = [
        {"params": [(name, param) for name, param in named if param.ndim >= 2], "weight_decay": 0.1},
        {"params": [(name, param) for name, param in named if param.ndim < 2], "weight_decay": 0.0},
    ]
    return model, AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def train(model: GPT, optimizer: Optimizer, corpus: torch.Tensor, steps: Iterable[int]) -> Iterable[float]:
    """Train over the given steps; yields the loss of each."""
    for step in steps:
        inputs, targets = batch_of(corpus, step)
        logits = model(inputs)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def save(model: GPT, optimizer: Optimizer, path: Path) -> None:
    """Write a checkpoint as training scripts do."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def resume(path: Path, load: Loader, dtype: torch.dtype) -> tuple[GPT, AdamW, Any]:
    """A new model of the given dtype and its optimizer, filled from a checkpoint, and what `load` returned."""
    model, optimizer = fresh(seed=1)  # not the seed of the run: all that matters has to come from the file
    model.to(dtype)  # the optimizer's groups hold the parameters themselves, so they follow
    checkpoint = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    return model, optimizer, load(optimizer, checkpoint["optimizer"])
