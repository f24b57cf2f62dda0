"""Deterministic episodes of a policy on fresh envs. `python -m levin.evaluate run=...`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModule

from levin import envs
from levin.errors import one_sentence
from levin.hints import NonNegativeInt, PositiveInt


@torch.inference_mode()
def evaluate(policy: TensorDictModule, env: envs.SeededVectorEnv, episodes: int) -> tuple[list[float], list[int]]:
    """The undiscounted returns and the lengths of `episodes` episodes.

    Each env plays a fixed number of episodes: counting the first to finish would favour short ones.
    """
    num_envs = env.num_envs
    device = next(iter(policy.parameters()), torch.empty(0)).device
    dtype = np.dtype(envs.describe(env)["observation"]["dtype"])
    quota = [episodes // num_envs + (i < episodes % num_envs) for i in range(num_envs)]
    returns: list[list[float]] = [[] for _ in range(num_envs)]
    lengths: list[list[int]] = [[] for _ in range(num_envs)]
    total, length = np.zeros(num_envs), np.zeros(num_envs, dtype=int)
    observation = env.begin([0] * num_envs, np.ones(num_envs, dtype=bool))
    while any(len(done) < wanted for done, wanted in zip(returns, quota, strict=True)):
        batch = torch.as_tensor(np.asarray(observation, dtype=dtype), device=device)
        observation, reward, terminated, truncated, _ = env.step(policy.module(batch).cpu().numpy())
        total += reward
        length += 1
        done = terminated | truncated
        if done.any():
            for i in np.flatnonzero(done):
                returns[i].append(float(total[i]))
                lengths[i].append(int(length[i]))
            total[done], length[done] = 0, 0
            observation, _ = env.reset(options={"reset_mask": done})
    pairs = list(zip(returns, lengths, quota, strict=True))
    return [x for each, _, n in pairs for x in each[:n]], [x for _, each, n in pairs for x in each[:n]]


def evaluate_run(*, run: str, episodes: PositiveInt = 100, seed: NonNegativeInt = 1) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run and write `evaluation.json` beside its config.

    Args:
        run: The run folder.
        episodes: How many; the envs' seeds are not those of the evaluations during training.
        seed: Root of the envs' seeds.
    """
    from levin import config  # which checks values against the callbacks, which evaluate
    from levin.checkpoint import load_algorithm

    algorithm = load_algorithm(Path(run))
    env_config = config.load_env(Path(run))
    env = envs.make(env_config, seed=seed, purpose=envs.EVALUATION, num_envs=min(episodes, 10))
    returns, _ = evaluate(algorithm.policy(deterministic=True), env, episodes)
    env.close()
    result = {
        "return_mean": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "episodes": episodes,
        "env_steps": algorithm.env_steps,
        "seed": seed,
    }
    (Path(run) / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def main() -> None:
    """Print the mean return and its deviation."""
    from levin import config

    with one_sentence():
        result = evaluate_run(**config.arguments(evaluate_run))
    print(f"{result['return_mean']:.1f} +- {result['return_std']:.1f} over {result['episodes']} episodes")


if __name__ == "__main__":
    main()
