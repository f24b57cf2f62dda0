"""Deep Q-learning (Mnih et al. 2015, doi:10.1038/nature14236).

The network Q is regressed on a bootstrap target computed from Q itself, with a max over the next actions:

    min E[ (Q(s, a) - (r + gamma max_a' Q'(s', a')))^2 ]

Pseudocode (Algorithm 1):

    initialise Q; target Q' <- Q; replay D <- {}
    for each environment step:
        a = a uniform action with probability epsilon, else argmax_a Q(s, a)
        observe r, s'; D <- D + {(s, a, r, s', terminated)}
        `replay_ratio` times:
            sample a batch from D
            y = r + gamma (1 - terminated) max_a' Q'(s', a')
            Q <- argmin E[(Q(s, a) - y)^2]
            every `target_update_every` updates: Q' <- Q

With `double_q` the action of y is chosen by Q and valued by Q' (van Hasselt et al. 2016, arXiv:1509.06461, Eq. 4).

With `n_step` above 1, r is the n-step return, s' the observation at its end, and gamma gamma^m (`levin.data.n_step`).
With `replay=prioritized`, squared errors are weighted (`levin.data.priorities`).

Deviations:
    - One iteration takes 100 vector steps with the same epsilon, and then all updates due. The paper takes 1 step:
      `steps_per_iteration=1`.
    - Default values are CleanRL's for CartPole. The paper's are for Atari: RMSprop, clipped errors (`huber`), and a
      CNN, which is used here for pixels too.

Metrics:
    train/critic_loss: J_Q.
    train/q_value: Q(s, a), averaged over the batch.
    train/epsilon: the probability of a uniform action.
"""

import copy
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.nn.functional import huber_loss
from torch.optim import Adam, Optimizer

from levin.algorithms.base import Algorithm, Batch
from levin.core.spaces import EnvSpec, has_mask
from levin.core.types import Activation, Fraction, Network, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from levin.data.replay import Replay, make_replay, weigh
from levin.nn.exploration import EpsilonGreedy, Greedy
from levin.nn.layers import as_float32
from levin.nn.networks import Architecture, obey_mask
from levin.nn.parameters import flatten_parameters


