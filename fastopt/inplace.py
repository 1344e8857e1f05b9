"""Loading into the tensors that an optimizer already holds."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain, repeat
from typing import Any, Literal, NamedTuple

import torch
from torch.optim import Optimizer

from fastopt.backends import current, python
from fastopt.backends.interface import Group
from fastopt.casting import Cast
from fastopt.containers import agree, is_leaf, rebuilt
from fastopt.dtensors import placed_alike, placement
from fastopt.errors import OverlapError, describe_parameter, describe_tensor
from fastopt.report import LEFT
from fastopt.text import counted, ranges

InPlace = bool | Literal["auto"]
"""Whether held tensors are filled; `"auto"`: those that can be."""


def check_inplace(inplace: Any) -> None:
    """Raise a ValueError for what is no `InPlace`."""
    if not isinstance(inplace, bool) and inplace != "auto":
        raise ValueError(f"inplace: {inplace!r} is neither a bool nor 'auto'")


class Place(NamedTuple):
    """Where in a parameter's state a value stands."""

    text: str
    """For errors and reports: `state['exp_avg']`."""
    key: Any = None
    """The value's own key, which the items of a list do not have."""
    state_key: Any = None
    """The key of the parameter's state that it stands under, at any depth."""

    def under(self, key: Any) -> "Place":
        """The place of a dict's entry."""
        return Place(f"{self.text}[{key!r}]", key, key if self.state_key is None else self.state_key)

    def item(self, index: int) -> "Place":
        """The place of an item of another container."""
        return Place(f"{self.text}[{index}]", None, self.state_key)


