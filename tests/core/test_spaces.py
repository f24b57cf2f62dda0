"""Observation spaces become a vector, pixels or both; actions may be MultiDiscrete."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array
from tensordict.nn import TensorDictModule
from torch import nn

import levin
import toy_envs
from checks import same, saved_state
from levin.collectors.factory import make_collector
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.core.network_input import NetworkInput
from levin.core.spaces import action_converter, describe_action, describe_space, to_gym
from levin.envs.config import EnvConfig
from levin.envs.factory import make_env
from levin.envs.single import make_single_env
from levin.nn.distributions import MultiCategorical
from levin.training.session import build_run, train
from short_runs import SMALL, check_resumed_run_is_identical

NUMBERS = {
    "discrete": Discrete(4, start=2),
    "multi discrete": MultiDiscrete([3, 2]),
    "multi discrete, later start": MultiDiscrete([3, 2], start=[1, -1]),
    "dict": Dict({"b": Box(-1, 1, (2, 3)), "a": Discrete(3), "scalar": Box(-1, 1, ()), "on": MultiBinary(3)}),
    "tuple": Tuple([Box(-1, 1, (2,)), MultiDiscrete([2, 4])]),
    "a number": Box(-1, 1, ()),
    "nested": Dict({"arm": Dict({"q": Box(-1, 1, (2,)), "grip": Discrete(2)}), "base": Tuple([Box(0, 1, (1,))])}),
    "a dict of bytes": Dict({"memory": Box(0, 255, (5,), np.uint8)}),
}


def batch_of(space: gym.Space, num: int):
    """Return `num` samples of a space, and the same samples as a batch."""
    space.seed(0)
    samples = [space.sample() for _ in range(num)]
    return samples, concatenate(space, samples, create_empty_array(space, num))


@pytest.mark.parametrize("space", NUMBERS.values(), ids=NUMBERS.keys())
def test_numbers_are_flattened_as_in_gymnasium(space):
    samples, batch = batch_of(space, 7)
    read = NetworkInput(describe_space(space))
    observation = read.space
    expected = np.stack([gym.spaces.flatten(space, sample) for sample in samples]).astype(np.float32)
    assert observation["shape"] == list(expected.shape[1:])
    assert read(batch).dtype == np.float32
    np.testing.assert_array_equal(read(batch), expected)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        *(((5, 6, 3), (3, 5, 6)), ((3, 5, 6), (3, 5, 6)), ((5, 6), (1, 5, 6)), ((4, 84, 84), (4, 84, 84))),
        *(((84, 84, 6), (6, 84, 84)), ((84, 84, 2), (2, 84, 84)), ((64, 64, 40), (40, 64, 64))),
        *(((6, 84, 84), (6, 84, 84)), ((7, 7, 3), (3, 7, 7)), ((1, 1, 3), (3, 1, 1)), ((4, 4, 3), (3, 4, 4))),
        *(((6, 84, 100), (6, 84, 100)), ((84, 100, 6), (6, 84, 100)), ((12, 210, 160), (12, 210, 160))),
    ],
)
def test_pixels_become_channel_first(shape, expected):
    space = Box(0, 255, shape, np.uint8)
    samples, batch = batch_of(space, 3)
    read = NetworkInput(describe_space(space))
    observation = read.space
    assert tuple(observation["shape"]) == expected
    assert observation["dtype"] == "uint8"
    seen = read(batch)
    assert seen.shape == (3, *expected)
    channel = samples[1].reshape(expected)[0] if len(shape) == 2 or shape == expected else samples[1][..., 0]
    np.testing.assert_array_equal(seen[1][0], channel)


def test_pixels_of_policies_saved_by_older_versions_are_read_as_before():
    older = {"type": "box", "shape": [12, 36, 40], "dtype": "uint8", "low": [], "high": [], "n": 0, "start": 0}
    assert NetworkInput(older).space["shape"] == [12, 36, 40]
    assert NetworkInput({**older, "shape": [36, 40, 3]}).space["shape"] == [3, 36, 40]


@pytest.mark.parametrize(("channels", "expected"), [("first", (40, 48, 64)), ("last", (64, 40, 48))])
def test_pixels_that_are_not_recognised_need_the_axis_of_their_channels(channels, expected):
    space = Box(0, 255, (40, 48, 64), np.uint8)
    with pytest.raises(ConfigError, match=r"\[40, 48, 64\], which may be .* set env.channels=first or"):
        NetworkInput(describe_space(space))
    samples, batch = batch_of(space, 3)
    read = NetworkInput(describe_space(Dict({"a": space}), channels))
    assert tuple(read.space["shape"]) == expected
    channel = samples[1][0] if channels == "first" else samples[1][..., 0]
    np.testing.assert_array_equal(read({"a": batch})[1][0], channel)


def test_a_flat_box_of_bytes_is_a_vector():
    assert describe_space(Box(0, 255, (128,), np.uint8))["dtype"] == "float32"


def test_a_dict_is_split_into_pixels_and_one_vector():
    space = Dict({"eye": Dict({"left": Box(0, 255, (5, 6, 1), np.uint8)}), "x": Box(-1, 1, (2,)), "n": Discrete(3)})
    samples, batch = batch_of(space, 4)
    read = NetworkInput(describe_space(space))
    observation = read.space
    seen = read(batch)
    assert {name: part["shape"] for name, part in observation["spaces"].items()} == {
        "eye_left": [1, 5, 6],
        "vector": [5],
    }
    np.testing.assert_array_equal(seen["eye_left"][2, 0], samples[2]["eye"]["left"][..., 0])
    np.testing.assert_array_equal(seen["vector"][2], [*np.eye(3)[samples[2]["n"]], *samples[2]["x"]])
    assert batch_space(to_gym(observation), 4).contains(seen)


def test_parts_of_the_same_name_are_refused():
    space = Dict({"vector": Box(0, 255, (5, 6, 1), np.uint8), "x": Box(-1, 1, (2,))})
    with pytest.raises(ConfigError, match="same name"):
        NetworkInput(describe_space(space))


@pytest.mark.parametrize("space", [Box(-1, 1, (3,)), Box(-1, 1, (3, 4)), MultiBinary(4)])
def test_a_box_of_numbers_is_not_converted(space):
    read = NetworkInput(describe_space(space))
    assert (read.space, read.is_identity) == (describe_space(space), True)


@pytest.mark.parametrize("shape", [(4, 84, 84, 3), (2, 2, 2, 2, 2)])
def test_bytes_in_four_dimensions_are_refused(shape):
    with pytest.raises(ConfigError, match=r"to stack frames, set env\.frame_stack"):
        describe_space(Dict({"camera": Box(0, 255, shape, np.uint8)}))


class Seer(nn.Module):
    """Deterministic policy that reads the pixels and the vector."""

    def __init__(self, pixels):
        super().__init__()
        self.pixels = pixels

    def forward(self, observation):
        bright = observation[self.pixels].float().mean((1, 2, 3)) / 255
        return (observation["vector"].sum(-1) - bright).sin().mul(0.5).unsqueeze(-1)


@pytest.mark.parametrize(
    ("pixels", "part"),
    [("camera", "camera"), *((name, f"{name}_pixels") for name in ("observation", "action", "done", "is_first"))],
)
def test_both_collectors_yield_the_same_dict_observations(pixels, part):
    data = {}
    for name in ("vector", "torchrl"):
        env = make_env(
            EnvConfig(id="toy_envs:Robot-v0", num_envs=2, kwargs={"pixels": pixels}), seed=0, copy=name != "vector"
        )
        policy = TensorDictModule(Seer(part), in_keys=["observation"], out_keys=["action"])
        collector = make_collector(name, env, policy, steps=60)
        iterator = iter(collector.iterator())
        data[name] = torch.cat([next(iterator).clone() for _ in range(2)], 1)
        collector.shutdown()
    vector, torchrl = data["vector"], data["torchrl"]
    assert bool(vector["next", "terminated"].any())
    assert bool(vector["next", "truncated"].any())
    assert vector["observation", part].shape == (2, 120, 3, 36, 36)
    assert vector["observation", part].dtype == torch.uint8
    assert vector["observation", "vector"].shape == (2, 120, 5)
    for key in vector.keys(include_nested=True, leaves_only=True):
        assert torch.equal(vector[key], torchrl[key]), key


ROBOT = ("env=gym", "env.id=toy_envs:Robot-v0")
TINY = ("algo.batch_size=8", "algo.replay_ratio=0.25", "algo.steps_per_iteration=8")


@pytest.mark.parametrize(
    "overrides",
    [TINY, (*TINY, "algo.buffer_storage=memmap", "env.num_envs=2"), (*TINY, "algo.n_step=3", "env.num_envs=2")],
    ids=["one", "memmap", "n-step"],
)
def test_sac_reads_a_dict_and_resumes_exactly(overrides, tmp_path):
    common = *SMALL, *ROBOT, "env.action=rescale", "eval.every=50", "checkpoint.every=60", "algo.buffer_size=1000"
    check_resumed_run_is_identical(tmp_path, (*common, *overrides), 128)


@pytest.mark.parametrize("algo", ["td3", "ddpg", "ppo", "a2c"])
def test_other_algorithms_read_a_dict(algo, tmp_path):
    overrides = [
        f"algo={algo}",
        *ROBOT,
        "total_env_steps=64",
        "eval.every=64",
        "eval.episodes=1",
        "checkpoint.every=64",
    ]
    overrides += ["algo.hidden_sizes=[8]", "logger=csv", "env.num_envs=1", "algo.steps_per_iteration=16"]
    overrides += ["env.normalize_observation=false"] if algo == "ppo" else []
    overrides += [] if algo == "a2c" else ["algo.batch_size=16"]
    if algo in ("td3", "ddpg"):
        overrides += ["algo.learning_starts=16", "algo.buffer_size=100", "algo.replay_ratio=0.25"]
    before, _ = build_run(compose(overrides))
    start = {key: value.clone() for key, value in before.state_dict().items()}
    train(compose(overrides), tmp_path / "run")
    after = saved_state(tmp_path / "run")["state_dict"]
    parts = [key for key in start if "parts.camera" in key and key.endswith("0.weight") and "target" not in key]
    assert parts
    assert not any(torch.equal(start[key], after[key]) for key in parts)


def test_a_loaded_policy_takes_raw_observations(tmp_path):
    overrides = [*SMALL, *ROBOT, *TINY, "env.action=rescale", "total_env_steps=32", "eval.every=32"]
    overrides.append("algo.buffer_size=1000")  # a million such images exceed the memory
    train(compose(overrides), tmp_path / "run")
    policy = levin.load(tmp_path / "run")
    env = gym.make("toy_envs:Robot-v0")
    shown, _ = env.reset(seed=0)
    action = policy(shown)
    assert env.action_space.contains(action)
    again = {name: np.stack([part, part]) for name, part in shown.items()}
    np.testing.assert_allclose(policy(again), [action, action], atol=1e-6)


def test_multi_discrete_actions_are_independent():
    torch.manual_seed(0)
    sizes, logits, other_logits = [2, 3, 4], torch.randn(5, 9), torch.randn(5, 9)
    policy, other_policy = MultiCategorical(logits, sizes), MultiCategorical(other_logits, sizes)
    action = policy.sample()
    parts = [torch.distributions.Categorical(logits=part) for part in logits.split(sizes, -1)]
    other_parts = [torch.distributions.Categorical(logits=part) for part in other_logits.split(sizes, -1)]
    assert action.shape == (5, 3)
    expected = sum(part.log_prob(action[:, i]) for i, part in enumerate(parts))
    torch.testing.assert_close(policy.log_prob(action), expected.unsqueeze(-1))
    torch.testing.assert_close(policy.entropy(), sum(part.entropy() for part in parts).unsqueeze(-1))
    kl = sum(torch.distributions.kl_divergence(a, b) for a, b in zip(parts, other_parts, strict=True))
    torch.testing.assert_close(policy.kl(other_policy), kl.unsqueeze(-1))
    assert torch.equal(policy.mode, torch.stack([part.argmax(-1) for part in logits.split(sizes, -1)], -1))
    assert torch.equal(policy[torch.tensor([3, 1])].logits, logits[[3, 1]])
    many = MultiCategorical(logits[:1].expand(20_000, 9), sizes).sample()
    for i, part in enumerate(parts):
        share = torch.bincount(many[:, i], minlength=sizes[i]) / 20_000
        torch.testing.assert_close(share, part.probs[0], atol=0.02, rtol=0)


BUTTONS = ("env=gym", "env.id=toy_envs:Buttons-v0", "logger=csv", "eval.episodes=5")


ON_POLICY = ("reinforce", "actor_critic", "a2c", "a3c", "trpo", "ppo")


@pytest.mark.parametrize("algo", ON_POLICY)
def test_algorithms_train_with_multi_discrete_actions(algo, tmp_path):
    overrides = [
        f"algo={algo}",
        *BUTTONS,
        "total_env_steps=64",
        "eval.every=64",
        "checkpoint.every=64",
        "env.num_envs=1",
    ]
    overrides += [] if algo == "reinforce" else ["algo.steps_per_iteration=32"]
    overrides += ["algo.batch_size=32"] if algo in ("ppo", "trpo") else []
    before, _ = build_run(compose(overrides))
    start = {key: value.clone() for key, value in before.state_dict().items()}
    train(compose(overrides), tmp_path / "run")
    after = saved_state(tmp_path / "run")["state_dict"]
    assert not torch.equal(start["actor.network.0.weight"], after["actor.network.0.weight"])


@pytest.mark.parametrize(
    "algo", [pytest.param(each, marks=[] if each == "a2c" else pytest.mark.slow) for each in ON_POLICY]
)
def test_multi_discrete_actions_are_learned(algo, tmp_path):
    """Mean returns: about -10 without moving, -12 for uniformly random actions, -0.6 for the best policy."""
    overrides = [f"algo={algo}", *BUTTONS, "total_env_steps=12_000", "eval.every=12_000", "checkpoint.every=12_000"]
    overrides += {"ppo": ["algo.steps_per_iteration=64", "env.num_envs=4", "algo.batch_size=64"]}.get(algo, [])
    overrides += {"trpo": ["algo.steps_per_iteration=256"]}.get(algo, [])
    assert train(compose(overrides), tmp_path / "run") > -5


def test_random_multi_discrete_actions_are_uniform():
    env = make_env(EnvConfig(id="toy_envs:Buttons-v0"), seed=0, copy=False)
    policy = TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["action"])
    collector = make_collector("vector", env, policy, steps=3000, random_env_steps=3000)
    action = next(iter(collector.iterator()))["action"][0]
    for i, size in enumerate(toy_envs.Buttons.action_space.nvec):
        share = torch.bincount(action[:, i], minlength=int(size)) / 3000
        torch.testing.assert_close(share, torch.full((int(size),), 1 / int(size)), atol=0.04, rtol=0)


def test_images_are_stacked_channel_first():
    plain, stacked = (make_single_env(EnvConfig(id="toy_envs:Image-v0", frame_stack=n)) for n in (1, 3))
    assert plain.observation_space.shape == (8, 8, 3)
    assert stacked.observation_space.shape == (9, 8, 8)


def test_a_frame_stack_holds_the_last_frames():
    env = make_single_env(EnvConfig(id="toy_envs:Colour-v0", frame_stack=2))
    plain = make_single_env(EnvConfig(id="toy_envs:Colour-v0"))
    before, _ = plain.reset(seed=0)
    stack, _ = env.reset(seed=0)
    np.testing.assert_array_equal(stack, np.concatenate([before.transpose(2, 0, 1)] * 2))
    for action in (0.3, -0.2):
        now = plain.step(np.array([action], np.float32))[0]
        stack = env.step(np.array([action], np.float32))[0]
        np.testing.assert_array_equal(stack, np.concatenate([before.transpose(2, 0, 1), now.transpose(2, 0, 1)]))
        before = now


def test_the_same_seed_gives_the_same_run_on_a_dict(tmp_path):
    overrides = [*SMALL, *ROBOT, *TINY, "env.action=rescale", "total_env_steps=64", "eval.every=64"]
    overrides.append("algo.buffer_size=1000")
    for name in "ab":
        train(compose(overrides), tmp_path / name)
    assert same(saved_state(tmp_path / "a")["state_dict"], saved_state(tmp_path / "b")["state_dict"])


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-2, 4), (0, 1)])
def test_rescaled_actions_never_leave_the_bounds(low, high):
    """Gaussian policies and noise leave [-1, 1]; bounds of exactly -1 and 1 are no exception."""
    convert = action_converter(describe_action(Box(low, high, (2,))), "rescale")
    given = np.array([[-1.5, 1.5], [-1, 1], [0, 0.5]], np.float32)
    expected = np.clip(given, -1, 1) * (high - low) / 2 + (high + low) / 2
    np.testing.assert_allclose(convert(given), expected, rtol=1e-6)
