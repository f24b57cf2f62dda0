"""Truncated quantile critics (Kuznetsov et al. 2020, arXiv:2005.04269).

TQC is soft actor-critic whose critics predict the distribution of the return, each by M quantiles (atoms). The atoms of
all critics for (s', a') form one mixture, and its largest atoms are dropped: they are where overestimation shows.

Pseudocode (Algorithm 1), for N critics Z_n of M atoms theta_n^m at the levels tau_m = (2m - 1) / 2M:

    initialise Z_1, ..., Z_N, pi; targets Z'_n <- Z_n; replay D <- {}
    for each environment step:
        a ~ pi(.|s); observe r, s'; D <- D + {(s, a, r, s', terminated)}
        sample a batch from D; a' ~ pi(.|s')
        z_1 <= z_2 <= ... <= z_NM: sorted atoms of all Z'_n(s', a')
        y_i = r + gamma (1 - terminated) (z_i - alpha log pi(a'|s')),  i = 1, ..., N (M - dropped)
        Z_n   <- Z_n   - lr grad J_Z(Z_n)
        pi    <- pi    - lr grad J_pi(pi)
        alpha <- alpha - lr grad J(alpha)
        Z'_n  <- tau Z_n + (1 - tau) Z'_n

Deviations:
    - One iteration takes 32 vector steps and then all updates due. The paper takes 1 step: `steps_per_iteration=1`.
    - Default values are those of sb3-contrib. The authors' code has 5 critics of three layers of 512 units, drops no
      atoms in HalfCheetah and 5 per critic in Hopper, and takes no random actions at the start.

Metrics:
    train/critic_loss: J_Z, averaged over the critics.
    train/actor_loss: J_pi.
    train/alpha_loss: J(alpha).
    train/alpha: the temperature.
    train/entropy: -log pi(a|s), averaged over the batch; approaches `target_entropy`.
    train/q_value: mean of the atoms of all critics for (s, a), averaged over the batch.
"""

import copy
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.functional import huber_loss
from torch.optim import Adam, Optimizer

from levin.algorithms.base import Algorithm, Batch
from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec
from levin.core.types import Activation, Fraction, Network, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from levin.data.replay import Replay, make_replay
from levin.nn.distributions import SquashedNormal
from levin.nn.layers import as_float32
from levin.nn.networks import Architecture, StochasticPolicy
from levin.nn.parameters import freeze

LOG_STD_MIN, LOG_STD_MAX = -20, 2  # the authors' code


