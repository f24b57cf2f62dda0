"""Networks of Dreamer: the world model (Hafner et al. 2020, appendix A) and the policy that acts on its features."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec, Space
from levin.model_based.recurrent import OneHotAction, State, sample_episode_end, stack_steps
from levin.nn.distributions import OneHot, SquashedNormal
from levin.nn.layers import as_float32, mlp
from levin.nn.networks import action_size

MIN_STD = 0.1  # smallest std of `stoch`
MEAN_SCALE = 5.0  # bound of the policy's mean before the squashing tanh


class GaussianState(NamedTuple):
    """A Gaussian over `stoch`, the sampled part of a state; mean and std are `[..., S]`."""

    mean: Tensor
    std: Tensor

    def sample(self) -> Tensor:
        """Return a reparameterised sample `[..., S]`."""
        return torch.addcmul(self.mean, self.std, torch.randn_like(self.mean))

    def detach(self) -> "GaussianState":
        """Return this Gaussian without a gradient."""
        return GaussianState(self.mean.detach(), self.std.detach())

    def kl(self, other: "GaussianState") -> Tensor:
        """Return KL(self || other), summed over S: `[...]`."""
        variance = (self.std / other.std).square()
        return (0.5 * (variance + ((self.mean - other.mean) / other.std).square() - 1 - variance.log())).sum(-1)


def to_gaussian(numbers: Tensor) -> GaussianState:
    """Return the Gaussian of network outputs `[..., 2 S]`: mean, and std before softplus."""
    mean, std = as_float32(numbers).chunk(2, -1)
    return GaussianState(mean, softplus(std) + MIN_STD)


class PixelEncoder(nn.Module):
    """Four convolutions of 4 x 4, stride 2: `[B, C, 64, 64]` uint8 `-> [B, 1024]`."""

    size = 1024

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [channels, 32, 64, 128, 256]
        layers = [
            layer
            for inputs, outputs in pairwise(widths)
            for layer in (nn.Conv2d(inputs, outputs, 4, stride=2), nn.ReLU(inplace=True))
        ]
        self.layers = nn.Sequential(*layers, nn.Flatten())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(center_pixels(pixels))


class PixelDecoder(nn.Module):
    """Four transposed convolutions, `[B, F] -> [B, C, 64, 64]`; pixels are scaled as by `center_pixels`."""

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(features, 1024)
        self.layers = nn.Sequential(
            *(nn.ConvTranspose2d(1024, 128, 5, stride=2), nn.ReLU(inplace=True)),
            *(nn.ConvTranspose2d(128, 64, 5, stride=2), nn.ReLU(inplace=True)),
            *(nn.ConvTranspose2d(64, 32, 6, stride=2), nn.ReLU(inplace=True)),
            nn.ConvTranspose2d(32, channels, 6, stride=2),
        )

    def forward(self, feature: Tensor) -> Tensor:
        return self.layers(self.dense(feature)[..., None, None])


class MultiEncoder(nn.Module):
    """One network for each part of a dict observation.

    With encoders, calling it maps the dict to one vector `[B, *]`; with decoders, `decode` maps features to the dict.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([part(observation[name]) for name, part in self.parts.items()], -1)

    def decode(self, feature: Tensor) -> dict[str, Tensor]:
        """Return each part of the observation, decoded from features `[B, F]`."""
        return {name: part(feature) for name, part in self.parts.items()}


def center_pixels(observation: Tensor) -> Tensor:
    """Scale uint8 pixels to [-0.5, 0.5]; leave vectors unchanged."""
    return observation.float() / 255 - 0.5 if observation.dtype == torch.uint8 else observation


