"""What followed an action: reward-to-go, n-step, TD(lambda) returns and GAE. Pure functions, lecture rows 2, 5 and 12.

Everything is `[N, T, 1]`: N envs, T steps in time order, as a rollout has them. Episodes may end anywhere within it:

- `terminated`: the episode is over, and nothing follows. V(s') counts as 0.
- `done` without `terminated`: it was cut short (truncated). What would have followed is V(s'), s' the true last
  observation, which is why `next_value` is asked for and not a shifted `value`.
- The end of the rollout is such a cut too.
"""

import torch
from torch import Tensor


def reward_to_go(*, reward: Tensor, terminated: Tensor, done: Tensor, next_value: Tensor, gamma: float) -> Tensor:
    """G_t = sum_{t' >= t} gamma^(t'-t) r_{t'+1}, to the end of the episode; from a cut on, gamma^k V(s').

    Args:
        reward: r_{t+1}, `[N, T, 1]`.
        terminated: `[N, T, 1]`, bool.
        done: terminated or truncated.
        next_value: V(s_{t+1}); zeros where a cut is to count for nothing.
        gamma: Discount.
    """
    return lambda_return(
        reward=reward, terminated=terminated, done=done, next_value=next_value, gamma=gamma, lambda_=1.0
    )


def lambda_return(
    *, reward: Tensor, terminated: Tensor, done: Tensor, next_value: Tensor, gamma: float, lambda_: float
) -> Tensor:
    """G_t = r_{t+1} + gamma ((1 - lambda) V(s_{t+1}) + lambda G_{t+1}): TD(lambda), Sutton and Barto 2018, 12.18.

    lambda = 0 is the one-step target, lambda = 1 the reward-to-go. Arguments as of `reward_to_go`.
    """
    go_on = lambda_ * (~done).to(reward)  # [N, T, 1]: the weight of G_{t+1}
    go_on[:, -1] = 0
    discount = gamma * (~terminated).to(reward)
    return discounted_sum(reward + discount * (1 - go_on) * next_value, discount * go_on)


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
    """A_t = delta_t + gamma lambda A_{t+1},  delta_t = r_{t+1} + gamma V(s_{t+1}) - V(s_t).

    Schulman et al. 2016 (arXiv:1506.02438), Eq. 16.

    A_t + V(s_t) is the TD(lambda) return, the critic's target. `value` is V(s_t); the rest as of `reward_to_go`.
    """
    discount = gamma * (~terminated).to(reward)
    delta = reward + discount * next_value - value
    return discounted_sum(delta, gae_lambda * discount * ~done)


def n_step_return(
    *, reward: Tensor, terminated: Tensor, done: Tensor, next_value: Tensor, gamma: float, n: int
) -> Tensor:
    """G_t = r_{t+1} + ... + gamma^(n-1) r_{t+n} + gamma^n V(s_{t+n}); fewer steps before an end or a cut.

    Arguments as of `reward_to_go`; `n` is 1 or more.
    """
    if n < 1:
        raise ValueError(f"n={n}: an n-step return has one step or more")
    discount = gamma * (~terminated).to(reward)
    one_step = reward + discount * next_value  # [N, T, 1]
    go_on = ~done
    go_on[:, -1] = False
    result = one_step
    for _ in range(n - 1):  # G^(k+1)_t = r_{t+1} + gamma G^(k)_{t+1}, where the episode goes on
        result = torch.where(go_on, reward + gamma * result.roll(-1, 1), one_step)
    return result


def discounted_sum(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay_t y_{t+1}, all `[N, T, *]`, in log2(T) passes over everything.

    A scan by doubling (Hillis and Steele 1986): after the k-th pass y_t has the first 2^k terms of its sum. A loop over
    time takes T passes over one column, which on long rollouts is many times slower.
    """
    step, steps = 1, x.shape[1]
    while step < steps:
        x = torch.cat([torch.addcmul(x[:, :-step], decay[:, :-step], x[:, step:]), x[:, -step:]], 1)
        decay = torch.cat([decay[:, :-step] * decay[:, step:], torch.zeros_like(decay[:, -step:])], 1)
        step *= 2
    return x
