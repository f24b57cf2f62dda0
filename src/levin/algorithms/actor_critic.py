"""Actor-critic, lecture rows 10 to 13 (Sutton and Barto 2018, chapter 13; Degris et al. 2012, arXiv:1205.4839).

The return that weighs an action is replaced by what a learned critic says of it: less variance, some bias.

    grad J = E[ sum_t gamma^t Q(s_t,a_t) grad log pi(a_t|s_t) ]            `critic: q`          (row 10)
           = E[ sum_t gamma^t A_t grad log pi(a_t|s_t) ]                   `critic: advantage`  (row 12)

with A_t = r_{t+1} + gamma V(s_{t+1}) - V(s_t).

Pseudocode:

    for each iteration:
        collect T steps of N envs with pi (or whole episodes)
        weight_t <- Q(s_t,a_t), or r_{t+1} + gamma V(s_{t+1}) - V(s_t)
        critic_updates times:
            q:         Q <- Q - lr grad E[(Q(s_t,a_t) - (r_{t+1} + gamma Q(s_{t+1},a')))^2]
            advantage: V <- V - lr grad E[(V(s_t) - (r_{t+1} + gamma V(s_{t+1})))^2]
        theta <- theta + lr grad E[ weight_t log pi(a_t|s_t) ]

Online (row 13), the same without a batch: act, observe, update the critic, update the actor, s <- s'.

The a' of the target says which Q is learned (`q_target`). Drawn from pi it is Q^pi (`sarsa`); with the mean over pi it
is the same with less variance (`expected`); with the best (`max`, row 11, deep Q-learning's) it is Q*, NOT Q^pi: the
policy gradient with it is biased even where it is exact.

Deviations:
    - gamma^t is dropped, as in practice: see `discount_state_weighting`.
    - The mean is over transitions, not episodes: see `average_over`.

Metrics:
    train/actor_loss: -E[weight log pi].
    train/critic_loss: squared error of Q or V.
    train/entropy: H(pi), nats.
    train/weight_std: deviation of the weights, before they are normalised (not online).
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Optimizer

from levin.algorithms.base import Algorithm, Batch, standardize
from levin.core import distributed
from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec
from levin.core.types import (
    Activation,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OptimizerName,
    PositiveFloat,
    PositiveInt,
)
from levin.data.rollout import WholeEpisodes
from levin.nn.distributions import Categorical
from levin.nn.networks import Actor, Critic, make_trunk


class ActorCritic(Algorithm):
    """Policy gradient with a learned critic, in batches or online.

    No published run has these forms on these envs: the values are ours.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount.
        critic: What weighs an action: `q`, Q(s,a); or `advantage`, the error of V over one step.
        online: One env, one step, one update of the critic, one of the actor.
        q_target: Of Q: `sarsa`, `expected` or `max`; the last two need discrete actions.
        discount_state_weighting: Weigh step t by gamma^t, as the gradient of J has it. Without, the gradient is that of
            no objective, but late steps count as much as early ones.
        average_over: `transitions`, or `episodes`: the gradient of J exactly, longer episodes weigh more.
        normalize_advantage: The weights to mean 0 and deviation 1 over the transitions of an update; not online.
        steps_per_iteration: Vector steps of a rollout; 1 if online.
        episodes_per_update: Whole episodes instead, so many; 0: no.
        optimizer: Of actor and critic.
        actor_lr: Of the actor.
        critic_lr: Of the critic.
        critic_updates: Steps of the critic per step of the actor, each with a target of its own.
        entropy_coef: Weight of the policy's entropy.
        max_grad_norm: Of either.
        hidden_sizes: Widths of the hidden layers of actor and critic.
        activation: Between the layers.
        initial_log_std: Of a Gaussian policy.
        compile: The losses of critic and actor, on a GPU all of an update as a CUDA graph; the same numbers, on a CPU
            in no less time.
    """

    actions: ClassVar = ("box", "discrete", "multi_discrete")
    optimizer_name: OptimizerName

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 0.99,
        critic: Literal["q", "advantage"] = "advantage",
        online: bool = False,
        q_target: Literal["sarsa", "expected", "max"] = "sarsa",
        discount_state_weighting: bool = False,
        average_over: Literal["transitions", "episodes"] = "transitions",
        normalize_advantage: bool = True,
        steps_per_iteration: PositiveInt = 16,
        episodes_per_update: NonNegativeInt = 0,
        optimizer: OptimizerName = "adam",
        actor_lr: PositiveFloat = 5e-4,
        critic_lr: PositiveFloat = 1e-3,
        critic_updates: PositiveInt = 10,
        entropy_coef: NonNegativeFloat = 0.0,
        max_grad_norm: PositiveFloat | None = None,
        hidden_sizes: Sequence[PositiveInt] = (64, 64),
        activation: Activation = "tanh",
        initial_log_std: float = 0.0,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        if critic == "q" and env["action"]["type"] == "multi_discrete":
            raise ConfigError(f"algo.critic=q has one value per action, and those of {env['id']} are combinations")
        if critic == "q" and q_target != "sarsa" and env["action"]["type"] != "discrete":
            raise ConfigError(f"algo.q_target={q_target} goes through all actions, and those of {env['id']} are a box")
        if online and (env["num_envs"] > 1 or episodes_per_update or critic_updates > 1):
            raise ConfigError(
                "algo.online=true learns from one step of one env: "
                "env.num_envs=1, algo.episodes_per_update=0 and algo.critic_updates=1 go with it"
            )
        if average_over == "episodes" and not episodes_per_update:
            raise ConfigError("algo.average_over=episodes is for whole ones: algo.episodes_per_update=1 or more")
        self.gamma, self.critic_form, self.online, self.q_target = gamma, critic, online, q_target
        self.discount_state_weighting = self.step_count = discount_state_weighting
        self.average_over, self.normalize_advantage = average_over, normalize_advantage and not online
        self.steps_per_iteration = 1 if online else steps_per_iteration
        if episodes_per_update:
            self.steps_per_iteration = WholeEpisodes(episodes=episodes_per_update)
        self.optimizer_name, self.actor_lr, self.critic_lr = optimizer, actor_lr, critic_lr
        self.critic_updates, self.entropy_coef, self.max_grad_norm = critic_updates, entropy_coef, max_grad_norm

        self.trunk, features = make_trunk(env)
        self.actor = Actor(features, env, hidden_sizes, activation, initial_log_std)
        if critic == "advantage":
            self.critic = Critic(features, hidden_sizes, activation)
        elif self.actor.discrete:  # Q(s, .), a value for each action
            self.critic = Critic(features, hidden_sizes, activation, outputs=env["action"]["n"])
        else:
            self.critic = Critic(features + len(env["action"]["low"]), hidden_sizes, activation)
        if compile:
            self.compile_losses("critic_loss", "actor_loss")
            if not episodes_per_update:  # of other lengths each time
                self.capture("update")

    def configure_optimizers(self) -> list[Optimizer]:
        self.critic_optimizer = self.make_optimizer(self.optimizer_name, self.critic.parameters(), self.critic_lr)
        self.actor_optimizer = self.make_optimizer(self.optimizer_name, self.actor.parameters(), self.actor_lr)
        return [self.critic_optimizer, self.actor_optimizer]

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        self.update(self.normalize(rollout).flatten(0, 1))  # [N, T] -> [B]
        self.updates += 1

    def update(self, batch: TensorDictBase) -> None:
        """The steps of the critic, then one of the actor, on transitions `[B]`."""
        share = distributed.rank_weight(len(batch))  # 1, unless several processes have episodes of other lengths
        weight = self.weight(batch)  # by the critic as it was when the policy acted
        for _ in range(self.critic_updates):
            critic_loss = self.critic_loss(batch)
            self.step(self.critic_optimizer, share * critic_loss, self.max_grad_norm)
        if self.normalize_advantage:
            self.record(weight_std=weight.std(correction=0))
            weight = standardize(weight)
        actor_loss, entropy = self.actor_loss(batch, weight)
        actor_share = distributed.rank_weight(batch["next", "done"].sum()) if self.average_over == "episodes" else share
        loss = actor_share * actor_loss - share * self.entropy_coef * entropy
        self.step(self.actor_optimizer, loss, self.max_grad_norm)
        self.record(actor_loss=actor_loss, critic_loss=critic_loss, entropy=entropy)

    @torch.no_grad()
    def weight(self, batch: TensorDictBase) -> Tensor:
        """Q(s,a), or r + gamma V(s') - V(s): `[B, 1]`."""
        if self.critic_form == "q":
            return self.value(batch)
        return self.value_target(batch) - self.value(batch)

    def actor_loss(self, batch: Batch, weight: Tensor) -> tuple[Tensor, Tensor]:
        """-E[gamma^t weight log pi(a|s)], weight `[B, 1]`; and the mean entropy."""
        if self.discount_state_weighting:
            weight = weight * self.gamma ** batch["step_count"].to(weight)
        distribution = self.actor(self.trunk(batch["observation"]))
        log_prob = distribution.log_prob(batch["action"])  # [B, 1]
        count = batch["next", "done"].sum() if self.average_over == "episodes" else len(weight)
        return -(weight * log_prob).sum() / count, distribution.entropy().mean()

    def critic_loss(self, batch: Batch) -> Tensor:
        """E[(Q(s,a) - (r + gamma Q(s',a')))^2], or E[(V(s) - (r + gamma V(s')))^2]."""
        return (self.value(batch) - self.value_target(batch)).square().mean()

    def value(self, batch: Batch) -> Tensor:
        """Q(s,a), or V(s): `[B, 1]`."""
        features = self.trunk(batch["observation"])
        return self.critic(features) if self.critic_form == "advantage" else self.q_value(features, batch["action"])

    @torch.no_grad()
    def value_target(self, batch: Batch) -> Tensor:
        """r + gamma (1 - terminated) times V(s'), Q(s',a'), E_pi Q(s',a') or max_a' Q(s',a'): `[B, 1]`."""
        features = self.trunk(batch["next", "observation"])
        if self.critic_form == "advantage":
            next_value = self.critic(features)
        elif self.q_target == "sarsa":
            next_value = self.q_value(features, self.actor(features).sample())
        elif self.q_target == "expected":
            distribution = self.actor(features)
            assert isinstance(distribution, Categorical)
            next_value = (distribution.log_probs.exp() * self.critic(features)).sum(
                -1, keepdim=True
            )  # [B, A] -> [B, 1]
        else:
            next_value = self.critic(features).amax(-1, keepdim=True)  # [B, A] -> [B, 1]
        return batch["next", "reward"] + self.gamma * next_value * ~batch["next", "terminated"]

    def q_value(self, features: Tensor, action: Tensor) -> Tensor:
        """Q(s,a): `[B, F], [B, *A] -> [B, 1]`."""
        if self.actor.discrete:
            return self.critic(features).gather(-1, action.unsqueeze(-1))  # [B, A], [B] -> [B, 1]
        return self.critic(torch.cat([features, action], -1))
