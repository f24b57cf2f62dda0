"""Updates of Dreamers beside those of TorchRL's own modules and losses, on the same sizes and the same sequences.

TorchRL's are put together as in its examples. Those of DreamerV3 have the published architecture: block GRU, RMSNorm,
uniform mixtures, two-hot rewards and values, continue model, slow critic, replayed values. The first Dreamer has no
continue model here. Both sides have as many parameters, and all of them must have got a gradient.

A difference is left where TorchRL offers no other way. Its rollouts draw from the prior too; its dreams decode each
reward at once and keep a graph which the score function has no use for. Its first Dreamer differentiates the policy by
what it sees, knows no `is_first`, and sums the errors of vectors over the batch: they are scaled. Ours records metrics.
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
Chain: Any = TensorDictSequential  # whose hints ask for one list of modules
Choose: Any = ProbabilisticTensorDictSequential


@dataclass(frozen=True)
class Sizes:
    """Of a task: the spaces, the length of a sequence and of a dream, and updates per segment."""

    observation: int
    actions: int
    length: int
    horizon: int
    updates: int


V3 = Sizes(observation=24, actions=6, length=64, horizon=15, updates=2)  # walker
V1 = Sizes(observation=3, actions=1, length=16, horizon=10, updates=20)  # pendulum


class Side:
    """What makes updates.

    Args:
        update: One.
        parameters: All that it is of.
    """

    def __init__(self, update: Callable[[], object], parameters: list[nn.Parameter]) -> None:
        self.update, self.parameters = update, parameters
        self.size = sum(each.numel() for each in parameters)

    def segment(self, updates: int) -> float:
        """Updates per minute."""
        start = perf_counter()
        for _ in range(updates):
            self.update()
        return 60 * updates / (perf_counter() - start)

    def check(self) -> None:
        """Raises RuntimeError when the last update has not given every parameter a finite gradient."""
        if not all(each.grad is not None and each.grad.isfinite().all() for each in self.parameters):
            raise RuntimeError("a parameter has got no gradient, or not a finite one")


def vector_env(sizes: Sizes) -> EnvSpec:
    """An env of vectors and continuous actions."""
    bound = [1.0] * sizes.actions
    low = [-each for each in bound]
    return fake_env_spec(
        {**EMPTY, "shape": [sizes.observation]}, {**EMPTY, "shape": [sizes.actions], "low": low, "high": bound}
    )


def random_records(sizes: Sizes) -> TensorDict:
    """Random sequences `[B, 1 + T]`, of episodes that go on."""
    lead = (BATCH, 1 + sizes.length)
    data = {key: torch.zeros(*lead, 1, dtype=torch.bool) for key in ("is_first", "is_terminal", "is_last")}
    data |= {"observation": torch.randn(*lead, sizes.observation), "reward": torch.randn(*lead, 1)}
    data["action"] = torch.rand(*lead, sizes.actions) * 2 - 1
    return TensorDict(data, batch_size=lead)


def as_torchrl_transitions(sequence: TensorDict, state: int, belief: int) -> TensorDict:
    """The same as TorchRL has them, `[B, T]`: the action of a record, and what it led to."""
    lead = (BATCH, sequence.shape[1] - 1)
    names = {"observation": "observation", "reward": "reward", "done": "is_last", "terminated": "is_terminal"}
    data = {"state": torch.zeros(*lead, state), "belief": torch.zeros(*lead, belief)}
    data |= {"action": sequence["action"][:, :-1], "is_init": sequence["is_first"][:, 1:]}
    after = {name: sequence[key][:, 1:] for name, key in names.items()}
    return TensorDict({**data, "next": after}, batch_size=lead).clone()  # contiguous, as replay's are


def make_levin_side(algorithm: Dreamer | DreamerV3, batch: TensorDict) -> Side:
    """An algorithm without a Trainer."""
    algorithm.configure_optimizers()
    algorithm.manual_backward = Tensor.backward  # type: ignore[method-assign]
    return Side(lambda: algorithm.update(batch), [each for each in algorithm.parameters() if each.requires_grad])


def next_keys(*keys: str) -> list[Any]:
    """Keys of what comes next; `_` for what nobody asks for."""
    return [key if key == "_" else ("next", key) for key in keys]


def dream_env(transition: Any, reward: Any, state: int, belief: int, actions: int) -> DreamerEnv:
    """The env that TorchRL's losses of the actor roll out."""
    env = DreamerEnv(modules.WorldModelWrapper(transition, reward), torch.Size([state]), torch.Size([belief]))
    env.observation_spec = Composite(state=Unbounded(state), belief=Unbounded(belief))
    env.state_spec = env.observation_spec.clone()
    env.action_spec = Bounded(-1, 1, torch.Size([actions]))
    env.reward_spec = Unbounded(1)
    return env


