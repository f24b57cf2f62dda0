"""Gradients from single trajectories of one fixed policy on CartPole-v1, which several parts share.

The policy is that of the study of the variance: half-trained, with episodes of about 40 steps.
"""

from functools import cache
from typing import Any

import torch
from experiments.variance import run as variance
from tensordict import TensorDict
from torch import Tensor

GAMMA = 0.99
TRAJECTORIES, FIT_EPISODES = 2000, 100
FORMS = {"simple REINFORCE": "return", "reward-to-go": "reward_to_go", "value baseline": "baseline"}


def build(form: str, *, seed: int, overrides: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """Return REINFORCE with this `algo.advantage` and the fixed policy, and its rollout loader."""
    words = [*variance.REINFORCE, f"algo.advantage={form}", *variance.EXACT, f"algo.gamma={GAMMA}", f"seed={seed}"]
    algorithm, loader = variance.build([*words, *overrides])
    algorithm.actor.load_state_dict(variance.half_trained_policy())
    return algorithm, loader


def gradient(algorithm: Any, rollout: TensorDict, weight: Tensor) -> Tensor:
    """Return the policy gradient that the algorithm computes from one trajectory and these weights: `[P]`."""
    loss = algorithm.actor_loss(rollout, weight)[0]
    return torch.cat([part.flatten() for part in torch.autograd.grad(-loss, list(algorithm.actor.parameters()))])


@cache
def gradients() -> dict[str, Tensor]:
    """Return gradients from `TRAJECTORIES` trajectories by form, `[TRAJECTORIES, P]`; `one`: every weight is 1.

    The value baseline was fitted to this policy with other episodes.
    """
    forms = {}
    for name, form in FORMS.items():
        algorithm, loader = build(form, seed=0)
        variance.fit_critic(algorithm, variance.collect_episodes(loader, FIT_EPISODES))
        forms[name] = algorithm
    loader = build("return", seed=1)[1]
    samples: dict[str, list[Tensor]] = {name: [] for name in (*FORMS, "one")}
    for _ in range(TRAJECTORIES):
        rollout = variance.collect_episodes(loader, 1)
        for name, algorithm in forms.items():
            samples[name].append(gradient(algorithm, rollout, algorithm.weight(rollout)))
        one = torch.ones_like(rollout["next", "reward"])
        samples["one"].append(gradient(forms["reward-to-go"], rollout, one))
    return {name: torch.stack(each) for name, each in samples.items()}


def total_variance(samples: Tensor) -> tuple[float, float]:
    """Return Var[g] = E sum_i (g_i - E g_i)^2 of samples `[N, P]`, and its standard error."""
    squares = (samples - samples.mean(0)).double().square().sum(1) * len(samples) / (len(samples) - 1)
    return float(squares.mean()), float(squares.std() / len(squares) ** 0.5)
