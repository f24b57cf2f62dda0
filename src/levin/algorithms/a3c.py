"""Asynchronous advantage actor-critic (A3C; Mnih et al. 2016, arXiv:1602.01783).

Several workers train one global network. Each has its own copy of the network and its own envs, and none waits for
another. Their policies differ, and so does what they see. This takes the place of a replay buffer.

    theta <- theta + lr grad( log pi(a_t|s_t; theta') (R_t - V(s_t; theta')) - c_1 (R_t - V(s_t))^2 + c_2 H(pi(.|s_t)) )

Pseudocode (Algorithm S3), for each worker:

    repeat:
        theta' <- theta                                               pull
        take t_max steps with pi(.|s; theta')
        R_t <- r_{t+1} + gamma R_{t+1}, from R = V(s; theta') or 0
        g <- gradient at theta'
        apply g to theta, without a lock                              push

The workers also share the optimiser's statistics. `trainer.strategy=hogwild trainer.workers=4` runs four workers, which
share the buffers of the class below.

Deviations:
    - Actor and critic share no layers, except the CNN for pixels. The lock-free steps update one flat vector.
    - The loss is a mean over the transitions of a rollout, not their sum.
    - GAE can replace the n-step return (`gae_lambda`).

Metrics:
    train/actor_loss: -E[A log pi].
    train/critic_loss: squared error of V.
    train/entropy: H(pi), nats.
    train/staleness: updates by other workers between pull and push. This, the metrics above and
        `episode/...` are those of worker 0.
    train/stale_pushes: fraction of all workers' pushes with a staleness of 1 or more.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from levin.algorithms.base import Algorithm, Batch
from levin.core.errors import NotFiniteError
from levin.core.spaces import EnvSpec
from levin.core.types import Activation, Fraction, Network, NonNegativeFloat, PositiveFloat, PositiveInt, Schedule
from levin.data import returns
from levin.data.rollout import is_last, successors
from levin.nn.networks import Actor, Architecture, Critic
from levin.nn.parameters import clip_grad_norm, flatten_parameters

MAX_WORKERS, MAX_STALENESS = 256, 16


class A3C(Algorithm):
    """Asynchronous advantage actor-critic, for vectors and pixels.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor. The paper: 0.99.
        gae_lambda: lambda of GAE; 1.0: the paper's n-step return.
        optimizer: Optimiser with shared statistics, `rmsprop` or `adam`. The paper: RMSprop, by far the most robust.
        lr: Learning rate. The paper samples it from 1e-4 to 1e-2.
        lr_schedule: Schedule of the learning rate; `linear` lowers it to 0, as in the paper.
        schedule_env_steps: Env steps of all workers after which a linear schedule is at 0.
        rmsprop_decay: Decay alpha of the mean square. The paper: 0.99.
        eps: Constant added to the mean square (RMSprop) or to its root (Adam).
        steps_per_iteration: Vector steps of a rollout, t_max. The paper: 5.
        entropy_coef: Weight of the entropy, c_2. The paper: 0.01, for Atari.
        value_coef: Weight of the critic loss, c_1. A2C: 0.5.
        max_grad_norm: Maximum gradient norm of actor and critic together.
        hidden_sizes: Widths of the hidden layers of actor and critic.
        activation: Activation between the layers.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        initial_log_std: Log standard deviation of a Gaussian policy at the start.
        compile: Whether each worker compiles its loss. Other rounding, faster after tens of seconds at the start.
    """

    not_saved: ClassVar = ("local", "local_parameters", "pushes", "staleness")  # copies, and counts saved as totals
    actions: ClassVar = ("box", "discrete", "multi_discrete")
    observations: ClassVar = ("float32", "uint8")
    action_masks: ClassVar = True
    lock_free: ClassVar = True
    theta: Tensor
    mean_square: Tensor
    momentum: Tensor
    pushes: Tensor
    staleness: Tensor

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 0.99,
        gae_lambda: Fraction = 1.0,
        optimizer: Literal["rmsprop", "adam"] = "rmsprop",
        lr: PositiveFloat = 7e-4,
        lr_schedule: Schedule = "linear",
        schedule_env_steps: PositiveInt = 500_000,
        rmsprop_decay: Fraction = 0.99,
        eps: PositiveFloat = 1e-5,
        steps_per_iteration: PositiveInt = 5,
        entropy_coef: NonNegativeFloat = 0.0,
        value_coef: NonNegativeFloat = 0.5,
        max_grad_norm: PositiveFloat = 0.5,
        hidden_sizes: Sequence[PositiveInt] = (64, 64),
        activation: Activation = "tanh",
        network: Network = "mlp",
        initial_log_std: float = 0.0,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        self.gamma, self.gae_lambda, self.optimizer_name = gamma, gae_lambda, optimizer
        self.lr, self.lr_schedule, self.schedule_env_steps = lr, lr_schedule, schedule_env_steps
        self.rmsprop_decay, self.eps, self.steps_per_iteration = rmsprop_decay, eps, steps_per_iteration
        self.entropy_coef, self.value_coef, self.max_grad_norm = entropy_coef, value_coef, max_grad_norm

        # theta', this worker's copy of the network
        architecture = Architecture(network, hidden_sizes, activation)
        self.trunk, features = architecture.make_trunk(env)
        self.actor = Actor(features, env, architecture, initial_log_std)
        self.critic = Critic(features, architecture)
        self.local_parameters = list(self.parameters())
        self.unshare_local_parameters()
        # theta and the optimiser's statistics, shared by all workers
        self.register_buffer("theta", self.local.clone())  # [P]
        self.register_buffer("mean_square", torch.zeros_like(self.theta))
        self.register_buffer("momentum", torch.zeros_like(self.theta) if optimizer == "adam" else None)
        # Each worker writes only its own entry, so no count is lost without a lock.
        self.register_buffer("pushes", torch.zeros(MAX_WORKERS, dtype=torch.int64), persistent=False)
        self.register_buffer("staleness", torch.zeros(MAX_WORKERS, MAX_STALENESS, dtype=torch.int64), persistent=False)
        if compile:
            self.compile_losses("combined_loss")

    def configure_optimizers(self) -> None:
        """Return no optimiser: `push` applies the gradients."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.unshare_local_parameters()
        self.pull()

    def unshare_local_parameters(self) -> None:
        """Move theta' and its gradient into private memory of this worker, each as one vector `[P]`.

        The policy acts and is evaluated with theta'. Between two iterations, theta' equals theta at the last pull.
        """
        flat = flatten_parameters(self.local_parameters)
        self.local = flat.data
        self.local.grad = flat.grad

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        rollout = self.normalize(rollout)
        self.update(rollout, self.last_value(rollout))
        self.pull()  # for the next rollout

    @torch.no_grad()
    def pull(self) -> None:
        """Copy the shared parameters: theta' <- theta."""
        self.updates = int(self.pushes.sum())
        self.local.copy_(self.theta)

    def update(self, rollout: TensorDictBase, last_value: Tensor) -> None:
        """Compute the gradient at theta' on all transitions `[N, T]` of a rollout, and apply it to theta."""
        loss, metrics = self.combined_loss(rollout, last_value)
        self.local.grad.zero_()  # type: ignore[union-attr]
        self.manual_backward(loss)
        clip_grad_norm([self.local], self.max_grad_norm)
        self.push()
        self.record(**metrics)

    def combined_loss(self, rollout: Batch, last_value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the total loss to minimise, and its parts as metrics."""
        actor_loss, critic_loss, entropy = self.losses(rollout, last_value)
        loss = actor_loss + self.value_coef * critic_loss
        if self.entropy_coef:  # with weight 0, skip its backward pass
            loss = loss - self.entropy_coef * entropy
        metrics = {"actor_loss": actor_loss, "critic_loss": critic_loss, "entropy": entropy}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def losses(self, rollout: Batch, last_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the actor loss -E[(R - V(s)) log pi(a|s)], the critic loss E[(R - V(s))^2] and the mean entropy."""
        features = self.trunk(rollout["observation"].flatten(0, 1))  # [N, T, *S] -> [N T, F]
        distribution, value = self.actor(features), self.critic(features)
        target = self.value_target(rollout, value.detach(), last_value).flatten(0, 1)  # [N, T, 1] -> [N T, 1]
        log_prob = distribution.log_prob(rollout["action"].flatten(0, 1))
        actor_loss = -((target - value.detach()) * log_prob).mean()
        return actor_loss, (target - value).square().mean(), distribution.entropy().mean()

    @torch.no_grad()
    def last_value(self, rollout: TensorDictBase) -> Tensor:
        """Return V(s_{t+1}) `[N, T, 1]` where s_{t+1} is not the next observation (`is_last`), and 0 elsewhere."""
        zeros = torch.zeros_like(rollout["next", "reward"])
        return successors(zeros, rollout, lambda observation: self.critic(self.trunk(observation)))

    @torch.no_grad()
    def value_target(self, rollout: Batch, value: Tensor, last_value: Tensor) -> Tensor:
        """Return R_t, `[N, T, 1]`: the TD(lambda) return, which is the n-step return for lambda = 1."""
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

    @torch.no_grad()
    def push(self) -> None:
        """Apply the gradient dtheta to theta without a lock, by Adam or by RMSprop (Eq. S2, S3).

        g <- alpha g + (1 - alpha) dtheta^2,  theta <- theta - lr dtheta / sqrt(g + eps)
        """
        worker = self.trainer.global_rank
        gradient = self.local.grad  # [P]
        assert gradient is not None
        if not gradient.sum().isfinite():  # before it reaches the shared parameters
            raise NotFiniteError(f"the gradient is not finite after {self.env_steps} env steps")
        lr = self.scheduled(self.lr, self.lr_schedule)
        pushes = int(self.pushes.sum())
        decay = self.rmsprop_decay if self.optimizer_name == "rmsprop" else 0.999
        self.mean_square.mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
        if self.optimizer_name == "rmsprop":
            self.theta.addcdiv_(gradient, (self.mean_square + self.eps).sqrt(), value=-lr)
        else:
            self.momentum.lerp_(gradient, 1 - 0.9)
            denominator = (self.mean_square / (1 - decay ** (pushes + 1))).sqrt() + self.eps
            self.theta.addcdiv_(self.momentum / (1 - 0.9 ** (pushes + 1)), denominator, value=-lr)
        staleness = pushes - self.updates
        self.pushes[worker] += 1
        self.staleness[worker, min(staleness, MAX_STALENESS - 1)] += 1
        counts = self.staleness.sum(0)
        self.record(staleness=torch.tensor(float(staleness)), stale_pushes=counts[1:].sum() / counts.sum())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # Save theta as worker 0 last pulled and perhaps evaluated it: other workers may have pushed since.
        checkpoint["state_dict"]["theta"] = self.local.clone()
        # Number of pushes with a staleness of 0, 1, ...
        checkpoint["staleness"] = self.staleness.sum(0).tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.staleness[0] = torch.tensor(checkpoint["staleness"])
        self.pushes[0] = self.updates