def bounded_gaussian(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Location and deviation of DreamerV3's Gaussian: `[..., 2 A] -> [..., A], [..., A]`."""
    loc, std = numbers.chunk(2, -1)
    return loc.tanh(), 0.9 * (std + 2).sigmoid() + 0.1


def torchrl_v3(sequence: TensorDict, *, compiled: bool = False) -> Side:
    """TorchRL's DreamerV3, `1m`; compiled are the steps of rollouts and dreams, as its example can have them."""
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
    dreamt = torch.compile(prior, dynamic=False) if compiled else prior
    transition = wire(dreamt, [*STATE, "action"], ["_", *STATE])
    rewards = Chain(wire(reward, STATE, ["logits"]), wire(two_hot, ["logits"], ["reward"]))
    continues = Chain(wire(continues, STATE, ["logit"]), wire(torch.sigmoid, ["logit"], ["continuation"]))
    actor = Choose(
        wire(head(2 * V3.actions, depth=3, outscale=0.01), STATE, ["numbers"]),
        wire(bounded_gaussian, ["numbers"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=modules.IndependentNormal),
    )
    value = Chain(
        wire(head(BINS, depth=3, outscale=0.0), STATE, ["state_value_logits"]),
        wire(two_hot, ["state_value_logits"], ["state_value"]),
    )
    terms: dict[str, Any] = {"lambda_continue": 1.0, "continue_target_scale": 1 - 1 / 333, "kl_mode": "separate"}
    terms |= {"unimix": UNIMIX, "detach_output": False, "reco_symlog": False}  # the target has been through symlog
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
    learned = list(chain(model.parameters(), actor.parameters(), value.parameters()))
    optimizer = DreamerV3Optimizer(learned)
    sample = as_torchrl_transitions(sequence, state, belief)

    def update() -> None:
        losses = loss(sample)
        optimizer.zero_grad()
        torch.stack([each for name, each in losses.items() if name.startswith("loss_")]).sum().backward()
        optimizer.step()
        slow.step()

    return Side(update, learned)


def torchrl_v1(sequence: TensorDict, *, compiled: bool = False) -> Side:
    """TorchRL's first Dreamer, `micro`: three losses, each with a step of its own; compiled are rollouts and dreams."""
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
    dreamt = torch.compile(prior, dynamic=False) if compiled else prior
    transition, reward = wire(dreamt, [*STATE, "action"], ["_", "_", *STATE]), wire(reward, STATE, ["reward"])
    squashed = {"distribution_class": modules.TanhNormal, "distribution_kwargs": {"tanh_loc": True}}
    actor = Choose(
        wire(modules.DreamerActor(V1.actions, 4, units), STATE, ["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["action"], **squashed),
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
    learned = [list(each.parameters()) for each in (model, actor, value)]
    optimizers = [Adam(each, lr=lr, eps=1e-7, fused=True) for each, lr in zip(learned, (6e-4, 8e-5, 8e-5), strict=True)]

    def step(optimizer: Optimizer, parameters: list[nn.Parameter], loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(parameters, 100.0)
        optimizer.step()

    def update() -> None:
        losses, seen = model_loss(sample)
        step(optimizers[0], learned[0], torch.cat(list(losses.values())).sum())
        losses, dreams = actor_loss(seen["next"].select(*STATE).reshape(-1))
        step(optimizers[1], learned[1], losses["loss_actor"])
        losses, _ = value_loss(dreams)
        step(optimizers[2], learned[2], losses["loss_value"])

    return Side(update, list(chain(*learned)))


def compare_sides(title: str, sides: dict[str, Side], sizes: Sizes, rounds: int) -> None:
    """Print how fast they are, in turns, after two segments that warm up."""
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
    """Both comparisons; compiled variants where there is a compiler."""
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
    batch[LATENT] = torch.zeros(*batch.shape, size.deter + size.stoch, dtype=torch.bfloat16)  # with class numbers
    v3 = partial(DreamerV3, env=vector_env(V3), size="1m", batch_size=BATCH, batch_length=V3.length, horizon=V3.horizon)
    sides = {"levin": make_levin_side(v3(), batch), PEER: torchrl_v3(batch)}
    if compiles:
        sides |= {"levin, compiled": make_levin_side(v3(compile=True), batch)}
        sides |= {f"{PEER}, compiled": torchrl_v3(batch, compiled=True)}
    compare_sides("DreamerV3, 1m", sides, V3, rounds)
