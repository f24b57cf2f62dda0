"""Rollouts without updates: Levin's collector against a hand-written loop and TorchRL's `Collector`, in one process.

A second comparison has random actions instead of a policy: Levin's collector against bare stepping of the envs.
"""

from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from levin.collectors.factory import make_collector
from levin.core.process import keep_freed_memory, silence_libraries
from levin.core.spaces import random_actions
from levin.envs.config import EnvConfig
from levin.envs.factory import describe_env, make_env
from levin.envs.single import make_single_env
from levin.nn.layers import mlp

STEPS = 256  # vector steps per rollout
# As `ppo` in `peers.py`; memory of longer rollouts is returned to the system in spite of `keep_freed_memory`.
SHORT = 128
NEVER = 1_000_000_000


class Chooser(nn.Module):
    """64-64 policy with a categorical or a Gaussian action distribution."""

    def __init__(self, num_observations: int, num_actions: int, discrete: bool) -> None:
        super().__init__()
        self.network, self.discrete = mlp([num_observations, 64, 64, num_actions], "tanh"), discrete

    def forward(self, observation: Tensor) -> Tensor:
        """Return actions, `[N, S] -> [N]` or `[N, A]`."""
        output = self.network(observation)
        if self.discrete:
            return torch.multinomial(output.softmax(-1), 1).squeeze(-1)  # [N, A] -> [N, 1] -> [N]
        return output + torch.randn_like(output)


class HandWritten:
    """Minimal hand-written rollout loop, without per-env seeds, running statistics or resume."""

    def __init__(self, config: EnvConfig, policy: nn.Module) -> None:
        self.env = SyncVectorEnv(
            [lambda: make_single_env(config)] * config.num_envs, autoreset_mode=AutoresetMode.DISABLED, copy=False
        )
        self.policy = policy
        self.current, _ = self.env.reset(seed=0)

    @torch.inference_mode()
    def rollout(self) -> dict[str, Tensor]:
        """Return the tensors of `STEPS` vector steps, time first."""
        env, shape = self.env, self.env.single_observation_space.shape or ()
        observation, after = np.empty((2, STEPS, env.num_envs, *shape), np.float32)
        space = env.single_action_space
        dtype = np.int64 if isinstance(space, Discrete) else np.float32
        action = np.empty((STEPS, env.num_envs, *(space.shape or ())), dtype)
        reward = np.empty((STEPS, env.num_envs), np.float32)
        terminated, truncated = np.empty((2, STEPS, env.num_envs), bool)
        inputs = torch.from_numpy(observation)
        for t in range(STEPS):
            observation[t] = self.current
            action[t] = self.policy(inputs[t]).numpy()
            self.current, reward[t], terminated[t], truncated[t], _ = env.step(action[t])
            after[t] = self.current
            done = terminated[t] | truncated[t]
            if done.any():
                self.current, _ = env.reset(options={"reset_mask": done})
        names = ("observation", "action", "next_observation", "reward", "terminated", "truncated")
        arrays = (observation, action, after, reward, terminated, truncated)
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def compare_collectors(env_id: str, num_envs: int, rounds: int) -> dict[str, list[float]]:
    """Return vector steps per second of each side in each round, with a policy."""
    silence_libraries()
    config = EnvConfig(id=env_id, num_envs=num_envs)
    spec = describe_env(make_env(config, seed=0))
    discrete = spec["action"]["type"] == "discrete"
    num_actions = spec["action"]["n"] if discrete else int(np.prod(spec["action"]["shape"]))
    policy = Chooser(int(np.prod(spec["observation"]["shape"])), num_actions, discrete)
    module = TensorDictModule(policy, in_keys=["observation"], out_keys=["action"])
    vector = make_collector("vector", make_env(config, seed=0, copy=False), module, steps=STEPS, random_env_steps=0)
    torchrl = make_collector("torchrl", make_env(config, seed=0), module, steps=STEPS, random_env_steps=0)
    levin_rollouts, torchrl_rollouts = iter(vector.iterator()), iter(torchrl.iterator())
    sides = {
        "hand-written loop": HandWritten(config, policy).rollout,
        "levin": lambda: next(levin_rollouts),
        "TorchRL Collector": lambda: next(torchrl_rollouts),
    }
    return time_interleaved(sides, rounds)


def compare_env_stepping(config: EnvConfig, rounds: int) -> dict[str, list[float]]:
    """Return vector steps per second of each side in each round, with random actions.

    It needs the optional package of the env family.
    """
    silence_libraries()
    keep_freed_memory()  # as every run does
    env = make_env(config, seed=0, copy=False)
    unused_policy = TensorDictModule(nn.Identity(), in_keys=["observation"], out_keys=["action"])
    collector = make_collector("vector", env, unused_policy, steps=SHORT, random_env_steps=NEVER)
    rollouts = iter(collector.iterator())
    alone = make_stepper(config, random_actions(env.single_action_space, SHORT, config.num_envs))
    return time_interleaved({"the env alone": alone, "levin": lambda: next(rollouts)}, rounds, SHORT)


def make_stepper(config: EnvConfig, actions: np.ndarray) -> Callable[[], None]:
    """Return a function that steps the envs with `actions`, `[T, N, *A]`, and keeps nothing."""
    if config.family == "atari":
        from ale_py.vector_env import AtariVectorEnv

        games = AtariVectorEnv(config.id, config.num_envs, reward_clipping=False)  # resets finished games by itself
        games.reset(seed=0)

        def play() -> None:
            for action in actions:
                games.step(action)

        return play
    mode = AutoresetMode.DISABLED
    env = SyncVectorEnv([lambda: make_single_env(config)] * config.num_envs, autoreset_mode=mode, copy=False)
    env.reset(seed=0)

    def step() -> None:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if (terminated | truncated).any():
                env.reset(options={"reset_mask": terminated | truncated})

    return step


def time_interleaved(sides: dict[str, Callable[[], object]], rounds: int, steps: int = STEPS) -> dict[str, list[float]]:
    """Return steps per second of each side in each round; one call of a side is a rollout of `steps` steps."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, rollout in sides.items():
            start = perf_counter()
            rollout()
            if round_:  # round 0 is warm-up
                rates[name].append(steps / (perf_counter() - start))
    return rates
