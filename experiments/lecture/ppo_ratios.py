"""PPO with a clip, without one and with a KL penalty: ratios over the epochs of an update, KL, and returns."""

from typing import Any

import torch
from experiments.lecture.agents import SEEDS, build, iterate, read, write
from experiments.lecture.drawing import COLORS, INK, panels, save
from torch import Tensor

from levin.algorithms.ppo import PPO

WORDS = ["env=pendulum_batched", "algo=ppo", "algo.clip_value=false"]
EPSILON = 0.3  # of the tuned config
FORMS = {
    "clip": [f"algo.clip_epsilon={EPSILON}"],
    "no clip": ["algo.clip_epsilon=1e6"],
    "KL penalty": ["algo.penalty=kl", "algo.target_kl=0.01"],
}
ITERATIONS, SHOWN = 12, 5  # 12,800 env steps each
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)


class Measured(PPO):
    """PPO that measures its ratios after each epoch."""

    measured: list[dict[str, float]]

    def epoch(self, data: Any, old: Any, clip_epsilon: Tensor) -> Tensor:
        """Train on one pass over the rollout, and add a row to `measured`."""
        kl = super().epoch(data, old, clip_epsilon)
        self.measured.append({"epoch": len(self.measured) + 1} | ratios(self, data, old))
        return kl


def measure() -> None:
    """Train all forms on Pendulum and measure their policies after each epoch."""
    rows: list[dict[str, Any]] = []
    for form, words in FORMS.items():
        for seed in SEEDS:
            algorithm, loader = build([*WORDS, *words, f"seed={seed}"])
            algorithm.__class__ = Measured
            for iteration in range(1, ITERATIONS + 1):
                algorithm.measured = []
                iterate(algorithm, loader)
                episode_return = loader.pop_metrics()["episode/return"]
                at = {"form": form, "seed": seed, "iteration": iteration, "return_mean": episode_return}
                rows += [at | row for row in algorithm.measured[0 if iteration == SHOWN else -1 :]]
    write("ppo_ratios", rows, digits=4)


@torch.no_grad()
def ratios(algorithm: PPO, data: Any, old: Any) -> dict[str, float]:
    """Return quantiles of rho over a whole rollout, the fraction outside the clip range, and KL(pi_k || pi)."""
    new = algorithm.actor(algorithm.trunk(data["observation"]))
    ratio = (new.log_prob(data["action"]) - data["log_prob"]).exp()
    row = {"kl": old.kl(new).mean().item(), "outside": ((ratio - 1).abs() > EPSILON).float().mean().item()}
    values = torch.quantile(ratio.flatten().double(), torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return row | {f"q{quantile}": value for quantile, value in zip(QUANTILES, values, strict=True)}


def draw() -> None:
    """Draw quantiles of the ratios over the epochs of one update, the KL of all updates, and the returns."""
    table = read("ppo_ratios")
    figure, (first, second, third, fourth) = panels(4, width=13, height=3.8)
    colors = dict(zip(FORMS, (COLORS[0], COLORS[3], COLORS[2]), strict=True))
    for panel, form in ((first, "clip"), (second, "no clip")):
        epochs = table[(table.form == form) & (table.iteration == SHOWN)].groupby("epoch").median(numeric_only=True)
        for low, high, alpha in ((0.001, 0.999, 0.15), (0.01, 0.99, 0.2), (0.05, 0.95, 0.3), (0.25, 0.75, 0.5)):
            limits = epochs[f"q{low}"], epochs[f"q{high}"]
            panel.fill_between(epochs.index, *limits, color=colors[form], alpha=alpha, linewidth=0, label=f"{high:.1%}")
        for bound in (1 - EPSILON, 1 + EPSILON):
            panel.axhline(bound, color=INK, linewidth=0.9, linestyle=":")
        panel.set(yscale="log", ylim=(0.05, 20), xlabel=f"epoch of update {SHOWN}", title=rf"$\rho$: {form}")
        panel.set_yticks([0.1, 0.3, 0.7, 1, 1.3, 3, 10], ["0.1", "0.3", "0.7", "1", "1.3", "3", "10"])
        panel.minorticks_off()
        panel.set_xticks([1, 5, 10, 14])
    last = table.sort_values("epoch").groupby(["form", "seed", "iteration"]).last().reset_index()
    for form, color in colors.items():
        for panel, column in ((third, "kl"), (fourth, "return_mean")):
            by_iteration = last[last.form == form].groupby("iteration")[column]
            x = by_iteration.median().index * 12.8
            panel.plot(x, by_iteration.median(), color=color, label=form)
            panel.fill_between(x, by_iteration.min(), by_iteration.max(), color=color, alpha=0.2, linewidth=0)
    third.set(yscale="log", xlabel="thousands of env steps", title=r"KL$(\pi_k \| \pi)$ after the last epoch, nats")
    fourth.set(xlabel="thousands of env steps", title="return of Pendulum")
    third.legend(fontsize=9, loc=(0.45, 0.42))
    save(figure, "ppo_ratios")
