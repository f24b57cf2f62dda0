"""Updates of Dreamer and DreamerV3 against TorchRL's own modules and losses, with equal sizes and equal sequences.

TorchRL's agents are built as in its examples. Its DreamerV3 has the published architecture: block GRU, RMSNorm, uniform
mixtures, two-hot rewards and values, continue model, slow critic, replayed values. The first Dreamer has no continue
model here. Both sides have the same number of parameters; a check makes sure that each parameter gets a gradient.

TorchRL's interface leaves these differences:
- Its rollouts also sample from the prior.
- Its imagination decodes the reward at each step, and keeps an autograd graph that the score function does not need.
- Its first Dreamer backpropagates through the input of the policy and has no `is_first`.
- Its first Dreamer sums the errors of vector observations over the batch, so the loss is scaled here.

In addition, Levin records metrics.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam, Optimizer
from torchrl import modules, objectives
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.model_based import DreamerEnv
from torchrl.trainers.algorithms import DreamerV3Optimizer

from levin.algorithms.dreamer import SIZES, Dreamer
from levin.algorithms.dreamer_v3 import DreamerV3
from levin.algorithms.dreamer_v3_networks import BINS, UNIMIX
from levin.algorithms.dreamer_v3_networks import SIZES as V3_SIZES
from levin.bench.peers import fake_env_spec, print_table
from levin.core.spaces import EMPTY, EnvSpec
from levin.data.sequences import LATENT

BATCH = 16
PEER = "TorchRL"
STATE: list[Any] = ["state", "belief"]
Chain: Any = TensorDictSequential  # Any, as its type hints accept only one list of modules
ProbabilisticChain: Any = ProbabilisticTensorDictSequential


@dataclass(frozen=True)
class Sizes:
    """Sizes of a task.

    Args:
        observation: Number of observation entries.
        actions: Number of action entries.
        length: Steps T of a replayed sequence.
        horizon: Steps of an imagined trajectory.
        updates: Updates per segment.
    """

    observation: int
    actions: int
    length: int
    horizon: int
    updates: int


V3 = Sizes(observation=24, actions=6, length=64, horizon=15, updates=2)  # walker
V1 = Sizes(observation=3, actions=1, length=16, horizon=10, updates=20)  # pendulum


class Side:
    """One side of a comparison.

    Args:
        update: Function that makes one update.
        parameters: All parameters that it updates.
    """

    def __init__(self, update: Callable[[], object], parameters: list[nn.Parameter]) -> None:
        self.update, self.parameters = update, parameters
        self.size = sum(parameter.numel() for parameter in parameters)

    def segment(self, updates: int) -> float:
        """Make this many updates; return updates per minute."""
        start = perf_counter()
        for _ in range(updates):
            self.update()
        return 60 * updates / (perf_counter() - start)

    def check(self) -> None:
        """Check the gradients of the last update.

        Raises:
            RuntimeError: A parameter has no gradient, or one that is not finite.
        """
        if not all(part.grad is not None and part.grad.isfinite().all() for part in self.parameters):
            raise RuntimeError("after an update a parameter has no gradient, or one that is not finite")


def vector_env(sizes: Sizes) -> EnvSpec:
    """Return the spec of an env with vector observations and continuous actions."""
    bound = [1.0] * sizes.actions
    low = [-value for value in bound]
    return fake_env_spec(
        {**EMPTY, "shape": [sizes.observation]}, {**EMPTY, "shape": [sizes.actions], "low": low, "high": bound}
    )


def random_records(sizes: Sizes) -> TensorDict:
    """Return random sequences of records, `[B, 1 + T]`, in which no episode ends."""
    lead = (BATCH, 1 + sizes.length)
    data = {key: torch.zeros(*lead, 1, dtype=torch.bool) for key in ("is_first", "is_terminal", "is_last")}
    data |= {"observation": torch.randn(*lead, sizes.observation), "reward": torch.randn(*lead, 1)}
    data["action"] = torch.rand(*lead, sizes.actions) * 2 - 1
    return TensorDict(data, batch_size=lead)


def as_torchrl_transitions(sequence: TensorDict, state: int, belief: int) -> TensorDict:
    """Return records `[B, 1 + T]` as transitions in TorchRL's format, `[B, T]`: an action and the next record."""
    lead = (BATCH, sequence.shape[1] - 1)
    names = {"observation": "observation", "reward": "reward", "done": "is_last", "terminated": "is_terminal"}
    data = {"state": torch.zeros(*lead, state), "belief": torch.zeros(*lead, belief)}
    data |= {"action": sequence["action"][:, :-1], "is_init": sequence["is_first"][:, 1:]}
    after = {name: sequence[key][:, 1:] for name, key in names.items()}
    return TensorDict({**data, "next": after}, batch_size=lead).clone()  # contiguous, as batches from replay are


