"""Recurrent PPO and A2C: policy gradients with a memory, for envs that are only partly observed.

Actor and critic read the output h_t = f(o_t, h_{t-1}) of an LSTM or GRU in place of the observation o_t. The loss is
that of PPO (Schulman et al. 2017, arXiv:1707.06347), or with `loss: a2c` that of A2C (Mnih et al. 2016,
arXiv:1602.01783), which takes one step on the whole rollout:

    ppo: L(theta) = E[ min(rho A, clip(rho, 1 - eps, 1 + eps) A) ],  rho = pi_theta(a|h) / pi_k(a|h)
    a2c: L(theta) = E[ A log pi_theta(a|h) ]

The memory is trained by backpropagation through time, truncated to sequences of `sequence_length` steps, as in the
authors' code (Huang et al. 2022, "The 37 implementation details of PPO", the details of the LSTM).

Pseudocode:

    for each iteration k:
        collect T steps of N envs with pi_k; h is zero where an episode begins; store h before each step
        cut the rollout into sequences of L steps, each with the stored h before its first step
        advantages A by GAE from V_k, targets A + V_k; V of the observation after an episode's last step reads h, too
        for each epoch, for each minibatch of whole sequences:
            run the memory over each sequence from the stored h, from zero where an episode begins
            theta <- theta + lr grad (L(theta) - c_1 (V_theta(h) - target)^2 + c_2 H(pi_theta))

Stored states are those of the network that acted, the "stored state" of R2D2 without burn-in (Kapturowski et al. 2019):
after the first minibatch they are slightly out of date.

Deviations:
    - Minibatches are of whole sequences, drawn from all envs. The authors' code draws whole envs, sb3-contrib draws
      consecutive steps.
    - Those of `levin.algorithms.ppo`: normalised advantages, clipped change of V, a factor of 1/2 in the critic loss,
      bootstrapping at time limits, statistics once per rollout.

Metrics:
    train/actor_loss: -L, without the entropy.
    train/critic_loss: half the squared error of V.
    train/entropy: H(pi), nats.
    train/kl: KL(pi_k || pi), estimated by (rho - 1) - log rho (`loss: ppo`).
    train/clip_fraction: fraction of ratios outside the clip range (`loss: ppo`).
    train/explained_variance: 1 - Var[target - V_k] / Var[target].
"""

from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.optim import Optimizer

from levin.algorithms.base import Algorithm, Batch, standardize
from levin.algorithms.recurrent_ppo_networks import Carry, Memory, MemoryKind, RecurrentPolicy, Segments
from levin.core import distributed
from levin.core.errors import ConfigError
from levin.core.spaces import IS_FIRST, EnvSpec
from levin.core.types import (
    Activation,
    Fraction,
    Network,
    NonNegativeFloat,
    OptimizerName,
    PositiveFloat,
    PositiveInt,
    Schedule,
)
from levin.data import returns
from levin.data.replay import to_device
from levin.nn.networks import Actor, Architecture, Critic

MEMORY = "memory"  # [N, T, D], in rollouts: state of the memories before each step


