"""TorchRL collectors with several worker processes, and TorchRL envs."""

import csv
import importlib.util
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

import toy_torchrl
from checks import same
from failures import FAILING, complete_checkpoints, run_and_fail
from levin import resume
from levin.collectors.factory import make_collector
from levin.collectors.loader import CollectorLoader
from levin.collectors.workers import AFTER, WorkersCollector
from levin.config.compose import compose
from levin.core import distributed, files
from levin.core.errors import ConfigError
from levin.core.spaces import IS_FIRST
from levin.data.rollout import ENV_INDEX, POLICY_VERSION
from levin.envs.config import EVALUATION, EnvConfig
from levin.envs.factory import describe_env, make_env
from levin.envs.vector import SeededVectorEnv
from levin.nn.exploration import GaussianNoise, NoisyPolicy
from levin.training.session import build_run, train
from policies import Linear
from processes import start_python
from short_runs import SMALL

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
LOCAL = ["torchrl-process", "torchrl-async"]
ALL = [*LOCAL, pytest.param("ray", marks=[needs_ray, pytest.mark.slow])]


@pytest.fixture
def make_workers():
    """Return a function that builds collectors with two workers, which are shut down after the test."""
    made = []

    def build(name: str, env_id: str, num_envs: int, steps: int, module: nn.Module, **kwargs) -> WorkersCollector:
        env = make_env(EnvConfig(id=env_id, num_envs=num_envs, kwargs=kwargs.pop("env", {})), seed=0)
        keys = kwargs.pop("keys", ["observation"])
        policy = TensorDictModule(module, in_keys=keys, out_keys=["action"])
        options = {"random_env_steps": 0, "seed": 0, "version": lambda: 0, "workers": 2} | kwargs
        made.append(WorkersCollector(name, env, policy, steps=steps, **options))
        return made[-1]

    yield build
    for each in made:
        each.shutdown()


def by_env(batches: list[TensorDict], num_envs: int) -> list[TensorDict]:
    """Return all transitions of each env in order, from rollouts that may hold any of the envs."""
    rows: list[list[TensorDict]] = [[] for _ in range(num_envs)]
    for batch in batches:
        for row, env in enumerate(batch[ENV_INDEX][:, 0, 0].tolist()):
            rows[env].append(batch[row])
    return [torch.cat(each) for each in rows]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("env_id", "discrete"), [("CartPole-v1", True), ("Pendulum-v1", False)])
