"""An env whose iterations last longer than a test waits for a signal. Ids: `signal_env:Slow-v0`."""

import time

import gymnasium as gym

from toy_envs import Point


class Slow(Point):
    """A Point that takes a tenth of a second per step once training has begun."""

    steps = 0

    def step(self, action):
        Slow.steps += 1
        if Slow.steps > 70:
            time.sleep(0.1)
        return super().step(action)


gym.register("Slow-v0", Slow, max_episode_steps=20)
