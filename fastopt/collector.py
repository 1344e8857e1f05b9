"""Python's garbage collector, out of the way while many objects are made that are not garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 10_000
"""Containers: fewer are looked through in less than a millisecond."""


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pause the cyclic garbage collector of this process, if it is on.

    It runs after every few hundred new containers and looks at all of the young ones, again and again at all there are.
    While a state is built, none of them is garbage, and none will be soon: if there are many more of them after the
    pause than before it, all that is young comes out of it old.
    """
    if not gc.isenabled():
        yield
        return
    try:  # first: a KeyboardInterrupt may come between any two lines
        gc.disable()
        young = gc.get_count()[0]
        yield
        if gc.get_count()[0] - young > MANY:
            _age_young_objects()
    finally:
        gc.enable()


_full_collections = -1
"""How many there had been when objects were last aged."""


def _age_young_objects() -> None:
    """Move all objects of the process to the oldest generation, where only a full collection looks for garbage.

    That starts the count to the next one anew. It must come all the same where states are loaded over and over, so
    objects are not aged again before it has. Nor are they where some are frozen: they would be thawed.
    """
    global _full_collections
    full_collections = gc.get_stats()[-1]["collections"]
    if full_collections == _full_collections or gc.get_freeze_count() > 0:
        return
    _full_collections = full_collections
    try:
        gc.freeze()
    finally:
        gc.unfreeze()
