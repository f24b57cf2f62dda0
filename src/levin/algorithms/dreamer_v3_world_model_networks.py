"""The world model of DreamerV3: state encoder, transition model, decoder, reward and continue models."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from levin.algorithms.dreamer_v3_networks import (
    BINS,
    UNIMIX,
    BlockGRU,
    NormSiLU,
    PixelDecoder,
    PixelEncoder,
    Size,
    TwoHot,
    linear,
    norm_mlp,
    output_head,
    sample_one_hot,
    symlog,
)
from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec
from levin.estimators.pathwise import Relaxation
from levin.model_based.recurrent import State, mix_with_uniform, sample_episode_end, stack_steps
from levin.nn.distributions import OneHot
from levin.nn.networks import action_size, as_float32


class WorldModel(nn.Module):
    """State encoder, transition model, decoder, reward model and continue model.

    Args:
        env: Spaces. Observations are vectors, pixels of 64 x 64, or a dict of them.
        size: Widths.
        estimator: What carries the gradient through the draws of a state.
        gamma: Discount, which is in the continue model.

    Raises:
        ConfigError: Observations that it can't read.
    """

    def __init__(self, env: EnvSpec, *, size: Size, estimator: Relaxation, gamma: float) -> None:
        super().__init__()
        self.gamma, self.noise, self.two_hot = gamma, size.stoch + 1, TwoHot()
        self.one_hot = OneHot([env["action"]["n"]]) if env["action"]["type"] == "discrete" else None
        self.deter, self.stoch, self.actions = size.deter, size.stoch * size.classes, action_size(env)
        self.features, self.choices, self.estimator = self.deter + self.stoch, (size.stoch, size.classes), estimator
        self.parts = env["observation"].get("spaces", {"": env["observation"]})
        encoders, decoders, embedding = {}, {}, 0
        for name, part in self.parts.items():
            shape = part["shape"]
            if part["dtype"] == "uint8" and shape[1:] == [64, 64]:
                encoder = PixelEncoder(shape[0], size.depth)
                encoders[f"{name}_"], decoders[f"{name}_"] = encoder, PixelDecoder(size, shape[0])
                embedding += encoder.size
            elif part["dtype"] != "uint8" and len(shape) == 1:
                encoders[f"{name}_"] = norm_mlp(shape[0], size.units, 3)
                decoders[f"{name}_"] = output_head(self.features, size.units, 3, shape[0])
                embedding += size.units
            else:
                raise ConfigError(
                    f"DreamerV3 reads vectors, and pixels of 64 x 64; those of {env['id']} are {shape}; env.pixels=64 "
                    "draws envs of MuJoCo and dm_control so"
                )
        self.encoders, self.decoders = nn.ModuleDict(encoders), nn.ModuleDict(decoders)
        self.gru = BlockGRU(size, self.actions)
        self.prior_head = output_head(size.deter, size.hidden, 2, self.stoch)
        self.from_embedding = linear(embedding, size.hidden, fan_in=embedding + size.deter)
        self.from_deter = linear(size.deter, size.hidden, fan_in=embedding + size.deter, bias=False)
        self.posterior_norm = NormSiLU(size.hidden)
        self.posterior_head = linear(size.hidden, self.stoch)
        self.reward_model = output_head(self.features, size.units, 1, BINS, scale=0.0)
        self.continue_model = output_head(self.features, size.units, 1, 1)

    def of(self, observation: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of an observation."""
        return {name: observation[name] if name else observation for name in self.parts}  # type: ignore[index, misc]

    def embed(self, observation: Tensor | Mapping[str, Tensor]) -> Tensor:
        """`[B, *S] -> [B, hidden]`: what the state encoder makes of an observation alone. Numbers go through symlog."""
        embedded = [
            self.encoders[f"{name}_"](part if part.dtype == torch.uint8 else symlog(part))
            for name, part in self.of(observation).items()
        ]
        return self.from_embedding(torch.cat(embedded, -1))

    def log_probs(self, numbers: Tensor) -> Tensor:
        """Of the categoricals of a state: `[..., S K] -> [..., S, K]`."""
        return mix_with_uniform(as_float32(numbers).unflatten(-1, self.choices), UNIMIX)

    def sample_stoch(self, log_probs: Tensor) -> Tensor:
        """`[..., S, K] -> [..., S K]`, with the gradient of the estimator."""
        return self.estimator.relaxed_sample(log_probs).flatten(-2)

    def posterior(self, deter: Tensor, embedded: Tensor) -> Tensor:
        """The state encoder q(stoch | deter, observation), as log-probabilities."""
        return self.log_probs(self.posterior_head(self.posterior_norm(embedded + self.from_deter(deter))))

    def prior(self, deter: Tensor) -> Tensor:
        """The transition model p(stoch | deter), as log-probabilities."""
        return self.log_probs(self.prior_head(deter))

    def observe_sequence(
        self, step: Callable, state: State, observation: Tensor, before: Tensor, is_first: Tensor
    ) -> tuple[State, Tensor]:
        """The states `[B, T, *]` that a sequence of records leads to from one, and their posteriors `[B, T, S, K]`.

        What does not depend on the state before is computed for all times at once.

        Args:
            step: `observe_step`, compiled or not.
            state: `[B, *]`, of the record before the first.
            observation: `[B, T, *S]`.
            before: `[B, T, A]`, the action that led to each.
            is_first: `[B, T, 1]`: there state and action before it count for nothing.
        """
        lead = is_first.shape[:2]
        embedded = self.embed(observation.flatten(0, 1)).unflatten(0, lead).unbind(1)
        continues = ~is_first
        action_part, continues = self.gru.action_part(before * continues).unbind(1), continues.unbind(1)
        states, posteriors = [], []
        for t in range(lead[1]):
            deter, stoch, log_probs = step(*state, action_part[t], embedded[t], continues[t])
            state = State(deter, stoch)
            states.append(state)
            posteriors.append(log_probs)
        return State(*stack_steps(states)), torch.stack(posteriors, 1)

    def observe_step(
        self, deter: Tensor, stoch: Tensor, action_part: Tensor, embedded: Tensor, continues: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of `observe`: the state, and its posterior."""
        deter = self.gru(State(deter * continues, stoch * continues), action_part)
        log_probs = self.posterior(deter, embedded)
        return deter, self.sample_stoch(log_probs), log_probs

    def step(self, state: State, action: Tensor, observation: Tensor, *, sample: bool = True) -> State:
        """The state after an action `[B, A]` and the observation that it led to; not drawn: the mean of all states."""
        deter = self.gru(state, self.gru.action_part(action))
        log_probs = self.posterior(deter, self.embed(observation))
        return State(deter, self.sample_stoch(log_probs) if sample else log_probs.exp().flatten(-2))

    def imagine_step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The state after an action, as the transition model imagines it."""
        deter = self.gru(State(deter, stoch), self.gru.action_part(action))
        if torch.is_grad_enabled():
            return deter, self.sample_stoch(self.prior(deter))
        return deter, sample_one_hot(as_float32(self.prior_head(deter)).unflatten(-1, self.choices)).flatten(-2)

    # What `levin.model_based.dream_env` asks for

    def encode_action(self, action: Tensor) -> Tensor:
        """Actions of a policy as the model reads them: `[N, A]`."""
        return self.one_hot.encode(action) if self.one_hot else action

    def initial_state(self, observation: Any) -> State:
        """The state at the first observation of an episode."""
        num = len(next(iter(self.of(observation).values())))
        nothing = self.from_deter.weight.new_zeros
        before = State(nothing(num, self.deter), nothing(num, self.stoch))
        return self.observe(before, nothing(num, self.actions), observation)

    def observe(self, state: State, action: Tensor, observation: Any) -> State:
        """The state after an action and the observation that it led to: the mean of q."""
        return self.step(state, action, observation, sample=False)

    def imagine(self, state: State, action: Tensor, noise: Tensor, temperature: float) -> tuple[State, Tensor, Tensor]:
        """The state after an action, its reward `[N, 1]`, and whether the episode ends there `[N, 1]`.

        Args:
            noise: Standard normal numbers `[N, S + 1]`: the only chance there is.
            temperature: tau: 1 / tau is a factor of all log-odds.
        """
        deter = self.gru(State(state.deter, state.stoch), self.gru.action_part(action))
        below = (self.prior(deter) / temperature).softmax(-1).cumsum(-1)[..., :-1]  # [N, S, K - 1]
        chosen = (torch.special.ndtr(noise[:, :-1]).unsqueeze(-1) >= below).sum(-1)
        stoch = one_hot(chosen, self.choices[1]).to(deter).flatten(-2)
        state = State(deter, stoch)
        reward = self.two_hot.mean(as_float32(self.reward_model(state.feature)))
        continues = as_float32(self.continue_model(state.feature)).sigmoid() / self.gamma
        return state, reward, sample_episode_end(continues, noise[:, -1:], temperature)

    def decode(self, state: State) -> dict[str, Tensor]:
        """The parts of the observation `[B, *S]`: numbers after symlog, pixels in (0, 1)."""
        decoders = {name: self.decoders[f"{name}_"] for name in self.parts}
        return {
            name: decoder(state) if isinstance(decoder, PixelDecoder) else as_float32(decoder(state.feature))
            for name, decoder in decoders.items()
        }

    def pack(self, state: State) -> Tensor:
        """A state as replay keeps it, `[..., D + S]` bfloat16: deter, and the numbers of the classes."""
        classes = state.stoch.detach().unflatten(-1, self.choices).argmax(-1)
        return torch.cat([state.deter.detach().bfloat16(), classes.bfloat16()], -1)

    def unpack(self, packed: Tensor) -> State:
        """The state `[..., *]` of what replay keeps."""
        deter, classes = packed.to(self.from_deter.weight).split([self.deter, self.choices[0]], -1)
        one_hot = classes.unsqueeze(-1) == torch.arange(self.choices[1], device=packed.device)
        return State(deter.contiguous(), one_hot.to(deter).flatten(-2))
