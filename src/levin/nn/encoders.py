"""Encoders, which map observations to features: CNNs for pixels, and one that joins the parts of a dict."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from hydra.utils import get_object
from torch import Tensor, nn

from levin.core.errors import ConfigError, one_line
from levin.core.paths import make_forks_importable
from levin.core.spaces import ACTION_MASK, EnvSpec, Space, drop_mask, has_mask, observation_dtypes
from levin.core.types import Network, PixelNetwork, VectorNetwork
from levin.nn.layers import Residual, orthogonal_


def image_layers(shape: Sequence[int], convolutions: Sequence[nn.Module], num_features: int) -> nn.Sequential:
    """Build the layers of a CNN: those given, and a linear layer with a ReLU, all initialised orthogonally.

    `[B, C, H, W] -> [B, num_features]`, where `shape` is `[C, H, W]`.
    """
    layers = nn.Sequential(*convolutions, nn.Flatten())
    flat = layers(torch.zeros(1, *shape)).shape[1]
    layers.extend([nn.Linear(flat, num_features), nn.ReLU(inplace=True)])
    orthogonal_(layers)
    return layers


class NatureCNN(nn.Module):
    """Nature CNN, three convolutions and a linear layer: `[B, C, 84, 84]` uint8 `-> [B, 512]`.

    Source: Mnih et al. 2015 (doi:10.1038/nature14236), methods.
    """

    num_features = 512

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        convolutions = nn.Conv2d(shape[0], 32, 8, stride=4), nn.Conv2d(32, 64, 4, stride=2), nn.Conv2d(64, 64, 3)
        self.layers = image_layers(shape, with_relus(convolutions), self.num_features)

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(observation / 255)


class SmallCNN(nn.Module):
    """CNN for images that are too small for the Nature CNN: `[B, C, H, W]` uint8 `-> [B, 256]`.

    Three convolutions of 3 x 3 pixels with padding, the last two with a stride of 2, and a linear layer.
    """

    num_features = 256

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        convolutions = (
            nn.Conv2d(shape[0], 16, 3, padding=1),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
        )
        self.layers = image_layers(shape, with_relus(convolutions), self.num_features)

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(observation / 255)


class ImpalaCNN(nn.Module):
    """Residual CNN of IMPALA, 15 convolutions and a linear layer: `[B, C, H, W]` uint8 `-> [B, 256]`.

    Source: Espeholt et al. 2018 (arXiv:1802.01561), figure 3, the large architecture without its LSTM.
    """

    num_features = 256

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((shape[0], 16, 32, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)]
            for _ in range(2):
                first, second = (nn.Conv2d(outputs, outputs, 3, padding=1) for _ in range(2))
                layers.append(Residual(nn.ReLU(), first, nn.ReLU(inplace=True), second))
        self.layers = image_layers(shape, [*layers, nn.ReLU(inplace=True)], self.num_features)

    def forward(self, observation: Tensor) -> Tensor:
        return self.layers(observation / 255)


CNNS: dict[str, type[NatureCNN | SmallCNN | ImpalaCNN]] = {
    "nature": NatureCNN,
    "small": SmallCNN,
    "impala": ImpalaCNN,
}
NATURE_PIXELS = 36  # smallest side of an image that the convolutions of the Nature CNN fit in


def with_relus(convolutions: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the convolutions, each followed by a ReLU."""
    return [layer for convolution in convolutions for layer in (convolution, nn.ReLU(inplace=True))]


class Encoder(nn.Module):
    """Encoder of dict observations: `{"vector": [B, D], name: [B, C, H, W] uint8, ...} -> [B, F]`.

    Each image has its own CNN. Their features are concatenated with the vector.
    """

    def __init__(self, parts: Mapping[str, Space], cnn: PixelNetwork | None) -> None:
        super().__init__()
        trunks = {name: make_box_trunk(part, cnn) for name, part in parts.items()}
        self.parts = nn.ModuleDict({name: part for name, (part, _) in trunks.items()})
        self.num_features = sum(num_features for _, num_features in trunks.values())

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([part(observation[name]) for name, part in self.parts.items()], -1)


