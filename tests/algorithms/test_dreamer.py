"""Dreamer: sequence replay, the world model, paths of gradients, hyper-parameters."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensordict import TensorDict
from torch import Tensor

from checks import build_algorithm, metrics, same, saved_state
from levin.algorithms.dreamer import Dreamer
from levin.algorithms.dreamer_networks import GaussianState
from levin.config.compose import compose
from levin.core import distributed
from levin.core.errors import ConfigError
from levin.data.sequences import SequenceReplay
from levin.model_based import open_loop
from levin.model_based.recurrent import OneHotAction, State
from levin.nn.parameters import freeze
from levin.runs.policy import Policy
from levin.training.session import train
from world_model_data import Constant, env_description, numbered_rollouts, random_records

SMALL = (
    *("algo=dreamer", "env=pendulum", "algo.size=micro", "algo.free_nats=0"),
    *("algo.batch_size=4", "algo.batch_length=6", "algo.horizon=4"),
)


def make_dreamer(*overrides: str) -> Dreamer:
    """Build a small Dreamer with its optimizers, without a Trainer."""
    return build_algorithm(*SMALL, *overrides)


def stored_records(buffer: SequenceReplay, env: int) -> list[tuple]:
    """Return the stored records of one env, oldest first."""
    order = torch.arange(buffer.written - len(buffer), buffer.written) % buffer.size
    rows = buffer.data[order][:, env]
    return [
        (*map(int, o.tolist()), float(r), bool(f), bool(e), float(a))
        for o, r, f, e, a in zip(
            *(rows[key] for key in ("observation", "reward", "is_first", "is_terminal", "action")), strict=True
        )
    ]


@pytest.mark.parametrize("chunk", [1, 4, 23])
def test_records_of_envs_with_different_episode_lengths(chunk):
    buffer = SequenceReplay(env_description(num_envs=2), 200, "memory", 5)
    parts, expected = numbered_rollouts([[3], [7, 4]], 23, chunk)
    for part in parts:
        buffer.extend(part)
    for env in range(2):
        assert stored_records(buffer, env) == expected[env][: len(buffer)]
    assert len(buffer) == min(map(len, expected))
    assert [len(each) for each in buffer.waiting] == [len(each) - len(buffer) for each in expected]


def test_sequences_are_of_one_env_and_never_cross_the_write_head():
    buffer = SequenceReplay(env_description(num_envs=2), 40, "memory", 5)  # room for 20 records per env, so it wraps
    parts, _ = numbered_rollouts([[3], [3]], 60, 6)
    for part in parts:
        buffer.extend(part)
    assert buffer.written > 2 * buffer.size
    drawn = buffer.sample(1, 4000, torch.device("cpu"))[0]
    assert drawn.shape == (4000, 5)
    all_records = {env: stored_records(buffer, env) for env in range(2)}
    starts = {(env, i): 0 for env in range(2) for i in range(len(buffer) - 4)}
    places = {(*record[:3],): i for env in range(2) for i, record in enumerate(all_records[env])}
    for row in drawn["observation"].int().tolist():
        env = row[0][0]
        begin = places[tuple(row[0])]
        assert [tuple(each) for each in row] == [record[:3] for record in all_records[env][begin : begin + 5]]
        starts[env, begin] += 1
    counts = torch.tensor(list(starts.values())).float()
    assert len(starts) == 2 * 16
    assert counts.min() > 0.6 * counts.mean()  # every start is sampled, about equally often
    assert ((drawn["is_first"].sum(1) >= 1).float().mean()) > 0.9  # sequences span several episodes
    assert drawn["is_terminal"].any()


def test_terminations_and_truncations_are_stored_differently():
    parts, _ = numbered_rollouts([[2, 3]], 20, 20)
    buffer = SequenceReplay(env_description(), 100, "memory", 4)
    buffer.extend(parts[0])
    rows = buffer.data[: len(buffer)][:, 0]
    is_last = rows["is_last"].squeeze(-1)
    assert (rows["action"][is_last] == 0).all()
    assert (rows["observation"][is_last][::2, 1] % 2 == 0).all()
    assert rows["is_terminal"][is_last].flatten().tolist() == [i % 2 == 0 for i in range(int(is_last.sum()))]
    assert not rows["is_first"][is_last].any()


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_a_restored_sequence_replay_continues_identically(storage):
    parts, _ = numbered_rollouts([[3], [7, 4]], 40, 4)
    straight, resumed = (SequenceReplay(env_description(num_envs=2), 60, storage, 5) for _ in range(2))
    for part in parts[:5]:
        straight.extend(part)
    state = copy.deepcopy(straight.state_dict())
    first = straight.written - len(straight)
    order = torch.arange(first, straight.written) % straight.size
    resumed.load_state_dict({**state, "data": [state["data"][order].clone()]}, torch.device("cpu"))
    for part in parts[5:]:
        straight.extend(part)
        resumed.extend(part)
    for env in range(2):
        assert stored_records(straight, env) == stored_records(resumed, env)
    torch.manual_seed(0)
    one = straight.sample(2, 3, torch.device("cpu"))
    torch.manual_seed(0)
    other = resumed.sample(2, 3, torch.device("cpu"))
    assert (one == other).all()


def test_discrete_actions_are_stored_one_hot():
    buffer = SequenceReplay(env_description(discrete=3), 50, "memory", 2)
    done = torch.tensor([False, True]).view(1, 2, 1)
    after = {"observation": torch.ones(1, 2, 3), "reward": torch.ones(1, 2, 1), "done": done, "terminated": done}
    steps = {"observation": torch.zeros(1, 2, 3), "action": torch.tensor([[2, 0]]), "next": after}
    buffer.extend(TensorDict(steps, batch_size=(1, 2)))
    assert buffer.data["action"][:, 0].tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0]]


# --- the world model


def test_parameter_counts_are_the_published_ones():
    algorithm = Dreamer(env=env_description(actions=6, pixels=True))

    def count(module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(algorithm.model) == 5_296_820
    assert count(algorithm.actor) == 578_412
    assert count(algorithm.critic) == 413_601


@pytest.mark.parametrize("transition", ["gru", "mlp"])
def test_observing_a_sequence_equals_observing_step_by_step(transition, monkeypatch):
    model = make_dreamer(f"algo.transition={transition}").model
    data = random_records(first=(3,))
    noise = torch.randn(7, 3, model.stoch)
    for_sequence, for_steps = iter(noise), iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda _: next(for_sequence))
    states, posterior, _ = model.observe_sequence(data["observation"], data["action"], data["is_first"])
    monkeypatch.setattr(torch, "randn_like", lambda _: next(for_steps))
    state, action = model.zero_state(3, data["action"]), torch.zeros(3, 1)
    for t in range(7):
        continues = ~data["is_first"][:, t]
        state = model.step(State(*(part * continues for part in state)), action * continues, data["observation"][:, t])
        torch.testing.assert_close(state.stoch, states.stoch[:, t], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.deter, states.deter[:, t], rtol=1e-5, atol=1e-5)
        action = data["action"][:, t]
    assert states.deter.shape == (3, 7, model.deter)
    assert posterior.mean.shape == (3, 7, model.stoch)


def test_the_policy_infers_the_states_that_the_world_model_infers():
    """The latent states that the policy infers in an env equal those that the model infers from its records."""
    algorithm = make_dreamer("algo.exploration_noise=0")
    policy = algorithm.policy().module
    policy.model.posterior_head.weight.data[algorithm.model.stoch :] = 0  # small constant standard deviations
    policy.model.posterior_head.bias.data[algorithm.model.stoch :] = -1e9
    data = random_records(num=1, first=(4,))
    believed, chosen = [], []
    for t in range(7):
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", torch.zeros_like)
            chosen.append(policy(data["observation"][:, t], data["is_first"][:, t]))
            believed.append(algorithm.carry.deter.clone())
    data["action"] = torch.stack(chosen, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        states, _, _ = algorithm.model.observe_sequence(data["observation"], data["action"], data["is_first"])
    torch.testing.assert_close(torch.stack(believed, 1), states.deter.detach(), rtol=1e-5, atol=1e-5)


def observe(model, data: dict[str, Tensor]) -> State:
    """Return the latent states of a batch, sampled with a fixed seed."""
    torch.manual_seed(0)
    return model.observe_sequence(data["observation"], data["action"], data["is_first"])[0]


def test_states_are_reset_at_the_start_of_an_episode():
    model, data = make_dreamer().model, random_records(first=(4,))
    base = observe(model, data)
    for key in ("observation", "action"):
        changed = {name: value.clone() for name, value in data.items()}
        changed[key][0, :4] = 99.0
        other = observe(model, changed)
        assert torch.equal(base.deter[:, 4:], other.deter[:, 4:])
        assert torch.equal(base.stoch[:, 4:], other.stoch[:, 4:])
        assert torch.equal(base.stoch[1:], other.stoch[1:])  # other sequences
        assert not torch.equal(base.stoch[0, 1:4], other.stoch[0, 1:4])


def test_a_state_depends_on_the_previous_action():
    model, data = make_dreamer().model, random_records()
    base = observe(model, data)
    changed = {name: value.clone() for name, value in data.items()}
    changed["action"][:, 3] = 99.0
    other = observe(model, changed)
    assert torch.equal(base.stoch[:, :4], other.stoch[:, :4])
    assert not torch.equal(base.stoch[:, 4], other.stoch[:, 4])


def test_the_mlp_transition_has_no_memory():
    model, data = make_dreamer("algo.transition=mlp").model, random_records()
    assert observe(model, data).deter.shape == (3, 7, 0)
    means = []
    for value in (0.0, 5.0):
        changed = {name: tensor.clone() for name, tensor in data.items()}
        changed["observation"][:, :3] = value
        torch.manual_seed(0)
        means.append(model.observe_sequence(changed["observation"], changed["action"], changed["is_first"])[1].mean)
    assert torch.equal(means[0][:, 3:], means[1][:, 3:])


def test_kl_of_gaussians_and_free_nats():
    zero, one, two = torch.zeros(1, 1), torch.ones(1, 1), torch.full((1, 1), 2.0)
    assert GaussianState(zero, one).kl(GaussianState(one, two)).item() == pytest.approx(0.443147, abs=1e-6)
    assert GaussianState(one, two).kl(GaussianState(zero, one)).item() == pytest.approx(1.306853, abs=1e-6)
    for free_nats in (1e6, 0.0):
        algorithm = make_dreamer(f"algo.free_nats={free_nats}")
        kl, *_ = algorithm.model_loss(random_records())
        free = algorithm.with_free_nats(kl)
        assert free.item() == pytest.approx(max(kl.item(), free_nats))  # the mean is clamped, not its terms
        free.backward()
        assert (algorithm.model.prior_head[0].weight.grad.abs().sum() > 0) == (free_nats == 0)


def test_lambda_returns_by_hand():
    """r = 1, 2, 3, v = 10, 20, 30 and 40 at the end, discount 0.9, lambda 0.5."""
    algorithm = make_dreamer("algo.gamma=0.9", "algo.return_lambda=0.5")
    algorithm.model.reward_model = Constant(torch.tensor([1.0, 2.0, 3.0, 0.0]).view(1, 4, 1))
    algorithm.critic = Constant(torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 4, 1))
    target, weight = algorithm.lambda_return(torch.zeros(1, 4, 1))
    assert target.flatten().tolist() == pytest.approx([24.8725, 33.05, 39.0])
    assert weight.flatten().tolist() == pytest.approx([1, 0.9, 0.81])


def test_lambda_returns_are_the_mixture_of_all_horizons():
    algorithm, generator = (
        make_dreamer("algo.return_lambda=0.7", "algo.continue_scale=1"),
        torch.Generator().manual_seed(0),
    )
    r, v, logit = (torch.randn(1, 6, 1, generator=generator, dtype=torch.float64) for _ in range(3))
    c = logit.sigmoid()
    algorithm.model.reward_model, algorithm.critic = Constant(r), Constant(v)
    algorithm.model.continue_model = Constant(logit)
    target, _ = algorithm.lambda_return(torch.zeros(1, 6, 1))
    for t in range(5):
        horizons = []
        for n in range(1, 6 - t):  # r_t + c_t r_{t+1} + ... + c_t ... c_{t+n-1} v_{t+n}
            decay = torch.cat([torch.ones(1), c[0, t : t + n, 0]]).cumprod(0)
            horizons.append((decay[:n] * r[0, t : t + n, 0]).sum() + decay[n] * v[0, t + n, 0])
        mixed = sum(0.3 * 0.7 ** (n - 1) * g for n, g in enumerate(horizons[:-1], 1)) + 0.7 ** (4 - t) * horizons[-1]
        assert target[0, t, 0].item() == pytest.approx(mixed.item(), rel=1e-6)


# --- where gradients go


def gradients(algorithm: Dreamer, *, sever: bool = False) -> tuple[list[Tensor], Dreamer]:
    """Return the actor gradients of one imagined batch, and the algorithm.

    Args:
        sever: Whether actions are cut off from the recurrent model.
    """
    start = algorithm.model_loss(random_records())[2]
    if sever:
        algorithm.model.memory.weight_ih.data.zero_()
    torch.manual_seed(0)
    loss = algorithm.imagination_losses(start)[0]
    return list(torch.autograd.grad(loss, list(algorithm.actor.parameters()))), algorithm


def test_the_actor_loss_has_gradients_for_the_actor_alone():
    algorithm = make_dreamer()
    batch = TensorDict(random_records(), batch_size=(3, 7))
    before = {name: value.clone() for name, value in algorithm.named_parameters()}
    start = algorithm.model_loss(batch)[2]
    assert not any(each.requires_grad for each in start.values())
    algorithm.update(batch)
    for name, value in algorithm.named_parameters():
        assert not torch.equal(value, before[name]), name
    # now the actor loss alone
    algorithm = make_dreamer()
    algorithm.zero_grad()
    with freeze([*algorithm.model_parameters, *algorithm.critic_parameters]):
        algorithm.imagination_losses(start)[0].backward()
    for name, value in algorithm.named_parameters():
        moved = value.grad is not None and value.grad.abs().sum() > 0
        assert moved == name.startswith("actor."), name


def test_pathwise_gradients_pass_through_the_transition_model():
    torch.manual_seed(0)
    connected, _ = gradients(make_dreamer())
    severed, _ = gradients(make_dreamer(), sever=True)  # the action no longer reaches the memory
    assert sum(each.abs().sum() for each in connected) > 0
    assert any(not torch.allclose(a, b) for a, b in zip(connected, severed, strict=True))


@pytest.mark.parametrize("overrides", [("env=pendulum",), ("env=cartpole", "algo.entropy_coef=1e-3")])
def test_reinforce_gradients_do_not_pass_through_imagination(overrides):
    algorithm = make_dreamer("algo.actor_gradient=reinforce", *overrides)
    size, actions = algorithm.env["observation"]["shape"][0], algorithm.model.actions
    start = algorithm.model_loss(random_records(observation=size, action=actions))[2]
    feature, action, seen = algorithm.imagine(State(start["deter"], start["stoch"]))
    assert not torch.autograd.grad(feature.sum(), list(algorithm.actor.parameters()), allow_unused=True)[0]
    target, weight = algorithm.lambda_return(feature)
    loss, _ = algorithm.actor_loss(feature, action, seen, target, weight)
    assert sum(each.abs().sum() for each in torch.autograd.grad(loss, list(algorithm.actor.parameters()))) > 0


def test_pathwise_gradients_are_those_of_finite_differences():
    """In float64 with fixed noise, for a policy that ignores its input, because that input gets no gradient."""
    algorithm = make_dreamer("algo.horizon=5").double()
    data = {key: value.double() if value.is_floating_point() else value for key, value in random_records().items()}
    start = algorithm.model_loss(data)[2]
    algorithm.actor.network[0].weight.data.zero_()

    def loss() -> Tensor:
        torch.manual_seed(0)
        return algorithm.imagination_losses(start)[0]

    bias = algorithm.actor.network[-1].bias
    (exact,) = torch.autograd.grad(loss(), bias)
    for i in range(len(bias)):
        values = []
        for change in (1e-5, -2e-5):
            bias.data[i] += change
            values.append(loss().item())
        bias.data[i] += 1e-5
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(exact[i].item(), rel=1e-4)


def test_imagination_from_terminal_states_has_weight_zero():
    algorithm = make_dreamer("algo.continue_scale=10")
    data = random_records()
    data["is_terminal"][:, -1] = True
    start = algorithm.model_loss(data)[2]
    assert start["alive"].view(3, 7)[:, -1].sum() == 0
    _, _, _, weight, _ = algorithm.imagination_losses(start)
    assert (weight.view(3, 7, -1)[:, -1] == 0).all()
    assert (weight.view(3, 7, -1)[:, 0] > 0).all()


def test_a_loaded_policy_keeps_its_state_until_an_episode_starts():
    policy = Policy(make_dreamer())
    first, second = np.array([1.0, 0.0, 0.5]), np.array([0.0, 1.0, -2.0])
    fresh = policy(first)
    assert np.array_equal(policy(first, True), fresh)
    after = policy(second)
    assert not np.array_equal(after, policy(second, True))
    policy(first, True)
    assert np.array_equal(policy(second, False), after)
    batch = policy(np.stack([first, second]), np.array([True, True]))
    assert np.allclose(batch[0], fresh)


def test_too_small_learning_starts_is_refused(tmp_path, monkeypatch):
    overrides = [*SMALL, "env.num_envs=2", "total_env_steps=100", "logger=csv"]
    with pytest.raises(ConfigError, match="for one sequence of each env: it must be at least 12"):
        train(compose([*overrides, "algo.learning_starts=11"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    algorithm = make_dreamer("env.num_envs=2", "algo.learning_starts=12")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="for one sequence of each env: it must be at least 24"):
        algorithm.on_train_start()


@pytest.mark.parametrize("transition", ["gru", "mlp"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "silu"])
def test_every_activation_with_every_transition(transition, activation):
    algorithm = make_dreamer(f"algo.transition={transition}", f"algo.activation={activation}")
    algorithm.update(TensorDict(random_records(), batch_size=(3, 7)))


def test_restart_separates_an_abandoned_episode_from_the_next():
    parts, _ = numbered_rollouts([[20], [20]], 12, 6)
    buffer = SequenceReplay(env_description(num_envs=2), 100, "memory", 4)
    buffer.extend(parts[0])
    buffer.restart(torch.tensor([True, False]))
    buffer.extend(parts[1])
    rows = buffer.data[: len(buffer)]
    assert rows["is_first"][6].flatten().tolist() == [True, False]
    assert rows["reward"][6].flatten().tolist() == [0.0, 6.0]


ALONE = ("algo.continue_scale=0", "algo.entropy_coef=0")


def test_reinforce_by_hand():
    """The loss of one step is -log pi(a) (V_lambda - (v - r) / gamma) for a known policy."""
    algorithm = make_dreamer("env=cartpole", "algo.actor_gradient=reinforce", "algo.gamma=0.9", *ALONE)
    logits = torch.tensor([0.3, -0.4], requires_grad=True)
    algorithm.actor.network = Constant(logits.expand(1, 1, 2))
    algorithm.model.reward_model, algorithm.critic = (
        Constant(torch.tensor([[[2.0]]])),
        Constant(torch.tensor([[[5.0]]])),
    )
    action = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    target, weight = torch.tensor([[[7.0]]]), torch.ones(1, 1, 1)
    loss, entropy = algorithm.actor_loss(torch.zeros(1, 2, 1), action, torch.zeros(1, 2, 1), target, weight)
    log_probs = logits.log_softmax(-1)
    assert loss.item() == pytest.approx(-log_probs[1].item() * (7 - (5 - 2) / 0.9), rel=1e-5)
    assert entropy.item() == pytest.approx(-(log_probs.exp() * log_probs).sum().item(), rel=1e-5)


def test_unsupported_settings_are_refused():
    for overrides, sentence in (
        (("algo.buffer_size=5",), "too small for one sequence of each env"),
        (("algo.horizon=1",), "algo.horizon=1 is too short"),
        (("algo.entropy_coef=0.1",), "is for discrete actions"),
        (("env.normalize_observation=true",), "needs unnormalized observations"),
        (("env=gym", "env.id=toy_envs:Robot-v0"), "reads vectors, or pixels of 64 x 64"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make_dreamer(*overrides)


def errors_in_echo_env(folder: Path, shifted: bool) -> tuple[float, float]:
    """Train a world model of an env whose observation is the last action and whose reward is twice that.

    Args:
        folder: Folder of the open-loop image.
        shifted: Whether stored actions are shifted by one step, which must increase the error.

    Returns:
        Mean squared errors of imagined next observations and of predicted rewards.
    """
    torch.manual_seed(0)
    steps = 400
    action = torch.rand(1, steps, 1) * 2 - 1
    shown = torch.cat([torch.zeros(1, 1, 1), action], 1).expand(1, steps + 1, 3)
    done = (torch.arange(steps) % 20 == 19).view(1, -1, 1)
    after = {"observation": shown[:, 1:], "reward": 2 * shown[:, 1:, :1], "done": done, "terminated": done}
    first = torch.cat([torch.ones(1, 1, 1, dtype=torch.bool), done[:, :-1]], 1)
    seen = torch.where(first, 0.0, shown[:, :-1])
    algorithm = make_dreamer("algo.model_lr=3e-3", "algo.kl_scale=0.1", "algo.batch_length=10")
    algorithm.buffer.extend(TensorDict({"observation": seen, "action": action, "next": after}, batch_size=(1, steps)))
    if shifted:
        data = algorithm.buffer.data
        data["action"][:] = data["action"].roll(1, 0)
    for _ in range(300):
        batch = algorithm.buffer.sample(1, 16, torch.device("cpu"))[0]
        kl, loss, _, _ = algorithm.model_loss(batch)
        algorithm.step(algorithm.model_optimizer, 0.1 * kl + 10 * loss)
    batch = algorithm.buffer.sample(1, 64, torch.device("cpu"))[0]
    errors = open_loop.evaluate_open_loop(
        algorithm.buffer, algorithm.device, algorithm.predict_open_loop, folder / "echo.png"
    )
    assert (errors["eval/open_loop_5"] < 0.2 * errors["eval/repeat_last_5"]) != shifted
    with torch.no_grad():
        states, _, _ = algorithm.model.observe_sequence(batch["observation"], batch["action"], batch["is_first"])
        before = State(*(part[:, 4] for part in states))
        imagined = algorithm.model.decoder(algorithm.model.imagine_step(before, batch["action"][:, 4]).feature)
        follows = ~batch["is_first"][:, 5, 0]
        error = (imagined - batch["observation"][:, 5])[follows].square().mean()
        reward = (algorithm.model.reward_model(states.feature) - batch["reward"]).square().mean()
    return float(error), float(reward)


def test_actions_rewards_and_observations_are_aligned(tmp_path):
    """The next observation is the action (variance 1/3); with actions shifted by one step, prediction fails."""
    imagined, reward = errors_in_echo_env(tmp_path, shifted=False)
    assert imagined < 0.05
    assert reward < 0.05
    wrong, _ = errors_in_echo_env(tmp_path, shifted=True)
    assert wrong > 0.2


def test_every_evaluation_writes_open_loop_predictions(tmp_path):
    """They do not change the training run."""
    overrides = [*SMALL, "algo.learning_starts=60", "algo.replay_ratio=0.1", "total_env_steps=200", "eval.every=96"]
    overrides += ["eval.episodes=1", "logger=csv", "checkpoint.every=1000", "trainer.threads=1"]
    train(compose(overrides), tmp_path / "shown")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dreamer, "on_evaluation", lambda *_: {})
        train(compose(overrides), tmp_path / "hidden")
    shown, hidden = (saved_state(tmp_path / name) for name in ("shown", "hidden"))
    assert same(shown["state_dict"], hidden["state_dict"])
    rows = metrics(tmp_path / "shown")
    assert {row["dream_steps"] for row in rows} == {str(int(row["updates"]) * 4 * 6 * 4) for row in rows}
    assert (tmp_path / "shown" / "pictures" / "192.png").read_bytes().startswith(b"\x89PNG")
    rows = [row for row in metrics(tmp_path / "shown") if row["eval/return_mean"]]
    assert all(
        float(rows[-1][f"eval/{name}_{ahead}"]) > 0 for name in ("open_loop", "repeat_last") for ahead in (1, 45)
    )


def test_open_loop_predictions_reach_the_loggers(tmp_path):
    overrides = [*SMALL, "algo.learning_starts=60", "algo.replay_ratio=0.1", "total_env_steps=96", "eval.every=96"]
    overrides += ["eval.episodes=1", "checkpoint.every=1000", "trainer.threads=1"]
    train(compose([*overrides, "logger=tensorboard"]), tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board" / "tensorboard")).Reload()
    assert [event.step for event in events.Images("pictures/open_loop")] == [96]
    train(compose([*overrides, "logger=wandb"]), tmp_path / "wandb")
    assert list((tmp_path / "wandb").rglob("media/images/pictures/open_loop*.png"))


def test_open_loop_predictions_of_pixels_are_one_strip(tmp_path):
    env = env_description(pixels=True)
    algorithm = Dreamer(env=env, size="micro", batch_length=6, buffer_size=400, learning_starts=6)
    pixels = torch.randint(256, (1, 61, 3, 64, 64), dtype=torch.uint8)
    done = torch.zeros(1, 60, 1, dtype=torch.bool)
    after = {"observation": pixels[:, 1:], "reward": torch.randn(1, 60, 1), "done": done, "terminated": done}
    steps = {"observation": pixels[:, :-1], "action": torch.randn(1, 60, 1), "next": after}
    algorithm.buffer.extend(TensorDict(steps, batch_size=(1, 60)))
    assert algorithm.buffer.data["observation"].dtype == torch.uint8
    errors = algorithm.on_evaluation(tmp_path)
    assert errors.keys() == {
        f"eval/{name}_{ahead}" for name in ("open_loop", "repeat_last") for ahead in (1, 5, 15, 45)
    }
    import imageio

    assert imageio.v3.imread(tmp_path / "0.png").shape == (3 * 64, 12 * 64, 3)


# --- hyper-parameters


def test_initial_std_of_the_policy():
    actor = make_dreamer("algo.initial_std=2").actor
    for parameter in actor.network.parameters():
        parameter.data.zero_()
    policy = actor(torch.zeros(1, actor.network[0].in_features))
    assert policy.log_std.exp().item() == pytest.approx(2, abs=1e-3)


def test_exploration_noise():
    """Standard deviation of noise on continuous actions, which stay in bounds; share of uniform discrete actions."""

    class Fixed:
        def sample(self) -> Tensor:
            return torch.full((20_000, 1), 0.5)

    policy = make_dreamer("algo.exploration_noise=0.1").policy().module
    added = policy.explore(Fixed()) - 0.5
    assert (added.mean().item(), added.std().item()) == pytest.approx((0, 0.1), abs=5e-3)
    policy.noise = 100.0
    assert policy.explore(Fixed()).abs().max() == 1
    policy.noise = 0.3
    sure = OneHotAction(torch.tensor([[0.0, 100, 0]]).expand(20_000, 3))
    assert policy.explore(sure)[:, 1].mean().item() == pytest.approx(0.7 + 0.3 / 3, abs=0.02)


SHARED = {"gamma": 0.5, "return_lambda": 0.5, "horizon": 2, "batch_size": 3, "batch_length": 5, "size": "small"}
SHARED |= {"entropy_coef": 0.1, "free_nats": 50, "replay_ratio": 0.2, "learning_starts": 50, "buffer_size": 70}
CHANGES = {
    "dreamer": SHARED
    | {"transition": "mlp", "actor_gradient": "reinforce", "kl_scale": 0.1, "continue_scale": 0.1}
    | {"model_lr": 1e-2, "actor_lr": 1e-2, "critic_lr": 1e-2, "max_grad_norm": 0.01, "activation": "tanh"},
    "dreamer_v3": SHARED
    | {"size": "1m", "latent_estimator": "reinmax", "actor_gradient": "dynamics", "dynamics_scale": 0.1}
    | {"representation_scale": 0.5, "replay_value_scale": 0.0, "slow_tau": 0.5, "return_decay": 0.5, "lr": 1e-2}
    | {"warm_up": 0, "clip": 1e-3},
}
UNTESTED = {  # parameters of collection, of continuous actions, or without an effect on results
    *("steps_per_iteration", "exploration_noise", "random_env_steps", "initial_std"),
    *("_target_", "buffer_storage", "compile"),
}


@pytest.mark.parametrize("algo", CHANGES)
def test_every_hyper_parameter_has_an_effect(algo):
    """Other tests check the exact effect of each."""
    overrides = [
        f"algo={algo}",
        "env=acrobot",
        "env.num_envs=1",
        "env.action=none",
        "algo.size=micro",
        "algo.horizon=3",
    ]
    overrides += ["algo.batch_size=2", "algo.batch_length=4", "algo.replay_ratio=0.1", "algo.learning_starts=40"]
    overrides += ["algo.free_nats=0", "algo.gamma=0.9"]
    overrides += ["algo.warm_up=3"] if algo == "dreamer_v3" else ["algo.continue_scale=1"]
    assert CHANGES[algo].keys() == set(compose(overrides).algo) - UNTESTED
    generator = torch.Generator().manual_seed(0)
    done = (torch.arange(80) % 20 == 19).view(1, 80, 1)
    shown = torch.randn(1, 81, 6, generator=generator)
    after = {"observation": shown[:, 1:], "reward": 100 * torch.randn(1, 80, 1, generator=generator)}
    steps = {"observation": shown[:, :-1], "action": torch.randint(3, (1, 80), generator=generator)}
    rollout = TensorDict({**steps, "next": {**after, "done": done, "terminated": done}}, batch_size=(1, 80))

    def result(*change: str) -> dict[str, Tensor]:
        algorithm = build_algorithm(*overrides, *change)
        if algo == "dreamer_v3":
            width = algorithm.model.deter + algorithm.model.choices[0]
            rollout["latent"] = torch.zeros(1, 80, width, dtype=torch.bfloat16)
        torch.manual_seed(0)
        for algorithm.env_steps, part in ((40, rollout[:, :40]), (80, rollout[:, 40:])):
            algorithm.training_step(part, 0)
        assert algorithm.updates > 2
        return algorithm.state_dict()

    base = result()
    assert same(base, result()), "the result must be deterministic"
    for name, value in CHANGES[algo].items():
        assert not same(base, result(f"algo.{name}={value}")), name
