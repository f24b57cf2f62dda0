"""Monte-Carlo estimate of the expected return J: its error against the number of episodes."""

import numpy as np
from experiments.lecture.cartpole import build
from experiments.lecture.drawing import COLORS, HERE, INK, panels, read, save
from experiments.study import write_table
from experiments.variance.run import collect_episodes

NAME = "expected_return"
EPISODES = 4096
SIZES = tuple(2**k for k in range(8))  # episodes of one estimate


def measure() -> None:
    """Write expected_return.csv: the discounted return of each episode, in order."""
    algorithm, loader = build("return", seed=1)
    rows = []
    for _ in range(EPISODES // 64):
        rollout = collect_episodes(loader, 64)
        first = rollout["step_count"] == 0
        rows += [[f"{value:.3f}"] for value in algorithm.reward_to_go(rollout)[first]]
    write_table(HERE / f"{NAME}.csv", ["discounted_return"], rows)


def draw() -> None:
    """Draw running means of disjoint groups of episodes, and the deviation of estimates from N episodes."""
    returns = np.array([float(row["discounted_return"]) for row in read(NAME)])
    figure, (left, middle, right) = panels(3, width=11.0)
    left.hist(returns, bins=40)
    left.axvline(returns.mean(), color=COLORS[1], label=f"mean {returns.mean():.1f}")
    left.set(xlabel="discounted return $R$", ylabel="episodes", title=f"{len(returns):,} episodes of one policy")
    left.legend()
    for group in returns.reshape(8, -1):
        middle.plot(np.arange(1, len(group) + 1), group.cumsum() / np.arange(1, len(group) + 1), linewidth=1)
    middle.axhline(returns.mean(), color=INK, linewidth=1, linestyle="--")
    middle.set(xscale="log", xlabel="episodes $N$", ylabel="mean of $N$ returns", title="8 estimates")
    deviation = [returns[: len(returns) // n * n].reshape(-1, n).mean(1).std(ddof=1) for n in SIZES]
    estimates = [len(returns) // n for n in SIZES]
    error = [1.96 * each / np.sqrt(2 * (n - 1)) for each, n in zip(deviation, estimates, strict=True)]
    right.errorbar(SIZES, deviation, error, fmt="o", capsize=3, label="measured, 95% interval")
    right.plot(SIZES, returns.std(ddof=1) / np.sqrt(SIZES), color=INK, label=r"$\sigma / \sqrt{N}$")
    right.set(xscale="log", yscale="log", xlabel="episodes $N$", ylabel="deviation of the estimate", title="error")
    right.legend()
    save(figure, NAME)
