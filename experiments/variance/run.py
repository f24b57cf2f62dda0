"""Study of the variance of the policy gradient: does it fall with each step from simple REINFORCE to the advantage?

`make study NAME=variance` writes gradient.csv (variance of the gradient from one trajectory, for one fixed policy on
CartPole-v1), curves.csv (learning curves, five seeds each), variance.png and README.md beside this file.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from experiments.study import read_evaluations, read_words, train_runs, write_table
from tensordict import TensorDict
from torch import Tensor

from levin.algorithms.base import Algorithm
from levin.collectors.vector import VectorCollector
from levin.config.compose import compose
from levin.core.process import silence_libraries
from levin.data.rollout import WholeEpisodes
from levin.lab.pictures import read_csv
from levin.results.aggregates import iqm_with_interval
from levin.runs.load import load_algorithm
from levin.training.session import build_run

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs" / "variance"
SAMPLES, FIT_EPISODES, FIT_UPDATES = 1000, 300, 3000
SEEDS, ENV_STEPS = range(5), 60_000
COMMON = ["env=cartpole", "env.num_envs=1", "algo.hidden_sizes=[64,64]", "algo.normalize_advantage=false"]
COMMON += ["trainer.threads=1", "trainer.accelerator=cpu", "logger=csv"]
# All forms have the same learning rate of the policy and the same number of transitions per update.
REINFORCE = ["algo=reinforce", "algo.lr=1e-3", "algo.transitions_per_update=1000", "algo.entropy_coef=0"]
REINFORCE += ["algo.critic_updates=50", "algo.max_grad_norm=null"]
ACTOR_CRITIC = ["algo=actor_critic", "algo.actor_lr=1e-3", "algo.steps_per_iteration=1000", "algo.critic_updates=50"]
FORMS = {
    "simple REINFORCE": [*REINFORCE, "algo.advantage=return"],
    "reward-to-go": [*REINFORCE, "algo.advantage=reward_to_go"],
    "value baseline": [*REINFORCE, "algo.advantage=baseline"],
    "Q critic": [*ACTOR_CRITIC, "algo.critic=q", "algo.q_target=expected"],
    "advantage": [*ACTOR_CRITIC, "algo.critic=advantage"],
}
# Weight step t by gamma^t and sum over each episode, as in the exact gradient of J.
EXACT = ["algo.discount_state_weighting=true", "algo.average_over=episodes"]


def build(words: list[str]) -> tuple[Any, Any]:
    """Build an algorithm with its optimisers, and its rollout loader, without a Trainer."""
    algorithm, loader = build_run(compose([*COMMON, *words]))
    algorithm.configure_optimizers()
    algorithm.manual_backward = torch.Tensor.backward  # type: ignore[method-assign]
    return algorithm, loader


def collect_episodes(loader: Any, number: int) -> TensorDict:
    """Return the next `number` episodes of the loader's policy, `[1, T]`."""
    collector = loader.collector
    assert isinstance(collector, VectorCollector)
    collector.steps = WholeEpisodes(episodes=number)
    return next(loader)


def actor_loss(algorithm: Any, rollout: TensorDict) -> Tensor:
    """Return the loss of the policy."""
    if hasattr(algorithm, "critic_form"):
        rollout = rollout.flatten(0, 1)
    return algorithm.actor_loss(rollout, algorithm.weight(rollout))[0]


def fit_critic(algorithm: Any, rollout: TensorDict) -> None:
    """Train the critic, if there is one, on the values of the fixed policy."""
    if getattr(algorithm, "critic", None) is not None:
        rollout = rollout.flatten(0, 1) if hasattr(algorithm, "critic_form") else rollout
        for _ in range(FIT_UPDATES):
            algorithm.step(algorithm.critic_optimizer, algorithm.critic_loss(rollout))


def half_trained_policy() -> dict[str, Tensor]:
    """Return the parameters of a half-trained policy: reward-to-go after 20,000 env steps."""
    run = RUNS / "policy"
    train_runs({run: [*COMMON, *FORMS["reward-to-go"], "total_env_steps=20_000"]})
    return load_algorithm(run).actor.state_dict()  # type: ignore[union-attr]