class TQC(Algorithm):
    """Truncated quantile critics with a squashed Gaussian actor and a learned temperature.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor. The authors' code: 0.99.
        tau: Step of the target critics towards the critics. The authors' code: 0.005.
        actor_lr: Learning rate of the actor (Adam). The authors' code: 3e-4, as for the next two.
        critic_lr: Learning rate of the critics (Adam).
        alpha_lr: Learning rate of the temperature (Adam); 0 keeps the temperature fixed.
        initial_alpha: Temperature at the start. The authors' code: 1.0.
        target_entropy: Entropy that the temperature steers to, in nats; null: -|A|, as in the authors' code.
        num_critics: Number N of critics. sb3-contrib: 2; the authors' code: 5.
        num_atoms: Atoms M of each critic. The authors' code: 25.
        dropped_atoms: Atoms per critic that targets leave out, the largest of the mixture. The authors' code: 2, but 0
            in HalfCheetah and 5 in Hopper.
        batch_size: Transitions per update. The authors' code: 256.
        replay_ratio: Updates per env step. The authors' code: 1.
        learning_starts: Env steps before the first update. RL Baselines3 Zoo: 10000.
        random_env_steps: Env steps with uniformly random actions at the start; null: `learning_starts`.
        buffer_size: Transitions kept in replay; for pixels, frames. The authors' code: 1e6.
        buffer_storage: Storage of replay: `memory`, or `memmap` for a file.
        steps_per_iteration: Vector steps between two rounds of updates.
        hidden_sizes: Widths of the hidden layers of the actor. The authors' code: 256, 256.
        critic_hidden_sizes: Widths of the hidden layers of the critics. sb3-contrib: 256, 256; the
            authors' code: 512, 512, 512.
        activation: Activation between the layers. The authors' code: relu.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        compile: Whether to compile the losses of critics and actor, and on a GPU to run the whole update as a CUDA
            graph. Other rounding, no faster on a CPU.

    Raises:
        ConfigError: No atom is left in a target.
    """

    actions: ClassVar = ("box",)
    observations: ClassVar = ("float32", "uint8")
    buffer: Replay
    levels: Tensor

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
        num_critics: PositiveInt = 2,
        num_atoms: PositiveInt = 25,
        dropped_atoms: NonNegativeInt = 2,
        batch_size: PositiveInt = 256,
        replay_ratio: NonNegativeFloat = 1.0,
        learning_starts: NonNegativeInt = 10_000,
        random_env_steps: NonNegativeInt | None = None,
        buffer_size: PositiveInt = 1_000_000,
        buffer_storage: Literal["memory", "memmap"] = "memory",
        steps_per_iteration: PositiveInt = 32,
        hidden_sizes: Sequence[PositiveInt] = (256, 256),
        critic_hidden_sizes: Sequence[PositiveInt] = (256, 256),
        activation: Activation = "relu",
        network: Network = "mlp",
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        if dropped_atoms >= num_atoms:
            raise ConfigError(
                f"algo.dropped_atoms={dropped_atoms} drops all atoms of the targets: "
                f"set it below algo.num_atoms={num_atoms}"
            )
        self.gamma, self.tau = gamma, tau
        self.actor_lr, self.critic_lr, self.alpha_lr = actor_lr, critic_lr, alpha_lr
        self.batch_size, self.replay_ratio, self.learning_starts = batch_size, replay_ratio, learning_starts
        self.steps_per_iteration = steps_per_iteration
        self.random_env_steps = learning_starts if random_env_steps is None else random_env_steps

        num_actions = math.prod(env["action"]["shape"])
        self.target_entropy = -float(num_actions) if target_entropy is None else target_entropy
        self.num_targets = num_critics * (num_atoms - dropped_atoms)
        self.register_buffer("levels", (torch.arange(num_atoms) + 0.5) / num_atoms, persistent=False)  # tau_m, [M]
        self.actor = Actor(env, Architecture(network, hidden_sizes, activation))
        critics = Architecture(network, critic_hidden_sizes, activation)
        self.critic = QuantileCritic(num_critics, num_atoms, env, critics)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        # Listed once, because walking the modules in every update takes as long as updating the targets.
        self.critic_parameters: list[Tensor] = list(self.critic.parameters())
        self.target_parameters: list[Tensor] = list(self.target_critic.parameters())
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial_alpha)))
        self.buffer = make_replay(env, buffer_size, buffer_storage)
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
            self.update(batch)

    def update(self, batch: TensorDictBase) -> None:
        critic_loss, q_value = self.critic_loss(batch)
        self.step(self.critic_optimizer, critic_loss)
        with freeze(self.critic_parameters):
            actor_loss, log_prob = self.actor_loss(batch)
            alpha_loss = self.alpha_loss(log_prob)
            self.step(self.actor_optimizer, actor_loss + alpha_loss)
        self.update_target()
        self.record(q_value=q_value, critic_loss=critic_loss, actor_loss=actor_loss, alpha_loss=alpha_loss)
        self.record(alpha=self.log_alpha.exp(), entropy=-log_prob.mean())

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the critic loss J_Z, averaged over the critics, and the mean of the atoms of (s,a).

        y_i = r + gamma (1 - terminated) (z_i - alpha log pi(a'|s')), z_i the smallest atoms of all Z'_n(s',a')
        """
        observation, reward, terminated = (batch["next", key] for key in ("observation", "reward", "terminated"))
        with torch.no_grad():
            action, log_prob = self.actor(observation).sample_with_log_prob()
            mixture = self.target_critic(observation, action).transpose(0, 1).flatten(1)  # [N, B, M] -> [B, N M]
            kept = mixture.sort(-1).values[:, : self.num_targets]  # [B, K]
            soft_atoms = kept - self.log_alpha.exp() * log_prob
            target = reward + self.gamma * ~terminated * soft_atoms  # a truncation still bootstraps
        atoms = self.critic(batch["observation"], batch["action"])  # [N, B, M]
        return self.quantile_loss(atoms, target), atoms.detach().mean()

    def quantile_loss(self, atoms: Tensor, target: Tensor) -> Tensor:
        """Return the quantile Huber loss E[|tau_m - 1(u < 0)| huber(u)], u = y_i - theta_n^m, over all n, m and i.

        Args:
            atoms: Atoms theta `[N, B, M]`.
            target: Targets y `[B, K]`.
        """
        theta, y = torch.broadcast_tensors(atoms.unsqueeze(-1), target.unsqueeze(-2))  # both [N, B, M, K]
        weight = (self.levels.unsqueeze(-1) - (y < theta).float()).abs()
        return (weight * huber_loss(theta, y, reduction="none")).mean()

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the actor loss J_pi = E[alpha log pi(a|s) - mean of all atoms of (s,a)], and log pi(a|s) `[B, 1]`.

        The action a is reparameterised. Unlike targets, the mean includes the largest atoms.
        """
        action, log_prob = self.actor(batch["observation"]).sample_with_log_prob()
        q = self.critic(batch["observation"], action).mean(0).mean(-1, keepdim=True)  # [N, B, M] -> [B, 1]
        return (self.log_alpha.exp().detach() * log_prob - q).mean(), log_prob.detach()

    def alpha_loss(self, log_prob: Tensor) -> Tensor:
        """Return the temperature loss J(alpha) = E[-log alpha (log pi(a|s) + target entropy)]."""
        return -(self.log_alpha * (log_prob + self.target_entropy)).mean()

    @torch.no_grad()
    def update_target(self) -> None:
        """Update the target critics: Z'_n <- tau Z_n + (1 - tau) Z'_n."""
        torch._foreach_lerp_(self.target_parameters, self.critic_parameters, self.tau)


class QuantileCritic(nn.Module):
    """Critics Z_n(s, a) of M atoms each: `[B, *S], [B, A] -> [N, B, M]`. All of them share one trunk."""

    def __init__(self, num: int, atoms: int, env: EnvSpec, architecture: Architecture) -> None:
        super().__init__()
        self.trunk, num_features = architecture.make_trunk(env)
        self.ensemble = architecture.make_ensemble(num, num_features + math.prod(env["action"]["shape"]), atoms)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return as_float32(self.ensemble(torch.cat([self.trunk(observation), action], -1)))


class Actor(nn.Module):
    """Policy pi(a|s): squashed Gaussian over actions `[B, A]`, given observations `[B, *S]`."""

    def __init__(self, env: EnvSpec, architecture: Architecture) -> None:
        super().__init__()
        self.trunk, num_features = architecture.make_trunk(env)
        self.network = architecture.make_head(num_features, 2 * math.prod(env["action"]["shape"]))

    def forward(self, observation: Tensor) -> SquashedNormal:
        loc, log_std = as_float32(self.network(self.trunk(observation))).chunk(2, -1)  # [B, 2 A] -> 2 x [B, A]
        return SquashedNormal(loc, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX))
