"""Recurrent PPO: sequences against a step-by-step replay, gradients, ends of episodes, A2C, invalid settings."""

from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from tensordict import TensorDict
from torch import Tensor

from levin.algorithms.recurrent_ppo import MEMORY, RecurrentPPO
from levin.algorithms.recurrent_ppo_networks import Memory, RecurrentPolicy, Segments
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.runs.policy import Policy
from levin.training.session import build_run, train
from rows import LATE

SMALL = (
    *("algo=recurrent_ppo", *LATE, "env=gym", "env.num_envs=3", "algo.steps_per_iteration=24", "algo.batch_size=24"),
    *("algo.sequence_length=12", "algo.memory_size=8", "algo.hidden_sizes=[8]"),
)
ENVS = {
    "terminated": ("env.id=toy_envs:Recall-v0",),
    "truncated": ("env.id=toy_envs:Point-v0", "env.time_limit=7", "env.normalize_observation=true"),
    "multi-discrete": ("env.id=toy_envs:Buttons-v0", "env.time_limit=7"),
    "pixels": ("env.id=toy_envs:Frame-v0", "env.time_limit=7"),
}


def build(*overrides: str) -> tuple[RecurrentPPO, Any]:
    """Return an algorithm whose parameters have moved far from their initial values, and an iterator of rollouts."""
    torch.manual_seed(0)
    algorithm, loader = build_run(compose([*SMALL, *overrides]))
    assert isinstance(algorithm, RecurrentPPO)
    for parameter in algorithm.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    algorithm.configure_optimizers()
    algorithm.manual_backward = torch.Tensor.backward
    return algorithm, iter(loader)


def replay(algorithm: RecurrentPPO, rollout: TensorDict) -> dict[str, Tensor]:
    """Run the policy that collected a rollout over it again, one step at a time.

    Returns:
        The state before each step, and log pi(a|h), V(h), and V(h') after it, each `[N, T, *]`.
    """
    module = algorithm.policy().module
    assert isinstance(module, RecurrentPolicy)
    module.carry.state = rollout[MEMORY][:, 0]
    steps: dict[str, list[Tensor]] = {"memory": [], "log_prob": [], "value": [], "next_value": []}
    for t in range(rollout.shape[1]):
        now, after = rollout["observation"][:, t], rollout["next", "observation"][:, t]
        is_first = rollout["next", "done"][:, t - 1] if t else torch.zeros(len(rollout), 1, dtype=torch.bool)
        _, before = module(now, is_first)

        def value(observation: Tensor, states: Tensor) -> Tensor:
            features = algorithm.trunk(algorithm.observation_normalizer(observation))
            if algorithm.critic_memory is None and not algorithm.shares_memory:
                return algorithm.critic(features)
            size = algorithm.actor_memory.state_size
            memory, state = algorithm.actor_memory, states[:, :size]
            if algorithm.critic_memory is not None:
                memory, state = algorithm.critic_memory, states[:, size:]
            return algorithm.critic(memory.step(features, state)[0])

        hidden = module.carry.state[:, : algorithm.actor_memory.size]
        steps["memory"].append(before)
        steps["log_prob"].append(algorithm.actor(hidden).log_prob(rollout["action"][:, t]))
        steps["value"].append(value(now, before))
        steps["next_value"].append(value(after, module.carry.state))
    return {name: torch.stack(each, 1) for name, each in steps.items()}


def advantages(algorithm: RecurrentPPO, rollout: TensorDict, value: Tensor, next_value: Tensor) -> Tensor:
    """Return the GAE `[N, T, 1]` by its recursion."""
    result, following = torch.zeros_like(value), torch.zeros_like(value[:, 0])
    for t in reversed(range(value.shape[1])):
        after = rollout["next"][:, t]
        target = after["reward"] + algorithm.gamma * ~after["terminated"] * next_value[:, t]
        following = target - value[:, t] + algorithm.gamma * algorithm.gae_lambda * ~after["done"] * following
        result[:, t] = following
    return result


