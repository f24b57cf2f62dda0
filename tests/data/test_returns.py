"""Returns and advantages: compared with values by hand, with brute force and with TorchRL."""

import pytest
import torch
from torchrl.objectives.value import functional as oracle

from levin.data import returns

SHAPES = [(1, 1), (1, 2), (3, 7), (2, 64), (1, 257), (16, 5)]


def rollout(n: int, steps: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random rewards, values and end flags `[n, steps, 1]` in float64."""
    generator = torch.Generator().manual_seed(seed)
    real = [torch.randn(n, steps, 1, generator=generator, dtype=torch.float64) for _ in range(3)]
    reward, value, next_value = real
    terminated, truncated = (torch.rand(n, steps, 1, generator=generator) < 0.15 for _ in range(2))
    done = terminated | truncated
    # Within an episode, the next state of a step is the state of the next step.
    next_value[:, :-1] = torch.where(done[:, :-1], next_value[:, :-1], value[:, 1:])
    return {"reward": reward, "value": value, "next_value": next_value, "terminated": terminated, "done": done}


def without_value(data):
    """Drop the values, which returns do not take."""
    return {key: each for key, each in data.items() if key != "value"}


def brute_force(data, gamma, weights):
    """Return mixtures of the k-step returns of every step, by explicit sums.

    The k-step return has the weight `weights(k - 1)`; the longest one has the rest.
    """
    reward, next_value, terminated, done = (data[key][..., 0] for key in ("reward", "next_value", "terminated", "done"))
    result = torch.zeros_like(reward)
    for i in range(reward.shape[0]):
        for t in range(reward.shape[1]):
            k_step_returns, total = [], 0.0
            for k, at in enumerate(range(t, reward.shape[1])):
                total += gamma**k * float(reward[i, at])
                bootstrap = 0.0 if terminated[i, at] else gamma ** (k + 1) * float(next_value[i, at])
                k_step_returns.append(total + bootstrap)
                if done[i, at]:
                    break
            mixture = [weights(k) for k in range(len(k_step_returns) - 1)]
            mixed = sum(weight * value for weight, value in zip(mixture, k_step_returns, strict=False))
            result[i, t] = mixed + (1 - sum(mixture)) * k_step_returns[-1]
    return result.unsqueeze(-1)


@pytest.mark.parametrize("shape", SHAPES)
def test_reward_to_go_is_the_discounted_sum_of_later_rewards(shape):
    data = without_value(rollout(*shape))
    torch.testing.assert_close(returns.reward_to_go(**data, gamma=0.9), brute_force(data, 0.9, lambda k: 0.0))


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_lambda_returns_are_mixtures_of_n_step_returns(shape, lambda_):
    data = without_value(rollout(*shape))
    expected = brute_force(data, 0.9, lambda k: (1 - lambda_) * lambda_**k)
    torch.testing.assert_close(returns.lambda_return(**data, gamma=0.9, lambda_=lambda_), expected)


@pytest.mark.parametrize("n", [1, 2, 5, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_n_step_returns(shape, n):
    data = without_value(rollout(*shape))
    expected = brute_force(data, 0.9, lambda k: float(k == n - 1))
    torch.testing.assert_close(returns.n_step_return(**data, gamma=0.9, n=n), expected)


@pytest.mark.parametrize("lambda_", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_gae_equals_torchrls_and_the_lambda_return_minus_the_value(shape, lambda_):
    data = rollout(*shape)
    advantage = returns.gae(**data, gamma=0.97, gae_lambda=lambda_)
    names = ("value", "next_value", "reward", "done", "terminated")
    reference, target = oracle.generalized_advantage_estimate(0.97, lambda_, *(data[name] for name in names))
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # TorchRL has gamma and lambda in float32
    torch.testing.assert_close(advantage, reference, **tolerance)
    torch.testing.assert_close(advantage + data["value"], target, **tolerance)
    lambda_return = returns.lambda_return(**without_value(data), gamma=0.97, lambda_=lambda_)
    torch.testing.assert_close(advantage + data["value"], lambda_return)


def column(*values, dtype=torch.float32):
    """Return values as `[1, T, 1]`."""
    return torch.tensor(values, dtype=dtype).reshape(1, -1, 1)


@pytest.mark.parametrize(
    ("terminated", "done", "expected"),
    [
        ((0, 0, 0), (0, 0, 0), (1 + 0.5 * (2 + 0.5 * 23), 2 + 0.5 * 23, 3 + 0.5 * 40)),  # rollout ends: V(s') = 40
        ((0, 0, 1), (0, 0, 1), (1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3)),  # terminated at the end
        ((0, 1, 0), (0, 1, 0), (1 + 0.5 * 2, 2, 3 + 0.5 * 40)),  # terminated in the middle
        ((0, 0, 0), (0, 1, 0), (1 + 0.5 * (2 + 0.5 * 20), 2 + 0.5 * 20, 3 + 0.5 * 40)),  # truncated in the middle
    ],
)
def test_returns_and_advantages_by_hand(terminated, done, expected):
    reward, next_value = column(1.0, 2.0, 3.0), column(10.0, 20.0, 40.0)
    flags = column(*terminated, dtype=torch.bool), column(*done, dtype=torch.bool)
    data = {"reward": reward, "terminated": flags[0], "done": flags[1], "next_value": next_value}
    assert torch.equal(returns.reward_to_go(**data, gamma=0.5), column(*expected))
    value = column(7.0, 8.0, 9.0)
    one_step = returns.gae(**data, value=value, gamma=0.5, gae_lambda=0.0)
    assert torch.equal(one_step, reward + 0.5 * ~flags[0] * next_value - value)
    assert torch.equal(returns.n_step_return(**data, gamma=0.5, n=1), one_step + value)


def test_inputs_are_not_modified_and_zero_steps_are_refused():
    data = rollout(3, 9)
    before = {key: each.clone() for key, each in data.items()}
    returns.gae(**data, gamma=0.9, gae_lambda=0.9)
    returns.n_step_return(**without_value(data), gamma=0.9, n=3)
    returns.reward_to_go(**without_value(data), gamma=0.9)
    assert all(torch.equal(data[key], before[key]) for key in data)
    with pytest.raises(ValueError, match="an n-step return has at least one step"):
        returns.n_step_return(**without_value(data), gamma=0.9, n=0)


def test_float32_is_as_accurate_as_a_loop():
    data = {key: each.float() if each.is_floating_point() else each for key, each in rollout(1, 2048).items()}
    advantage = returns.gae(**data, gamma=0.999, gae_lambda=0.99)
    exact = returns.gae(
        **{key: each.double() if each.is_floating_point() else each for key, each in data.items()},
        gamma=0.999,
        gae_lambda=0.99,
    )
    decay = 0.999 * 0.99 * ~data["done"]
    delta = data["reward"] + 0.999 * ~data["terminated"] * data["next_value"] - data["value"]
    loop, last = torch.zeros_like(delta), torch.zeros(1, 1)
    for t in reversed(range(2048)):
        last = loop[:, t] = delta[:, t] + decay[:, t] * last
    assert (advantage - exact).abs().max() <= 2 * (loop - exact).abs().max() + 1e-6
