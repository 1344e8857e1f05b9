"""Ctrl-C while the command line starts, which is nearly all the import of torch, and while it ends.

The package itself imports torch, before any module of the command line is there that could catch an interruption.
"""

import os
import signal
import sys
from typing import Any, NoReturn

LAST_WORDS = "fastopt: interrupted\n"

INTERRUPTED = 130
"""The exit code after Ctrl-C, as a shell has it."""


def is_command() -> bool:
    """Whether this process is `fastopt …` or `python -m fastopt …`."""
    program = (sys.argv or [""])[0]
    if program == "-m":  # Python looks for the module, for which it has to import the package
        _, _, rest = " ".join(sys.orig_argv).partition(" -m ")
        return rest.split(" ")[0] == "fastopt"
    return os.path.basename(program) == "fastopt"


def end(*_: Any) -> NoReturn:
    """End the process at once."""
    os.write(2, LAST_WORDS.encode())
    os._exit(INTERRUPTED)


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