@pytest.mark.parametrize("env", ENVS)
@pytest.mark.parametrize(("memory", "critic_memory"), [("lstm", "own"), ("gru", "shared"), ("lstm", "none")])
@torch.no_grad()
def test_sequences_equal_a_replay_step_by_step(env, memory, critic_memory):
    algorithm, rollouts = build(*ENVS[env], f"algo.memory={memory}", f"algo.critic_memory={critic_memory}")
    first = next(rollouts)
    if hasattr(algorithm.observation_normalizer, "update"):
        algorithm.observation_normalizer.update(first["observation"])
    rollout = next(rollouts)
    assert rollout["next", "done"][:, :-1].sum() > 6
    assert rollout[MEMORY][:, 0].abs().sum() > 0, "the memory continues from the rollout before"
    data, _ = algorithm.evaluate(algorithm.normalize(rollout))
    data, expected = data.view(rollout.shape), replay(algorithm, rollout)
    torch.testing.assert_close(rollout[MEMORY], expected["memory"])
    for name in ("log_prob", "value"):
        torch.testing.assert_close(data[name], expected[name], rtol=1e-4, atol=1e-5)
    advantage = advantages(algorithm, rollout, expected["value"], expected["next_value"])
    torch.testing.assert_close(data["advantage"], advantage, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_memory_has_exact_gradients_in_mixed_precision(kind, monkeypatch):
    monkeypatch.setattr(LightningModule, "manual_backward", lambda _, loss: loss.backward())
    algorithm, _ = build(*ENVS["truncated"])
    del algorithm.manual_backward  # the one of `build`
    memory, features = Memory(kind, 3, 5), torch.randn(7, 4, 3)
    state = torch.randn(4, memory.state_size)
    memory(features, state).square().sum().backward()
    exact = [weight.grad.clone() for weight in memory.weights]
    memory.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        algorithm.manual_backward(memory(features, state).square().sum())
    for weight, expected in zip(memory.weights, exact, strict=True):
        assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gradients_are_those_of_a_loop_over_steps(kind):
    torch.manual_seed(0)
    memory, done = Memory(kind, 3, 5), torch.rand(4, 9) < 0.2
    features, weight, stored = torch.randn(4, 9, 3), torch.randn(4, 9, 5), torch.randn(4, memory.state_size)
    features.requires_grad_()
    segments = Segments(done, features.device)
    outputs = segments.pick(memory(segments.pad(features.flatten(0, 1)), segments.initial(stored)))
    state, steps = stored, []
    for t in range(done.shape[1]):
        output, state = memory.step(features[:, t], state)
        steps.append(output)
        state = state * ~done[:, t, None]
    looped = torch.stack(steps, 1)
    torch.testing.assert_close(outputs.view_as(looped), looped)
    leaves = [features, *memory.parameters()]
    actual = torch.autograd.grad((outputs * weight.flatten(0, 1)).sum(), leaves)
    expected = torch.autograd.grad((looped * weight).sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_layout_of_segments():
    done = torch.tensor([[False, True, False, False], [False, False, False, True]])
    segments = Segments(done, torch.device("cpu"), lookahead=True)
    assert segments.last.tolist() == [1, 3, 7]
    stored = torch.tensor([[1.0], [2.0]])
    assert segments.initial(stored).tolist() == [[1.0], [0.0], [2.0]]
    padded = segments.pad(torch.arange(1.0, 12).unsqueeze(-1))  # the last three follow the three segments
    assert padded.squeeze(-1).T.tolist() == [[1, 2, 9, 0, 0], [3, 4, 10, 0, 0], [5, 6, 7, 8, 11]]
    assert segments.pick(padded).squeeze(-1).tolist() == list(range(1, 12))


def test_a2c_is_one_step_of_ppo_on_the_whole_rollout():
    after = []
    for more in (
        ("algo.loss=a2c", "algo.batch_size=7", "algo.epochs=5"),
        ("algo.loss=ppo", "algo.batch_size=72", "algo.epochs=1"),
    ):
        algorithm, rollouts = build(*ENVS["terminated"], "algo.optimizer=sgd", "algo.lr=0.1", *more)
        before = [parameter.clone() for parameter in algorithm.parameters()]
        rollout = next(rollouts)
        algorithm.on_train_batch_start(rollout, 0)
        algorithm.training_step(rollout, 0)
        assert algorithm.updates == 1
        assert all(not torch.equal(*pair) for pair in zip(before, algorithm.parameters(), strict=True))
        after.append([parameter.detach() for parameter in algorithm.parameters()])
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-6)


def test_epochs_end_above_target_kl():
    algorithm, rollouts = build(*ENVS["terminated"], "algo.target_kl=1e-9")
    rollout = next(rollouts)
    algorithm.on_train_batch_start(rollout, 0)
    algorithm.training_step(rollout, 0)
    assert algorithm.updates == 3  # one epoch


def test_the_loaded_policy_remembers(tmp_path):
    train(compose([*SMALL, *ENVS["terminated"], "total_env_steps=144"]), tmp_path / "run")
    policy = Policy.load(tmp_path / "run")

    def hidden(cue: float, *, is_first: bool) -> Tensor:
        policy(np.array([cue], np.float32), is_first)
        policy(np.zeros(1, np.float32), False)
        return policy.module.carry.state.clone()

    left, right = hidden(-1, is_first=True), hidden(1, is_first=True)
    assert not torch.allclose(left, right)
    assert torch.equal(hidden(-1, is_first=True), left)
    assert not torch.equal(hidden(-1, is_first=False), left)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo.sequence_length=7"], "algo.sequence_length=7 does not divide algo.steps_per_iteration=24"),
        (["algo.batch_size=18"], "algo.batch_size=18 must be a multiple of algo.sequence_length=12"),
        (["algo.batch_size=48"], "divide the 72 transitions of a rollout"),
    ],
)
def test_sizes_that_do_not_fit(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_run(compose([*SMALL, *ENVS["terminated"], *overrides]))
