"""Soft actor-critic (Haarnoja et al. 2018 b, arXiv:1812.05905).

SAC maximises return and entropy together, off-policy. The gradient of the actor passes through a learned critic:

    J(pi) = E[ sum_t r(s_t, a_t) + alpha H(pi(.|s_t)) ]

Pseudocode (Algorithm 1):

    initialise Q_1, Q_2, pi; targets Q'_i <- Q_i; replay D <- {}
    for each iteration:
        for each environment step:
            a ~ pi(.|s); observe r, s'; D <- D + {(s, a, r, s', terminated)}
        for each gradient step:
            Q_i   <- Q_i   - lr grad J_Q(Q_i)          Eq. 5
            pi    <- pi    - lr grad J_pi(pi)          Eq. 7
            alpha <- alpha - lr grad J(alpha)          Eq. 18
            Q'_i  <- tau Q_i + (1 - tau) Q'_i

With `n_step` above 1, r is the n-step return, s' the observation at its end, and gamma gamma^m (`levin.data.n_step`).
With `replay=prioritized`, squared errors are weighted (`levin.data.priorities`).

Deviations:
    - With `n_step` above 1, y has the entropy of the last state alone, not that of the states between.
    - One iteration takes 32 vector steps and then all updates due. The paper takes 1 step: `steps_per_iteration=1`.
    - The first `random_env_steps` actions are uniform, as in the authors' code.

Metrics:
    train/critic_loss: J_Q, summed over the two critics.
    train/actor_loss: J_pi.
    train/alpha_loss: J(alpha).
    train/alpha: the temperature.
    train/entropy: -log pi(a|s), averaged over the batch; approaches `target_entropy`.
    train/q_value: Q_i(s, a), averaged over the batch and the critics.
"""

import copy
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from levin.algorithms.base import Algorithm, Batch
from levin.core.spaces import EnvSpec
from levin.core.types import Activation, Fraction, Network, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from levin.data.replay import Replay, make_replay, weigh
from levin.nn.distributions import SquashedNormal
from levin.nn.layers import as_float32, orthogonal_
from levin.nn.networks import ActionCritic, Architecture, StochasticPolicy
from levin.nn.parameters import freeze

LOG_STD_MIN, LOG_STD_MAX = -20, 2  # appendix D, and the authors' code


