"""Envs: seeds, action units, wrappers, running statistics, and errors of envs that cannot be made."""

import copy
import multiprocessing
import signal
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

import toy_envs
from extras import skip_without_packages
from levin.config.compose import compose
from levin.core import paths
from levin.core.errors import ConfigError
from levin.core.omega import to_plain
from levin.envs.config import EVALUATION, TRAINING, EnvConfig
from levin.envs.factory import describe_env, make_env
from levin.envs.single import make_single_env
from levin.envs.sync import SyncEnvs
from levin.envs.vector import episode_seed
from levin.nn.normalizers import ObservationNormalizer, RewardNormalizer


def test_no_two_episodes_share_a_seed():
    seeds = [
        episode_seed(seed, purpose, rank, env, episode)
        for seed in range(4)
        for purpose in (TRAINING, EVALUATION)
        for rank in range(3)
        for env in range(4)
        for episode in range(20)
    ]
    assert len(set(seeds)) == len(seeds)


def test_every_episode_starts_with_its_own_seed():
    env = make_env(EnvConfig(id="Pendulum-v1", num_envs=2), seed=0)
    observation, _ = env.reset()
    for episode in range(3):
        for i in range(2):
            alone, _ = gym.make("Pendulum-v1").reset(seed=episode_seed(0, TRAINING, 0, i, episode))
            assert np.array_equal(observation[i], alone)
        env.step(np.zeros((2, 1), np.float32))
        observation, _ = env.reset(options={"reset_mask": np.ones(2, dtype=bool)})


def test_resetting_an_env_before_its_first_step_starts_the_same_episode():
    env = make_env(EnvConfig(id="Pendulum-v1", num_envs=2), seed=0)
    first, _ = env.reset()
    again, _ = env.reset()
    assert np.array_equal(first, again)
    assert env.episodes == [0, 0]


@pytest.mark.parametrize(
    ("units", "given", "expected"),
    [("rescale", [-1, 0, 1], [-2, 1, 4]), ("clip", [-9, 0, 9], [-2, 0, 4]), ("none", [-9, 0, 9], [-9, 0, 9])],
)
def test_actions_reach_the_env_in_the_configured_units(units, given, expected):
    env = make_env(EnvConfig(id="toy_envs:Recorder-v0", action=units), seed=0)
    env.reset()
    toy_envs.Recorder.actions.clear()
    for action in given:
        env.step(np.array([[action]], np.float32))
    assert toy_envs.Recorder.actions == expected


def test_observation_entries_selects_entries_of_the_vector():
    full = make_single_env(EnvConfig(id="Pendulum-v1"))
    part = make_single_env(EnvConfig(id="Pendulum-v1", observation_entries=[1, 0]))
    (full_observation, _), (selected, _) = full.reset(seed=3), part.reset(seed=3)
    assert np.array_equal(selected, full_observation[[1, 0]])
    assert part.observation_space.shape == (2,)
    action = np.array([0.5], np.float32)
    assert np.array_equal(part.step(action)[0], full.step(action)[0][[1, 0]])
    for entries, sentence in (([3], "must name entries of the vector; valid: 0 to 2"), ([], "must name entries")):
        with pytest.raises(ConfigError, match=sentence):
            make_env(EnvConfig(id="Pendulum-v1", observation_entries=entries), seed=0)
    with pytest.raises(ConfigError, match="is for vectors"):
        make_env(EnvConfig(id="toy_envs:Robot-v0", observation_entries=[0]), seed=0)


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    env = make_single_env(EnvConfig(id="toy_envs:Counting-v0", action_repeat=3, kwargs={"length": 5}))
    env.reset(seed=0)
    action = np.zeros(1, np.float32)
    assert env.step(action)[1:3] == (1.0 + 2 + 3, False)
    assert env.step(action)[1:3] == (4.0 + 5, True)


def test_time_limit_truncates():
    env = make_env(EnvConfig(id="Pendulum-v1", time_limit=7), seed=0)
    env.reset()
    flags = [env.step(np.zeros((1, 1), np.float32))[2:4] for _ in range(7)]
    assert [bool(cut[0]) for _, cut in flags] == [False] * 6 + [True]
    assert not any(end[0] for end, _ in flags)


@pytest.mark.parametrize("name", sorted(file.stem for file in (paths.CONFIGS / "env").glob("*.yaml")))
def test_every_env_file_can_be_made_and_stepped(name):
    skip_without_packages(name)
    needed = {"gym": "env.id=toy_envs:Point-v0", "atari": "env.id=pong", "torchrl": "env.target=toy_torchrl:line"}
    needed["dream"] = f"env.run={paths.EXPERIMENTS / 'dreamer_pendulum'}"
    overrides = [f"env={name}", *([needed[name]] if name in needed else [])]
    cfg = compose(overrides)
    if name.removesuffix("_batched") in ("cartpole", "acrobot"):
        cfg = compose([*overrides, "env.action=none"])
    env = make_env(EnvConfig(**to_plain(cfg.env)), seed=0)
    spec = describe_env(env)
    observation, _ = env.reset()
    assert list(observation.shape) == [env.num_envs, *spec["observation"]["shape"]]
    observation, reward, *_ = env.step(env.action_space.sample())
    assert reward.shape == (env.num_envs,)
    env.close()


