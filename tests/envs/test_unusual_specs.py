"""Specs and spaces that are allowed and rare: every entry is observed, and every action lies in its space."""

from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from tensordict import TensorDict
from torchrl.data import Binary, Categorical, Composite, MultiCategorical, MultiOneHot, OneHot, Unbounded

from levin.collectors.torchrl import to_torchrl
from levin.collectors.uniform import Uniform
from levin.core.errors import ConfigError
from levin.core.network_input import NetworkInput
from levin.core.spaces import describe_action, describe_space, tensor_action_converter
from levin.envs.config import TRAINING, EnvConfig
from levin.envs.factory import make_env
from levin.envs.sync import WATCH_EVERY, SyncEnvs, episode_numbers
from levin.envs.torchrl import TorchRLVectorEnv, action_converter, end_flags, observation_space
from levin.envs.wrappers import ActionRepeat
from levin.training.video import frames_per_second
from toy_envs import Point
from toy_torchrl import Line


@pytest.mark.parametrize(
    ("spec", "space"),
    [
        (Categorical(3), Discrete(3)),
        (Categorical(3, shape=(1,)), Discrete(3)),
        (Categorical(3, shape=(9,)), MultiDiscrete([3] * 9)),
        (MultiCategorical([2, 4]), MultiDiscrete([2, 4])),
        (Binary(5), Box(-np.inf, np.inf, (5,), np.float32)),
        (Unbounded((2,)), Box(-np.inf, np.inf, (2,), np.float32)),
    ],
)
def test_every_entry_of_a_spec_is_observed(spec, space):
    assert observation_space(spec) == space


@pytest.mark.parametrize(
    ("spec", "space"),
    [
        (Categorical(4), Discrete(4)),
        (Categorical(4, shape=(3,)), MultiDiscrete([4] * 3)),
        (MultiCategorical([2, 4]), MultiDiscrete([2, 4])),
        (OneHot(3), Discrete(3)),
    ],
)
def test_every_entry_of_an_action_is_chosen(spec, space):
    env = SimpleNamespace(action_keys=["action"], action_spec_unbatched=spec)
    convert, found = action_converter(env)
    assert found == space
    actions = torch.from_numpy(np.stack([found.sample() for _ in range(5)]))
    assert all(spec.is_in(action) for action in convert(actions))


@pytest.mark.parametrize("spec", [Binary(5), MultiOneHot([2, 3])])
def test_actions_that_no_algorithm_takes_are_refused(spec):
    with pytest.raises(ConfigError, match=f"actions of {type(spec).__name__}; valid: continuous or categorical"):
        action_converter(SimpleNamespace(action_keys=["action"], action_spec_unbatched=spec))


def test_random_numbers_of_an_env_on_a_gpu_do_not_change_those_of_the_run(monkeypatch):
    generator = torch.Generator()  # in place of that of a GPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [generator.get_state()])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: generator.set_state(states[0]))
    env = make_env(EnvConfig(id="line", family="torchrl", target="toy_torchrl:line"), seed=0, num_envs=1)
    seen, with_own_rng = [], env.env._with_own_rng

    def draw(call):
        seen.append(torch.rand(1, generator=generator).item())
        return call()

    monkeypatch.setattr(env.env, "_with_own_rng", lambda k, call: with_own_rng(k, partial(draw, call)))
    generator.manual_seed(7)
    before = generator.get_state()
    env.begin([0], np.ones(1, bool))
    env.step(np.zeros((1, 1), np.float32))
    assert torch.equal(generator.get_state(), before)
    assert len(set(seen)) == len(seen) == 2


class Whole(Point):
    """Env whose observation is not float32."""

    def __init__(self, kind: str) -> None:
        spaces = {"int64": Box(0, 9, (3,), np.int64), "binary": MultiBinary(3), "bytes": Box(0, 255, (3,), np.uint8)}
        self.observation_space, self.action_space = spaces[kind], Discrete(2)

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        return np.ones(3, self.observation_space.dtype), {}

    def step(self, action):
        return np.ones(3, self.observation_space.dtype), 1.0, False, False, {}


gym.register("Whole-v0", Whole, max_episode_steps=5)


@pytest.mark.parametrize("kind", ["int64", "binary", "bytes"])
def test_observations_of_torchrls_collectors_have_the_dtype_of_the_rollout(kind):
    env = make_env(EnvConfig(id="Whole-v0", kwargs={"kind": kind}, action="none"), seed=0, purpose=TRAINING, num_envs=2)
    observation = to_torchrl(env, is_first=False).reset()["observation"]
    assert observation.dtype == getattr(torch, env.observation["dtype"]) == torch.float32


class OneSided(Point):
    """Env whose actions have no upper bound."""

    action_space = Box(0, np.inf, (2,), np.float32)


gym.register("OneSided-v0", OneSided, max_episode_steps=5)


def test_random_actions_of_torchrls_collector_are_finite():
    env = make_env(EnvConfig(id="OneSided-v0", action="clip"), seed=0, purpose=TRAINING, num_envs=2)
    wrapped = to_torchrl(env, is_first=False)
    actions = torch.stack([wrapped.rand_action(wrapped.reset())["action"] for _ in range(50)])
    assert actions.shape == (50, 2, 2)
    assert ((actions >= 0) & (actions <= 1)).all()


@pytest.mark.parametrize("space", [Discrete(3, start=-1), MultiDiscrete([2, 3], start=[4, -2])])
def test_uniform_actions_count_from_zero(space):
    policy = Uniform(SimpleNamespace(single_action_space=space, num_envs=200))
    action = policy(None).reshape(200, -1)
    sizes = [3] if isinstance(space, Discrete) else [2, 3]
    assert action.min(0).values.tolist() == [0] * len(sizes)
    assert (action.max(0).values + 1).tolist() == sizes


