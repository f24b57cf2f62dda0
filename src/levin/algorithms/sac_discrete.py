"""Soft actor-critic for discrete actions (Christodoulou 2019, arXiv:1910.07207).

With finitely many actions the critic gives the value of each one. The expectations over actions that SAC estimates from
samples are exact sums here, and the gradient of the actor needs no reparameterisation.

With `critic: state_action` the critic reads a one-hot action, as in SAC. This is for multi-discrete actions, which have
too many combinations to give a value to each. `actor_estimator` chooses how the actor learns from the critic:

    grad E_{a ~ pi}[Q(s, a)]        exact: sum over all actions; loo: score function, leave-one-out; straight_through,
                                    gumbel_softmax, reinmax: backpropagation through Q and a stand-in for the sample

Pseudocode (Algorithm 1):

    initialise Q_1, Q_2: S -> R^A and pi: S -> [0, 1]^A; targets Q'_i <- Q_i; replay D <- {}
    for each iteration:
        for each environment step:
            a ~ pi(.|s); observe r, s'; D <- D + {(s, a, r, s', terminated)}
        for each gradient step:
            Q_i   <- Q_i   - lr grad J_Q(Q_i)          Eq. 4 with the soft value of Eq. 10
            pi    <- pi    - lr grad J_pi(pi)          Eq. 12
            alpha <- alpha - lr grad J(alpha)          Eq. 11
            Q'_i  <- tau Q_i + (1 - tau) Q'_i

With `n_step` above 1, r is the n-step return, s' the observation at its end, and gamma gamma^m (`levin.data.n_step`).
With `replay=prioritized`, squared errors are weighted (`levin.data.priorities`).

Deviations:
    - With `n_step` above 1, y has the entropy of the last state alone, not that of the states between.
    - One iteration takes 32 vector steps and then all updates due. The paper takes 1 step: `steps_per_iteration=1`.
    - With `state_action` the value of s' is estimated from one a' ~ pi(.|s'); its entropy is still exact.
    - The last layer of the actor starts near 0 and its hidden layers orthogonal, where SLM-Lab has PyTorch's defaults.
    - Default values are SLM-Lab's. The paper's are for Atari: batches of 64, a replay ratio of 0.25, 20000 random
      steps, and targets copied every 8000 steps.

Metrics:
    train/critic_loss: J_Q, summed over the two critics.
    train/actor_loss: J_pi.
    train/alpha_loss: J(alpha).
    train/alpha: the temperature.
    train/entropy: H(pi(.|s)) in nats, averaged over the batch; approaches `target_entropy`.
    train/q_value: Q_i(s, a), averaged over the batch and the critics.
"""

import copy
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn.functional import huber_loss, mse_loss
from torch.optim import Adam, Optimizer

from levin.algorithms.base import Algorithm, Batch
from levin.core.errors import ConfigError
from levin.core.spaces import ACTION_MASK, EnvSpec, has_mask
from levin.core.types import Activation, Fraction, Network, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from levin.data.replay import Replay, make_replay, weigh
from levin.estimators import Estimator, Exact, GumbelSoftmax, LeaveOneOut, ReinMax, StraightThrough
from levin.nn.distributions import Categorical, MultiCategorical, OneHot
from levin.nn.layers import as_float32
from levin.nn.networks import ActionCritic, Actor, Architecture, obey_mask
from levin.nn.parameters import freeze

MAX_Q_VALUES = 2**20  # values of Q per update that actor_estimator=exact may compute
ActorEstimator = Literal["exact", "loo", "straight_through", "gumbel_softmax", "reinmax"]


