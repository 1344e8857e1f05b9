"""States without their tensors' data, as JSON that keeps every type.

What JSON has a word for is that: null, true and false, strings, lists, integers up to 2**53, finite floats (always with
a point or an exponent, and with as many digits as they need), and dicts whose keys are strings. All else is an object
with one key that begins with "$":

    {"$tuple": [...]}                a tuple
    {"$dict": [[key, value], ...]}   a dict with other keys than strings, or with one that begins with "$"
    {"$int": "0x3fffffffffffff"}     an integer beyond 2**53, which not every reader of JSON keeps exact
    {"$float": "inf"}                "inf", "-inf" or "nan"
    {"$bytes": "AP8="}               bytes, in base64
    {"$dtype": "bfloat16"}           a torch.dtype
    {"$device": "cuda:0"}            a torch.device
    {"$size": [3, 4]}                a torch.Size
    {"$tensor": "state.0.exp_avg"}   a tensor, by its name in the file

Beside "$tensor", the object holds what the file's format says of a tensor besides. Keys of a "$dict" are of the same
form. The order of dicts is kept.
"""

import base64
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import torch

Json = Any
"""What `json.dumps` takes."""

Path = tuple[Any, ...]
"""The keys and indices that lead to a value."""

Refer = Callable[[torch.Tensor, Path], dict[str, Json]]
"""Gives a tensor a name, and returns the object that stands for it: {"$tensor": name, ...}."""

Resolve = Callable[[dict[str, Any]], torch.Tensor]
"""The tensor that such an object stands for."""

EXACT = 2**53
"""The integers that every reader of JSON keeps as they are, as it may make them float64."""

DEPTH = 64
"""Levels of containers; far below what Python's stack and its reader of JSON allow."""

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

SUPPORTED = "None, bool, int, float, str, bytes, list, tuple, dict, torch.dtype, torch.device, torch.Size and tensors"


def place(path: Path) -> str:
    """A path for people: `state[3]['exp_avg']`."""
    if not path:
        return "the content"
    first, *rest = path
    return (first if isinstance(first, str) else f"[{first!r}]") + "".join(f"[{key!r}]" for key in rest)


def encode(value: Any, refer: Refer, path: Path = ()) -> Json:
    """A value in the form that this module's docstring describes.

    Raises:
        TypeError: a value's type is none of these, that of a subclass included; the text says where it stands.
        ValueError: it nests too deeply, or contains itself.
    """
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is int:
        return value if abs(value) <= EXACT else {"$int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, torch.Tensor):
        return refer(value, path)
    if len(path) > DEPTH:
        raise ValueError(f"{place(path[:3])} nests more than {DEPTH} levels deep, or contains itself")
    if kind is dict:
        return encode_dict(value, refer, path)
    if kind is list:
        return [encode(item, refer, (*path, index)) for index, item in enumerate(value)]
    if kind is tuple:
        return {"$tuple": [encode(item, refer, (*path, index)) for index, item in enumerate(value)]}
    return encode_rare(value, path)


def encode_dict(value: dict[Any, Any], refer: Refer, path: Path) -> Json:
    """A JSON object where that is the same; otherwise pairs."""
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: encode(item, refer, (*path, key)) for key, item in value.items()}
    pairs = []
    for key, item in value.items():
        inner = (*path, key)
        pairs.append([encode(key, refuse_key, inner), encode(item, refer, inner)])
    return {"$dict": pairs}


def refuse_key(tensor: torch.Tensor, path: Path) -> NoReturn:
    """A `Refer` for keys."""
    raise TypeError(f"{place(path[:-1])} has a tensor as a key, which this format cannot hold")


def encode_rare(value: Any, path: Path) -> Json:
    """What hardly occurs in the state of an optimizer."""
    kind = type(value)
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is torch.dtype:
        return {"$dtype": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {"$device": str(value)}
    if kind is torch.Size:
        return {"$size": list(value)}
    raise TypeError(f"{place(path)} is of type {kind.__module__}.{kind.__qualname__}; this format holds {SUPPORTED}")


def decode(text: str, resolve: Resolve) -> Any:
    """The value that `encode` was given.

    Raises:
        ValueError: the text is none that `encode` made, or `resolve` raised it.
    """

    def typed(pairs: list[tuple[str, Any]]) -> Any:
        """What an object stands for, of which all below it is typed already."""
        if pairs and pairs[0][0].startswith("$"):
            return decode_tagged(dict(pairs), pairs[0][0], pairs[0][1], resolve)
        return without_duplicates(pairs)

    try:
        return json.loads(text, object_pairs_hook=typed, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def decode_tagged(attributes: dict[str, Any], tag: str, value: Any, resolve: Resolve) -> Any:
    """The value of an object whose key begins with "$"."""
    if tag == "$tensor":
        return resolve(attributes)
    decoder = DECODERS.get(tag)
    if decoder is None or len(attributes) != 1:
        raise ValueError(f"an object with the keys {list(attributes)} stands for nothing")
    try:
        return decoder(value)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{tag} of {value!r:.100} stands for nothing") from error


def without_duplicates(pairs: list[Any]) -> dict[Any, Any]:
    """A dict of pairs, each with a key of its own."""
    result = dict(pairs)
    if len(result) != len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} stands twice in a dict")
    return result


def refuse_constant(name: str) -> NoReturn:
    """Refuse the NaN and Infinity that Python's reader takes."""
    raise ValueError(f"{name} is no JSON")


def checked_list(value: Any) -> list[Any]:
    """A list, and nothing else that one could iterate over."""
    if type(value) is not list:
        raise TypeError(f"{value!r:.100} is no list")
    return value


NOT_FINITE = {str(value): value for value in (math.inf, -math.inf, math.nan)}

DECODERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": lambda value: tuple(checked_list(value)),
    "$dict": lambda value: without_duplicates(checked_list(value)),
    "$int": lambda value: int(value, 16),
    "$float": lambda value: NOT_FINITE[value],
    "$bytes": lambda value: base64.b64decode(value, validate=True),
    "$dtype": lambda value: DTYPES[value],
    "$device": torch.device,
    "$size": lambda value: torch.Size(checked_list(value)),
}
