"""Python's garbage collector, out of the way while many objects are made that are not garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pause the cyclic garbage collector of this process, if it is on.

    It runs after every few hundred new containers and looks at all of the young ones, again and again at all there are.
    While a state is built, none of them is garbage.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
