"""Train with Stable-Baselines3, sb3-contrib or sbx. This script runs in .venv-bench and imports nothing of Levin.

Command-line arguments: library (sb3 or sbx), algorithm, env id, number of envs, threads, env steps of warm-up, env
steps per segment, arguments of the algorithm as JSON. sbx is Stable-Baselines3 in JAX; JAX compiles in the warm-up.
"""

import importlib
import json
import os
import sys
from time import perf_counter

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecFrameStack


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
    library, name, env_id = sys.argv[1:4]
    num_envs, threads, start, segment = map(int, sys.argv[4:8])
    arguments = json.loads(sys.argv[8])
    torch.set_num_threads(threads)
    if threads == 1:  # XLA has no other number than one or all cores
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    if library == "sbx":
        import sbx as algorithms
    elif name == "trpo":
        import sb3_contrib as algorithms
    else:
        import stable_baselines3 as algorithms
    if "NoFrameskip" in env_id:
        gymnasium.register_envs(importlib.import_module("ale_py"))
        env = VecFrameStack(make_atari_env(env_id, n_envs=num_envs, seed=0), n_stack=4)
    else:
        env = make_vec_env(env_id, n_envs=num_envs, seed=0)
    if name in ("td3", "ddpg"):
        num_actions = env.action_space.shape[0]
        arguments["action_noise"] = NormalActionNoise(np.zeros(num_actions), 0.1 * np.ones(num_actions))
    policy = "CnnPolicy" if "NoFrameskip" in env_id else "MlpPolicy"
    model = getattr(algorithms, name.upper())(policy, env, seed=0, device="cpu", **arguments)
    model.learn(10**9, callback=Pace(start, segment), log_interval=None)
