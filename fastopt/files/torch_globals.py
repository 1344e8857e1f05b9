"""The classes and functions that a file of `torch.save` needs and `torch.load(weights_only=True)` does not allow."""

import io
import pickle
import zipfile
from typing import IO, Any

from torch import _weights_only_unpickler
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

LEGACY_PICKLES = 4
"""Those at the beginning of a file from before torch 1.6; the last of these is the content."""


def unsafe_globals(file: IO[bytes]) -> list[str]:
    """All that would have to be allowed besides what is, for torch to load a file; none where nobody can tell.

    These are what its pickle names, and the classes of numpy's dtypes, which numpy makes of texts in it: torch asks for
    them as well, one after the other. Nothing is imported but numpy, if the file names it.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                [name] = [name for name in archive.namelist() if name.partition("/")[2] == "data.pkl"]
                return unsafe_globals_in(archive.read(name))
        file.seek(0)
        return unsafe(file, LEGACY_PICKLES)
    except Exception:  # of a file that is damaged, which is no business of this function's
        return []


def unsafe_globals_in(content: bytes) -> list[str]:
    """The same for a pickle."""
    return unsafe(io.BytesIO(content), 1)


def unsafe(file: IO[bytes], count: int) -> list[str]:
    """The same for so many pickles in a row."""
    names: set[str] = set()
    try:
        for _ in range(count):
            Unpickler(file, names).load()
    except Exception:  # pickle has many for what it cannot read, and the stand-ins cannot be everything
        return []
    allowed = _weights_only_unpickler._get_allowed_globals().keys()
    allowed |= _weights_only_unpickler._get_user_allowed_globals().keys()  # type: ignore[no-untyped-call]
    return sorted(names - allowed)


class Unpickler(pickle._Unpickler):  # the one in C makes room for as many objects as a damaged pickle says
    """Unpickles stand-ins for whatever a pickle names."""

    def __init__(self, file: IO[bytes], names: set[str]) -> None:
        super().__init__(file)
        self.names = names

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what has this name in Python 2, as pickles of protocol 2 have it."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.names.add(f"{module}.{name}")
        return type(name, (NumpyDtype if (module, name) == ("numpy", "dtype") else StandIn,), {"names": self.names})

    def get_extension(self, code: int) -> Any:
        """Nothing for a number of `copyreg`: what stands for it is the real thing, past `find_class`."""
        raise pickle.UnpicklingError(f"extension {code}")

    def persistent_load(self, _: Any) -> Any:
        """A storage."""
        return StandIn()


class StandIn:
    """Takes whatever a pickle gives it."""

    names: set[str]
    given: tuple[Any, ...]

    def __new__(cls, *given: Any, **_: Any) -> "StandIn":
        """As anything is made."""
        self = super().__new__(cls)
        self.given = given
        return self

    def take(self, *_: Any) -> None:
        """Anything."""

    __setstate__ = __setitem__ = append = extend = add = take


class NumpyDtype(StandIn):
    """A dtype, which is a class of its own: torch sets the state of none whose class is not allowed."""

    def __setstate__(self, _: Any) -> None:
        import numpy

        kind = type(numpy.dtype(self.given[0]))
        self.names.add(f"{kind.__module__}.{kind.__qualname__}")
