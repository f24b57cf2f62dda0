"""Batched classic control: equal to gymnasium bit for bit, restorable, and the same for every N and when compiled."""

import inspect
import math
import re
import textwrap

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import acrobot
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from levin.config.compose import compose
from levin.envs.batched import (
    Acrobot,
    BatchedEnv,
    CartPole,
    MountainCarContinuous,
    Pendulum,
    philox,
    uniforms,
    wrap_angle,
)
from levin.envs.torchrl import import_target
from no_wait import NoWait

IDS = {
    CartPole: "CartPole-v1",
    Pendulum: "Pendulum-v1",
    Acrobot: "Acrobot-v1",
    MountainCarContinuous: "MountainCarContinuous-v0",
}
CONFIGS = {
    CartPole: "cartpole_batched",
    Pendulum: "pendulum_batched",
    Acrobot: "acrobot_batched",
    MountainCarContinuous: "mountaincar_continuous_batched",
}
STEPS = 1000
every_env = pytest.mark.parametrize("make", list(IDS), ids=lambda make: make.__name__)


# Helpers


def advance(env: BatchedEnv, action: torch.Tensor) -> TensorDict:
    """Step without TorchRL's bookkeeping."""
    return env._step(TensorDict({"action": action}, batch_size=env.batch_size))