class MaskedTrunk(nn.Module):
    """Trunk of observations with an action mask `[B, A]`, which follows the features: `-> [B, F + A]`.

    The mask is appended to the features unchanged, for the networks that obey it (`MaskedOutputs`).

    Args:
        trunk: Trunk of the observations without the mask.
        part: Name of the only other part of the observations, which `trunk` reads; None: `trunk` reads a dict.
    """

    def __init__(self, trunk: nn.Module, part: str | None) -> None:
        super().__init__()
        self.trunk, self.part = trunk, part

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        features = self.trunk(observation[self.part] if self.part else observation)
        return torch.cat([features, observation[ACTION_MASK].float()], -1)


def make_trunk(env: EnvSpec, network: Network) -> tuple[nn.Module, int]:
    """Build the trunk of a network, which maps observations to features `[B, F]`; return it and F.

    The trunk is a CNN for pixels and an `Encoder` for dicts. Boxes of numbers are only flattened. An action mask
    follows the features and is not counted in F.

    Args:
        env: Spaces of the env.
        network: Name of the CNN, or a trunk of the user's own (`make_own_trunk`). With any other name the CNN is
            `nature` if both sides of the image have 36 pixels or more, else `small`.

    Raises:
        ConfigError: The network is not for these observations.
    """
    space = env["observation"]
    if has_mask(space):
        rest = drop_mask(space)
        trunk, num_features = make_trunk({**env, "observation": rest}, network)
        part = None if "spaces" in rest else next(iter(space.get("spaces", {})))
        return MaskedTrunk(trunk, part), num_features
    if not isinstance(network, str):
        return make_own_trunk(space, network)
    cnn: Any = network if network in CNNS else None
    if cnn and "uint8" not in observation_dtypes(space):
        raise ConfigError(
            f"algo.network={network} reads pixels, but {env['id']} has none; "
            f"valid: {', '.join(get_args(VectorNetwork))}, or a _target_"
        )
    if "spaces" not in space:
        return make_box_trunk(space, cnn)
    encoder = Encoder(space["spaces"], cnn)
    return encoder, encoder.num_features


def make_box_trunk(space: Space, cnn: PixelNetwork | None) -> tuple[nn.Module, int]:
    """Build the trunk of a single box, as `make_trunk` does."""
    shape = space["shape"]
    if space["dtype"] != "uint8":
        return (nn.Identity() if len(shape) == 1 else nn.Flatten()), math.prod(shape)
    fits = min(shape[1:]) >= NATURE_PIXELS
    if cnn == "nature" and not fits:
        raise ConfigError(
            f"algo.network=nature needs images of {NATURE_PIXELS} pixels or more on both sides, "
            f"got {shape[1]} x {shape[2]}; valid: impala, small"
        )
    kind = CNNS[cnn or ("nature" if fits else "small")]
    return kind(shape), kind.num_features


def make_own_trunk(space: Space, network: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """Build the user's own trunk `{_target_: my_module.MyTrunk, <values>}`; return it and its `num_features`.

    It is called with the observation space and the values, and maps observations `[B, *S]` (a dict of them for a dict
    space) to features `[B, num_features]`. An algorithm builds one for each of its networks that has a trunk of its
    own.

    Raises:
        ConfigError: It can't be imported or built, or is no module with `num_features`.
    """
    values = {key: value for key, value in network.items() if key != "_target_"}
    name = f"algo.network._target_={network.get('_target_')}"
    make_forks_importable()
    try:
        trunk = get_object(str(network.get("_target_")))(space, **values)
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{name} can't be built: {type(error).__name__}: {one_line(error)}") from error
    num_features = getattr(trunk, "num_features", None)
    if not isinstance(trunk, nn.Module) or not isinstance(num_features, int):
        raise ConfigError(f"{name} must be a torch.nn.Module with num_features, the size of its output")
    return trunk, num_features