class RecurrentPPO(Algorithm):
    """Proximal policy optimisation or A2C with an LSTM or GRU, for vectors and pixels.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        gamma: Discount factor: 0.99. This value and those below are sb3-contrib's, unless a source is named.
        gae_lambda: lambda of GAE: 0.95.
        loss: `ppo`, or `a2c`: one step per rollout without a ratio. Then `epochs`, `batch_size`, `target_kl` and the
            clips of policy and V have no effect.
        clip_epsilon: Half-width eps of the clip range: 0.2.
        clip_schedule: Schedule of `clip_epsilon`; `linear` lowers it to 0.
        clip_value: Whether to clip the change of V as well: no.
        target_kl: KL divergence in nats above which the epochs end; null: never.
        optimizer: Optimiser: Adam, with an epsilon of 1e-5.
        lr: Learning rate: 3e-4.
        lr_schedule: Schedule of the learning rate; `linear` lowers it to 0.
        schedule_env_steps: Env steps after which a linear schedule is at 0.
        epochs: Passes over a rollout: 10.
        batch_size: Transitions per minibatch, in whole sequences: 128.
        sequence_length: Steps through which the memory is trained. sb3-contrib: up to its batch size, 128. Short
            sequences run side by side and are faster.
        steps_per_iteration: Vector steps of a rollout: 128.
        normalize_advantage: Whether to scale advantages to mean 0 and standard deviation 1 in each minibatch.
        entropy_coef: Weight of the entropy, c_2: 0.
        value_coef: Weight of the critic loss, c_1: 1, which is 0.5 in sb3-contrib: the critic loss here has a factor of
            1/2.
        max_grad_norm: Maximum gradient norm of all networks together: 0.5; null: no clipping.
        memory: `lstm` or `gru`. On a CPU, PyTorch's LSTM is several times as fast as its GRU.
        memory_size: Units of each memory: 256.
        critic_memory: What the critic reads: a memory of its `own`; `shared`: that of the actor, trained by both losses
            as in the authors' code; `none`: the observation alone.
        hidden_sizes: Widths of the hidden layers of actor and critic after the memory: 64, 64.
        activation: Activation between the layers: tanh.
        network: Kind of hidden layers or CNN, or your own trunk (`levin.nn.networks.Architecture`).
        initial_log_std: Log standard deviation of a Gaussian policy at the start: 0.
        compile: Whether to compile the loss, without the memory. Other rounding, faster after tens of seconds at the
            start.
    """

    actions: ClassVar = ("box", "discrete", "multi_discrete")
    observations: ClassVar = ("float32", "uint8")
    optimizer_name: OptimizerName

    def __init__(
        self,
        *,
        env: EnvSpec,
        gamma: Fraction = 0.99,
        gae_lambda: Fraction = 0.95,
        loss: Literal["ppo", "a2c"] = "ppo",
        clip_epsilon: PositiveFloat = 0.2,
        clip_schedule: Schedule = "constant",
        clip_value: bool = False,
        target_kl: PositiveFloat | None = None,
        optimizer: OptimizerName = "adam",
        lr: PositiveFloat = 3e-4,
        lr_schedule: Schedule = "constant",
        schedule_env_steps: PositiveInt = 1_000_000,
        epochs: PositiveInt = 10,
        batch_size: PositiveInt = 128,
        sequence_length: PositiveInt = 32,
        steps_per_iteration: PositiveInt = 128,
        normalize_advantage: bool = True,
        entropy_coef: NonNegativeFloat = 0.0,
        value_coef: NonNegativeFloat = 1.0,
        max_grad_norm: PositiveFloat | None = 0.5,
        memory: MemoryKind = "lstm",
        memory_size: PositiveInt = 256,
        critic_memory: Literal["own", "shared", "none"] = "own",
        hidden_sizes: Sequence[PositiveInt] = (64, 64),
        activation: Activation = "tanh",
        network: Network = "mlp",
        initial_log_std: float = 0.0,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma)
        transitions = steps_per_iteration * env["num_envs"]
        if steps_per_iteration % sequence_length:
            raise ConfigError(
                f"algo.sequence_length={sequence_length} does not divide algo.steps_per_iteration="
                f"{steps_per_iteration}: change one of the two"
            )
        if loss == "ppo" and (batch_size % sequence_length or transitions % batch_size):
            raise ConfigError(
                f"algo.batch_size={batch_size} must be a multiple of algo.sequence_length={sequence_length} and divide "
                f"the {transitions} transitions of a rollout, algo.steps_per_iteration={steps_per_iteration} times "
                f"env.num_envs={env['num_envs']}: change one of the four"
            )
        self.gamma, self.gae_lambda, self.loss, self.target_kl = gamma, gae_lambda, loss, target_kl
        self.clip_epsilon, self.clip_schedule, self.clip_value = clip_epsilon, clip_schedule, clip_value
        self.optimizer_name, self.lr = optimizer, lr
        self.lr_schedule, self.schedule_env_steps = lr_schedule, schedule_env_steps
        self.epochs, self.batch_size = (epochs, batch_size) if loss == "ppo" else (1, transitions)
        self.sequence_length, self.steps_per_iteration = sequence_length, steps_per_iteration
        self.normalize_advantage, self.entropy_coef, self.value_coef = normalize_advantage, entropy_coef, value_coef
        self.max_grad_norm, self.shares_memory = max_grad_norm, critic_memory == "shared"

        architecture = Architecture(network, hidden_sizes, activation)
        self.trunk, features = architecture.make_trunk(env)
        self.actor_memory = Memory(memory, features, memory_size)
        self.critic_memory = Memory(memory, features, memory_size) if critic_memory == "own" else None
        self.actor = Actor(memory_size, env, architecture, initial_log_std)
        self.critic = Critic(features if critic_memory == "none" else memory_size, architecture)
        self.memories = [each for each in (self.actor_memory, self.critic_memory) if each is not None]
        self.carry = Carry(env["num_envs"], sum(each.state_size for each in self.memories))
        if compile:
            self.compile_losses("combined_loss")

    def configure_optimizers(self) -> Optimizer:
        self.optimizer = self.make_optimizer(self.optimizer_name, self.parameters(), self.lr)
        return self.optimizer

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        memories = [self.actor_memory] if deterministic else self.memories
        carry = Carry(0, self.actor_memory.state_size).to(self.device) if deterministic else self.carry
        module = RecurrentPolicy(
            self.observation_normalizer, self.trunk, memories, self.actor, carry, deterministic=deterministic
        )
        out_keys: list[NestedKey] = ["action"] if deterministic else ["action", MEMORY]
        return TensorDictModule(module, in_keys=["observation", IS_FIRST], out_keys=out_keys)

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        lr = self.scheduled(self.lr, self.lr_schedule)
        # A tensor, because a loss compiled for a Python number is compiled again for every other number.
        clip_epsilon = torch.tensor(self.scheduled(self.clip_epsilon, self.clip_schedule), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.full_precision():  # as during collection
            data, state = self.evaluate(self.normalize(rollout))
        done = rollout["next", "done"].reshape(-1, self.sequence_length).cpu()  # [N, T, 1] -> [K, L]
        for _epoch in range(self.epochs):
            kl = self.epoch(data, state, done, clip_epsilon)
            # Reading `kl` waits for the device, so it happens only between epochs and only if target_kl is set.
            if self.loss == "ppo" and self.target_kl is not None and kl > self.target_kl:
                break

    def epoch(self, data: TensorDictBase, state: Tensor, done: Tensor, clip_epsilon: Tensor) -> Tensor:
        """Train on one pass over the sequences `[K, L]` in shuffled minibatches; return the mean KL divergence.

        Args:
            data: Steps of the sequences, from `evaluate`.
            state: State of the memories before each sequence, `[K, D]`.
            done: End flags, `[K, L]`, on the CPU.
            clip_epsilon: Half-width of the clip range.
        """
        kls = []
        for indices in torch.randperm(len(done)).split(self.batch_size // self.sequence_length):
            segments, chosen = Segments(done[indices], self.device), to_device(indices, self.device)
            kls.append(self.update(data[chosen].flatten(0, 1), state[chosen], segments, clip_epsilon))
            self.updates += 1
        return distributed.all_reduce_mean(torch.stack(kls).mean())

    @torch.no_grad()
    def evaluate(self, rollout: TensorDictBase) -> tuple[TensorDictBase, Tensor]:
        """Return the steps `[K, L]` of the sequences of a rollout `[N, T]`, and the stored state before each, `[K, D]`.

        A step has observation, action, log pi_k(a|h), advantage, target A + V_k, and V_k. The advantage is that of GAE.
        """
        after: TensorDict = rollout.get("next")
        state = cast(Tensor, rollout[MEMORY])[:, :: self.sequence_length].flatten(0, 1)  # [N, T, D] -> [K, D]
        done = after["done"].reshape(-1, self.sequence_length).cpu()
        segments = Segments(done, state.device, lookahead=True)
        data = cast(TensorDict, rollout.select("observation", "action").flatten(0, 1))  # [N, T] -> [B]
        # Behind all steps comes the observation after the last step of each segment: V of it reads the memory, too.
        following = cast(Tensor, after["observation"].flatten(0, 1))[segments.last]  # [S, *S]
        actor_inputs, critic_inputs = self.remember(torch.cat([data["observation"], following]), segments, state)
        old, values = self.actor(actor_inputs[: len(data)]), self.critic(critic_inputs)
        value = values[: len(data)]  # [B, 1]
        next_value = value.roll(-1, 0)
        next_value[segments.last] = values[len(data) :]
        value, next_value = (each.view_as(after["reward"]) for each in (value, next_value))  # [N, T, 1]
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
        entries = {"advantage": advantage, "value_target": target, "value": value}
        data.update({name: each.flatten(0, 1) for name, each in entries.items()})
        data["log_prob"] = old.log_prob(data["action"])
        return data.reshape(-1, self.sequence_length), state  # [B] -> [K, L]

    def remember(self, observation: Tensor, segments: Segments, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the memories over sequences; return the inputs of actor and critic at each step, `[B, H]` each.

        Args:
            observation: Observations `[B, *S]`.
            segments: Layout of the sequences.
            state: Stored state of the memories before each sequence, `[K, D]`.
        """
        features = self.trunk(observation)  # [B, F]
        padded, initial = segments.pad(features), segments.initial(state)
        states = initial.split([memory.state_size for memory in self.memories], -1)
        outputs = [segments.pick(memory(padded, each)) for memory, each in zip(self.memories, states, strict=True)]
        if len(outputs) == 1:
            outputs.append(outputs[0] if self.shares_memory else features)
        return outputs[0], outputs[1]

    def update(self, batch: TensorDictBase, state: Tensor, segments: Segments, clip_epsilon: Tensor) -> Tensor:
        """Take one gradient step on a minibatch `[B]` of whole sequences; return its KL divergence."""
        if self.normalize_advantage:
            batch["advantage"] = standardize(batch["advantage"])  # [B, 1]
        actor_inputs, critic_inputs = self.remember(batch["observation"], segments, state)
        loss, metrics = self.combined_loss(batch, actor_inputs, critic_inputs, clip_epsilon)
        self.step(self.optimizer, loss, self.max_grad_norm)
        self.record(**metrics)
        return metrics.get("kl", clip_epsilon)

    def combined_loss(
        self, batch: Batch, actor_inputs: Tensor, critic_inputs: Tensor, clip_epsilon: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss -L + c_1 (V - target)^2 - c_2 H, which is minimised, and its parts as metrics."""
        distribution = self.actor(actor_inputs)
        log_prob, entropy = distribution.log_prob(batch["action"]), distribution.entropy().mean()
        actor_loss, metrics = self.actor_loss(batch, log_prob, clip_epsilon)
        critic_loss = self.critic_loss(batch, self.critic(critic_inputs), clip_epsilon)
        loss = actor_loss + self.value_coef * critic_loss
        if self.entropy_coef:  # with weight 0, skip its backward pass
            loss = loss - self.entropy_coef * entropy
        metrics |= {"actor_loss": actor_loss, "critic_loss": critic_loss, "entropy": entropy}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def actor_loss(self, batch: Batch, log_prob: Tensor, clip_epsilon: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the actor loss -L for log pi(a|h) `[B, 1]`, and metrics.

        ppo: L = E[min(rho A, clip(rho, 1 - eps, 1 + eps) A)]
        a2c: L = E[A log pi(a|h)]
        """
        advantage = batch["advantage"]  # [B, 1]
        if self.loss == "a2c":
            return -(advantage * log_prob).mean(), {}
        log_ratio = log_prob - batch["log_prob"]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
        metrics = {"kl": (ratio - 1 - log_ratio).mean(), "clip_fraction": (ratio != clipped).float().mean()}
        return -torch.minimum(ratio * advantage, clipped * advantage).mean(), metrics

    def critic_loss(self, batch: Batch, value: Tensor, clip_epsilon: Tensor) -> Tensor:
        """Return the critic loss E[(V(h) - target)^2] / 2.

        With `clip_value`, the larger of two squared errors counts: that of V, and that of V clipped to V_k +- eps.
        """
        error = (value - batch["value_target"]).square()  # [B, 1]
        if self.clip_value:
            clipped_value = batch["value"] + (value - batch["value"]).clamp(-clip_epsilon, clip_epsilon)
            error = torch.maximum(error, (clipped_value - batch["value_target"]).square())
        return 0.5 * error.mean()
