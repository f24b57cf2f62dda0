"""Losses of the algorithms on a batch, and the same losses from TorchRL as the reference implementation.

`x_losses` returns the losses of Levin's algorithm x, `x_oracle` those of TorchRL with the same weights and the same
noise, or those of loops over the terms of the equations. On-policy algorithms learn from rollouts: a batch of 8
transitions is read as two envs and four steps.
"""

import copy
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.modules import IndependentNormal, ProbabilisticActor, QValueActor, TanhNormal, ValueOperator
from torchrl.objectives import (
    A2CLoss,
    ClipPPOLoss,
    DDPGLoss,
    DiscreteSACLoss,
    DQNLoss,
    KLPENPPOLoss,
    LossModule,
    PPOLoss,
    ReinforceLoss,
    SACLoss,
    TD3Loss,
)
from torchrl.objectives.value import GAE, TD0Estimator, TDLambdaEstimator

from levin.algorithms.a2c import A2C
from levin.algorithms.a3c import A3C
from levin.algorithms.actor_critic import ActorCritic
from levin.algorithms.base import Algorithm, standardize
from levin.algorithms.crossq import CrossQ
from levin.algorithms.crossq_networks import BatchRenorm, NormalizedMLP
from levin.algorithms.ddpg import DDPG
from levin.algorithms.dqn import DQN
from levin.algorithms.dreamer_v3 import DreamerV3
from levin.algorithms.ppo import PPO
from levin.algorithms.recurrent_ppo import MEMORY, RecurrentPPO
from levin.algorithms.recurrent_ppo_networks import Memory, Segments
from levin.algorithms.reinforce import REINFORCE
from levin.algorithms.sac import SAC
from levin.algorithms.sac_discrete import SACDiscrete
from levin.algorithms.td3 import TD3
from levin.algorithms.tqc import TQC
from levin.algorithms.trpo import TRPO
from levin.algorithms.world_models import WorldModels
from levin.data.sequences import LATENT


