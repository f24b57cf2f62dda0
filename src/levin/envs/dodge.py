"""A game to dream of: balls fall, and whoever stands at the bottom steps aside. `levin.dodge:Dodge-v0`.

One picture does not show where a ball drifts or how fast it falls, most show nothing, and none shows where the next
ball comes from: a model of this game needs a memory, and several futures.
"""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

SIZE = 16  # pixels of the picture, and width and depth of the world
WALL = 64  # brightness
FAR, NEAR = 0.5, 1.3  # how wide a ball looks, pixels
REACH = 2.0  # how far from the player's middle a ball still hits
FALL = (0.8, 1.6)  # rows per step
DRIFT = 0.6  # columns per step, at most, to both sides
BLINK = 2  # of so many pictures one is not dark


class Dodge(gym.Env):
    """Observations `[16, 16]` uint8; left, stay, right; +1 for every step; an episode ends with a hit.

    A picture shows what is before the player, who stands in the middle of its lower edge and is not drawn. Far balls
    are small and dim, and the light blinks: every other picture is dark. The world is as wide as a picture, and ends
    with walls, from which balls bounce. A ball that has passed comes again from afar, in a random column with a random
    drift and speed.

    Args:
        balls: How many there are at a time.
        render_mode: `rgb_array` draws a picture of 256 pixels squared.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, balls: int = 3, render_mode: str | None = None) -> None:
        self.balls, self.render_mode = balls, render_mode
        self.observation_space = Box(0, 255, (SIZE, SIZE), np.uint8)
        self.action_space = Discrete(3)
        self.player = 0  # column, of its middle
        self.steps = 0
        self.place = np.zeros((balls, 2))  # row and column of each ball
        self.speed = np.zeros((balls, 2))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.player, self.steps = int(self.np_random.integers(1, SIZE)), 0
        for ball in range(self.balls):
            self._throw(ball)
            self.place[ball, 0] = -(SIZE / self.balls) * ball  # one after the other
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
        self.place[ball] = 0.0, self.np_random.uniform(0, SIZE)
        self.speed[ball] = self.np_random.uniform(*FALL), self.np_random.uniform(-DRIFT, DRIFT)

    def _picture(self) -> np.ndarray:
        if self.steps % BLINK:
            return np.zeros((SIZE, SIZE), np.uint8)
        at = np.arange(SIZE) + 0.5
        columns = at + self.player - SIZE / 2  # of the world
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
