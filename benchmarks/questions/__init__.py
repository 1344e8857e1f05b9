"""One module a question, found by its name; each has a `QUESTION`."""

import importlib
import pkgutil

from benchmarks.question import AnyQuestion


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> AnyQuestion:
    question: AnyQuestion = importlib.import_module(f"{__name__}.{name}").QUESTION
    return question
