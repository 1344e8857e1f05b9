"""torch.distributed.checkpoint in one process, as the oracle."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
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


def save_in_chunks(content: dict[str, Any], folder: Path) -> None:
    """Save a state dict as two ranks do that hold half of each tensor."""
    flat = {
        f"state.{index}.{key}": tensor for index, entry in content["state"].items() for key, tensor in entry.items()
    }
    whole = {name: tensor for name, tensor in flat.items() if tensor.dim() == 0}
    cut = {name: tensor for name, tensor in flat.items() if tensor.dim() > 0}
    halves = {f"{name}.{half}": part.clone() for name, one in cut.items() for half, part in enumerate(one.chunk(2))}
    torch_save({**whole, **halves, "param_groups": content["param_groups"]}, folder)

    def join(metadata: Metadata) -> None:
        for name, tensor in cut.items():
            chunks = []
            for half in range(2):
                entry = metadata.state_dict_metadata.pop(f"{name}.{half}")
                assert isinstance(entry, TensorStorageMetadata)
                place = metadata.storage_data.pop(MetadataIndex(f"{name}.{half}", [0] * tensor.dim()))
                offset = torch.Size([half * (len(tensor) // 2 + len(tensor) % 2), *[0] * (tensor.dim() - 1)])
                chunks.append(ChunkStorageMetadata(offset, entry.size))
                metadata.storage_data[MetadataIndex(name, offset)] = place
            metadata.state_dict_metadata[name] = TensorStorageMetadata(entry.properties, tensor.size(), chunks)
        groups = {name: path for name, path in metadata.planner_data.items() if name.startswith("param_groups")}
        metadata.planner_data = {**{name: tuple(name.split(".")) for name in flat}, **groups}

    doctor(folder, join)


def doctor(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Change what the metadata of a folder says."""
    metadata = metadata_of(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
