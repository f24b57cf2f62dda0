"""Train Tianshou's A2C as its MuJoCo benchmark does, and write the returns of the training episodes.

    python tianshou_a2c.py InvertedDoublePendulum-v4 1000000 "0 1 2" curves.csv.gz

Arguments: env, env steps, seeds, and the file. Seeds that the file has already are kept. README.md lists the packages.
The values are those of examples/mujoco/mujoco_a2c.py: the learning rate falls to 0 over 3M env steps.
"""

import sys

import gymnasium as gym
import numpy as np
import torch
from seeds import train_missing
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv, VectorEnvNormObs
from tianshou.policy import A2CPolicy
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ActorProb, Critic
from torch.distributions import Independent, Normal
from torch.optim.lr_scheduler import LambdaLR

COLUMNS = ("seed", "env_steps", "return_mean", "episodes")
NUM_ENVS, STEPS, TOTAL = 16, 80, 3_000_000
ROW = 1000  # env steps between two rows


def make_policy(env: gym.Env) -> A2CPolicy:
    """Build networks, optimiser and policy."""
    shape = env.observation_space.shape, env.action_space.shape
    actor = ActorProb(Net(shape[0], hidden_sizes=[64, 64], activation=torch.nn.Tanh), shape[1], unbounded=True)
    critic = Critic(Net(shape[0], hidden_sizes=[64, 64], activation=torch.nn.Tanh))
    torch.nn.init.constant_(actor.sigma_param, -0.5)
    for module in [*actor.modules(), *critic.modules()]:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.orthogonal_(module.weight, gain=np.sqrt(2))
            torch.nn.init.zeros_(module.bias)
    for module in actor.mu.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.copy_(0.01 * module.weight.data)
    parameters = [*actor.parameters(), *critic.parameters()]
    optim = torch.optim.RMSprop(parameters, lr=7e-4, eps=1e-5, alpha=0.99)
    updates = TOTAL // STEPS
    return A2CPolicy(
        actor,
        critic,
        optim,
        lambda *logits: Independent(Normal(*logits), 1),
        discount_factor=0.99,
        gae_lambda=0.95,
        max_grad_norm=0.5,
        vf_coef=0.5,
        ent_coef=0.01,
        reward_normalization=True,
        action_scaling=True,
        action_bound_method="clip",
        lr_scheduler=LambdaLR(optim, lr_lambda=lambda update: 1 - update / updates),
        action_space=env.action_space,
    )


def train(env_id: str, total: int, seed: int) -> list[tuple[int, float, int]]:
    """Train one seed; return env steps, mean return and number of the episodes that ended since the last row."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    envs = VectorEnvNormObs(DummyVectorEnv([lambda: gym.make(env_id) for _ in range(NUM_ENVS)]))
    envs.seed(seed)
    policy = make_policy(gym.make(env_id))
    collector = Collector(policy, envs, VectorReplayBuffer(4096, NUM_ENVS), exploration_noise=True)
    rows, returns, env_steps = [], [], 0
    while env_steps < total:
        result = collector.collect(n_step=STEPS)
        env_steps += result["n/st"]
        returns += list(result["rews"])
        policy.update(0, collector.buffer, batch_size=99999, repeat=1)
        collector.reset_buffer(keep_statistics=True)
        if env_steps // ROW > (env_steps - STEPS) // ROW and returns:
            rows.append((env_steps, float(np.mean(returns)), len(returns)))
            returns = []
    return rows


def main() -> None:
    """Train the seeds that the file lacks."""
    env, total, seeds, file = sys.argv[1:]
    torch.set_num_threads(1)
    train_missing(file, seeds, COLUMNS, lambda seed: train(env, int(total), seed))


if __name__ == "__main__":
    main()
