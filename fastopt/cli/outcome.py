"""What a command has to say, for people and for programs."""

import json
import math
from typing import Any, NamedTuple

SAME, DIFFERENT, FAILED = 0, 1, 2
"""Exit codes, as those of `diff`: 1 also stands for a file with flaws."""


class Outcome(NamedTuple):
    """The results of a command, and its exit code."""

    text: str
    code: int


def as_json(value: Any) -> str:
    """Strict JSON: what it has no word for (NaN, infinity, tensors) becomes a string."""
    return json.dumps(plain(value), indent=2, allow_nan=False, default=str)


def plain(value: Any) -> Any:
    """The same, with strings in place of the floats that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
