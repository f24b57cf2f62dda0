"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347).

Each rollout is used for several epochs of gradient steps. The advantage is weighted by the ratio rho of the new policy
to the policy pi_k that acted. Either a clip keeps rho near 1:

    L(theta) = E[ min(rho A, clip(rho, 1 - eps, 1 + eps) A) ],  rho = pi_theta(a|s) / pi_k(a|s)        Eq. 7

or a penalty on the KL divergence does, with a weight beta that adapts:

    L(theta) = E[ rho A - beta KL(pi_k || pi_theta) ]                                                   Eq. 8

Pseudocode (Algorithm 1):

    for each iteration k:
        collect T steps of N envs with pi_k
        advantages A by GAE from V_k; targets A + V_k
        for each epoch, for each minibatch:
            theta <- theta + lr grad (L(theta) - c_1 (V_theta(s) - target)^2 + c_2 H(pi_theta))         Eq. 9
        penalty: beta <- beta / 2 if KL < target_kl / 1.5, 2 beta if KL > 1.5 target_kl

Deviations, all as in the authors' code (Huang et al. 2022, "The 37 implementation details of PPO"):
    - Advantages are normalised in each minibatch. The change of V is clipped like that of the policy. The gradient norm
      is clipped.
    - The critic loss has a factor of 1/2.

