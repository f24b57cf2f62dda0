"""Study of many envs stepped as tensors: env steps per second, memory, and seconds to a score, for 1 to 16,384 envs.

`make study NAME=batched` writes speed.csv, score.csv, a picture and README.md beside this file. It takes a quarter
of an hour, with nothing else running. The peer is measured if `make bench-setup` has installed it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from experiments.study import read_evaluations, read_words, write_table
from tensordict.nn import TensorDictModule

from levin.bench import peers
from levin.bench.collect import Chooser
from levin.collectors.batched import BatchedCollector
from levin.collectors.episodes import evaluate
from levin.collectors.vector import VectorCollector
from levin.core.process import keep_freed_memory, silence_libraries
from levin.envs.config import EVALUATION, EnvConfig
from levin.envs.factory import make_env
from levin.lab.pictures import read_csv
from levin.runs import provenance
from levin.runs.load import load_algorithm

HERE = Path(__file__).parent
THREADS = 2
SIZES = [4**k for k in range(8)]  # 1 to 16,384 envs
GYMNASIUM_SIZES = [1, 4, 16, 64]
STEPS = 32  # vector steps per rollout
ROUNDS = 3
# PPO with the same work for each env step as the peer: four epochs, 64-64 networks, eight minibatches a rollout.
EPOCHS, MINIBATCHES = 4, 8
PPO = (f"algo.steps_per_iteration={STEPS}", f"algo.epochs={EPOCHS}")
EIGHT = "ours, 8 gymnasium envs"
PEER = "Stable-Baselines3, 8 gymnasium envs"
SCORES = {"cartpole": 500.0, "pendulum": -200.0}
SEEDS = range(3)
GYMNASIUM_SEEDS = {"cartpole": SEEDS, "pendulum": SEEDS[:1]}  # Pendulum's time can't be compared, see TEXT
EPISODES = 10  # of the final evaluation in gymnasium's own env


def batched(num_envs: int) -> EnvConfig:
    """Return the config of CartPole as tensors."""
    target = "levin.envs.batched:CartPole"
    return EnvConfig(id="CartPole-v1", family="torchrl", target=target, num_envs=num_envs, time_limit=500)


def gymnasium(num_envs: int) -> EnvConfig:
    """Return the config of gymnasium's CartPole."""
    return EnvConfig(id="CartPole-v1", num_envs=num_envs)


def collectors(num_envs: int) -> dict[str, Callable[[], Any]]:
    """Return functions that build the collectors to compare, by name."""
    torch.manual_seed(0)
    policy = TensorDictModule(Chooser(4, 2, discrete=True), in_keys=["observation"], out_keys=["action"])

    def make(compiled: bool) -> BatchedCollector:
        return BatchedCollector(make_env(batched(num_envs), seed=0), policy, steps=STEPS, compile=compiled)

    made: dict[str, Callable[[], Any]] = {"batched": lambda: make(False), "batched, compiled": lambda: make(True)}
    if num_envs in GYMNASIUM_SIZES:
        env = gymnasium(num_envs)
        made["gymnasium envs"] = lambda: VectorCollector(make_env(env, seed=0, copy=False), policy, steps=STEPS)
    return made


def rate(collector: Any, seconds: float) -> float:
    """Return the env steps per second of a collector, measured for at least so many seconds."""
    start, steps = perf_counter(), 0
    while (passed := perf_counter() - start) < seconds:
        steps += collector.rollout().numel()
    return steps / passed


def measure_collection(num_envs: int) -> dict[str, float]:
    """Return the median rate of each collector, measured in turns."""
    made = {name: make() for name, make in collectors(num_envs).items()}
    for each in made.values():
        rate(each, 0.5)
    rates: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(ROUNDS):
        for name, each in made.items():
            rates[name].append(rate(each, 1.0))
    for each in made.values():
        each.shutdown()
    return {name: statistics.median(values) for name, values in rates.items()}


def task(num_envs: int) -> peers.Comparison:
    """Return the training task for a number of batched envs."""
    rollout = STEPS * num_envs
    segment = max(rollout, 2048)
    words = (*PPO, f"algo.batch_size={rollout // MINIBATCHES}")
    return peers.Comparison(
        algo="ppo",
        env="cartpole_batched",
        env_id="CartPole-v1",
        num_envs=num_envs,
        warm_up=2 * rollout,
        segment=segment,
        overrides=words,
        variants={"batched": (), "batched, compiled": ("algo.compile=true",)},
    )


def measure_training(num_envs: int, stack: ExitStack, folder: Path) -> dict[str, peers.Worker]:
    """Start PPO with a number of batched envs, and return the processes by name."""
    made, workers = task(num_envs), {}
    for name, words in made.variants.items():
        run = folder / f"{num_envs}-{name}"
        workers[name] = peers.Worker(peers.levin_command(made, words, run, THREADS, peers.pace_callback(made)))
        stack.callback(workers[name].stop)
    return workers


