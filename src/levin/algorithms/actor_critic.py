"""Actor-critic (Sutton and Barto 2018, chapter 13; Konda and Tsitsiklis 2003, doi:10.1137/S0363012901385691).

A learned critic takes the place of the sampled return as the weight of an action. This lowers the variance of the
gradient and adds some bias.

    grad J = E[ sum_t gamma^t Q(s_t,a_t) grad log pi(a_t|s_t) ]            `critic: q`
           = E[ sum_t gamma^t A_t grad log pi(a_t|s_t) ]                   `critic: advantage`

with A_t = r_{t+1} + gamma V(s_{t+1}) - V(s_t).

Pseudocode:

    for each iteration:
        collect T steps of N envs with pi (or whole episodes)
        weight_t <- Q(s_t,a_t), or r_{t+1} + gamma V(s_{t+1}) - V(s_t)
        critic_updates times:
            q:         Q <- Q - lr grad E[(Q(s_t,a_t) - (r_{t+1} + gamma Q(s_{t+1},a')))^2]
            advantage: V <- V - lr grad E[(V(s_t) - (r_{t+1} + gamma V(s_{t+1})))^2]
        theta <- theta + lr grad E[ weight_t log pi(a_t|s_t) ]

With `online: true` there is no batch: act, observe, update the critic, update the actor, s <- s'.

`q_target` chooses a' in the target of Q, and so the Q that is learned. With a' sampled from pi (`sarsa`) it is Q^pi.
With the mean over pi (`expected`) it is Q^pi with less variance. With the best a' (`max`, as in deep Q-learning) it is
Q*, NOT Q^pi: the policy gradient with Q* is biased even if Q* is exact.

Deviations:
    - The factor gamma^t is dropped, as in practice: see `discount_state_weighting`.
    - The gradient is averaged over transitions, not episodes: see `average_over`.

Metrics:
    train/actor_loss: -E[weight log pi].
    train/critic_loss: squared error of Q or V.
    train/entropy: H(pi), nats.
    train/weight_std: standard deviation of the weights before they are normalised (`normalize_advantage`, not online).
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
    Network,
    NonNegativeFloat,
    NonNegativeInt,
    OptimizerName,
    PositiveFloat,
    PositiveInt,
)
from levin.data.rollout import WholeEpisodes
from levin.nn.distributions import Categorical
from levin.nn.networks import Actor, Architecture, Critic, obey_mask


class ActorCritic(Algorithm):
    """Policy gradient with a learned critic, in batches or online.

    The default values are our own: there are no published runs of these forms on these envs.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor.
        critic: Weight of an action: `q`, Q(s,a); or `advantage`, the one-step TD error of V.
        online: Whether every step of one env is followed by one update of the critic and one of the actor.
        q_target: Target of Q: `sarsa`, `expected` or `max`; the last two need discrete actions.
        discount_state_weighting: Whether to weight step t by gamma^t, as the exact gradient of J does. Without it the
            update is the gradient of no objective, but late steps count as much as early ones.
        average_over: Unit of the mean in the policy gradient: `transitions`, or `episodes`, which is the exact gradient
            of J and gives longer episodes more weight.
        normalize_advantage: Whether to scale the weights to mean 0 and standard deviation 1 over the transitions of an
            update; never online.
        steps_per_iteration: Vector steps of a rollout; 1 if online.
        episodes_per_update: Whole episodes of a rollout, in place of `steps_per_iteration`, with `env.num_envs=1`; 0:
            fixed-length rollouts.
        optimizer: Optimiser of actor and critic.
        actor_lr: Learning rate of the actor.
        critic_lr: Learning rate of the critic.
        critic_updates: Updates of the critic per update of the actor, each with a newly computed target.
        entropy_coef: Weight of the policy's entropy.
        max_grad_norm: Maximum gradient norm of the actor and of the critic, separately; null: no clipping.
        hidden_sizes: Widths of the hidden layers of actor and critic.
        activation: Activation between the layers.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        initial_log_std: Log standard deviation of a Gaussian policy at the start.
        compile: Whether to compile the losses of critic and actor, and on a GPU to run the whole update as a CUDA
            graph. Other rounding, no faster on a CPU.
    """

    actions: ClassVar = ("box", "discrete", "multi_discrete")
    action_masks: ClassVar = True
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
        network: Network = "mlp",
        initial_log_std: float = 0.0,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        if critic == "q" and env["action"]["type"] == "multi_discrete":
            raise ConfigError(
                f"algo.critic=q needs discrete or box actions, but those of {env['id']} are multi_discrete: "
                "set algo.critic=advantage"
            )
        if critic == "q" and q_target != "sarsa" and env["action"]["type"] != "discrete":
            raise ConfigError(
                f"algo.q_target={q_target} needs discrete actions, but those of {env['id']} are a box: "
                "set algo.q_target=sarsa"
            )
        if online and (env["num_envs"] > 1 or episodes_per_update or critic_updates > 1):
            raise ConfigError(
                "algo.online=true learns from one step of one env: "
                "also set env.num_envs=1, algo.episodes_per_update=0 and algo.critic_updates=1"
            )
        if average_over == "episodes" and not episodes_per_update:
            raise ConfigError(
                "algo.average_over=episodes needs whole episodes: set algo.episodes_per_update to 1 or more"
            )
        self.gamma, self.critic_form, self.online, self.q_target = gamma, critic, online, q_target
        self.discount_state_weighting = self.step_count = discount_state_weighting
        self.average_over, self.normalize_advantage = average_over, normalize_advantage and not online
        self.steps_per_iteration = 1 if online else steps_per_iteration
        if episodes_per_update:
            self.steps_per_iteration = WholeEpisodes(episodes=episodes_per_update)
        self.optimizer_name, self.actor_lr, self.critic_lr = optimizer, actor_lr, critic_lr
        self.critic_updates, self.entropy_coef, self.max_grad_norm = critic_updates, entropy_coef, max_grad_norm

        architecture = Architecture(network, hidden_sizes, activation)
        self.trunk, features = architecture.make_trunk(env)
        self.actor = Actor(features, env, architecture, initial_log_std)
        if critic == "advantage":
            self.critic = Critic(features, architecture)
        elif self.actor.discrete:  # Q(s, .): one value for each action
            self.critic = obey_mask(Critic(features, architecture, outputs=env["action"]["n"]), env)
        else:
            self.critic = Critic(features + len(env["action"]["low"]), architecture)
        if compile:
            self.compile_losses("critic_loss", "actor_loss")
            if not episodes_per_update:  # whose lengths vary, and a CUDA graph has fixed shapes
                self.capture("update")

    def configure_optimizers(self) -> list[Optimizer]:
        self.critic_optimizer = self.make_optimizer(self.optimizer_name, self.critic.parameters(), self.critic_lr)
        parameters = [*self.trunk.parameters(), *self.actor.parameters()]
        self.actor_optimizer = self.make_optimizer(self.optimizer_name, parameters, self.actor_lr)
        return [self.critic_optimizer, self.actor_optimizer]

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        self.update(self.normalize(rollout).flatten(0, 1))  # [N, T] -> [B]
        self.updates += 1

    def update(self, batch: TensorDictBase) -> None:
        """Update the critic `critic_updates` times, then the actor once, on transitions `[B]`."""
        rank_weight = distributed.rank_weight(len(batch))  # 1, unless ranks have different numbers of transitions
        weight = self.weight(batch)  # uses the critic before its updates on this rollout
        for _ in range(self.critic_updates):
            critic_loss = self.critic_loss(batch)
            self.step(self.critic_optimizer, rank_weight * critic_loss, self.max_grad_norm)
        if self.normalize_advantage:
            self.record(weight_std=weight.std(correction=0))
            weight = standardize(weight)
        actor_loss, entropy = self.actor_loss(batch, weight)
        actor_rank_weight = (
            distributed.rank_weight(batch["next", "done"].sum()) if self.average_over == "episodes" else rank_weight
        )
        loss = actor_rank_weight * actor_loss - rank_weight * self.entropy_coef * entropy
        self.step(self.actor_optimizer, loss, self.max_grad_norm)
        self.record(actor_loss=actor_loss, critic_loss=critic_loss, entropy=entropy)

    @torch.no_grad()
    def weight(self, batch: TensorDictBase) -> Tensor:
        """Return the weight of each action, `[B, 1]`: Q(s,a), or r + gamma V(s') - V(s)."""
        if self.critic_form == "q":
            return self.value(batch)
        return self.value_target(batch) - self.value(batch)

    def actor_loss(self, batch: Batch, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actor loss -E[weight log pi(a|s)], weight `[B, 1]`, and the mean entropy.

        With `discount_state_weighting` the weight is multiplied by gamma^t.
        """
        if self.discount_state_weighting:
            weight = weight * self.gamma ** batch["step_count"].to(weight)
        distribution = self.actor(self.trunk(batch["observation"]))
        log_prob = distribution.log_prob(batch["action"])  # [B, 1]
        count = batch["next", "done"].sum() if self.average_over == "episodes" else len(weight)
        return -(weight * log_prob).sum() / count, distribution.entropy().mean()

    def critic_loss(self, batch: Batch) -> Tensor:
        """Return the critic loss E[(Q(s,a) - (r + gamma Q(s',a')))^2], or E[(V(s) - (r + gamma V(s')))^2]."""
        return (self.value(batch) - self.value_target(batch)).square().mean()

    def value(self, batch: Batch) -> Tensor:
        """Return Q(s,a), or V(s): `[B, 1]`. The trunk learns from the actor loss alone."""
        features = self.trunk(batch["observation"]).detach()
        return self.critic(features) if self.critic_form == "advantage" else self.q_value(features, batch["action"])

    @torch.no_grad()
    def value_target(self, batch: Batch) -> Tensor:
        """Return the target r + gamma (1 - terminated) v', `[B, 1]`.

        v' is V(s'), Q(s',a') with a' ~ pi, E_pi Q(s',a') or max_a' Q(s',a').
        """
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
        """Return Q(s,a): `[B, F], [B, *A] -> [B, 1]`."""
        if self.actor.discrete:
            return self.critic(features).gather(-1, action.unsqueeze(-1))  # [B, A], [B] -> [B, 1]
        return self.critic(torch.cat([features, action], -1))
