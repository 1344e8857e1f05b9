"""What a benchmark is made of: a question, the cases it is asked for, and the contenders that answer it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from benchmarks.results import GoalResult, Results

Size = dict[str, Any]
"""The arguments of `Question.build`, and of `torch.set_num_threads` under "threads" where a case is about them; JSON
carries them to the contender's process."""


@dataclass(frozen=True)
class Work:
    """What a contender is given. Questions subclass it with the tensors it is about."""

    bytes_read: int
    bytes_written: int

    @property
    def fresh_memory(self) -> int:
        """Bytes that the system has to find for what is measured; they are touched before the clock starts."""
        return self.bytes_written


WorkT = TypeVar("WorkT", bound=Work)


@dataclass(frozen=True)
class Case:
    label: str
    size: Size


@dataclass(frozen=True)
class Contender(Generic[WorkT]):
    name: str
    prepare: Callable[[WorkT], Callable[[], object]]
    """Does what is not to be timed, and returns the call that is."""
    environment: Mapping[str, str] = field(default_factory=dict)
    rounds: Callable[[Size, int], int] = lambda size, rounds: rounds
    """How many of the rounds it takes part in, for one that a case would keep busy for too long."""


@dataclass(frozen=True)
class Target:
    """What a number should be."""

    bound: float
    unit: str = ""
    at_most: bool = False

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:.3g}{self.unit}"

    def met(self, measured: float) -> bool:
        return measured <= self.bound if self.at_most else measured >= self.bound


@dataclass(frozen=True)
class Goal:
    """A number to hold a result against; it is printed, and nothing depends on it."""

    text: str
    target: Target
    measure: Callable[[Results], float | None]
    reason: str = ""
    """What profiling found to be in the way, on the machines where the goal is missed; printed there."""

    def result(self, results: Results) -> GoalResult:
        measured = self.measure(results)
        met = None if measured is None else self.target.met(measured)
        return GoalResult(self.text, str(self.target), measured, met, self.reason if met is False else "")


@dataclass(frozen=True)
class Question(Generic[WorkT]):
    title: str
    cases: Sequence[Case]
    quick: Sequence[Case]
    """Small cases that show that everything runs."""
    warm_up: Size
    """What makes a case tiny. Each process first runs its case with these, so that what is done once only, like
    imports, is not measured."""
    build: Callable[..., WorkT]
    contenders: Sequence[Contender[WorkT]]
    baseline: str
    """The contender that the others are compared with."""
    goals: Sequence[Goal] = ()
    plot: Callable[[Results, Path], None] | None = None

    def contender(self, name: str) -> Contender[WorkT]:
        return next(contender for contender in self.contenders if contender.name == name)


AnyQuestion = Question[Any]