class WorldModel(nn.Module):
    """State encoder, transition model, decoder, reward model and, optionally, continue model.

    Args:
        env: Spaces of the env.
        transition: `gru`: deter' = GRU(deter, [stoch, action]) and state encoder q(stoch | deter, observation).
            `mlp`: no memory, p(stoch' | stoch, action) and q(stoch | observation); deter has size 0.
        deter: Size D of the deterministic, recurrent part of a state.
        stoch: Size S of the stochastic part of a state.
        hidden: Width of the hidden layers of state encoder and transition model.
        units: Width of the hidden layers of all other networks.
        activation: Activation between layers, except in the convolutions, which use ReLU.
        gamma: Discount, included in the continue model's target; None: no continue model.

    Raises:
        ConfigError: The observation has a part that is neither a vector nor 64 x 64 pixels.
    """

    def __init__(
        self,
        env: EnvSpec,
        *,
        transition: str,
        deter: int,
        stoch: int,
        hidden: int,
        units: int,
        activation: str,
        gamma: float | None,
    ) -> None:
        super().__init__()
        self.deter, self.stoch, self.actions = deter if transition == "gru" else 0, stoch, action_size(env)
        self.features = self.deter + stoch
        self.gamma = gamma or 1.0
        self.one_hot = OneHot([self.actions]) if env["action"]["type"] == "discrete" else None
        self.parts = env["observation"].get("spaces", {"": env["observation"]})
        networks = {name: self.make_networks(part, units, activation, env["id"]) for name, part in self.parts.items()}
        embedding = sum(size for _, _, size in networks.values())
        if "" in networks:
            self.encoder, self.decoder, _ = networks[""]
        else:
            self.encoder = MultiEncoder({name: encoder for name, (encoder, _, _) in networks.items()})
            self.decoder = MultiEncoder({name: decoder for name, (_, decoder, _) in networks.items()})
        self.act = mlp([1, 1, 1], activation)[1]  # the activation module alone
        self.into_stoch = nn.Linear(stoch, hidden)
        self.into_action = nn.Linear(self.actions, hidden, bias=False)
        self.memory = nn.GRUCell(hidden, deter) if self.deter else None
        self.prior_head = mlp([self.deter or hidden, hidden, 2 * stoch], activation)
        self.into_posterior = nn.Linear(embedding, hidden)
        self.from_deter = nn.Linear(self.deter, hidden, bias=False) if self.deter else None
        self.posterior_head = nn.Linear(hidden, 2 * stoch)
        self.reward_model = mlp([self.features, units, units, 1], activation)
        self.continue_model = mlp([self.features, units, units, units, 1], activation) if gamma else None

    def zero_state(self, batch: int, like: Tensor) -> State:
        """Return the state before an episode: zeros `[B, *]`, with dtype and device of `like`."""
        return State(like.new_zeros(batch, self.deter), like.new_zeros(batch, self.stoch))

    def make_networks(self, part: Space, units: int, activation: str, env: str) -> tuple[nn.Module, nn.Module, int]:
        """Build encoder and decoder of one part of the observation; also return the encoder's output size."""
        shape = part["shape"]
        if part["dtype"] == "uint8" and shape[1:] == [64, 64]:
            return PixelEncoder(shape[0]), PixelDecoder(self.features, shape[0]), PixelEncoder.size
        if part["dtype"] == "uint8" or len(shape) != 1:
            raise ConfigError(
                f"Dreamer reads vectors, or pixels of 64 x 64, but {env} has {part['dtype']} observations of shape "
                f"{shape}; for MuJoCo and dm_control envs, set env.pixels=64; for "
                "Atari games, env.frame_stack=1 env.kwargs.img_height=64 env.kwargs.img_width=64"
            )
        encoder = nn.Sequential(nn.Flatten(), mlp([shape[0], units, units, units], activation))
        return encoder, mlp([self.features, units, units, shape[0]], activation), units

    def observation_parts(self, observation: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts of an observation by name; a tensor is a single part with an empty name."""
        return {name: observation[name] if name else observation for name in self.parts}  # type: ignore[index, misc]

    def embed(self, observation: Any) -> Tensor:
        """Return the observation's contribution to the state encoder's hidden layer: `[B, *S] -> [B, hidden]`."""
        return self.into_posterior(self.encoder(observation))

    def decode(self, feature: Tensor) -> dict[str, Tensor]:
        """Return the parts of the observation `[B, *S]` decoded from features `[B, F]`; pixels are centred at 0."""
        if isinstance(self.decoder, MultiEncoder):
            return {name: as_float32(part) for name, part in self.decoder.decode(feature).items()}
        return {"": as_float32(self.decoder(feature))}

    def transition(self, state: State, from_action: Tensor) -> tuple[Tensor, Tensor]:
        """Return deter' `[B, D]` and the input of `prior_head`; `from_action` is `into_action(action)`."""
        x = self.act(self.into_stoch(state.stoch) + from_action)
        if self.memory is None:
            return state.deter, x
        deter = as_float32(self.memory(x, state.deter))
        return deter, deter

    def posterior(self, deter: Tensor, embedded: Tensor) -> GaussianState:
        """Return the state encoder's q(stoch | deter, observation), given `embed(observation)`."""
        # Cloned because some activations work in place
        x = embedded.clone() if self.from_deter is None else embedded + self.from_deter(deter)
        return to_gaussian(self.posterior_head(self.act(x)))

    def observe_sequence(
        self, observation: Tensor, action: Tensor, is_first: Tensor
    ) -> tuple[State, GaussianState, GaussianState]:
        """Return the states `[B, T, *]` of a sequence of records, their posteriors and their priors.

        Everything that does not depend on the previous state is computed for all T steps at once.

        Args:
            observation: Observations `[B, T, *S]`.
            action: Actions `[B, T, A]`, each chosen after the observation of the same record.
            is_first: Starts of episodes `[B, T, 1]`; previous state and action are replaced by zeros there.
        """
        embedded = self.embed(observation.flatten(0, 1)).unflatten(0, is_first.shape[:2]).unbind(1)
        previous_action = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1) * ~is_first
        from_action, continues = self.into_action(previous_action).unbind(1), (~is_first).unbind(1)
        state = self.zero_state(len(action), action)
        states, posteriors, prior_inputs = [], [], []
        for t in range(len(embedded)):
            state = State(state.deter * continues[t], state.stoch * continues[t])
            deter, prior_input = self.transition(state, from_action[t])
            posterior = self.posterior(deter, embedded[t])
            state = State(deter, posterior.sample())
            states.append(state)
            posteriors.append(posterior)
            prior_inputs.append(prior_input)
        prior = to_gaussian(self.prior_head(torch.stack(prior_inputs, 1)))
        return State(*stack_steps(states)), GaussianState(*stack_steps(posteriors)), prior

    def step(self, state: State, action: Tensor, observation: Tensor, *, sample: bool = True) -> State:
        """Return the state after an action `[B, A]` and the observation it led to; not sampled: the mean of q."""
        deter, _ = self.transition(state, self.into_action(action))
        posterior = self.posterior(deter, self.embed(observation))
        return State(deter, posterior.sample() if sample else posterior.mean)

    def imagine_step(self, state: State, action: Tensor) -> State:
        """Return the state after an action, sampled from the transition model."""
        deter, prior_input = self.transition(state, self.into_action(action))
        return State(deter, to_gaussian(self.prior_head(prior_input)).sample())

    # --- interface for `levin.model_based.dream_env`

    @property
    def noise(self) -> int:
        """Number of standard normal values that one step of `imagine` takes."""
        return self.stoch + 1

    def encode_action(self, action: Tensor) -> Tensor:
        """Return a policy's actions as the model reads them: `[N, A]` in [-1, 1], one-hot if discrete."""
        return self.one_hot.encode(action) if self.one_hot else action.clamp(-1, 1)

    def initial_state(self, observation: Any) -> State:
        """Return the state at the first observation of an episode."""
        num = len(next(iter(self.observation_parts(observation).values())))
        no_action = self.into_stoch.weight.new_zeros(num, self.actions)
        return self.observe(self.zero_state(num, no_action), no_action, observation)

    def observe(self, state: State, action: Tensor, observation: Any) -> State:
        """Return the state after an action and the observation it led to, stoch being the mean of q."""
        return self.step(state, action, observation, sample=False)

    def imagine(self, state: State, action: Tensor, noise: Tensor, temperature: float) -> tuple[State, Tensor, Tensor]:
        """Return the state after an action, the reward `[N, 1]`, and whether the episode ends there `[N, 1]`.

        Args:
            state: States `[N, *]` before the action.
            action: Actions `[N, A]`.
            noise: Standard normal values `[N, S + 1]`, the only source of randomness.
            temperature: Sampling temperature tau; multiplies the std by sqrt(tau), the log-odds of an end by 1 / tau.
        """
        deter, prior_input = self.transition(state, self.into_action(action))
        prior = to_gaussian(self.prior_head(prior_input))
        stoch = torch.addcmul(prior.mean, prior.std, noise[:, :-1], value=math.sqrt(temperature))
        state = State(deter, stoch)
        reward = as_float32(self.reward_model(state.feature))
        if self.continue_model is None:
            return state, reward, torch.zeros_like(reward, dtype=torch.bool)
        terminated = sample_episode_end(
            as_float32(self.continue_model(state.feature)).sigmoid() / self.gamma, noise[:, -1:], temperature
        )
        return state, reward, terminated


class Policy(nn.Module):
    """Policy pi(a | s) on features: a squashed Gaussian, or one-hot actions with a straight-through gradient.

    Args:
        features: Number of features.
        env: Spaces of the env.
        units: Width of the hidden layers.
        activation: Activation between the layers.
        initial_std: Std of the Gaussian at the start of training, before tanh.
    """

    def __init__(self, features: int, env: EnvSpec, units: int, activation: str, initial_std: float) -> None:
        super().__init__()
        self.std_offset = math.log(math.expm1(initial_std))
        num = action_size(env)
        self.one_hot = OneHot([num]) if env["action"]["type"] == "discrete" else None
        self.network = mlp([features, *[units] * 4, num if self.one_hot else 2 * num], activation)

    def forward(self, feature: Tensor) -> "SquashedNormal | OneHotAction":
        numbers = as_float32(self.network(feature))
        if self.one_hot is not None:
            return OneHotAction(numbers)
        loc, std = numbers.chunk(2, -1)
        loc = MEAN_SCALE * torch.tanh(loc / MEAN_SCALE)
        std = softplus(std + self.std_offset) + 1e-4
        return SquashedNormal(loc, std.log())
