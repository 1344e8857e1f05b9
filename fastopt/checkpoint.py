"""Optimizer states in files."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, overload

import torch
from torch.optim import Optimizer

from fastopt.background import await_saves, in_background, raise_unasked
from fastopt.casting import Cast
from fastopt.errors import NoStateDictError
from fastopt.files import formats
from fastopt.files.in_file import where_cut_short
from fastopt.files.torch_file import SafeGlobal
from fastopt.flattened import is_flattened, unflattened
from fastopt.inspection.places import places
from fastopt.policy import Devices, DTypes, Policy
from fastopt.report import LoadReport, SaveReport
from fastopt.snapshot import snapshot
from fastopt.state_dict import MakeCast, StateDict, cast_by, load_checked
from fastopt.text import listed
from fastopt.writing import Ready, ready, write_in_turn, write_ready

DEPTH = 3
"""Levels of a checkpoint at which a state dict is looked for, to say where one is."""


@overload
def save(
    optimizer: Optimizer,
    path: str | os.PathLike[str],
    *,
    dtype: DTypes | None = None,
    background: Literal[False] = False,
) -> SaveReport: ...


@overload
def save(
    optimizer: Optimizer, path: str | os.PathLike[str], *, dtype: DTypes | None = None, background: Literal[True]
) -> Future[SaveReport]: ...


@overload
def save(
    optimizer: Optimizer, path: str | os.PathLike[str], *, dtype: DTypes | None = None, background: bool
) -> SaveReport | Future[SaveReport]: ...


def save(
    optimizer: Optimizer, path: str | os.PathLike[str], *, dtype: DTypes | None = None, background: bool = False
) -> SaveReport | Future[SaveReport]:
    """Write the state of an optimizer to a file or a folder, in the format that its name asks for (docs/formats.md).

    A name that ends with `.safetensors`, in upper or lower case, makes it a file of the safetensors library; one that
    ends with `.dcp` or `/`, or that is a folder's, a folder of torch.distributed.checkpoint; any other, a file that
    `torch.load(path, weights_only=True)` reads. What is there is replaced at once and as a whole, and is on the disk
    when this is done: after a crash or a loss of power at any moment the old file or the new one is there, whole. The
    hooks of saving run.

    Args:
        optimizer: the optimizer; its state must not change meanwhile, unless it is saved in the background.
        path: the file or folder. A symbolic link stays one, and what it leads to is replaced.
        dtype: a floating dtype for the saved copy of floating state other than `step`; None keeps the dtypes. Or a dict
            by key, as the `policy` of `load_state_dict`; keys that it does not fit keep theirs. Tensors are cast piece
            by piece as they are written.
        background: whether to write in a thread, and to return as soon as there is a `snapshot` of the state in the
            CPU's memory, which takes as long as copying it. One optimizer has at most one such copy: where its previous
            save in the background is not done, this one waits for it first. Those of several optimizers are written one
            after the other. Saves to one path are done in the order in which they were asked for, whichever kind they
            are. At exit, saves that are under way are finished; an interruption ends that.

    Returns:
        The report; with `background` a Future whose result it is, and whose `result()` raises the errors of writing.

    Raises:
        OSError: it cannot be written; or there is something else than a file or a checkpoint's folder.
        TypeError, ValueError: the state holds something that has no place in the format, as what
            `torch.load(weights_only=True)` would not read, and the text says where; or `dtype` makes no policy.
        BackgroundSaveError: an earlier save in the background, to whatever path, has failed, and nobody has asked its
            Future; this save is done all the same, or goes on in the background. Where no other save follows, the error
            is written to stderr at exit, and the exit code is 120.

    After any error of this save an existing file is as it was.
    """
    if background:
        place = os.fsdecode(path)
        if not os.path.isabs(place):  # the process may be elsewhere when it is written
            place = os.path.join(os.getcwd(), place)
        future = in_background(optimizer, place, partial(copied, optimizer, dtype), partial(write_ready, path, place))
        raise_unasked(f"the save to {os.fspath(path)} goes on in the background", future)
        return future
    return write_in_turn(path, partial(ready, optimizer, dtype))


def copied(optimizer: Optimizer, dtype: DTypes | None) -> Ready:
    """A copy of the state of an optimizer, cast already, as that takes less memory and no more time."""
    started = time.perf_counter()
    taken = snapshot(optimizer, dtype=dtype)
    return Ready(started, taken.state_dict(), None, taken.report)


def load(
    optimizer: Optimizer,
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    transform: Callable[[StateDict], StateDict] | None = None,
    safe_globals: Iterable[SafeGlobal] = (),
    verify: bool = False,
    policy: DTypes | None = None,
    device: Devices = "param",
    inplace: bool | Literal["auto"] = False,
    audit: bool = False,
) -> LoadReport:
    """Load a state into an optimizer from a file that `torch.save` or `fastopt.save` wrote, by what is in it.

    The bytes go from the file to where they belong once, and are cast on the way: no copy of the file or of its state
    is made in memory. No code of the file's runs, and no class of it is imported.

    Args:
        optimizer: the optimizer to fill.
        path: a file with a state dict, or with a larger checkpoint that holds one; or a folder of
            torch.distributed.checkpoint. It must not be cut short meanwhile, which the native backend finds to be an
            error, while the other one dies of it.
        key: where in the checkpoint the state dict is: `"optimizer"`, or a path of keys and indices as
            `"optimizer_states.0"`, which is Lightning's. None: the whole file is the state dict.
        transform: what is done to the state dict before it is loaded, as `lambda saved: fastopt.match(saved,
            optimizer)`. It gets the tensors of the file, not read yet, and returns a state dict.
        safe_globals: classes and functions that the file may name besides those that `torch.load(weights_only=True)`
            takes; one that has another name in the file, in a tuple with it.
        verify: whether all of the file's data is read once more before, and held against its checksums.
        policy: as in `load_state_dict`; so are the others.
        device: the device that state goes to.
        inplace: whether it goes into the tensors that the optimizer already holds.
        audit: whether what casts do to values is counted.

    Returns:
        The report of the load; its time is that of reading and loading.

    Raises:
        OSError: the file cannot be opened.
        CheckpointError: it is no checkpoint, or a damaged one, or a file that was written to meanwhile; or it has no
            checksums and `verify` asks for them.
        UnsafeGlobalsError (a pickle.UnpicklingError): the file names classes or functions that are not allowed; the
            text lists them.
        NoStateDictError (a KeyError): there is no state dict at `key`; the text says where there are some.
        BackgroundSaveError: what was to be saved to the path could not be, and nobody has asked the save's Future.
        Exception: what torch raises for a file that is damaged, or what `load_state_dict` raises.

    After any error the optimizer is as it was, as far as `load_state_dict` says.
    """
    await_saves(path)
    started = time.perf_counter()
    check = formats.check_of_change(path)
    saved = read_state_dict(path, key, safe_globals, verify)
    if transform is not None:
        saved = transform(saved)
    fresh = transform is None  # else what is in memory may be another state than what is in the file

    def options() -> MakeCast:
        make_cast = cast_by(saved, True, Policy(policy, device), inplace, False, audit, reads_files=fresh)
        return lambda *arguments: checking(make_cast(*arguments), check)

    try:
        report = load_checked(optimizer, saved, options)
    except Exception as error:
        if isinstance(error, OSError):
            note_cut_short(error, saved)
        error.add_note(f"while loading {os.fspath(path)}")
        raise
    report.seconds = time.perf_counter() - started
    return report


def checking(cast: Cast, check: Callable[[], None]) -> Cast:
    """A cast that looks at what it has read from before the optimizer changes."""
    cast.check_source = check
    return cast


def note_cut_short(error: OSError, saved: StateDict) -> None:
    """Add to an error of reading the first entry that its file, cut short meanwhile, does not hold any more."""
    for saved_id, entry in saved["state"].items():
        for place in places(entry):
            if isinstance(place.value, torch.Tensor) and (lacking := where_cut_short(place.value)):
                error.add_note(f"{place.path} of parameter {saved_id!r} {lacking}")
                return


def read_state_dict(
    path: str | os.PathLike[str],
    key: str | None = None,
    safe_globals: Iterable[SafeGlobal] = (),
    verify: bool = False,
) -> StateDict:
    """The state dict that a file holds, whose tensors are not read yet.

    Raises:
        NoStateDictError: there is none at `key`.
        Exception: what `formats.read` raises.
    """
    if not (key is None or isinstance(key, str)):
        raise TypeError(
            f"key is {key!r:.100}, a {type(key).__name__}, and not a str, as 'optimizer' or 'optimizer_states.0'"
        )
    content = formats.read(path, checked_globals(safe_globals), verify)
    found = content if key is None else value_at(content, key)
    if is_flattened(found):
        found = unflattened(found)
    if not is_state_dict(found):
        there = (
            f"{os.fspath(path)} is no state dict" if key is None else f"{os.fspath(path)} has no state dict at {key!r}"
        )
        candidates = list(state_dicts_in(content))
        raise NoStateDictError(there if candidates else there + top_level(content), candidates)
    return found  # type: ignore[no-any-return]


def checked_globals(given: Iterable[SafeGlobal]) -> list[SafeGlobal]:
    """What the caller allows.

    Raises:
        TypeError: it is no list, or something in it is no class or function.
    """
    if isinstance(given, str) or callable(given) or not isinstance(given, Iterable):
        raise TypeError(f"safe_globals is {given!r:.100}, and not a list of classes and functions")
    allowed = list(given)
    for index, item in enumerate(allowed):
        what, *names = item if isinstance(item, tuple) else (item,)
        if not callable(what) or not all(isinstance(name, str) for name in names) or len(names) > 1:
            raise TypeError(
                f"safe_globals[{index}] is {item!r:.100}, and not a class or function, nor a tuple of one and its name "
                "in the file"
            )
    return allowed


def value_at(content: Any, key: str) -> Any:
    """The value at a path of keys and indices; None where there is none."""
    if isinstance(content, Mapping) and key in content:
        return content[key]
    first, dot, rest = key.partition(".")
    if isinstance(content, Mapping):
        options = [first, int(first)] if first.isdecimal() else [first]
        inner = next((content[option] for option in options if option in content), None)
    elif isinstance(content, list | tuple) and first.isdecimal() and int(first) < len(content):
        inner = content[int(first)]
    else:
        return None
    return value_at(inner, rest) if dot else inner


def is_state_dict(value: Any) -> bool:
    """Whether a value looks like the state dict of an optimizer."""
    return isinstance(value, Mapping) and "state" in value and "param_groups" in value


def state_dicts_in(content: Any, path: str = "", depth: int = 0) -> Iterator[str]:
    """The paths of all state dicts within a checkpoint."""
    if is_state_dict(content):
        if path:
            yield path
    elif depth < DEPTH:
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(content, Mapping):
            items = content.items()
        elif isinstance(content, list | tuple):
            items = enumerate(content)
        for key, value in items:
            yield from state_dicts_in(value, f"{path}.{key}" if path else str(key), depth + 1)


def top_level(content: Any) -> str:
    """What a file holds instead, for an error."""
    if not isinstance(content, Mapping):
        return f", but a {type(content).__name__}"
    keys: Sequence[str] = [repr(key) for key in content]
    return f"; it holds {listed(keys[:8], len(keys))}" if keys else "; it is empty"
