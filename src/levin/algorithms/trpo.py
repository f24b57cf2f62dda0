"""Trust region policy optimisation (Schulman et al. 2015, arXiv:1502.05477).

Each step is the largest improvement within a ball in the space of policies, not of parameters:

    max_theta E[ rho A ]  subject to  E[ KL(pi_k || pi_theta) ] <= delta,   rho = pi_theta(a|s) / pi_k(a|s)    Eq. 14

To first order in the objective and to second order in the constraint, the step is the natural gradient:

    x = F^-1 g,  theta = theta_k + sqrt(2 delta / x'Fx) x,   g = grad E[ rho A ],  F = grad^2 E[ KL ] at theta_k

Pseudocode (appendix C):

    for each iteration k:
        collect T steps of N envs with pi_k; advantages A by GAE from V
        g <- gradient of the surrogate
        x <- conjugate gradient on F x = g, which needs only products F v
        for shrink = 1, 0.8, 0.8^2, ...: take theta = theta_k + shrink sqrt(2 delta / x'Fx) x
            if it improves the surrogate within KL <= delta; if none does, theta = theta_k
        V <- V - lr grad E[(V(s) - (A + V_k))^2], over epochs of minibatches

Deviations:
    - Advantages are normalised over the rollout, as in Stable-Baselines3.
    - F is damped: F + damping I (appendix C; the authors' code: 0.1).

The KL of a continuous policy is the sum over the entries of an action, as in the paper. sb3-contrib takes their mean,
so that for n entries its `target_kl` and `cg_damping` are n times as large in the units of this file. It also
constrains KL(pi || pi_k) instead of KL(pi_k || pi), with < instead of <=.

Metrics:
    train/surrogate: improvement of E[rho A] by the step taken.
    train/kl: KL(pi_k || pi) after the step, nats.
    train/cg_residual: ||F x - g|| / ||g||.
    train/line_search_steps: candidate steps tried; `line_search_steps` + 1 if none was taken.
    train/critic_loss: squared error of V.
    train/entropy: H(pi_k), nats.
    train/explained_variance: 1 - Var[target - V_k] / Var[target].
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer

from levin.algorithms.base import Algorithm, Batch, standardize
from levin.core import distributed
from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec
from levin.core.types import Activation, Fraction, Network, NonNegativeFloat, PositiveFloat, PositiveInt
from levin.data import returns
from levin.nn.distributions import Categorical, Normal
from levin.nn.networks import Actor, Architecture, Critic
from levin.nn.parameters import assign_parameters


class TRPO(Algorithm):
    """Natural policy gradient with a line search.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor: 0.99. This value and those below are from RL Baselines3 Zoo, MuJoCo.
        gae_lambda: lambda of GAE: 0.95.
        target_kl: delta, the radius of the trust region in nats: 0.01.
        cg_iterations: Steps of conjugate gradient: 25.
        cg_damping: Constant added to the diagonal of F: 0.1.
        line_search_shrink: Factor between the lengths of two candidate steps: 0.8.
        line_search_steps: Maximum number of candidate steps: 10.
        critic_lr: Learning rate of the critic (Adam): 1e-3.
        critic_epochs: Passes of the critic over a rollout: 20.
        batch_size: Transitions per minibatch of the critic: 128.
        steps_per_iteration: Vector steps of a rollout: 1024, with two envs.
        normalize_advantage: Whether to scale advantages to mean 0 and standard deviation 1 over the rollout.
        hidden_sizes: Widths of the hidden layers of actor and critic: 64, 64.
        activation: Activation between the layers: tanh.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        initial_log_std: Log standard deviation of a Gaussian policy at the start: 0.
        compile: Whether to compile the critic loss. Other rounding, no faster on a CPU. The policy's step stays eager,
            because products with F differentiate twice, which compiled code can't do.
    """

    actions: ClassVar = ("box", "discrete", "multi_discrete")
    action_masks: ClassVar = True

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 0.99,
        gae_lambda: Fraction = 0.95,
        target_kl: PositiveFloat = 0.01,
        cg_iterations: PositiveInt = 25,
        cg_damping: NonNegativeFloat = 0.1,
        line_search_shrink: Fraction = 0.8,
        line_search_steps: PositiveInt = 10,
        critic_lr: PositiveFloat = 1e-3,
        critic_epochs: PositiveInt = 20,
        batch_size: PositiveInt = 128,
        steps_per_iteration: PositiveInt = 1024,
        normalize_advantage: bool = True,
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
        self.gamma, self.gae_lambda, self.target_kl = gamma, gae_lambda, target_kl
        self.cg_iterations, self.cg_damping = cg_iterations, cg_damping
        self.line_search_shrink, self.line_search_steps = line_search_shrink, line_search_steps
        self.critic_lr, self.critic_epochs, self.batch_size = critic_lr, critic_epochs, batch_size
        self.steps_per_iteration, self.normalize_advantage = steps_per_iteration, normalize_advantage

        architecture = Architecture(network, hidden_sizes, activation)
        self.trunk, features = architecture.make_trunk(env)
        self.actor = Actor(features, env, architecture, initial_log_std)
        self.critic = Critic(features, architecture)
        parameters = *self.trunk.parameters(), *self.actor.parameters()
        self.actor_parameters = [each for each in parameters if each.requires_grad]
        if compile:
            self.compile_losses("critic_loss")

    def configure_optimizers(self) -> Optimizer:
        self.critic_optimizer = self.make_optimizer("adam", self.critic.parameters(), self.critic_lr)
        return self.critic_optimizer

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        data = self.advantages(self.normalize(rollout))
        with self.full_precision():  # products with F in half precision would not give an ascent direction
            self.update(data)
        for _ in range(self.critic_epochs):
            order = torch.randperm(len(data), device=data.device)
            shuffled = data.select("observation", "value_target")[order]
            for batch in cast(Sequence[TensorDictBase], shuffled.split(self.batch_size)):
                critic_loss = self.critic_loss(batch)
                self.step(self.critic_optimizer, critic_loss)
                self.record(critic_loss=critic_loss)
        self.updates += 1

    @torch.no_grad()
    def advantages(self, rollout: TensorDictBase) -> TensorDictBase:
        """Return the transitions `[N T]` of a rollout `[N, T]` with advantages (GAE) and targets A + V, `[N T, 1]`."""
        after: TensorDict = rollout.get("next")
        value, next_value = (
            self.critic(self.trunk(observation.flatten(0, 1))).unflatten(0, rollout.shape)  # [N, T, *S] -> [N, T, 1]
            for observation in (rollout["observation"], after["observation"])
        )
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
        if self.normalize_advantage:
            advantage = standardize(advantage)
        entries = {"observation": rollout["observation"], "action": rollout["action"]}
        entries |= {"advantage": advantage, "value_target": target}
        return TensorDict(entries, batch_size=rollout.shape).flatten(0, 1)  # [N, T] -> [N T]

    def update(self, batch: TensorDictBase) -> None:
        """Take one natural gradient step of the policy on all transitions `[B]`."""
        new = self.actor(self.trunk(batch["observation"]))
        old = new.detach()
        gradient = distributed.all_reduce_mean(self.flat_gradient(self.surrogate(batch, new, old)))
        product = self.fisher_vector_product(old.kl(new).mean())
        direction, residual = conjugate_gradient(product, gradient, self.cg_iterations)
        step = (2 * self.target_kl / (direction @ product(direction))).sqrt() * direction
        improvement, kl, tried = self.line_search(batch, old, step)
        self.record(surrogate=improvement, kl=kl, line_search_steps=tried, entropy=old.entropy().mean())
        self.record(cg_residual=residual / gradient.norm().clamp(min=1e-8))

    def surrogate(self, batch: TensorDictBase, new: Categorical | Normal, old: Categorical | Normal) -> Tensor:
        """Return the surrogate objective E[rho A]."""
        ratio = (new.log_prob(batch["action"]) - old.log_prob(batch["action"])).exp()  # [B, 1]
        return (ratio * batch["advantage"]).mean()

    def flat_gradient(self, objective: Tensor, *, create_graph: bool = False) -> Tensor:
        """Return the gradient of a scalar in all parameters of the trunk and the actor, as one vector `[P]`."""
        gradients = torch.autograd.grad(objective, self.actor_parameters, create_graph=create_graph, retain_graph=True)
        return torch.cat([each.flatten() for each in gradients])

    def fisher_vector_product(self, kl: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function v -> (F + damping I) v, `[P] -> [P]`.

        Args:
            kl: Mean KL(pi_k || pi) at pi = pi_k, where its Hessian is F.
        """
        gradient = self.flat_gradient(kl, create_graph=True)
        return lambda v: distributed.all_reduce_mean(self.flat_gradient(gradient @ v)) + self.cg_damping * v

    @torch.no_grad()
    def line_search(
        self, batch: TensorDictBase, old: Categorical | Normal, step: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the longest of the shrinking steps that improves the surrogate within the trust region.

        Return the improvement, the KL divergence and the number of candidates. Each candidate waits for the device.
        """
        start = parameters_to_vector(self.actor_parameters)
        before = self.surrogate(batch, old, old)
        for tried in range(self.line_search_steps):
            assign_parameters(self.actor_parameters, start + self.line_search_shrink**tried * step)
            new = self.actor(self.trunk(batch["observation"]))
            improvement = distributed.all_reduce_mean(self.surrogate(batch, new, old) - before)
            kl = distributed.all_reduce_mean(old.kl(new).mean())
            if improvement > 0 and kl <= self.target_kl:
                return improvement, kl, torch.tensor(tried + 1.0)
        assign_parameters(self.actor_parameters, start)
        return torch.zeros_like(before), torch.zeros_like(before), torch.tensor(self.line_search_steps + 1.0)

    def critic_loss(self, batch: Batch) -> Tensor:
        """Return the critic loss E[(V(s) - target)^2]. The trunk belongs to the actor's step."""
        features = self.trunk(batch["observation"]).detach()
        return (self.critic(features) - batch["value_target"]).square().mean()


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Solve A x = b for a positive definite A, given by its products A v. Return x `[P]` and ||A x - b||.

    Source: Hestenes and Stiefel 1952. The number of iterations is fixed, because reading the residual would wait for
    the device.
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    squared_norm = residual @ residual
    tiny = torch.finfo(b.dtype).tiny
    for _ in range(iterations):
        a_direction = product(direction)
        alpha = squared_norm / (direction @ a_direction).clamp(min=tiny)
        x = x + alpha * direction
        residual = residual - alpha * a_direction
        previous, squared_norm = squared_norm, residual @ residual
        direction = residual + squared_norm / previous.clamp(min=tiny) * direction
    return x, squared_norm.sqrt()
