"""The networks of Dreamer's world model (Hafner et al. 2020, appendix A), and the policy that acts with it."""

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
from levin.nn.networks import action_size, as_float32, mlp

MIN_STD = 0.1  # of a latent
MEAN_SCALE = 5.0  # of the policy before it is squashed


class GaussianState(NamedTuple):
    """A Gaussian over the drawn part of a state: both `[..., S]`."""

    mean: Tensor
    std: Tensor

    def sample(self) -> Tensor:
        """Reparameterised."""
        return torch.addcmul(self.mean, self.std, torch.randn_like(self.mean))

    def detach(self) -> "GaussianState":
        """The same, without a gradient."""
        return GaussianState(self.mean.detach(), self.std.detach())

    def kl(self, other: "GaussianState") -> Tensor:
        """KL(self || other), summed over S: `[...]`."""
        variance = (self.std / other.std).square()
        return (0.5 * (variance + ((self.mean - other.mean) / other.std).square() - 1 - variance.log())).sum(-1)


def to_gaussian(numbers: Tensor) -> GaussianState:
    """`[..., 2 S]`, any numbers."""
    mean, std = as_float32(numbers).chunk(2, -1)
    return GaussianState(mean, softplus(std) + MIN_STD)


class PixelEncoder(nn.Module):
    """`[B, C, 64, 64]` uint8 `-> [B, 1024]`: four convolutions of 4 x 4, stride 2."""

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
    """`[B, F] -> [B, C, 64, 64]`, around 0 as `centred` has them."""

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
    """A network for each part of an observation: encoders are asked with a dict, and give one vector `[B, *]`."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([part(observation[name]) for name, part in self.parts.items()], -1)

    def decode(self, feature: Tensor) -> dict[str, Tensor]:
        """Each part of the observation, of features `[B, F]`."""
        return {name: part(feature) for name, part in self.parts.items()}


def center_pixels(observation: Tensor) -> Tensor:
    """Pixels to [-0.5, 0.5], the same when acting and when learning; vectors as they are."""
    return observation.float() / 255 - 0.5 if observation.dtype == torch.uint8 else observation


class WorldModel(nn.Module):
    """State encoder, transition model, decoder, reward model and, where episodes can end, continue model.

    Args:
        env: Spaces.
        transition: `gru`: deter' = GRU(deter, [stoch, action]), the state encoder q(stoch | deter, observation).
            `mlp`: no memory: p(stoch' | stoch, action) and q(stoch | observation), deter has no entries.
        deter: Size of the part that remembers.
        stoch: Size of the part that is drawn.
        hidden: Width of the layers between.
        units: Width of the other networks.
        activation: Between all layers, but for pixels.
        gamma: Discount, which is in the continue model; None: there is none.

    Raises:
        ConfigError: Observations that it can't read.
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
        networks = {name: self.networks(part, units, activation, env["id"]) for name, part in self.parts.items()}
        embedding = sum(size for _, _, size in networks.values())
        if "" in networks:
            self.encoder, self.decoder, _ = networks[""]
        else:
            self.encoder = MultiEncoder({name: encoder for name, (encoder, _, _) in networks.items()})
            self.decoder = MultiEncoder({name: decoder for name, (_, decoder, _) in networks.items()})
        self.act = mlp([1, 1, 1], activation)[1]  # the activation alone
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
        """Nothing is known: zeros `[B, *]`."""
        return State(like.new_zeros(batch, self.deter), like.new_zeros(batch, self.stoch))

    def networks(self, part: Space, units: int, activation: str, env: str) -> tuple[nn.Module, nn.Module, int]:
        """Encoder and decoder of a part of the observation, and how many numbers the encoder makes of it."""
        shape = part["shape"]
        if part["dtype"] == "uint8" and shape[1:] == [64, 64]:
            return PixelEncoder(shape[0]), PixelDecoder(self.features, shape[0]), PixelEncoder.size
        if part["dtype"] == "uint8" or len(shape) != 1:
            raise ConfigError(
                f"Dreamer reads vectors, and pixels of 64 x 64; those of {env} are {shape}; env.pixels=64 draws envs "
                "of MuJoCo and dm_control so"
            )
        encoder = nn.Sequential(nn.Flatten(), mlp([shape[0], units, units, units], activation))
        return encoder, mlp([self.features, units, units, shape[0]], activation), units

    def of(self, observation: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of an observation; one that is no dict is a part without a name."""
        return {name: observation[name] if name else observation for name in self.parts}  # type: ignore[index, misc]

    def embed(self, observation: Any) -> Tensor:
        """`[B, *S] -> [B, hidden]`: what the state encoder makes of an observation alone."""
        return self.into_posterior(self.encoder(observation))

    def decode(self, feature: Tensor) -> dict[str, Tensor]:
        """The parts of the observation `[B, *S]` of features `[B, F]`, pixels around 0."""
        if isinstance(self.decoder, MultiEncoder):
            return {name: as_float32(part) for name, part in self.decoder.decode(feature).items()}
        return {"": as_float32(self.decoder(feature))}

    def transition(self, state: State, from_action: Tensor) -> tuple[Tensor, Tensor]:
        """deter' `[B, D]` and what the prior reads, given the action's part of the first layer `[B, hidden]`."""
        x = self.act(self.into_stoch(state.stoch) + from_action)
        if self.memory is None:
            return state.deter, x
        deter = as_float32(self.memory(x, state.deter))
        return deter, deter

    def posterior(self, deter: Tensor, embedded: Tensor) -> GaussianState:
        """The state encoder: q(stoch | deter, observation)."""
        # A copy, as some activations work in place
        x = embedded.clone() if self.from_deter is None else embedded + self.from_deter(deter)
        return to_gaussian(self.posterior_head(self.act(x)))

    def observe_sequence(
        self, observation: Tensor, action: Tensor, is_first: Tensor
    ) -> tuple[State, GaussianState, GaussianState]:
        """The states `[B, T, *]` that a sequence of records leads to, their posteriors and priors.

        What does not depend on the state before is computed for all times at once.

        Args:
            observation: `[B, T, *S]`.
            action: `[B, T, A]`, chosen after each observation.
            is_first: `[B, T, 1]`: there state and action before it count for nothing.
        """
        embedded = self.embed(observation.flatten(0, 1)).unflatten(0, is_first.shape[:2]).unbind(1)
        before = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], 1) * ~is_first
        from_action, continues = self.into_action(before).unbind(1), (~is_first).unbind(1)
        state = self.zero_state(len(action), action)
        states, posteriors, seeds = [], [], []
        for t in range(len(embedded)):
            state = State(state.deter * continues[t], state.stoch * continues[t])
            deter, seed = self.transition(state, from_action[t])
            posterior = self.posterior(deter, embedded[t])
            state = State(deter, posterior.sample())
            states.append(state)
            posteriors.append(posterior)
            seeds.append(seed)
        prior = to_gaussian(self.prior_head(torch.stack(seeds, 1)))
        return State(*stack_steps(states)), GaussianState(*stack_steps(posteriors)), prior

    def step(self, state: State, action: Tensor, observation: Tensor, *, sample: bool = True) -> State:
        """The state after an action `[B, A]` and the observation that it led to; not drawn: its mean."""
        deter, _ = self.transition(state, self.into_action(action))
        posterior = self.posterior(deter, self.embed(observation))
        return State(deter, posterior.sample() if sample else posterior.mean)

    def imagine_step(self, state: State, action: Tensor) -> State:
        """The state after an action, as the transition model imagines it."""
        deter, seed = self.transition(state, self.into_action(action))
        return State(deter, to_gaussian(self.prior_head(seed)).sample())

    # What `levin.model_based.dream_env` asks for

    @property
    def noise(self) -> int:
        """Standard normal numbers that a step of a dream takes."""
        return self.stoch + 1

    def encode_action(self, action: Tensor) -> Tensor:
        """Actions of a policy as the model reads them: `[N, A]` in [-1, 1]."""
        return self.one_hot.encode(action) if self.one_hot else action.clamp(-1, 1)

    def initial_state(self, observation: Any) -> State:
        """The state at the first observation of an episode."""
        num = len(next(iter(self.of(observation).values())))
        nothing = self.into_stoch.weight.new_zeros(num, self.actions)
        return self.observe(self.zero_state(num, nothing), nothing, observation)

    def observe(self, state: State, action: Tensor, observation: Any) -> State:
        """The state after an action and the observation that it led to: the mean of q."""
        return self.step(state, action, observation, sample=False)

    def imagine(self, state: State, action: Tensor, noise: Tensor, temperature: float) -> tuple[State, Tensor, Tensor]:
        """The state after an action, its reward `[N, 1]`, and whether the episode ends there `[N, 1]`.

        Args:
            noise: Standard normal numbers `[N, S + 1]`: the only chance there is.
            temperature: tau: sqrt(tau) is a factor of the deviation, 1 / tau one of the log-odds of an end.
        """
        deter, seed = self.transition(state, self.into_action(action))
        prior = to_gaussian(self.prior_head(seed))
        stoch = torch.addcmul(prior.mean, prior.std, noise[:, :-1], value=math.sqrt(temperature))
        state = State(deter, stoch)
        reward = as_float32(self.reward_model(state.feature))
        if self.continue_model is None:
            return state, reward, torch.zeros_like(reward, dtype=torch.bool)
        ends = sample_episode_end(
            as_float32(self.continue_model(state.feature)).sigmoid() / self.gamma, noise[:, -1:], temperature
        )
        return state, reward, ends


class Policy(nn.Module):
    """pi(a | s) on features: a squashed Gaussian, or one-hot actions that the gradient passes straight through.

    Args:
        features: Their number.
        env: Spaces.
        units: Width of the hidden layers.
        activation: Between them.
        initial_std: Of the Gaussian before it is squashed, at the start.
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
