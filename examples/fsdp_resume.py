"""A sharded training that is saved by two ranks, and goes on with four and with one: the losses stay the same.

    torchrun --nproc-per-node 2 examples/fsdp_resume.py

The two ranks train to the end, and save in mid-course, in the background. Then the first of them starts torchrun with
four ranks and with one, which take up the checkpoint. Each rank sees the whole batch, so that gradients are the same to
the bit however many ranks share the parameters, and so are the losses: exits with 1 where one is not.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt import GPT, Shape
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.optim import AdamW

from fastopt import distributed

SHAPE = Shape(context=32, layers=2, heads=4, width=64)
BATCH, STEPS, SAVED_AFTER = 8, 12, 6
RESUMED_BY = (4, 1)
"""Ranks of the trainings that go on."""


def fresh(seed: int) -> tuple[GPT, AdamW]:
    """A new model, each block of it sharded over all ranks, and its optimizer."""
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model, AdamW(model.parameters(), lr=1e-3)


def train(model: GPT, optimizer: AdamW, steps: range) -> list[float]:
    """Train on made-up bytes that depend on the number of the step; returns the loss of each."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(256, (BATCH, 1), generator=generator)
        tokens = (start + 3 * torch.arange(SHAPE.context + 1)) % 256
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(model: GPT, optimizer: AdamW, folder: Path) -> None:
    """Save both: the optimizer's state in the background, the model's through torch's own save, with our writer."""
    saving = distributed.async_save(optimizer, model, folder / "optimizer")
    dcp.save(get_model_state_dict(model), storage_writer=distributed.FastWriter(folder / "model"))
    saving.result()


def load(model: GPT, optimizer: AdamW, folder: Path) -> None:
    """Load both, whoever saved them."""
    parameters = get_model_state_dict(model)
    dcp.load(parameters, storage_reader=distributed.FastReader(folder / "model"))
    set_model_state_dict(model, parameters)
    report = distributed.load(optimizer, model, folder / "optimizer")
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, the first of them: {str(report).splitlines()[0]}")


def interrupted(folder: Path) -> list[float]:
    """Train to the end, and save in mid-course; returns the losses after that."""
    model, optimizer = fresh(seed=0)
    train(model, optimizer, range(SAVED_AFTER))
    save(model, optimizer, folder)
    return train(model, optimizer, range(SAVED_AFTER, STEPS))


def resumed(folder: Path) -> list[float]:
    """Go on from the checkpoint, from another model and an optimizer without a state."""
    model, optimizer = fresh(seed=1)
    load(model, optimizer, folder)
    return train(model, optimizer, range(SAVED_AFTER, STEPS))


def with_ranks(ranks: int, folder: Path) -> list[float]:
    """Have so many ranks go on; returns their losses."""
    written = folder / f"losses-of-{ranks}.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    subprocess.run([*torchrun, __file__, "--resume", str(folder), str(written)], check=True, env=environment)
    found: list[float] = json.loads(written.read_text())
    return found


def main() -> int:
    """What a rank of torchrun does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", nargs=2, type=Path, metavar=("FOLDER", "LOSSES"), help="what it starts itself with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # results must not depend on how many there are for a rank
    dist.init_process_group("gloo")
    is_first = dist.get_rank() == 0
    if arguments.resume:
        folder, written = arguments.resume
        losses = resumed(folder)
        if is_first:
            written.write_text(json.dumps(losses))
        leave()
        return 0
    folders = [tempfile.mkdtemp(prefix="fastopt-fsdp-") if is_first else None]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    expected = interrupted(folder)
    leave()
    return compare(expected, folder) if is_first else 0


def leave() -> None:
    """End the process group, after all that refers to it."""
    dist.barrier()
    gc.collect()
    dist.destroy_process_group()


def compare(expected: list[float], folder: Path) -> int:
    """Have the others go on, and print their losses; returns the exit code."""
    print(f"2 ranks, uninterrupted: {' '.join(f'{loss:.6f}' for loss in expected)}")
    wrong = 0
    for ranks in RESUMED_BY:
        losses = with_ranks(ranks, folder)
        same = losses == expected
        wrong += not same
        print(
            f"{ranks} ranks, resumed:      {' '.join(f'{loss:.6f}' for loss in losses)} {'the same' if same else '!'}"
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