def make_levin_side(algorithm: Dreamer | DreamerV3, batch: TensorDict) -> Side:
    """Return the side that updates one of Levin's algorithms, without a Trainer."""
    algorithm.configure_optimizers()
    algorithm.manual_backward = Tensor.backward  # type: ignore[method-assign]
    return Side(lambda: algorithm.update(batch), [part for part in algorithm.parameters() if part.requires_grad])


def next_keys(*keys: str) -> list[Any]:
    """Return the keys nested under `next`; `_`, the name of an unused output, stays as it is."""
    return [key if key == "_" else ("next", key) for key in keys]


def dream_env(transition: Any, reward: Any, state: int, belief: int, actions: int) -> DreamerEnv:
    """Return the imagined env in which TorchRL's actor losses roll out."""
    env = DreamerEnv(modules.WorldModelWrapper(transition, reward), torch.Size([state]), torch.Size([belief]))
    env.observation_spec = Composite(state=Unbounded(state), belief=Unbounded(belief))
    env.state_spec = env.observation_spec.clone()
    env.action_spec = Bounded(-1, 1, torch.Size([actions]))
    env.reward_spec = Unbounded(1)
    return env


def bounded_gaussian(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of DreamerV3's Gaussian policy, `[..., 2 A] -> [..., A], [..., A]`."""
    loc, std = outputs.chunk(2, -1)
    return loc.tanh(), 0.9 * (std + 2).sigmoid() + 0.1


def torchrl_v3(sequence: TensorDict, *, compiled: bool = False) -> Side:
    """Build TorchRL's DreamerV3 of size `1m`.

    Args:
        sequence: Batch that every update trains on.
        compiled: Whether to compile single steps of rollouts and imagination, an option of TorchRL's example.
    """
    size, wire = V3_SIZES["1m"], TensorDictModule
    state, belief, units = size.stoch * size.classes, size.deter, size.units
    widths: dict[str, Any] = {"hidden_dim": size.hidden, "rnn_hidden_dim": belief, "unimix": UNIMIX}
    widths |= {"num_categoricals": size.stoch, "num_classes": size.classes}
    gru = {"action_shape": torch.Size([V3.actions]), "action_dim": V3.actions, "recurrent_model": "block_gru"}
    prior = modules.RSSMPriorV3(**gru, **widths)
    posterior = modules.RSSMPosteriorV3(obs_embed_dim=units, use_rms_norm=True, **widths)
    head = partial(modules.DreamerV3MLP, state + belief, num_cells=units)
    encoder = modules.DreamerV3MLP(V3.observation, None, depth=3, num_cells=units)
    reward, continues, two_hot = head(BINS, depth=1, outscale=0.0), head(1, depth=1), modules.SymExpTwoHot(BINS)
    rollout = modules.RSSMRolloutV3(
        wire(prior, [*STATE, "action"], next_keys("prior_logits", "state", "belief")),
        wire(posterior, next_keys("belief", "encoded_latents"), next_keys("posterior_logits", "state")),
    )
    model = Chain(
        wire(objectives.symlog, next_keys("observation"), next_keys("squeezed")),
        wire(encoder, next_keys("squeezed"), next_keys("encoded_latents")),
        rollout,
        wire(head(V3.observation, depth=3), next_keys(*STATE), next_keys("reco_pixels")),
        wire(reward, next_keys(*STATE), next_keys("reward_logits")),
        wire(continues, next_keys(*STATE), next_keys("continue_pred")),
    )
    if compiled:
        rollout.compile_rollout("step")
    imagination_prior = torch.compile(prior, dynamic=False) if compiled else prior
    transition = wire(imagination_prior, [*STATE, "action"], ["_", *STATE])
    rewards = Chain(wire(reward, STATE, ["logits"]), wire(two_hot, ["logits"], ["reward"]))
    continues = Chain(wire(continues, STATE, ["logit"]), wire(torch.sigmoid, ["logit"], ["continuation"]))
    actor = ProbabilisticChain(
        wire(head(2 * V3.actions, depth=3, outscale=0.01), STATE, ["numbers"]),
        wire(bounded_gaussian, ["numbers"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=modules.IndependentNormal),
    )
    value = Chain(
        wire(head(BINS, depth=3, outscale=0.0), STATE, ["state_value_logits"]),
        wire(two_hot, ["state_value_logits"], ["state_value"]),
    )
    terms: dict[str, Any] = {"lambda_continue": 1.0, "continue_target_scale": 1 - 1 / 333, "kl_mode": "separate"}
    terms |= {"unimix": UNIMIX, "detach_output": False, "reco_symlog": False}  # the targets are already symlog
    model_loss = objectives.DreamerV3ModelLoss(model, **terms)
    model_loss.set_keys(pixels="squeezed")
    env = dream_env(transition, rewards, state, belief, V3.actions)
    actor_loss = objectives.DreamerV3ActorLoss(
        actor, value, env, continuation_model=continues, imagination_horizon=V3.horizon, use_reinforce=True
    )
    actor_loss.make_value_estimator(gamma=1.0, lmbda=0.95)  # the discount is in the continue model
    value_loss = objectives.DreamerV3ValueLoss(value, "two_hot", actor_loss=actor_loss, slow_critic_regularization=1.0)
    slow = objectives.SoftUpdate(value_loss, tau=0.02)
    loss = objectives.DreamerV3Loss(model_loss, actor_loss, value_loss, replay_value_loss_weight=0.3)
    parameters = list(chain(model.parameters(), actor.parameters(), value.parameters()))
    optimizer = DreamerV3Optimizer(parameters)
    sample = as_torchrl_transitions(sequence, state, belief)

    def update() -> None:
        losses = loss(sample)
        optimizer.zero_grad()
        torch.stack([term for name, term in losses.items() if name.startswith("loss_")]).sum().backward()
        optimizer.step()
        slow.step()

    return Side(update, parameters)


def torchrl_v1(sequence: TensorDict, *, compiled: bool = False) -> Side:
    """Build TorchRL's first Dreamer of size `micro`, with an optimiser step for each of its three losses.

    Args:
        sequence: Batch that every update trains on.
        compiled: Whether to compile rollouts and imagination.
    """
    (belief, state, hidden, units), wire = SIZES["micro"], TensorDictModule
    network = partial(modules.MLP, num_cells=units, activation_class=nn.ELU)
    action = Bounded(-1, 1, torch.Size([V1.actions]))
    prior = modules.RSSMPrior(action, hidden, belief, state, action_dim=V1.actions)
    posterior = modules.RSSMPosterior(hidden, state, rnn_hidden_dim=belief, obs_embed_dim=units)
    reward = network(state + belief, 1, depth=2)
    rollout = modules.RSSMRollout(
        wire(prior, [*STATE, "action"], next_keys("prior_mean", "prior_std", "_", "belief")),
        wire(posterior, next_keys("belief", "encoded_latents"), next_keys("posterior_mean", "posterior_std", "state")),
    )
    if compiled:
        rollout.compile()  # as its example has it
    encoded = Chain(
        wire(network(V1.observation, units, depth=2), next_keys("observation"), next_keys("encoded_latents")),
        rollout,
        wire(network(state + belief, V1.observation, depth=2), next_keys(*STATE), next_keys("reco_pixels")),
    )
    model = modules.WorldModelWrapper(encoded, wire(reward, next_keys(*STATE), next_keys("reward")))
    imagination_prior = torch.compile(prior, dynamic=False) if compiled else prior
    transition = wire(imagination_prior, [*STATE, "action"], ["_", "_", *STATE])
    reward = wire(reward, STATE, ["reward"])
    distribution = {"distribution_class": modules.TanhNormal, "distribution_kwargs": {"tanh_loc": True}}
    actor = ProbabilisticChain(
        wire(modules.DreamerActor(V1.actions, 4, units), STATE, ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], **distribution),
    )
    value = wire(network(state + belief, 1, depth=3), STATE, ["state_value"])
    sample = as_torchrl_transitions(sequence, state, belief)
    actor(sample.clone())  # its first layer is lazy
    model_loss = objectives.DreamerModelLoss(model, delayed_clamp=True, lambda_reco=1 / sample.numel())
    model_loss.set_keys(pixels="observation")
    env = dream_env(transition, reward, state, belief, V1.actions)
    actor_loss = objectives.DreamerActorLoss(actor, value, env, imagination_horizon=V1.horizon)
    actor_loss.make_value_estimator(gamma=0.99, lmbda=0.95)
    value_loss = objectives.DreamerValueLoss(value)
    parameters = [list(module.parameters()) for module in (model, actor, value)]
    optimizers = [
        Adam(group, lr=lr, eps=1e-7, fused=True) for group, lr in zip(parameters, (6e-4, 8e-5, 8e-5), strict=True)
    ]

    def step(optimizer: Optimizer, group: list[nn.Parameter], loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(group, 100.0)
        optimizer.step()

    def update() -> None:
        losses, output = model_loss(sample)
        step(optimizers[0], parameters[0], torch.cat(list(losses.values())).sum())
        losses, imagined = actor_loss(output["next"].select(*STATE).reshape(-1))
        step(optimizers[1], parameters[1], losses["loss_actor"])
        losses, _ = value_loss(imagined)
        step(optimizers[2], parameters[2], losses["loss_value"])

    return Side(update, list(chain(*parameters)))


def compare_sides(title: str, sides: dict[str, Side], sizes: Sizes, rounds: int) -> None:
    """Run the sides in turns, after a warm-up of two segments each, and print their rates."""
    for side in sides.values():
        side.segment(2 * sizes.updates)
        side.check()
    rates = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            rates[name].append(side.segment(sizes.updates))
    counts = ", ".join(f"{name} {side.size:,}" for name, side in sides.items())
    print(f"\n{title}, {BATCH} x {sizes.length}, dreams of {sizes.horizon}; parameters: {counts}", end="")
    print_table(rates, PEER, "updates/minute")


def dreamer(*, rounds: int, threads: int) -> None:
    """Compare Dreamer, then DreamerV3; also compiled if there is a C++ compiler."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    compiles = shutil.which(os.environ.get("CXX", "g++")) is not None
    batch = random_records(V1)
    v1 = partial(
        Dreamer, env=vector_env(V1), size="micro", batch_size=BATCH, batch_length=V1.length, horizon=V1.horizon
    )
    sides = {"levin": make_levin_side(v1(), batch[:, 1:].clone()), PEER: torchrl_v1(batch)}
    if compiles:
        sides |= {"levin, compiled": make_levin_side(v1(compile=True), batch[:, 1:].clone())}
        sides |= {f"{PEER}, compiled": torchrl_v1(batch, compiled=True)}
    compare_sides("Dreamer, micro", sides, V1, rounds)
    batch, size = random_records(V3), V3_SIZES["1m"]
    # As stored: deter, and the class index of each variable of stoch
    batch[LATENT] = torch.zeros(*batch.shape, size.deter + size.stoch, dtype=torch.bfloat16)
    v3 = partial(DreamerV3, env=vector_env(V3), size="1m", batch_size=BATCH, batch_length=V3.length, horizon=V3.horizon)
    sides = {"levin": make_levin_side(v3(), batch), PEER: torchrl_v3(batch)}
    if compiles:
        sides |= {"levin, compiled": make_levin_side(v3(compile=True), batch)}
        sides |= {f"{PEER}, compiled": torchrl_v3(batch, compiled=True)}
    compare_sides("DreamerV3, 1m", sides, V3, rounds)