def test_all_collectors_yield_the_same_transitions(name, env_id, discrete, make_workers):
    collector = make_workers(name, env_id, 4, 25, Linear(discrete))
    rollouts = collector.iterator()
    batches = [next(rollouts) for _ in range(4 if name != "torchrl-async" else 12)]
    shape = (2, 25) if name == "torchrl-async" else (4, 25)
    assert {batch.shape for batch in batches} == {shape}
    env = make_env(EnvConfig(id=env_id, num_envs=4), seed=0, copy=False)
    policy = TensorDictModule(Linear(discrete), in_keys=["observation"], out_keys=["action"])
    expected = make_collector("vector", env, policy, steps=300).rollout()
    assert bool(expected["next", "done"].any())
    keys = ("observation", "action", *(("next", key) for key in AFTER))
    for i, actual in enumerate(by_env(batches, 4)):
        if len(actual) < 25:
            assert name == "torchrl-async"  # all rollouts may come from the other worker
        assert set(actual.keys(True, True)) == {*keys, POLICY_VERSION, ENV_INDEX}
        for key in keys:
            assert actual[key].dtype == expected[key].dtype, key
            torch.testing.assert_close(actual[key], expected[key][i, : len(actual)], rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_actions_match_the_weights_of_their_policy_version(name, make_workers):
    module, weights, lags = Linear(), [], []
    collector = make_workers(name, "Pendulum-v1", 4, 16, module, version=lambda: len(weights))
    rollouts = collector.iterator()
    for iteration in range(10):
        with torch.no_grad():
            module.weight.fill_(0.1 + 0.2 * iteration)
        batch = next(rollouts)
        weights.append(module.weight.item())
        version = batch[POLICY_VERSION]
        assert version.shape == (*batch.shape, 1)
        assert version.dtype == torch.int64
        acted = torch.tensor(weights)[version]  # [N, T, 1]
        expected = torch.sin(batch["observation"].sum(-1, keepdim=True) * acted)
        torch.testing.assert_close(batch["action"], expected)
        lags += [iteration - each for each in version.unique().tolist()]
        with torch.no_grad():  # as an update does, while a worker may be collecting
            for _ in range(100):
                module.weight.mul_(1.01)
    if name == "torchrl-async":
        assert 0 < max(lags) < 10
        assert lags[-1] < 9  # workers receive new weights
    else:
        assert lags == [0] * 10


@pytest.mark.parametrize("name", LOCAL[:1])
def test_the_seed_determines_actions_and_observations(name, make_workers):
    def collect(seed):
        policy = NoisyPolicy(Linear(), GaussianNoise(0.3))
        rollouts = make_workers(name, "Pendulum-v1", 4, 10, policy, seed=seed, random_env_steps=20).iterator()
        return torch.cat([next(rollouts) for _ in range(3)], 1)

    first, again, other = collect(0), collect(0), collect(1)
    assert bool((first == again).all())
    assert not bool((first["action"] == other["action"]).any())
    for i in range(3):  # no two envs are alike
        assert not bool((first["action"][i] == first["action"][i + 1]).any())
        assert not bool((first["observation"][i] == first["observation"][i + 1]).any())


@pytest.mark.parametrize("name", LOCAL)
def test_random_actions_of_all_workers_stop_after_random_env_steps(name, make_workers):
    collector = make_workers(name, "Pendulum-v1", 4, 8, Linear(), random_env_steps=40)  # ten vector steps
    rollouts = collector.iterator()
    data = by_env([next(rollouts) for _ in range(8)], 4)
    for each in data:
        same_action = torch.isclose(each["action"], torch.sin(each["observation"].sum(-1, keepdim=True) * 0.1))
        assert not bool(same_action[:10].any())
        assert bool(same_action[10:].all())
        assert float(each["action"].abs().max()) <= 2.0
    assert sum(len(each) for each in data) > 4 * 10


@pytest.mark.parametrize("name", LOCAL)
def test_episode_statistics_of_workers(name, make_workers):
    collector = make_workers(name, "toy_envs:Counting-v0", 4, 7, Linear(), env={"length": 3})
    loader = CollectorLoader(collector, collector.env, lambda: 0)
    ended = [next(loader)["next", "done"].sum() for _ in range(10)]
    row = loader.pop_metrics()
    assert row["episode/return"] == 6.0
    assert row["episode/length"] == 3.0
    assert row["episode/count"] == sum(ended)
    assert row["collect/policy_lag"] == 0.0
    assert "collect/policy_lag" not in loader.pop_metrics()
    assert sum(collector.env.episodes) == sum(ended)


class Scripted:
    """Collector that yields given rollouts."""

    def __init__(self, *rollouts: TensorDict) -> None:
        self.iterator = lambda: iter(rollouts)


def test_a_reward_that_is_not_finite_is_attributed_to_the_right_env():
    env = make_env(EnvConfig(id="Pendulum-v1", num_envs=4), seed=0)
    env.reset()
    env.episodes[3] = 6
    flags = torch.zeros(2, 5, 1, dtype=torch.bool)
    done = flags.clone()
    done[1, 3] = True  # the current episode, 6, starts after the NaN
    after = {"observation": torch.zeros(2, 5, 1), "reward": torch.zeros(2, 5, 1), "done": done}
    index = torch.tensor([2, 3]).view(2, 1, 1).expand(2, 5, 1)
    rollout = TensorDict({"observation": torch.zeros(2, 5, 1), "next": after, ENV_INDEX: index}, (2, 5))
    rollout["next", "reward"][1, 2] = torch.nan
    loader = CollectorLoader(Scripted(rollout), env, lambda: 0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=f"env 3, step 3 of episode 5, seed {env.episode_seed_of(3, 5)}"):
        next(loader)


class First(nn.Module):
    """Policy whose action is `is_first`."""

    def forward(self, observation: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
        return is_first.float()


def test_policies_can_read_is_first(make_workers):
    rollouts = make_workers(
        "torchrl-process", "toy_envs:Counting-v0", 4, 7, First(), keys=["observation", IS_FIRST]
    ).iterator()
    data = torch.cat([next(rollouts) for _ in range(3)], 1)
    assert torch.equal(data["action"].squeeze(-1) == 1, data["observation"][..., 1] == 0)
    assert int(data["action"].sum()) == 4 * 5


@pytest.mark.parametrize("name", LOCAL)
def test_no_episode_is_repeated_after_a_resume(name, make_workers):
    def build():
        collector = make_workers(name, "Pendulum-v1", 4, 30, NoisyPolicy(Linear(), GaussianNoise(0.3)))
        return CollectorLoader(collector, collector.env, lambda: 0)

    first, second = build(), build()
    before = [next(first) for _ in range(20)]
    state = first.state_dict()
    second.load_state_dict(state)
    after = next(second)
    fresh = make_env(EnvConfig(id="Pendulum-v1", num_envs=4), seed=0)
    expected = fresh.begin([episode + 1 for episode in state["episodes"]], np.ones(4, dtype=bool))
    index = after[ENV_INDEX][:, 0, 0]
    np.testing.assert_array_equal(after["observation"][:, 0], expected[index])
    for env, each in enumerate(by_env(before, 4)):
        assert state["episodes"][env] == len(each) // 200
    noise = [rollout["action"] - torch.sin(rollout["observation"].sum(-1, keepdim=True) * 0.1) for rollout in before]
    drawn = torch.cat([each.flatten() for each in noise])
    again = (after["action"] - torch.sin(after["observation"].sum(-1, keepdim=True) * 0.1)).flatten()
    assert not torch.isin(again[again.abs() > 1e-3], drawn).any()


REFUSED = [
    (["env.num_envs=3"], "env.num_envs=3 can't be shared among collector_workers=2: set env.num_envs=4"),
    (["env.num_envs=1"], "env.num_envs=1 can't be shared among collector_workers=2: set env.num_envs=2"),
    (["env.num_envs=2", "collector_workers=4"], "set env.num_envs=4"),
    (["env.num_envs=2", "env.vectorization=async"], "set env.vectorization=sync"),
    (["env.num_envs=2", "env.normalize_reward=true"], "set env.normalize_reward=false"),
    (["algo.n_step=3", "env.num_envs=2"], "algo.n_step=3 needs the transitions of an env in their order"),
    (["algo=ddpg", "algo.noise=ornstein_uhlenbeck", "env.num_envs=2"], "set algo.noise=gaussian"),
    (["algo=dreamer", "env=pendulum", "env.num_envs=2"], "a policy with a memory can't be sent to the workers"),
    (["algo=ppo", "env.num_envs=2"], "PPO learns from rollouts of its current policy"),
    (["algo=reinforce", "env.num_envs=1", "collector_workers=1"], "whole episodes need collector=vector"),
    (
        ["env=torchrl", "env.target=toy_torchrl:line", "+env.kwargs.batch=4", "env.num_envs=4"],
        "makes 4 envs at once, and collector_workers=2 have 2 each: set env.num_envs=8",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_settings_that_workers_cannot_use_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_run(compose(["env=pendulum", "collector=torchrl-async", *overrides]))


def test_a_missing_ray_package_is_a_config_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="collector=ray needs a package"):
        build_run(compose(["env=pendulum", "collector=ray", "env.num_envs=2"]))


def test_hogwild_refuses_collectors_with_workers():
    overrides = ["algo=a3c", "env=cartpole", "collector=torchrl-process", "env.num_envs=2", "trainer.strategy=hogwild"]
    with pytest.raises(ConfigError, match="which has its own workers"):
        compose(overrides)


def children() -> set[str]:
    """Return the pids of the child processes of the tests."""
    pids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    # Python starts its resource tracker with the first semaphore and keeps it.
    return {each for each in pids if b"resource_tracker" not in Path(f"/proc/{each}/cmdline").read_bytes()}


@pytest.mark.parametrize("name", ALL)
def test_sac_trains_and_resumes(name, tmp_path):
    before = children()
    overrides = [*SMALL, f"collector={name}", "env.num_envs=4", "algo.steps_per_iteration=8", "total_env_steps=192"]
    train(compose(overrides), tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        lags = [float(row["collect/policy_lag"]) for row in csv.DictReader(file) if row["collect/policy_lag"]]
    assert max(lags) > 0 if name == "torchrl-async" else set(lags) == {0.0}
    resume.resume(run=str(tmp_path / "run"), total_env_steps=384)
    state = files.load(tmp_path / "run" / "checkpoints" / "last" / "state.ckpt")
    assert state["levin"]["env_steps"] == 384
    assert state["levin"]["updates"] == 384 - 40
    assert children() <= before


def test_ppo_gets_rollouts_of_its_current_policy(tmp_path):
    overrides = [
        "algo=ppo",
        "env=cartpole",
        "collector=torchrl-process",
        "env.num_envs=2",
        "logger=csv",
        "log_every=64",
    ]
    overrides += ["algo.steps_per_iteration=32", "algo.batch_size=32", "total_env_steps=192", "eval.episodes=1"]
    train(compose(overrides), tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert {float(row["collect/policy_lag"]) for row in csv.DictReader(file) if row["collect/policy_lag"]} == {0.0}


TWO = ("env.num_envs=2", "algo.steps_per_iteration=16", "checkpoint.every=64", "total_env_steps=640")
ENDS = [
    ("raise", (), "the step of toy_envs:Failing-v0 raised ZeroDivisionError: the cart has left the track"),
    ("hang", ("env.timeout=1.5",), "did not come back within env.timeout=1.5 seconds"),
    ("die", (), "ended with exit code -9"),
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("end", ENDS, ids=[failure for failure, _, _ in ENDS])
def test_a_failing_worker_ends_the_run_with_a_one_line_error(name, end, tmp_path, monkeypatch, capfd):
    failure, overrides, message = end
    before, begin = children(), time.monotonic()
    overrides = (*SMALL, *FAILING, *TWO, f"collector={name}", f"+env.kwargs.how={failure}", *overrides)
    error = run_and_fail(overrides, tmp_path / "run", monkeypatch, capfd)
    if name == "ray" and failure != "raise":
        assert "a worker of 2 (collector=ray, toy_envs:Failing-v0): died, or did not come back" in error
    else:
        assert message in error
        assert f"of 2 (collector={name}, toy_envs:Failing-v0)" in error
    if failure == "raise":
        assert "toy_envs.py" in (tmp_path / "run" / "traceback.txt").read_text()
    assert complete_checkpoints(tmp_path / "run")
    assert children() <= before
    assert time.monotonic() - begin < 60


def processes_of_session(leader: int) -> list[str]:
    """Return the state of every process in the session of a leader."""
    states = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, _, session, *_ = file.read_text().rpartition(")")[2].split()
            states += [state] if int(session) == leader else []
    return states


@pytest.mark.parametrize(
    ("name", "signum"),
    [
        ("torchrl-async", signal.SIGKILL),
        pytest.param("torchrl-process", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("torchrl-process", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("torchrl-async", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("ray", signal.SIGINT, marks=[needs_ray, pytest.mark.slow]),
    ],
)
def test_a_signal_ends_all_processes_of_a_run(name, signum, tmp_path):
    run = tmp_path / "run"
    overrides = [*SMALL, f"collector={name}", "env.num_envs=2", "total_env_steps=1_000_000", f"run={run}"]
    process = start_python("-m", "levin.train", *overrides, start_new_session=True, stdout=None, stderr=None)
    while not (run / "checkpoints" / "last").exists():
        assert process.poll() is None
        time.sleep(0.1)
    if signum == signal.SIGKILL:
        process.kill()  # the workers get no signal
    else:
        os.killpg(process.pid, signum)
    assert process.wait(60) == (-signum if signum == signal.SIGKILL else 0)
    assert complete_checkpoints(run)
    for _ in range(100):
        alive = [each for each in processes_of_session(process.pid) if "Z" not in each]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive


# --- env.family: torchrl ---------------------------------------------------------------------------------------------


def torchrl_env(target: str, num_envs: int = 1, seed: int = 0, **kwargs) -> SeededVectorEnv:
    """Make a vector env of a target in toy_torchrl.py."""
    name = f"toy_torchrl:{target}"
    config = EnvConfig(id=name, family="torchrl", target=name, num_envs=num_envs, kwargs=kwargs)
    return make_env(config, seed=seed)


@pytest.mark.parametrize("target", ["line", "transformed"])
@pytest.mark.parametrize("batch", [None, 3])
def test_the_adapter_equals_the_wrapped_torchrl_env(target, batch):
    env = torchrl_env(target, batch or 1, batch=batch)
    plain = getattr(toy_torchrl, target)(batch=batch)
    actions = torch.linspace(-0.5, 0.5, 10 * (batch or 1)).view(10, -1, 1)
    observation, _ = env.reset()
    seed = env.episode_seed_of(0, 0)
    torch.manual_seed(seed)
    plain.set_seed(seed)
    now = plain.reset()
    steps = 0
    for action in actions:
        np.testing.assert_array_equal(observation, now["observation"].view(batch or 1, 1))
        observation, reward, terminated, truncated, _ = env.step(action.numpy())
        after = plain.step(now.set("action", action if batch else action[0]))
        np.testing.assert_array_equal(observation, after["next", "observation"].view(batch or 1, 1))
        np.testing.assert_array_equal(reward, after["next", "reward"].flatten())
        np.testing.assert_array_equal(terminated, after["next", "terminated"].flatten())
        np.testing.assert_array_equal(terminated | truncated, after["next", "done"].flatten())
        steps += 1
        if terminated.any() or truncated.any():
            break
        now = plain.step_mdp(after)
    assert steps > 3


@pytest.mark.parametrize("batch", [None, 2])
def test_only_finished_envs_are_reset_and_step_limits_truncate(batch):
    env = torchrl_env("transformed", 4, batch=batch, max_steps=5)
    env.reset()
    length, counts = np.zeros(4, int), {"terminated": 0, "truncated": 0}
    for _ in range(60):
        observation, _, terminated, truncated, _ = env.step(np.full((4, 1), 0.05, np.float32))
        length += 1
        done = terminated | truncated
        assert (truncated == (length == 5)).all()
        counts["terminated"] += int((terminated & ~truncated).sum())
        counts["truncated"] += int(truncated.sum())
        if done.any():
            restarted, _ = env.reset(options={"reset_mask": done})
            np.testing.assert_array_equal(restarted[~done], observation[~done])
            assert (restarted[done] != observation[done]).all()
            length[done] = 0
    assert min(counts.values()) > 0


@pytest.mark.parametrize("batch", [None, 2])
def test_a_time_limit_truncates(batch):
    name = "toy_torchrl:transformed"  # has a step counter of its own, with another limit
    kwargs = {"batch": batch, "max_steps": 50}
    config = EnvConfig(id=name, family="torchrl", target=name, num_envs=2, time_limit=4, kwargs=kwargs)
    env = make_env(config, seed=0)
    env.reset()
    length = np.zeros(2, int)
    for _ in range(30):
        _, _, terminated, truncated, _ = env.step(np.zeros((2, 1), np.float32))
        length += 1
        assert (truncated == (length == 4)).all()
        if (terminated | truncated).any():
            observation, _ = env.reset(options={"reset_mask": terminated | truncated})
            assert observation.shape == (2, 1)
            length[terminated | truncated] = 0


@pytest.mark.parametrize("kind", ["serial", pytest.param("parallel", marks=pytest.mark.slow)])
def test_resetting_one_env_does_not_change_the_others(kind):
    """Seeding a `SerialEnv` would reset all of its envs."""
    env = torchrl_env("poles", 2, kind=kind)
    observation, _ = env.reset()
    ended = 0
    for step in range(60):
        before = observation
        observation, _, terminated, _, _ = env.step(np.array([1, step % 2]))  # only the first pole falls
        np.testing.assert_allclose(observation[:, 0], before[:, 0] + 0.02 * before[:, 1], atol=1e-6)
        if terminated.any():
            last = observation
            observation, _ = env.reset(options={"reset_mask": terminated})
            np.testing.assert_array_equal(observation[~terminated], last[~terminated])
            assert (np.abs(observation[terminated]) <= 0.05).all()
            ended += int(terminated.sum())
    assert ended > 3
    env.close()


def test_envs_have_their_own_random_stream():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    env = torchrl_env("line", 2)
    env.reset()
    env.step(np.zeros((2, 1), np.float32))
    env.reset()
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("choices", ["categorical", "one_hot"])
def test_discrete_actions_are_integers(choices):
    env = torchrl_env("line", 2, choices=choices)
    assert describe_env(env)["action"]["n"] == 3
    before, _ = env.reset()
    after = env.step(np.array([0, 2]))[0]
    np.testing.assert_allclose(after - before, [[-0.5], [0.5]], atol=0.05)


def test_the_number_of_evaluation_envs_is_rounded_up_to_whole_batches():
    name = "toy_torchrl:line"
    config = EnvConfig(id=name, family="torchrl", target=name, num_envs=2, kwargs={"batch": 2})
    env = make_env(config, seed=0, purpose=EVALUATION, num_envs=3)
    assert env.num_envs == 4
    assert env.reset()[0].shape == (4, 1)


def test_several_vectors_are_concatenated():
    env = torchrl_env("line", 2, parts=True)
    observation, _ = env.reset()
    assert describe_env(env)["observation"]["shape"] == [3]
    np.testing.assert_allclose(observation[:, 1:], 2 * observation[:, :1].repeat(2, 1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.target=toy_torchrl:missing"], "env.target=toy_torchrl:missing can't be imported"),
        (["env.target=toy_torchrl:nothing"], "makes a int, not a torchrl.envs.EnvBase"),
        (["env.target=toy_torchrl:line", "+env.kwargs.batch=3"], "makes 3 envs at once: set env.num_envs=3"),
        (["env.target=toy_torchrl:line", "env.pixels=64"], "env.pixels is not for env.family=torchrl"),
        (["env.target=toy_torchrl:line", "+env.kwargs.colour=red"], "toy_torchrl:line can't be made: TypeError"),
        (["env.target=toy_torchrl:missing_package"], "needs a package that is missing .No module named 'simulator'"),
        (["env.target=toy_torchrl:NUMBER"], "toy_torchrl:NUMBER can't be made: TypeError"),
        (
            ["env.target=toy_torchrl:broken"],
            "toy_torchrl:broken can't be made: AssertionError: no wheels .toy_torchrl.py, line [0-9]+",
        ),
        (["env.target=toy_torchrl:line", "env.frame_stack=2"], "env.frame_stack is not for env.family=torchrl"),
        (["env.target=toy_torchrl:line", "env.action_repeat=2"], "env.action_repeat is not for env.family=torchrl"),
        (["env.target=toy_torchrl:line", "env.vectorization=async"], "set collector=torchrl-process"),
        ([], "env.target has no value"),
        (["env=pendulum", "+env.target=toy_torchrl:line"], "env.target=toy_torchrl:line is for env.family=torchrl"),
        (["env=pendulum", "env.family=torchrl"], "needs env.target=my_module:make_env"),
    ],
)
def test_invalid_settings_of_torchrl_envs_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_run(compose(["algo=sac", "env=torchrl", *overrides]))


PPO = ("algo=ppo", "logger=csv", "log_every=64", "algo.steps_per_iteration=16", "algo.batch_size=16")


@pytest.mark.parametrize("collector", ["vector", "torchrl", "torchrl-process"])
@pytest.mark.parametrize("overrides", [SMALL, (*PPO, "+env.kwargs.batch=2")])
def test_algorithms_train_in_torchrl_envs(collector, overrides, tmp_path):
    overrides = [
        *overrides,
        "env=torchrl",
        "env.target=toy_torchrl:transformed",
        f"collector={collector}",
        "env.num_envs=4",
    ]
    train(compose([*overrides, "total_env_steps=256", "eval.every=128", "eval.episodes=2"]), tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row["eval/return_mean"] for row in rows)
    lengths = [float(row["episode/length"]) for row in rows if row["episode/length"]]
    assert 0 < max(lengths) <= 20


def test_an_unbatched_torchrl_env_resumes_exactly(tmp_path):
    overrides = [
        *SMALL,
        "env=torchrl",
        "env.target=toy_torchrl:transformed",
        "env.num_envs=2",
        "algo.steps_per_iteration=7",
    ]
    train(compose([*overrides, "total_env_steps=140"]), tmp_path / "straight")
    train(compose([*overrides, "total_env_steps=70"]), tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"), total_env_steps=140)
    states = [files.load(tmp_path / name / "checkpoints" / "last" / "state.ckpt") for name in ("straight", "run")]
    assert same(states[0]["state_dict"], states[1]["state_dict"])


def test_the_workers_of_every_rank_have_envs_and_streams_of_their_own(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        env = make_env(EnvConfig(id="Pendulum-v1"), seed=0, num_envs=4, rank=rank)
        policy = SimpleNamespace(in_keys=["observation"])
        collector = WorkersCollector(
            "torchrl-process", env, policy, steps=4, random_env_steps=0, seed=0, version=int, workers=2
        )
        shares += [collector._worker_share(worker) for worker in range(2)]
    assert [share.rank for share in shares] == [0, 0, 1, 1]
    assert sorted(share.stream for share in shares) == [2, 3, 4, 5]  # 0 and 1 are the streams of the ranks
