"""The table: one row per algorithm. Every check in checks.py is run for every row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss

from levin.algorithms.sac import SAC


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the checks need to know of an algorithm.

    Args:
        algo: Its name: the file, the YAML.
        env: A small env it can act in.
        small: Overrides that make an iteration cheap.
        env_steps: Env steps in which every optimiser steps a few times.
        optimizers: Attribute -> steps per update.
        targets: Target module -> (its source, the step tau towards it, updates between two steps).
        losses: The losses of an algorithm on a batch, in the oracle's order.
        oracle: The same losses by another implementation.
        bootstraps: The critic's loss on a batch, which must see `terminated` and must not see `truncated`.
        learns: Overrides, and the mean return that they must reach.
    """

    algo: str
    env: str
    small: tuple[str, ...]
    env_steps: int
    optimizers: dict[str, float]
    targets: dict[str, tuple[str, float, int]] = field(default_factory=dict)
    losses: Callable[[Any, TensorDict], list[Tensor]] | None = None
    oracle: Callable[[Any, TensorDict], list[Tensor]] | None = None
    bootstraps: Callable[[Any, TensorDict], Tensor] | None = None
    learns: tuple[tuple[str, ...], float]


POINT = "env=gym", "env.id=toy_envs:Point-v0"
LATE = ("eval.every=100_000", "eval.episodes=5", "checkpoint.every=100_000", "logger=csv")


def sac_losses(algorithm: SAC, batch: TensorDict) -> list[Tensor]:
    torch.manual_seed(0)
    critic_loss = algorithm.critic_loss(batch)
    torch.manual_seed(0)
    actor_loss, log_prob = algorithm.actor_loss(batch)
    (alpha_gradient,) = torch.autograd.grad(algorithm.alpha_loss(log_prob), algorithm.log_alpha)
    return [critic_loss, actor_loss, alpha_gradient]


def sac_oracle(algorithm: SAC, batch: TensorDict) -> list[Tensor]:
    """TorchRL's SACLoss with the same weights and the same noise.

    Its temperature loss has log alpha where the paper has alpha; their gradients agree at alpha = 1.
    """

    class Parameters(nn.Module):
        def __init__(self, actor: nn.Module) -> None:
            super().__init__()
            self.actor = actor

        def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
            distribution = self.actor(observation)
            return distribution.loc, distribution.log_std.exp()

    class Critic(nn.Module):
        def __init__(self, ensemble: nn.Module, index: int) -> None:
            super().__init__()
            layers = [layer for layer in ensemble.layers if hasattr(layer, "weight")]
            self.weights = nn.ParameterList(layer.weight[index].detach().clone() for layer in layers)
            self.biases = nn.ParameterList(layer.bias[index].detach().clone() for layer in layers)

        def forward(self, observation: Tensor, action: Tensor) -> Tensor:
            x = torch.cat([observation, action], -1)
            for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                x = x @ weight + bias
                x = torch.relu(x) if i + 1 < len(self.weights) else x
            return x

    actor = ProbabilisticActor(
        TensorDictModule(Parameters(algorithm.actor), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    critics, targets = (
        [ValueOperator(Critic(ensemble, i), in_keys=["observation", "action"]) for i in range(2)]
        for ensemble in (algorithm.critic, algorithm.target_critic)
    )
    space = algorithm.env["action"]
    loss = SACLoss(
        actor,
        critics,
        num_qvalue_nets=2,
        loss_function="l2",
        delay_qvalue=True,
        reduction="mean",
        target_entropy=algorithm.target_entropy,
        action_spec=Bounded(torch.tensor(space["low"]), torch.tensor(space["high"])),
    )
    loss.make_value_estimator(gamma=algorithm.gamma)
    for name, target in TensorDict.from_modules(*targets, as_module=False).flatten_keys().items():
        loss.target_qvalue_network_params.flatten_keys()[name].data.copy_(target.data)
    torch.manual_seed(0)
    critic_loss = loss.qvalue_v2_loss(batch.clone())[0].sum()
    torch.manual_seed(0)
    actor_loss, metadata = loss.actor_loss(batch.clone())
    (alpha_gradient,) = torch.autograd.grad(loss._alpha_loss(metadata["log_prob"]).mean(), loss.log_alpha)
    return [critic_loss, actor_loss.mean(), alpha_gradient]


ROWS = [
    Row(
        algo="sac",
        env="pendulum",
        small=("algo.learning_starts=40", "algo.batch_size=16", "algo.hidden_sizes=[16,16]", "log_every=30"),
        env_steps=256,
        optimizers={"critic_optimizer": 1, "actor_optimizer": 1},
        targets={"target_critic": ("critic", 0.005, 1)},
        losses=sac_losses,
        oracle=sac_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(batch),
        learns=(
            (
                *POINT,
                "env.action=rescale",
                "total_env_steps=1200",
                "algo.learning_starts=100",
                "algo.batch_size=64",
                "algo.hidden_sizes=[64,64]",
                "algo.actor_lr=3e-3",
                "algo.critic_lr=3e-3",
                "algo.alpha_lr=3e-3",
            ),
            -1.5,
        ),
    )
]
