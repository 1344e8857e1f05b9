"""What `check` finds, and how it names the parameter, the place and the value that it is about."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from fastopt.backends.interface import Group
from fastopt.errors import describe_tensor
from fastopt.inspection.places import Place, label, places

Kind = Literal["structure", "names", "shape", "dtype", "values", "damage"]


@dataclass(frozen=True)
class Problem:
    """Something that makes a load fail, or go wrong without a word. Prints as one line."""

    kind: Kind
    text: str
    saved_id: Any = None
    """The id of the parameter's state, where it is about one."""
    key: Any = None
    """The key in that state, where it is about one."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class Param(NamedTuple):
    """A parameter of the optimizer that a saved id stands for."""

    tensor: torch.Tensor
    label: str


class Row(NamedTuple):
    """A saved tensor, and the parameter that it would go to."""

    saved_id: Any
    param: Param | None
    """None where the id stands for no parameter, or the groups leave in doubt for which."""
    place: Place

    @property
    def value(self) -> torch.Tensor:
        """The tensor."""
        tensor: torch.Tensor = self.place.value
        return tensor

    def __str__(self) -> str:
        owner = f"{self.param.label}, saved under id" if self.param else "id"
        return f"{owner} {self.saved_id!r}, {self.place.path or 'all of its state'}: {describe_tensor(self.value)}"

    def problem(self, kind: Kind, text: str) -> Problem:
        """A problem of this tensor."""
        return Problem(kind, f"{self} {text}", self.saved_id, self.place.key)


def ids_of(saved_group: Any) -> Sequence[Any] | None:
    """The saved ids of a group, if it is one."""
    ids = saved_group.get("params") if isinstance(saved_group, Mapping) else None
    return ids if isinstance(ids, list | tuple) else None


def pairs_of(groups: Sequence[Group], saved_groups: Sequence[Any]) -> Iterator[tuple[int, Any, Param]]:
    """Group, saved id and parameter, in those groups whose sizes leave no doubt."""
    first = 0
    if len(groups) != len(saved_groups):
        return
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        ids = ids_of(saved)
        if ids is not None and len(ids) == len(group["params"]):
            for position, (saved_id, tensor) in enumerate(zip(ids, group["params"], strict=True)):
                if isinstance(saved_id, Hashable):
                    yield index, saved_id, Param(tensor, label(first + position, position, group))
        first += len(group["params"])


def tensor_rows(state: Mapping[Any, Any], params: Mapping[Any, Param]) -> Iterator[Row]:
    """Every tensor of the state, at any depth."""
    for saved_id, entry in state.items():
        param = params.get(saved_id)
        for place in places(entry):
            if isinstance(place.value, torch.Tensor):
                yield Row(saved_id, param, place)


def distinct(saved_groups: Iterable[Any]) -> dict[Any, None]:
    """All ids of the groups in their order, each once."""
    return {i: None for group in saved_groups for i in ids_of(group) or () if isinstance(i, Hashable)}
