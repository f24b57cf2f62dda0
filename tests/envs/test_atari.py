"""Atari games: the published preprocessing, lives, scores, seeds and resuming."""

import imageio.v3
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

pytest.importorskip("ale_py", reason="the extra `atari` plays")

import ale_py
import gymnasium as gym
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from checks import metrics, saved_state
from levin.collectors.factory import make_collector
from levin.collectors.loader import CollectorLoader
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.data.replay import FrameReplay
from levin.envs import atari
from levin.envs.config import EVALUATION, TRAINING, EnvConfig
from levin.envs.factory import describe_env, make_env
from levin.training import video
from levin.training.session import build_run, train
from short_runs import check_resumed_run_is_identical

gym.register_envs(ale_py)


def settings(game: str, num_envs: int = 1, **kwargs) -> EnvConfig:
    """Return the env config of a game with the published preprocessing."""
    return EnvConfig(
        family="atari", id=game, num_envs=num_envs, action_repeat=4, frame_stack=4, action="none", kwargs=kwargs
    )


def random_actions(env, steps: int) -> np.ndarray:
    """Return random actions `[steps, N]` with a fixed seed."""
    return np.random.default_rng(0).integers(env.single_action_space.n, size=(steps, env.num_envs))


@pytest.mark.parametrize(("game", "name"), [("pong", "Pong"), ("breakout", "Breakout")])
def test_frames_rewards_and_end_flags_equal_gymnasiums(game, name):
    """The values are bitwise equal, because ale-py scales frames as OpenCV does.

    Without no-op frames at the start: their number comes from different generators, and ale-py presses FIRE.
    """
    env = make_env(settings(game, noop_max=0, use_fire_reset=False), seed=0, purpose=EVALUATION)
    plain = AtariPreprocessing(gym.make(f"ALE/{name}-v5", frameskip=1, repeat_action_probability=0.0), noop_max=0)
    reference = FrameStackObservation(plain, 4, padding_type="zero")
    observation, _ = env.reset()
    expected, _ = reference.reset(seed=env.episode_seed_of(0, 0) >> 1)
    rewards = episodes = 0
    for action in random_actions(env, 1000 if game == "pong" else 400):
        assert np.array_equal(observation[0], expected)
        observation, reward, *flags, _ = env.step(action)
        expected, expected_reward, *expected_flags, _ = reference.step(action[0])
        assert reward[0] == expected_reward
        assert [flag[0] for flag in flags] == expected_flags
        rewards += abs(expected_reward)
        if any(expected_flags):
            assert np.array_equal(observation[0], expected)  # the terminal observation
            episodes += 1
            observation, _ = env.reset(options={"reset_mask": np.array([True])})
            expected, _ = reference.reset(seed=env.episode_seed_of(0, episodes) >> 1)
    assert rewards
    assert episodes
    assert env.episodes == [episodes]  # each game of an evaluation has its own seed


def test_a_game_begins_after_up_to_30_frames_without_action():
    frames = make_env(settings("pong", 5), seed=0).reset()[1]["episode_frame_number"]
    assert len(set(frames.tolist())) > 2
    assert 0 < max(frames) <= 30


@pytest.mark.parametrize(("purpose", "lives"), [(TRAINING, 5), (EVALUATION, 1)])
def test_an_episode_is_a_life_in_training_and_a_game_in_evaluation(purpose, lives):
    env = make_env(settings("breakout"), seed=0, purpose=purpose)
    env.reset()
    episodes = 0
    for action in random_actions(env, 400):
        last, _, terminated, truncated, info = env.step(action)
        assert not truncated
        if terminated:
            episodes += 1
            first, _ = env.reset(options={"reset_mask": terminated})
            if env.games:
                break
            assert info["lives"] == 5 - episodes
            assert np.array_equal(first, last)  # the game continues
            assert env.episodes == [0]
    assert episodes == lives
    assert not first[0, :3].any()  # a new game: one frame after three black ones
    assert last[0].any(axis=(1, 2)).all()


def test_rewards_are_clipped_only_in_training_and_scores_never():
    training, evaluation, unclipped = (
        atari.make_atari_games(settings("space_invaders", **kwargs), 1, training=training, view=False)
        for training, kwargs in ((True, {}), (False, {}), (True, {"reward_clipping": False}))
    )
    for env in (training, evaluation, unclipped):
        env.reset(seed=[3])
    score = steps = largest = 0
    for action in random_actions(training, 2000):
        reward, raw, unclipped_reward = (env.step(action)[1][0] for env in (training, evaluation, unclipped))
        assert (reward, unclipped_reward) == (np.sign(raw), raw)
        score, steps, largest = score + raw, steps + 1, max(largest, raw)
        if evaluation.games:
            break
    assert largest > 1
    assert training.games == evaluation.games == [(score, steps)]


