"""torch.distributed.checkpoint in one process, as the oracle."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def torch_save(content: dict[str, Any], folder: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process alone
        torch_dcp.save(content, checkpoint_id=folder, no_dist=True, **options)


def torch_load(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill the tensors of the content, and replace its other values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.load(content, checkpoint_id=folder, no_dist=True)
    return content


def torch_content(folder: Path) -> dict[str, Any]:
    """All that a folder holds, with strings for ids."""
    content: dict[str, Any] = {}
    reader = torch_dcp.FileSystemReader(folder)
    _load_state_dict(content, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return content


def metadata_of(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())  # type: ignore[no-any-return]


def doctor(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Change what the metadata of a folder says."""
    metadata = metadata_of(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
