"""The command `convert`: a state in another format, with other dtypes, or taken out of a larger checkpoint."""

import argparse
import os
import time
from typing import Any

import torch
from torch.serialization import safe_globals

from fastopt.cli import sources
from fastopt.cli.outcome import SAME, Outcome, as_json
from fastopt.files import formats
from fastopt.report import SaveReport
from fastopt.saving import converted
from fastopt.text import dtype_name
from fastopt.writing import count_tensors


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="write the state in a file to another: other format, other dtypes",
        description="The format of DST is that of its name: .safetensors, .dcp or a folder for "
        "torch.distributed.checkpoint, any other for torch.save. Tensors are written one by one. A SRC "
        "that is damaged, as its checksums have it, is not converted.",
    )
    command.add_argument("src")
    command.add_argument("dst")
    sources.add_options(command)
    command.add_argument(
        "--dtype",
        action="append",
        default=[],
        type=dtype_option,
        metavar="[KEY=]DTYPE",
        help="the dtype of floating state other than step, by its key or a pattern (the first that fits), or of all "
        "the rest: --dtype exp_avg=keep --dtype 'exp_*=float16' --dtype bfloat16",
    )
    command.add_argument("--force", action="store_true", help="replace DST if there is one")
    command.set_defaults(run=convert)
    return command


def dtype_option(text: str) -> tuple[str, str | torch.dtype]:
    """`KEY=DTYPE`, or a dtype for all."""
    key, _, name = text.rpartition("=")
    dtype = getattr(torch, name, None)
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise argparse.ArgumentTypeError(f"{name} is no floating dtype, and state cast to it would be destroyed")
        return key or "*", dtype
    if name == "keep":
        return key or "*", name
    raise argparse.ArgumentTypeError(f"{name!r} is no dtype of torch, such as bfloat16 or float32, nor 'keep'")


def convert(options: argparse.Namespace) -> Outcome:
    """Write the state of one file to another."""
    started = time.perf_counter()
    os.stat(options.src)  # what is missing is the first thing to know
    if os.path.lexists(options.dst) and not options.force:
        raise FileExistsError(f"{options.dst} is there already; --force replaces it")
    saved, has_checksums = sources.verified(options, options.src, options.key)
    try:
        for_all_last = sorted(options.dtype, key=lambda option: option[0] == "*")  # patterns hold in their order
        saved, dtypes, done = converted(saved, dict(for_all_last))
        with safe_globals(options.safe_global):  # so that they are in DST as they were in SRC
            formats.write(options.dst, saved, dtypes)
    except Exception as error:
        error.add_note(f"while converting {options.src}")
        raise
    seconds, written = time.perf_counter() - started, formats.size_of(options.dst)
    tensors = count_tensors(saved["state"])
    report = SaveReport(options.dst, tensors, written, seconds, done.casts, done.unused_patterns)
    if not options.json:
        return Outcome(str(report), SAME)
    casts = [
        {"from": dtype_name(source), "to": dtype_name(target), **vars(count)}
        for (source, target), count in report.casts.items()
    ]
    return Outcome(as_json({**vars(report), "casts": casts, "checksums": has_checksums}), SAME)
