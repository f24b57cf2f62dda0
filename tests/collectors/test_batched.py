"""collector=batched: rollouts equal those of the vector collector, runs resume to the bit, and nothing waits."""

import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from lightning.pytorch.strategies import SingleDeviceStrategy
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from checks import metrics, same, with_value
from levin.collectors.batched import BatchedCollector, BatchedLoader
from levin.collectors.loader import CollectorLoader
from levin.collectors.vector import VectorCollector
from levin.config.compose import compose
from levin.core import rng
from levin.core.errors import ConfigError, NotFiniteError
from levin.core.network_input import NetworkInput
from levin.core.spaces import IS_FIRST, action_converter, describe_action, describe_space, tensor_action_converter
from levin.envs.config import EVALUATION, EnvConfig
from levin.envs.factory import make_env
from levin.training.session import build_run, train
from levin.training.trainer import build_trainer
from no_wait import NoWait
from rows import ROWS
from short_runs import check_resumed_run_is_identical

CARTPOLE = EnvConfig(
    id="CartPole-v1", family="torchrl", target="levin.envs.batched:CartPole", num_envs=6, time_limit=15
)
PENDULUM = EnvConfig(
    id="Pendulum-v1",
    family="torchrl",
    target="levin.envs.batched:Pendulum",
    num_envs=4,
    time_limit=9,
    action="rescale",
)


ONE_LINE = EnvConfig(id="line", family="torchrl", target="toy_torchrl:line", num_envs=1, kwargs={"batch": 1})


class Noisy(nn.Module):
    """Policy with random actions that depend on the observation; with `memory`, on `is_first` as well."""

    def __init__(self, size: int, *, discrete: bool, memory: bool = False) -> None:
        super().__init__()
        self.layer, self.discrete, self.memory = nn.Linear(size, 1), discrete, memory

    def forward(self, observation, is_first=None):
        value = self.layer(observation) + torch.randn(len(observation), 1)
        if self.memory:
            value = torch.where(is_first, torch.ones_like(value), value)
        action = (value.squeeze(-1) > 0).long() if self.discrete else torch.tanh(value)
        return (action, value) if self.memory else action


def noisy_policy(config: EnvConfig, *, memory: bool = False) -> TensorDictModule:
    """Return a policy for an env, always with the same parameters."""
    torch.manual_seed(5)
    env = make_env(config, seed=0, num_envs=1)
    module = Noisy(math.prod(env.observation["shape"]), discrete=env.action["type"] == "discrete", memory=memory)
    keys = ["observation", IS_FIRST] if memory else ["observation"]
    return TensorDictModule(module, in_keys=keys, out_keys=["action", "noise"] if memory else ["action"])


def collect(collector, rollouts: int = 3) -> list[TensorDict]:
    """Return the first rollouts of a collector, with the same random numbers for all."""
    rng.seed_everything(3, rank=0)
    iterator = iter(collector.iterator())
    return [next(iterator).clone() for _ in range(rollouts)]


@pytest.mark.parametrize("memory", [False, True], ids=["", "memory"])
@pytest.mark.parametrize("random_steps", [0, 20])
@pytest.mark.parametrize("config", [CARTPOLE, PENDULUM], ids=lambda each: each.id)
def test_rollouts_are_those_of_the_vector_collector(config, random_steps, memory):
    if memory and random_steps:
        pytest.skip("a policy with a second output can't be combined with random actions")
    policy = noisy_policy(config, memory=memory)
    options = {"steps": 25, "random_env_steps": random_steps}
    one = collect(BatchedCollector(make_env(config, seed=7), policy, **options))
    other = collect(VectorCollector(make_env(config, seed=7), policy, **options))
    assert sum(int(each["next", "done"].sum()) for each in other) > 10
    for mine, its in zip(one, other, strict=True):
        assert set(mine.keys(include_nested=True)) == set(its.keys(include_nested=True))
        for key, value in its.items(include_nested=True, leaves_only=True):
            assert mine[key].dtype == value.dtype
            assert torch.equal(mine[key], value), key


