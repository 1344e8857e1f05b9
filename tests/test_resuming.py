"""Trainings that stop and resume: losses against those of the run that never stopped."""

import copy as copying

import pytest
import torch
from torch.optim import Optimizer

import fastopt

pytestmark = pytest.mark.usefixtures("backend")

BF16, F32 = torch.bfloat16, torch.float32
BLOCK = 64


class BlockwiseMomentum(Optimizer):
    """Momentum in 8 bits: a code for each value, and a scale for each block of them, as 8-bit optimizers keep it."""

    def __init__(self, params, lr=0.05, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                momentum = self.decoded(state) if state else torch.zeros(param.numel())
                momentum = group["momentum"] * momentum + param.grad.float().flatten()
                state["step"] = state.get("step", 0) + 1
                state["codes"], state["absmax"] = self.encoded(momentum)
                state["qmap"] = torch.linspace(-1, 1, 255)
                param.sub_((group["lr"] * momentum).view_as(param).to(param.dtype))

    @staticmethod
    def encoded(momentum):
        blocks = torch.nn.functional.pad(momentum, (0, -momentum.numel() % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(1).clamp_min(1e-12)
        codes = ((blocks / absmax[:, None] + 1) * 127).round().to(torch.uint8)
        return codes.flatten()[: momentum.numel()].clone(), absmax

    @staticmethod
    def decoded(state):
        if state["codes"].dtype is not torch.uint8:
            raise TypeError(f"codes are {state['codes'].dtype}")
        scales = state["absmax"].repeat_interleave(BLOCK)[: state["codes"].numel()]
        return state["qmap"][state["codes"].long()] * scales


def losses(model, optimizer, steps):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator)
    targets = inputs[:, :1] * 2 - inputs[:, 1:2]
    found = []
    for _ in range(steps):
        loss = (model(inputs.to(model[0].weight.dtype)).float() - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def fresh(make_optimizer, dtype=F32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1)).to(dtype)
    return model, make_optimizer(model.named_parameters())


def checkpoint_of(model, optimizer):
    return copying.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def test_an_optimizer_of_8_bits_resumes_where_torch_destroys_its_codes():
    model, optimizer = fresh(BlockwiseMomentum, BF16)
    losses(model, optimizer, 50)
    saved = checkpoint_of(model, optimizer)
    uninterrupted = losses(model, optimizer, 50)
    for policy in ("keep", {"codes": "float-only", "*": "keep"}):
        model, optimizer = fresh(BlockwiseMomentum, BF16)
        model.load_state_dict(saved["model"])
        assert fastopt.check(optimizer, saved["optimizer"], finite=True) == []
        fastopt.load_state_dict(optimizer, saved["optimizer"], policy=policy)
        assert losses(model, optimizer, 50) == uninterrupted
    model, optimizer = fresh(BlockwiseMomentum, BF16)
    fastopt.load_state_dict(optimizer, saved["optimizer"])  # the reference
    with pytest.raises(TypeError, match=r"codes are torch\.bfloat16"):
        losses(model, optimizer, 1)


def test_a_hundred_loads_in_place_leave_every_tensor_where_it_is():
    model, optimizer = fresh(torch.optim.AdamW)
    losses(model, optimizer, 3)
    saves = []
    for _ in range(4):
        losses(model, optimizer, 1)
        saves.append(checkpoint_of(model, optimizer)["optimizer"])

    def held():
        return [(key, id(t), t.data_ptr()) for state in optimizer.state.values() for key, t in state.items()]

    before = held()
    for turn in range(100):
        fastopt.load_state_dict(optimizer, saves[turn % 4], inplace=True)
        assert held() == before
        assert not fastopt.diff(optimizer, saves[turn % 4])


@pytest.mark.parametrize(
    "options", [{}, {"copy": False}, {"donate": True}, {"inplace": "auto"}, {"audit": True}], ids=str
)
@pytest.mark.parametrize(
    "make_optimizer",
    [torch.optim.AdamW, torch.optim.Adafactor, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True)],
    ids=["AdamW", "Adafactor", "SGD"],
)
def test_the_resumed_run_is_the_run_that_never_stopped(make_optimizer, options):
    model, optimizer = fresh(make_optimizer)
    losses(model, optimizer, 20)
    saved = checkpoint_of(model, optimizer)
    uninterrupted = losses(model, optimizer, 20)
    model, optimizer = fresh(make_optimizer)
    model.load_state_dict(saved["model"])
    fastopt.load_state_dict(optimizer, saved["optimizer"], **options)
    assert losses(model, optimizer, 20) == uninterrupted


def test_a_model_that_was_reordered_and_grew_goes_on_where_it_was():
    model, optimizer = fresh(torch.optim.AdamW)
    losses(model, optimizer, 20)
    saved = checkpoint_of(model, optimizer)
    uninterrupted = losses(model, optimizer, 20)

    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(24, 24)
            torch.nn.init.zeros_(self.inner.weight)
            torch.nn.init.zeros_(self.inner.bias)

        def forward(self, x):
            return x + self.inner(x)

    torch.manual_seed(1)
    first, last = torch.nn.Linear(16, 24), torch.nn.Linear(24, 1)
    grown = torch.nn.Sequential(first, torch.nn.Tanh(), Residual(), last)
    first.load_state_dict({key[2:]: value for key, value in saved["model"].items() if key.startswith("0.")})
    last.load_state_dict({key[2:]: value for key, value in saved["model"].items() if key.startswith("2.")})
    grown[2].requires_grad_(False)  # adds nothing: the losses must be those of the model without it
    named = list(grown.named_parameters())[::-1]
    regrouped = torch.optim.AdamW(
        [{"params": [(n, p) for n, p in named if p.ndim > 1]}, {"params": [(n, p) for n, p in named if p.ndim < 2]}]
    )
    fitting = fastopt.match(saved["optimizer"], regrouped, rename=[(r"^2\.", "3.")], strict=False)
    fastopt.load_state_dict(regrouped, fitting)
    assert losses(grown, regrouped, 20) == uninterrupted