def begin(env: BatchedEnv, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Begin an episode in the envs of the mask `[N]`, or in all; return the observations."""
    given = None if mask is None else TensorDict({"_reset": mask.unsqueeze(-1)}, batch_size=env.batch_size)
    return env._reset(given)["observation"]


def random_actions(env: BatchedEnv, generator: torch.Generator) -> torch.Tensor:
    """Sample actions of all envs; a third of the continuous ones is out of bounds."""
    if env.actions is not None:
        return torch.randint(env.actions, (env.num_envs,), generator=generator)
    return (3 * torch.rand(env.num_envs, 1, generator=generator) - 1.5) * env.action_bound


def as_state(env: BatchedEnv, other: gym.Env) -> torch.Tensor:
    """Return the state of one of gymnasium's envs, `[S]`."""
    state = np.asarray(other.state)
    numbers = [*state.tolist(), *([float(state.dtype == np.float64)] if isinstance(env, MountainCarContinuous) else [])]
    return torch.tensor(numbers, dtype=torch.float64)


def choose_action(other: gym.Env, rng: np.random.Generator, t: int):
    """Choose an action that explores: random ones, ones that end episodes, and bounds as well as actions beyond."""
    state = np.asarray(other.state, dtype=np.float64)
    if isinstance(other, acrobot.AcrobotEnv):
        return int(rng.integers(3)) if t % 200 < 50 else int(1 + np.sign(state[3]))  # pumps energy
    if isinstance(other.action_space, gym.spaces.Discrete):
        return int(rng.integers(2)) if rng.random() < 0.4 else int(state[2] + 0.3 * state[3] > 0)  # balances
    bound = float(other.action_space.high[0])
    toward = 1.0 if state[1] >= 0 else -1.0  # drives faster: at the walls and the goal sooner
    choices = [rng.uniform(-1.5 * bound, 1.5 * bound), bound * rng.choice([-1, 1]), 3 * bound * toward, bound * toward]
    return np.array([choices[t // 50 % 4]], np.float32)


def record(make: type[BatchedEnv], other: gym.Env, steps: int):
    """Step one of gymnasium's envs; return its states `[steps + 1, S]`, and per step what it was given and returned."""
    env, rng = make(num_envs=1), np.random.default_rng(0)
    other.reset(seed=0)
    rows, states = [], []
    for t in range(steps):
        states.append(as_state(env, other))
        action = choose_action(other, rng, t)
        observation, reward, terminated, _, _ = other.step(action)
        after = as_state(env, other)
        rows.append((action, observation, np.float32(reward), terminated, after))
        if terminated or t % 300 == 299:
            other.reset()
    actions, observations, rewards, terminated, after = zip(*rows, strict=True)
    return torch.stack(states), torch.from_numpy(np.stack(actions)), observations, rewards, terminated, after


def with_squares_as_products(other: gym.Env) -> gym.Env:
    """Let gymnasium's Acrobot compute `x**2` as `x * x`, which the C library's `pow` rounds in another way at times."""
    source = textwrap.dedent(inspect.getsource(acrobot.AcrobotEnv._dsdt))
    products, count = re.subn(r"(\w+)\*\*2", r"(\1 * \1)", source)
    assert count == 10
    scope = dict(vars(acrobot))
    exec(products, scope)
    other._dsdt = scope["_dsdt"].__get__(other)
    return other


# Equality with gymnasium


@every_env
def test_every_step_from_the_state_of_gymnasium_is_gymnasiums(make):
    states, actions, observations, rewards, terminated, after = record(make, gym.make(IDS[make]).unwrapped, STEPS)
    env = make(num_envs=STEPS)
    env.state.copy_(states)
    got = advance(env, actions)
    np.testing.assert_array_equal(got["observation"].numpy(), np.stack(observations))
    np.testing.assert_array_equal(got["reward"][:, 0].numpy(), np.stack(rewards))
    np.testing.assert_array_equal(got["terminated"][:, 0].numpy(), np.stack(terminated))
    assert torch.equal(got["done"], got["terminated"])
    assert sum(terminated) > 1 or make is Pendulum
    # Also the float64 states, which are not shown; for Acrobot up to the rounding of squares.
    torch.testing.assert_close(env.state, torch.stack(after), rtol=0, atol=1e-13 if make is Acrobot else 0)


@every_env
def test_a_thousand_steps_in_a_row_are_gymnasiums(make):
    """The state is gymnasium's only at the beginning of an episode."""
    other = gym.make(IDS[make]).unwrapped
    other = with_squares_as_products(other) if make is Acrobot else other
    env, rng = make(num_envs=1), np.random.default_rng(0)
    other.reset(seed=0)
    env.state[0] = as_state(env, other)
    episodes = 1
    for t in range(STEPS):
        action = choose_action(other, rng, t)
        observation, reward, terminated, _, _ = other.step(action)
        got = advance(env, torch.from_numpy(np.asarray(action)[None]))
        np.testing.assert_array_equal(got["observation"][0].numpy(), observation)
        assert got["reward"].item() == np.float32(reward)
        assert got["terminated"].item() == terminated
        assert torch.equal(env.state[0], as_state(env, other))
        if terminated or t % 500 == 499:
            other.reset()
            env.state[0] = as_state(env, other)
            episodes += 1
    assert episodes > 3 or make is Pendulum


@every_env
def test_steps_from_extreme_states_are_gymnasiums(make):
    """At walls, at the largest velocities, many turns away from 0, where trajectories seldom come."""
    generator, num = torch.Generator().manual_seed(0), 500
    env, other = make(num_envs=num), gym.make(IDS[make]).unwrapped
    largest = {
        CartPole: [2.4, 5, 0.21, 5],
        Pendulum: [100, 8],
        Acrobot: [math.pi, math.pi, 4 * math.pi, 9 * math.pi],
        MountainCarContinuous: [1.2, 0.07, 0],
    }[make]
    states = (2 * torch.rand(num, env.variables, generator=generator, dtype=torch.float64) - 1) * torch.tensor(largest)
    if make is MountainCarContinuous:
        states = states.float().double().clamp(max=torch.tensor([0.6, 0.07, 0]).double())
    env.state.copy_(states)
    actions = random_actions(env, generator)
    got = advance(env, actions)
    for i in range(num):
        other.reset()
        other.state = states[i].numpy() if make is not MountainCarContinuous else states[i, :2].float().numpy()
        observation, reward, terminated, _, _ = other.step(
            actions[i].numpy() if env.actions is None else int(actions[i])
        )
        np.testing.assert_array_equal(got["observation"][i].numpy(), observation)
        assert (got["reward"][i].item(), got["terminated"][i].item()) == (np.float32(reward), terminated)


def test_angles_are_wrapped_as_in_gymnasium():
    angles = torch.linspace(-9, 9, 2001, dtype=torch.float64) * math.pi
    expected = [acrobot.wrap(angle, -math.pi, math.pi) for angle in angles.tolist()]
    assert wrap_angle(angles).tolist() == expected


class Given:
    """Stand-in for numpy's generator that draws given numbers in [0, 1)."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def uniform(self, low, high, size=None):
        """Scale as `numpy.random.Generator.uniform` does."""
        numbers = self.numbers if np.ndim(low) or size else self.numbers[0]
        return low + (high - low) * numbers


@every_env
def test_episodes_begin_as_in_gymnasium_with_the_same_random_numbers(make):
    numbers = np.random.default_rng(0).random((50, make.draws))
    env, other = make(num_envs=50), gym.make(IDS[make]).unwrapped
    states = env.initial(torch.from_numpy(numbers))
    observations = env.observe(states).numpy()
    for i in range(50):
        other._np_random = Given(numbers[i])
        observation, _ = other.reset()
        assert torch.equal(states[i], as_state(env, other))
        # Gymnasium's Acrobot computes this observation in float32.
        np.testing.assert_array_max_ulp(observations[i], observation, maxulp=1 if make is Acrobot else 0)


def test_numpys_generator_scales_as_given_does():
    numbers = np.random.default_rng(3).random(4)
    assert np.array_equal(np.random.default_rng(3).uniform(-0.05, 0.05, 4), Given(numbers).uniform(-0.05, 0.05, 4))


# Random numbers


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """The known answers are in `kat_vectors` of Random123, by the authors of the paper."""
    counter, key = (tuple(torch.tensor(int(word, 16)) for word in text.split()) for text in (counter, key))
    assert " ".join(f"{word.item():08x}" for word in philox(counter, key)) == words


def test_random_numbers_are_uniform_and_independent():
    env, episode = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    numbers = uniforms(torch.tensor(7), env, episode, 5)  # [200, 200, 5]
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert len(numbers.unique()) == numbers.numel()
    count = numbers.numel()
    expected = count / 100
    chi_square = ((torch.histc(numbers, 100, 0, 1) - expected) ** 2 / expected).sum()
    assert 60 < chi_square < 145  # 99 degrees of freedom: all but one of 400 samples
    other_seed = uniforms(torch.tensor(8), env, episode, 5)
    pairs = [(numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1]), (numbers[..., 1:], numbers[..., :-1])]
    pairs += [(numbers, other_seed), (numbers, numbers.transpose(0, 1))]
    for one, other in pairs[:-1]:
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 4 / math.sqrt(one.numel())
    off_diagonal = env != episode
    one, other = (part[off_diagonal].flatten() for part in pairs[-1])
    assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 4 * math.sqrt(2 / one.numel())


def test_the_whole_seed_and_the_whole_number_of_an_episode_count():
    def draw(seed: int, episode: int) -> float:
        return uniforms(torch.tensor(seed), torch.tensor(0), torch.tensor(episode), 1).item()

    assert len({draw(seed, episode) for seed in (0, 1, 2**32, 2**62) for episode in (0, 1, 2**32, 2**40)}) == 16


# Episodes


@every_env
def test_an_env_draws_its_episodes_from_its_own_numbers(make):
    env = make(num_envs=6)
    env.set_seed(11)
    generator = torch.Generator().manual_seed(0)
    expected = torch.full((6,), -1)
    mask = torch.ones(6, dtype=torch.bool)
    for _ in range(20):
        before = env.state.clone()
        begin(env, mask)
        expected += mask
        assert torch.equal(env.episode, expected)
        for i in range(6):
            drawn = env.initial_states(i, int(expected[i]))
            assert torch.equal(env.state[i], drawn if mask[i] else before[i])
        advance(env, random_actions(env, generator))
        mask = torch.rand(6, generator=generator) < 0.3
    assert len(set(expected.tolist())) > 2


def test_a_seed_begins_with_episode_0_again():
    env = CartPole(num_envs=3)
    assert env.episode.tolist() == [-1] * 3
    env.set_seed(2)
    first, second = begin(env), begin(env)
    assert not torch.isin(first, second).any()
    env.set_seed(3)
    assert env.episode.tolist() == [-1] * 3
    assert not torch.isin(begin(env), first).any()
    env.set_seed(2)
    assert torch.equal(begin(env), first)
    env.set_seed(None)
    assert torch.equal(begin(env), first)
    env.set_seed(2**64 - 1)  # the largest that torch takes
    assert env.seed.item() == -1
    assert CartPole.seeds_episodes


@every_env
def test_a_partial_reset_leaves_the_other_envs_alone(make):
    env, generator = make(num_envs=8), torch.Generator().manual_seed(0)
    now = env.reset()
    for _ in range(5):
        now = env.step_mdp(env.step(now.set("action", random_actions(env, generator))))
    before, observation = env.state.clone(), now["observation"].clone()
    mask = torch.tensor([True, False, True, False, False, False, False, True])
    alone = begin(env, mask)
    assert torch.equal(env.state[~mask], before[~mask])
    assert torch.equal(alone[~mask], observation[~mask])
    assert (env.state[mask] != before[mask]).any(-1).all()
    after = env.reset(now.set("_reset", mask.unsqueeze(-1)))  # through TorchRL
    assert torch.equal(after["observation"][~mask], observation[~mask])
    assert env.episode.tolist() == [2, 0, 2, 0, 0, 0, 0, 2]
    env.state.copy_(before)
    begin(env, torch.zeros(8, dtype=torch.bool))
    assert torch.equal(env.state, before)


@every_env
def test_envs_are_the_same_for_every_num_envs(make):
    envs = [make(num_envs=num) for num in (16, 7, 1)]
    for env in envs:
        env.set_seed(5)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(16, dtype=torch.bool)
    for _ in range(100):
        actions = random_actions(envs[0], generator)
        shown = [begin(env, mask[: env.num_envs]) for env in envs]
        after = [advance(env, actions[: env.num_envs]) for env in envs]
        for env, observation, step in zip(envs[1:], shown[1:], after[1:], strict=True):
            part = slice(env.num_envs)
            assert torch.equal(observation, shown[0][part])
            assert (step == after[0][part]).all()
            assert torch.equal(env.state, envs[0].state[part])
        mask = torch.rand(16, generator=generator) < 0.1


@every_env
def test_a_saved_env_continues_exactly(make):
    env, generator = make(num_envs=4), torch.Generator().manual_seed(0)
    env.set_seed(9)
    begin(env)

    def play(env: BatchedEnv, generator: torch.Generator) -> list[TensorDict]:
        """Take steps and begin episodes."""
        shown = []
        for _ in range(50):
            shown.append(advance(env, random_actions(env, generator)))
            shown.append(begin(env, torch.rand(4, generator=generator) < 0.2))
        return shown

    play(env, generator)
    saved = {key: value.clone() for key, value in env.state_dict().items()}
    assert set(saved) == {"state", "episode", "seed"}
    draws = generator.get_state()
    expected = play(env, generator)
    new = make(num_envs=4)
    for restored in (env, new):
        restored.load_state_dict(saved)
        generator.set_state(draws)
        again = play(restored, generator)
        assert all((one == other).all() for one, other in zip(expected, again, strict=True))


# TorchRL, devices, compilation


@pytest.mark.parametrize("num_envs", [1, 7])
@every_env
def test_specs_are_kept(make, num_envs):
    env = make(num_envs=num_envs)
    check_env_specs(env, seed=0)
    rollout = env.rollout(30, break_when_any_done=False)
    assert rollout.shape == (num_envs, 30)
    assert set(rollout["next"].keys()) == {"observation", "reward", "done", "terminated"}
    space = gym.make(IDS[make]).observation_space
    assert env.observation_spec["observation"].shape[1:] == space.shape
    if make is not CartPole:
        np.testing.assert_array_equal(env.observation_spec["observation"].space.low[0].numpy(), space.low)
        np.testing.assert_array_equal(env.observation_spec["observation"].space.high[0].numpy(), space.high)
    actions = gym.make(IDS[make]).action_space
    if env.actions is not None:
        assert env.actions == actions.n
    else:
        assert env.action_spec.space.high[0].tolist() == actions.high.tolist()


@every_env
def test_a_step_and_a_reset_never_wait_for_the_device(make):
    env = make(num_envs=3)
    action, mask = env.action_spec.rand(), torch.tensor([True, False, True])
    with NoWait():
        begin(env)
        advance(env, action)
        begin(env, mask)
        with pytest.raises(AssertionError, match="waits for the device"):
            bool(mask.any())
        with pytest.raises(AssertionError, match="waits for the device"):
            action[mask]


@pytest.mark.parametrize(
    "make",
    [Acrobot, *(pytest.param(each, marks=pytest.mark.slow) for each in (CartPole, Pendulum, MountainCarContinuous))],
    ids=lambda make: make.__name__,
)
def test_compiled_steps_and_resets_are_the_same(make):
    env, compiled = make(num_envs=7), make(num_envs=7)
    generator = torch.Generator().manual_seed(0)
    for each in (env, compiled):
        each.set_seed(5)
        begin(each)

    def step_and_reset(action: torch.Tensor, mask: torch.Tensor) -> tuple[TensorDict, torch.Tensor]:
        """Step all envs, then begin an episode in those of the mask."""
        return advance(compiled, action), begin(compiled, mask)

    torch._dynamo.reset()
    run = torch.compile(step_and_reset, fullgraph=True, dynamic=False)
    for _ in range(300):
        action, mask = random_actions(env, generator), torch.rand(7, generator=generator) < 0.02
        after, observation = run(action, mask)
        assert (after == advance(env, action)).all()
        assert torch.equal(observation, begin(env, mask))
        assert torch.equal(compiled.state, env.state)


@every_env
def test_the_config_names_the_env_and_its_time_limit(make):
    env = compose([f"env={CONFIGS[make]}", "algo=ppo"]).env
    assert env.id == IDS[make]
    assert import_target(env.target) is make
    assert env.time_limit == gym.spec(env.id).max_episode_steps