def test_an_episode_ends_with_its_true_last_observation():
    """The observation after a step of CartPole follows from the one before, also where the episode ends."""
    rollouts = collect(BatchedCollector(make_env(CARTPOLE, seed=0), noisy_policy(CARTPOLE), steps=40), 1)[0]
    position, velocity = rollouts["observation"][..., 0], rollouts["observation"][..., 1]
    torch.testing.assert_close(rollouts["next", "observation"][..., 0], position + 0.02 * velocity, atol=1e-6, rtol=0)
    done = rollouts["next", "done"][:, :-1, 0]
    follows = (rollouts["observation"][:, 1:] == rollouts["next", "observation"][:, :-1]).all(-1)
    assert torch.equal(follows, ~done)
    assert (rollouts["observation"][:, 1:][done].abs() <= 0.05).all()  # CartPole's first observations
    assert rollouts["next", "truncated"].any()
    assert rollouts["next", "terminated"].any()


def line(target: str, **options) -> EnvConfig:
    """Return the config of five envs of toy_torchrl."""
    target = f"toy_torchrl:{target}"
    return EnvConfig(id="line", family="torchrl", target=target, num_envs=5, kwargs={"batch": 5}, **options)


def test_an_env_may_reuse_the_tensors_that_it_returns():
    expected, got = (
        collect(BatchedCollector(make_env(config, seed=0), noisy_policy(ONE_LINE), steps=40))
        for config in (line("Line", time_limit=15), line("Reusing", time_limit=15))
    )
    assert sum(int(each["next", "done"].sum()) for each in expected) > 5
    for one, other in zip(expected, got, strict=True):
        assert same(one.flatten_keys().to_dict(), other.flatten_keys().to_dict())


def test_transforms_of_an_env_are_applied():
    """`transformed` counts steps and rewards, doubles the observation, and truncates after 20 steps."""
    config = line("transformed")
    rollout = collect(BatchedCollector(make_env(config, seed=0), noisy_policy(ONE_LINE), steps=60), 1)[0]
    after = rollout["next"]
    torch.testing.assert_close(after["reward"], -after["observation"].abs() / 2)
    open_length = torch.zeros(5)
    for t in range(60):
        open_length += 1
        assert torch.equal(after["truncated"][:, t, 0], open_length == 20)
        open_length[after["done"][:, t, 0]] = 0
    assert after["truncated"].any()


@pytest.mark.parametrize("config", [CARTPOLE, PENDULUM], ids=lambda each: each.id)
def test_nothing_waits_for_the_device_within_a_rollout(config, monkeypatch):
    collector = BatchedCollector(make_env(config, seed=0), noisy_policy(config, memory=True), steps=30)
    expected = collect(BatchedCollector(make_env(config, seed=0), noisy_policy(config, memory=True), steps=30))
    rng.seed_everything(3, rank=0)
    collector.begin()
    monkeypatch.setattr(collector, "looks_at_done", False)  # as on a GPU
    for each in expected:
        with NoWait():
            rollout = collector.rollout()
        assert same(rollout.flatten_keys().to_dict(), each.flatten_keys().to_dict())
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWait():
        collector.pop_totals()


