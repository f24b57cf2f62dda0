"""World model of DreamerV3: state encoder, transition model, decoder, reward model and continue model."""

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
from levin.nn.layers import as_float32
from levin.nn.networks import action_size


class WorldModel(nn.Module):
    """State encoder, transition model, decoder, reward model and continue model.

    Args:
        env: Spaces of the env. Observations are vectors, 64 x 64 pixels, or a dict of them.
        size: Widths of the networks.
        estimator: Estimator of the gradient through sampled states.
        gamma: Discount, included in the continue model's target.

    Raises:
        ConfigError: The observation has a part that is neither a vector nor 64 x 64 pixels.
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
                    f"DreamerV3 reads vectors, or pixels of 64 x 64, but {env['id']} has {part['dtype']} observations "
                    f"of shape {shape}; for MuJoCo and dm_control envs, set env.pixels=64; for "
                    "Atari games, env.frame_stack=1 env.kwargs.img_height=64 env.kwargs.img_width=64"
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

    def observation_parts(self, observation: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts of an observation by name; a tensor is a single part with an empty name."""
        return {name: observation[name] if name else observation for name in self.parts}  # type: ignore[index, misc]

    def embed(self, observation: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the observation's contribution to the state encoder's hidden layer: `[B, *S] -> [B, hidden]`.

        Vectors go through symlog first.
        """
        embedded = [
            self.encoders[f"{name}_"](part if part.dtype == torch.uint8 else symlog(part))
            for name, part in self.observation_parts(observation).items()
        ]
        return self.from_embedding(torch.cat(embedded, -1))

    def log_probs(self, numbers: Tensor) -> Tensor:
        """Return the log-probabilities of a state's categoricals: `[..., S K] -> [..., S, K]`."""
        return mix_with_uniform(as_float32(numbers).unflatten(-1, self.choices), UNIMIX)

    def sample_stoch(self, log_probs: Tensor) -> Tensor:
        """Sample stoch with the estimator's gradient: `[..., S, K] -> [..., S K]`."""
        return self.estimator.relaxed_sample(log_probs).flatten(-2)

    def posterior(self, deter: Tensor, embedded: Tensor) -> Tensor:
        """Return the state encoder's q(stoch | deter, observation) as log-probabilities `[..., S, K]`."""
        return self.log_probs(self.posterior_head(self.posterior_norm(embedded + self.from_deter(deter))))

    def prior(self, deter: Tensor) -> Tensor:
        """Return the transition model's p(stoch | deter) as log-probabilities `[..., S, K]`."""
        return self.log_probs(self.prior_head(deter))

    def observe_sequence(
        self, step: Callable, state: State, observation: Tensor, previous_action: Tensor, is_first: Tensor
    ) -> tuple[State, Tensor]:
        """Return the states `[B, T, *]` of a sequence of records, and their posteriors `[B, T, S, K]`.

        Everything that does not depend on the previous state is computed for all T steps at once.

        Args:
            step: `observe_step`, compiled or not.
            state: State `[B, *]` of the record before the first.
            observation: Observations `[B, T, *S]`.
            previous_action: Actions `[B, T, A]` that led to each observation.
            is_first: Starts of episodes `[B, T, 1]`; previous state and action are replaced by zeros there.
        """
        lead = is_first.shape[:2]
        embedded = self.embed(observation.flatten(0, 1)).unflatten(0, lead).unbind(1)
        continues = ~is_first
        action_part, continues = self.gru.action_part(previous_action * continues).unbind(1), continues.unbind(1)
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
        """Return the next state and its posterior: one step of `observe_sequence`."""
        deter = self.gru(State(deter * continues, stoch * continues), action_part)
        log_probs = self.posterior(deter, embedded)
        return deter, self.sample_stoch(log_probs), log_probs

    def step(self, state: State, action: Tensor, observation: Tensor, *, sample: bool = True) -> State:
        """Return the state after an action `[B, A]` and the observation it led to; not sampled: the mean of q."""
        deter = self.gru(state, self.gru.action_part(action))
        log_probs = self.posterior(deter, self.embed(observation))
        return State(deter, self.sample_stoch(log_probs) if sample else log_probs.exp().flatten(-2))

    def imagine_step(self, deter: Tensor, stoch: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state after an action, sampled from the transition model."""
        deter = self.gru(State(deter, stoch), self.gru.action_part(action))
        if torch.is_grad_enabled():
            return deter, self.sample_stoch(self.prior(deter))
        return deter, sample_one_hot(as_float32(self.prior_head(deter)).unflatten(-1, self.choices)).flatten(-2)

    # --- interface for `levin.model_based.dream_env`

    def encode_action(self, action: Tensor) -> Tensor:
        """Return a policy's actions as the model reads them: `[N, A]`, one-hot if discrete."""
        return self.one_hot.encode(action) if self.one_hot else action

    def initial_state(self, observation: Any) -> State:
        """Return the state at the first observation of an episode."""
        num = len(next(iter(self.observation_parts(observation).values())))
        zeros = self.from_deter.weight.new_zeros
        before = State(zeros(num, self.deter), zeros(num, self.stoch))
        return self.observe(before, zeros(num, self.actions), observation)

    def observe(self, state: State, action: Tensor, observation: Any) -> State:
        """Return the state after an action and the observation it led to, stoch being the mean of q."""
        return self.step(state, action, observation, sample=False)

    def imagine(self, state: State, action: Tensor, noise: Tensor, temperature: float) -> tuple[State, Tensor, Tensor]:
        """Return the state after an action, the reward `[N, 1]`, and whether the episode ends there `[N, 1]`.

        Args:
            state: States `[N, *]` before the action.
            action: Actions `[N, A]`.
            noise: Standard normal values `[N, S + 1]`, the only source of randomness.
            temperature: Sampling temperature tau; multiplies the log-probabilities of p and the log-odds of an end by
                1 / tau.
        """
        deter = self.gru(State(state.deter, state.stoch), self.gru.action_part(action))
        cumulative = (self.prior(deter) / temperature).softmax(-1).cumsum(-1)[..., :-1]  # [N, S, K - 1]
        chosen = (torch.special.ndtr(noise[:, :-1]).unsqueeze(-1) >= cumulative).sum(-1)
        stoch = one_hot(chosen, self.choices[1]).to(deter).flatten(-2)
        state = State(deter, stoch)
        reward = self.two_hot.mean(as_float32(self.reward_model(state.feature)))
        continues = as_float32(self.continue_model(state.feature)).sigmoid() / self.gamma
        return state, reward, sample_episode_end(continues, noise[:, -1:], temperature)

    def decode(self, state: State) -> dict[str, Tensor]:
        """Return the decoded parts of the observation `[B, *S]`: vectors after symlog, pixels in (0, 1)."""
        decoders = {name: self.decoders[f"{name}_"] for name in self.parts}
        return {
            name: decoder(state) if isinstance(decoder, PixelDecoder) else as_float32(decoder(state.feature))
            for name, decoder in decoders.items()
        }

    def pack(self, state: State) -> Tensor:
        """Return a state as replay stores it, `[..., D + S]` bfloat16: deter, and class indices of stoch."""
        classes = state.stoch.detach().unflatten(-1, self.choices).argmax(-1)
        return torch.cat([state.deter.detach().bfloat16(), classes.bfloat16()], -1)

    def unpack(self, packed: Tensor) -> State:
        """Return the state `[..., *]` from its form in replay."""
        deter, classes = packed.to(self.from_deter.weight).split([self.deter, self.choices[0]], -1)
        one_hot = classes.unsqueeze(-1) == torch.arange(self.choices[1], device=packed.device)
        return State(deter.contiguous(), one_hot.to(deter).flatten(-2))
