"""Envs of users that use global generators, write into arrays, return odd values or fail when they are closed."""

import json
import os
import re

import gymnasium as gym
import numpy as np
import pytest
import torch

import levin
from checks import metrics, same, saved_state
from levin import evaluate, resume
from levin.collectors.episodes import evaluate as evaluate_policy
from levin.config.compose import compose
from levin.core import rng
from levin.core.errors import ConfigError, RunError
from levin.core.spaces import random_actions
from levin.envs.config import EVALUATION, EnvConfig
from levin.envs.factory import make_env
from levin.runs import checkpoint
from levin.training.session import train
from short_runs import assert_identical_runs

SAC = (
    *("algo=sac", "env=gym", "env.action=rescale", "algo.steps_per_iteration=8", "algo.learning_starts=64"),
    *("algo.batch_size=16", "algo.hidden_sizes=[16]", "total_env_steps=256", "eval.episodes=2", "logger=csv"),
    "algo.replay_ratio=0.25",
)


def careless(how: str, *more: str) -> list[str]:
    return [*SAC, "env.id=careless_envs:Careless-v0", f"+env.kwargs.how={how}", *more]


def learned(run):
    """Return the parameters of a run, and all its transitions."""
    state = saved_state(run)
    return {**state["state_dict"], **state["buffer"]["data"]}


