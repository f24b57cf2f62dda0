"""Command `python -m levin.bench what=sac`: run one benchmark of `bench` below and print medians and ratios."""

import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from levin.config import cli
from levin.config.compose import compose
from levin.core.errors import exit_on_user_error
from levin.core.omega import to_plain
from levin.core.types import PositiveInt
from levin.envs.config import EnvConfig
from levin.runs import provenance


def checkpoint(*, rounds: int, threads: int) -> None:
    """Measure checkpoints of SAC on HalfCheetah-v4, every 10,000 env steps with a million transitions in the buffer."""
    from levin.bench.peers import COMPARISONS, levin_command

    print(provenance.processor_name(), flush=True)
    (task,) = COMPARISONS["sac"]
    probe = f"{{_target_:levin.bench.checkpoint.Probe,start:{task.warm_up},segment:{task.segment},rounds:{rounds}}}"
    with tempfile.TemporaryDirectory(dir=".") as folder:  # the disk that run folders are on
        command = levin_command(task, (), Path(folder) / "run", threads, f"+callbacks.probe={probe}")
        subprocess.run(command, check=True)


def bench(
    *,
    what: Literal[
        "sac",
        "td3",
        "ddpg",
        "dqn",
        "ppo",
        "a2c",
        "trpo",
        "collect",
        "memory",
        "checkpoint",
        "estimators",
        "dreamer",
        "dream",
    ],
    segments: PositiveInt = 10,
    threads: PositiveInt = 2,
) -> None:
    """Run one benchmark.

    Args:
        what: An algorithm: training runs against Stable-Baselines3 and sbx; `collect`: rollouts without updates;
            `memory`: size and sampling time of a full replay buffer; `checkpoint`: time that checkpoints take from a
            run; `estimators`: gradient estimators; `dreamer`: updates of Dreamer and DreamerV3 against TorchRL;
            `dream`: steps of imagined episodes in a world model.
        segments: Number of rounds; in each round every side runs one segment.
        threads: Number of Torch threads of each side; `collect` uses Torch's default instead.
    """
    # Late: a mistyped argument is refused before Lightning is imported.
    from levin.bench.peers import COMPARISONS, PONG, compare, print_table

    if what == "checkpoint":
        checkpoint(rounds=segments, threads=threads)
    elif what == "estimators":
        from levin.bench.estimators import estimators

        estimators(rounds=segments, threads=threads)
    elif what == "dreamer":
        from levin.bench.dreamer import dreamer

        dreamer(rounds=segments, threads=threads)
    elif what == "dream":
        from levin.bench.dream import dream

        dream(rounds=segments, threads=threads)
    elif what == "memory":
        from levin.bench.memory import memory

        memory(rounds=segments, threads=threads)
    elif what == "collect":
        from levin.bench.collect import compare_collectors, compare_env_stepping

        for env_id, num_envs in (("CartPole-v1", 8), ("HalfCheetah-v4", 1)):
            print(f"\n{env_id} x {num_envs}, 64-64 policy", end="")
            print_table(compare_collectors(env_id, num_envs, segments), "hand-written loop", "vector steps/s")
        for name, num_envs, package in (
            *(("pong", 8, "ale_py"), ("breakout", 8, "ale_py")),
            *(("lunarlander", 8, "Box2D"), ("bipedalwalker", 1, "Box2D"), ("carracing", 1, "Box2D")),
            *(("walker_walk", 1, "shimmy"), ("cheetah_run", 1, "shimmy")),
        ):
            if find_spec(package) is None:
                print(f"\nskipping {name}: {package} is not installed")
                continue
            overrides = [f"env={name}", "algo=a2c", f"env.num_envs={num_envs}"]
            print(f"\n{name} x {num_envs}, random actions", end="")
            rates = compare_env_stepping(EnvConfig(**to_plain(compose(overrides).env)), segments)
            print_table(rates, "the env alone", "vector steps/s")
    else:
        for task in COMPARISONS[what]:
            if task.env_id == PONG and find_spec("ale_py") is None:
                print("\nskipping pong: ale_py is not installed")
                continue
            compare(task, segments=segments, threads=threads)


if __name__ == "__main__":
    with exit_on_user_error():
        bench(**cli.command_arguments(bench))
