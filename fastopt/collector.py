"""Python's garbage collector, out of the way while many objects are made that are not garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 10_000
"""Young objects: fewer are looked through in less than a millisecond."""


@contextmanager
def paused_collector() -> Iterator[None]:
    """Pause the cyclic garbage collector of this process, if it is on.

    It runs after every few hundred new containers and looks at all of the young ones, again and again at all there are.
    While a state is built, none of them is garbage, and none will be soon: if many were made, they come out of the
    pause old, and wait for the next full collection.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if gc.get_count()[0] > MANY:
            _age_young_objects()
        gc.enable()


_full_collections = -1
"""How many there had been when objects were last aged."""


def _age_young_objects() -> None:
    """Move all objects to the oldest generation, without looking at any.

    Done again only after a full collection: it puts off the next one, which must come where states are loaded over and
    over. Not done where a program has frozen its objects, as that would thaw them.
    """
    global _full_collections
    full_collections = gc.get_stats()[-1]["collections"]
    if full_collections == _full_collections or gc.get_freeze_count() > 0:
        return
    _full_collections = full_collections
    gc.freeze()
    gc.unfreeze()
