"""Dodge, a small pixel game for world models: the player evades falling balls. Its id is `levin.dodge:Dodge-v0`.

A single image does not show the drift and the speed of a ball, every other image is dark, and no image shows where the
next ball will appear. So a model of this game needs memory and must predict several possible futures.
"""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

SIZE = 16  # side of the image in pixels; the world is as wide and as deep
WALL = 64  # brightness of a wall
FAR, NEAR = 0.5, 1.3  # width (standard deviation) of a ball in the image, at the far and at the near end, pixels
REACH = 2.0  # distance from the player's centre below which a ball hits
FALL = (0.8, 1.6)  # speed towards the player, minimum and maximum, pixels per step
DRIFT = 0.6  # maximum sideways speed, pixels per step
BLINK = 2  # one of so many images is lit, the others are dark


class Dodge(gym.Env):
    """Env with observations `[16, 16]` uint8 and actions left, stay, right. The reward is 1 per step; a hit terminates.

    The image shows the view from the player, who stands at the centre of its lower edge and is not drawn. Far balls are
    small and dim, and every other image is dark. The world is as wide as the image and is bounded by walls, from which
    balls bounce. A ball that has passed the player starts again at the far end, in a random column, with a random drift
    and speed.

    Args:
        balls: Number of balls.
        render_mode: `rgb_array` renders images of 256 x 256 pixels; None: `render` is not used.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, balls: int = 3, render_mode: str | None = None) -> None:
        self.balls, self.render_mode = balls, render_mode
        self.observation_space = Box(0, 255, (SIZE, SIZE), np.uint8)
        self.action_space = Discrete(3)
        self.player = 0  # column of the player's centre
        self.steps = 0
        self.place = np.zeros((balls, 2))  # row and column of each ball in the world
        self.speed = np.zeros((balls, 2))  # their change per step

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.player, self.steps = int(self.np_random.integers(1, SIZE)), 0
        for ball in range(self.balls):
            self._throw(ball)
            self.place[ball, 0] = -(SIZE / self.balls) * ball  # staggered, so that they arrive one after the other
        return self._picture(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.player = min(max(self.player + int(action) - 1, 1), SIZE - 1)
        self.steps += 1
        self.place += self.speed
        column = self.place[:, 1]
        self.speed[(column < 0) | (column > SIZE), 1] *= -1
        self.place[:, 1] = column.clip(0, SIZE)
        arrived = self.place[:, 0] >= SIZE - 1
        hit = bool((arrived & (np.abs(self.place[:, 1] - self.player) < REACH)).any())
        picture = self._picture()
        for ball in np.flatnonzero(arrived):
            self._throw(int(ball))
        return picture, 1.0, hit, False, {}

    def _throw(self, ball: int) -> None:
        """Start a ball at the far end with a random column, speed and drift."""
        self.place[ball] = 0.0, self.np_random.uniform(0, SIZE)
        self.speed[ball] = self.np_random.uniform(*FALL), self.np_random.uniform(-DRIFT, DRIFT)

    def _picture(self) -> np.ndarray:
        """Draw the current observation, `[16, 16]` uint8."""
        if self.steps % BLINK:
            return np.zeros((SIZE, SIZE), np.uint8)
        at = np.arange(SIZE) + 0.5
        columns = at + self.player - SIZE / 2  # world column of each image column
        picture = np.where((columns < 0) | (columns > SIZE), WALL, 0.0) * np.ones((SIZE, 1))
        for row, column in self.place:
            near = np.clip(row / SIZE, 0, 1)
            width = NEAR * near + FAR * (1 - near)
            light = np.exp(-0.5 * (((at - row) / width)[:, None] ** 2 + ((columns - column) / width)[None] ** 2))
            picture = np.maximum(picture, 255 * near * light)
        return picture.astype(np.uint8)

    def render(self) -> np.ndarray:
        return self._picture().repeat(16, 0).repeat(16, 1)[..., None].repeat(3, 2)


gym.register("Dodge-v0", "levin.envs.dodge:Dodge", max_episode_steps=200)