class CastInPlace(Cast):
    """Pairs each saved tensor with the one that the optimizer holds in its place; `commit` fills all of them at once.

    What is no tensor becomes what it does in any load, and is copied. So does a tensor that has none to fill, where
    `replace` allows it. Tensors among the hyperparameters, as a captured graph reads its `lr` from, are filled too, by
    numbers as well.
    """

    def __init__(
        self, optimizer: Optimizer, saved_groups: list[Group], *, replace: bool = False, reads_files: bool = False
    ) -> None:
        super().__init__(optimizer, saved_groups, copy=True, reads_files=reads_files)
        self.backend = python  # walks the state; the bytes, nearly all of the work, are for the backend in use
        self.replace = replace
        self.param: Any = None
        self.saved_id: Any = None
        self.report.fate = LEFT
        self.held_state: Mapping[Any, Any] = optimizer.state
        self.held: list[torch.Tensor] = []
        self.saved: list[torch.Tensor] = []
        self.places: list[tuple[torch.Tensor | None, Any, str]] = []
        """Parameter, saved id and place within the state of each; without the two, a hyperparameter and its place."""
        self.begun: list[list[int]] = []
        """Those that have been written, by their place in the lists above; the last of these perhaps in part."""
        self.is_filled = False
        self.partners: dict[int, torch.Tensor] = {}
        """The saved tensor of each held one, by its identity."""

    def __call__(self, param: torch.Tensor, value: Any, saved_id: Any, key: Any = None, state_key: Any = None) -> Any:
        """The new state of a parameter, around the tensors of its present one.

        Raises:
            ValueError: the optimizer holds no tensor of the shape in a saved tensor's place.
        """
        self.param, self.saved_id = param, saved_id
        return self.value(self.held_state.get(param), value, Place("state"))

    def value(self, held: Any, value: Any, place: Place) -> Any:
        """The new value for `place`, where the optimizer holds `held`."""
        if isinstance(value, torch.Tensor):
            return self.filled_or_replaced(held, value, place)
        if isinstance(value, dict):
            items = held if isinstance(held, dict) else {}
            return {self.keep(k): self.value(items.get(k), v, place.under(k)) for k, v in value.items()}
        if isinstance(value, Set):
            return self.unordered(value, place)
        if isinstance(value, Iterable) and not is_leaf(value):
            return rebuilt(value, self.items(held, value, place))
        return self.keep(value)

    def items(self, held: Any, value: Iterable[Any], place: Place) -> Iterator[Any]:
        """The new items of a container other than a dict or set."""
        has_places = isinstance(held, Iterable) and not (isinstance(held, torch.Tensor | dict | Set) or is_leaf(held))
        held_items = chain(held if has_places else (), repeat(None))
        for index, (held_item, item) in enumerate(zip(held_items, value, strict=False)):
            yield self.value(held_item, item, place.item(index))

    def unordered(self, value: Set[Any], place: Place) -> Any:
        """A set, in which a tensor has no place of its own."""
        if not any(isinstance(item, torch.Tensor) for item in value):
            return self.keep(value)
        if self.replace:
            return rebuilt(value, (self.value(None, item, place) for item in value))
        raise ValueError(f"inplace: {place.text} is a set of tensors: nothing says which of them goes where")

    def filled_or_replaced(self, held: Any, saved: torch.Tensor, place: Place) -> torch.Tensor:
        """The held tensor, noted to be filled; or a new one where there is none to fill, and `replace` allows that."""
        filled = self.filled(held, saved, place.text)
        if filled is None:
            return self.tensor(self.param, saved, self.saved_id, place.key, place.state_key)
        return filled

    def group(self, index: int, group: Group, saved_group: Group) -> Group:
        """The saved group around the tensors among the hyperparameters of the present one."""
        self.param = self.saved_id = None
        for key, saved in saved_group.items():
            if key in group and key != "params":
                saved_group[key] = self.hyperparameter(group[key], saved, f"param_groups[{index}][{key!r}]")
        return saved_group

    def hyperparameter(self, held: Any, saved: Any, place: str) -> Any:
        """The new value of a hyperparameter, or of an item of one, as in `betas`; `saved` is our own copy."""
        if isinstance(held, torch.Tensor):
            # A tensor is there for a reason, as code that reads its memory later: it stays, for a number as well.
            if is_number_for(held, saved):
                saved = torch.full(held.shape, saved, dtype=held.dtype)
            if isinstance(saved, torch.Tensor):
                filled = self.filled(held, saved, place)
                return saved if filled is None else filled
        elif is_parallel(held, saved) and any(isinstance(item, torch.Tensor) for item in held):
            items = enumerate(zip(held, saved, strict=True))
            return rebuilt(saved, (self.hyperparameter(*both, f"{place}[{item}]") for item, both in items))
        return saved

    def filled(self, held: Any, saved: torch.Tensor, place: str) -> torch.Tensor | None:
        """The held tensor, noted to be filled; None where there is none to fill, and `replace` allows that."""
        try:
            return self.held_tensor(held, saved, place)
        except ValueError:
            if not self.replace:
                raise
        self.report.replaced.append((self.saved_id, place))
        return None

    def held_tensor(self, held: Any, saved: torch.Tensor, place: str) -> torch.Tensor:
        """The held tensor, noted to be filled.

        Raises:
            ValueError: there is none that can be filled.
        """
        was_saved = f'where {describe_tensor(saved)} was saved (inplace="auto" puts a new one there)'
        if not isinstance(held, torch.Tensor):
            raise ValueError(f"inplace: the optimizer holds no tensor at {place}, {was_saved}")
        if held.shape != saved.shape:
            raise ValueError(f"inplace: the optimizer holds {describe_tensor(held)} at {place}, {was_saved}")
        if reason := why_not_written(held, saved):
            raise ValueError(f"inplace: the optimizer holds {describe_tensor(held)} at {place}, {reason}, {was_saved}")
        if saved.is_meta and not held.is_meta:
            raise ValueError(f"inplace: {describe_tensor(saved)}, saved at {place}, has no values")
        partner = self.partners.get(id(held))
        if partner is None:
            self.partners[id(held)] = saved
            self.held.append(held)
            self.saved.append(saved)
            self.places.append((self.param, self.saved_id, place))
        elif partner is not saved and not (self.param is None and agree(partner, saved)):  # an lr of several groups
            raise ValueError(f"inplace: the tensor held at {place} is held elsewhere too, where another was saved")
        return held

    def commit(self) -> None:
        """Copy the saved values into the held tensors.

        Raises:
            ValueError: two of the held tensors overlap. Nothing was written then.
        """
        self.saved = apart(self.held, self.saved)
        for held, saved in zip(self.held, self.saved, strict=True):
            self.count_tensor(saved, held, copied=False)
        self.report.filled = len(self.held) - self.report.shared  # with itself, as in the optimizer's own live state
        try:
            with torch.no_grad():
                current().copy_(self.held, self.saved, False, self.begun, self.reads_files)
            self.is_filled = True
        except OverlapError as error:
            for entry in error.entries:
                param, saved_id, place = self.places[entry]
                owner = f" of {describe_parameter(param, saved_id, self.groups)}" if param is not None else ""
                error.add_note(f"entry {entry}: {place}{owner}")
            raise

    def note_failure(self, error: BaseException) -> None:
        """Say which bytes cannot be taken back, if any were written."""
        if not self.begun:
            return
        whole = chain.from_iterable(self.begun if self.is_filled else self.begun[:-1])
        parts = [f"filled: {self.described(whole)}"]
        if not self.is_filled:
            parts.append(f"filled in part, wholly or not at all: {self.described(self.begun[-1])}")
        tensors = counted(len(self.held), "tensor")
        error.add_note(f"inplace: of {tensors}, {'; '.join(parts)}. All else of the optimizer is as it was")

    def described(self, entries: Iterable[int]) -> str:
        """Places, each with the indices of its parameters; all of them, so that no byte is in doubt."""
        params = (param for group in self.groups for param in group["params"])
        index_of = {id(param): index for index, param in enumerate(params)}
        indices: dict[str, list[int]] = {}
        for entry in entries:
            param, _, place = self.places[entry]
            numbers = indices.setdefault(place, [])
            if param is not None:
                numbers.append(index_of[id(param)])
        texts = (f"{p} of parameter {ranges(sorted(found))}" if found else p for p, found in indices.items())
        return ", ".join(texts) or "none"


