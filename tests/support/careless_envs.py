"""Small envs that do what careful envs don't. Ids: `careless_envs:Careless-v0` with `env.kwargs.how=...`."""

import random
import threading
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Text


class Careless(gym.Env):
    """Point on a line with the reward -|position|; 20 steps.

    Args:
        how: What the env does: seeds or uses the global generators, returns arrays as rewards and ends, raises in
            `close`, writes into its action, or gives NaN from the second reset on.
    """

    observation_space = Box(-10, 10, (1,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, how: str = "") -> None:
        self.how, self.resets = how, 0

    def reset(self, *, seed=None, options=None):
        assert options is None
        super().reset(seed=seed)
        self.resets += 1
        if self.how == "seeds" and seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        self.at = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.at.copy(), {"array": np.zeros(self.resets), "other": self}

    def step(self, action):
        if self.how == "draws":
            self.at = self.at + np.float32(np.random.normal() + random.random() + float(torch.rand(())))
        self.at = np.clip(self.at + 0.2 * action, -10, 10).astype(np.float32)
        if self.how == "writes":
            action[:] = 7
        reward, ended = -float(abs(self.at[0])), False
        if self.how == "nan" and self.resets > 1:
            reward = float("nan")
        if self.how == "arrays":
            return self.at.copy(), np.array([reward]), np.array([ended]), np.array([False]), {"x": object()}
        if self.how == "several":
            return self.at.copy(), np.array([reward, 1.0]), False, False, {}
        return self.at.copy(), reward, ended, False, {"x": np.zeros(self.resets)}

    def close(self):
        if self.how == "close":
            raise RuntimeError("no window")


class Outside(gym.Env):
    """Env whose observation leaves its space after three steps."""

    action_space = Discrete(2)
    SPACES: ClassVar = {
        "discrete": Discrete(4, start=1),
        "multi": MultiDiscrete([4, 4]),
        "dict": Dict({"a": Discrete(4), "b": Box(-1, 1, (2,))}),
    }

    def __init__(self, kind: str) -> None:
        self.kind, self.observation_space = kind, self.SPACES[kind]

    def show(self):
        count = {"discrete": self.count + 2, "multi": np.array([1, self.count + 1]), "dict": self.count + 1}[self.kind]
        return {"a": count, "b": np.zeros(2, np.float32)} if self.kind == "dict" else count

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.show(), {}

    def step(self, action):
        self.count += 1
        return self.show(), 0.0, False, self.count == 20, {}


class Canvas(gym.Env):
    """Env that draws every observation into the same array; the observation is the number of the step."""

    observation_space = Box(0, 100, (2,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.canvas = np.zeros(2, np.float32)
        return self.canvas, {}

    def step(self, action):
        self.canvas += 1
        return self.canvas, 0.0, False, bool(self.canvas[0] == 9), {}


class Bounds(gym.Env):
    """Env that checks that its actions are within its bounds, in its own dtype."""

    observation_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, low: float, high: float, dtype: str = "float32") -> None:
        self.action_space = Box(low, high, (1,), np.dtype(dtype).type)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, action.dtype)
        self.steps += 1
        return np.zeros(1, np.float32), float(action[0] < 0), False, self.steps == 20, {}


class OneStep(gym.Env):
    """Env whose episodes have one step and always the same reward; with one action there is no choice."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, actions: int = 2, reward: float = 1e6) -> None:
        self.action_space, self.reward = Discrete(actions), reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([7.0, self.np_random.normal()]), {}

    def step(self, action):
        return np.array([7.0, self.np_random.normal()]), self.reward, True, False, {}


class Number(gym.Env):
    """Env that shows a single number, the step, with bounds that differ from copy to copy."""

    action_space = Discrete(2)
    made = 0

    def __init__(self) -> None:
        Number.made += 1
        self.observation_space = Box(0, 100 + Number.made, (), np.float32)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.float32(0), {}

    def step(self, action):
        self.steps += 1
        return np.float32(self.steps), 1.0, False, self.steps == 10, {}


class NamedPicture(gym.Env):
    """Env with a picture of a given name beside a vector."""

    action_space = Discrete(2)

    def __init__(self, name: str) -> None:
        self.name = name
        self.observation_space = Dict({name: Box(0, 255, (36, 36, 3), np.uint8), "b": Box(-1, 1, (2,))})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {self.name: np.zeros((36, 36, 3), np.uint8), "b": np.zeros(2, np.float32)}, {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


class Picture(gym.Env):
    """Env that shows random pixels of a given shape; with `text` also a vector and a text. The action 1 is rewarded."""

    action_space = Discrete(2)

    def __init__(self, shape: list[int], text: bool = False) -> None:
        self.picture, self.text = Box(0, 255, tuple(shape), np.uint8), text
        parts = {"picture": self.picture, "mission": Text(20), "vector": Box(-50, 50, (2,), np.float32)}
        self.observation_space = Dict(parts) if text else self.picture

    def show(self):
        picture = self.np_random.integers(0, 255, self.picture.shape, np.uint8)
        vector = self.np_random.uniform(-50, 50, 2).astype(np.float32)
        return {"picture": picture, "mission": "go there", "vector": vector} if self.text else picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.show(), {}

    def step(self, action):
        return self.show(), float(action), False, False, {}


class Endless(Careless):
    """Point whose first `after` episodes have 20 steps, and whose later ones have no end."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}

    def __init__(self, after: int = 0, render_mode: str | None = None) -> None:
        super().__init__()
        self.after, self.render_mode = after, render_mode

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        observation, reward, _, _, info = super().step(action)
        return observation, reward, False, self.steps == 20 and self.resets <= self.after, info

    def render(self):
        return np.zeros((32, 32, 3), np.uint8)


class Wrong(gym.Env):
    """Env that does something wrong in its first step."""

    action_space = Discrete(2)

    def __init__(self, what: str, goals: list[int] | None = None, render_mode: str | None = None) -> None:
        self.what, self.goals, self.render_mode = what, goals, render_mode
        pictures = Box(0, 255, (2, 2, 3), np.uint8)
        self.observation_space = pictures if what in ("order", "kind") else Box(-1, 1, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        info = {"action_mask": np.array([1.0, 0.5])} if self.what == "mask" else {}
        return np.zeros(self.observation_space.shape, self.observation_space.dtype), info

    def step(self, action):
        observation, _ = self.reset()
        if self.what == "lock":
            raise RuntimeError("no device", threading.Lock())  # which can't be sent to another process
        if self.what == "arguments":
            raise UnicodeDecodeError("utf-8", b"x", 0, 1, "bad byte")  # which can't be made of its text alone
        wrong = {"length": np.zeros(1, np.float32), "order": np.zeros((3, 2, 2), np.uint8), "kind": observation / 2.0}
        return wrong.get(self.what, observation), 0.0, False, False, {"action_mask": np.array([1.0, 0.5])}


gym.register("Wrong-v0", Wrong, max_episode_steps=20)
gym.register("Careless-v0", Careless, max_episode_steps=20)
gym.register("Outside-v0", Outside)
gym.register("Canvas-v0", Canvas)
gym.register("Bounds-v0", Bounds)
gym.register("OneStep-v0", OneStep)
gym.register("Number-v0", Number)
gym.register("NamedPicture-v0", NamedPicture, max_episode_steps=5)
gym.register("Endless-v0", Endless)
gym.register("Picture-v0", Picture, max_episode_steps=20)
