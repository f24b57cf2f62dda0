"""Train with Stable-Baselines3 or sb3-contrib. This script runs in .venv-bench and imports nothing of Levin.

Command-line arguments: algorithm, env id, number of envs, threads, env steps of warm-up, env steps per segment,
arguments of the algorithm as JSON.
"""

import json
import sys
from time import perf_counter

import numpy as np
import torch
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise


class Pace(BaseCallback):
    """Counterpart of `levin.bench.pace.Pace`, called once per vector step."""

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
        proceed = bool(sys.stdin.readline())
        self.before = (perf_counter(), self.num_timesteps)
        return proceed


if __name__ == "__main__":
    name, env_id = sys.argv[1:3]
    num_envs, threads, start, segment = map(int, sys.argv[3:7])
    torch.set_num_threads(threads)
    algorithms = {"sac": SAC, "ppo": PPO, "a2c": A2C, "td3": TD3, "ddpg": DDPG, "dqn": DQN}
    if name == "trpo":
        from sb3_contrib import TRPO

        algorithms["trpo"] = TRPO
    env = make_vec_env(env_id, n_envs=num_envs, seed=0)
    arguments = json.loads(sys.argv[7])
    if name in ("td3", "ddpg"):
        num_actions = env.action_space.shape[0]
        arguments["action_noise"] = NormalActionNoise(np.zeros(num_actions), 0.1 * np.ones(num_actions))
    model = algorithms[name]("MlpPolicy", env, seed=0, device="cpu", **arguments)
    model.learn(10**9, callback=Pace(start, segment), log_interval=None)
