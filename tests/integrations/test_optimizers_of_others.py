"""Optimizers from outside torch, which override its methods and keep what they like in their states."""

import copy as copying
import importlib

import pytest
import torch

import fastopt
from tests.integrations import toy

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "schedulefree.AdamWScheduleFree": {"lr": 0.01},
    "schedulefree.SGDScheduleFree": {"lr": 0.01},
    "prodigyopt.Prodigy": {},
    "lion_pytorch.Lion": {"lr": 0.001},
    "transformers.optimization.Adafactor": {},
    "pytorch_optimizer.AdaBelief": {"lr": 0.01},
    "pytorch_optimizer.Adan": {"lr": 0.01},
    "pytorch_optimizer.CAME": {"lr": 0.001},
    "pytorch_optimizer.Lamb": {"lr": 0.01},
    "pytorch_optimizer.Ranger21": {"num_iterations": 20, "lr": 0.01},
    "pytorch_optimizer.SOAP": {"lr": 0.01},
    "pytorch_optimizer.Shampoo": {"lr": 0.01},
    "pytorch_optimizer.ScalableShampoo": {"lr": 0.01},
    "pytorch_optimizer.Muon": {"lr": 0.01},
    "torchao.optim.AdamW8bit": {"lr": 0.01},
    "torchao.optim.AdamW4bit": {"lr": 0.01},
}


def make(name, net):
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{name} is not there: {error}")
    if name.endswith("Muon"):
        groups = [
            {"params": [p for p in net.parameters() if p.ndim == 2], "use_muon": True},
            {"params": [p for p in net.parameters() if p.ndim != 2], "use_muon": False},
        ]
        return kind(groups, **CASES[name])
    return kind(net.parameters(), **CASES[name])


def steps(net, optimizer, count):
    if hasattr(optimizer, "train"):
        optimizer.train()  # those without a schedule ask for it
    inputs, targets = toy.data().tensors
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = toy.loss_of(net, inputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", CASES)
def test_the_run_that_stopped_is_the_run_that_never_did(backend, copy, name, tmp_path):
    net = toy.model()
    optimizer = make(name, net)
    steps(net, optimizer, 3)
    saved_net = copying.deepcopy(net.state_dict())
    with fastopt.installed(copy=copy):
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    wanted = steps(net, optimizer, 3)

    resumed_net = toy.model()
    resumed = make(name, resumed_net)
    resumed_net.load_state_dict(saved_net)
    with fastopt.installed(copy=copy):
        resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=False))
    assert steps(resumed_net, resumed, 3) == wanted
