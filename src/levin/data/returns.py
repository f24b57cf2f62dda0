"""Compute returns and advantages: reward-to-go, n-step returns, TD(lambda) returns and GAE.

All arguments and results are `[N, T, 1]`: N envs, T steps in time order, as in a rollout. Episodes may end anywhere:

- `terminated`: the episode is over and nothing follows, so V(s') counts as 0.
- `done` without `terminated`: the episode was truncated, and the return bootstraps from V(s'). Here s' is the true last
  observation of the episode, so `next_value` is not `value` shifted by one step.
- The end of the rollout is treated like a truncation.
"""

import torch
from torch import Tensor


def reward_to_go(*, reward: Tensor, terminated: Tensor, done: Tensor, next_value: Tensor, gamma: float) -> Tensor:
    """Return G_t = sum_{t' >= t} gamma^(t'-t) r_{t'+1} to the end of the episode.

    If the episode is truncated after k steps, gamma^k V(s_{t+k}) is added.

    Args:
        reward: r_{t+1}, `[N, T, 1]`.
        terminated: `[N, T, 1]`, bool.
        done: `[N, T, 1]`, bool: terminated or truncated.
        next_value: V(s_{t+1}), `[N, T, 1]`; zeros for returns without bootstrapping.
        gamma: Discount factor.
    """
    return lambda_return(
        reward=reward, terminated=terminated, done=done, next_value=next_value, gamma=gamma, lambda_=1.0
    )


def lambda_return(
    *, reward: Tensor, terminated: Tensor, done: Tensor, next_value: Tensor, gamma: float, lambda_: float
) -> Tensor:
    """Return the TD(lambda) return G_t = r_{t+1} + gamma ((1 - lambda) V(s_{t+1}) + lambda G_{t+1}).

    lambda = 0 gives the one-step target, lambda = 1 the reward-to-go. The arguments are as in `reward_to_go`.

    Source: Sutton and Barto 2018, Eq. 12.18.
    """
    weight = lambda_ * (~done).to(reward)  # [N, T, 1]: of G_{t+1}
    weight[:, -1] = 0
    discount = gamma * (~terminated).to(reward)
    return discounted_sum(reward + discount * (1 - weight) * next_value, discount * weight)


def gae(
    *,
    reward: Tensor,
    terminated: Tensor,
    done: Tensor,
    value: Tensor,
    next_value: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Return the GAE A_t = delta_t + gamma lambda A_{t+1},  delta_t = r_{t+1} + gamma V(s_{t+1}) - V(s_t).

    A_t + V(s_t) is the TD(lambda) return, the target of the critic. `value` is V(s_t); the other arguments are as in
    `reward_to_go`.

    Source: Schulman et al. 2016 (arXiv:1506.02438), Eq. 16.
    """
    discount = gamma * (~terminated).to(reward)
    delta = reward + discount * next_value - value
    return discounted_sum(delta, gae_lambda * discount * ~done)


def n_step_return(
    *, reward: Tensor, terminated: Tensor, done: Tensor, next_value: Tensor, gamma: float, n: int
) -> Tensor:
    """Return G_t = r_{t+1} + ... + gamma^(n-1) r_{t+n} + gamma^n V(s_{t+n}).

    It has fewer steps where the episode or the rollout ends before.

    The arguments are as in `reward_to_go`; `n` is 1 or more.

    Raises:
        ValueError: `n` is less than 1.
    """
    if n < 1:
        raise ValueError(f"n={n} is too small: an n-step return has at least one step")
    discount = gamma * (~terminated).to(reward)
    one_step = reward + discount * next_value  # [N, T, 1]
    continues = ~done
    continues[:, -1] = False
    result = one_step
    for _ in range(n - 1):  # G^(k+1)_t = r_{t+1} + gamma G^(k)_{t+1}, where the episode continues
        result = torch.where(continues, reward + gamma * result.roll(-1, 1), one_step)
    return result


def discounted_sum(x: Tensor, decay: Tensor) -> Tensor:
    """Return y_t = x_t + decay_t y_{t+1}, all `[N, T, *]`, in log2(T) passes over all steps.

    A parallel scan (Hillis and Steele 1986): after pass k, y_t is the sum of its first 2^k terms. A loop over time
    takes T passes over a single step each, which is many times slower on long rollouts.
    """
    step, steps = 1, x.shape[1]
    while step < steps:
        x = torch.cat([torch.addcmul(x[:, :-step], decay[:, :-step], x[:, step:]), x[:, -step:]], 1)
        decay = torch.cat([decay[:, :-step] * decay[:, step:], torch.zeros_like(decay[:, -step:])], 1)
        step *= 2
    return x
