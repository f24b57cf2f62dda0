"""Collectors: transitions, seeds, random actions, episode statistics and resuming."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from levin.collectors.episodes import EpisodeStatistics
from levin.collectors.factory import make_collector
from levin.collectors.loader import CollectorLoader
from levin.config.compose import compose
from levin.envs.config import EnvConfig
from levin.envs.factory import make_env
from levin.training.session import build_run
from policies import Linear


def make_env_and_collector(
    name: str, env_id: str, num_envs: int, steps: int, *, vectorization="sync", discrete=False, **kwargs
):
    config = EnvConfig(id=env_id, num_envs=num_envs, vectorization=vectorization, kwargs=kwargs)
    env = make_env(config, seed=0, copy=name != "vector")
    policy = TensorDictModule(Linear(discrete), in_keys=["observation"], out_keys=["action"])
    return env, make_collector(name, env, policy, steps=steps, random_env_steps=0)


def collect(collector, rollouts: int) -> TensorDict:
    """Return rollouts, concatenated to `[N, T]`."""
    iterator = iter(collector.iterator())
    return torch.cat([next(iterator).clone() for _ in range(rollouts)], 1)


def test_paired_episodes_share_a_start_and_the_second_is_greedy():
    """The two episodes of a pair have the same seed; each pair has another one."""
    overrides = ["algo=reinforce", "env=cartpole", "algo.advantage=self_critical", "algo.episodes_per_update=3"]
    algorithm, loader = build_run(compose([*overrides, "algo.transitions_per_update=1"]))
    algorithm.actor.network[-1].weight.data *= 100  # makes the most probable action depend on the state
    rollouts = [next(loader) for _ in range(3)]
    starts = []
    for rollout in rollouts:
        episode = algorithm.episode(rollout).squeeze(0)
        assert int(episode[-1]) + 1 == 4  # at least 3, rounded up to pairs
        first = rollout["observation"][0][rollout["step_count"].flatten() == 0]
        assert torch.equal(first[0::2], first[1::2])
        starts += [tuple(each) for each in first[::2].tolist()]
        mode = algorithm.actor(rollout["observation"][0]).mode == rollout["action"][0]
        assert mode[episode % 2 == 1].all()
        assert not mode[episode % 2 == 0].all()
    assert len(set(starts)) == 6


@pytest.mark.parametrize("name", ["vector", "torchrl"])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_no_transition_spans_two_episodes_and_terminal_observations_are_kept(name, vectorization):
    _, collector = make_env_and_collector(name, "toy_envs:Counting-v0", 2, 4, vectorization=vectorization, length=5)
    data = collect(collector, 4)
    collector.shutdown()
    assert data.batch_size == (2, 16)
    for i in range(2):
        expected = [(t // 5, t % 5) for t in range(16)]
        first = int(data["observation"][i, 0, 0])
        assert data["observation"][i].tolist() == [[first + episode, step] for episode, step in expected]
        # the last next observation of an episode is its terminal observation
        assert data["next", "observation"][i].tolist() == [[first + episode, step + 1] for episode, step in expected]
        assert data["next", "reward"][i].flatten().tolist() == [step + 1 for _, step in expected]
        terminated = torch.tensor([[step == 4 and (first + episode) % 2 == 0] for episode, step in expected])
        truncated = torch.tensor([[step == 4 and (first + episode) % 2 == 1] for episode, step in expected])
        assert torch.equal(data["next", "terminated"][i], terminated)
        assert torch.equal(data["next", "truncated"][i], truncated)
        assert torch.equal(data["next", "done"][i], terminated | truncated)


@pytest.mark.parametrize(
    ("env_id", "discrete"), [("Pendulum-v1", False), ("CartPole-v1", True), ("toy_envs:Counting-v0", False)]
)
def test_both_collectors_yield_the_same_transitions(env_id, discrete):
    data = {}
    for name in ("vector", "torchrl"):
        _, collector = make_env_and_collector(name, env_id, 3, 50, discrete=discrete)
        data[name] = collect(collector, 5)
        collector.shutdown()
    vector, torchrl = data["vector"], data["torchrl"]
    assert bool(vector["next", "done"].any())
    keys = (
        "observation",
        "action",
        *(("next", x) for x in ("observation", "reward", "terminated", "truncated", "done")),
    )
    assert set(vector.keys(include_nested=True, leaves_only=True)) == set(keys)
    for key in keys:
        assert vector[key].dtype == torchrl[key].dtype, key
        assert vector[key].shape == torchrl[key].shape, key
        torch.testing.assert_close(vector[key], torchrl[key], rtol=0, atol=0)


def test_sync_and_async_envs_are_the_same():
    data = [
        collect(make_env_and_collector("vector", "Pendulum-v1", 2, 30, vectorization=how)[1], 2)
        for how in ("sync", "async")
    ]
    assert torch.equal(data[0]["next", "observation"], data[1]["next", "observation"])


def test_random_actions_stop_after_random_env_steps():
    env, collector = make_env_and_collector("vector", "Pendulum-v1", 2, 8)
    collector.random_env_steps = 20  # ten vector steps of 2 envs
    data = collect(collector, 2)
    deterministic = torch.sin(data["observation"].sum(-1, keepdim=True) * 0.1)
    same = torch.isclose(data["action"], deterministic).all(0).flatten()
    assert not same[:10].any()
    assert same[10:].all()
    assert float(data["action"].abs().max()) <= 2.0
    env.close()


@pytest.mark.parametrize("name", ["vector", "torchrl"])
def test_random_actions_are_in_the_units_of_the_policy(name):
    config = EnvConfig(id="Pendulum-v1", num_envs=2, action="rescale")
    env = make_env(config, seed=0)
    policy = TensorDictModule(Linear(), in_keys=["observation"], out_keys=["action"])
    data = collect(make_collector(name, env, policy, steps=100, random_env_steps=10_000), 5)
    assert 0.9 < float(data["action"].abs().max()) <= 1.0


@pytest.mark.parametrize("name", ["vector", "torchrl"])
def test_a_loss_can_be_differentiated_on_a_rollout(name):
    _, collector = make_env_and_collector(name, "Pendulum-v1", 2, 10)
    data = next(iter(collector.iterator()))
    layer = nn.Linear(3, 1)
    layer(data["observation"]).sum().backward()
    assert layer.weight.grad is not None


def test_statistics_of_an_abandoned_episode_are_dropped():
    def build():
        env, collector = make_env_and_collector("vector", "toy_envs:Drifting-v0", 2, 7)
        return CollectorLoader(collector, env, lambda: 0)

    first, second = build(), build()
    next(first)
    with pytest.warns(UserWarning, match="does not replay"):
        second.load_state_dict(first.state_dict())
    assert second.statistics.open_length.tolist() == [0, 0]
    assert second.statistics.open_return.tolist() == [0, 0]


def test_torchrl_collectors_resume_with_new_episodes():
    def build():
        env, collector = make_env_and_collector("torchrl", "toy_envs:Counting-v0", 2, 7)
        return env, CollectorLoader(collector, env, lambda: 0)

    (_, first), (env, second) = build(), build()
    next(first)
    episodes = first.state_dict()["episodes"]
    second.load_state_dict(first.state_dict())
    assert env.episodes == [episode + 1 for episode in episodes]
    assert next(second)["observation"][:, 0, 1].tolist() == [0, 0]


def test_statistics_of_episodes_of_length_3_and_7():
    statistics = EpisodeStatistics(2)
    reward, done = np.ones((2, 42)), np.zeros((2, 42), dtype=bool)
    done[0, 2::3], done[1, 6::7] = True, True
    reward[1] = 2
    returns, lengths = [], []
    for start in range(0, 42, 4):  # rollouts shorter than an episode
        got = statistics.update(reward[:, start : start + 4], done[:, start : start + 4], np.arange(2))
        returns, lengths = returns + got[0], lengths + got[1]
    assert sorted(lengths) == [3] * 14 + [7] * 6
    assert sorted(returns) == [3.0] * 14 + [14.0] * 6


def test_the_loader_reports_episode_statistics():
    env, collector = make_env_and_collector("vector", "toy_envs:Counting-v0", 2, 7, length=3)
    loader = CollectorLoader(collector, env, lambda: 0)
    for _ in range(3):
        next(loader)
    row = loader.pop_metrics()
    assert row["episode/return"] == 6.0
    assert row["episode/length"] == 3.0
    assert "episode/return" not in loader.pop_metrics()


@pytest.mark.parametrize("name", ["vector"])
def test_an_unfinished_episode_is_restored_by_replaying_its_actions(name):
    _, straight = make_env_and_collector(name, "Pendulum-v1", 3, 33)
    rollouts = iter(straight.iterator())
    expected = [next(rollouts).clone() for _ in range(20)]
    _, first = make_env_and_collector(name, "Pendulum-v1", 3, 33)
    rollouts = iter(first.iterator())
    for _ in range(11):
        next(rollouts)
    state = first.state_dict()
    assert state["actions"].shape == (3, 11 * 33 % 200, 1)
    _, second = make_env_and_collector(name, "Pendulum-v1", 3, 33)
    second.load_state_dict(state)
    rollouts = iter(second.iterator())
    for each in expected[11:]:
        assert bool((next(rollouts) == each).all())


def test_envs_in_different_steps_of_their_episodes_resume():
    def build():
        return make_env_and_collector("vector", "CartPole-v1", 4, 13, discrete=True)[1]

    straight, first, second = build(), build(), build()
    rollouts = iter(straight.iterator())
    expected = [next(rollouts).clone() for _ in range(30)]
    for _ in range(17):
        first.rollout()
    state = first.state_dict()
    assert len(set(state["lengths"])) > 1
    second.load_state_dict(state)
    for each in expected[17:]:
        assert bool((second.rollout() == each).all())


def test_an_env_that_does_not_replay_warns_and_starts_a_new_episode():
    _, first = make_env_and_collector("vector", "toy_envs:Drifting-v0", 2, 7)
    first.rollout()
    _, second = make_env_and_collector("vector", "toy_envs:Drifting-v0", 2, 7)
    with pytest.warns(UserWarning, match="does not replay"):
        second.load_state_dict(first.state_dict())
    assert second.env.episodes == [1, 1]


def test_a_state_saved_at_the_end_of_an_episode_is_restored():
    _, collector = make_env_and_collector("vector", "toy_envs:Counting-v0", 2, 5, length=5)
    collector.rollout()
    state = collector.state_dict()
    assert state["lengths"] == [0, 0]
    _, second = make_env_and_collector("vector", "toy_envs:Counting-v0", 2, 5, length=5)
    second.load_state_dict(state)
    assert second.rollout()["observation"][:, 0, 1].tolist() == [0, 0]