def is_parallel(held: Any, saved: Any) -> bool:
    """Whether two hyperparameters are tuples, or lists, of the same length."""
    return type(held) is type(saved) and isinstance(held, tuple | list) and len(held) == len(saved)


def is_number_for(held: torch.Tensor, saved: Any) -> bool:
    """Whether a saved hyperparameter is a number that a held tensor can stand for."""
    if isinstance(saved, bool) or not isinstance(saved, int | float) or held.numel() != 1:
        return False
    return held.is_floating_point() or isinstance(saved, int)


def why_not_written(held: torch.Tensor, saved: torch.Tensor) -> str | None:
    """What would make torch refuse to copy one tensor into another of its shape, as far as that can be known before."""
    if held.is_inference() and not torch.is_inference_mode_enabled():
        return "which only inference mode may write"
    if held.layout is not saved.layout:
        return f"which is {held.layout} and not {saved.layout}"
    if not placed_alike(held, saved):
        return f"which is {placement(held)} and not {placement(saved)}"
    if held.layout is torch.strided and 0 in held.stride() and not held.is_contiguous():
        return "which is expanded, many elements in one place"
    return None


def apart(held: Sequence[torch.Tensor], saved: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The saved tensors, with copies in place of those that the filling of another held one might change.

    A batch judges dense tensors itself, and refuses those that overlap; others, as rows of a wider buffer, may
    interleave and not overlap.
    """
    if not any(is_ordinary(tensor) and not tensor.is_contiguous() for tensor in chain(held, saved)):
        return list(saved)
    buffers = Counter(memory_of(tensor) for tensor in held)
    return [
        one.clone() if buffers[memory_of(one)] > (memory_of(own) == memory_of(one)) and one is not own else one
        for own, one in zip(held, saved, strict=True)
    ]


def memory_of(tensor: torch.Tensor) -> int:
    """What tensors have in common that are views of one memory."""
    return tensor.untyped_storage().data_ptr() if is_ordinary(tensor) else id(tensor)


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is known, as that of a subclass is not."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
