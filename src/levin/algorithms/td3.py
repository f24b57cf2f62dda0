"""Twin delayed deep deterministic policy gradient (Fujimoto et al. 2018, arXiv:1802.09477).

TD3 is DDPG with three remedies for a critic that overestimates: the smaller of two critics, an actor that is updated
less often than they are, and targets that are smoothed over nearby actions.

Pseudocode (Algorithm 1):

    initialise Q_1, Q_2, mu; targets Q'_i <- Q_i, mu' <- mu; replay D <- {}
    for each environment step:
        a = mu(s) + N(0, exploration_noise); observe r, s'; D <- D + {(s, a, r, s', terminated)}
        sample a batch from D
        a' = mu'(s') + clip(N(0, target_noise), -c, c)
        y = r + gamma (1 - terminated) min_i Q'_i(s', a')                   Sec. 4.2, 5.3
        Q_i <- argmin E[(Q_i(s, a) - y)^2]
        every `policy_delay` updates:
            mu <- mu + lr grad E[Q_1(s, mu(s))]                             Sec. 5.2
            Q'_i <- tau Q_i + (1 - tau) Q'_i;  mu' <- tau mu + (1 - tau) mu'

With `n_step` above 1, r is the n-step return, s' the observation at its end, and gamma gamma^m (`levin.data.n_step`).
With `replay=prioritized`, squared errors are weighted (`levin.data.priorities`).

Deviations:
    - One iteration takes 32 vector steps and then all updates due. The paper takes 1 step: `steps_per_iteration=1`.
    - Default values are those of the authors' later code. The paper uses hidden layers of 400 and 300 units, batches of
      100, learning rates of 1e-3, and 10000 random steps on HalfCheetah and Ant, 1000 elsewhere.

Metrics:
    train/critic_loss: E[(Q_i - y)^2], summed over the two critics.
    train/actor_loss: -E[Q_1(s, mu(s))].
    train/q_value: Q_i(s, a), averaged over the batch and the critics.
"""

import copy
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.optim import Adam, Optimizer

from levin.algorithms.base import Algorithm, Batch
from levin.core.spaces import EnvSpec
from levin.core.types import Activation, Fraction, Network, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from levin.data.replay import Replay, make_replay, weigh
from levin.nn.exploration import GaussianNoise, NoisyPolicy
from levin.nn.networks import ActionCritic, Architecture, DeterministicActor, DeterministicPolicy
from levin.nn.parameters import freeze