class SACDiscrete(Algorithm):
    """Soft actor-critic with twin critics and a learned temperature; expectations over actions exact or estimated.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor. Paper, table 2: 0.99.
        tau: Step of the target critics towards the critics. SLM-Lab: 0.005.
        actor_lr: Learning rate of the actor (Adam). Paper: 3e-4, as for the next two.
        critic_lr: Learning rate of the critics (Adam).
        alpha_lr: Learning rate of the temperature (Adam); 0 keeps the temperature fixed.
        initial_alpha: Temperature at the start: 1.0.
        target_entropy: Entropy that the temperature steers to, in nats; null: 0.98 log A as in the paper, summed over
            the choices of a multi-discrete action; with action masks, A is the number of allowed actions in each state.
        critic: Form of the critic: `state` outputs the values of all actions, as in the paper; `state_action` reads a
            one-hot action.
        actor_estimator: Estimator of the actor's gradient. All but `exact` sample actions.
        actor_draws: Number of sampled actions per state; 2 or more for `loo`.
        actor_tau: Temperature of `gumbel_softmax` and `reinmax`. `gumbel_softmax` is straight-through, so the critic
            reads only one-hot actions.
        huber: Whether errors of the critics beyond 1 count linearly.
        max_grad_norm: Maximum gradient norm of the actor, and of both critics together; null: no clipping.
        batch_size: Transitions per update. SLM-Lab: 256.
        replay_ratio: Updates per env step. SLM-Lab: 1.
        learning_starts: Env steps before the first update. SLM-Lab: 1000.
        random_env_steps: Env steps with uniformly random actions at the start; null: `learning_starts`.
        buffer_size: Transitions kept in replay; for pixels, frames. SLM-Lab: 1e5. Paper: 1e6.
        buffer_storage: Storage of replay: `memory`, or `memmap` for a file.
        n_step: Steps n of the n-step return in y, not corrected for older policies. Paper: 1. Rainbow: 3.
        replay: How transitions are sampled: `uniform`, or `prioritized` by |TD error| (Schaul et al. 2016).
        priority_alpha: Exponent of the priorities. Schaul et al., proportional: 0.6.
        priority_beta: Exponent of the importance weights at the start. Schaul et al.: 0.4, rising linearly to 1.
        schedule_env_steps: Env steps over which `priority_beta` rises to 1; null: it stays.
        steps_per_iteration: Vector steps between two rounds of updates.
        hidden_sizes: Widths of the hidden layers of actor and critics. SLM-Lab: 256, 256.
        activation: Activation between the layers: relu.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        compile: Whether to compile the losses of critics and actor, and on a GPU to run the whole update as a CUDA
            graph. Other rounding, no faster on a CPU.
    """

    actions: ClassVar = ("discrete", "multi_discrete")
    observations: ClassVar = ("float32", "uint8")
    action_masks: ClassVar = True
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
        critic: Literal["state", "state_action"] = "state",
        actor_estimator: ActorEstimator = "exact",
        actor_draws: PositiveInt = 2,
        actor_tau: PositiveFloat = 1.0,
        huber: bool = False,
        max_grad_norm: PositiveFloat | None = None,
        batch_size: PositiveInt = 256,
        replay_ratio: NonNegativeFloat = 1.0,
        learning_starts: NonNegativeInt = 1000,
        random_env_steps: NonNegativeInt | None = None,
        buffer_size: PositiveInt = 100_000,
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
        self.huber, self.max_grad_norm = huber, max_grad_norm
        self.batch_size, self.replay_ratio, self.learning_starts = batch_size, replay_ratio, learning_starts
        self.steps_per_iteration, self.schedule_env_steps = steps_per_iteration, schedule_env_steps
        self.random_env_steps = learning_starts if random_env_steps is None else random_env_steps

        self.one_hot = OneHot(env["action"].get("nvec") or [env["action"]["n"]])
        self.target_entropy = 0.98 * self.one_hot.max_entropy if target_entropy is None else target_entropy
        self.target_by_mask = target_entropy is None and has_mask(env["observation"])
        self.critic_form = critic
        self.estimator = self.make_estimator(actor_estimator, actor_draws, actor_tau)
        architecture = Architecture(network, hidden_sizes, activation)
        self.trunk, num_features = architecture.make_trunk(env)
        self.actor = Actor(num_features, env, architecture)
        if critic == "state_action":
            self.critic = ActionCritic(2, env, architecture)
        elif env["action"]["type"] == "discrete":
            trunk, _ = architecture.make_trunk(env)
            values = architecture.make_ensemble(2, num_features, env["action"]["n"])
            self.critic = nn.Sequential(trunk, obey_mask(values, env))
        else:
            raise ConfigError(
                "algo.critic=state needs a discrete action space: for a multi_discrete one set algo.critic=state_action"
            )
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
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

    def make_estimator(self, name: ActorEstimator, draws: int, tau: float) -> Estimator:
        """Build the estimator of grad E_{a ~ pi}[Q(s, a)]. Raises ConfigError for settings that it can't work with."""
        if name == "exact":
            values = self.one_hot.combinations * self.batch_size
            if self.critic_form == "state_action" and values > MAX_Q_VALUES:
                raise ConfigError(
                    f"algo.actor_estimator=exact would evaluate {values} actions per update, more than {MAX_Q_VALUES}: "
                    "use loo, straight_through, gumbel_softmax or reinmax"
                )
            return Exact()
        if name == "loo":
            if draws < 2:
                raise ConfigError(f"algo.actor_estimator=loo needs algo.actor_draws to be 2 or more, got {draws}")
            return LeaveOneOut(draws)
        if name == "straight_through":
            return StraightThrough(num=draws)
        return GumbelSoftmax(tau, hard=True, num=draws) if name == "gumbel_softmax" else ReinMax(tau, num=draws)

    def configure_optimizers(self) -> list[Optimizer]:
        self.critic_optimizer = Adam(self.critic_parameters, lr=self.critic_lr, fused=True)
        self.actor_optimizer = Adam([*self.trunk.parameters(), *self.actor.parameters()], lr=self.actor_lr, fused=True)
        self.alpha_optimizer = Adam([self.log_alpha], lr=self.alpha_lr, fused=True)
        return [self.critic_optimizer, self.actor_optimizer, self.alpha_optimizer]

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        self.buffer.extend(rollout)
        for batch in self.replay():
            self.buffer.set_priorities(batch, self.update(batch))

    def update(self, batch: TensorDictBase) -> Tensor:
        critic_loss, q_value, td_error = self.critic_loss(batch)
        self.step(self.critic_optimizer, critic_loss, self.max_grad_norm)
        with freeze(self.critic_parameters):
            actor_loss, entropy = self.actor_loss(batch)
            self.step(self.actor_optimizer, actor_loss, self.max_grad_norm)
        alpha_loss = self.alpha_loss(entropy, batch["observation", ACTION_MASK] if self.target_by_mask else None)
        self.step(self.alpha_optimizer, alpha_loss)
        self.update_target()
        self.record(q_value=q_value, critic_loss=critic_loss, actor_loss=actor_loss, alpha_loss=alpha_loss)
        self.record(alpha=self.log_alpha.exp(), entropy=entropy.mean())
        return td_error

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the critic loss J_Q = E[(Q_i(s,a) - y)^2], summed over i, the mean of Q_i(s,a), and the TD errors.

        y = r + gamma (1 - terminated) V(s')
        V(s') = sum_a' pi(a'|s') (min_i Q'_i(s',a') - alpha log pi(a'|s'))      Eq. 10

        With `huber`, the Huber loss takes the place of the square.
        """
        observation, reward, terminated = (batch["next", key] for key in ("observation", "reward", "terminated"))
        discount = batch.get("discount", self.gamma)  # n-step: gamma^m
        with torch.no_grad():
            policy = self.actor(self.trunk(observation))
            if self.critic_form == "state":
                log_probs = policy.log_probs  # [B, A]
                q_next = as_float32(self.target_critic(observation)).amin(0)  # [2, B, A] -> [B, A]
                soft_value = log_probs.exp() * (q_next - self.log_alpha.exp() * log_probs)
                soft_value = soft_value.sum(-1, keepdim=True)  # [B, A] -> [B, 1]
            else:
                q_next = self.target_critic(observation, self.one_hot.encode(policy.sample())).amin(0)  # -> [B, 1]
                soft_value = q_next + self.log_alpha.exp() * policy.entropy()
            target = reward + discount * ~terminated * soft_value  # a truncation still bootstraps
        if self.critic_form == "state":
            action = batch["action"].expand(2, -1).unsqueeze(-1)  # [B] -> [2, B, 1]
            q = as_float32(self.critic(batch["observation"])).gather(-1, action)  # [2, B, A] -> [2, B, 1]
        else:
            q = self.critic(batch["observation"], self.one_hot.encode(batch["action"]))  # [2, B, 1]
        regression = huber_loss if self.huber else mse_loss
        loss = weigh(regression(q, target.expand_as(q), reduction="none"), batch)  # [2, B, 1]
        # The mean is one over both critics; twice the mean is their sum.
        return 2 * loss.mean(), q.detach().mean(), (q - target).detach()

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the actor loss J_pi and the entropy H(pi(.|s)), `[B, 1]`.

        J_pi = -E[E_{a ~ pi}[min_i Q_i(s,a)] + alpha H(pi(.|s))]      Eq. 12
        """
        policy = self.actor(self.trunk(batch["observation"]))
        value, entropy = self.expected_q(batch["observation"], policy), policy.entropy()
        return -(value + self.log_alpha.exp().detach() * entropy).mean(), entropy.detach()

    def expected_q(self, observation: Tensor, policy: Categorical | MultiCategorical) -> Tensor:
        """Return E_{a ~ pi}[min_i Q_i(s,a)], `[B, 1]`; `actor_estimator` provides the gradient in pi."""
        if self.critic_form == "state":
            with torch.no_grad():
                q = as_float32(self.critic(observation)).amin(0)  # [2, B, A] -> [B, A]
            if isinstance(self.estimator, Exact):
                assert isinstance(policy, Categorical)
                return (policy.log_probs.exp() * q).sum(-1, keepdim=True)  # [B, A] -> [B, 1]
        distribution = self.one_hot.distribution(policy.logits)
        if isinstance(self.estimator, Exact):
            all_actions = self.one_hot.all_actions(observation.device).unsqueeze(1)  # [M, D, K] -> [M, 1, D, K]
            draws = self.estimator.at(distribution, all_actions.expand(-1, len(policy.logits), -1, -1))
        else:
            draws = self.estimator.sample(distribution)
        action = self.one_hot.join(draws.value)  # [S, B, D, K] -> [S, B, A]
        if self.critic_form == "state":
            value = (action * q).sum(-1)  # [S, B]
        else:
            value = self.critic(observation, action).amin(0).squeeze(-1)  # [2, S, B, 1] -> [S, B]
        return self.estimator.surrogate(draws, value).unsqueeze(-1)

    def alpha_loss(self, entropy: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the temperature loss J(alpha) = E[alpha (H(pi(.|s)) - target entropy)].

        With action masks `[B, A]` the target depends on s: few allowed actions can't have the entropy of all actions,
        and the temperature would grow forever.
        """
        target = self.target_entropy if mask is None else 0.98 * self.one_hot.allowed_entropy(mask)
        return (self.log_alpha.exp() * (entropy - target)).mean()

    @torch.no_grad()
    def update_target(self) -> None:
        """Update the target critics: Q'_i <- tau Q_i + (1 - tau) Q'_i."""
        torch._foreach_lerp_(self.target_parameters, self.critic_parameters, self.tau)