def references(stack: ExitStack, folder: Path) -> dict[str, peers.Worker]:
    """Start PPO with 8 gymnasium envs, ours and the peer's, and return the processes by name."""
    made = peers.COMPARISONS["ppo"][0]
    command = peers.levin_command(made, (), folder / "eight", THREADS, peers.pace_callback(made))
    workers = {EIGHT: peers.Worker(command)}
    if peers.PYTHON.exists():
        script = Path(peers.__file__).with_name("peer_sb3.py")
        numbers = (made.num_envs, THREADS, made.warm_up, made.segment, json.dumps(made.peer))
        words = [str(peers.PYTHON), str(script), "sb3", made.algo, made.env_id, *map(str, numbers)]
        workers[PEER] = peers.Worker(words)
    for each in workers.values():
        stack.callback(each.stop)
        each.segment()
    return workers


def measure_speed() -> None:
    """Write speed.csv: env steps per second of rollouts and of training, and the memory of the env per env."""
    rows: list[list[Any]] = []
    for num_envs in SIZES:
        rows += [["collect", name, num_envs, round(each)] for name, each in measure_collection(num_envs).items()]
        print(rows[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        fixed = references(stack, Path(folder))
        found: dict[str, list[float]] = {name: [] for name in fixed}
        for num_envs in SIZES:
            with ExitStack() as own:
                workers = measure_training(num_envs, own, Path(folder))
                for each in workers.values():
                    each.segment()
                rates: dict[str, list[float]] = {name: [] for name in workers}
                for _ in range(ROUNDS):
                    for name, each in {**workers, **fixed}.items():
                        (rates[name] if name in rates else found[name]).append(each.segment())
            rows += [["train", name, num_envs, round(statistics.median(each))] for name, each in rates.items()]
            print(rows[-1], flush=True)
    rows += [["train", name, 8, round(statistics.median(each))] for name, each in found.items()]
    rows += [["bytes", "env", num_envs, memory(num_envs)] for num_envs in SIZES]
    (HERE / "processor.txt").write_text(provenance.processor_name() + "\n")
    write_table(HERE / "speed.csv", ["what", "how", "num_envs", "value"], rows)


def memory(num_envs: int) -> int:
    """Return the bytes that an env holds between two steps, per env: its state, observation and counts."""
    collector = collectors(num_envs)["batched"]()
    collector.rollout()
    state = collector.state_dict()
    return sum(each.nbytes for part in ("bare", "now", "open") for each in state[part].values()) // num_envs


def measure_score() -> None:
    """Write score.csv: seconds from the start of the command to the score in an evaluation during the run."""
    rows: list[list[Any]] = []
    for env, score in SCORES.items():
        few = {"cartpole": "8 gymnasium envs", "pendulum": "4 gymnasium envs"}[env]  # as their configs say
        arms = (("batched", f"{env}_batched", 50_000, SEEDS), (few, env, 5000, GYMNASIUM_SEEDS[env]))
        for how, name, every, seeds in arms:
            for seed in seeds:
                with tempfile.TemporaryDirectory() as folder:
                    run = Path(folder) / "run"
                    seconds = seconds_to_score(name, score, every, seed, run)
                    last = read_evaluations(run)[-1]
                    mean, worst = final_return(run, env)
                reached = float(last["eval/return_mean"]) >= score
                rows.append([env, how, seed, round(seconds, 1), reached, last["env_steps"], round(mean, 1), worst])
                print(rows[-1], flush=True)
    columns = ["env", "how", "seed", "seconds", "reached", "env_steps", "return_mean", "worst_return"]
    write_table(HERE / "score.csv", columns, rows)


def seconds_to_score(env: str, score: float, every: int, seed: int, run: Path) -> float:
    """Train PPO until an evaluation of ten episodes reaches the score, and return the seconds of the whole command."""
    stop = "_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:eval/return_mean,mode:max,patience:100000"
    words = ["algo=ppo", f"env={env}", f"seed={seed}", f"run={run}", "logger=csv", f"eval.every={every}"]
    words += [f"trainer.threads={THREADS}", "trainer.accelerator=cpu", f"checkpoint.every={peers.NEVER}"]
    words += [f"+callbacks.stop={{{stop},stopping_threshold:{score},check_on_train_epoch_end:false}}"]
    start = perf_counter()
    subprocess.run([sys.executable, "-m", "levin.train", *words], check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - start


def final_return(run: Path, env: str) -> tuple[float, float]:
    """Return the mean and the smallest return of ten episodes in gymnasium's own env, with other seeds."""
    algorithm = load_algorithm(run).eval()
    ids = {"cartpole": "CartPole-v1", "pendulum": "Pendulum-v1"}
    own = make_env(
        EnvConfig(id=ids[env], action=algorithm.env["action_units"]), seed=1, purpose=EVALUATION, num_envs=EPISODES
    )
    returns, _ = evaluate(algorithm.policy(deterministic=True), own, EPISODES)
    own.close()
    return float(np.mean(returns)), round(min(returns), 1)


def report() -> None:
    """Write README.md and speed.png from the tables."""
    speed, score = read_csv(HERE / "speed.csv"), read_csv(HERE / "score.csv")
    values = {(row["what"], row["how"], int(row["num_envs"])): float(row["value"]) for row in speed}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, what, title in zip(axes, ("collect", "train"), ("rollouts", "PPO, end to end"), strict=True):
        for how, marker in (("batched", "o"), ("batched, compiled", "s"), ("gymnasium envs", "^")):
            points = [(num, value) for (kind, name, num), value in values.items() if (kind, name) == (what, how)]
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, label=how)
        for how, style in ((EIGHT, "--"), (PEER, ":")):
            if what == "train" and ("train", how, 8) in values:
                axis.axhline(values["train", how, 8], color="gray", linestyle=style, label=how)
        axis.set(xscale="log", yscale="log", xlabel="envs N", title=title)
        axis.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
        axis.minorticks_off()
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("env steps per second")
    figure.savefig(HERE / "speed.png", dpi=110)
    plt.close(figure)
    base = values.get(("train", PEER, 8), values["train", EIGHT, 8])
    lines = []
    for size in SIZES:
        cells = [values.get(key) for key in ((kind, how, size) for kind, how in COLUMNS)]
        best = max(value for value in cells[-2:] if value)
        words = ["" if value is None else f"{value:,.0f}" for value in cells]
        lines.append(f"| {size:,} | {' | '.join(words)} | {best / base:.1f} | {values['bytes', 'env', size]:.0f} |")
    fixed = ", ".join(f"{how} {values['train', how, 8]:,.0f}" for how in (PEER, EIGHT) if ("train", how, 8) in values)
    scores = []
    for env, how in dict.fromkeys((row["env"], row["how"]) for row in score):
        rows = [row for row in score if (row["env"], row["how"]) == (env, how)]
        seconds = [row["seconds"] + ("" if row["reached"] == "True" else " (not reached)") for row in rows]
        others = [[row[name] for row in rows] for name in ("env_steps", "return_mean", "worst_return")]
        cells = [", ".join(each) for each in (seconds, *others)]
        scores.append(f"| {env} | {how} | {' | '.join(cells)} |")
    text = TEXT.format(
        lines="\n".join(lines),
        fixed=fixed,
        scores="\n".join(scores),
        peer="Stable-Baselines3" if ("train", PEER, 8) in values else EIGHT,
        processor=(HERE / "processor.txt").read_text().strip(),
        threads=THREADS,
    )
    (HERE / "README.md").write_text(text)


COLUMNS = [
    *(("collect", how) for how in ("gymnasium envs", "batched", "batched, compiled")),
    *(("train", how) for how in ("batched", "batched, compiled")),
]
TEXT = """# Many envs stepped as tensors

`make study NAME=batched` writes everything in this folder. CartPole with `collector=batched`, for 1 to 16,384 envs:
env steps per second of rollouts with a 64-64 policy, and of PPO from end to end (rollouts of 32 steps, four epochs of
eight minibatches). Medians of three rounds in turns, on {processor} with {threads} threads.

| envs | rollouts: gymnasium | batched | compiled | PPO: batched | compiled | x {peer} | bytes per env |
|---|---|---|---|---|---|---|---|
{lines}

PPO with 8 envs of gymnasium, measured in the same rounds (128 steps, four epochs, minibatches of 256), env steps per
second: {fixed}.

![Env steps per second against the number of envs](speed.png)

Seconds from the start of the command (imports, training, saving) to the score in an evaluation of ten episodes: 500 for
CartPole, -200 for Pendulum; with the values of `configs/tuned`, one entry for each seed. Then ten other episodes in
gymnasium's own env. The evaluations of the gymnasium envs of Pendulum, one seed, have ten starts from which the best
stored PPO reaches -200 only just, so its time can't be compared with that of the batched envs, which have other starts.

| env | envs | seconds | env steps | mean return | worst of ten |
|---|---|---|---|---|---|
{scores}
"""


def main() -> None:
    """Measure speed and score, or the one that the command line names, and report."""
    words = read_words("speed", "score")
    silence_libraries()
    keep_freed_memory()
    torch.set_num_threads(THREADS)
    for name, measure in (("speed", measure_speed), ("score", measure_score)):
        if not words or name in words:
            measure()
    report()


if __name__ == "__main__":
    main()
