"""REINFORCE (Williams 1992, doi:10.1007/BF00992696).

The gradient of the expected return needs no derivative of the environment, because only the policy depends on theta.

    grad J = E[ R sum_t grad log pi(a_t|s_t) ],  R = sum_t gamma^t r_{t+1}      `advantage: return`
           = E[ sum_t gamma^t G_t grad log pi(a_t|s_t) ]                        `advantage: reward_to_go`
           = E[ sum_t gamma^t (G_t - V(s_t)) grad log pi(a_t|s_t) ]             `advantage: baseline`

with G_t = sum_{t' >= t} gamma^(t'-t) r_{t'+1}. All three are unbiased: an action can't change earlier rewards, and a
baseline that does not depend on a_t adds 0 in expectation. As a rule, each has less variance than the one before.
Two more baselines need no V:

    G_t - mean of the G_t of the other episodes at the same t                    `advantage: leave_one_out`
    G_t - G_t of an episode with the same seed whose actions are the modes of pi `advantage: self_critical`

(Kool et al. 2019; Rennie et al. 2017.) An episode that has ended before t counts with G_t = 0. In terms of
`levin.estimators`, with G_t as the cost of an action, `reward_to_go` is ScoreFunction, `baseline` is ScoreFunction with
V as its baseline, and the last two are LeaveOneOut and SelfCritical.

Pseudocode:

    for each iteration:
        collect whole episodes with pi
        weight_t <- R, G_t or G_t - V(s_t)
        baseline: V <- V - lr grad E[(V(s_t) - target_t)^2], where target_t is G_t (`value_target: rollout`) or
            r_{t+1} + gamma V(s_{t+1}) (`bootstrap`)
        theta <- theta + lr grad E[ weight_t log pi(a_t|s_t) ]

Deviations:
    - The factor gamma^t is dropped, as in practice: see `discount_state_weighting`.
    - The gradient is averaged over transitions, not episodes: see `average_over`.
    - An episode cut by a time limit counts as over. Only `advantage: baseline` bootstraps: V(s') stands for the rest.

Metrics:
    train/actor_loss: -E[weight log pi].
    train/critic_loss: E[(V - target)^2] (`baseline`).
    train/entropy: H(pi), nats.
    train/weight_std: standard deviation of the weights before they are normalised.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.optim import Optimizer

from levin.algorithms.base import Algorithm, Batch, standardize
from levin.core import distributed
from levin.core.errors import ConfigError
from levin.core.spaces import IS_FIRST, EnvSpec
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
from levin.data.rollout import WholeEpisodes, successors
from levin.nn.exploration import AlternatingGreedy, PairedPolicy
from levin.nn.networks import Actor, Architecture, Critic


class REINFORCE(Algorithm):
    """Monte-Carlo policy gradient on whole episodes.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor: 0.99. This value and those below are from SLM-Lab.
        advantage: Weight of an action: the `return` of the episode, the `reward_to_go`, or the reward-to-go minus a
            baseline, which is learned (`baseline`), `leave_one_out` or `self_critical`. With `self_critical`, every
            other episode takes the modes of pi: it counts as env steps and as an episode, but is not learned from.
        value_target: Regression target of the baseline: `rollout`, G_t; or `bootstrap`, r + gamma V(s').
        discount_state_weighting: Whether to weight step t by gamma^t, as the exact gradient of J does. Without it the
            update is the gradient of no objective, but late steps count as much as early ones. No effect on
            `advantage: return`.
        average_over: Unit of the mean in the policy gradient: `transitions`, or `episodes`, which is the exact gradient
            of J and gives longer episodes more weight.
        normalize_advantage: Whether to scale the weights to mean 0 and standard deviation 1 over the transitions of an
            update.
        transitions_per_update: Minimum number of transitions per update, in complete episodes: 2048.
        episodes_per_update: Minimum number of episodes per update. If `transitions_per_update` decides how many there
            are, the last one is longer than most, which adds a bias.
        optimizer: Optimiser of policy and baseline: Adam.
        lr: Learning rate of the policy: 2e-3.
        lr_schedule: Schedule of `lr`; `linear` lowers it to 0.
        critic_lr: Learning rate of the baseline.
        critic_updates: Updates of the baseline per update of the policy.
        schedule_env_steps: Env steps after which a linear schedule is at 0.
        entropy_coef: Weight of the policy's entropy: 1e-3.
        entropy_schedule: Schedule of `entropy_coef`; `linear` lowers it to 0.
        max_grad_norm: Maximum gradient norm of the policy and of the baseline, separately: 0.5; null: no clipping.
        hidden_sizes: Widths of the hidden layers: 128, 128.
        activation: Activation between the layers: tanh.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        initial_log_std: Log standard deviation of a Gaussian policy at the start: 0.
        compile: Whether to compile the losses of policy and baseline. Other rounding, no faster on a CPU.
    """

    actions: ClassVar = ("box", "discrete", "multi_discrete")
    action_masks: ClassVar = True
    optimizer_name: OptimizerName
    step_count = True

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 0.99,
        advantage: Literal["return", "reward_to_go", "baseline", "leave_one_out", "self_critical"] = "reward_to_go",
        value_target: Literal["rollout", "bootstrap"] = "rollout",
        discount_state_weighting: bool = False,
        average_over: Literal["transitions", "episodes"] = "transitions",
        normalize_advantage: bool = True,
        transitions_per_update: PositiveInt = 2048,
        episodes_per_update: PositiveInt = 1,
        optimizer: OptimizerName = "adam",
        lr: PositiveFloat = 2e-3,
        lr_schedule: Schedule = "constant",
        critic_lr: PositiveFloat = 1e-3,
        critic_updates: PositiveInt = 10,
        schedule_env_steps: PositiveInt = 200_000,
        entropy_coef: NonNegativeFloat = 1e-3,
        entropy_schedule: Schedule = "constant",
        max_grad_norm: PositiveFloat | None = 0.5,
        hidden_sizes: Sequence[PositiveInt] = (128, 128),
        activation: Activation = "tanh",
        network: Network = "mlp",
        initial_log_std: float = 0.0,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        self.gamma, self.advantage, self.value_target = gamma, advantage, value_target
        self.discount_state_weighting, self.average_over = discount_state_weighting, average_over
        self.normalize_advantage, self.max_grad_norm = normalize_advantage, max_grad_norm
        self.optimizer_name, self.lr, self.lr_schedule = optimizer, lr, lr_schedule
        self.critic_lr, self.critic_updates = critic_lr, critic_updates
        self.schedule_env_steps = schedule_env_steps
        self.entropy_coef, self.entropy_schedule = entropy_coef, entropy_schedule
        self.steps_per_iteration = WholeEpisodes(
            transitions=transitions_per_update,
            episodes=episodes_per_update,
            paired_episodes=advantage == "self_critical",
        )
        if advantage == "leave_one_out" and episodes_per_update < 2:
            raise ConfigError(
                "algo.advantage=leave_one_out compares episodes: set algo.episodes_per_update to 2 or more"
            )

        architecture = Architecture(network, hidden_sizes, activation)
        self.trunk, features = architecture.make_trunk(env)
        self.actor = Actor(features, env, architecture, initial_log_std)
        self.critic = Critic(features, architecture) if advantage == "baseline" else None
        self.twin = AlternatingGreedy() if advantage == "self_critical" else None
        if compile:
            self.compile_losses("squared_error", "actor_loss")

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        if self.twin is None or deterministic:
            return super().policy(deterministic=deterministic)
        module = PairedPolicy(self.observation_normalizer, self.trunk, self.actor, self.twin)
        return TensorDictModule(module, in_keys=["observation", IS_FIRST], out_keys=["action"])

    def configure_optimizers(self) -> list[Optimizer]:
        parameters = [*self.trunk.parameters(), *self.actor.parameters()]
        self.optimizer = self.make_optimizer(self.optimizer_name, parameters, self.lr)
        if self.critic is None:
            return [self.optimizer]
        self.critic_optimizer = self.make_optimizer(self.optimizer_name, self.critic.parameters(), self.critic_lr)
        return [self.optimizer, self.critic_optimizer]

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        if self.lr_schedule == "linear":
            self.optimizer.param_groups[0]["lr"] = self.lr * self.remaining
        self.update(self.normalize(rollout))
        self.updates += 1

    def update(self, rollout: TensorDictBase) -> None:
        """Update the baseline `critic_updates` times and the policy once, on whole episodes `[N, T]`."""
        weight = self.weight(rollout)  # before V is trained on these episodes: a baseline must not depend on them
        rollout, weight = self.without_greedy_episodes(rollout, weight)
        rank_weight = distributed.rank_weight(rollout.numel())  # 1, unless ranks have different numbers of transitions
        if self.critic is not None:
            for _ in range(self.critic_updates):
                critic_loss = self.critic_loss(rollout)
                self.step(self.critic_optimizer, rank_weight * critic_loss, self.max_grad_norm)
            self.record(critic_loss=critic_loss)
        self.record(weight_std=weight.std(correction=0))
        if self.normalize_advantage:
            weight = standardize(weight)
        actor_loss, entropy = self.actor_loss(rollout, weight)
        entropy_coef = self.scheduled(self.entropy_coef, self.entropy_schedule)
        actor_rank_weight = (
            distributed.rank_weight(rollout["next", "done"].sum()) if self.average_over == "episodes" else rank_weight
        )
        self.step(
            self.optimizer,
            actor_rank_weight * actor_loss - rank_weight * entropy_coef * entropy,
            self.max_grad_norm,
        )
        self.record(actor_loss=actor_loss, entropy=entropy)

    @torch.no_grad()
    def weight(self, rollout: TensorDictBase) -> Tensor:
        """Return the weight of each action, `[N, T, 1]`: R, G_t, or G_t minus a baseline."""
        reward_to_go = self.reward_to_go(rollout)
        if self.advantage == "return":  # R is G at the first step of the episode
            steps = torch.arange(rollout.shape[1], device=reward_to_go.device).view(1, -1, 1)  # [1, T, 1]
            return reward_to_go.gather(1, steps - rollout["step_count"])
        if self.advantage == "leave_one_out":
            return reward_to_go - self.leave_one_out_mean(reward_to_go, rollout)
        if self.advantage == "self_critical":
            return reward_to_go - self.greedy_return(reward_to_go, rollout)
        return reward_to_go - self.value(rollout["observation"]) if self.critic else reward_to_go

    def without_greedy_episodes(self, rollout: TensorDictBase, weight: Tensor) -> tuple[TensorDictBase, Tensor]:
        """Remove the episodes that took the modes of pi: actions not sampled from pi have no score function."""
        if self.twin is None:
            return rollout, weight
        sampled = self.episode(rollout).squeeze(0) % 2 == 0  # [T]
        return rollout[:, sampled], weight[:, sampled]

    def episode(self, rollout: TensorDictBase) -> Tensor:
        """Return the number of each step's episode within the rollout `[1, T]`, counted from 0: `[1, T]`."""
        done = rollout["next", "done"].squeeze(-1).long()
        return done.cumsum(1) - done

    def leave_one_out_mean(self, reward_to_go: Tensor, rollout: TensorDictBase) -> Tensor:
        """Return the mean G_t of the other episodes at the same t, `[1, T, 1]`: 1/(n-1) sum_{j != i} G_t of episode j.

        G_t is 0 for an episode that has ended before t.
        """
        step, values = rollout["step_count"].flatten(), reward_to_go.flatten()
        # [T]: the sum at each t over all episodes; beyond the longest episode it is 0
        sum_at_step = torch.zeros_like(values).index_add(0, step, values)
        others = rollout["next", "done"].sum() - 1
        return ((sum_at_step[step] - values) / others).view_as(reward_to_go)

    def greedy_return(self, reward_to_go: Tensor, rollout: TensorDictBase) -> Tensor:
        """Return G_t of the next episode, `[1, T, 1]`, or 0 if that has ended before t.

        The next episode of one with sampled actions has the same seed and takes the modes of pi.
        """
        step = rollout["step_count"].flatten()
        episode = self.episode(rollout).flatten()
        by_episode = reward_to_go.new_zeros(int(episode[-1]) + 2, int(torch.max(step)) + 1)
        by_episode[episode, step] = reward_to_go.flatten()
        return by_episode[episode + 1, step].view_as(reward_to_go)

    def reward_to_go(self, rollout: TensorDictBase) -> Tensor:
        """Return G_t = r_{t+1} + gamma G_{t+1}, `[N, T, 1]`.

        With `advantage: baseline`, gamma V(s') stands for the rewards after a time limit; else they count as 0.
        """
        after: TensorDict = rollout.get("next")
        return returns.reward_to_go(
            reward=after["reward"],
            terminated=after["terminated"],
            done=after["done"],
            next_value=self.last_value(rollout) if self.critic else torch.zeros_like(after["reward"]),
            gamma=self.gamma,
        )

    def last_value(self, rollout: TensorDictBase) -> Tensor:
        """Return V(s_{t+1}) `[N, T, 1]` where an episode ends, and 0 elsewhere."""
        assert self.critic is not None
        critic = self.critic
        zeros = torch.zeros_like(rollout["next", "reward"])
        return successors(zeros, rollout, lambda observation: critic(self.trunk(observation)))

    def value(self, observation: Tensor) -> Tensor:
        """Return V(s): `[N, T, *S] -> [N, T, 1]`. The trunk learns from the actor loss alone."""
        assert self.critic is not None
        features = self.trunk(observation.flatten(0, 1)).detach()
        return self.critic(features).unflatten(0, observation.shape[:2])

    def actor_loss(self, rollout: Batch, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actor loss -E[weight_t log pi(a_t|s_t)], weight `[N, T, 1]`, and the mean entropy.

        With `discount_state_weighting` the weight is multiplied by gamma^t.
        """
        if self.discount_state_weighting and self.advantage != "return":  # R is already discounted from the start
            weight = weight * self.gamma ** rollout["step_count"].to(weight)
        distribution = self.actor(self.trunk(rollout["observation"].flatten(0, 1)))  # [N, T, *S] -> [N T, F]
        log_prob = distribution.log_prob(rollout["action"].flatten(0, 1)).view_as(weight)
        count = rollout["next", "done"].sum() if self.average_over == "episodes" else weight.numel()
        return -(weight * log_prob).sum() / count, distribution.entropy().mean()

    def critic_loss(self, rollout: TensorDictBase) -> Tensor:
        """Return the critic loss E[(V(s_t) - G_t)^2], or E[(V(s_t) - (r_{t+1} + gamma V(s_{t+1})))^2]."""
        with torch.no_grad():
            if self.value_target == "rollout":
                target = self.reward_to_go(rollout)
            else:
                after: TensorDict = rollout.get("next")
                target = after["reward"] + self.gamma * self.value(after["observation"]) * ~after["terminated"]
        return self.squared_error(rollout, target)

    def squared_error(self, rollout: Batch, target: Tensor) -> Tensor:
        """Return E[(V(s_t) - target_t)^2], target `[N, T, 1]`.

        Only this part of `critic_loss` is compiled, for any T: the number of passes that G_t takes depends on T.
        """
        return (self.value(rollout["observation"]) - target).square().mean()
