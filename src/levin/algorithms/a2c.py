"""Advantage actor-critic (A2C): the synchronous form of Mnih et al. 2016 (arXiv:1602.01783).

A single online agent learns from samples that are correlated in time. Here N agents, each in its own env, take T steps
with the same policy, and one update learns from the transitions of all of them:

    grad J = E[ A_t grad log pi(a_t|s_t) ],  A_t = r_{t+1} + ... + gamma^(n-1) r_{t+n} + gamma^n V(s_{t+n}) - V(s_t)

With `gae_lambda: 1`, n reaches to the end of the rollout; otherwise GAE averages over all n. In terms of
`levin.estimators`, this is ScoreFunction with V(s_t) as its baseline.

Pseudocode:

    for each iteration:
        take T steps in each of N envs with pi
        R_t <- r_{t+1} + gamma R_{t+1}, from R_T = V(s_T)
        theta <- theta + lr grad( log pi(a_t|s_t) (R_t - V(s_t)) - c_1 (R_t - V(s_t))^2 + c_2 H(pi(.|s_t)) )

With `steps_per_iteration: 1` there is one update per step of all agents, as in the lecture; `debug=lecture` selects it.
With one env this is the online actor-critic of `actor_critic.py`.

Deviations:
    - Actor and critic share no layers, except the CNN for pixels.
    - The factor gamma^t of the derivation is dropped, as in the paper: see `discount_state_weighting`.

Metrics:
    train/actor_loss: -E[A log pi].
    train/critic_loss: squared error of V, in the critic's units (see `normalize_value_target`).
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
from levin.core.types import (
    Activation,
    Fraction,
    Network,
    NonNegativeFloat,
    OptimizerName,
    PositiveFloat,
    PositiveInt,
    Schedule,
)
from levin.data import returns
from levin.data.rollout import is_last, successors
from levin.nn.networks import Actor, Architecture, Critic
from levin.nn.normalizers import ReturnNormalizer


class A2C(Algorithm):
    """Advantage actor-critic on N parallel envs, for vectors and pixels.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor: 0.99. This value and those below are from RL Baselines3 Zoo.
        gae_lambda: lambda of GAE; 1.0: the n-step return.
        optimizer: Optimiser: RMSprop.
        lr: Learning rate: 7e-4.
        lr_schedule: Schedule of the learning rate; `linear` lowers it to 0.
        schedule_env_steps: Env steps after which a linear schedule is at 0.
        steps_per_iteration: Vector steps of a rollout, T: 5.
        discount_state_weighting: Whether to weight step t of an episode by gamma^t, as the exact gradient of J does.
        normalize_advantage: Whether to scale advantages to mean 0 and standard deviation 1 in each rollout: no.
        normalize_value_target: Whether the critic learns R_t / std(R), with a running std, as in Tianshou; advantages
            are in the units of the rewards either way. Default: no.
        entropy_coef: Weight of the entropy, c_2: 0.
        value_coef: Weight of the critic loss, c_1: 0.5.
        max_grad_norm: Maximum gradient norm of actor and critic together: 0.5; null: no clipping.
        hidden_sizes: Widths of the hidden layers of actor and critic: 64, 64.
        activation: Activation between the layers: tanh.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        initial_log_std: Log standard deviation of a Gaussian policy at the start: 0.
        compile: Whether to compile the loss, and on a GPU to run the whole update as a CUDA graph. Other rounding,
            faster after tens of seconds at the start.
    """

    actions: ClassVar = ("box", "discrete", "multi_discrete")
    observations: ClassVar = ("float32", "uint8")
    action_masks: ClassVar = True
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
        normalize_value_target: bool = False,
        entropy_coef: NonNegativeFloat = 0.0,
        value_coef: NonNegativeFloat = 0.5,
        max_grad_norm: PositiveFloat | None = 0.5,
        hidden_sizes: Sequence[PositiveInt] = (64, 64),
        activation: Activation = "tanh",
        network: Network = "mlp",
        initial_log_std: float = 0.0,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        self.gamma, self.gae_lambda, self.optimizer_name, self.lr = gamma, gae_lambda, optimizer, lr
        self.lr_schedule, self.schedule_env_steps = lr_schedule, schedule_env_steps
        self.steps_per_iteration, self.step_count = steps_per_iteration, discount_state_weighting
        self.normalize_advantage, self.entropy_coef, self.value_coef = normalize_advantage, entropy_coef, value_coef
        self.max_grad_norm = max_grad_norm

        architecture = Architecture(network, hidden_sizes, activation)
        self.trunk, features = architecture.make_trunk(env)
        self.actor = Actor(features, env, architecture, initial_log_std)
        self.critic = Critic(features, architecture)
        self.return_normalizer = ReturnNormalizer(normalize_value_target)
        if compile:
            self.compile_losses("combined_loss")
            self.capture("update")

    def configure_optimizers(self) -> Optimizer:
        self.optimizer = self.make_optimizer(self.optimizer_name, self.parameters(), self.lr)
        return self.optimizer

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        if self.lr_schedule == "linear":
            self.optimizer.param_groups[0]["lr"] = self.lr * self.remaining
        rollout = self.normalize(rollout)
        self.update(rollout, self.last_value(rollout))
        self.updates += 1

    def update(self, rollout: TensorDictBase, last_value: Tensor) -> None:
        """Take one gradient step on all transitions `[N, T]` of a rollout."""
        loss, metrics, target = self.combined_loss(rollout, last_value)
        self.step(self.optimizer, loss, self.max_grad_norm)
        self.return_normalizer.update(target)
        self.record(**metrics)

    def combined_loss(self, rollout: Batch, last_value: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return the total loss to minimise, its parts as metrics, and the targets R_t `[N T, 1]`."""
        actor_loss, critic_loss, entropy, target = self.losses(rollout, last_value)
        loss = actor_loss + self.value_coef * critic_loss
        if self.entropy_coef:  # with weight 0, skip its backward pass
            loss = loss - self.entropy_coef * entropy
        metrics = {"actor_loss": actor_loss, "critic_loss": critic_loss, "entropy": entropy}
        return loss, {name: value.detach() for name, value in metrics.items()}, target

    def losses(self, rollout: Batch, last_value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the actor loss, the critic loss and the mean entropy, all from the same features; and the targets."""
        features = self.trunk(rollout["observation"].flatten(0, 1))  # [N, T, *S] -> [N T, F]
        distribution, output = self.actor(features), self.critic(features)
        value = self.return_normalizer.inverse(output.detach())
        target = self.value_target(rollout, value, last_value).flatten(0, 1)  # [N, T, 1] -> [N T, 1]
        weight = target - value
        if self.normalize_advantage:
            weight = standardize(weight)
        if self.step_count:
            weight = weight * self.gamma ** rollout["step_count"].flatten(0, 1).to(weight)
        log_prob = distribution.log_prob(rollout["action"].flatten(0, 1))
        critic_loss = self.critic_loss(output, self.return_normalizer(target))
        return self.actor_loss(log_prob, weight), critic_loss, distribution.entropy().mean(), target

    @torch.no_grad()
    def last_value(self, rollout: TensorDictBase) -> Tensor:
        """Return V(s_{t+1}) `[N, T, 1]` where s_{t+1} is not the next observation (`is_last`), and 0 elsewhere."""
        zeros = torch.zeros_like(rollout["next", "reward"])
        return successors(zeros, rollout, lambda s: self.return_normalizer.inverse(self.critic(self.trunk(s))))

    @torch.no_grad()
    def value_target(self, rollout: Batch, value: Tensor, last_value: Tensor) -> Tensor:
        """Return R_t, `[N, T, 1]`: the TD(lambda) return, which is V(s_t) plus the GAE advantage."""
        reward, terminated, done = (rollout["next", key] for key in ("reward", "terminated", "done"))
        next_value = torch.where(is_last(done), last_value, value.view_as(reward).roll(-1, 1))
        return returns.lambda_return(
            reward=reward,
            terminated=terminated,
            done=done,
            next_value=next_value,
            gamma=self.gamma,
            lambda_=self.gae_lambda,
        )

    def actor_loss(self, log_prob: Tensor, weight: Tensor) -> Tensor:
        """Return the actor loss -E[A log pi(a|s)] for `[B, 1]` inputs.

        The weight A includes gamma^t with `discount_state_weighting`.
        """
        return -(weight * log_prob).mean()

    def critic_loss(self, value: Tensor, target: Tensor) -> Tensor:
        """Return the critic loss E[(R - V(s))^2] for `[B, 1]` inputs, both in the critic's units."""
        return (target - value).square().mean()