class Member(nn.Module):
    """Copy of one network of an ensemble; TorchRL takes critics as separate networks."""

    def __init__(self, ensemble: nn.Module, index: int) -> None:
        super().__init__()
        layers = [layer for layer in ensemble.layers if hasattr(layer, "weight")]
        self.weights = nn.ParameterList(layer.weight[index].detach().clone() for layer in layers)
        self.biases = nn.ParameterList(layer.bias[index].detach().clone() for layer in layers)

    def forward(self, observation: Tensor, *action: Tensor) -> Tensor:
        x = torch.cat([observation, *action], -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            x = torch.relu(x) if i + 1 < len(self.weights) else x
        return x


def members(critic: Any, num: int) -> list[ValueOperator]:
    """Return the networks of an ensemble of Q critics as TorchRL modules."""
    return [ValueOperator(Member(critic.ensemble, i), in_keys=["observation", "action"]) for i in range(num)]


def copy_targets(loss: LossModule, name: str, *modules: nn.Module) -> None:
    """Copy Levin's target networks into a TorchRL loss, whose own targets start as copies of its networks."""
    targets = getattr(loss, name).flatten_keys()
    values = (
        TensorDict.from_modules(*modules, as_module=False) if len(modules) > 1 else TensorDict.from_module(*modules)
    )
    for key, value in values.flatten_keys().items():
        targets[key].data.copy_(value.data)


def sac_losses(algorithm: SAC, batch: TensorDict) -> list[Tensor]:
    """Return critic loss, actor loss and the gradient of the temperature loss."""
    torch.manual_seed(0)
    critic_loss, *_ = algorithm.critic_loss(batch)
    torch.manual_seed(0)
    actor_loss, log_prob = algorithm.actor_loss(batch)
    (alpha_gradient,) = torch.autograd.grad(algorithm.alpha_loss(log_prob), algorithm.log_alpha)
    return [critic_loss, actor_loss, alpha_gradient]


def sac_oracle(algorithm: SAC, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TorchRL's SACLoss.

    Its temperature loss has log alpha where the paper has alpha, so its gradient lacks the factor alpha.
    """

    class Parameters(nn.Module):
        def __init__(self, actor: nn.Module) -> None:
            super().__init__()
            self.actor = actor

        def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
            distribution = self.actor(observation)
            return distribution.loc, distribution.log_std.exp()

    actor = ProbabilisticActor(
        TensorDictModule(Parameters(algorithm.actor), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    space, alpha = algorithm.env["action"], algorithm.log_alpha.exp().item()
    loss = SACLoss(
        actor,
        members(algorithm.critic, 2),
        alpha_init=alpha,
        num_qvalue_nets=2,
        loss_function="l2",
        delay_qvalue=True,
        reduction="mean",
        target_entropy=algorithm.target_entropy,
        action_spec=Bounded(torch.tensor(space["low"]), torch.tensor(space["high"])),
    )
    loss.make_value_estimator(gamma=algorithm.gamma)
    copy_targets(loss, "target_qvalue_network_params", *members(algorithm.target_critic, 2))
    torch.manual_seed(0)
    critic_loss = loss.qvalue_v2_loss(batch.clone())[0].sum()
    torch.manual_seed(0)
    actor_loss, metadata = loss.actor_loss(batch.clone())
    (alpha_gradient,) = torch.autograd.grad(loss._alpha_loss(metadata["log_prob"]).mean(), loss.log_alpha)
    return [critic_loss, actor_loss.mean(), alpha * alpha_gradient]


def squashed_sample(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Sample an action from an actor's outputs `[B, 2 A]`; return it and its log-density `[B, 1]`."""
    loc, log_std = outputs.chunk(2, -1)
    before_tanh = loc + log_std.exp() * torch.randn_like(loc)
    log_prob = torch.distributions.Normal(loc, log_std.exp()).log_prob(before_tanh)
    action = before_tanh.tanh()
    return action, (log_prob - (1 - action**2).log()).sum(-1, keepdim=True)


def with_statistics(algorithm: CrossQ) -> CrossQ:
    """Return a copy whose norms are past their warm-up and have statistics other than at the start."""
    algorithm, generator = copy.deepcopy(algorithm), torch.Generator().manual_seed(2)
    for layer in algorithm.modules():
        if isinstance(layer, BatchRenorm):
            layer.count.fill_(layer.warm_up)
            layer.mean += torch.randn(layer.mean.shape, generator=generator)
            layer.var += 4 * torch.rand(layer.var.shape, generator=generator)
            layer.scale.data += 0.2 * torch.randn(layer.scale.shape, generator=generator)
            layer.bias.data += 0.2 * torch.randn(layer.bias.shape, generator=generator)
    return algorithm


def crossq_losses(algorithm: CrossQ, batch: TensorDict) -> list[Tensor]:
    """Return critic loss, actor loss and the gradient of the temperature loss."""
    torch.manual_seed(0)
    critic_loss, _ = with_statistics(algorithm).critic_loss(batch)
    torch.manual_seed(0)
    actor_loss, log_prob = with_statistics(algorithm).actor_loss(batch)
    (alpha_gradient,) = torch.autograd.grad(algorithm.alpha_loss(log_prob), algorithm.log_alpha)
    return [critic_loss, actor_loss, alpha_gradient]


def batch_renorm(layer: BatchRenorm, network: int, rows: Tensor, *, training: bool) -> Tensor:
    """Normalise inputs `[B, F]` of one network, feature by feature."""
    columns = []
    for feature, column in enumerate(rows.unbind(-1)):
        at = (network, 0, feature)
        running_mean, running_std = layer.mean[at], (layer.var[at] + 1e-3).sqrt()
        if training:
            mean = column.mean()
            std = (((column - mean) ** 2).mean() + 1e-3).sqrt()
            r = min(max(float(std.detach() / running_std), 1 / 3), 3.0)
            d = min(max(float((mean.detach() - running_mean) / running_std), -5.0), 5.0)
            normalized = (column - mean) / std * r + d
        else:
            normalized = (column - running_mean) / running_std
        columns.append(layer.scale[at] * normalized + layer.bias[at])
    return torch.stack(columns, -1)


def normalized_mlp(mlp: NormalizedMLP, network: int, rows: Tensor, *, training: bool) -> Tensor:
    """Return the outputs `[B, outputs]` of one network of an ensemble with norms."""
    for layer in mlp.layers:
        if isinstance(layer, BatchRenorm):
            rows = batch_renorm(layer, network, rows, training=training)
        else:
            rows = rows @ layer.weight[network] + layer.bias[network] if hasattr(layer, "weight") else rows.relu()
    return rows


def crossq_oracle(algorithm: CrossQ, batch: TensorDict) -> list[Tensor]:
    """Return the losses of CrossQ, critic by critic."""
    algorithm, after, size = with_statistics(algorithm), batch["next"], len(batch)
    actor, critic, alpha = algorithm.actor.network, algorithm.critic.network, algorithm.log_alpha.exp().detach()
    torch.manual_seed(0)
    next_action, log_prob = squashed_sample(normalized_mlp(actor, 0, after["observation"], training=False))
    now = torch.cat([batch["observation"], batch["action"]], -1)
    both = torch.cat([now, torch.cat([after["observation"], next_action], -1)])
    outputs = [normalized_mlp(critic, network, both, training=True) for network in range(2)]
    soft_value = torch.minimum(outputs[0][size:], outputs[1][size:]) - alpha * log_prob
    target = after["reward"] + algorithm.gamma * (1 - after["terminated"].float()) * soft_value
    critic_loss = sum(0.5 * ((each[:size] - target) ** 2).mean() for each in outputs)
    torch.manual_seed(0)
    action, log_prob = squashed_sample(normalized_mlp(actor, 0, batch["observation"], training=True))
    pairs = torch.cat([batch["observation"], action], -1)
    q = torch.minimum(*(normalized_mlp(critic, network, pairs, training=False) for network in range(2)))
    alpha_gradient = -(alpha * (log_prob + algorithm.target_entropy)).mean()
    return [critic_loss, (alpha * log_prob - q).mean(), alpha_gradient]


def tqc_losses(algorithm: TQC, batch: TensorDict) -> list[Tensor]:
    """Return critic loss, actor loss and the gradient of the temperature loss."""
    torch.manual_seed(0)
    critic_loss, _ = algorithm.critic_loss(batch)
    torch.manual_seed(0)
    actor_loss, log_prob = algorithm.actor_loss(batch)
    (alpha_gradient,) = torch.autograd.grad(algorithm.alpha_loss(log_prob), algorithm.log_alpha)
    return [critic_loss, actor_loss, alpha_gradient]


def tqc_oracle(algorithm: TQC, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TQC, transition by transition and atom by atom."""
    after, alpha = batch["next"], algorithm.log_alpha.exp().detach()
    ensemble, targets = algorithm.critic.ensemble, algorithm.target_critic.ensemble
    critics, target_critics = ([Member(each, n) for n in range(each.num)] for each in (ensemble, targets))
    torch.manual_seed(0)
    next_action, next_log_prob = squashed_sample(algorithm.actor.network(after["observation"]))
    atoms = [critic(batch["observation"], batch["action"]) for critic in critics]
    num_atoms, dropped, terms = atoms[0].shape[-1], len(critics) * 2, []
    for b in range(len(batch)):
        mixture = [z for critic in target_critics for z in critic(after["observation"], next_action)[b]]
        for z in sorted(each.item() for each in mixture)[:-dropped]:
            discount = 0.0 if after["terminated"][b] else algorithm.gamma
            y = float(after["reward"][b] + discount * (z - alpha * next_log_prob[b].detach()))
            for critic_atoms in atoms:
                for m, theta in enumerate(critic_atoms[b]):
                    u, level = y - theta, (2 * m + 1) / (2 * num_atoms)
                    huber = 0.5 * u**2 if abs(u) <= 1 else abs(u) - 0.5
                    terms.append((1 - level if u < 0 else level) * huber)
    torch.manual_seed(0)
    action, log_prob = squashed_sample(algorithm.actor.network(batch["observation"]))
    q = sum(critic(batch["observation"], action).mean(-1, keepdim=True) for critic in critics) / len(critics)
    alpha_gradient = -(log_prob + algorithm.target_entropy).mean()
    return [sum(terms) / len(terms), (alpha * log_prob - q).mean(), alpha_gradient]


def deterministic(actor: nn.Module) -> TensorDictModule:
    """Return a deterministic actor as a TorchRL module."""
    return TensorDictModule(actor, in_keys=["observation"], out_keys=["action"])


def td3_losses(algorithm: TD3, batch: TensorDict) -> list[Tensor]:
    """Return critic loss and actor loss."""
    torch.manual_seed(0)
    return [algorithm.critic_loss(batch)[0], algorithm.actor_loss(batch)]


def td3_oracle(algorithm: TD3, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TorchRL's TD3Loss."""
    loss = TD3Loss(
        deterministic(algorithm.actor),
        members(algorithm.critic, 2),
        bounds=(-1.0, 1.0),
        policy_noise=algorithm.target_noise,
        noise_clip=algorithm.target_noise_clip,
        loss_function="l2",
        reduction="mean",
    )
    loss.make_value_estimator(gamma=algorithm.gamma)
    copy_targets(loss, "target_qvalue_network_params", *members(algorithm.target_critic, 2))
    copy_targets(loss, "target_actor_network_params", deterministic(algorithm.target_actor))
    torch.manual_seed(0)
    return [loss.value_loss(batch.clone())[0], loss.actor_loss(batch.clone())[0]]


def ddpg_losses(algorithm: DDPG, batch: TensorDict) -> list[Tensor]:
    """Return critic loss and actor loss."""
    return [algorithm.critic_loss(batch)[0], algorithm.actor_loss(batch)]


def ddpg_oracle(algorithm: DDPG, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TorchRL's DDPGLoss."""
    (critic,), (target,) = members(algorithm.critic, 1), members(algorithm.target_critic, 1)
    loss = DDPGLoss(deterministic(algorithm.actor), critic, delay_actor=True, delay_value=True)
    loss.make_value_estimator(gamma=algorithm.gamma)
    copy_targets(loss, "target_value_network_params", target)
    copy_targets(loss, "target_actor_network_params", deterministic(algorithm.target_actor))
    return [loss.loss_value(batch.clone())[0], loss.loss_actor(batch.clone())[0]]


def dqn_losses(algorithm: DQN, batch: TensorDict) -> list[Tensor]:
    """Return the critic loss."""
    return [algorithm.critic_loss(batch)[0]]


def dqn_oracle(algorithm: DQN, batch: TensorDict) -> list[Tensor]:
    """Return the loss of TorchRL's DQNLoss; its smooth L1 loss equals Levin's Huber loss, with 1/2 x^2 below 1."""

    def values(network: nn.Module) -> QValueActor:
        return QValueActor(network, in_keys=["observation"], action_space="categorical")

    loss = DQNLoss(
        values(algorithm.critic),
        loss_function="smooth_l1" if algorithm.huber else "l2",
        double_dqn=algorithm.double_q,
        action_space="categorical",
    )
    loss.make_value_estimator(gamma=algorithm.gamma)
    copy_targets(loss, "target_value_network_params", values(algorithm.target_critic))
    return [loss(batch.clone())["loss"]]


def sac_discrete_losses(algorithm: SACDiscrete, batch: TensorDict) -> list[Tensor]:
    """Return critic loss, actor loss and the gradient of the temperature loss."""
    actor_loss, entropy = algorithm.actor_loss(batch)
    (alpha_gradient,) = torch.autograd.grad(algorithm.alpha_loss(entropy), algorithm.log_alpha)
    return [algorithm.critic_loss(batch)[0], actor_loss, alpha_gradient]


def sac_discrete_oracle(algorithm: SACDiscrete, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TorchRL's DiscreteSACLoss.

    Its temperature loss has log alpha where the paper has alpha, as in SACLoss.
    """

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.actor = algorithm.trunk, algorithm.actor

        def forward(self, observation: Tensor) -> Tensor:
            return self.actor(self.trunk(observation)).logits

    def values(critic: Any) -> list[TensorDictModule]:
        networks = [Member(critic[1], i) for i in range(2)]
        return [TensorDictModule(each, in_keys=["observation"], out_keys=["action_value"]) for each in networks]

    actor = ProbabilisticActor(
        TensorDictModule(Logits(), in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    loss = DiscreteSACLoss(
        actor,
        values(algorithm.critic),  # type: ignore[arg-type]
        action_space="categorical",
        num_actions=algorithm.env["action"]["n"],
        loss_function="smooth_l1" if algorithm.huber else "l2",
        target_entropy=algorithm.target_entropy,
        alpha_init=(alpha := algorithm.log_alpha.exp().item()),
        reduction="mean",
    )
    loss.make_value_estimator(gamma=algorithm.gamma)
    copy_targets(loss, "target_qvalue_network_params", *values(algorithm.target_critic))
    actor_loss, metadata = loss.actor_loss(batch.clone())
    (alpha_gradient,) = torch.autograd.grad(loss._alpha_loss(metadata["log_prob"]).mean(), loss.log_alpha)
    return [loss.qvalue_loss(batch.clone())[0], actor_loss, alpha * alpha_gradient]


def as_rollout(batch: TensorDict) -> TensorDict:
    """Reshape transitions `[8]` to a rollout `[2, 4]`, with each next observation taken from the next step."""
    rollout = batch.reshape(2, -1).clone()
    continues = ~rollout["next", "done"][:, :-1]
    after = rollout["next", "observation"]
    after[:, :-1] = torch.where(continues, rollout["observation"][:, 1:], after[:, :-1])
    rollout["step_count"] = torch.arange(rollout.shape[1]).expand(2, -1).unsqueeze(-1)
    return rollout


def torchrl_actor(algorithm: Any) -> ProbabilisticActor:
    """Return the policy as a TorchRL module with the same parameters."""

    class Parameters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.actor = algorithm.trunk, algorithm.actor

        def forward(self, observation: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            features = self.trunk(observation.flatten(0, -2)).unflatten(0, observation.shape[:-1])
            distribution = self.actor(features)
            if self.actor.discrete:
                return distribution.logits
            return distribution.loc, distribution.log_std.exp().expand_as(distribution.loc)

    keys = ["logits"] if algorithm.actor.discrete else ["loc", "scale"]
    return ProbabilisticActor(
        TensorDictModule(Parameters(), in_keys=["observation"], out_keys=keys),
        in_keys=keys,
        distribution_class=torch.distributions.Categorical if algorithm.actor.discrete else IndependentNormal,
        distribution_kwargs={} if algorithm.actor.discrete else {"upscale": 1.0, "tanh_loc": False},
        return_log_prob=True,
    )


def torchrl_critic(algorithm: Any) -> ValueOperator:
    """Return the state-value critic as a TorchRL module with the same parameters."""
    return ValueOperator(algorithm.critic, in_keys=["observation"])


def with_changed_policy(algorithm: Algorithm) -> Any:
    """Return a copy of an algorithm whose policy parameters have changed, as after an update."""
    algorithm = copy.deepcopy(algorithm)
    generator = torch.Generator().manual_seed(3)
    for parameter in algorithm.actor.parameters():  # type: ignore[union-attr]
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return algorithm


def reinforce_losses(algorithm: REINFORCE, batch: TensorDict) -> list[Tensor]:
    """Return actor loss and critic loss."""
    rollout = as_rollout(batch)
    return [algorithm.actor_loss(rollout, algorithm.weight(rollout))[0], algorithm.critic_loss(rollout)]


def reinforce_oracle(algorithm: REINFORCE, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TorchRL's ReinforceLoss."""
    rollout, critic = as_rollout(batch), torchrl_critic(algorithm)
    TDLambdaEstimator(gamma=algorithm.gamma, lmbda=1.0, value_network=critic)(rollout)
    loss = ReinforceLoss(torchrl_actor(algorithm), critic, loss_critic_type="l2")(rollout)
    return [loss["loss_actor"], loss["loss_value"]]


def actor_critic_losses(algorithm: ActorCritic, batch: TensorDict) -> list[Tensor]:
    """Return actor loss, critic loss and entropy."""
    batch = as_rollout(batch).flatten(0, 1)
    actor_loss, entropy = algorithm.actor_loss(batch, algorithm.weight(batch))
    return [actor_loss, algorithm.critic_loss(batch), entropy]


def a2c_loss(algorithm: Any, rollout: TensorDict, estimator: nn.Module) -> list[Tensor]:
    """Return actor loss, critic loss and entropy of TorchRL's A2CLoss with the given advantage estimator."""
    estimator(rollout)
    critic = torchrl_critic(algorithm)
    loss = A2CLoss(torchrl_actor(algorithm), critic, loss_critic_type="l2", entropy_coeff=1.0)(rollout)
    return [loss["loss_objective"], loss["loss_critic"], -loss["loss_entropy"]]


def actor_critic_oracle(algorithm: ActorCritic, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TorchRL's A2CLoss with one-step TD errors."""
    return a2c_loss(
        algorithm, as_rollout(batch), TD0Estimator(gamma=algorithm.gamma, value_network=torchrl_critic(algorithm))
    )


def a2c_losses(algorithm: A2C | A3C, batch: TensorDict) -> list[Tensor]:
    """Return actor loss, critic loss and entropy on transitions `[B]` or a rollout `[N, T]`."""
    rollout = as_rollout(batch) if batch.ndim == 1 else batch
    return list(algorithm.losses(rollout, algorithm.last_value(rollout))[:3])


def a2c_oracle(algorithm: A2C | A3C, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TorchRL's A2CLoss with GAE."""
    estimator = GAE(gamma=algorithm.gamma, lmbda=algorithm.gae_lambda, value_network=torchrl_critic(algorithm))
    return a2c_loss(algorithm, as_rollout(batch), estimator)


def ppo_losses(algorithm: PPO, batch: TensorDict) -> list[Tensor]:
    """Return actor loss, twice the critic loss, and entropy, after the policy and the value have changed."""
    data, old = algorithm.evaluate(as_rollout(batch))
    if algorithm.normalize_advantage:
        data["advantage"] = standardize(data["advantage"])
    after, epsilon = with_changed_policy(algorithm), torch.tensor(algorithm.clip_epsilon)
    distribution = after.actor(data["observation"])
    actor_loss, _ = after.actor_loss(data, distribution, old if algorithm.penalty == "kl" else None, epsilon)
    value = algorithm.critic(data["observation"]) + torch.linspace(-1, 1, len(data)).unsqueeze(-1)
    return [actor_loss, 2 * algorithm.critic_loss(data, value, epsilon), distribution.entropy().mean()]


def ppo_oracle(algorithm: PPO, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TorchRL's ClipPPOLoss or KLPENPPOLoss, whose critic loss has no factor of 1/2."""
    rollout = as_rollout(batch)
    GAE(gamma=algorithm.gamma, lmbda=algorithm.gae_lambda, value_network=torchrl_critic(algorithm))(rollout)
    data = rollout.flatten(0, 1)
    old = torchrl_actor(algorithm)
    with torch.no_grad():
        data["action_log_prob"] = old.get_dist(data).log_prob(data["action"])
        data.update(old.module[0](data.select("observation")))
    after, shifted = with_changed_policy(algorithm), copy.deepcopy(algorithm.critic)
    # shift each value by as much as in `ppo_losses`
    moves = dict(zip(map(tuple, data["observation"].tolist()), torch.linspace(-1, 1, len(data)), strict=True))

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.critic = shifted

        def forward(self, observation: Tensor) -> Tensor:
            return (
                self.critic(observation) + torch.stack([moves[tuple(each)] for each in observation.tolist()])[:, None]
            )

    critic = ValueOperator(Shifted(), in_keys=["observation"])
    common = {"loss_critic_type": "l2", "normalize_advantage": algorithm.normalize_advantage, "entropy_coeff": 1.0}
    if algorithm.penalty == "kl":
        assert algorithm.target_kl is not None
        loss = KLPENPPOLoss(
            torchrl_actor(after), critic, dtarg=algorithm.target_kl, beta=float(algorithm.beta), **common
        )(data)
    else:
        epsilon = algorithm.clip_epsilon
        loss = ClipPPOLoss(torchrl_actor(after), critic, clip_epsilon=epsilon, clip_value=epsilon, **common)(data)
    return [loss["loss_objective"], loss["loss_critic"], -loss["loss_entropy"]]


def recurrent_rollout(algorithm: RecurrentPPO, batch: TensorDict, *, steps: int) -> TensorDict:
    """Return transitions `[8]` as a rollout of `steps` steps with random stored states, 0 where an episode begins."""
    rollout = as_rollout(batch) if steps > 1 else batch.unsqueeze(1)
    generator = torch.Generator().manual_seed(2)
    memory = torch.randn(*rollout.shape, algorithm.carry.state.shape[1], generator=generator)
    memory[:, 1:] *= ~rollout["next", "done"][:, :-1]
    rollout[MEMORY] = memory
    return rollout


def recurrent_ppo_critic_loss(algorithm: RecurrentPPO, batch: TensorDict) -> Tensor:
    """Return the critic loss on transitions `[B]`, each a sequence of its own."""
    algorithm.sequence_length = 1
    data, _ = algorithm.evaluate(recurrent_rollout(algorithm, batch, steps=1))
    data = data.flatten(0, 1)
    return algorithm.critic_loss(data, data["value"], torch.tensor(0.2))


def with_changed_networks(algorithm: RecurrentPPO) -> RecurrentPPO:
    """Return a copy of an algorithm whose parameters have all changed, as after an update."""
    algorithm = copy.deepcopy(algorithm)
    generator = torch.Generator().manual_seed(3)
    for parameter in algorithm.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return algorithm


def recurrent_ppo_losses(algorithm: RecurrentPPO, batch: TensorDict) -> list[Tensor]:
    """Return actor loss, twice the critic loss, and entropy, after all networks have changed."""
    algorithm.sequence_length = 2
    rollout = recurrent_rollout(algorithm, batch, steps=4)
    data, state = algorithm.evaluate(rollout)
    after, epsilon = with_changed_networks(algorithm), torch.tensor(algorithm.clip_epsilon)
    segments = Segments(rollout["next", "done"].reshape(-1, 2), data.device or torch.device("cpu"))
    data = data.flatten(0, 1)
    data["advantage"] = standardize(data["advantage"])
    actor_inputs, critic_inputs = after.remember(data["observation"], segments, state)
    distribution = after.actor(actor_inputs)
    actor_loss, _ = after.actor_loss(data, distribution.log_prob(data["action"]), epsilon)
    critic_loss = after.critic_loss(data, after.critic(critic_inputs), epsilon)
    return [actor_loss, 2 * critic_loss, distribution.entropy().mean()]


def step_through(algorithm: RecurrentPPO, rollout: TensorDict) -> TensorDict:
    """Return a rollout whose observations are replaced by the inputs of actor and critic, from `nn.LSTMCell`."""

    def cell(memory: Memory) -> nn.LSTMCell:
        result = nn.LSTMCell(memory.input_weight.shape[1], memory.size)
        for parameter, weight in zip(result.parameters(), memory.weights, strict=True):
            parameter.data.copy_(weight)
        return result

    cells = [cell(each) for each in (algorithm.actor_memory, algorithm.critic_memory)]
    inputs: dict[str, list[Tensor]] = {"observation": [], "next": []}
    for t in range(rollout.shape[1]):
        if t % algorithm.sequence_length == 0:
            parts = rollout[MEMORY][:, t].chunk(4, -1)
            states = [parts[:2], parts[2:]]
        states = [each(rollout["observation"][:, t], state) for each, state in zip(cells, states, strict=True)]
        inputs["observation"].append(torch.cat([states[0][0], states[1][0]], -1))
        after = [each(rollout["next", "observation"][:, t], state) for each, state in zip(cells, states, strict=True)]
        inputs["next"].append(torch.cat([after[0][0], after[1][0]], -1))
        continues = ~rollout["next", "done"][:, t]
        states = [tuple(part * continues for part in state) for state in states]
    rollout = rollout.clone()
    rollout["observation"], rollout["next", "observation"] = (torch.stack(each, 1) for each in inputs.values())
    return rollout


def recurrent_ppo_oracle(algorithm: RecurrentPPO, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TorchRL's ClipPPOLoss on inputs that `nn.LSTMCell` makes step by step."""
    algorithm.sequence_length = 2
    rollout, after = recurrent_rollout(algorithm, batch, steps=4), with_changed_networks(algorithm)
    size = algorithm.actor_memory.size

    class Half(nn.Module):
        def __init__(self, network: nn.Module, start: int) -> None:
            super().__init__()
            self.network, self.start, self.discrete = network, start, getattr(network, "discrete", None)

        def forward(self, inputs: Tensor) -> Any:
            return self.network(inputs[..., self.start : self.start + size])

    def networks(algorithm: RecurrentPPO) -> tuple[ProbabilisticActor, ValueOperator]:
        holder = copy.copy(algorithm)
        holder._modules = {"trunk": nn.Identity(), "actor": Half(algorithm.actor, 0)}
        return torchrl_actor(holder), ValueOperator(Half(algorithm.critic, size), in_keys=["observation"])

    old_actor, old_critic = networks(algorithm)
    data = step_through(algorithm, rollout)
    GAE(gamma=algorithm.gamma, lmbda=algorithm.gae_lambda, value_network=old_critic)(data)
    with torch.no_grad():
        data["action_log_prob"] = old_actor.get_dist(data).log_prob(data["action"])
    now = step_through(after, rollout)
    data["observation"] = now["observation"]
    actor, critic = networks(after)
    epsilon = algorithm.clip_epsilon
    common = {"loss_critic_type": "l2", "normalize_advantage": True, "entropy_coeff": 1.0}
    loss = ClipPPOLoss(actor, critic, clip_epsilon=epsilon, clip_value=epsilon, **common)(data.flatten(0, 1))
    return [loss["loss_objective"], loss["loss_critic"], -loss["loss_entropy"]]


def trpo_losses(algorithm: TRPO, batch: TensorDict) -> list[Tensor]:
    """Return the surrogate objective and the critic loss."""
    data = algorithm.advantages(as_rollout(batch))
    old = algorithm.actor(data["observation"]).detach()
    return [
        algorithm.surrogate(data, with_changed_policy(algorithm).actor(data["observation"]), old),
        algorithm.critic_loss(data),
    ]


def trpo_oracle(algorithm: TRPO, batch: TensorDict) -> list[Tensor]:
    """Return the losses of TorchRL's PPOLoss without clipping, which is TRPO's surrogate objective."""
    rollout = as_rollout(batch)
    GAE(gamma=algorithm.gamma, lmbda=algorithm.gae_lambda, value_network=torchrl_critic(algorithm))(rollout)
    data = rollout.flatten(0, 1)
    data["action_log_prob"] = torchrl_actor(algorithm).get_dist(data).log_prob(data["action"]).detach()
    loss = PPOLoss(
        torchrl_actor(with_changed_policy(algorithm)),
        torchrl_critic(algorithm),
        loss_critic_type="l2",
        normalize_advantage=True,
    )(data)
    return [-loss["loss_objective"], loss["loss_critic"]]


def records_of(batch: TensorDict) -> dict[str, Tensor]:
    """Return transitions `[B]` as sequences of two records `[B, 2]`."""
    after = batch["next"]
    none = torch.zeros_like(after["terminated"])
    return {
        "observation": torch.stack([batch["observation"], after["observation"]], 1),
        "action": torch.stack([batch["action"], torch.zeros_like(batch["action"])], 1),
        "reward": torch.stack([torch.zeros_like(after["reward"]), after["reward"]], 1),
        "is_first": torch.stack([~none, none], 1),
        "is_terminal": torch.stack([none, after["terminated"]], 1),
        "is_last": torch.stack([none, after["done"]], 1),
    }


def sequences_of(algorithm: DreamerV3, batch: TensorDict) -> TensorDict:
    """Return transitions `[B]` as sequences `[B, 1 + 2]` whose first record only carries a latent state."""
    records = {key: torch.cat([torch.zeros_like(each[:, :1]), each], 1) for key, each in records_of(batch).items()}
    size = algorithm.model.deter + algorithm.model.choices[0]
    row = torch.arange(3).expand(len(batch), 3)
    latent = torch.zeros(len(batch), 3, size, dtype=torch.bfloat16)
    return TensorDict({**records, LATENT: latent, "row": row, "env": row}, batch_size=(len(batch), 3))


def dreamer_v3_loss(algorithm: DreamerV3, batch: TensorDict) -> Tensor:
    """Return the losses of DreamerV3 on replayed rewards and end flags, for a critic with values other than 0."""
    sequences = sequences_of(algorithm, batch)
    torch.nn.init.ones_(algorithm.critic[-1].weight)
    state, posterior = algorithm.observe(sequences)
    loss, _ = algorithm.model_loss(sequences, state, posterior)
    return loss + algorithm.replay_value_loss(sequences, state, torch.ones(2 * len(batch), 1))


def world_models_loss(algorithm: WorldModels, batch: TensorDict) -> Tensor:
    """Return the loss of the memory M on transitions."""
    records = records_of(batch)
    with torch.no_grad():
        pictures = records["observation"]
        encoded = algorithm.model.vision.encode(pictures.flatten(0, 1))
    records[LATENT] = torch.cat(encoded, -1).unflatten(0, pictures.shape[:2])
    records["action"] = algorithm.model.encode_action(records["action"])
    loss, _ = algorithm.memory_loss(records)
    return loss
