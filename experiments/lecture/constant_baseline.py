"""Mean and variance of the policy gradient against the size of a constant baseline."""

import numpy as np
from experiments.lecture.cartpole import gradients, total_variance
from experiments.lecture.drawing import COLORS, HERE, INK, panels, read, save
from experiments.study import write_table

NAME = "constant_baseline"
BASELINES = (-20, -10, 0, 5, 10, 15, 20, 25, 30, 40, 50)


def measure() -> None:
    """Write constant_baseline.csv: the mean gradient and its variance for weights G_t - b, and for G_t - V(s_t).

    The mean is the projection on one fixed direction, the mean gradient of other trajectories. `zero` is the squared
    norm of the mean of b grad log pi, divided by its expectation if the true mean is 0.
    """
    to_go, one, learned = (gradients()[name].double() for name in ("reward-to-go", "one", "value baseline"))
    first = len(to_go) // 3
    direction = learned[:first].mean(0) / learned[:first].mean(0).norm()
    to_go, one, learned = to_go[first:], one[first:], learned[first:]
    variance_of_one, count = total_variance(one)[0], len(one)
    rows = []
    for name, samples in {**{str(b): to_go - b * one for b in BASELINES}, "V(s)": learned}.items():
        projected = samples @ direction
        numbers = projected.mean(), projected.std() / count**0.5, *total_variance(samples)
        rows.append([name, *(f"{float(each):.5g}" for each in numbers)])
    centred = one - one.mean(0)
    optimum = float((centred * (to_go - to_go.mean(0))).sum() / centred.square().sum())
    rows.append(["optimum", f"{optimum:.5g}", "", f"{total_variance(to_go - optimum * one)[0]:.5g}", ""])
    rows.append(["zero", f"{float(one.mean(0).square().sum()) / (variance_of_one / count):.5g}", "", "", ""])
    write_table(HERE / f"{NAME}.csv", ["baseline", "mean", "standard_error", "variance", "variance_error"], rows)


def draw() -> None:
    """Draw the mean and the variance against b."""
    rows = {row["baseline"]: row for row in read(NAME)}
    figure, (left, right) = panels(2)
    mean, error, variance, spread = (
        np.array([float(rows[str(b)][key]) for b in BASELINES])
        for key in ("mean", "standard_error", "variance", "variance_error")
    )
    left.errorbar(BASELINES, mean, 1.96 * error, fmt="o", capsize=3)
    left.axhline(float(rows["V(s)"]["mean"]), color=COLORS[1], label="with $V(s_t)$")
    left.set(xlabel="baseline $b$", ylabel="mean gradient along one direction", title="mean, 95% interval")
    left.set_ylim(0, None)
    left.legend(loc="lower left")
    b = np.linspace(BASELINES[0], BASELINES[-1], 200)
    right.errorbar(BASELINES, variance, 1.96 * spread, fmt="o", capsize=3)
    right.plot(b, np.polynomial.Polynomial.fit(BASELINES, variance, 2)(b), color=INK, linewidth=1, label="parabola")
    right.axhline(float(rows["V(s)"]["variance"]), color=COLORS[1], label="with $V(s_t)$")
    right.axvline(
        float(rows["optimum"]["mean"]),
        color=COLORS[2],
        linestyle=":",
        label=f"best $b$ = {float(rows['optimum']['mean']):.1f}",
    )
    right.set(xlabel="baseline $b$", ylabel="Var[g] of one trajectory", title="variance")
    right.set_ylim(0, 1.45 * variance.max())
    right.legend(loc="upper left")
    save(figure, NAME)