class DQN(Algorithm):
    """Deep Q-network with a target network, experience replay and epsilon-greedy exploration.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor. Paper, extended data table 1: 0.99.
        lr: Learning rate of Adam. CleanRL: 2.5e-4, like the paper's RMSprop.
        tau: Step of the target network towards Q. Paper: 1, a copy.
        target_update_every: Updates between two steps of the target network. CleanRL: 50. Paper: 10000; the authors'
            code: 2500, which are 10,000 actions.
        double_q: Whether Q chooses the next action, and not the target network.
        huber: Whether errors beyond 1 count linearly, like the paper's clipped errors.
        max_grad_norm: Maximum gradient norm; null: no clipping.
        initial_epsilon: Probability of a uniform action at the start. Paper: 1.
        final_epsilon: Probability of a uniform action at the end. CleanRL: 0.05. Paper: 0.1.
        epsilon_fraction: Fraction of `schedule_env_steps` over which epsilon falls linearly. CleanRL: 0.5.
        schedule_env_steps: Env steps that `epsilon_fraction` is a fraction of, and over which `priority_beta` rises
            to 1.
        batch_size: Transitions per update. CleanRL: 128. Paper: 32.
        replay_ratio: Updates per env step. CleanRL: 0.1. Paper: 0.25.
        learning_starts: Env steps before the first update. CleanRL: 10000. Paper: 50000.
        buffer_size: Transitions kept in replay; for pixels, frames. CleanRL: 10000. Paper: 1e6.
        buffer_storage: Storage of replay: `memory`, or `memmap` for a file.
        n_step: Steps n of the n-step return in y, not corrected for older policies. Paper: 1. Rainbow: 3.
        replay: How transitions are sampled: `uniform`, or `prioritized` by |TD error| (Schaul et al. 2016).
        priority_alpha: Exponent of the priorities. Schaul et al., proportional: 0.6.
        priority_beta: Exponent of the importance weights at the start. Schaul et al.: 0.4, rising linearly to 1.
        steps_per_iteration: Vector steps between two rounds of updates.
        hidden_sizes: Widths of the hidden layers. CleanRL: 120, 84. Paper: 512, here the last layer of the Nature CNN.
        activation: Activation between the layers. Paper: relu.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        compile: Whether to compile the loss, and on a GPU to run the update of Q as a CUDA graph. Other rounding,
            no faster on a CPU.
    """

    actions: ClassVar = ("discrete",)
    observations: ClassVar = ("float32", "uint8")
    action_masks: ClassVar = True
    buffer: Replay

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 0.99,
        lr: PositiveFloat = 2.5e-4,
        tau: Fraction = 1.0,
        target_update_every: PositiveInt = 50,
        double_q: bool = False,
        huber: bool = False,
        max_grad_norm: PositiveFloat | None = None,
        initial_epsilon: Fraction = 1.0,
        final_epsilon: Fraction = 0.05,
        epsilon_fraction: PositiveFloat = 0.5,
        schedule_env_steps: PositiveInt = 500_000,
        batch_size: PositiveInt = 128,
        replay_ratio: NonNegativeFloat = 0.1,
        learning_starts: NonNegativeInt = 10_000,
        buffer_size: PositiveInt = 10_000,
        buffer_storage: Literal["memory", "memmap"] = "memory",
        n_step: PositiveInt = 1,
        replay: Literal["uniform", "prioritized"] = "uniform",
        priority_alpha: Fraction = 0.6,
        priority_beta: Fraction = 0.4,
        steps_per_iteration: PositiveInt = 100,
        hidden_sizes: Sequence[PositiveInt] = (120, 84),
        activation: Activation = "relu",
        network: Network = "mlp",
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        self.gamma, self.lr, self.tau, self.target_update_every = gamma, lr, tau, target_update_every
        self.double_q, self.huber, self.max_grad_norm = double_q, huber, max_grad_norm
        self.initial_epsilon, self.final_epsilon = initial_epsilon, final_epsilon
        self.epsilon_env_steps = epsilon_fraction * schedule_env_steps
        self.batch_size, self.replay_ratio, self.learning_starts = batch_size, replay_ratio, learning_starts
        self.steps_per_iteration, self.schedule_env_steps = steps_per_iteration, schedule_env_steps

        architecture = Architecture(network, hidden_sizes, activation)
        trunk, num_features = architecture.make_trunk(env)
        values = architecture.make_head(num_features, env["action"]["n"])
        self.critic = nn.Sequential(trunk, obey_mask(values, env))
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.critic_parameters: list[Tensor] = list(self.critic.parameters())
        self.target_parameters: list[Tensor] = list(self.target_critic.parameters())
        self.exploration = EpsilonGreedy(initial_epsilon, action_masks=has_mask(env["observation"]))
        exponents = priority_alpha, priority_beta
        self.buffer = make_replay(
            env, buffer_size, buffer_storage, n_step=n_step, gamma=gamma, replay=replay, exponents=exponents
        )
        if compile:
            self.compile_losses("critic_loss")
            self.capture("update_critic")

    def configure_optimizers(self) -> Optimizer:
        self.optimizer = Adam([flatten_parameters(self.critic.parameters())], lr=self.lr, fused=True)
        return self.optimizer

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        select_action = Greedy() if deterministic else self.exploration
        network = nn.Sequential(self.observation_normalizer, *self.critic, select_action)
        return TensorDictModule(network, in_keys=["observation"], out_keys=["action"])

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        self.buffer.extend(rollout)
        for batch in self.replay():
            self.buffer.set_priorities(batch, self.update(batch))
        self.record(epsilon=self.exploration.epsilon)
        self.exploration.epsilon.fill_(self.scheduled_epsilon())

    def update(self, batch: TensorDictBase) -> Tensor:
        td_error = self.update_critic(batch)
        if (self.updates + 1) % self.target_update_every == 0:
            self.update_target()
        return td_error

    def update_critic(self, batch: TensorDictBase) -> Tensor:
        critic_loss, q_value, td_error = self.critic_loss(batch)
        self.step(self.optimizer, critic_loss, self.max_grad_norm)
        self.record(q_value=q_value, critic_loss=critic_loss)
        return td_error

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the critic loss J_Q = E[(Q(s,a) - y)^2], the mean of Q(s,a), and the TD errors Q(s,a) - y.

        y = r + gamma (1 - terminated) max_a' Q'(s', a')

        With `huber`, the Huber loss takes the place of the square.
        """
        observation, reward, terminated = (batch["next", key] for key in ("observation", "reward", "terminated"))
        discount = batch.get("discount", self.gamma)  # n-step: gamma^m
        with torch.no_grad():
            q_next = as_float32(self.target_critic(observation))  # [B, A]
            action = (self.critic(observation) if self.double_q else q_next).argmax(-1, keepdim=True)  # [B, 1]
            target = reward + discount * ~terminated * q_next.gather(-1, action)  # a truncation still bootstraps
        q = as_float32(self.critic(batch["observation"])).gather(-1, batch["action"].unsqueeze(-1))  # [B, A] -> [B, 1]
        td_error = q - target
        loss = huber_loss(q, target, reduction="none") if self.huber else td_error.square()
        return weigh(loss, batch).mean(), q.detach().mean(), td_error.detach()

    def scheduled_epsilon(self) -> float:
        """Return the probability of a uniform action in the next rollout."""
        progress = min(1.0, self.env_steps / self.epsilon_env_steps)
        return self.initial_epsilon + progress * (self.final_epsilon - self.initial_epsilon)

    @torch.no_grad()
    def update_target(self) -> None:
        """Update the target network: Q' <- tau Q + (1 - tau) Q'."""
        torch._foreach_lerp_(self.target_parameters, self.critic_parameters, self.tau)