@pytest.mark.parametrize(
    ("env_id", "sentence"),
    [
        ("HalfCheeta-v4", "HalfCheetah"),
        ("no_such_module:Env-v0", "no_such_module"),
        ("HalfCheetah-v99", "v99"),
    ],
)
def test_an_unknown_env_id_is_a_config_error(env_id, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_env(EnvConfig(id=env_id), seed=0)


def test_a_missing_optional_package_is_a_config_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    for module in [name for name in sys.modules if "gymnasium.envs.mujoco" in name]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ConfigError, match=r"type make \.venv/\.mujoco$"):
        make_env(EnvConfig(id="HalfCheetah-v4"), seed=0)


def test_the_camera_tracks_a_mujoco_runner_by_default():
    def camera(**kwargs):
        env = make_single_env(EnvConfig(id="HalfCheetah-v4", kwargs=kwargs), render=True)
        return env.unwrapped.camera_name, env.unwrapped.camera_id

    assert camera() == ("track", None)
    assert camera(camera_id=0) == (None, 0)


def test_observation_statistics_are_those_of_all_samples():
    normalizer = ObservationNormalizer((3,), clip=5.0)
    data = torch.randn(4, 60, 3, dtype=torch.float64) * 3 + 7
    untouched = torch.randn(2, 3)
    assert torch.equal(normalizer(untouched), untouched)
    for chunk in data.split(17, 1):
        normalizer.update(chunk)
    flat = data.flatten(0, 1)
    torch.testing.assert_close(normalizer.moments.mean, flat.mean(0))
    torch.testing.assert_close(normalizer.moments.var, flat.var(0, correction=0))
    loaded = ObservationNormalizer((3,), clip=5.0)
    loaded.load_state_dict(normalizer.state_dict())
    for part in (normalizer, loaded, copy.deepcopy(normalizer)):
        assert torch.equal(part.moments.scale, (part.moments.var + 1e-8).rsqrt())
        assert torch.equal(part(flat), normalizer(flat))
    normal = normalizer(flat)
    torch.testing.assert_close(normal.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert float(normalizer(torch.full((1, 3), 1e6)).max()) == 5.0


def test_reward_statistics_span_rollouts_and_are_reset_at_episode_ends():
    gamma, normalizer = 0.9, RewardNormalizer(2, 0.9, clip=10.0)
    reward = torch.rand(2, 42, 1, dtype=torch.float64)
    done = torch.zeros(2, 42, 1, dtype=torch.bool)
    done[0, 2::3], done[1, 6::7] = True, True
    expected = []
    for i in range(2):
        running = 0.0
        for t in range(42):
            running = gamma * running + float(reward[i, t])
            expected.append(running)
            running *= 1 - float(done[i, t])
    for start in range(0, 42, 5):
        normalizer.update(reward[:, start : start + 5], done[:, start : start + 5])
    torch.testing.assert_close(float(normalizer.moments.var), float(np.var(expected)))
    with pytest.raises(ValueError, match="the rollout has 1 envs"):  # never the returns of other envs
        normalizer.update(reward[:1], done[:1])
    torch.testing.assert_close(normalizer(reward), (reward / np.std(expected)).float())


def test_an_assertion_in_an_env_constructor_is_a_config_error():
    pytest.importorskip("Box2D")
    with pytest.raises(ConfigError, match=r"env.id=LunarLander-v3 can't be made: AssertionError: gravity") as error:
        make_env(EnvConfig(id="LunarLander-v3", kwargs={"gravity": 5.0}), seed=0)
    assert "\n" not in str(error.value)


def test_making_an_env_in_a_child_process_keeps_its_signal_handlers():
    def child(pipe):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # SIGINT is ignored if the tests run in the background
        make_env(EnvConfig(id="CartPole-v1"), seed=0)
        pipe.send(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(sender,))
    process.start()
    assert receiver.poll(30)
    assert receiver.recv()
    process.join()


def test_only_the_last_repeated_step_is_drawn(monkeypatch):
    mujoco_env = pytest.importorskip("gymnasium.envs.mujoco")
    drawn = []
    monkeypatch.setattr(
        mujoco_env.MujocoEnv, "render", lambda env: drawn.append(env.data.time) or np.zeros((32, 32, 3), np.uint8)
    )
    env = make_single_env(EnvConfig(id="HalfCheetah-v4", pixels=32, action_repeat=4))
    env.reset(seed=0)
    drawn.clear()
    for _ in range(10):
        env.step(env.action_space.sample())
    np.testing.assert_allclose(drawn, np.arange(1, 11) * 4 * env.unwrapped.dt)  # after every fourth step


def test_observations_of_wrong_lengths_are_refused_even_if_their_sum_is_right():
    class Wrong(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2)

        def __init__(self, length: int) -> None:
            self.length = length

        def reset(self, *, seed=None, options=None):
            return np.zeros(self.length, np.float32), {}

    envs = SyncEnvs([lambda: Wrong(3), lambda: Wrong(5)], copy=False)
    with pytest.raises(ValueError, match=r"env 0 returned an observation of the shape \(3,\), not \(4,\)"):
        envs.reset()
