"""What an estimator of the policy's gradient does to learning: REINFORCE and discrete SAC on CartPole-v1.

`python -m experiments.estimators.learning` writes learning.csv beside this file. A run that is there is not made again.
"""

import csv
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from levin import config, runs
from levin.train import train

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs" / "estimators"
SEEDS = range(3)
COMMON = ["env=cartpole", "trainer.threads=1", "trainer.accelerator=cpu", "logger=csv", "eval.every=2000"]
# Nothing but the estimator differs. Advantages as they are: dividing by their deviation would hide what they vary by.
REINFORCE = ["algo=reinforce", "algo.normalize_advantage=false", "algo.lr=1e-3", "algo.max_grad_norm=null"]
REINFORCE += ["algo.transitions_per_update=1000", "algo.episodes_per_update=2", "algo.entropy_coef=0"]
REINFORCE += ["algo.critic_updates=50", "total_env_steps=60_000"]
# The critic reads the action: of a list of values, which is linear in the action, most of these are the same.
SAC = ["algo=sac_discrete", "algo.critic=state_action", "algo.hidden_sizes=[128,128]", "algo.batch_size=128"]
SAC += ["algo.actor_lr=1e-3", "algo.critic_lr=1e-3", "algo.alpha_lr=1e-3", "total_env_steps=30_000"]
FORMS = {
    **{
        ("REINFORCE", name): [*REINFORCE, f"algo.advantage={name}"]
        for name in ("return", "reward_to_go", "leave_one_out", "self_critical", "baseline")
    },
    **{
        ("SAC-discrete", name): [*SAC, f"algo.actor_estimator={name}"]
        for name in ("exact", "loo", "straight_through", "gumbel_softmax", "reinmax")
    },
}


def run_of(algo: str, name: str, seed: int) -> Path:
    """Its folder."""
    return RUNS / f"{algo}_{name}_s{seed}"


def learn(algo: str, name: str, seed: int) -> None:
    """One run."""
    runs.quiet()
    cfg = config.compose([*COMMON, *FORMS[algo, name], f"seed={seed}"])
    run = run_of(algo, name, seed)
    if (runs.sessions(run).get("env_steps") or 0) < cfg.total_env_steps:
        train(cfg, run)


def main() -> None:
    """As many runs at once as there are cores, and then learning.csv."""
    jobs = [(*form, seed) for seed in SEEDS for form in FORMS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(learn, *job) for job in jobs]:
            done.result()
    with (HERE / "learning.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["algorithm", "estimator", "seed", "env_steps", "return_mean"])
        for algo, name, seed in jobs:
            with (run_of(algo, name, seed) / "metrics.csv").open() as metrics:
                rows = [row for row in csv.DictReader(metrics) if row["eval/return_mean"]]
            for row in rows:  # iterations end where episodes do: a grid that all seeds share
                steps = int(row["env_steps"]) // 2000 * 2000
                writer.writerow([algo, name, seed, steps, row["eval/return_mean"]])


if __name__ == "__main__":
    main()
