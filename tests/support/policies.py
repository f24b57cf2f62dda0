"""Policies whose actions can be computed by hand."""

import torch
from torch import nn


class Linear(nn.Module):
    """Deterministic policy sin(w sum(s)) with one parameter w; its sign for two discrete actions."""

    def __init__(self, discrete: bool = False) -> None:
        super().__init__()
        self.weight, self.discrete = nn.Parameter(torch.tensor(0.1)), discrete

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        action = torch.sin(observation.sum(-1, keepdim=True) * self.weight)
        return (action.squeeze(-1) > 0).long() if self.discrete else action