class Chooser(nn.Module):
    """Policy with random actions that depend on `is_first`."""

    def forward(self, observation: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
        return (torch.randint(4, (len(observation),)) + is_first.squeeze(1)) % 4


def make_loader(name: str = "vector", num_envs: int = 2, **kwargs) -> CollectorLoader:
    """Build the rollout loader of a collector of Breakout with random actions."""
    env = make_env(settings("breakout", num_envs, **kwargs), seed=0)
    policy = TensorDictModule(Chooser(), in_keys=["observation", "is_first"], out_keys=["action"])
    return CollectorLoader(make_collector(name, env, policy, steps=50), env, lambda: 0)


def collect(loader: CollectorLoader, rollouts: range) -> TensorDict:
    """Return rollouts, concatenated to `[N, T]`; each has its own seed for the random actions."""
    return torch.cat([(torch.manual_seed(number), next(loader).clone())[1] for number in rollouts], 1)


def test_rollouts_do_not_depend_on_the_number_of_threads_or_the_collector():
    expected = collect(make_loader(num_threads=1), range(5))
    assert bool((collect(make_loader(num_threads=2), range(5)) == expected).all())
    torchrl = collect(make_loader("torchrl"), range(5))
    for key in ("observation", "action", *(("next", key) for key in ("observation", "reward", "terminated", "done"))):
        assert bool((torchrl[key] == expected[key]).all()), key
    assert int(expected["next", "done"].sum()) > 8


def test_sticky_actions_are_seeded_too():
    one, same = (collect(make_loader(num_envs=1, repeat_action_probability=0.25), range(2)) for _ in range(2))
    assert bool((one == same).all())
    assert not torch.equal(one["observation"], collect(make_loader(num_envs=1), range(2))["observation"])


def test_episode_metrics_are_the_scores_of_whole_games():
    loader = make_loader(reward_clipping=False)
    rollout = collect(loader, range(10))
    games = []
    for i in range(2):
        ends = rollout["next", "terminated"][i, :, 0].nonzero().flatten()[4::5].tolist()  # at the fifth life
        for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False):
            games.append((end, end + 1 - start, float(rollout["next", "reward"][i, start : end + 1].sum())))
    assert len(games) > 3
    assert loader.lengths == [length for _, length, _ in sorted(games)]
    assert loader.returns == [score for *_, score in sorted(games)]
    assert loader.pop_metrics()["episode/return"] > 0


@pytest.mark.parametrize("reseed_every", [0, 200])
def test_games_resume_after_a_lost_life(reseed_every):
    """Also if several games share a seed (`reseed_every`)."""
    straight, first, second = (make_loader(reseed_every=reseed_every) for _ in range(3))
    expected = collect(straight, range(9))
    rollout = collect(first, range(5))
    lives_lost = rollout["next", "terminated"].squeeze(-1).sum(1)  # [N]
    assert bool((lives_lost % 5 > 0).any())  # some env is in the middle of a game
    assert bool((lives_lost > 5).all())  # and none in its first game
    state = first.state_dict()
    assert state["collector"]["episodes"] == ([1, 1] if reseed_every == 0 else [0, 0])
    assert state["collector"]["lengths"] != state["open_length"]
    second.load_state_dict(state)
    assert not second.not_replayed.any()
    assert bool((collect(second, range(5, 9)) == expected[:, 250:]).all())
    assert min(second.env.episodes) > max(state["collector"]["episodes"])
    straight, second = straight.state_dict(), second.state_dict()
    assert {**straight, "collector": None} == {**second, "collector": None}
    for key in ("vector_steps", "episodes", "lengths"):
        assert straight["collector"][key] == second["collector"][key]


def test_is_first_is_restored_on_resume():
    """`is_first` of the first step after a resume is right, also in the middle of a game."""
    first, second = make_loader(num_envs=1), make_loader(num_envs=1)
    first.collector.steps = 1
    while not next(first)["next", "terminated"].any():
        pass
    second.load_state_dict(first.state_dict())
    assert second.collector._first.tolist() == [True]
    next(first)
    second.load_state_dict(first.state_dict())
    assert second.collector._first.tolist() == [False]


