"""Advantage actor-critic (A2C): the synchronous form of Mnih et al. 2016 (arXiv:1602.01783), lecture row 14.

A single online agent learns from samples that are correlated in time. N of them, each in an env of its own, take T
steps with the same policy, and one update learns from all:

    grad J = E[ A_t grad log pi(a_t|s_t) ],  A_t = r_{t+1} + ... + gamma^(n-1) r_{t+n} + gamma^n V(s_{t+n}) - V(s_t)

With n up to the end of the rollout (`gae_lambda: 1`), or all n mixed by GAE. In the words of `levin.estimators` that is
ScoreFunction with V(s_t) as its baseline.

Pseudocode:

    for each iteration:
        take T steps in each of N envs with pi
        R_t <- r_{t+1} + gamma R_{t+1}, from R_T = V(s_T)
        theta <- theta + lr grad( log pi(a_t|s_t) (R_t - V(s_t)) - c_1 (R_t - V(s_t))^2 + c_2 H(pi(.|s_t)) )

The lecture's form, one step of each agent, is `steps_per_iteration: 1`; `debug=lecture` selects it. With one env it is
the online actor-critic of `actor_critic.py`.

Deviations:
    - Actor and critic share no layers, except for pixels.
    - gamma^t of the derivation is dropped, as in the paper: see `discount_state_weighting`.

Metrics:
    train/actor_loss: -E[A log pi].
    train/critic_loss: squared error of V.
    train/entropy: H(pi), nats.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Optimizer

from levin.algorithms.base import Algorithm, Batch, standardize
from levin.core.spaces import EnvSpec
from levin.core.types import Activation, Fraction, NonNegativeFloat, OptimizerName, PositiveFloat, PositiveInt, Schedule
from levin.data import returns
from levin.nn.networks import Actor, Critic, make_trunk


class A2C(Algorithm):
    """Advantage actor-critic over N envs at once, for vectors and pixels.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount. RL Baselines3 Zoo: 0.99, as for all that follows.
        gae_lambda: Decay of GAE; 1.0 is the n-step return.
        optimizer: RMSprop.
        lr: 7e-4.
        lr_schedule: `linear` takes it to 0.
        schedule_env_steps: Env steps after which a linear schedule is at 0.
        steps_per_iteration: Vector steps of a rollout, T: 5.
        discount_state_weighting: Weigh step t of an episode by gamma^t, as the gradient of J has it.
        normalize_advantage: To mean 0 and deviation 1, in each rollout: no.
        entropy_coef: c_2: 0.
        value_coef: c_1: 0.5.
        max_grad_norm: Of actor and critic together: 0.5.
        hidden_sizes: Widths of the hidden layers of actor and critic: 64, 64.
        activation: Between the layers: tanh.
        initial_log_std: Of a Gaussian policy: 0.
        compile: The loss, on a GPU all of an update as a CUDA graph; the same numbers in less time, after tens of
            seconds at the start.
    """

    actions: ClassVar = ("box", "discrete", "multi_discrete")
    observations: ClassVar = ("float32", "uint8")
    optimizer_name: OptimizerName

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 0.99,
        gae_lambda: Fraction = 1.0,
        optimizer: OptimizerName = "rmsprop",
        lr: PositiveFloat = 7e-4,
        lr_schedule: Schedule = "constant",
        schedule_env_steps: PositiveInt = 1_000_000,
        steps_per_iteration: PositiveInt = 5,
        discount_state_weighting: bool = False,
        normalize_advantage: bool = False,
        entropy_coef: NonNegativeFloat = 0.0,
        value_coef: NonNegativeFloat = 0.5,
        max_grad_norm: PositiveFloat | None = 0.5,
        hidden_sizes: Sequence[PositiveInt] = (64, 64),
        activation: Activation = "tanh",
        initial_log_std: float = 0.0,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        self.gamma, self.gae_lambda, self.optimizer_name, self.lr = gamma, gae_lambda, optimizer, lr
        self.lr_schedule, self.schedule_env_steps = lr_schedule, schedule_env_steps
        self.steps_per_iteration, self.step_count = steps_per_iteration, discount_state_weighting
        self.normalize_advantage, self.entropy_coef, self.value_coef = normalize_advantage, entropy_coef, value_coef
        self.max_grad_norm = max_grad_norm

        self.trunk, features = make_trunk(env)
        self.actor = Actor(features, env, hidden_sizes, activation, initial_log_std)
        self.critic = Critic(features, hidden_sizes, activation)
        if compile:
            self.compile_losses("combined_loss")
            self.capture("update")

    def configure_optimizers(self) -> Optimizer:
        self.optimizer = self.make_optimizer(self.optimizer_name, self.parameters(), self.lr)
        return self.optimizer

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        if self.lr_schedule == "linear":
            self.optimizer.param_groups[0]["lr"] = self.lr * self.remaining(self.schedule_env_steps)
        self.update(self.normalize(rollout))
        self.updates += 1

    def update(self, rollout: TensorDictBase) -> None:
        """One gradient step on all transitions `[N, T]` of a rollout."""
        loss, metrics = self.combined_loss(rollout)
        self.step(self.optimizer, loss, self.max_grad_norm)
        self.record(**metrics)

    def combined_loss(self, rollout: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What the gradient is taken of, and its parts."""
        actor_loss, critic_loss, entropy = self.losses(rollout)
        loss = actor_loss + self.value_coef * critic_loss
        if self.entropy_coef:  # what is not wanted is not differentiated
            loss = loss - self.entropy_coef * entropy
        metrics = {"actor_loss": actor_loss, "critic_loss": critic_loss, "entropy": entropy}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def losses(self, rollout: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of actor and critic, and the entropy: all three read the same features."""
        features = self.trunk(rollout["observation"].flatten(0, 1))  # [N, T, *S] -> [N T, F]
        after = self.trunk(rollout["next", "observation"].flatten(0, 1))
        distribution = self.actor(features)
        value, next_value = self.critic(torch.cat([features, after])).chunk(2)  # [2 N T, 1] -> 2 x [N T, 1]
        target = self.value_target(rollout, next_value).flatten(0, 1)  # [N, T, 1] -> [N T, 1]
        weight = target - value.detach()
        if self.normalize_advantage:
            weight = standardize(weight)
        if self.step_count:
            weight = weight * self.gamma ** rollout["step_count"].view_as(weight).to(weight)
        log_prob = distribution.log_prob(rollout["action"].flatten(0, 1))
        return self.actor_loss(log_prob, weight), self.critic_loss(value, target), distribution.entropy().mean()

    @torch.no_grad()
    def value_target(self, rollout: Batch, next_value: Tensor) -> Tensor:
        """R_t, `[N, T, 1]`: the TD(lambda) return, which is V(s_t) plus the advantage by GAE."""
        reward, terminated, done = (rollout["next", key] for key in ("reward", "terminated", "done"))
        return returns.lambda_return(
            reward=reward,
            terminated=terminated,
            done=done,
            next_value=next_value.view_as(reward),
            gamma=self.gamma,
            lambda_=self.gae_lambda,
        )

    def actor_loss(self, log_prob: Tensor, weight: Tensor) -> Tensor:
        """-E[A log pi(a|s)], with gamma^t in A where the derivation is followed to the letter. Both `[B, 1]`."""
        return -(weight * log_prob).mean()

    def critic_loss(self, value: Tensor, target: Tensor) -> Tensor:
        """E[(R - V(s))^2]. Both `[B, 1]`."""
        return (target - value).square().mean()
