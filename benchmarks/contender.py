"""The process of one contender: builds the input, measures one call, and prints one line of JSON."""

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict

import torch

import fastopt
from benchmarks import memory, questions
from benchmarks.question import AnyQuestion, Size
from benchmarks.results import Measurement

UNTIL_THREADS_SLEEP = 0.05
"""Seconds. After some work OpenMP's threads spin for a while, on the cores and the clock of what is measured."""


def measure(question: AnyQuestion, name: str, size: Size) -> Measurement:
    contender = question.contender(name)
    size = dict(size)
    if (threads := size.pop("threads", None)) is not None:
        torch.set_num_threads(threads)
    contender.prepare(question.build(**size | question.warm_up))()

    before_input = memory.current_rss()
    work = question.build(**size)
    call = contender.prepare(work)
    gc.collect()
    # last: a virtual machine hands free memory back to its host from two seconds after it became free
    memory.touch(max(memory.current_rss() - before_input, work.fresh_memory))
    time.sleep(UNTIL_THREADS_SLEEP)
    memory.forget_peak()
    before = memory.current_rss()

    cpu_started, started = time.process_time(), time.perf_counter()
    result = call()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started

    peak = memory.peak_rss()
    del result  # freed after the clock has stopped
    return Measurement(
        seconds, cpu_seconds, peak, peak - before, work.bytes_read, work.bytes_written, fastopt.backend().name
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contender", description=__doc__)
    parser.add_argument("--question", required=True, choices=questions.names())
    parser.add_argument("--contender", required=True)
    parser.add_argument("--size", required=True, type=json.loads, help="arguments of the question's build, as JSON")
    arguments = parser.parse_args()
    measurement = measure(questions.find(arguments.question), arguments.contender, arguments.size)
    sys.stdout.write(json.dumps(asdict(measurement)) + "\n")


if __name__ == "__main__":
    main()
