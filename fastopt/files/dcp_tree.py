"""Nested content, and the flat entries that torch.distributed.checkpoint makes of it.

Entries have the keys of the content's dicts as strings. An optimizer's ids, which are ints, are found in its groups.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fastopt.errors import CheckpointError
from fastopt.files.dcp_metadata import DEEPEST, KeyPath, shown

ATOMS = (int, float, bool, str, type(None))
"""Types of most values: the ids of an optimizer's groups may be very many."""


def leaves(content: Mapping[Any, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """What is saved as an entry each, with its path.

    As torch.distributed.checkpoint has it, a list is an entry if nothing in it is one, and a tuple always is. An empty
    dict, which torch leaves out, is an entry as well.
    """
    for key, value in content.items():
        yield from leaves_of(value, (*path, str(key)))


def leaves_of(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """The entries of a value at a path."""
    if len(path) > DEEPEST:
        raise ValueError(f"{name_of(path)[:100]}… is nested deeper than {DEEPEST} levels")
    if type(value) is torch.Tensor:  # as nearly all are
        yield path, value
    elif isinstance(value, Mapping) and value:
        yield from leaves(value, path)
    elif isinstance(value, list) and any(map(holds_entries, value)):
        for index, item in enumerate(value):
            yield from leaves_of(item, (*path, index))
    else:
        yield path, value


def holds_entries(value: Any) -> bool:
    """Whether a list is taken apart for this item."""
    if type(value) in ATOMS:
        return False
    return isinstance(value, torch.Tensor | Mapping) or (isinstance(value, list) and any(map(holds_entries, value)))


def name_of(path: KeyPath) -> str:
    """The name of an entry: `state.0.exp_avg`."""
    return ".".join(map(str, path))


class Node(dict[Any, Any]):
    """A dict or list that is being put together, which a dict that is an entry's value is not."""


def tree(entries: Iterable[tuple[KeyPath, Any]]) -> dict[Any, Any]:
    """The content that entries were made of.

    Raises:
        CheckpointError: the paths contradict each other.
    """
    root = Node()
    for path, value in entries:
        node: Any = root
        for key in path[:-1]:
            node = node.setdefault(key, Node()) if isinstance(node, Node) else None
        if not isinstance(node, Node) or path[-1] in node:
            raise CheckpointError(f"entry {name_of(path)!r} stands where another one does")
        node[path[-1]] = value
    return with_ids(finished(root, ()))  # type: ignore[no-any-return]


def finished(value: Any, path: KeyPath) -> Any:
    """A node as what it is: a list where its keys are indices."""
    if not isinstance(value, Node):
        return value
    items = {key: finished(item, (*path, key)) if isinstance(item, Node) else item for key, item in value.items()}
    indices = [key for key in items if type(key) is int]
    if not indices:
        return items
    if len(indices) < len(items) or sorted(indices) != list(range(len(indices))):
        raise CheckpointError(f"the items of list {name_of(path)!r} are {shown(list(items))}")
    return [items[index] for index in range(len(items))]


def with_ids(content: Any) -> Any:
    """The content with the ids of optimizers as their groups have them.

    An optimizer that has no state yet leaves no entry for it; its dict is there again.
    """
    if isinstance(content, list):
        return [with_ids(item) for item in content]
    if type(content) is not dict:
        return content
    groups = content.get("param_groups")
    if not (isinstance(groups, list) and groups and all(map(is_group, groups))):
        return {key: with_ids(value) for key, value in content.items()}
    ids = {str(saved_id): saved_id for group in groups for saved_id in group["params"] if type(saved_id) is int}
    state = content.get("state", {})
    if isinstance(state, dict):
        state = {ids.get(key, key): value for key, value in state.items()}
    content = content if "state" in content else {"state": {}, **content}
    return {**content, "state": state}


def is_group(value: Any) -> bool:
    """Whether a value looks like a param group of a state dict."""
    return isinstance(value, dict) and isinstance(value.get("params"), list)


def check_reversible(content: Any, again: Any, place: str = "") -> None:
    """Raise if content does not come back as it was.

    Raises:
        TypeError: a key would come back as another one; the text says where.
    """
    if isinstance(content, Mapping):
        if len(content) != len(again):
            raise TypeError(f"{place or 'the content'} has param_groups and no state, which would come back empty")
        for (key, value), other in zip(content.items(), again, strict=True):
            if type(key) is not type(other) or key != other:
                raise TypeError(
                    f"the key {key!r} of {place or 'the content'} is a {type(key).__name__}, and would come back as "
                    f"{other!r}: torch.distributed.checkpoint keeps strings, and the ids of an optimizer's groups"
                )
            if type(value) is not torch.Tensor:
                check_reversible(value, again[other], f"{place}[{key!r}]")
    elif isinstance(content, list) and isinstance(again, list):
        for index, (item, other) in enumerate(zip(content, again, strict=True)):
            if type(item) not in ATOMS:
                check_reversible(item, other, f"{place}[{index}]")
