"""CrossQ (Bhatt et al. 2024, arXiv:1902.05605v4).

CrossQ is soft actor-critic without target networks. Batch normalisation in wide critics takes their place: (s, a) and
(s', a') pass through the critics as one batch, so that the statistics of the layers are those of both. With one update
per env step, CrossQ matches algorithms that make twenty (REDQ, DroQ).

Pseudocode:

    initialise Q_1, Q_2, pi; replay D <- {}
    for each environment step:
        a ~ pi(.|s); observe r, s'; D <- D + {(s, a, r, s', terminated)}
        sample a batch from D; a' ~ pi(.|s')
        [q_i; q'_i] = Q_i([s; s'], [a; a'])                 one forward pass, normalised by its own statistics
        y = r + gamma (1 - terminated) (min_i q'_i - alpha log pi(a'|s'))                     without gradient
        Q_i <- Q_i - lr grad E[1/2 (q_i - y)^2]
        every `policy_delay` updates:
            pi    <- pi    - lr grad J_pi(pi)               Q_i normalised by the running statistics
            alpha <- alpha - lr grad J(alpha)

Deviations:
    - One iteration takes 32 vector steps and then all updates due. The paper takes 1 step: `steps_per_iteration=1`.
    - Networks start as PyTorch's default; the authors' code has Flax's, of about three times the variance.
    - With several ranks, each normalises by the statistics of its own batch, and the running statistics are averaged.

Metrics:
    train/critic_loss: E[1/2 (q_i - y)^2], summed over the two critics.
    train/actor_loss: J_pi.
    train/alpha_loss: J(alpha).
    train/alpha: the temperature.
    train/entropy: -log pi(a|s), averaged over the batch; approaches `target_entropy`.
    train/q_value: Q_i(s, a), averaged over the batch and the critics.
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from levin.algorithms.base import Algorithm, Batch
from levin.algorithms.crossq_networks import Actor, Critic, average_statistics
from levin.core.spaces import EnvSpec
from levin.core.types import Activation, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from levin.data.replay import Replay, make_replay
from levin.nn.networks import StochasticPolicy
from levin.nn.parameters import freeze


class CrossQ(Algorithm):
    """CrossQ: twin critics and an actor with batch renormalisation, no target networks, a learned temperature.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor. This and all following values are those of the authors' code: 0.99.
        actor_lr: Learning rate of the actor (Adam): 1e-3, as for the next two.
        critic_lr: Learning rate of the critics (Adam).
        alpha_lr: Learning rate of the temperature (Adam); 0 keeps the temperature fixed.
        adam_beta1: Decay of Adam's mean gradient, for actor and critics: 0.5.
        initial_alpha: Temperature at the start: 1.0.
        target_entropy: Entropy that the temperature steers to, in nats; null: -|A|.
        policy_delay: Updates of the critics per update of actor and temperature: 3.
        norm_momentum: Weight of the old value in each update of the running statistics: 0.99.
        norm_warm_up: Batches that a layer normalises by their own statistics alone: 100000.
        batch_size: Transitions per update: 256.
        replay_ratio: Updates per env step: 1.
        learning_starts: Env steps before the first update: 5000.
        random_env_steps: Env steps with uniformly random actions at the start; null: `learning_starts`.
        buffer_size: Transitions kept in replay; for pixels, frames: 1e6.
        buffer_storage: Storage of replay: `memory`, or `memmap` for a file.
        steps_per_iteration: Vector steps between two rounds of updates.
        hidden_sizes: Widths of the hidden layers of the actor: 256, 256.
        critic_hidden_sizes: Widths of the hidden layers of the critics: 2048, 2048.
        activation: Activation between the layers: relu.
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
        actor_lr: PositiveFloat = 1e-3,
        critic_lr: PositiveFloat = 1e-3,
        alpha_lr: NonNegativeFloat = 1e-3,
        adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        initial_alpha: PositiveFloat = 1.0,
        target_entropy: float | None = None,
        policy_delay: PositiveInt = 3,
        norm_momentum: Fraction = 0.99,
        norm_warm_up: NonNegativeInt = 100_000,
        batch_size: PositiveInt = 256,
        replay_ratio: NonNegativeFloat = 1.0,
        learning_starts: NonNegativeInt = 5000,
        random_env_steps: NonNegativeInt | None = None,
        buffer_size: PositiveInt = 1_000_000,
        buffer_storage: Literal["memory", "memmap"] = "memory",
        steps_per_iteration: PositiveInt = 32,
        hidden_sizes: Sequence[PositiveInt] = (256, 256),
        critic_hidden_sizes: Sequence[PositiveInt] = (2048, 2048),
        activation: Activation = "relu",
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        self.gamma, self.policy_delay = gamma, policy_delay
        self.actor_lr, self.critic_lr, self.alpha_lr, self.adam_beta1 = actor_lr, critic_lr, alpha_lr, adam_beta1
        self.batch_size, self.replay_ratio, self.learning_starts = batch_size, replay_ratio, learning_starts
        self.steps_per_iteration = steps_per_iteration
        self.random_env_steps = learning_starts if random_env_steps is None else random_env_steps

        num_actions = math.prod(env["action"]["shape"])
        self.target_entropy = -float(num_actions) if target_entropy is None else target_entropy
        self.actor = Actor(env, hidden_sizes, activation, norm_momentum, norm_warm_up)
        self.critic = Critic(env, critic_hidden_sizes, activation, norm_momentum, norm_warm_up)
        # Listed once, because walking the modules in every update takes as long as a small layer.
        self.critic_parameters: list[Tensor] = list(self.critic.parameters())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial_alpha)))
        self.buffer = make_replay(env, buffer_size, buffer_storage)
        if compile:
            self.compile_losses("critic_loss", "actor_loss")
            self.capture("update_critic", "update_actor")

    def configure_optimizers(self) -> list[Optimizer]:
        betas = (self.adam_beta1, 0.999)
        self.critic_optimizer = Adam(self.critic_parameters, lr=self.critic_lr, betas=betas, fused=True)
        # One optimiser can step both, because actor and temperature share no parameter and no gradient.
        actor = {"params": list(self.actor.parameters()), "lr": self.actor_lr, "betas": betas}
        alpha = {"params": [self.log_alpha], "lr": self.alpha_lr}
        self.actor_optimizer = Adam([actor, alpha], fused=True)
        return [self.critic_optimizer, self.actor_optimizer]

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        module = StochasticPolicy(self.observation_normalizer, nn.Identity(), self.actor, deterministic=deterministic)
        return TensorDictModule(module, in_keys=["observation"], out_keys=["action"])

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        self.buffer.extend(rollout)
        for batch in self.replay():
            self.update(batch)

    def update(self, batch: TensorDictBase) -> None:
        self.update_critic(batch)
        if (self.updates + 1) % self.policy_delay == 0:
            self.update_actor(batch)

    def update_critic(self, batch: TensorDictBase) -> None:
        critic_loss, q_value = self.critic_loss(batch)
        self.step(self.critic_optimizer, critic_loss)
        average_statistics(self.critic)
        self.record(q_value=q_value, critic_loss=critic_loss)

    def update_actor(self, batch: TensorDictBase) -> None:
        with freeze(self.critic_parameters):
            actor_loss, log_prob = self.actor_loss(batch)
            alpha_loss = self.alpha_loss(log_prob)
            self.step(self.actor_optimizer, actor_loss + alpha_loss)
        average_statistics(self.actor)
        self.record(actor_loss=actor_loss, alpha_loss=alpha_loss)
        self.record(alpha=self.log_alpha.exp(), entropy=-log_prob.mean())

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the critic loss J_Q = E[1/2 (q_i - y)^2], summed over i, and the mean of q_i.

        [q_i; q'_i] = Q_i([s; s'], [a; a']),  y = r + gamma (1 - terminated) (min_i q'_i - alpha log pi(a'|s'))
        """
        observation, reward, terminated = (batch["next", key] for key in ("observation", "reward", "terminated"))
        with torch.no_grad():
            action, log_prob = self.actor(observation).sample_with_log_prob()
        q, q_next = self.critic.joint(batch["observation"], batch["action"], observation, action)  # both [2, B, 1]
        with torch.no_grad():
            soft_value = q_next.amin(0) - self.log_alpha.exp() * log_prob  # [2, B, 1] -> [B, 1]
            target = reward + self.gamma * ~terminated * soft_value  # a truncation still bootstraps
        return 0.5 * (q - target).square().mean((1, 2)).sum(), q.detach().mean()  # [2, B, 1] -> []

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the actor loss J_pi = E[alpha log pi(a|s) - min_i Q_i(s,a)], and log pi(a|s) `[B, 1]`.

        The action a is reparameterised. The actor normalises by the statistics of the batch, the critics by their
        running statistics.
        """
        action, log_prob = self.actor(batch["observation"], training=True).sample_with_log_prob()
        q = self.critic(batch["observation"], action).amin(0)  # [2, B, 1] -> [B, 1]
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), log_prob.detach()

    def alpha_loss(self, log_prob: Tensor) -> Tensor:
        """Return the temperature loss J(alpha) = E[-alpha (log pi(a|s) + target entropy)]."""
        return -(self.log_alpha.exp() * (log_prob + self.target_entropy)).mean()
