"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), lecture rows 16 and 18.

Several epochs of gradient steps on one rollout. The ratio of the new policy to the one that acted weighs the advantage,
and is kept near 1 by a clip:

    L(theta) = E[ min(rho A, clip(rho, 1 - eps, 1 + eps) A) ],  rho = pi_theta(a|s) / pi_k(a|s)        Eq. 7

or by a penalty on the KL divergence, whose weight adapts:

    L(theta) = E[ rho A - beta KL(pi_k || pi_theta) ]                                                   Eq. 8

Pseudocode (Algorithm 1):

    for each iteration k:
        collect T steps of N envs with pi_k
        advantages A by GAE from V_k; targets A + V_k
        for each epoch, for each minibatch:
            theta <- theta + lr grad (L(theta) - c_1 (V_theta(s) - target)^2 + c_2 H(pi_theta))         Eq. 9
        penalty: beta <- beta / 2 if KL < target_kl / 1.5, 2 beta if KL > 1.5 target_kl

Deviations, all of the authors' code (Huang et al. 2022, "The 37 implementation details of PPO"):
    - Advantages are normalised in each minibatch; the critic is clipped like the policy; so is the gradient's norm.
    - The critic's loss has a factor of 1/2.
    - With `penalty: clip`, a `target_kl` ends the epochs once KL exceeds it.

Metrics:
    train/actor_loss: -L, without the entropy.
    train/critic_loss: half the squared error of V.
    train/entropy: H(pi), nats.
    train/kl: KL(pi_k || pi), estimated by (rho - 1) - log rho; exact with `penalty: kl`.
    train/clip_fraction: share of ratios outside of the clip.
    train/beta: weight of the penalty (`penalty: kl`).
    train/explained_variance: 1 - Var[target - V_k] / Var[target].
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
from levin.core.types import Activation, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Schedule
from levin.data import returns
from levin.nn.distributions import Categorical, Normal
from levin.nn.networks import Actor, Critic, make_trunk