class TD3(Algorithm):
    """TD3: twin critics, delayed actor, smoothed targets.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor. Paper, appendix C: 0.99.
        tau: Step of the target networks towards actor and critics, at every update of the actor. Paper: 0.005.
        actor_lr: Learning rate of the actor (Adam). The authors' code: 3e-4, as for the next.
        critic_lr: Learning rate of the critics (Adam).
        exploration_noise: Standard deviation of the noise on actions in [-1, 1]. Paper: 0.1.
        target_noise: Standard deviation of the noise on target actions. Paper: 0.2.
        target_noise_clip: Bound c on the noise on target actions. Paper: 0.5.
        policy_delay: Updates of the critics per update of actor and targets. Paper: 2.
        batch_size: Transitions per update. The authors' code: 256.
        replay_ratio: Updates per env step. Paper: 1.
        learning_starts: Env steps before the first update. The authors' code: 25000.
        random_env_steps: Env steps with uniformly random actions at the start; null: `learning_starts`.
        buffer_size: Transitions kept in replay; for pixels, frames. Paper: 1e6.
        buffer_storage: Storage of replay: `memory`, or `memmap` for a file.
        n_step: Steps n of the n-step return in y, not corrected for older policies. Paper: 1. Rainbow: 3.
        replay: How transitions are sampled: `uniform`, or `prioritized` by |TD error| (Schaul et al. 2016).
        priority_alpha: Exponent of the priorities. Schaul et al., proportional: 0.6.
        priority_beta: Exponent of the importance weights at the start. Schaul et al.: 0.4, rising linearly to 1.
        schedule_env_steps: Env steps over which `priority_beta` rises to 1; null: it stays.
        steps_per_iteration: Vector steps between two rounds of updates.
        hidden_sizes: Widths of the hidden layers of actor and critics. The authors' code: 256, 256.
        activation: Activation between the layers. Paper: relu.
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
        exploration_noise: NonNegativeFloat = 0.1,
        target_noise: NonNegativeFloat = 0.2,
        target_noise_clip: NonNegativeFloat = 0.5,
        policy_delay: PositiveInt = 2,
        batch_size: PositiveInt = 256,
        replay_ratio: NonNegativeFloat = 1.0,
        learning_starts: NonNegativeInt = 25_000,
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
        self.actor_lr, self.critic_lr = actor_lr, critic_lr
        self.target_noise, self.target_noise_clip, self.policy_delay = target_noise, target_noise_clip, policy_delay
        self.batch_size, self.replay_ratio, self.learning_starts = batch_size, replay_ratio, learning_starts
        self.steps_per_iteration, self.schedule_env_steps = steps_per_iteration, schedule_env_steps
        self.random_env_steps = learning_starts if random_env_steps is None else random_env_steps

        architecture = Architecture(network, hidden_sizes, activation)
        self.actor = DeterministicActor(env, architecture)
        self.critic = ActionCritic(2, env, architecture)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        # Listed once, because walking the modules in every update takes as long as updating the targets.
        self.critic_parameters: list[Tensor] = list(self.critic.parameters())
        self.online_parameters: list[Tensor] = [*self.critic_parameters, *self.actor.parameters()]
        self.target_parameters: list[Tensor] = [*self.target_critic.parameters(), *self.target_actor.parameters()]
        self.noise = GaussianNoise(exploration_noise)
        exponents = priority_alpha, priority_beta
        self.buffer = make_replay(
            env, buffer_size, buffer_storage, n_step=n_step, gamma=gamma, replay=replay, exponents=exponents
        )
        if compile:
            self.compile_losses("critic_loss", "actor_loss")
            self.capture("update_critic", "update_actor")

    def configure_optimizers(self) -> list[Optimizer]:
        self.critic_optimizer = Adam(self.critic_parameters, lr=self.critic_lr, fused=True)
        self.actor_optimizer = Adam(self.actor.parameters(), lr=self.actor_lr, fused=True)
        return [self.critic_optimizer, self.actor_optimizer]

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        noiseless = DeterministicPolicy(self.observation_normalizer, self.actor)
        module = noiseless if deterministic else NoisyPolicy(noiseless, self.noise)
        return TensorDictModule(module, in_keys=["observation"], out_keys=["action"])

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        self.buffer.extend(rollout)
        for batch in self.replay():
            self.buffer.set_priorities(batch, self.update(batch))

    def update(self, batch: TensorDictBase) -> Tensor:
        td_error = self.update_critic(batch)
        if (self.updates + 1) % self.policy_delay == 0:
            self.update_actor(batch)
        return td_error

    def update_critic(self, batch: TensorDictBase) -> Tensor:
        critic_loss, q_value, td_error = self.critic_loss(batch)
        self.step(self.critic_optimizer, critic_loss)
        self.record(q_value=q_value, critic_loss=critic_loss)
        return td_error

    def update_actor(self, batch: TensorDictBase) -> None:
        with freeze(self.critic_parameters):
            actor_loss = self.actor_loss(batch)
            self.step(self.actor_optimizer, actor_loss)
        self.update_target()
        self.record(actor_loss=actor_loss)

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the critic loss J_Q = E[(Q_i(s,a) - y)^2], summed over i, the mean of Q_i(s,a), and the TD errors.

        y = r + gamma (1 - terminated) min_i Q'_i(s', a')
        """
        observation, reward, terminated = (batch["next", key] for key in ("observation", "reward", "terminated"))
        discount = batch.get("discount", self.gamma)  # n-step: gamma^m
        with torch.no_grad():
            q_next = self.target_critic(observation, self.target_action(observation)).amin(0)  # [2, B, 1] -> [B, 1]
            target = reward + discount * ~terminated * q_next  # a truncation still bootstraps
        q = self.critic(batch["observation"], batch["action"])  # [2, B, 1]
        td_error = q - target
        loss = weigh(td_error.square(), batch).mean((1, 2)).sum()
        return loss, q.detach().mean(), td_error.detach()

    def target_action(self, observation: Tensor) -> Tensor:
        """Return the smoothed target action a' = clip(mu'(s') + clip(N(0, target_noise), -c, c), -1, 1)."""
        action = self.target_actor(observation)
        noise = (self.target_noise * torch.randn_like(action)).clamp_(-self.target_noise_clip, self.target_noise_clip)
        return (action + noise).clamp_(-1, 1)

    def actor_loss(self, batch: Batch) -> Tensor:
        """Return the actor loss J_mu = -E[Q_1(s, mu(s))]."""
        observation = batch["observation"]
        return -self.critic.first(observation, self.actor(observation)).mean()

    @torch.no_grad()
    def update_target(self) -> None:
        """Update the targets: Q'_i <- tau Q_i + (1 - tau) Q'_i,  mu' <- tau mu + (1 - tau) mu'."""
        torch._foreach_lerp_(self.target_parameters, self.online_parameters, self.tau)
