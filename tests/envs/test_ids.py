"""Sentences about env ids that can't be made: missing packages, ids that nobody registers, several rewards."""

import sys
import types

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, TransformReward

from levin.core.errors import ConfigError
from levin.envs.config import EnvConfig
from levin.envs.factory import NEWEST_PYTHON, make_env
from levin.envs.single import make_single_env
from toy_envs import Point


def module(monkeypatch, name: str, code: str) -> None:
    """Make a module that can be imported."""
    made = types.ModuleType(name)
    exec(code, made.__dict__)
    monkeypatch.setitem(sys.modules, name, made)


def refuses(env_id: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_env(EnvConfig(id=env_id), seed=0)


def test_a_missing_module_is_named_and_an_extra_only_if_it_has_it(tmp_path, monkeypatch):
    refuses("not_there:Env-v0", "No module named 'not_there'.: install the package that has the module, or set PYTHON")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_other.py").write_text("import other_package.part")
    refuses("needs_other:Env-v0", "install the package that has the module other_package")
    (tmp_path / "needs_ale.py").write_text("raise ModuleNotFoundError('no ale', name='ale_py')")
    refuses("needs_ale:Env-v0", r"type make \.venv/\.atari$")
    monkeypatch.setitem(NEWEST_PYTHON, "atari", (3, 10))
    refuses("needs_ale:Env-v0", r"no ale.*, which exists for Python up to 3.10: .* make setup PYTHON=python3.10")
    (tmp_path / "needs_unknown.py").write_text("raise ImportError('pip install this[that]')")
    refuses("needs_unknown:Env-v0", r"can't be made: ImportError: pip install this\[that\] .needs_unknown.py, line 1.$")


def test_an_id_that_nobody_has_registered_is_explained(monkeypatch):
    for name in [each for each in gym.registry if each.startswith("ALE/")]:  # ale-py registers them when it is imported
        monkeypatch.delitem(gym.registry, name)
    refuses("ALE/Pong-v5", "Atari games are ENV=atari")
    for name in [each for each in gym.registry if each.startswith("dm_control/")]:
        monkeypatch.delitem(gym.registry, name)
    refuses("dm_control/finger-spin-v0", "tasks of DM Control also need env.family=dm_control$")
    refuses("Nobodys-v0", "name the package first: env.id=the_package:TheId-v0")
    module(monkeypatch, "registers_later", "def register_envs(): pass")
    refuses("registers_later:Nobodys-v0", r"registers its ids in register_envs\(\): call it in a module of your own")
    module(monkeypatch, "registers_nothing", "")
    refuses("registers_nothing:Nobodys-v0", "importing registers_nothing registers no ids with Gymnasium$")
    monkeypatch.setitem(sys.modules, "gym", types.ModuleType("gym"))
    refuses("registers_nothing:Nobodys-v0", "uses the old package gym, whose envs shimmy converts")
    refuses("toy_envs:Pount-v0", "valid: .*Point-v0")


def test_an_error_without_a_message_says_where(monkeypatch):
    def fail():
        assert False  # noqa: B011, PT015

    def fail_in_lines():
        raise ValueError("\n\n  the second line")

    monkeypatch.setitem(gym.registry, "Fails-v0", gym.envs.registration.EnvSpec("Fails-v0", entry_point=fail))
    refuses("Fails-v0", r"AssertionError: .*\(test_ids.py, line \d+\)")
    monkeypatch.setitem(gym.registry, "Lines-v0", gym.envs.registration.EnvSpec("Lines-v0", entry_point=fail_in_lines))
    refuses("Lines-v0", "ValueError:   the second line")


def test_several_rewards_are_refused_before_anything_is_written(monkeypatch):
    class Several(Point):
        reward_space = Box(-1, 1, (2,))

    monkeypatch.setitem(gym.registry, "Several-v0", gym.envs.registration.EnvSpec("Several-v0", entry_point=Several))
    refuses("Several-v0", r"has several rewards, \(2,\), .*: wrap the env in a module of your own")

    class Summed(gym.RewardWrapper):
        def reward(self, reward):
            return float(np.sum(reward))

    spec = gym.envs.registration.EnvSpec("Summed-v0", entry_point=Several)
    monkeypatch.setitem(gym.registry, "Summed-v0", spec)
    for wrap in (lambda env: TransformReward(env, np.sum), Summed):
        spec.entry_point = lambda wrap=wrap, **_: wrap(Several())
        make_single_env(EnvConfig(id="Summed-v0")).close()

    class Shifted(gym.ObservationWrapper):
        def observation(self, observation):
            return observation

    spec.entry_point = lambda **_: Shifted(Several())
    refuses("Summed-v0", "has several rewards")


def test_statistics_that_stay_as_they_are_may_be_wrapped(monkeypatch):
    def make(**_):
        env = NormalizeObservation(Point())
        env.update_running_mean = False
        return env

    monkeypatch.setitem(gym.registry, "Fixed-v0", gym.envs.registration.EnvSpec("Fixed-v0", entry_point=make))
    make_single_env(EnvConfig(id="Fixed-v0")).close()


@pytest.mark.parametrize("wrapper", [NormalizeObservation, NormalizeReward])
def test_statistics_that_evaluations_do_not_see_are_refused(monkeypatch, wrapper):
    spec = gym.envs.registration.EnvSpec("Normal-v0", entry_point=lambda **_: gym.Wrapper(wrapper(Point())))
    monkeypatch.setitem(gym.registry, "Normal-v0", spec)
    key = wrapper.__name__.removeprefix("Normalize").lower()
    refuses("Normal-v0", f"has the wrapper {wrapper.__name__}, .*: remove it, and set env.normalize_{key}=true$")
