"""Slow env for tests of signals: an iteration lasts longer than the test waits. Id: `signal_env:Slow-v0`."""

import time

import gymnasium as gym

from toy_envs import Point


class Slow(Point):
    """Point env whose steps take 0.1 s after the first 70."""

    steps = 0

    def step(self, action):
        Slow.steps += 1
        if Slow.steps > 70:
            time.sleep(0.1)
        return super().step(action)


gym.register("Slow-v0", Slow, max_episode_steps=20)