class PPO(Algorithm):
    """Proximal policy optimisation with a clip or an adaptive KL penalty, for vectors and pixels.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount. Table 3: 0.99, as for all that follows.
        gae_lambda: Decay of GAE: 0.95.
        penalty: What keeps the policy near the one that acted: `clip` or `kl`.
        clip_epsilon: Half the width of the clip: 0.2.
        clip_schedule: `linear` takes it to 0.
        clip_value: Clip the critic as well; the authors' code: true.
        target_kl: Nats. Ends the epochs (`clip`); what the penalty steers to (`kl`, section 4: 0.01); null: never.
        initial_beta: Weight of the KL penalty at the start, section 4: 1.
        lr: Adam: 3e-4; the authors' code: with an epsilon of 1e-5.
        lr_schedule: `linear` takes it to 0; the authors' code: linear.
        schedule_env_steps: Env steps after which a linear schedule is at 0.
        epochs: Passes over a rollout: 10.
        batch_size: Transitions per minibatch: 64.
        steps_per_iteration: Vector steps of a rollout: 2048.
        recompute_advantage: Anew in each epoch, from the critic as it is (Andrychowicz et al. 2021); the paper: no.
        normalize_advantage: To mean 0 and deviation 1, in each minibatch.
        entropy_coef: c_2: 0 (Atari: 0.01).
        value_coef: c_1; authors' code: 0.5.
        max_grad_norm: Of actor and critic together; authors' code: 0.5.
        hidden_sizes: Widths of the hidden layers of actor and critic: 64, 64; of pixels, behind the Nature CNN.
        activation: Between the layers: tanh.
        initial_log_std: Of a Gaussian policy: 0.
        compile: The loss, on a GPU all of an update as a CUDA graph; the same numbers in less time, after tens of
            seconds at the start.
    """

    actions: ClassVar = ("box", "discrete", "multi_discrete")
    observations: ClassVar = ("float32", "uint8")

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
        entropy_coef: NonNegativeFloat = 0.0,
        value_coef: NonNegativeFloat = 0.5,
        max_grad_norm: PositiveFloat | None = 0.5,
        hidden_sizes: Sequence[PositiveInt] = (64, 64),
        activation: Activation = "tanh",
        initial_log_std: float = 0.0,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        if steps_per_iteration * env["num_envs"] % batch_size:
            raise ConfigError(
                f"algo.batch_size={batch_size} does not divide the rollout of algo.steps_per_iteration="
                f"{steps_per_iteration} times env.num_envs={env['num_envs']} transitions"
            )
        if penalty == "kl" and target_kl is None:
            raise ConfigError("algo.penalty=kl needs an algo.target_kl to steer to; the paper takes 0.01")
        self.gamma, self.gae_lambda, self.penalty, self.target_kl = gamma, gae_lambda, penalty, target_kl
        self.clip_epsilon, self.clip_schedule, self.clip_value = clip_epsilon, clip_schedule, clip_value
        self.lr, self.lr_schedule, self.schedule_env_steps = lr, lr_schedule, schedule_env_steps
        self.epochs, self.batch_size = epochs, batch_size
        self.steps_per_iteration, self.recompute_advantage = steps_per_iteration, recompute_advantage
        self.normalize_advantage, self.entropy_coef, self.value_coef = normalize_advantage, entropy_coef, value_coef
        self.max_grad_norm = max_grad_norm

        self.trunk, features = make_trunk(env)
        self.actor = Actor(features, env, hidden_sizes, activation, initial_log_std)
        self.critic = Critic(features, hidden_sizes, activation)
        self.register_buffer("beta", torch.tensor(initial_beta) if penalty == "kl" else None)
        if compile:
            self.compile_losses("combined_loss")
            if penalty == "clip":  # the penalty compares distributions, which are no tensors
                self.capture("update")

    def configure_optimizers(self) -> Optimizer:
        self.optimizer = self.make_optimizer("adam", self.parameters(), self.lr)
        return self.optimizer

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        remaining = self.remaining(self.schedule_env_steps)
        lr = self.lr * remaining if self.lr_schedule == "linear" else self.lr
        # A tensor: what is compiled would be compiled anew for every other number.
        epsilon = self.clip_epsilon * remaining if self.clip_schedule == "linear" else self.clip_epsilon
        clip_epsilon = torch.tensor(epsilon, device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rollout = self.normalize(rollout)
        with self.full_precision():  # as it acted
            data, old = self.evaluate(rollout)
        for epoch in range(self.epochs):
            if epoch and self.recompute_advantage:
                data.update(self.advantages(rollout))
            kl = self.epoch(data, old, clip_epsilon)
            # The one wait for the device, between epochs, and only where it is asked for.
            if self.penalty == "clip" and self.target_kl is not None and kl > self.target_kl:
                break
        if self.penalty == "kl":
            with torch.no_grad():
                new = self.actor(self.trunk(data["observation"]))
            self.update_beta(distributed.all_reduce_mean(old.kl(new).mean()))  # type: ignore[arg-type]

    def epoch(self, data: TensorDictBase, old: Categorical | Normal, clip_epsilon: Tensor) -> Tensor:
        """One pass over the rollout `[B]` in shuffled minibatches. Returns the mean KL divergence."""
        order = torch.randperm(len(data), device=data.device)
        batches = cast(Sequence[TensorDictBase], data[order].split(self.batch_size))
        kls = []
        for batch, rows in zip(batches, order.split(self.batch_size), strict=True):
            kls.append(self.update(batch, old[rows] if self.penalty == "kl" else None, clip_epsilon))
            self.updates += 1
        return distributed.all_reduce_mean(torch.stack(kls).mean())

    @torch.no_grad()
    def evaluate(self, rollout: TensorDictBase) -> tuple[TensorDictBase, Categorical | Normal]:
        """All transitions `[N T]` with log pi_k(a|s), advantage, target and V_k; and pi_k itself."""
        old = self.actor(self.trunk(rollout["observation"].flatten(0, 1)))  # [N, T, *S] -> [N T, *S]
        data = self.advantages(rollout)
        data["observation"] = rollout["observation"].flatten(0, 1)
        data["action"] = rollout["action"].flatten(0, 1)
        data["log_prob"] = old.log_prob(data["action"])
        variance, error = data["value_target"].var(correction=0), data["advantage"].var(correction=0)
        self.record(explained_variance=(variance - error) / variance.clamp(min=1e-8))
        return data, old

    @torch.no_grad()
    def advantages(self, rollout: TensorDictBase) -> TensorDict:
        """GAE of a rollout `[N, T]`, the critic's targets A + V, and V: each `[N T, 1]`."""
        after: TensorDict = rollout.get("next")
        value = self.value(rollout["observation"])
        next_value = self.value(after["observation"])
        advantage = returns.gae(
            reward=after["reward"],
            terminated=after["terminated"],
            done=after["done"],
            value=value,
            next_value=next_value,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
        )
        each = {"advantage": advantage, "value_target": advantage + value, "value": value}
        return TensorDict(each, batch_size=rollout.shape).flatten(0, 1)  # type: ignore[return-value]  # [N, T] -> [N T]

    def value(self, observation: Tensor) -> Tensor:
        """V(s) of a rollout's observations: `[N, T, *S] -> [N, T, 1]`."""
        return self.critic(self.trunk(observation.flatten(0, 1))).unflatten(0, observation.shape[:2])

    def update(self, batch: TensorDictBase, old: Categorical | Normal | None, clip_epsilon: Tensor) -> Tensor:
        """One gradient step on a minibatch `[B]`. Returns its KL divergence."""
        if self.normalize_advantage:
            batch["advantage"] = standardize(batch["advantage"])  # [B, 1]
        loss, metrics = self.combined_loss(batch, old, clip_epsilon)
        self.step(self.optimizer, loss, self.max_grad_norm)
        self.record(**metrics)
        return metrics["kl"]

    def combined_loss(
        self, batch: Batch, old: Categorical | Normal | None, clip_epsilon: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 9, to be minimised, and its parts."""
        features = self.trunk(batch["observation"])
        distribution = self.actor(features)
        actor_loss, metrics = self.actor_loss(batch, distribution, old, clip_epsilon)
        critic_loss = self.critic_loss(batch, self.critic(features), clip_epsilon)
        entropy = distribution.entropy().mean()
        loss = actor_loss + self.value_coef * critic_loss
        if self.entropy_coef:  # what is not wanted is not differentiated
            loss = loss - self.entropy_coef * entropy
        metrics |= {"actor_loss": actor_loss, "critic_loss": critic_loss, "entropy": entropy}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def actor_loss(
        self, batch: Batch, new: Categorical | Normal, old: Categorical | Normal | None, clip_epsilon: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """-E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)], or -E[rho A - beta KL(pi_k || pi)]; and the KL divergence."""
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
        """E[(V(s) - target)^2] / 2; clipped: the larger of that and of V no further than eps from V_k."""
        error = (value - batch["value_target"]).square()  # [B, 1]
        if self.clip_value:
            near = batch["value"] + (value - batch["value"]).clamp(-clip_epsilon, clip_epsilon)
            error = torch.maximum(error, (near - batch["value_target"]).square())
        return 0.5 * error.mean()

    @torch.no_grad()
    def update_beta(self, kl: Tensor) -> None:
        """Halve beta where KL < target_kl / 1.5, double it where KL > 1.5 target_kl (section 4)."""
        assert self.target_kl is not None
        self.beta *= torch.where(kl < self.target_kl / 1.5, 0.5, torch.where(kl > self.target_kl * 1.5, 2.0, 1.0))
        self.record(beta=self.beta)