def gradients(policy: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the gradients of J by form, `[SAMPLES, P]`: one per trajectory, the same trajectories for all forms."""
    algorithms: dict[str, Algorithm] = {}
    for name, words in FORMS.items():
        per_episode = ["algo.episodes_per_update=1"] if words[0] == ACTOR_CRITIC[0] else []
        algorithm, loader = build([*words, *EXACT, *per_episode])
        algorithm.actor.load_state_dict(policy)
        fit_critic(algorithm, collect_episodes(loader, FIT_EPISODES))
        algorithms[name] = algorithm
    algorithm, loader = build([*FORMS["simple REINFORCE"], *EXACT, "seed=1"])
    algorithm.actor.load_state_dict(policy)
    samples: dict[str, list[np.ndarray]] = {name: [] for name in FORMS}
    for _ in range(SAMPLES):
        rollout = collect_episodes(loader, 1)
        for name, each in algorithms.items():
            parts = torch.autograd.grad(-actor_loss(each, rollout), list(each.actor.parameters()))  # type: ignore[union-attr]
            samples[name].append(torch.cat([part.flatten() for part in parts]).numpy())
    return {name: np.stack(each) for name, each in samples.items()}


def measure_gradients() -> None:
    """Write gradient.csv: Var[g] = E sum_i (g_i - E g_i)^2, its standard error, and the norm of E g, for each form."""
    rows = []
    for name, each in gradients(half_trained_policy()).items():
        squares = ((each - each.mean(0)) ** 2).sum(1)  # [SAMPLES, P] -> [SAMPLES]
        error = squares.std(ddof=1) / SAMPLES**0.5
        rows.append([name, f"{squares.mean():.6g}", f"{error:.3g}", f"{np.linalg.norm(each.mean(0)):.6g}"])
    write_table(HERE / "gradient.csv", ["form", "variance", "standard_error", "mean_norm"], rows)


def measure_learning() -> None:
    """Train all forms, and write curves.csv with every evaluation of every seed. Complete runs are kept."""
    settings = [f"total_env_steps={ENV_STEPS}", "eval.every=5000"]
    runs = {(name, seed): RUNS / f"{name.replace(' ', '_')}_s{seed}" for name in FORMS for seed in SEEDS}
    train_runs({run: [*COMMON, *FORMS[name], f"seed={seed}", *settings] for (name, seed), run in runs.items()})
    rows = []
    for (name, seed), run in runs.items():
        # Iterations end with an episode, at other env steps for each seed: round down to a grid that all share.
        grid = [(int(row["env_steps"]) // 5000 * 5000, row["eval/return_mean"]) for row in read_evaluations(run)]
        rows += [[name, seed, *each] for each in grid]
    write_table(HERE / "curves.csv", ["form", "seed", "env_steps", "return_mean"], rows)


def report() -> None:
    """Draw variance.png and write README.md from gradient.csv and curves.csv."""
    by_form = {row["form"]: row for row in read_csv(HERE / "gradient.csv")}
    variance = {name: float(row["variance"]) for name, row in by_form.items()}
    curves: dict[str, dict[int, list[float]]] = {name: {} for name in FORMS}
    for row in read_csv(HERE / "curves.csv"):
        curves[row["form"]].setdefault(int(row["env_steps"]), []).append(float(row["return_mean"]))

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors = dict(zip(FORMS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    names = list(reversed(FORMS))
    errors = [1.96 * float(by_form[name]["standard_error"]) for name in names]
    left.barh(names, [variance[name] for name in names], xerr=errors, color=[colors[name] for name in names])
    left.set(xscale="log", xlabel="Var[g] of one trajectory", title=f"Fixed policy, {SAMPLES:,} trajectories")
    for name, by_step in curves.items():
        steps = sorted(step for step, values in by_step.items() if len(values) == len(SEEDS))
        mean, (low, high) = iqm_with_interval(np.array([by_step[step] for step in steps]).T[:, None])
        right.plot(steps, mean, color=colors[name], label=name)
        right.fill_between(steps, low, high, color=colors[name], alpha=0.15, linewidth=0)
    right.set(xlabel="env steps", ylabel="return", title=f"Learning, {len(SEEDS)} seeds: IQM, 95% interval")
    right.legend(loc="upper left", fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "variance.png", dpi=120)
    plt.close(figure)

    lines = ["| weight of grad log pi | Var[g] | relative to simple REINFORCE | norm of mean gradient | final return |"]
    lines.append("|---|---|---|---|---|")
    for name, row in by_form.items():
        last = curves[name][max(step for step, values in curves[name].items() if len(values) == len(SEEDS))]
        share = variance[name] / variance["simple REINFORCE"]
        estimate = f"{variance[name]:,.4g} ± {float(row['standard_error']):.2g}"
        norm = f"{float(row['mean_norm']):.3g} ± {np.sqrt(variance[name] / SAMPLES):.2g}"
        lines.append(f"| {name} | {estimate} | {share:.2g} | {norm} | {np.mean(last):.0f} |")
    (HERE / "README.md").write_text(
        TEXT.format(table="\n".join(lines), samples=SAMPLES, seeds=len(SEEDS), env_steps=ENV_STEPS)
    )


TEXT = """# The variance of the policy gradient

The lecture claims that the variance falls with each step from simple REINFORCE to the advantage. This study measures it
on CartPole-v1. `make study NAME=variance` writes everything in this folder.

{table}

Var[g] = E sum_i (g_i - E g_i)^2, where g is the gradient from one trajectory, with gamma^t in the sum; ± is its
standard error. That of the mean gradient is sqrt(Var[g] / {samples:,}), which also makes its norm larger. The policy is
fixed and half-trained. All forms use the same {samples:,} trajectories, and the critics were fitted to this policy.
The first three forms have the same expectation, except for episodes that the time limit cuts. The last two are biased
by the errors of their critics.

The final return is the mean of {seeds} seeds after {env_steps:,} env steps. All forms have the same learning rate of
the policy and the same number of transitions per update.

![Variance and learning curves](variance.png)
"""


if __name__ == "__main__":
    read_words()
    silence_libraries()
    measure_gradients()
    measure_learning()
    report()
