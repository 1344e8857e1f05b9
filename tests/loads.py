"""What the tests of `load_state_dict()` share: state dicts, values of all kinds, and a load of twins."""

import dataclasses
import re
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy
import torch
from torch.overrides import TorchFunctionMode

import fastopt
from tests.oracle import Bare, assert_same_load, bits, fingerprint, parameter, torch_load

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Point = namedtuple("Point", "x y")


def saved(state, params=(0,), **group):
    """A state dict of one group."""
    return {"state": state, "param_groups": [{"params": list(params), **group}]}


def load_both(make_optimizer, state_dict, copy):
    """A twin each for fastopt and torch, loaded with the same dict and compared; fastopt's, and its report."""
    actual, expected = make_optimizer(), make_optimizer()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Casting complex values|ComplexHalf support")
        torch_load(expected, state_dict, copy=copy)
        before = fingerprint(state_dict)
        report = fastopt.load_state_dict(actual, state_dict, copy=copy)
    assert fingerprint(state_dict) == before
    assert_same_load(actual, expected, given=state_dict, given_to_torch=state_dict, copy=copy)
    return actual, report


def load_value(value, copy, param=None, **group):
    """What becomes of a parameter's whole state."""
    params = [parameter(3, 4) if param is None else param]
    optimizer, _ = load_both(lambda: Bare(params), saved({0: value}, **group), copy)
    return optimizer.state[params[0]]


def tensor(*shape, dtype=torch.float32, seed=0):
    """Values of a dtype that are all bit patterns, NaN and infinities among them."""
    if dtype is torch.bool:
        return torch.arange(torch.Size(shape).numel()).reshape(shape) % 2 == 0
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


@dataclasses.dataclass
class Opaque:
    content: object


class Listlike(list):
    pass


class Mapped(dict):
    pass


def values():
    free = tensor(3, 4, dtype=torch.float64)
    kept = tensor(3, 4)
    return {
        "a bare tensor": tensor(3, 4, dtype=torch.float64),
        "a bare list": [free, kept, {"step": free}],
        "None": None,
        "a number": 3.5,
        "subclasses of dict": OrderedDict(a=free, b=defaultdict(list, c=kept), d=Mapped(step=kept)),
        "a nested step": {"deep": {"step": tensor(1, dtype=torch.float64), "deeper": {"step": tensor(1)}}},
        "a step in a list": {"step": [tensor(2, dtype=torch.float64), {"step": tensor(2, dtype=torch.float64)}]},
        "steps": {"step": tensor(dtype=torch.int64), "steps": tensor(dtype=torch.int64), "Step": free},
        "lists of tensors": {"old_dirs": [free, free, kept, kept], "al": [None, free], "empty": []},
        "tuples": {"t": (free, (kept, 1)), "empty": ()},
        "sets": {"s": {1, 2.5, None}, "f": frozenset({1, 2}), "empty": set()},
        "deques": deque([free, 1]),
        "bytes": {"b": b"bytes", "ba": bytearray(b"array"), "size": torch.Size([1, 2])},
        "a subclass of list": Listlike([free, kept]),
        "objects": {"o": (one := Opaque(kept)), "again": one, "type": int, "dtype": torch.int8},
        "numbers": {"i": 1, "f": float("nan"), "c": 2j, "b": True, "np": numpy.float32(3)},
        "an object twice": {"a": free, "b": free, "c": kept, "d": kept, "l": (same := [kept]), "m": same},
        "keys": {1: free, None: kept, (1, "step"): free, 2.5: {"step": free}, False: kept, Point(1, 2): kept},
        "a dict without entries": {},
        "complex": {"c": tensor(3, 4, dtype=torch.complex64)},
        "numbers in a Counter": Counter(a=1, b=2),
    }


NOTE = re.compile(
    r"inplace: of (\d+) tensors?, filled: (.*?)(?:; filled in part, wholly or not at all: (.*))?"
    r"\. All else of the optimizer is as it was"
)


def places_in(text):
    """(place, index of the parameter) of all that a part of a note names."""
    found = set()
    for place, numbers in re.findall(r"(state\S*) of parameter ([-\d, ]*\d)", text or ""):
        for span in numbers.split(", "):
            first, _, last = span.partition("-")
            found |= {(place, index) for index in range(int(first), int(last or first) + 1)}
    return found


def held_tensors(optimizer):
    """The tensors of states that are flat dicts, by place and index of the parameter."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        (f"state[{key!r}]", index): value
        for index, param in enumerate(params)
        for key, value in optimizer.state.get(param, {}).items()
        if isinstance(value, torch.Tensor)
    }


def assert_filled_as_the_note_says(error, optimizer, twin, state_dict):
    """After a failed load in place: what the note names is filled, all else is that of a twin that was not loaded."""
    [note] = [note for note in error.__notes__ if note.startswith("inplace: ")]
    count, filled, in_doubt = NOTE.fullmatch(note).groups()
    filled, in_doubt = places_in(filled), places_in(in_doubt)
    held, before = held_tensors(optimizer), held_tensors(twin)
    assert int(count) == len(held)
    assert filled | in_doubt
    assert not filled & in_doubt
    assert filled | in_doubt <= held.keys()
    for (place, index), tensor in held.items():
        if (place, index) in filled:
            assert bits(tensor).tobytes() == bits(state_dict["state"][index][place[7:-2]].to(tensor.dtype)).tobytes()
        elif (place, index) not in in_doubt:
            assert bits(tensor).tobytes() == bits(before[place, index]).tobytes(), (place, index)
    groups = [
        [{key: value for key, value in group.items() if key != "params"} for group in one.param_groups]
        for one in (optimizer, twin)
    ]
    assert groups[0] == groups[1]


class FunctionLog(TorchFunctionMode):
    def __init__(self):
        self.calls = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))
