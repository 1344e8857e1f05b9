"""What an audit costs, in one process: `python -m benchmarks.audit_cost [--rounds N] [--output FILE]`.

The question `options` has processes of their own for loads with and without an audit, which differ by what memory each
of them gets; that is as much as the audit may cost. Here the two take turns in one process, in either order.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fastopt
from benchmarks.machine import this_machine
from benchmarks.optimizers import LoadWork
from benchmarks.questions.options import CASES, random_load_work
from benchmarks.runner import ROOT


def seconds(work: LoadWork, audit: bool) -> float:
    gc.collect()
    started = time.perf_counter()
    fastopt.load_state_dict(work.optimizer, work.state_dict, copy=False, audit=audit)
    return time.perf_counter() - started


def compared(size: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The times of all rounds but the first of each, and the median with an audit over that without."""
    work = random_load_work(**size)
    times: dict[bool, list[float]] = {False: [], True: []}
    for index in range(rounds + 1):
        for audit in (False, True) if index % 2 == 0 else (True, False):
            times[audit].append(seconds(work, audit))
    without, with_audit = times[False][1:], times[True][1:]
    return {
        "without": without,
        "with": with_audit,
        "ratio": statistics.median(with_audit) / statistics.median(without),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "audit_cost.json")
    arguments = parser.parse_args()
    found = {}
    for case in CASES:
        found[case.label] = compared(case.size, arguments.rounds)
        sys.stdout.write(f"{case.label}: {found[case.label]['ratio']:.3f} of the time without an audit\n")
        sys.stdout.flush()
    content = {"backend": fastopt.backend().name, "machine": asdict(this_machine()), "cases": found}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