@pytest.mark.parametrize("config", [CARTPOLE, PENDULUM], ids=lambda each: each.id)
def test_a_compiled_step_gives_the_same_rollout(config):
    policy = noisy_policy(config)
    plain, compiled = (
        collect(BatchedCollector(make_env(config, seed=0), policy, steps=30, compile=each), 2) for each in (False, True)
    )
    for one, other in zip(plain, compiled, strict=True):
        for key, value in one.items(include_nested=True, leaves_only=True):
            torch.testing.assert_close(value, other[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("algo", ["dqn", "ddpg", pytest.param("recurrent_ppo", marks=pytest.mark.slow)])
def test_the_step_of_an_algorithm_can_be_compiled(algo, monkeypatch):
    """As one graph, but with a backend that is faster to compile and keeps the numbers."""
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **_: torch_compile(step, fullgraph=True, backend="aot_eager"))
    env = "Pendulum" if algo == "ddpg" else "CartPole"
    words = [*BATCHED, f"algo={algo}", f"env.target=levin.envs.batched:{env}", "algo.steps_per_iteration=32"]
    words += ["algo.noise=ornstein_uhlenbeck"] if algo == "ddpg" else []
    words += ["algo.learning_starts=0"] if algo != "recurrent_ppo" else []
    found = []
    for compiled in ("false", "true"):
        _, loader = build_run(compose([*words, f"algo.compile={compiled}"]))
        rng.seed_everything(3, rank=0)
        found.append([next(loader).clone() for _ in range(2)])
    for one, other in zip(*found, strict=True):
        for key, value in one.items(include_nested=True, leaves_only=True):
            torch.testing.assert_close(value, other[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("algo", ["dqn", "recurrent_ppo"])
def test_metrics_and_counts_are_those_of_the_vector_collector(algo, tmp_path):
    """Also `step_count`, which these algorithms do not read, and rewards that are not whole numbers."""
    overrides = [f"algo={algo}", "env=gym", "env.id=x", "env.family=torchrl", "env.num_envs=4", "env.time_limit=9"]
    overrides += ["+env.target=levin.envs.batched:CartPole", "algo.steps_per_iteration=32"]
    found = []
    for name in ("vector", "batched"):
        _, loader = build_run(compose([*overrides, f"collector={name}"]))
        loader.step_count = True
        if isinstance(loader, BatchedLoader):
            loader.collector.step_count = True
        rows = []
        for _ in range(3):
            rollout = next(loader)
            numbers = loader.pop_metrics()
            del numbers["time/collect"]
            rows.append((numbers, rollout["step_count"].clone(), rollout["policy_version"].clone()))
        found.append(rows)
    for (numbers, count, version), (other, its_count, its_version) in zip(*found, strict=True):
        assert numbers == pytest.approx(other)
        assert numbers["episode/count"] >= 8
        assert torch.equal(count, its_count)
        assert torch.equal(version, its_version)


SMALL = ("logger=csv", "eval.episodes=2", "eval.every=200", "checkpoint.every=130", "log_every=90")
PPO = (
    *("algo=ppo", "algo.steps_per_iteration=8", "algo.batch_size=16", "algo.hidden_sizes=[8]", "algo.epochs=2"),
    "algo.schedule_env_steps=640",
)
BATCHED = ("collector=batched", "env=torchrl", "env.num_envs=4", "env.time_limit=30")
OWN = (*BATCHED, "env.target=levin.envs.batched:CartPole")


def test_a2c_weights_steps_by_their_number(tmp_path):
    words = [*OWN, *SMALL, "algo=a2c", "algo.discount_state_weighting=true", "algo.hidden_sizes=[8]"]
    train(compose([*words, "algo.steps_per_iteration=8", "total_env_steps=96"]), tmp_path / "run")


def test_a_resumed_run_is_identical(tmp_path):
    check_resumed_run_is_identical(tmp_path, (*PPO, *OWN, *SMALL), 640)


@pytest.mark.parametrize("target", ["declared", "declared_and_transformed"])
@pytest.mark.parametrize("kind", ["state_spec", "buffers"])
def test_an_env_that_declares_its_state_resumes_exactly(kind, target, tmp_path):
    env = (*BATCHED, f"env.target=toy_torchrl:{target}", f"+env.kwargs.kind={kind}", "env.action=rescale")
    check_resumed_run_is_identical(tmp_path, (*PPO, *env, *SMALL), 640)


def test_an_env_that_declares_nothing_begins_new_episodes(tmp_path):
    from levin import resume

    env = (*BATCHED, "env.target=toy_torchrl:line", "+env.kwargs.batch=4", "eval.episodes=4")
    train(compose([*PPO, *SMALL, *env, "total_env_steps=320"]), tmp_path / "run")
    with pytest.warns(UserWarning, match="does not declare its state"):
        resume.resume(run=str(tmp_path / "run"), total_env_steps=640)
    assert [int(row["env_steps"]) for row in metrics(tmp_path / "run")][-1] == 640


def test_new_episodes_after_a_resume_have_a_new_seed():
    config = EnvConfig(id="line", family="torchrl", target="toy_torchrl:line", num_envs=3, kwargs={"batch": 3})
    policy = TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["action"])
    first = BatchedCollector(make_env(config, seed=0), policy, steps=10)
    collect(first)
    second = BatchedCollector(make_env(config, seed=0), policy, steps=10)
    with pytest.warns(UserWarning, match="does not declare its state"):
        second.load_state_dict(first.state_dict())
    seeds = []
    second.env.set_seed = seeds.append
    second.begin()
    assert seeds == [second.vector_env.episode_seed_of(0, 30)]


NESTED = EnvConfig(id="nested", family="torchrl", target="toy_torchrl:nested", num_envs=3)


def test_a_nested_state_may_have_a_reward_and_an_end_of_its_own():
    policy = TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["action"])
    rollout = collect(BatchedCollector(make_env(NESTED, seed=0), policy, steps=20), 1)[0]
    moved = rollout["observation"] + 0.1 * rollout["action"]
    torch.testing.assert_close(rollout["next", "observation"], moved, atol=1e-6, rtol=0)
    assert rollout["next", "done"].squeeze(-1).nonzero()[:, 1].tolist() == [7, 15] * 3


def test_an_env_that_does_not_save_its_random_numbers_does_not_repeat_them():
    """It continues its open episodes after a resume, and draws those to come from a seed not used before."""
    policy = TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["action"])
    first = BatchedCollector(make_env(NESTED, seed=0), policy, steps=10)
    one = collect(first, 1)[0]
    second = BatchedCollector(make_env(NESTED, seed=0), policy, steps=10)
    second.load_state_dict(first.state_dict())
    two = collect(second, 1)[0]
    assert torch.equal(two["observation"][:, 0], one["next", "observation"][:, -1])
    assert not torch.isin(two["observation"][:, 6], one["observation"][:, [0, 8]]).any()  # first of an episode


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_numbers_that_are_not_finite_end_the_run(what):
    collector = BatchedCollector(make_env(CARTPOLE, seed=0), noisy_policy(CARTPOLE), steps=5)
    loader = BatchedLoader(collector, collector.vector_env, lambda: 0)
    step = collector.env._step

    def broken(tensordict):
        after = step(tensordict)
        after[what][2] = float("nan")
        return after

    next(loader)
    loader.pop_metrics()
    collector.env._step = broken
    next(loader)
    message = r"CartPole-v1 gave .* that is not finite, or a discrete value outside its space: env 2"
    for read in (loader.pop_metrics, loader.state_dict):
        with pytest.raises(NotFiniteError, match=message):
            read()


