"""Optimizers from outside torch, which override its methods and keep what they like in their states."""

import contextlib
import copy as copying
import importlib

import pytest
import torch

import fastopt
from tests.integrations import toy
from tests.oracle import Comparison

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


class Tagged(torch.Tensor):
    """A tensor subclass that can be copied deeply, which torch asks `new_empty` for."""

    def new_empty(self, *args, **kwargs):
        return super().new_empty(*args, **kwargs).as_subclass(Tagged)


class Odd(torch.optim.Optimizer):
    """SGD that depends on all that is odd in its state, and that overrides torch's methods."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr, "phases": ["warm", ["up", None]]})
        self.seen = 0

    def state_dict(self):
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state_dict):
        self.seen = state_dict["seen"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "seen"})

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("added_later", 0.5)

    @torch.no_grad()
    def step(self):
        self.seen += 1
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["kind"] = "first"
                    state["unset"] = None
                    state["codes"] = torch.arange(param.numel(), dtype=torch.uint8).view(param.shape)
                    state["history"] = [[torch.zeros_like(param)], (0, None), {"scale": 1.0}]
                    state["tagged"] = torch.zeros_like(param).as_subclass(Tagged)
                assert state["unset"] is None
                assert group["phases"] == ["warm", ["up", None]]
                [momentum], (count, _), rest = state["history"]
                momentum.mul_(0.9).add_(param.grad)
                state["history"] = [[momentum], (count + 1, None), {"scale": rest["scale"] * 0.99}]
                state["codes"] = state["codes"] * 3 + 1  # in whole numbers up to 255, unless something cast them
                state["kind"] = "second" if state["kind"] == "first" else "first"
                state["tagged"].add_(param.grad, alpha=0.1)
                way = 1 if state["kind"] == "first" else 0.5
                moved = momentum * rest["scale"] * way + state["tagged"].as_subclass(torch.Tensor)
                param.sub_(moved * (1 + state["codes"] / 255) / (1 + self.seen + count), alpha=group["lr"])


def test_a_state_with_all_that_is_odd(backend, copy, tmp_path):
    """What torch makes of it: the codes are cast to floats by its load, and by fastopt's as well."""

    def resumed(by_fastopt):
        net = toy.model()
        optimizer = Odd(net.parameters())
        steps(net, optimizer, 3)
        with fastopt.installed(copy=copy) if by_fastopt else contextlib.nullcontext():
            saved = optimizer.state_dict()
            torch.save(saved, tmp_path / "odd.pt")
            later_net = toy.model()
            later_net.load_state_dict(net.state_dict())
            later = Odd(later_net.parameters())
            later.load_state_dict(torch.load(tmp_path / "odd.pt", weights_only=False))
        return later, steps(later_net, later, 4)

    (ours, losses), (theirs, wanted) = resumed(True), resumed(False)
    assert losses == wanted
    assert ours.seen == theirs.seen == 7
    Comparison().optimizers(ours, theirs)
    assert all(type(state["tagged"]) is Tagged for state in ours.state.values())
    assert ours.param_groups[0]["added_later"] == 0.5
