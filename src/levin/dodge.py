"""A game to dream of: balls fall, and whoever stands at the bottom steps aside. `levin.dodge:Dodge-v0`.

One picture does not show where a ball drifts or how fast it falls, and nothing shows where the next one comes from: a
model of this game needs a memory, and several futures.
"""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

SIZE = 16  # pixels, of the picture
BALL, PLAYER = 2, 2  # pixels: sides of a ball, and width of the player, who is as high as one
BRIGHT, WALL = 255, 64
FALL = (0.8, 1.6)  # rows per step
DRIFT = 0.6  # columns per step, at most, to both sides


class Dodge(gym.Env):
    """Observations `[16, 16]` uint8; left, stay, right; +1 for every step; an episode ends with a hit.

    A picture shows what is above the player, who stands in the middle of its lower edge and is not drawn. The world is
    as wide as a picture, and ends with walls, from which balls bounce. A ball that has fallen out comes again from the
    top, in a random column with a random drift and speed.

    Args:
        balls: How many there are at a time.
        render_mode: `rgb_array` draws a picture of 256 pixels squared.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, balls: int = 3, render_mode: str | None = None) -> None:
        self.balls, self.render_mode = balls, render_mode
        self.observation_space = Box(0, 255, (SIZE, SIZE), np.uint8)
        self.action_space = Discrete(3)
        self.player = 0
        self.place = np.zeros((balls, 2))  # row and column of the upper left pixel
        self.speed = np.zeros((balls, 2))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.player = int(self.np_random.integers(SIZE - PLAYER + 1))
        for ball in range(self.balls):
            self._throw(ball)
            self.place[ball, 0] = -(SIZE / self.balls) * ball  # one after the other
        return self._picture(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.player = min(max(self.player + int(action) - 1, 0), SIZE - PLAYER)
        self.place += self.speed
        beyond = (self.place[:, 1] < 0) | (self.place[:, 1] > SIZE - BALL)
        self.speed[beyond, 1] *= -1
        self.place[:, 1] = np.clip(self.place[:, 1], 0, SIZE - BALL)
        for ball in np.flatnonzero(self.place[:, 0] >= SIZE):
            self._throw(int(ball))
        return self._picture(), 1.0, self._hit(), False, {}

    def _throw(self, ball: int) -> None:
        self.place[ball] = -BALL, self.np_random.uniform(0, SIZE - BALL)
        self.speed[ball] = self.np_random.uniform(*FALL), self.np_random.uniform(-DRIFT, DRIFT)

    def _hit(self) -> bool:
        row, column = np.rint(self.place).astype(int).T
        return bool(((row + BALL > SIZE - 1) & (row < SIZE) & (abs(column - self.player) < PLAYER)).any())

    def _picture(self) -> np.ndarray:
        scene = np.full((SIZE, 3 * SIZE), WALL, np.uint8)
        scene[:, SIZE : 2 * SIZE] = 0
        for row, column in np.rint(self.place).astype(int):
            scene[max(row, 0) : max(row + BALL, 0), SIZE + column : SIZE + column + BALL] = BRIGHT
        left = SIZE + self.player - (SIZE - PLAYER) // 2
        return scene[:, left : left + SIZE].copy()

    def render(self) -> np.ndarray:
        return self._picture().repeat(16, 0).repeat(16, 1)[..., None].repeat(3, 2)


gym.register("Dodge-v0", "levin.dodge:Dodge", max_episode_steps=200)
