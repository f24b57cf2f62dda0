"""CarRacing-v3 as World Models see it. `levin.racing:Racing-v3`; needs the extra `box2d`."""

from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d.car_racing import CarRacing
from gymnasium.spaces import Box
from PIL import Image

SIDE, DASHBOARD = 64, 84  # pixels of a picture, and the row that the dashboard begins at


class Racing(CarRacing):
    """Observations `[64, 64, 3]` uint8 without the dashboard; steering, gas and brake, all in [-1, 1].

    Half gas is 0, and negative braking is none, as in the code beside the paper.

    # Deviation: where actions are repeated, only the last picture is drawn: a step is little else.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.observation_space = Box(0, 255, (SIDE, SIDE, 3), np.uint8)
        self.action_space = Box(-1.0, 1.0, (3,), np.float32)
        self.draws = True  # whether the next step shows anything new: `ActionRepeat` says so
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
        """What there is to see now."""
        frame = cast(np.ndarray, super()._render("state_pixels"))
        self.shown = np.asarray(Image.fromarray(frame[:DASHBOARD]).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        return self.shown


gym.register("Racing-v3", "levin.envs.racing:Racing", max_episode_steps=1000, reward_threshold=900)
