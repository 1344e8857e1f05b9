"""The classes and functions that a file of `torch.save` needs and `torch.load(weights_only=True)` does not allow."""

import io
import pickle
import zipfile
from typing import IO, Any

from torch import _weights_only_unpickler

LEGACY_PICKLES = 4
"""Those at the beginning of a file from before torch 1.6; the last of these is the content."""


def unsafe_globals(file: IO[bytes]) -> list[str]:
    """All that would have to be allowed besides what is, for torch to load a file; none where nobody can tell.

    These are what its pickle names, and the classes of numpy's dtypes, which numpy makes of texts in it: torch asks for
    them as well, one after the other. Nothing is imported but numpy, if the file names it.
    """
    finder = Finder()
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                [name] = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
                finder.look_at(io.BytesIO(archive.read(name)))
        else:
            file.seek(0)
            for _ in range(LEGACY_PICKLES):
                finder.look_at(file)
    except Exception:  # a pickle that cannot be read to its end is no business of this function's
        return []
    return finder.unsafe()


def unsafe_globals_in(content: bytes) -> list[str]:
    """The same for a pickle."""
    finder = Finder()
    finder.look_at(io.BytesIO(content))
    return finder.unsafe()


class Finder:
    """Gathers what pickles need."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def look_at(self, file: IO[bytes]) -> None:
        """Read one pickle."""
        Unpickler(file, self.names).load()

    def unsafe(self) -> list[str]:
        """What is not allowed."""
        allowed = _weights_only_unpickler._get_allowed_globals().keys()
        allowed |= _weights_only_unpickler._get_user_allowed_globals().keys()  # type: ignore[no-untyped-call]
        return sorted(self.names - allowed)


class Unpickler(pickle._Unpickler):  # the one in C makes room for as many objects as a damaged pickle says
    """Unpickles stand-ins for whatever a pickle names."""

    def __init__(self, file: IO[bytes], names: set[str]) -> None:
        super().__init__(file)
        self.names = names

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in."""
        self.names.add(f"{module}.{name}")
        return type(name, (NumpyDtype if (module, name) == ("numpy", "dtype") else StandIn,), {"names": self.names})

    def persistent_load(self, _: Any) -> Any:
        """A storage."""
        return StandIn()


class StandIn:
    """Takes whatever a pickle gives it."""

    names: set[str]

    def __new__(cls, *given: Any, **_: Any) -> "StandIn":
        """As anything is made."""
        self = super().__new__(cls)
        self.given = given
        return self

    def __init__(self, *given: Any, **_: Any) -> None:
        self.given: tuple[Any, ...] = given

    def take(self, *_: Any) -> None:
        """Anything."""

    __setstate__ = __setitem__ = append = extend = add = take


class NumpyDtype(StandIn):
    """A dtype, which is a class of its own: torch sets the state of none whose class is not allowed."""

    def __setstate__(self, _: Any) -> None:
        import numpy

        kind = type(numpy.dtype(self.given[0]))
        self.names.add(f"{kind.__module__}.{kind.__qualname__}")
