"""Train sb3-contrib's TRPO with the values of RL Baselines3 Zoo, and write its learning curves.

    python sb3_contrib_trpo.py Swimmer-v4 300000 10000 10 "0 1 2 3 4" curves.csv.gz

Arguments: env, env steps, env steps between two evaluations, episodes of an evaluation, seeds, and the file. Seeds that
the file has already are kept. README.md lists the packages.
"""

import sys

import torch
from sb3_contrib import TRPO
from seeds import train_missing
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

COLUMNS = ("seed", "env_steps", "return_mean", "return_std")
GAMMA = {"Swimmer-v4": 0.9999}  # hyperparams/trpo.yml
TARGET_KL = {"HalfCheetah-v4": 0.04}


class Evaluate(BaseCallback):
    """Evaluate the deterministic policy after each `every` env steps, with frozen statistics and raw rewards."""

    def __init__(self, envs: VecNormalize, every: int, episodes: int) -> None:
        super().__init__()
        self.envs, self.every, self.episodes = envs, every, episodes
        self.rows: list[tuple[int, float, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps // self.every > len(self.rows):
            sync_envs_normalization(self.training_env, self.envs)
            returns = evaluate_policy(self.model, self.envs, self.episodes, warn=False)
            self.rows.append((self.num_timesteps, *map(float, returns)))
        return True


def train(env: str, total: int, every: int, episodes: int, seed: int) -> list[tuple[int, float, float]]:
    """Train one seed; return env steps, mean and standard deviation of the returns of each evaluation."""
    gamma = GAMMA.get(env, 0.99)
    envs = VecNormalize(make_vec_env(env, n_envs=2, seed=seed), gamma=gamma)
    evaluation = VecNormalize(make_vec_env(env, n_envs=1, seed=1000 + seed), training=False, norm_reward=False)
    model = TRPO(
        "MlpPolicy",
        envs,
        seed=seed,
        n_steps=1024,
        batch_size=128,
        gamma=gamma,
        gae_lambda=0.95,
        sub_sampling_factor=1,
        cg_max_steps=25,
        cg_damping=0.1,
        n_critic_updates=20,
        learning_rate=1e-3,
        target_kl=TARGET_KL.get(env, 0.01),
        device="cpu",
    )
    callback = Evaluate(evaluation, every, episodes)
    model.learn(total, callback=callback)
    return callback.rows


def main() -> None:
    """Train the seeds that the file lacks."""
    env, total, every, episodes, seeds, file = sys.argv[1:]
    torch.set_num_threads(1)
    train_missing(file, seeds, COLUMNS, lambda seed: train(env, int(total), int(every), int(episodes), seed))


if __name__ == "__main__":
    main()
