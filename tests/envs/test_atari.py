"""Games of Atari: the published preprocessing, lives, scores, seeds, resume."""

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

from checks import metrics, saved
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
from short_runs import in_two_halves

gym.register_envs(ale_py)


def settings(game: str, num_envs: int = 1, **kwargs) -> EnvConfig:
    return EnvConfig(
        family="atari", id=game, num_envs=num_envs, action_repeat=4, frame_stack=4, action="none", kwargs=kwargs
    )


def random_actions(env, steps: int) -> np.ndarray:
    return np.random.default_rng(0).integers(env.single_action_space.n, size=(steps, env.num_envs))


@pytest.mark.parametrize(("game", "name"), [("pong", "Pong"), ("breakout", "Breakout")])
def test_frames_rewards_and_ends_are_those_of_gymnasium(game, name):
    """Bit for bit: ale-py scales frames as OpenCV does.

    Both without frames before the first observation: their number comes from other generators, and ale-py presses FIRE.
    """
    env = make_env(settings(game, noop_max=0, use_fire_reset=False), seed=0, purpose=EVALUATION)
    plain = AtariPreprocessing(gym.make(f"ALE/{name}-v5", frameskip=1, repeat_action_probability=0.0), noop_max=0)
    theirs = FrameStackObservation(plain, 4, padding_type="zero")
    observation, _ = env.reset()
    expected, _ = theirs.reset(seed=env.episode_seed_of(0, 0) >> 1)
    rewards = ends = 0
    for action in random_actions(env, 1000 if game == "pong" else 400):
        assert np.array_equal(observation[0], expected)
        observation, reward, *flags, _ = env.step(action)
        expected, their_reward, *their_flags, _ = theirs.step(action[0])
        assert reward[0] == their_reward
        assert [flag[0] for flag in flags] == their_flags
        rewards += abs(their_reward)
        if any(their_flags):
            assert np.array_equal(observation[0], expected)  # the terminal one
            ends += 1
            observation, _ = env.reset(options={"reset_mask": np.array([True])})
            expected, _ = theirs.reset(seed=env.episode_seed_of(0, ends) >> 1)
    assert rewards
    assert ends
    assert env.episodes == [ends]  # each game of an evaluation has its own seed


def test_a_game_begins_after_up_to_30_frames_without_action():
    frames = make_env(settings("pong", 5), seed=0).reset()[1]["episode_frame_number"]
    assert len(set(frames.tolist())) > 2
    assert 0 < max(frames) <= 30


@pytest.mark.parametrize(("purpose", "lives"), [(TRAINING, 5), (EVALUATION, 1)])
def test_an_episode_is_a_life_in_training_and_a_game_in_evaluation(purpose, lives):
    env = make_env(settings("breakout"), seed=0, purpose=purpose)
    env.reset()
    ends = 0
    for action in random_actions(env, 400):
        last, _, terminated, truncated, info = env.step(action)
        assert not truncated
        if terminated:
            ends += 1
            first, _ = env.reset(options={"reset_mask": terminated})
            if env.games:
                break
            assert info["lives"] == 5 - ends
            assert np.array_equal(first, last)  # the game goes on
            assert env.episodes == [0]
    assert ends == lives
    assert not first[0, :3].any()  # a new game: one frame on top of black ones
    assert last[0].any(axis=(1, 2)).all()


def test_rewards_are_cut_in_training_only_and_scores_never():
    training, evaluation, told = (
        atari.make_atari_games(settings("space_invaders", **kwargs), 1, training=training, view=False)
        for training, kwargs in ((True, {}), (False, {}), (True, {"reward_clipping": False}))
    )
    for env in (training, evaluation, told):
        env.reset(seed=[3])
    score = steps = largest = 0
    for action in random_actions(training, 2000):
        reward, raw, also_raw = (env.step(action)[1][0] for env in (training, evaluation, told))
        assert (reward, also_raw) == (np.sign(raw), raw)
        score, steps, largest = score + raw, steps + 1, max(largest, raw)
        if evaluation.games:
            break
    assert largest > 1
    assert training.games == evaluation.games == [(score, steps)]


