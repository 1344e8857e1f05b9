"""A training on two processes that saves its sharded state: `python -m tests.dcp_ranks FOLDER`.

FOLDER/dcp is what torch.distributed.checkpoint wrote, FOLDER/flat the same in the flat form, FOLDER/replicated one that
both ranks hold alike, FOLDER/whole.pt the state as one process would hold it.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

SHAPES = ((5, 4), (1, 3), (6, 2))  # cut unevenly, with nothing for the second rank, evenly


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES)
        self.bias = torch.nn.Parameter(torch.randn(7))

    def forward(self) -> torch.Tensor:
        return sum((weight**3).sum() for weight in self.weights) + (self.bias**3).sum()


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def train(rank: int, folder: Path) -> None:
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    model, twin = Model(), Model()
    fully_shard(model)
    optimizer = torch.optim.AdamW(
        [{"params": [*model.weights], "lr": 0.25}, {"params": [model.bias], "weight_decay": 0.5}]
    )
    for _ in range(2):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    state = optimizer.state_dict()
    dcp.save({"optimizer": state, "epoch": 3}, checkpoint_id=folder / "dcp")
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save(flat, checkpoint_id=folder / "flat")
    plain = torch.optim.AdamW(twin.parameters())
    twin().backward()
    plain.step()
    dcp.save(plain.state_dict(), checkpoint_id=folder / "replicated")
    saved = {"dcp": whole(state), "replicated": plain.state_dict()}
    if rank == 0:
        torch.save(saved, folder / "whole.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(train, (Path(sys.argv[1]),), nprocs=2)