Other deviations from the authors' code, and from CleanRL:
    - With `penalty: clip` and a `target_kl`, no further epoch begins once the mean KL of an epoch exceeds it. CleanRL
      takes the KL of the last minibatch. The limit is 1.5 `target_kl` in Spinning Up, whose steps use the whole
      rollout, and in Stable-Baselines3, which checks each minibatch.
    - An episode cut by a time limit bootstraps from V(s') of its last observation; there it counts as ended.
    - Statistics of observations and rewards are updated once per rollout (`levin.nn.normalizers`), there in every step.
    - beta stays between 1e-6 and 1e6.

Metrics:
    train/actor_loss: -L, without the entropy.
    train/critic_loss: half the squared error of V, in the critic's units (see `normalize_value_target`).
    train/entropy: H(pi), nats.
    train/kl: KL(pi_k || pi), estimated by (rho - 1) - log rho; exact with `penalty: kl`.
    train/clip_fraction: fraction of ratios outside the clip range.
    train/beta: weight of the penalty (`penalty: kl`).
    train/explained_variance: 1 - Var[target - V_k] / Var[target]; with `recompute_advantage`, of the V of each epoch.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.optim import Optimizer

from levin.algorithms.base import Algorithm, Batch, standardize
from levin.core import distributed
from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec
from levin.core.types import Activation, Fraction, Network, NonNegativeFloat, PositiveFloat, PositiveInt, Schedule
from levin.data import returns
from levin.data.rollout import successors
from levin.nn.distributions import Categorical, Normal
from levin.nn.networks import Actor, Architecture, Critic
from levin.nn.normalizers import ReturnNormalizer


class PPO(Algorithm):
    """Proximal policy optimisation with a clip or an adaptive KL penalty, for vectors and pixels.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor: 0.99. This value and those below are from table 3, unless a source is named.
        gae_lambda: lambda of GAE: 0.95.
        penalty: Method that keeps the policy near the one that acted: `clip` (Eq. 7) or `kl` (Eq. 8).
        clip_epsilon: Half-width eps of the clip range: 0.2.
        clip_schedule: Schedule of `clip_epsilon`; `linear` lowers it to 0.
        clip_value: Whether to clip the change of V as well; the authors' code: true.
        target_kl: KL divergence in nats. `clip`: the epochs end above it, null: never. `kl`: the penalty steers to it
            (section 6.1: 0.003, 0.01, 0.03).
        initial_beta: Weight of the KL penalty at the start, section 6.1: 1.
        lr: Learning rate of Adam: 3e-4. Its epsilon is 1e-5, as in the authors' code.
        lr_schedule: Schedule of the learning rate; `linear` lowers it to 0. The authors' code: linear.
        schedule_env_steps: Env steps after which a linear schedule is at 0.
        epochs: Passes over a rollout: 10.
        batch_size: Transitions per minibatch: 64.
        steps_per_iteration: Vector steps of a rollout: 2048.
        recompute_advantage: Whether to recompute the advantages in each epoch, with the current critic (Andrychowicz et
            al. 2021); the paper: no.
        normalize_advantage: Whether to scale advantages to mean 0 and standard deviation 1 in each minibatch.
        normalize_value_target: Whether the critic learns (A + V_k) / std(A + V_k), with a running std, as in Tianshou.
            Advantages keep the units of the rewards.
        entropy_coef: Weight of the entropy, c_2: 0 (Atari: 0.01).
        value_coef: Weight of the critic loss, c_1; the authors' code: 0.5.
        max_grad_norm: Maximum gradient norm of actor and critic together; the authors' code: 0.5; null: no clipping.
        hidden_sizes: Widths of the hidden layers of actor and critic: 64, 64; for pixels, after the Nature CNN.
        activation: Activation between the layers: tanh.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        initial_log_std: Log standard deviation of a Gaussian policy at the start: 0.
        compile: Whether to compile the loss, and on a GPU to run the whole update as a CUDA graph (not with `kl`).
            Other rounding, faster after tens of seconds at the start.
    """

    actions: ClassVar = ("box", "discrete", "multi_discrete")
    observations: ClassVar = ("float32", "uint8")
    action_masks: ClassVar = True

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 0.99,
        gae_lambda: Fraction = 0.95,
        penalty: Literal["clip", "kl"] = "clip",
        clip_epsilon: PositiveFloat = 0.2,
        clip_schedule: Schedule = "constant",
        clip_value: bool = True,
        target_kl: PositiveFloat | None = None,
        initial_beta: PositiveFloat = 1.0,
        lr: PositiveFloat = 3e-4,
        lr_schedule: Schedule = "linear",
        schedule_env_steps: PositiveInt = 1_000_000,
        epochs: PositiveInt = 10,
        batch_size: PositiveInt = 64,
        steps_per_iteration: PositiveInt = 2048,
        recompute_advantage: bool = False,
        normalize_advantage: bool = True,
        normalize_value_target: bool = False,
        entropy_coef: NonNegativeFloat = 0.0,
        value_coef: NonNegativeFloat = 0.5,
        max_grad_norm: PositiveFloat | None = 0.5,
        hidden_sizes: Sequence[PositiveInt] = (64, 64),
        activation: Activation = "tanh",
        network: Network = "mlp",
        initial_log_std: float = 0.0,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        if steps_per_iteration * env["num_envs"] % batch_size:
            raise ConfigError(
                f"algo.batch_size={batch_size} does not divide the number of transitions in a rollout, "
                f"algo.steps_per_iteration={steps_per_iteration} times env.num_envs={env['num_envs']}: "
                "change one of the three"
            )
        if penalty == "kl" and target_kl is None:
            raise ConfigError(
                "algo.penalty=kl needs a KL divergence to steer to: set algo.target_kl, for example to the paper's 0.01"
            )
        self.gamma, self.gae_lambda, self.penalty, self.target_kl = gamma, gae_lambda, penalty, target_kl
        self.clip_epsilon, self.clip_schedule, self.clip_value = clip_epsilon, clip_schedule, clip_value
        self.lr, self.lr_schedule, self.schedule_env_steps = lr, lr_schedule, schedule_env_steps
        self.epochs, self.batch_size = epochs, batch_size
        self.steps_per_iteration, self.recompute_advantage = steps_per_iteration, recompute_advantage
        self.normalize_advantage, self.entropy_coef, self.value_coef = normalize_advantage, entropy_coef, value_coef
        self.max_grad_norm = max_grad_norm

        architecture = Architecture(network, hidden_sizes, activation)
        self.trunk, features = architecture.make_trunk(env)
        self.actor = Actor(features, env, architecture, initial_log_std)
        self.critic = Critic(features, architecture)
        self.return_normalizer = ReturnNormalizer(normalize_value_target)
        self.register_buffer("beta", torch.tensor(initial_beta) if penalty == "kl" else None)
        if compile:
            self.compile_losses("combined_loss")
            if penalty == "clip":  # with `kl`, `update` takes a distribution, and a CUDA graph takes tensors only
                self.capture("update")

    def configure_optimizers(self) -> Optimizer:
        self.optimizer = self.make_optimizer("adam", self.parameters(), self.lr)
        return self.optimizer

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        lr = self.scheduled(self.lr, self.lr_schedule)
        # A tensor, because a loss compiled for a Python number is compiled again for every other number.
        clip_epsilon = torch.tensor(self.scheduled(self.clip_epsilon, self.clip_schedule), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rollout = self.normalize(rollout)
        with self.full_precision():  # as during collection
            data, old = self.evaluate(rollout)
        for epoch in range(self.epochs):
            if epoch and self.recompute_advantage:
                with torch.no_grad(), self.full_precision():
                    features = self.trunk(data["observation"])
                    data.update(self.advantages(rollout, features))
            kl = self.epoch(data, old, clip_epsilon)
            # Reading `kl` waits for the device, so it happens only between epochs and only if target_kl is set.
            if self.penalty == "clip" and self.target_kl is not None and kl > self.target_kl:
                break
        if self.penalty == "kl":
            with torch.no_grad(), self.full_precision():
                new = self.actor(self.trunk(data["observation"]))
            self.update_beta(distributed.all_reduce_mean(old.kl(new).mean()))  # type: ignore[arg-type]

    def epoch(self, data: TensorDictBase, old: Categorical | Normal, clip_epsilon: Tensor) -> Tensor:
        """Train on one pass over the rollout `[B]` in shuffled minibatches; return the mean KL divergence."""
        order = torch.randperm(len(data), device=data.device)
        batches = cast(Sequence[TensorDictBase], data[order].split(self.batch_size))
        kls = []
        for batch, indices in zip(batches, order.split(self.batch_size), strict=True):
            kls.append(self.update(batch, old[indices] if self.penalty == "kl" else None, clip_epsilon))
            self.updates += 1
        return distributed.all_reduce_mean(torch.stack(kls).mean())

    @torch.no_grad()
    def evaluate(self, rollout: TensorDictBase) -> tuple[TensorDictBase, Categorical | Normal]:
        """Return all transitions `[N T]` with log pi_k(a|s), advantage, target and V_k; and the distribution pi_k."""
        features = self.trunk(rollout["observation"].flatten(0, 1))  # [N, T, *S] -> [N T, F]
        old = self.actor(features)
        data = self.advantages(rollout, features)
        data["observation"] = rollout["observation"].flatten(0, 1)
        data["action"] = rollout["action"].flatten(0, 1)
        data["log_prob"] = old.log_prob(data["action"])
        return data, old

    @torch.no_grad()
    def advantages(self, rollout: TensorDictBase, features: Tensor) -> TensorDict:
        """Return the GAE of a rollout `[N, T]`, the critic's targets A + V, and V: each `[N T, 1]`.

        Targets and V are in the critic's units: with `normalize_value_target`, divided by the standard deviation of all
        targets before this call.

        Args:
            rollout: Rollout.
            features: Features of its observations, `[N T, F]`.
        """
        after: TensorDict = rollout.get("next")
        next_features = successors(features.unflatten(0, rollout.shape), rollout, self.trunk)  # [N, T, F]
        output, next_output = (
            self.critic(each).unflatten(0, rollout.shape)  # [N T, F] -> [N, T, 1]
            for each in (features, next_features.flatten(0, 1))
        )
        value, next_value = map(self.return_normalizer.inverse, (output, next_output))
        advantage = returns.gae(
            reward=after["reward"],
            terminated=after["terminated"],
            done=after["done"],
            value=value,
            next_value=next_value,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
        )
        target = advantage + value
        variance, error = target.var(correction=0), advantage.var(correction=0)
        self.record(explained_variance=(variance - error) / variance.clamp(min=1e-8))
        entries = {"advantage": advantage, "value_target": self.return_normalizer(target), "value": output}
        self.return_normalizer.update(target)
        # [N, T] -> [N T]
        return TensorDict(entries, batch_size=rollout.shape).flatten(0, 1)  # type: ignore[return-value]

    def update(self, batch: TensorDictBase, old: Categorical | Normal | None, clip_epsilon: Tensor) -> Tensor:
        """Take one gradient step on a minibatch `[B]`; return its KL divergence."""
        if self.normalize_advantage:
            batch["advantage"] = standardize(batch["advantage"])  # [B, 1]
        loss, metrics = self.combined_loss(batch, old, clip_epsilon)
        self.step(self.optimizer, loss, self.max_grad_norm)
        self.record(**metrics)
        return metrics["kl"]

    def combined_loss(
        self, batch: Batch, old: Categorical | Normal | None, clip_epsilon: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the negative of Eq. 9, which is minimised, and its parts as metrics."""
        features = self.trunk(batch["observation"])
        distribution = self.actor(features)
        actor_loss, metrics = self.actor_loss(batch, distribution, old, clip_epsilon)
        critic_loss = self.critic_loss(batch, self.critic(features), clip_epsilon)
        entropy = distribution.entropy().mean()
        loss = actor_loss + self.value_coef * critic_loss
        if self.entropy_coef:  # with weight 0, skip its backward pass
            loss = loss - self.entropy_coef * entropy
        metrics |= {"actor_loss": actor_loss, "critic_loss": critic_loss, "entropy": entropy}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def actor_loss(
        self, batch: Batch, new: Categorical | Normal, old: Categorical | Normal | None, clip_epsilon: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the actor loss -L, and metrics with the KL divergence.

        clip: L = E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)]      Eq. 7
        kl:   L = E[rho A - beta KL(pi_k || pi)]                    Eq. 8
        """
        advantage = batch["advantage"]  # [B, 1]
        log_ratio = new.log_prob(batch["action"]) - batch["log_prob"]
        ratio = log_ratio.exp()
        if old is not None:
            kl = old.kl(new).mean()  # type: ignore[arg-type]
            return self.beta * kl - (ratio * advantage).mean(), {"kl": kl}
        clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
        metrics = {"kl": (ratio - 1 - log_ratio).mean(), "clip_fraction": (ratio != clipped).float().mean()}
        return -torch.minimum(ratio * advantage, clipped * advantage).mean(), metrics

    def critic_loss(self, batch: Batch, value: Tensor, clip_epsilon: Tensor) -> Tensor:
        """Return the critic loss E[(V(s) - target)^2] / 2.

        With `clip_value`, the larger of two squared errors counts: that of V, and that of V clipped to V_k +- eps.
        """
        error = (value - batch["value_target"]).square()  # [B, 1]
        if self.clip_value:
            clipped_value = batch["value"] + (value - batch["value"]).clamp(-clip_epsilon, clip_epsilon)
            error = torch.maximum(error, (clipped_value - batch["value_target"]).square())
        return 0.5 * error.mean()

    @torch.no_grad()
    def update_beta(self, kl: Tensor) -> None:
        """Halve beta if KL < target_kl / 1.5, double it if KL > 1.5 target_kl (section 4)."""
        assert self.target_kl is not None
        self.beta *= torch.where(kl < self.target_kl / 1.5, 0.5, torch.where(kl > self.target_kl * 1.5, 2.0, 1.0))
        # Deviation: bounded. From 0 it could not grow again, and a huge one leaves the critic no gradient.
        self.beta.clamp_(1e-6, 1e6)
        self.record(beta=self.beta)