def test_a_run_with_nan_names_the_env(tmp_path, monkeypatch):
    monkeypatch.setattr("levin.envs.batched.CartPole.observe", lambda _, state: (state / 0 * 0).float())
    message = "gave an observation or a reward that is not finite, or a discrete value outside its space: env 0"
    with pytest.raises(NotFiniteError, match=message):
        train(compose([*PPO, *OWN, *SMALL, "total_env_steps=640"]), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*/state.ckpt"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("env=cartpole",), "collector=batched steps the envs of one batched TorchRL env"),
        (("env=torchrl", "env.target=toy_torchrl:line", "env.num_envs=2"), r"makes 2 envs of the batch size \[\]"),
        ((*OWN[1:], "algo=reinforce"), "REINFORCE learns from whole episodes"),
    ],
)
def test_what_the_collector_can_not_do_is_refused(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_run(compose(["algo=ppo", "collector=batched", *overrides]))


UNSUPPORTED = {
    "reinforce": "learns from whole episodes",
    "a3c": "collector=batched is not for trainer.strategy=hogwild",
    "world_models": "WorldModels reads pixels",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.algo)
def test_every_algorithm_trains_with_it_or_says_why_not(row, tmp_path):
    env = "Pendulum" if row.env in ("pendulum", "gym", "inverted_pendulum") else "CartPole"
    units = ["env.action=rescale"] if env == "Pendulum" else []
    words = [f"algo={row.algo}", *BATCHED, f"env.target=levin.envs.batched:{env}", *units, *row.small, *SMALL]
    words += ["env.num_envs=2", f"total_env_steps={row.env_steps}"]
    if row.algo in UNSUPPORTED:
        with pytest.raises(ConfigError, match=UNSUPPORTED[row.algo]):
            build_run(compose(words))
        return
    train(compose(words), tmp_path / "run")
    last = metrics(tmp_path / "run")[-1]
    assert int(last["env_steps"]) >= row.env_steps
    assert int(last["updates"]) > 0


def test_ranks_divide_the_envs_and_have_other_episodes(monkeypatch):
    words = [*PPO, *OWN, "env.num_envs=8", "trainer.devices=2", "trainer.accelerator=cpu"]
    starts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        _, loader = build_run(compose(words))
        assert isinstance(loader, BatchedLoader)
        assert next(loader).shape == (4, 8)
        starts.append(loader.collector.env.initial_states(torch.arange(4), torch.zeros(4, dtype=torch.int64)))
    assert not torch.isin(*starts).any()


def test_the_evaluation_has_as_many_envs_as_it_needs():
    env = make_env(CARTPOLE, seed=0, purpose=EVALUATION, num_envs=3)
    assert env.num_envs == 3
    assert len(env.env.envs) == 1


def test_evaluations_play_the_same_episodes_again():
    """Also after all episodes have ended at once."""
    env = make_env(PENDULUM, seed=0, purpose=EVALUATION, num_envs=4)
    first = env.begin([0] * 4, np.ones(4, bool))
    for _ in range(9):
        _, _, _, truncated, _ = env.step(np.zeros((4, 1), np.float32))
    assert truncated.all()
    second, _ = env.reset(options={"reset_mask": truncated})
    assert not np.array_equal(first, second)
    assert np.array_equal(env.begin([0] * 4, np.ones(4, bool)), first)


def test_the_device_of_the_policy_is_checked():
    collector = BatchedCollector(make_env(CARTPOLE, seed=0), noisy_policy(CARTPOLE), steps=5)
    collector.env._device = torch.device("cuda")
    with pytest.raises(ConfigError, match="the env is on cuda, but the policy on cpu"):
        collector.begin()


def test_a_gpu_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", property(lambda _: torch.device("cuda")))
    config = compose([*PPO, *OWN])
    _, rollouts = build_run(config)
    assert isinstance(rollouts, CollectorLoader)
    trainer, *_ = build_trainer(config, tmp_path, rollouts.env.config, lambda *_: rollouts)
    assert trainer.strategy.root_device.type == "cuda"
    with pytest.raises(ConfigError, match="collector=torchrl runs only on the CPU"):
        build_trainer(with_value(config, "collector", "torchrl"), tmp_path, rollouts.env.config, lambda *_: rollouts)


UNEQUAL = Box(np.array([-1, 0], np.float32), np.array([3, 5], np.float32))
SPACES = {
    "vector": Box(-1, 1, (3,)),
    "scalar": Box(-1, 1, ()),
    "discrete": Discrete(4),
    "choices": MultiDiscrete([2, 3]),
    "bits": MultiBinary(5),
    "image": Box(0, 255, (8, 9, 3), np.uint8),
    "grey": Box(0, 255, (8, 9), np.uint8),
    "parts": Dict({"a": Box(-1, 1, (2,)), "b": Discrete(3), "c": Box(0, 255, (3, 8, 9), np.uint8)}),
    "vectors": Dict({"a": Box(-1, 1, (2,)), "b": Box(-1, 1, (1, 2))}),
}


@pytest.mark.parametrize("name", SPACES)
def test_tensors_are_converted_as_arrays(name):
    space = SPACES[name]
    read = NetworkInput(describe_space(space))
    batch = [space.sample() for _ in range(6)]
    if isinstance(space, Dict):
        arrays = {key: np.stack([each[key] for each in batch]) for key in space.spaces}
        tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    else:
        arrays = np.stack(batch)
        tensors = torch.from_numpy(arrays)
    expected, got = read(arrays), read.tensors(tensors)
    if not isinstance(expected, dict):
        expected, got = {"": expected}, {"": got}
    assert expected.keys() == got.keys()
    for key in expected:
        np.testing.assert_array_equal(expected[key], got[key].numpy())
        assert read.is_identity or str(got[key].dtype).removeprefix("torch.") == expected[key].dtype.name


@pytest.mark.parametrize("units", ["rescale", "clip", "none"])
@pytest.mark.parametrize(
    "space", [Box(-2, 2, (3,)), Box(-1, 1, (2,)), Box(np.array([-1.0, 0.0]), np.array([3.0, 5.0]))]
)
def test_actions_are_converted_as_arrays(space, units):
    described = describe_action(space)
    actions = torch.randn(50, *space.shape) * 2
    expected = action_converter(described, units)(actions.numpy())
    got = tensor_action_converter(described, units, torch.device("cpu"))(actions)
    np.testing.assert_array_equal(expected, got.numpy())