def test_an_env_may_have_an_attribute_named_draws():
    env = Point()
    env.draws = 7
    repeated = ActionRepeat(env, 2)
    repeated.reset(seed=0)
    repeated.step(np.zeros(1, np.float32))
    assert env.draws == 7


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"done": 1}, (1, 0)),
        ({"terminated": 1}, (1, 0)),
        ({"terminated": 0, "truncated": 1}, (0, 1)),
        ({"done": 1, "terminated": 0}, (0, 1)),
        ({"done": 1, "terminated": 1, "truncated": 1}, (1, 1)),
    ],
)
def test_a_missing_end_flag_follows_from_the_others(flags, expected):
    after = TensorDict({name: torch.tensor([bool(flag)]) for name, flag in flags.items()})
    assert tuple(int(flag) for flag in end_flags(after)) == expected


def test_a_truncation_needs_the_other_flag():
    after = TensorDict({name: torch.tensor([True]) for name in ("done", "truncated")})
    with pytest.raises(ConfigError, match="returns truncated without terminated"):
        end_flags(after)


def test_an_env_without_the_usual_end_flags_is_refused():
    def make():
        env = Line()
        env.full_done_spec = Composite(game_over=Categorical(2, shape=(1,), dtype=torch.bool))
        return env

    with pytest.raises(ConfigError, match="whose end flags are game_over; it needs done or terminated"):
        TorchRLVectorEnv(make, 1)


def test_a_video_of_repeated_actions_has_the_speed_of_the_env():
    env = make_env(EnvConfig(id="Pendulum-v1", action_repeat=2), seed=0, purpose=TRAINING, num_envs=1)
    assert frames_per_second(env) == env.metadata["render_fps"] / 2


@pytest.mark.parametrize("name", ["cartpole-swingup", "walker-walk"])
def test_a_video_of_dm_control_has_the_speed_of_the_env(name):
    pytest.importorskip("shimmy", reason="needs the extra `dmc`")
    config = EnvConfig(family="dm_control", id=f"dm_control/{name}-v0", action_repeat=2)
    env = make_env(config, seed=0, purpose=TRAINING, num_envs=1)
    assert frames_per_second(env) == pytest.approx({"cartpole-swingup": 50, "walker-walk": 20}[name])


def test_the_system_of_lqr_is_the_same_in_every_env():
    pytest.importorskip("shimmy", reason="needs the extra `dmc`")
    config = EnvConfig(family="dm_control", id="dm_control/lqr-lqr_2_1-v0")
    stiffness = [
        make_env(config, seed=seed, purpose=TRAINING, num_envs=1).env.envs[0].unwrapped._env.physics.model.jnt_stiffness
        for seed in (0, 1)
    ]
    assert stiffness[0].tolist() == stiffness[1].tolist()


def test_a_latent_state_of_atari_is_refused():
    from levin.envs.factory import wrap_latent

    with pytest.raises(ConfigError, match=r"wrappers=\[latent\] needs envs that this process steps"):
        wrap_latent(None, EnvConfig(family="atari", id="pong", run="runs/x"))


def test_numbers_that_are_not_finite_are_not_reported():
    info = {"is_success": True, "episode_metrics": {"score": np.nan, "speed": np.array([np.inf]), "hits": 3}}
    assert episode_numbers(info) == {"is_success": 1.0, "hits": 3.0}


def test_envs_noticed_late_draw_different_random_numbers():
    class Late(Point):
        def step(self, action):
            self.drawn = np.random.random()
            return super().step(action)

    envs = SyncEnvs([Late, Late], copy=True)
    envs.reset(seed=[0, 1])
    envs.envs, envs.separated, envs.calls = [env.env for env in envs.envs], False, WATCH_EVERY - 1
    for _ in range(2):
        envs.step(np.zeros((2, 1), np.float32))
    drawn = [env.env.drawn for env in envs.envs]
    assert envs.separated
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("space", [Discrete(3), MultiDiscrete([3, 3]), Box(-1, 1, (2,), np.float32)])
@pytest.mark.parametrize("units", ["none", "clip"])
def test_actions_for_tensor_envs_are_new_tensors(space, units):
    convert = tensor_action_converter(describe_action(space), units, torch.device("cpu"))
    actions = torch.from_numpy(np.stack([space.sample() for _ in range(4)]))
    before = actions.clone()
    convert(actions).mul_(2)
    assert torch.equal(actions, before)


@pytest.mark.parametrize("value", [-1, 3])
def test_a_discrete_value_outside_its_space_is_nan_among_tensors(value):
    read = NetworkInput(describe_space(Discrete(3)))
    converted = read.tensors(torch.tensor([value, 0, 2]))
    assert converted[0].isnan().all()
    assert converted[1:].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_close_of_a_torchrl_env_that_raises_is_a_warning(monkeypatch):
    env = make_env(EnvConfig(id="line", family="torchrl", target="toy_torchrl:line"), seed=0, num_envs=1)
    env.begin([0], np.ones(1, bool))

    def fail(**_):
        raise ValueError("the port is gone")

    monkeypatch.setattr(env.env.envs[0], "close", fail)
    with pytest.warns(UserWarning, match="raised ValueError: the port is gone"):
        env.close()


def test_an_atari_game_has_no_entries_to_select():
    pytest.importorskip("ale_py")
    with pytest.raises(ConfigError, match=r"env.observation_entries=\[0\] is not for env.family=atari"):
        make_env(EnvConfig(id="pong", family="atari", observation_entries=[0]), seed=0, num_envs=1)