@pytest.mark.parametrize("how", ["seeds", "draws"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_env_that_uses_the_global_generators_is_independent_of_evaluations(how, num_envs, tmp_path):
    for every in (40, 100_000):
        train(compose(careless(how, f"eval.every={every}", f"env.num_envs={num_envs}")), tmp_path / str(every))
    assert same(learned(tmp_path / "40"), learned(tmp_path / "100000"))


@pytest.mark.parametrize("how", ["seeds", "draws"])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_env_that_uses_the_global_generators_resumes_exactly(how, vectorization, tmp_path):
    words = careless(how, "env.num_envs=2", f"env.vectorization={vectorization}", "checkpoint.every=64")
    train(compose(words), tmp_path / "straight")
    train(compose([*words, "total_env_steps=144"]), tmp_path / "halves")
    resume.resume(run=str(tmp_path / "halves"), total_env_steps=256)
    assert_identical_runs(tmp_path / "straight", tmp_path / "halves")


@pytest.mark.parametrize("how", ["", "seeds", "draws"])
def test_steps_and_resets_leave_the_global_generators_alone(how):
    before = rng.Generators()
    env = make_env(EnvConfig(id="careless_envs:Careless-v0", num_envs=2, kwargs={"how": how}), seed=0)
    env.reset()
    for _ in range(100):
        _, _, _, truncated, _ = env.step(np.zeros((2, 1), np.float32))
        if truncated.any():
            env.reset(options={"reset_mask": truncated})
    assert rng.Generators() == before
    assert env.env.separated == bool(how)
    env.close()


def test_generators_that_are_used_late_are_noticed(monkeypatch):
    env = make_env(EnvConfig(id="careless_envs:Careless-v0", num_envs=1, kwargs={"how": ""}), seed=0)
    env.reset()
    for step in range(600):
        if step == 200:
            env.env.envs[0].unwrapped.how = "draws"
        _, _, _, truncated, _ = env.step(np.zeros((1, 1), np.float32))
        if truncated.any():
            env.reset(options={"reset_mask": truncated})
    assert env.env.separated


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("units", ["rescale", "clip", "none"])
def test_an_env_that_writes_into_its_action_changes_nothing(units, repeat, tmp_path):
    words = (f"env.action={units}", f"env.action_repeat={repeat}")
    for how in ("''", "writes"):
        train(compose(careless(how, *words)), tmp_path / how)
    assert same(learned(tmp_path / "''"), learned(tmp_path / "writes"))


def test_stacked_frames_of_an_env_that_draws_into_one_array_are_those_of_their_steps():
    env = make_env(EnvConfig(id="careless_envs:Canvas-v0", frame_stack=3), seed=0)
    env.reset()
    for _ in range(4):
        observation, *_ = env.step(np.zeros(1, np.int64))
    assert observation.reshape(3, 2)[:, 0].tolist() == [2, 3, 4]
    env.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("repeat", [1, 2])
def test_arrays_of_one_number_are_numbers(vectorization, repeat, tmp_path):
    words = ("env.num_envs=2", f"env.vectorization={vectorization}", f"env.action_repeat={repeat}")
    for how in ("''", "arrays"):
        train(compose(careless(how, *words)), tmp_path / how)
    assert same(learned(tmp_path / "''"), learned(tmp_path / "arrays"))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_reward_of_several_numbers_is_a_one_line_error(vectorization, tmp_path):
    with pytest.raises(RunError, match=r"reward has the shape \(2,\): an env returns one number.*env 0, step 1"):
        train(compose(careless("several", f"env.vectorization={vectorization}", "env.num_envs=2")), tmp_path / "run")


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.filterwarnings("ignore:close")
def test_an_env_that_fails_when_closed_costs_nothing(vectorization, tmp_path):
    train(compose(careless("close", f"env.vectorization={vectorization}", "env.num_envs=2")), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["env_steps"] == 256
    assert metrics(tmp_path / "run")[-1]["eval/return_mean"]
    evaluate.evaluate_run(run=str(tmp_path / "run"), episodes=3)
    assert (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("discrete", "the observation is 5, outside its space, which has 1 to 4; env 0, step 3 of episode 0, seed "),
        ("multi", "entry 1 of the observation is 4, outside its space, which has 0 to 3; env 0, step 3"),
        ("dict", "the observation is 4, outside its space, which has 0 to 3; env 0, step 3"),
    ],
)
def test_a_state_that_its_space_does_not_have_ends_the_run(kind, sentence, tmp_path):
    words = ["algo=dqn", "env=gym", "env.id=careless_envs:Outside-v0", f"+env.kwargs.kind={kind}", "logger=csv"]
    with pytest.raises(RunError, match=re.escape(sentence)):
        train(compose(words), tmp_path / "run")


def test_an_evaluation_that_is_not_finite_is_a_one_line_error(tmp_path):
    env = make_env(EnvConfig(id="careless_envs:Careless-v0", kwargs={"how": "nan"}), seed=0, purpose=EVALUATION)
    cfg = compose(careless("''"))
    train(cfg, tmp_path / "run")
    policy = evaluate.load_algorithm(tmp_path / "run").policy(deterministic=True)
    with pytest.raises(RunError, match=r"gave nan, not finite, in an evaluation: env 0, step 1 of episode 1, seed \d+"):
        evaluate_policy(policy, env, 2)


def test_the_best_checkpoint_has_a_finite_return(tmp_path, monkeypatch):
    returns = iter([float("nan"), -5.0, -3.0, -9.0, -8.0])
    monkeypatch.setattr("levin.training.evaluation.evaluate", lambda *_: ([next(returns)], [1]))
    words = careless("''", "eval.every=64", "checkpoint.every=64", "checkpoint.keep=1")
    train(compose(words), tmp_path / "run")
    assert [each.name for each in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")] == ["192", "256"]


# --- actions

BIG = float(np.finfo(np.float32).max)


def test_whole_numbers_in_a_box_are_refused(tmp_path):
    words = [*SAC, "env.id=careless_envs:Bounds-v0", "+env.kwargs={low:0,high:10,dtype:int64}"]
    with pytest.raises(ConfigError, match=r"Box of int64, whole numbers.*use Discrete or MultiDiscrete"):
        train(compose(words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algo", ["sac", "ppo"])
@pytest.mark.parametrize("units", ["rescale", "clip"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_actions_have_the_dtype_and_the_bounds_of_the_env(algo, units, dtype, tmp_path):
    words = [f"env.action={units}", "env.id=careless_envs:Bounds-v0", f"+env.kwargs={{low:0.1,high:0.3,dtype:{dtype}}}"]
    small = SAC if algo == "sac" else ("algo=ppo", "env=gym", "algo.steps_per_iteration=64", "algo.batch_size=32")
    train(compose([*small, *words, "total_env_steps=128", "logger=csv"]), tmp_path / "run")
    policy, space = levin.load(tmp_path / "run"), gym.spaces.Box(0.1, 0.3, (1,), np.dtype(dtype).type)
    for observation in (-1e6, 0, 1e6):  # also actions at the bounds
        action = policy(np.array([observation]))
        assert action.dtype == dtype
        assert space.contains(action)


@pytest.mark.parametrize(("low", "high"), [("-.inf", ".inf"), (-BIG, BIG), (5, ".inf"), ("-.inf", -5)])
def test_rescale_needs_bounds(low, high, tmp_path):
    words = [*SAC, "env.id=careless_envs:Bounds-v0", f"+env.kwargs={{low:{low},high:{high}}}".replace(".inf", "inf")]
    with pytest.raises(ConfigError, match=r"env\.action=rescale needs finite action bounds"):
        train(compose(words), tmp_path / "run")


@pytest.mark.filterwarnings("ignore:the actions of")
@pytest.mark.parametrize("units", ["clip", "none"])
@pytest.mark.parametrize(("low", "high"), [(-BIG, BIG), (5, "inf"), ("-inf", -5), (0, "inf")])
def test_random_actions_lie_within_the_bounds_that_exist(low, high, units, tmp_path):
    words = [*SAC, f"env.action={units}", "env.id=careless_envs:Bounds-v0", f"+env.kwargs={{low:{low},high:{high}}}"]
    train(
        compose([*words, "algo.learning_starts=256", "eval.episodes=1"]), tmp_path / "run"
    ) if units == "clip" else None
    env = make_env(
        EnvConfig(id="careless_envs:Bounds-v0", action=units, kwargs={"low": float(low), "high": float(high)}), seed=0
    )
    env.reset()
    for action in random_actions(env.single_action_space, 1, 20)[0]:
        env.step(action[None])
    env.close()


def test_bounds_outside_the_range_of_a_policy_are_a_warning():
    with pytest.warns(UserWarning, match=r"exclude \(-1, 1\).*set env.action=rescale"):
        make_env(EnvConfig(id="careless_envs:Bounds-v0", action="clip", kwargs={"low": 5, "high": 9}), seed=0).close()


# --- observations


def test_a_single_number_can_be_stacked_and_copies_may_have_other_bounds():
    env = make_env(EnvConfig(id="careless_envs:Number-v0", frame_stack=3, num_envs=2), seed=0)
    env.reset()
    for _ in range(4):
        observation, *_ = env.step(np.zeros(2, np.int64))
    assert observation.tolist() == [[2, 3, 4], [2, 3, 4]]
    env.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("lock", r"raised RuntimeError: \('no device', <unlocked"),
        ("arguments", "raised UnicodeDecodeError: 'utf-8' codec can't decode byte"),
        ("length", r"shape \(1,\), not \(4,\)"),
        ("order", r"shape \(3, 2, 2\), not \(2, 2, 3\)"),
        ("kind", "float64"),
    ],
)
def test_what_is_wrong_in_a_step_is_one_sentence(what, sentence, vectorization):
    """Also of errors that don't survive the way to another process, and of observations that would be cast."""
    config = EnvConfig(id="careless_envs:Wrong-v0", num_envs=2, vectorization=vectorization, kwargs={"what": what})
    env = make_env(config, seed=0)
    env.reset()
    with pytest.raises(RunError, match=f"the step of careless_envs:Wrong-v0 .*{sentence}"):
        env.step(np.zeros(2, np.int64))
    env.close()


def test_a_mask_of_other_numbers_than_0_and_1_is_refused():
    env = make_env(EnvConfig(id="careless_envs:Wrong-v0", action_mask="info", kwargs={"what": "mask"}), seed=0)
    with pytest.raises(RunError, match=r"the action mask holds 0\.5; valid: 1 for allowed actions, else 0"):
        env.reset()


def test_each_env_has_arguments_of_its_own():
    kwargs = {"what": "", "goals": [1, 2, 3]}
    env = make_env(EnvConfig(id="careless_envs:Wrong-v0", num_envs=2, kwargs=kwargs), seed=0)
    first, second = (each.unwrapped for each in env.base.envs)
    first.goals.pop()
    assert (second.goals, kwargs["goals"]) == ([1, 2, 3], [1, 2, 3])
    env.close()


def test_an_env_with_a_render_mode_of_its_own_can_be_drawn():
    config = EnvConfig(id="careless_envs:Wrong-v0", kwargs={"what": "", "render_mode": "human"})
    env = make_env(config, seed=0, render=True)
    assert env.base.envs[0].unwrapped.render_mode == "rgb_array"
    env.close()


class Alone(gym.Env):
    """Env that can be built in one process only."""

    observation_space, action_space = gym.spaces.Box(0, 1, (2,), np.float32), gym.spaces.Discrete(2)
    process = os.getpid()

    def __init__(self):
        assert os.getpid() == self.process, "the port is in use"


def test_an_env_that_one_process_only_can_build_is_named():
    gym.register("Alone-v0", Alone, max_episode_steps=10)
    with pytest.raises(ConfigError, match=r"env.id=Alone-v0 can't be built in 2 processes at once.*set env.vector"):
        make_env(EnvConfig(id="Alone-v0", num_envs=2, vectorization="async"), seed=0)


class Counted(gym.Env):
    """Env that counts in each process how many are open."""

    observation_space, action_space = gym.spaces.Box(0, 1, (2,), np.float32), gym.spaces.Discrete(2)
    made = opened = 0

    def __init__(self):
        Counted.made, Counted.opened = Counted.made + 1, Counted.opened + 1

    def close(self):
        Counted.opened -= 1


def test_async_envs_leave_no_open_env_in_this_process(monkeypatch):
    monkeypatch.setattr(Counted, "made", 0)
    monkeypatch.setattr(Counted, "opened", 0)
    gym.register("Counted-v0", Counted, max_episode_steps=10)
    make_env(EnvConfig(id="Counted-v0", num_envs=4, vectorization="async"), seed=0).close()
    assert Counted.made == 2  # one for a clear error, one by Gymnasium to read the spaces
    assert Counted.opened == 0


METHODS = ("type", "values", "float", "eval", "keys", "items", "forward", "training")


@pytest.mark.parametrize("name", [*METHODS, "front/left", "a b"])
def test_a_picture_may_have_the_name_of_a_method_of_a_module_or_no_name_of_python(name, tmp_path):
    words = ["algo=dqn", "env=gym", "env.id=careless_envs:NamedPicture-v0", f"+env.kwargs.name='{name}'", "logger=csv"]
    words += ["algo.hidden_sizes=[8]", "total_env_steps=64", "eval.episodes=1", "algo.learning_starts=32"]
    train(compose([*words, "algo.batch_size=4", "algo.buffer_size=100"]), tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"), total_env_steps=150)
    assert torch.isfinite(torch.cat([each.flatten() for each in learned(tmp_path / "run").values()])).all()
    observation = {name: np.zeros((36, 36, 3), np.uint8), "b": np.zeros(2, np.float32)}
    assert levin.load(tmp_path / "run")(observation) in (0, 1)


# --- extremes

ONE_STEP = ("env=gym", "env.id=careless_envs:OneStep-v0", "algo.gamma=1", "logger=csv", "eval.episodes=2")
SINGLE = ("algo.batch_size=1", "algo.steps_per_iteration=1", "env.num_envs=1", "total_env_steps=20")
FEW = ("algo.batch_size=16", "algo.steps_per_iteration=16", "total_env_steps=64")
EXTREMES = {
    "one transition per batch": SINGLE,
    "one action": (*FEW, "+env.kwargs.actions=1"),
    "large rewards": (*FEW, "+env.kwargs.reward=1e30"),
}


@pytest.mark.parametrize("algo", ["ppo", "trpo"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_episodes_of_one_step_and_other_extremes_train_with_finite_numbers(algo, extreme, tmp_path):
    train(compose([f"algo={algo}", *ONE_STEP, *EXTREMES[extreme]]), tmp_path / "run")
    assert all(value.isfinite().all() for value in saved_state(tmp_path / "run")["state_dict"].values())
    rows = metrics(tmp_path / "run")
    assert rows[-1]["train/critic_loss"]
    assert np.isfinite([float(value) for row in rows for value in row.values() if value]).all()
