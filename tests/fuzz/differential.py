"""Damaged files of torch.save's, read by fastopt and by torch: what both read has to be the same.

What torch refuses is refused as well; but of a damaged directory torch may refuse what fastopt can read.
"""

import collections
import random
import struct
from pathlib import Path
from typing import Any

import torch

import fastopt
from fastopt.files import torch_file
from tests.fuzz.mutations import MUTATIONS, NUMBERS
from tests.oracle import TORCH_LOAD_STATE_DICT, TORCH_STATE_DICT, Comparison, adam, leaves, outcome, trained
from tests.torch_files import by_torch, write_archive

OPERATIONS = b"(.GJKMNQRX]abcehjqrstu)}\x80\x85\x86\x87\x88\x89\x8a"
"""Those of the pickles that torch writes."""

LARGEST = 1 << 24
"""Bytes of a tensor that is compared: few bytes of a file stand for very many where one is expanded."""


def content() -> Any:
    """A state with all that the native reader knows."""
    saved = TORCH_STATE_DICT(trained(adam(amsgrad=True)))
    ordered = collections.OrderedDict(a=1.5)
    ordered.label = "attribute"
    base = torch.arange(24.0)
    views = [base, base[3:7], base.view(4, 6).t(), torch.ones(1).expand(5), torch.ones(3, dtype=torch.uint16)]
    saved["more"] = {"ordered": ordered, "views": views, "again": [ordered, -(2**40), 2**20, None, (True, "ä")]}
    return saved


class Whole:
    """A whole file, and its records."""

    def __init__(self, folder: Path) -> None:
        torch.save(content(), folder / "whole.pt")
        self.file = (folder / "whole.pt").read_bytes()
        reader = torch._C.PyTorchFileReader(str(folder / "whole.pt"))
        self.pickle = reader.get_record("data.pkl")
        names = [name for name in reader.get_all_records() if name.startswith("data/") or name == "byteorder"]
        self.records = {name: reader.get_record(name) for name in names}


def set_operation(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.choice(OPERATIONS)


def set_integer(data: bytearray, rng: random.Random) -> None:
    """The argument of an operation that is a number."""
    operation, form = rng.choice([(b"K", "<B"), (b"M", "<H"), (b"J", "<i"), (b"h", "<B"), (b"q", "<B"), (b"X", "<I")])
    places = [place for place in range(len(data) - 5) if data[place : place + 1] == operation]
    if places:
        place, number = rng.choice(places) + 1, rng.choice([*NUMBERS, 3, 4, 5, 12, 24])
        size = struct.calcsize(form)
        data[place : place + size] = (number % 256**size).to_bytes(size, "little")


def swap(data: bytearray, rng: random.Random) -> None:
    """Two pieces change places, mostly short ones."""
    first, second = sorted(rng.sample(range(len(data)), 2))
    count = min(rng.choice([1, 2, 5, 40]), second - first)
    data[first : first + count], data[second : second + count] = (
        data[second : second + count],
        data[first : first + count],
    )


def damaged_pickle(whole: Whole, rng: random.Random, path: Path) -> None:
    """A whole archive around a damaged pickle."""
    data = bytearray(whole.pickle)
    for _ in range(rng.choice([1, 1, 2, 3])):
        rng.choice([set_operation, set_integer, set_integer, swap, *MUTATIONS])(data, rng)
        data = data or bytearray(b".")
    write_archive(path, bytes(data), whole.records)


def damaged_headers(whole: Whole, rng: random.Random, path: Path) -> None:
    """A file in whose headers and directory some bits or numbers are others."""
    data = bytearray(whole.file)
    for _ in range(rng.choice([1, 1, 2])):
        signature = rng.choice([b"PK\3\4", b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\7\x08"])
        places = [place for place in range(len(data) - 60) if data.startswith(signature, place)]
        if places:
            place = rng.choice(places) + rng.randrange(60)
            if rng.random() < 0.5:
                data[place] ^= 1 << rng.randrange(8)
            else:
                width = rng.choice([2, 4])
                data[place : place + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
    path.write_bytes(data)


KINDS = {"pickle": damaged_pickle, "headers": damaged_headers}


def held_against_torch(path: Path, kind: str) -> str:
    """What came of a file: read and refused by whom.

    Raises:
        AssertionError: fastopt and torch have read different things, or fastopt has read what torch refuses.
    """
    ours, refused = outcome(lambda: torch_file.read(path))
    if refused is not None:
        return "refused"
    theirs, torchs = outcome(lambda: by_torch(path))
    if torchs is not None:
        assert kind != "pickle", f"read, and torch raises {torchs!r}"
        return "refused by torch alone"
    try:
        if any(isinstance(leaf, torch.Tensor) and leaf.nbytes > LARGEST for leaf in leaves([ours, theirs])):
            return "read, and large"
        Comparison().same(ours, theirs)
    except RecursionError:
        return "read, and without end"
    except NotImplementedError:  # of dtypes that torch has in name only
        return "read, and without values"
    return "read, and loaded" if held_against_torchs_load(path, theirs) else "read"


def held_against_torchs_load(path: Path, theirs: Any) -> bool:
    """Whether both loads went well; what is loaded has to be the same."""
    actual, expected = (trained(adam(amsgrad=True), seed=1) for _ in range(2))
    _, refused = outcome(lambda: fastopt.load(actual, path))
    if refused is not None:
        return False
    _, torchs = outcome(lambda: TORCH_LOAD_STATE_DICT(expected, theirs))
    assert torchs is None, f"loaded, and torch raises {torchs!r}"
    Comparison().optimizers(actual, expected)
    return True
