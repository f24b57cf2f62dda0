"""Stable-Baselines3's SAC as a peer. Runs in the peers' environment; imports nothing of this project.

Words: env id, threads, learning starts, env steps of warm-up, env steps per segment.
"""

import sys
from time import perf_counter

import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback


class Pace(BaseCallback):
    """The turn-taking of `levin.bench.pace`, once per env step."""

    def __init__(self, start: int, segment: int) -> None:
        super().__init__()
        self.next, self.segment, self.before = start, segment, None

    def _on_step(self) -> bool:
        if self.num_timesteps < self.next:
            return True
        if self.before is not None:
            seconds, start = self.before
            print(f"segment {self.num_timesteps - start} {perf_counter() - seconds}", flush=True)
        self.next = self.num_timesteps + self.segment
        more = bool(sys.stdin.readline())
        self.before = (perf_counter(), self.num_timesteps)
        return more


if __name__ == "__main__":
    env_id, (threads, learning_starts, start, segment) = sys.argv[1], map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    # Its defaults are batch 256, one update per step, buffer 1M, 256-256: what ours is given.
    model = SAC("MlpPolicy", env_id, learning_starts=learning_starts, seed=0, device="cpu")
    model.learn(10**9, callback=Pace(start, segment), log_interval=None)
