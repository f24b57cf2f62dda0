"""Trunks as a user would write them, named by `algo.network={_target_: own_networks.Features, width: 8}`."""

import math

import torch
from torch import nn


class Features(nn.Module):
    """Features of a vector: one linear layer and a sine."""

    def __init__(self, observation, width: int = 16):
        super().__init__()
        self.num_features = width
        self.linear = nn.Linear(math.prod(observation["shape"]), width)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.linear(observation.flatten(1)).sin()


class Parts(nn.Module):
    """Features of a dict: all its parts, side by side."""

    def __init__(self, observation):
        super().__init__()
        self.num_features = sum(math.prod(part["shape"]) for part in observation["spaces"].values())

    def forward(self, observation) -> torch.Tensor:
        return torch.cat([part.flatten(1).float() for part in observation.values()], -1)


class Pretrained(nn.Module):
    """Features of a vector: a layer that must not change, as in a pretrained network, and one that must."""

    def __init__(self, observation, width: int = 8):
        super().__init__()
        self.num_features = width
        self.frozen = nn.Linear(math.prod(observation["shape"]), width, bias=False).requires_grad_(False)
        self.trained = nn.Linear(width, width, bias=False)
        for layer in (self.frozen, self.trained):
            layer.weight.data = torch.linspace(-1, 1, layer.weight.numel()).view_as(layer.weight)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.trained(self.frozen(observation.flatten(1)).sin()).sin()


class NoSize(Features):
    """A trunk that does not say its size."""

    def __init__(self, observation):
        super().__init__(observation)
        self.num_features = None


def not_a_module(observation):
    """Return something that is no module."""
    return observation