class Chooser(nn.Module):
    """Random actions, other ones where an episode begins."""

    def forward(self, observation: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
        return (torch.randint(4, (len(observation),)) + is_first.squeeze(1)) % 4


def make(name: str = "vector", num_envs: int = 2, **kwargs) -> CollectorLoader:
    env = make_env(settings("breakout", num_envs, **kwargs), seed=0)
    policy = TensorDictModule(Chooser(), in_keys=["observation", "is_first"], out_keys=["action"])
    return CollectorLoader(make_collector(name, env, policy, steps=50), env, lambda: 0)


def collect(loader: CollectorLoader, rollouts: range) -> TensorDict:
    """`[N, T]`. Whatever else draws random numbers, each rollout has its own."""
    return torch.cat([(torch.manual_seed(number), next(loader).clone())[1] for number in rollouts], 1)


def test_the_number_of_threads_and_the_collector_change_nothing():
    expected = collect(make(num_threads=1), range(5))
    assert bool((collect(make(num_threads=2), range(5)) == expected).all())
    theirs = collect(make("torchrl"), range(5))
    for key in ("observation", "action", *(("next", key) for key in ("observation", "reward", "terminated", "done"))):
        assert bool((theirs[key] == expected[key]).all()), key
    assert int(expected["next", "done"].sum()) > 8


def test_sticky_actions_are_seeded_too():
    one, same = (collect(make(num_envs=1, repeat_action_probability=0.25), range(2)) for _ in range(2))
    assert bool((one == same).all())
    assert not torch.equal(one["observation"], collect(make(num_envs=1), range(2))["observation"])


def test_what_is_reported_is_the_score_of_whole_games():
    loader = make(reward_clipping=False)
    rollout = collect(loader, range(10))
    games = []
    for i in range(2):
        over = rollout["next", "terminated"][i, :, 0].nonzero().flatten()[4::5].tolist()  # at the fifth life
        for start, end in zip([0, *(end + 1 for end in over)], over, strict=False):
            games.append((end, end + 1 - start, float(rollout["next", "reward"][i, start : end + 1].sum())))
    assert len(games) > 3
    assert loader.lengths == [length for _, length, _ in sorted(games)]
    assert loader.returns == [score for *_, score in sorted(games)]
    assert loader.pop_metrics()["episode/return"] > 0


@pytest.mark.parametrize("reseed_every", [0, 200])
def test_games_resume_after_a_lost_life(reseed_every):
    """With a seed for each game, and with several games to a seed."""
    straight, first, second = (make(reseed_every=reseed_every) for _ in range(3))
    expected = collect(straight, range(9))
    rollout = collect(first, range(5))
    lost = rollout["next", "terminated"].squeeze(-1).sum(1)  # [N]
    assert bool((lost % 5 > 0).any())  # in the middle of a game, and of none that is the first
    assert bool((lost > 5).all())
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


def test_a_resumed_episode_begins_where_a_life_was_lost():
    """`is_first` of the first step after a resume, also when it is one of the middle of a game."""
    first, second = make(num_envs=1), make(num_envs=1)
    first.collector.steps = 1
    while not next(first)["next", "terminated"].any():
        pass
    second.load_state_dict(first.state_dict())
    assert second.collector._first.tolist() == [True]
    next(first)
    second.load_state_dict(first.state_dict())
    assert second.collector._first.tolist() == [False]


def test_limit_skip_and_stack_are_those_of_the_config():
    env = make_env(EnvConfig(family="atari", id="pong", action_repeat=5, frame_stack=2, time_limit=50), seed=0)
    assert env.reset()[0].shape == (1, 2, 84, 84)
    assert (describe_env(env)["frame_stack"], describe_env(env)["action_repeat"]) == (2, 5)
    flags = [env.step(np.array([0]))[2:4] for _ in range(10)]
    assert [(bool(end[0]), bool(cut[0])) for end, cut in flags] == [(False, False)] * 9 + [(False, True)]
    assert env.games[0][1] == 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"id": "ALE/Pong-v5"}, "no game of ale-py; valid: pong"),
        ({"vectorization": "async"}, "threads of its own"),
        ({"action": "rescale"}, "no bounds"),
        ({"normalize_observation": True}, "scale pixels themselves"),
        ({"kwargs": {"frameskip": 2}}, "frameskip"),
        ({"pixels": 64}, "env.pixels=64 is not for env.family=atari"),
        ({"kwargs": {"grayscale": False}}, "bytes of the shape .1, 84, 84, 3."),
        ({"target": "toy:env"}, "env.target=toy:env is for env.family=torchrl"),
        ({"kwargs": {"sticky": 1}}, "sticky"),
    ],
)
def test_what_means_nothing_here_is_refused(change, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        make_env(EnvConfig(**{"family": "atari", "id": "pong", **change}), seed=0)
    assert "\n" not in str(error.value)


def test_workers_are_not_for_games():
    with pytest.raises(ConfigError, match="threads of its own, and collector=torchrl-process"):
        build_run(compose(["algo=dqn", "env=pong", "env.num_envs=2", "collector=torchrl-process"]))


def test_the_picture_is_that_of_the_game():
    env = make_env(settings("breakout", noop_max=0, use_fire_reset=False), seed=0, render=True)
    theirs = gym.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0)
    env.reset()
    frame, _ = theirs.reset(seed=env.episode_seed_of(0, 0) >> 1)
    assert np.array_equal(env.render()[0], frame)
    for action in random_actions(env, 30):
        env.step(action)
        frames = [theirs.step(action[0])[0] for _ in range(4)]
        assert np.array_equal(env.render()[0], np.maximum(frames[2], frames[3]))


