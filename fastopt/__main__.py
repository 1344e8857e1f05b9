"""`python -m fastopt`."""

import sys

from fastopt.cli import command

sys.exit(command())
