"""What an env YAML gives is what `gymnasium.make` gives, behind the preprocessing that it states."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import AddRenderObservation

from levin.config.compose import compose
from levin.core import paths
from levin.core.omega import to_plain
from levin.envs.config import TRAINING, EnvConfig
from levin.envs.factory import make_env
from levin.envs.vector import episode_seed

OURS = ("gym", "torchrl", "atari")  # any id, target or game
NAMES = sorted(file.stem for file in (paths.CONFIGS / "env").glob("*.yaml") if file.stem not in OURS)
STEPS = 200


def unwrapped(cfg: EnvConfig) -> gym.Env:
    if cfg.family == "dm_control":
        gym.register_envs(importlib.import_module("shimmy"))
    return gym.make(cfg.id, **cfg.kwargs)


def stated(env: gym.Env, observation):
    """Numbers in one float32 vector; pixels channel-first."""
    if isinstance(env.observation_space, gym.spaces.Dict):
        return gym.spaces.flatten(env.observation_space, observation).astype(np.float32)
    if observation.ndim == 2:
        return observation[None]
    return observation.transpose(2, 0, 1) if observation.ndim == 3 else observation


def same_steps(cfg: EnvConfig, alone: gym.Env, steps: int) -> int:
    """Hold both against each other; the number of episodes that ended."""
    ours, episode = make_env(cfg, seed=3), 0
    alone.action_space.seed(5)
    seen, _ = ours.reset()
    expected, _ = alone.reset(seed=episode_seed(3, TRAINING, 0, 0, 0))
    for _ in range(steps):
        np.testing.assert_array_equal(seen[0], stated(alone, expected))
        action = np.asarray(alone.action_space.sample())
        action = action.astype(np.float32) if action.ndim else action
        seen, reward, ends, cuts, _ = ours.step(action[None])
        expected, their_reward, end, cut, _ = alone.step(action)
        np.testing.assert_array_equal(seen[0], stated(alone, expected))
        assert (reward[0], ends[0], cuts[0]) == (their_reward, end, cut)
        if end or cut:
            episode += 1
            seen, _ = ours.reset(options={"reset_mask": np.ones(1, dtype=bool)})
            expected, _ = alone.reset(seed=episode_seed(3, TRAINING, 0, 0, episode))
    ours.close(), alone.close()
    return episode


@pytest.mark.parametrize("name", NAMES)
def test_an_env_is_what_gymnasium_makes(name):
    cfg = EnvConfig(**to_plain(compose([f"env={name}", "algo=a2c", "env.num_envs=1"]).env))
    if cfg.family == "atari":
        pytest.skip("held against Gymnasium's preprocessing in test_atari.py")
    if cfg.family == "dream":
        pytest.skip("is no env of Gymnasium's: test_world_models.py")
    if ":" in cfg.id:
        if name == "racing":
            pytest.importorskip("Box2D")
        importlib.import_module(cfg.id.partition(":")[0])
    needed = {"dm_control": "shimmy", "mujoco": "mujoco", "box2d": "Box2D"}
    where = cfg.family if cfg.family == "dm_control" else str(gym.spec(cfg.id.rpartition(":")[2]).entry_point)
    for word, package in needed.items():
        if word in where:
            pytest.importorskip(package)
    ended = same_steps(cfg, unwrapped(cfg), STEPS)
    assert ended or name not in ("cartpole", "pendulum", "hopper", "lunarlander")


@pytest.mark.parametrize("name", ["walker_walk", "pendulum_swingup"])
def test_dm_control_goes_on_after_a_time_limit(name):
    """Its own episodes, of a thousand steps, are longer than the test above."""
    pytest.importorskip("shimmy")
    cfg = to_plain(compose([f"env={name}", "algo=a2c", "env.num_envs=1", "env.time_limit=60"]).env)
    cfg = EnvConfig(**cfg)
    gym.register_envs(importlib.import_module("shimmy"))
    alone = gym.make(cfg.id, max_episode_steps=60)
    assert same_steps(cfg, alone, STEPS) == 3


def same_pictures(name: str) -> None:
    cfg = EnvConfig(**to_plain(compose([f"env={name}", "algo=a2c", "env.num_envs=1", "env.pixels=64"]).env))
    make_env(cfg, seed=3).close()  # chooses what draws
    size: dict = {"height": 64, "width": 64}
    if cfg.family == "dm_control":
        alone = gym.make(cfg.id, render_mode="rgb_array", render_kwargs=size | {"camera_id": 0})
    else:
        alone = gym.make(cfg.id, render_mode="rgb_array", camera_name="track", **size)
    same_steps(cfg, AddRenderObservation(alone, render_only=True), STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["walker_walk", "cartpole_swingup", "halfcheetah"])
def test_pictures_are_what_gymnasium_draws(name):
    """In a process of its own: what draws is chosen once."""
    pytest.importorskip("mujoco" if name == "halfcheetah" else "shimmy")
    code = f"import test_families; test_families.same_pictures('{name}')"
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MUJOCO_GL")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, env=environment)
