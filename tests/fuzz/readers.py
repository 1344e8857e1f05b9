"""Damaged checkpoints, loaded: `python -m tests.fuzz.readers --seconds 60`, or `make fuzz`.

Each has to load; or to raise what is documented, name the file, and leave the optimizer as it was. Where a pickle or a
header is damaged, it has to be what torch loads. A crash or a hang of the process ends the run as well. The file that
did it is left in build/fuzz.
"""

import argparse
import faulthandler
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.optim import Optimizer

import fastopt
from fastopt.files import formats
from tests.fuzz import differential
from tests.fuzz.mutations import mutated
from tests.oracle import TORCH_STATE_DICT, adam, fingerprint, outcome, trained

ROOT = Path(__file__).parent.parent.parent
FOUND = ROOT / "build" / "fuzz"
HANG = 20
"""Seconds for one file; most take a millisecond."""

FORMATS = ("safetensors", "torch", "legacy")


def whole_files(folder: Path) -> dict[str, bytes]:
    """A small checkpoint in each format."""
    optimizer = trained(adam(amsgrad=True))
    for state in optimizer.state.values():
        state["history"] = [torch.arange(3), (1, None, float("inf"), b"x")]
    saved = TORCH_STATE_DICT(optimizer)
    formats.write(folder / "a.safetensors", saved)
    formats.write(folder / "a.pt", saved)
    torch.save(saved, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    files = (folder / name for name in ("a.safetensors", "a.pt", "legacy.pt"))
    return dict(zip(FORMATS, (file.read_bytes() for file in files), strict=True))


def is_documented(error: Exception, kind: str) -> bool:
    """Whether `fastopt.load` says that it raises this; for torch's files it says little."""
    if isinstance(error, MemoryError | RecursionError):
        return False
    if kind == "safetensors":
        return isinstance(error, fastopt.CheckpointError | OSError)
    return True


def some_optimizer() -> Optimizer:
    """What files are loaded into, one after the other until one is loaded."""
    return trained(adam(amsgrad=True), seed=1)


def attempt(optimizer: Optimizer, path: Path, data: bytes, kind: str, verify: bool) -> str:
    """Load a file of these bytes; returns what came of it.

    Raises:
        AssertionError: that is not what is documented.
    """
    path.write_bytes(data)
    before = fingerprint(optimizer)
    _, error = outcome(lambda: fastopt.load(optimizer, path, verify=verify))
    if error is None:
        return "loaded"
    text = "".join([str(error), *getattr(error, "__notes__", [])])
    assert is_documented(error, kind), f"{kind}: {type(error).__name__}: {error}"
    assert str(path) in text, f"the file is not named: {error!r}"
    assert fingerprint(optimizer) == before, f"the optimizer changed before {error!r}"
    return type(error).__name__


def work(seed: int, seconds: float, culprit: Path) -> None:
    """Try one damaged file after the other; the last one is left in `culprit` if the process does not survive it."""
    torch.set_num_threads(1)
    random_numbers, optimizer = random.Random(seed), some_optimizer()
    counts: dict[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as folder:
        whole, compared = whole_files(Path(folder)), differential.Whole(Path(folder))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            kind = random_numbers.choice((*FORMATS, *differential.KINDS))
            faulthandler.dump_traceback_later(HANG, exit=True)
            if kind in FORMATS:
                data = mutated(whole[kind], random_numbers.randrange(2**63))
                result = attempt(optimizer, culprit, data, kind, verify=random_numbers.random() < 0.5)
            else:
                differential.KINDS[kind](compared, random_numbers, culprit)
                result = differential.held_against_torch(culprit, kind)
            if result == "loaded":  # it holds whatever the file says, which may contain itself
                optimizer = some_optimizer()
            counts[kind, result] = counts.get((kind, result), 0) + 1
    faulthandler.cancel_dump_traceback_later()
    culprit.unlink(missing_ok=True)
    for (kind, result), count in sorted(counts.items()):
        print(f"{count:8,} {kind:12} {result}")
    print(f"{sum(counts.values()):8,} files, seed {seed}")


def main() -> int:
    """Run in a process of its own, which may crash."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="random by default, and printed")
    parser.add_argument("--culprit", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    if options.culprit is not None:
        faulthandler.enable()
        work(seed, options.seconds, options.culprit)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        culprit = Path(folder) / f"culprit-{seed}"
        command = [sys.executable, "-m", "tests.fuzz.readers", "--seconds", str(options.seconds), "--seed", str(seed)]
        code = subprocess.run([*command, "--culprit", str(culprit)], cwd=ROOT).returncode
        if culprit.exists():
            FOUND.mkdir(parents=True, exist_ok=True)
            kept = shutil.copy(culprit, FOUND)
            print(f"seed {seed}: exit code {code}; the file is {kept}", file=sys.stderr)
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
