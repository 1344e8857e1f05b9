"""A model and its data, small and the same in every process."""

import torch
from torch.utils.data import TensorDataset

FEATURES = 8


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(FEATURES, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def data(count: int = 64) -> TensorDataset:
    inputs = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())


def loss_of(net: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(net(inputs).float(), targets)
