"""Small Gymnasium envs with predictable transitions. Ids: `toy_envs:Counting-v0` and so on."""

import multiprocessing
import os
import signal
import time
from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text


class Counting(gym.Env):
    """Env whose observation is [episode, step] and whose reward is the step, counted from 1.

    An episode has `length` steps; even episodes end by termination, odd ones by truncation.
    """

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, length: int = 5, discrete: bool = False) -> None:
        self.length, self.episode = length, -1
        self.action_space = Discrete(3) if discrete else Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return self._show(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.step_number += 1
        done = self.step_number == self.length
        return self._show(), float(self.step_number), done and self.episode % 2 == 0, done and self.episode % 2 == 1, {}

    def _show(self):
        return np.array([self.episode, self.step_number], dtype=np.float64)


class Point(gym.Env):
    """Point on a line with the reward -|position|; 20 steps."""

    observation_space = Box(-np.inf, np.inf, (1,), np.float32)
    action_space = Box(-0.5, 0.5, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.position, {}

    def step(self, action):
        self.position = np.clip(self.position + action, -2, 2).astype(np.float32)
        return self.position, -float(np.abs(self.position[0])), False, False, {}


class Steps(Point):
    """Point with three discrete actions: left, stay, right."""

    action_space = Discrete(3)

    def step(self, action):
        return super().step(0.5 * (np.array([action], np.float32) - 1))


class Failing(Point):
    """Point that fails in one of its steps.

    Args:
        how: `blind`: the observation is NaN; `boundless`: the reward is infinite; `raise`: an exception; `hang`: the
            step takes 1000 s; `die`: the process kills itself.
        after: Number of the step that fails.
        seed: Seed of the episode in which steps are counted; None: count from the first step of the env.
    """

    def __init__(self, how: str, after: int = 100, seed: int | None = None) -> None:
        self.how, self.left, self.after, self.seed = how, after if seed is None else 0, after, seed

    def reset(self, *, seed=None, options=None):
        self.left = self.after if self.seed is not None and seed == self.seed else self.left
        return super().reset(seed=seed)

    def step(self, action):
        observation, reward, *rest = super().step(action)
        self.left -= 1
        if self.left == 0:
            if self.how == "raise":
                raise ZeroDivisionError("the cart has left the track")
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hang":
                time.sleep(1000)
            observation = observation * np.nan if self.how == "blind" else observation
            reward = np.inf if self.how == "boundless" else reward
        return observation, reward, *rest


class FailingRank(Failing):
    """Point that raises in step 100, except in the main process of a run, where it raises in step 1,000,000."""

    def __init__(self) -> None:
        super().__init__("raise", 100 if multiprocessing.parent_process() or "LOCAL_RANK" in os.environ else 1_000_000)


class Drifting(Point):
    """Point that cannot be replayed from its seed and actions, because its noise has another source."""

    noise = np.random.default_rng(0)

    def step(self, action):
        return super().step(action + self.noise.normal(0, 0.1, 1))


class Recorder(gym.Env):
    """Env that stores the actions it receives in `Recorder.actions`."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Box(-2.0, 4.0, (1,), np.float32)
    actions: ClassVar[list[float]] = []

    def reset(self, *, seed=None, options=None):
        return np.array([0], np.float32), {}

    def step(self, action):
        self.actions.append(float(action[0]))
        return np.array([0], np.float32), 1.0, False, False, {}


class Image(Point):
    """Point with the observation space of an 8 x 8 colour image."""

    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class Frames(Point):
    """Point whose observation is four grey frames, like Atari's; the position sets their brightness."""

    observation_space = Box(0, 255, (4, 84, 84), np.uint8)

    def reset(self, *, seed=None, options=None):
        return self._show(super().reset(seed=seed)[0]), {}

    def step(self, action):
        position, *rest = super().step(action)
        return self._show(position), *rest

    def _show(self, position):
        return np.full((4, 84, 84), np.clip(100 + 50 * position[0], 0, 255), np.uint8)


class Frame(Frames):
    """Point whose observation is one grey frame with a bright line at the position."""

    observation_space = Box(0, 255, (1, 36, 36), np.uint8)

    def _show(self, position):
        frame = np.zeros((1, 36, 36), np.uint8)
        frame[..., round(8 * (position.item() + 2))] = 255
        return frame


class FrameSteps(Steps, Frame):
    """Frame with three discrete actions: left, stay, right."""


class Matrix(Point):
    """Point with the action space of a matrix."""

    action_space = Box(-1, 1, (2, 2), np.float32)


class Colour(Frames):
    """Point whose observation is a colour image; the position sets its colour."""

    observation_space = Box(0, 255, (36, 36, 3), np.uint8)

    def _show(self, position):
        return np.full((36, 36, 3), np.clip([100 + 50 * position[0], 90 + 40 * position[0], 7], 0, 255), np.uint8)


class Words(Point):
    """Point with a Text observation space, which no algorithm supports."""

    observation_space = Text(5)


class Robot(Point):
    """Point whose observation is a dict of an image and numbers; an episode terminates near 0.

    Args:
        pixels: Key of the image.
    """

    observation_space = Dict(
        {
            "camera": Box(0, 255, (36, 36, 3), np.uint8),
            "position": Box(-np.inf, np.inf, (1,), np.float64),
            "side": Discrete(2, start=-1),
            "near": MultiBinary(2),
        }
    )

    def __init__(self, pixels="camera"):
        super().__init__()
        self.pixels = pixels
        spaces = dict(Robot.observation_space.spaces)
        self.observation_space = Dict({pixels: spaces.pop("camera"), **spaces})

    def reset(self, *, seed=None, options=None):
        return self._show(super().reset(seed=seed)[0]), {}

    def step(self, action):
        position, reward, _, cut, info = super().step(action)
        return self._show(position), reward, bool(abs(position[0]) < 0.05), cut, info

    def _show(self, position):
        camera = np.zeros((36, 36, 3), np.uint8)
        camera[:, round(8 * (position.item() + 2)), 0] = 255
        near = np.array([position[0] > -0.5, position[0] < 0.5], np.int8)
        shown = {"position": position.astype(float), "side": int(position[0] > 0) - 1, "near": near}
        return {self.pixels: camera, **shown}


class Buttons(Point):
    """Point with a MultiDiscrete action: the buttons left and right, and the speed."""

    action_space = MultiDiscrete([2, 2, 3])

    def step(self, action):
        assert self.action_space.contains(action), action
        left, right, speed = action
        return super().step(np.array([0.25 * speed * (float(right) - float(left))], np.float32))


class Keyboard(Point):
    """Point with a MultiDiscrete action of 2^14 combinations."""

    action_space = MultiDiscrete([2] * 14)


class Light(gym.Env):
    """Env with an image of which a random half is lit in each step; the reward is 1 for the action that names it."""

    observation_space = Box(0, 255, (8, 8), np.uint8)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._show(), {}

    def step(self, action):
        reward = float(action == self.side)
        return self._show(), reward, False, False, {}

    def _show(self):
        self.side = int(self.np_random.integers(2))
        picture = np.zeros((8, 8), np.uint8)
        picture[:, 4 * self.side : 4 * self.side + 4] = 255
        return picture


class Recall(gym.Env):
    """Memory task: only the first of 5 observations shows which of two actions has the reward 1 in this episode.

    The best return of a policy without a memory is 3, on average.
    """

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.right, self.left = int(self.np_random.integers(2)), 5
        return np.array([2 * self.right - 1], np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), float(action == self.right), self.left == 0, False, {}


gym.register("Light-v0", Light, max_episode_steps=10)
gym.register("Recall-v0", Recall)
gym.register("Keyboard-v0", Keyboard)
gym.register("Image-v0", Image)
gym.register("Frames-v0", Frames, max_episode_steps=5)
gym.register("Frame-v0", Frame, max_episode_steps=20)
gym.register("FrameSteps-v0", FrameSteps, max_episode_steps=20)
gym.register("Matrix-v0", Matrix)
gym.register("Colour-v0", Colour, max_episode_steps=20)
gym.register("Words-v0", Words)
gym.register("Robot-v0", Robot, max_episode_steps=20)
gym.register("Buttons-v0", Buttons, max_episode_steps=20)
gym.register("Counting-v0", Counting)
gym.register("Point-v0", Point, max_episode_steps=20)
gym.register("Steps-v0", Steps, max_episode_steps=20)
gym.register("Drifting-v0", Drifting, max_episode_steps=20)
gym.register("Failing-v0", Failing, max_episode_steps=20)
gym.register("FailingRank-v0", FailingRank, max_episode_steps=20)
gym.register("Recorder-v0", Recorder)


class Reporting(Point):
    """Point that reports numbers of an episode in the info of its last step; episode 0 succeeds, 1 fails, and so on.

    With `counts=False` the numbers depend on the position only, so that a resumed run can replay them.
    """

    def __init__(self, counts: bool = True) -> None:
        self.counts, self.episode, self.step_number = counts, -1, 0

    def reset(self, *, seed=None, options=None):
        self.episode, self.step_number = self.episode + 1, 0
        return super().reset(seed=seed)

    def step(self, action):
        self.step_number += 1
        observation, reward, _, _, _ = super().step(action)
        number = np.float32(self.episode) if self.counts else self.position[0]
        metrics = {"distance": number, "text": "far", "picture": np.zeros(3)}
        metrics |= {"first": 1} if self.counts and not self.episode else {}
        info = {
            "is_success": np.bool_(self.episode % 2 == 0 if self.counts else number > 0),
            "episode_metrics": metrics,
        }
        return observation, reward, False, self.step_number == 5, info


gym.register("Reporting-v0", Reporting)


class Forbidding(gym.Env):
    """Env that raises if a forbidden action is taken; in each step 2 to 4 random ones of 6 actions are allowed.

    It shows 1 for the best allowed action, which has the reward 1, 0 for other allowed ones, and 2 for forbidden ones.
    An episode has 8 steps. It terminates, and then allows nothing, if its first random number is below 1/2. Else
    Gymnasium truncates it.

    Args:
        where: Place of the mask: `info`, or `legal`, a part of the observation.
        choices: Whether an action is a choice of two values and one of four; each has 1 or 2 allowed ones.
        fault: What is wrong with the third mask: `missing`, `short`, `empty`, `two` (it holds a 2); or `cut`: an
            episode is truncated after two steps, with an empty mask.
        uneven: Whether episodes terminate after 3 to 7 steps instead.
    """

    def __init__(
        self, where: str = "info", choices: bool = False, fault: str | None = None, uneven: bool = False
    ) -> None:
        self.where, self.choices, self.fault, self.uneven = where, choices, fault, uneven
        self.action_space = MultiDiscrete([2, 4]) if choices else Discrete(6)
        self.observation_space = Box(0, 2, (6,), np.float32)
        if where == "legal":
            self.observation_space = Dict({"legal": MultiBinary(6), "values": self.observation_space})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.terminates, self.step_number = self.uneven or self.np_random.random() < 0.5, 0
        self.last = int(self.np_random.integers(3, 8)) if self.uneven else 8
        return self._show()

    def step(self, action):
        chosen = [int(action[0]), 2 + int(action[1])] if self.choices else [int(action)]
        assert self.legal[chosen].all(), f"action {action} is forbidden by {self.legal}"
        reward = float(self.values[chosen].sum())
        self.step_number += 1
        terminated = bool(self.step_number == self.last and self.terminates and self.fault is None)
        truncated = self.step_number == 2 and self.fault == "cut"
        observation, info = self._show(terminated)
        return observation, reward, terminated, truncated, info

    def _show(self, terminated=False):
        self.legal, self.values = np.zeros(6, np.int8), np.full(6, 2, np.float32)
        for choice in (np.arange(2), np.arange(2, 6)) if self.choices else (np.arange(6),):
            few, many = (1, 2) if self.choices else (2, 4)
            allowed = self.np_random.permutation(choice)[: self.np_random.integers(few, many + 1)]
            self.legal[allowed], self.values[allowed] = 1, 0
            self.values[allowed[0]] = 1
        legal = self.legal
        if terminated or (self.fault in ("empty", "cut") and self.step_number == 2):
            legal = 0 * legal
        if self.step_number == 2 and self.fault in ("short", "two"):
            legal = legal[:-1] if self.fault == "short" else 2 * legal
        missing = (terminated and self.where == "info") or (self.step_number == 2 and self.fault == "missing")
        if self.where == "legal":
            return {"legal": legal, "values": self.values}, {}
        mask = (
            (legal[:2], legal[2:]) if self.choices else legal
        )  # of several choices as `MultiDiscrete.sample` takes it
        return self.values, {} if missing else {"action_mask": mask}


class TwoActions(Point):
    """Point with two actions, of which one random one is forbidden in each step; to take it raises an error."""

    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        observation, _ = super().reset(seed=seed)
        return observation, self._forbid()

    def step(self, action):
        assert self.allowed[action]
        observation, reward, terminated, truncated, _ = super().step(action)
        return observation, reward, terminated, truncated, self._forbid()

    def _forbid(self):
        self.allowed = self.np_random.permutation(np.array([0, 1], np.int8))
        return {"action_mask": self.allowed}


gym.register("TwoActions-v0", TwoActions, max_episode_steps=4)
gym.register("Forbidding-v0", Forbidding, max_episode_steps=8)
