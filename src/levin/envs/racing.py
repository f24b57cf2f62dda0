"""CarRacing-v3 with the observations and actions of World Models; its id is `levin.racing:Racing-v3`.

It needs the extra `box2d`.
"""

from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d.car_racing import CarRacing
from gymnasium.spaces import Box
from PIL import Image

SIDE, DASHBOARD = 64, 84  # side of the image, and top edge of the dashboard in the frame, pixels


class Racing(CarRacing):
    """CarRacing with observations `[64, 64, 3]` uint8 without the dashboard; steering, gas and brake are in [-1, 1].

    A gas of 0 is half throttle and a negative brake is no braking, as in the authors' code.

    # Deviation: when actions are repeated, only the last image is drawn, because drawing takes most of a step's time.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.observation_space = Box(0, 255, (SIDE, SIDE, 3), np.uint8)
        self.action_space = Box(-1.0, 1.0, (3,), np.float32)
        self.draws = True  # whether the next step draws a new image; `ActionRepeat` sets it
        self.shown = np.zeros((SIDE, SIDE, 3), np.uint8)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if action is not None:
            action = np.array([action[0], (action[1] + 1) / 2, max(action[2], 0)])
        _, reward, terminated, truncated, info = super().step(action)  # type: ignore[arg-type]
        return self.shown, float(reward), terminated, truncated, info

    def _render(self, mode: str) -> Any:
        if mode == "state_pixels":
            return self.show() if self.draws else None
        return super()._render(mode)

    def show(self) -> np.ndarray:
        """Draw and return the current observation."""
        frame = cast(np.ndarray, super()._render("state_pixels"))
        self.shown = np.asarray(Image.fromarray(frame[:DASHBOARD]).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        return self.shown


gym.register("Racing-v3", "levin.envs.racing:Racing", max_episode_steps=1000, reward_threshold=900)