def test_time_limit_frame_skip_and_frame_stack_follow_the_config():
    env = make_env(EnvConfig(family="atari", id="pong", action_repeat=5, frame_stack=2, time_limit=50), seed=0)
    assert env.reset()[0].shape == (1, 2, 84, 84)
    assert (describe_env(env)["frame_stack"], describe_env(env)["action_repeat"]) == (2, 5)
    flags = [env.step(np.array([0]))[2:4] for _ in range(10)]
    assert [(bool(terminated[0]), bool(truncated[0])) for terminated, truncated in flags] == [(False, False)] * 9 + [
        (False, True)
    ]
    assert env.games[0][1] == 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"id": "ALE/Pong-v5"}, "not a game of ale-py; valid: pong"),
        ({"vectorization": "async"}, "threads of its own"),
        ({"normalize_observation": True}, "scale pixels themselves"),
        ({"kwargs": {"frameskip": 2}}, "frameskip"),
        ({"pixels": 64}, "env.pixels=64 is not for env.family=atari"),
        ({"kwargs": {"grayscale": False}}, "uint8 of the shape .1, 84, 84, 3."),
        ({"target": "toy:env"}, "env.target=toy:env is for env.family=torchrl"),
        ({"kwargs": {"sticky": 1}}, "sticky"),
    ],
)
def test_settings_that_do_not_apply_to_atari_are_refused(change, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        make_env(EnvConfig(**{"family": "atari", "id": "pong", **change}), seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("algo", ["dreamer", "dreamer_v3"])
def test_world_models_read_small_frames(algo):
    """Their config says env.action=rescale, which has no effect on discrete actions."""
    words = [f"algo={algo}", "env=pong", "algo.buffer_size=2000", "trainer.accelerator=cpu"]
    with pytest.raises(ConfigError) as error:
        build_run(compose(words))
    advice = str(error.value).partition("for Atari games, ")[2]
    algorithm, loader = build_run(compose([*words, *advice.split(), "env.num_envs=1"]))
    assert next(loader)["observation"].shape[2:] == (1, 64, 64)
    assert algorithm.model.features
    loader.collector.shutdown()


def test_collectors_with_workers_are_refused_for_atari():
    with pytest.raises(ConfigError, match="threads of its own, and collector=torchrl-process"):
        build_run(compose(["algo=dqn", "env=pong", "env.num_envs=2", "collector=torchrl-process"]))


def test_rendered_frames_equal_gymnasiums():
    env = make_env(settings("breakout", noop_max=0, use_fire_reset=False), seed=0, render=True)
    reference = gym.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0)
    env.reset()
    frame, _ = reference.reset(seed=env.episode_seed_of(0, 0) >> 1)
    assert np.array_equal(env.render()[0], frame)
    for action in random_actions(env, 30):
        env.step(action)
        frames = [reference.step(action[0])[0] for _ in range(4)]
        assert np.array_equal(env.render()[0], np.maximum(frames[2], frames[3]))


TINY = ("env.num_envs=2", "env.time_limit=160", "env.normalize_reward=false", "algo.hidden_sizes=[]")
TINY = (*TINY, "algo.batch_size=16", "logger=csv", "log_every=40", "eval.episodes=1", "eval.every=1000")


def test_a_resumed_dqn_run_is_identical(tmp_path):
    overrides = (
        *TINY,
        "algo=dqn",
        "env=breakout",
        "env.num_envs=1",
        "algo.steps_per_iteration=8",
        "algo.learning_starts=32",
    )
    overrides = (*overrides, "algo.buffer_size=400", "algo.schedule_env_steps=192", "checkpoint.every=90")
    buffer = build_run(compose([*overrides]))[0].buffer
    assert isinstance(buffer, FrameReplay)
    assert buffer.stack == 4
    check_resumed_run_is_identical(tmp_path, overrides, 192)
    state = saved_state(tmp_path / "straight")
    assert state["levin"]["updates"] > 10
    assert state["buffer"]["data"]["frame"].shape[1:] == (1, 84, 84)
    assert state["buffer"]["written"] < 2 * 192  # each frame once, plus a stack per episode start
    (row,) = [row for row in metrics(tmp_path / "straight") if row["env_steps"] == "192"]
    assert row["env_frames"] == "768"


def test_ppo_trains_and_plays(tmp_path):
    overrides = (*TINY, "algo=ppo", "env=pong", "algo.steps_per_iteration=16", "algo.epochs=1", "total_env_steps=96")
    before, _ = build_run(compose([*overrides]))
    train(compose([*overrides]), tmp_path)
    after = saved_state(tmp_path)["state_dict"]
    assert all(not torch.equal(value, after[key]) for key, value in before.state_dict().items())
    assert [float(row["episode/length"]) for row in metrics(tmp_path) if row["episode/length"]] == [40.0]
    (path,) = video.record_video(run=str(tmp_path))
    assert imageio.v3.improps(path, plugin="FFMPEG").shape[1:] == (210, 160, 3)
