"""Mean return of uniform actions, which has the normalised score 0."""

from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from levin.collectors.episodes import evaluate
from levin.core.process import silence_libraries
from levin.core.spaces import ACTION_MASK, random_allowed_actions
from levin.envs.config import EVALUATION, EnvConfig
from levin.envs.factory import make_env
from levin.envs.vector import SeededVectorEnv

EPISODES = 100


def random_return(config: EnvConfig, seed: int) -> float:
    """Return the mean return of uniform actions over 100 episodes, rounded to one decimal."""
    silence_libraries()
    env = make_env(config, seed=seed, purpose=EVALUATION, num_envs=10)
    policy = TensorDictModule(Uniform(env), in_keys=["observation"], out_keys=["action"])
    returns, _ = evaluate(policy, env, EPISODES)
    env.close()
    return round(float(np.mean(returns)), 1)


class Uniform(nn.Module):
    """Policy of uniform actions, in the units of a policy's output: `[N, *S] -> [N, *A]`."""

    def __init__(self, env: SeededVectorEnv) -> None:
        super().__init__()
        self.space, self.num_envs = env.single_action_space, env.num_envs
        self.space.seed(0)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, observation: Any) -> Tensor:
        if isinstance(observation, dict) and ACTION_MASK in observation:
            return random_allowed_actions(self.space, observation[ACTION_MASK], self.generator)
        actions = np.stack([self.space.sample() for _ in range(self.num_envs)])
        return torch.as_tensor(actions - getattr(self.space, "start", 0))  # policies count from 0
