"""One module a question, found by its name; each has a `QUESTION`."""

import importlib
import pkgutil

import torch

from benchmarks.question import AnyQuestion

OF_GPUS = "gpu_"
"""What the names of those begin with that can be asked only where there is a GPU."""


def names() -> list[str]:
    found = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [name for name in found if torch.cuda.is_available() or not name.startswith(OF_GPUS)]


def find(name: str) -> AnyQuestion:
    question: AnyQuestion = importlib.import_module(f"{__name__}.{name}").QUESTION
    return question