class SAC(Algorithm):
    """Soft actor-critic with twin critics, a squashed Gaussian actor and a learned temperature.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor. Table 1: 0.99.
        tau: Step of the target critics towards the critics. Table 1: 0.005.
        actor_lr: Learning rate of the actor (Adam). Table 1: 3e-4, as for the next two.
        critic_lr: Learning rate of the critics (Adam).
        alpha_lr: Learning rate of the temperature (Adam); 0 keeps the temperature fixed.
        initial_alpha: Temperature at the start; jaxrl: 1.0.
        target_entropy: Entropy that the temperature steers to, in nats; null: -|A|/2 as in jaxrl (the paper: -|A|).
        batch_size: Transitions per update. Table 1: 256.
        replay_ratio: Updates per env step. Table 1: 1.
        learning_starts: Env steps before the first update; jaxrl: 10000.
        random_env_steps: Env steps with uniformly random actions at the start; null: `learning_starts`.
        buffer_size: Transitions kept in replay; for pixels, frames. Table 1: 1e6.
        buffer_storage: Storage of replay: `memory`, or `memmap` for a file.
        n_step: Steps n of the n-step return in y, not corrected for older policies. Paper: 1. Rainbow: 3.
        replay: How transitions are sampled: `uniform`, or `prioritized` by |TD error| (Schaul et al. 2016).
        priority_alpha: Exponent of the priorities. Schaul et al., proportional: 0.6.
        priority_beta: Exponent of the importance weights at the start. Schaul et al.: 0.4, rising linearly to 1.
        schedule_env_steps: Env steps over which `priority_beta` rises to 1; null: it stays.
        steps_per_iteration: Vector steps between two rounds of updates.
        hidden_sizes: Widths of the hidden layers of actor and critics. Table 1: 256, 256.
        activation: Activation between the layers. Table 1: relu.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        compile: Whether to compile the losses of critics and actor, and on a GPU to run the whole update as a CUDA
            graph. Other rounding, no faster on a CPU.
    """

    actions: ClassVar = ("box",)
    observations: ClassVar = ("float32", "uint8")
    buffer: Replay

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 0.99,
        tau: Fraction = 0.005,
        actor_lr: PositiveFloat = 3e-4,
        critic_lr: PositiveFloat = 3e-4,
        alpha_lr: NonNegativeFloat = 3e-4,
        initial_alpha: PositiveFloat = 1.0,
        target_entropy: float | None = None,
        batch_size: PositiveInt = 256,
        replay_ratio: NonNegativeFloat = 1.0,
        learning_starts: NonNegativeInt = 10_000,
        random_env_steps: NonNegativeInt | None = None,
        buffer_size: PositiveInt = 1_000_000,
        buffer_storage: Literal["memory", "memmap"] = "memory",
        n_step: PositiveInt = 1,
        replay: Literal["uniform", "prioritized"] = "uniform",
        priority_alpha: Fraction = 0.6,
        priority_beta: Fraction = 0.4,
        schedule_env_steps: PositiveInt | None = None,
        steps_per_iteration: PositiveInt = 32,
        hidden_sizes: Sequence[PositiveInt] = (256, 256),
        activation: Activation = "relu",
        network: Network = "mlp",
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        self.gamma, self.tau = gamma, tau
        self.actor_lr, self.critic_lr, self.alpha_lr = actor_lr, critic_lr, alpha_lr
        self.batch_size, self.replay_ratio, self.learning_starts = batch_size, replay_ratio, learning_starts
        self.steps_per_iteration, self.schedule_env_steps = steps_per_iteration, schedule_env_steps
        self.random_env_steps = learning_starts if random_env_steps is None else random_env_steps

        self.target_entropy = -math.prod(env["action"]["shape"]) / 2 if target_entropy is None else target_entropy
        architecture = Architecture(network, hidden_sizes, activation)
        self.actor = Actor(env, architecture)
        self.critic = ActionCritic(2, env, architecture)
        orthogonal_(self.critic.ensemble)  # as in jaxrl
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        # Listed once, because walking the modules in every update takes as long as updating the targets.
        self.critic_parameters: list[Tensor] = list(self.critic.parameters())
        self.target_parameters: list[Tensor] = list(self.target_critic.parameters())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial_alpha)))
        exponents = priority_alpha, priority_beta
        self.buffer = make_replay(
            env, buffer_size, buffer_storage, n_step=n_step, gamma=gamma, replay=replay, exponents=exponents
        )
        if compile:
            self.compile_losses("critic_loss", "actor_loss")
            self.capture("update")

    def configure_optimizers(self) -> list[Optimizer]:
        self.critic_optimizer = Adam(self.critic_parameters, lr=self.critic_lr, fused=True)
        # One optimiser can step both, because actor and temperature share no parameter and no gradient.
        actor = {"params": list(self.actor.parameters()), "lr": self.actor_lr}
        alpha = {"params": [self.log_alpha], "lr": self.alpha_lr}
        self.actor_optimizer = Adam([actor, alpha], fused=True)
        return [self.critic_optimizer, self.actor_optimizer]

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        module = StochasticPolicy(self.observation_normalizer, nn.Identity(), self.actor, deterministic=deterministic)
        return TensorDictModule(module, in_keys=["observation"], out_keys=["action"])

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        self.buffer.extend(rollout)
        for batch in self.replay():
            self.buffer.set_priorities(batch, self.update(batch))

    def update(self, batch: TensorDictBase) -> Tensor:
        critic_loss, q_value, td_error = self.critic_loss(batch)
        self.step(self.critic_optimizer, critic_loss)
        with freeze(self.critic_parameters):
            actor_loss, log_prob = self.actor_loss(batch)
            alpha_loss = self.alpha_loss(log_prob)
            self.step(self.actor_optimizer, actor_loss + alpha_loss)
        self.update_target()
        self.record(q_value=q_value, critic_loss=critic_loss, actor_loss=actor_loss, alpha_loss=alpha_loss)
        self.record(alpha=self.log_alpha.exp(), entropy=-log_prob.mean())
        return td_error

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the critic loss J_Q = E[(Q_i(s,a) - y)^2], summed over i, the mean of Q_i(s,a), and the TD errors.

        y = r + gamma (1 - terminated) (min_i Q'_i(s',a') - alpha log pi(a'|s'))
        """
        observation, reward, terminated = (batch["next", key] for key in ("observation", "reward", "terminated"))
        discount = batch.get("discount", self.gamma)  # n-step: gamma^m
        with torch.no_grad():
            action, log_prob = self.actor(observation).sample_with_log_prob()
            q_next = self.target_critic(observation, action).amin(0)  # [2, B, 1] -> [B, 1]
            soft_value = q_next - self.log_alpha.exp() * log_prob
            target = reward + discount * ~terminated * soft_value  # a truncation still bootstraps
        q = self.critic(batch["observation"], batch["action"])  # [2, B, 1]
        td_error = q - target
        loss = weigh(td_error.square(), batch).mean((1, 2)).sum()
        return loss, q.detach().mean(), td_error.detach()

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the actor loss J_pi = E[alpha log pi(a|s) - min_i Q_i(s,a)], and log pi(a|s) `[B, 1]`.

        The action a is reparameterised.
        """
        action, log_prob = self.actor(batch["observation"]).sample_with_log_prob()
        q = self.critic(batch["observation"], action).amin(0)  # [2, B, 1] -> [B, 1]
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), log_prob.detach()

    def alpha_loss(self, log_prob: Tensor) -> Tensor:
        """Return the temperature loss J(alpha) = E[-alpha (log pi(a|s) + target entropy)]."""
        return -(self.log_alpha.exp() * (log_prob + self.target_entropy)).mean()

    @torch.no_grad()
    def update_target(self) -> None:
        """Update the target critics: Q'_i <- tau Q_i + (1 - tau) Q'_i."""
        torch._foreach_lerp_(self.target_parameters, self.critic_parameters, self.tau)


class Actor(nn.Module):
    """Policy pi(a|s): squashed Gaussian over actions `[B, A]`, given observations `[B, *S]`."""

    def __init__(self, env: EnvSpec, architecture: Architecture) -> None:
        super().__init__()
        num_actions = math.prod(env["action"]["shape"])
        self.trunk, num_features = architecture.make_trunk(env)
        self.network = architecture.make_head(num_features, 2 * num_actions)
        orthogonal_(self.network)
        # Gain 1 for the log standard deviations.
        self.network[-1].weight.data[num_actions:] /= 2**0.5  # type: ignore[operator]

    def forward(self, observation: Tensor) -> SquashedNormal:
        loc, log_std = as_float32(self.network(self.trunk(observation))).chunk(2, -1)  # [B, 2 A] -> 2 x [B, A]
        return SquashedNormal(loc, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX))
