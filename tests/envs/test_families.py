"""Envs of the env YAMLs step exactly like those of `gymnasium.make`, up to the preprocessing of the YAML."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import AddRenderObservation

from extras import skip_without_packages
from levin.config.compose import compose
from levin.core import paths
from levin.core.omega import to_plain
from levin.envs.config import TRAINING, EnvConfig
from levin.envs.factory import make_env
from levin.envs.vector import episode_seed

WITHOUT_ID = ("gym", "torchrl", "atari")  # they need an id, a target or a game
NAMES = sorted(file.stem for file in (paths.CONFIGS / "env").glob("*.yaml") if file.stem not in WITHOUT_ID)
STEPS = 200


def unwrapped(cfg: EnvConfig) -> gym.Env:
    """Make the env with Gymnasium alone."""
    if cfg.family == "dm_control":
        gym.register_envs(importlib.import_module("shimmy"))
    return gym.make(cfg.id, max_episode_steps=cfg.time_limit, **cfg.kwargs)


def as_stored(env: gym.Env, observation):
    """Convert an observation as Levin does: numbers to one float32 vector, pixels to channel-first."""
    if isinstance(env.observation_space, gym.spaces.Dict):
        return gym.spaces.flatten(env.observation_space, observation).astype(np.float32)
    if observation.ndim == 2:
        return observation[None]
    return observation.transpose(2, 0, 1) if observation.ndim == 3 else observation


def check_steps(cfg: EnvConfig, alone: gym.Env, steps: int) -> int:
    """Step both envs with the same actions, compare them, and return the number of episodes that ended."""
    env, episode = make_env(cfg, seed=3), 0
    alone.action_space.seed(5)
    observation, _ = env.reset()
    expected, _ = alone.reset(seed=episode_seed(3, TRAINING, 0, 0, 0))
    for _ in range(steps):
        np.testing.assert_array_equal(observation[0], as_stored(alone, expected))
        action = np.asarray(alone.action_space.sample())
        action = action.astype(np.float32) if action.ndim else action
        observation, reward, terminated, truncated, _ = env.step(action[None])
        expected, expected_reward, expected_terminated, expected_truncated, _ = alone.step(action)
        np.testing.assert_array_equal(observation[0], as_stored(alone, expected))
        assert (reward[0], terminated[0], truncated[0]) == (expected_reward, expected_terminated, expected_truncated)
        if expected_terminated or expected_truncated:
            episode += 1
            observation, _ = env.reset(options={"reset_mask": np.ones(1, dtype=bool)})
            expected, _ = alone.reset(seed=episode_seed(3, TRAINING, 0, 0, episode))
    env.close(), alone.close()
    return episode


@pytest.mark.parametrize("name", NAMES)
def test_envs_step_as_those_of_gymnasium_make(name):
    cfg = EnvConfig(**to_plain(compose([f"env={name}", "algo=a2c", "env.num_envs=1"]).env))
    if cfg.family == "atari":
        pytest.skip("compared with Gymnasium's preprocessing in test_atari.py")
    if cfg.family == "dream":
        pytest.skip("not an env of Gymnasium; see test_world_models.py")
    if cfg.family == "torchrl":
        pytest.skip("draws other initial states; compared from the same states in test_batched_envs.py")
    skip_without_packages(name)
    if ":" in cfg.id:
        importlib.import_module(cfg.id.partition(":")[0])
    if cfg.observation_entries:
        pytest.skip("shows a part of the observations; see test_envs.py")
    ended = check_steps(cfg, unwrapped(cfg), 80 if name in ("carracing", "racing") else STEPS)  # they draw each step
    assert ended or name not in ("cartpole", "pendulum", "hopper", "lunarlander")


@pytest.mark.parametrize("name", ["walker_walk", "pendulum_swingup"])
def test_dm_control_continues_after_a_time_limit(name):
    """With a short limit, because an episode of dm_control has 1000 steps."""
    pytest.importorskip("shimmy")
    cfg = to_plain(compose([f"env={name}", "algo=a2c", "env.num_envs=1", "env.time_limit=60"]).env)
    cfg = EnvConfig(**cfg)
    gym.register_envs(importlib.import_module("shimmy"))
    alone = gym.make(cfg.id, max_episode_steps=60)
    assert check_steps(cfg, alone, STEPS) == 3


def check_pictures(name: str) -> None:
    """Compare the pixel observations of an env with those of Gymnasium."""
    cfg = EnvConfig(**to_plain(compose([f"env={name}", "algo=a2c", "env.num_envs=1", "env.pixels=64"]).env))
    make_env(cfg, seed=3).close()  # sets the rendering backend
    size: dict = {"height": 64, "width": 64}
    if cfg.family == "dm_control":
        alone = gym.make(cfg.id, render_mode="rgb_array", render_kwargs=size | {"camera_id": 0})
    else:
        alone = gym.make(cfg.id, render_mode="rgb_array", camera_name="track", **size)
    check_steps(cfg, AddRenderObservation(alone, render_only=True), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["walker_walk", "cartpole_swingup", "halfcheetah"])
def test_pixel_observations_equal_gymnasiums(name):
    """In a new process, because the rendering backend can be set only once."""
    pytest.importorskip("mujoco" if name == "halfcheetah" else "shimmy")
    code = f"import test_families; test_families.check_pictures('{name}')"
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MUJOCO_GL")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, env=environment)