TINY = ("env.num_envs=2", "env.time_limit=160", "env.normalize_reward=false", "algo.hidden_sizes=[]")
TINY = (*TINY, "algo.batch_size=16", "logger=csv", "log_every=40", "eval.episodes=1", "eval.every=1000")


def test_dqn_in_two_halves_is_the_whole(tmp_path):
    words = (
        *TINY,
        "algo=dqn",
        "env=breakout",
        "env.num_envs=1",
        "algo.steps_per_iteration=8",
        "algo.learning_starts=32",
    )
    words = (*words, "algo.buffer_size=400", "algo.schedule_env_steps=192", "checkpoint.every=90")
    buffer = build_run(compose([*words]))[0].buffer
    assert isinstance(buffer, FrameReplay)
    assert buffer.stack == 4
    in_two_halves(tmp_path, words, 192)
    state = saved(tmp_path / "straight")
    assert state["levin"]["updates"] > 10
    assert state["buffer"]["data"]["frame"].shape[1:] == (1, 84, 84)
    assert state["buffer"]["written"] < 2 * 192  # each frame once, and the stacks that episodes begin with
    (row,) = [row for row in metrics(tmp_path / "straight") if row["env_steps"] == "192"]
    assert row["env_frames"] == "768"


def test_ppo_trains_and_plays(tmp_path):
    words = (*TINY, "algo=ppo", "env=pong", "algo.steps_per_iteration=16", "algo.epochs=1", "total_env_steps=96")
    before, _ = build_run(compose([*words]))
    train(compose([*words]), tmp_path)
    after = saved(tmp_path)["state_dict"]
    assert all(not torch.equal(value, after[key]) for key, value in before.state_dict().items())
    assert [float(row["episode/length"]) for row in metrics(tmp_path) if row["episode/length"]] == [40.0]
    (path,) = video.record_video(run=str(tmp_path))
    assert imageio.v3.improps(path, plugin="FFMPEG").shape[1:] == (210, 160, 3)
