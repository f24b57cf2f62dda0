"""Whole training runs against those of Stable-Baselines3 and sbx: same work, same envs, same threads, in turns."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from levin.bench.pace import REPORT
from levin.config.compose import compose
from levin.core import paths
from levin.core.errors import ConfigError
from levin.core.process import keep_freed_memory
from levin.core.spaces import EnvSpec, Space
from levin.runs import provenance
from levin.training.session import build_run

PYTHON = paths.ROOT / ".venv-bench" / "bin" / "python"
NEVER = 1_000_000_000
FLOOR = "envs and updates alone"
STALL = 3.0  # a round in which a side takes so many times its median time was hit by a stall of the machine
LIBRARIES = {"Stable-Baselines3": "sb3", "sbx": "sbx"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One task for the peers, which share one interface, and for one or more variants of Levin.

    Args:
        algo: Algorithm.
        env: Env name in Levin.
        env_id: Gymnasium id of the same env, for the peers.
        num_envs: Number of envs N of both sides.
        warm_up: Number of env steps before the first segment; like `segment`, a multiple of the rollout.
        segment: Number of env steps per turn.
        peer: Arguments of the peers' algorithm that differ from their defaults.
        peers: Names of the peers; the first is that of the ratios.
        overrides: Overrides of Levin's config so that both sides do the same work.
        variants: Further overrides of each variant of Levin, by its name in the table.
    """

    algo: str
    env: str
    env_id: str
    num_envs: int
    warm_up: int
    segment: int
    peer: dict[str, Any] = field(default_factory=dict)
    peers: tuple[str, ...] = ("Stable-Baselines3",)
    overrides: tuple[str, ...] = ()
    variants: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"levin": ()})


OFF_POLICY_PEERS = ("Stable-Baselines3", "sbx")
RAW = ("env.normalize_observation=false", "env.normalize_reward=false")
PONG = "PongNoFrameskip-v4"
NO_EXPLORATION = {"exploration_initial_eps": 0.05, "exploration_final_eps": 0.05}
EQUAL_NETS = {"policy_kwargs": {"net_arch": [256, 256]}}  # the peer's default is 400-300
CHUNKS = {
    "levin, 32 steps per iteration": ("algo.steps_per_iteration=32",),
    "levin, 1 step per iteration": ("algo.steps_per_iteration=1",),
}
COMPARISONS = {
    "sac": [
        # The peer's defaults: batch 256, one update per step, buffer 1M, networks 256-256
        Comparison(
            algo="sac",
            env="halfcheetah",
            env_id="HalfCheetah-v4",
            num_envs=1,
            warm_up=640,
            segment=512,
            peer={"learning_starts": 320},
            peers=OFF_POLICY_PEERS,
            overrides=("algo.learning_starts=320",),
            variants=CHUNKS,
        )
    ],
    # The peer's defaults: batch 256, learning rate 1e-3, one update per step, buffer 1M
    **{
        algo: [
            Comparison(
                algo=algo,
                env="halfcheetah",
                env_id="HalfCheetah-v4",
                num_envs=1,
                warm_up=640,
                segment=512,
                peer={"learning_starts": 320} | EQUAL_NETS,
                peers=OFF_POLICY_PEERS,
                overrides=("algo.learning_starts=320", "algo.random_env_steps=null", "algo.batch_size=256"),
                variants=CHUNKS,
            )
        ]
        for algo in ("td3", "ddpg")
    },
    "dqn": [
        # Both sides start at the final epsilon, because the peer skips its network whenever the action is random. The
        # peer has a Huber loss and clips the gradient, so Levin is set to do the same.
        Comparison(
            algo="dqn",
            env="cartpole",
            env_id="CartPole-v1",
            num_envs=1,
            warm_up=3000,
            segment=10_000,
            peer={
                "learning_rate": 2.5e-4,
                "buffer_size": 10_000,
                "batch_size": 128,
                "learning_starts": 1000,
                "train_freq": 10,
                "target_update_interval": 500,
                "policy_kwargs": {"net_arch": [120, 84]},
                **NO_EXPLORATION,
            },
            overrides=(
                *("algo.learning_starts=1000", "algo.initial_epsilon=0.05"),
                *("algo.huber=true", "algo.max_grad_norm=10"),
            ),
            variants={
                "levin, 100 steps per iteration": ("algo.steps_per_iteration=100",),
                "levin, 10 steps per iteration": ("algo.steps_per_iteration=10",),
            },
        ),
        Comparison(
            algo="dqn",
            env="pong",
            env_id=PONG,
            num_envs=1,
            warm_up=1024,
            segment=512,
            peer={"buffer_size": 10_000, "learning_starts": 512} | NO_EXPLORATION,
            overrides=(
                *("algo.initial_epsilon=0.05", "algo.final_epsilon=0.05"),
                *("algo.learning_starts=512", "algo.buffer_size=10000", "algo.steps_per_iteration=32"),
            ),
        ),
    ],
    "ppo": [
        Comparison(
            algo="ppo",
            env="cartpole",
            env_id="CartPole-v1",
            num_envs=8,
            warm_up=4096,
            segment=16384,
            peer={"n_steps": 128, "batch_size": 256, "n_epochs": 4},
            overrides=(
                *("algo.steps_per_iteration=128", "algo.batch_size=256", "algo.epochs=4", "algo.lr=3e-4"),
                *("algo.gamma=0.99", "algo.gae_lambda=0.95", "algo.clip_schedule=constant"),
            ),
            variants={"levin": (), "levin, compiled": ("algo.compile=true",)},
        ),
        Comparison(
            algo="ppo",
            env="halfcheetah",
            env_id="HalfCheetah-v4",
            num_envs=1,
            warm_up=4096,
            segment=4096,
            peer={"n_steps": 2048, "batch_size": 64, "n_epochs": 10},
            overrides=(
                *("algo.steps_per_iteration=2048", "algo.recompute_advantage=false", "algo.normalize_advantage=true"),
                "algo.normalize_value_target=false",
                *("algo.clip_value=false", "algo.value_coef=1.0", "algo.initial_log_std=0.0", *RAW),
            ),
            variants={"levin": (), "levin, compiled": ("algo.compile=true",)},
        ),
        Comparison(
            algo="ppo",
            env="pong",
            env_id=PONG,
            num_envs=8,
            warm_up=1024,
            segment=1024,
            peer={"n_steps": 128, "batch_size": 256, "n_epochs": 4, "ent_coef": 0.01},
            overrides=(
                *("algo.steps_per_iteration=128", "algo.batch_size=256", "algo.epochs=4", "algo.entropy_coef=0.01"),
                *("algo.clip_value=false", "algo.hidden_sizes=[]"),
            ),
        ),
    ],
    "a2c": [
        Comparison(
            algo="a2c", env="cartpole", env_id="CartPole-v1", num_envs=8, warm_up=4000, segment=16000, overrides=RAW
        ),
        Comparison(
            algo="a2c",
            env="pong",
            env_id=PONG,
            num_envs=8,
            warm_up=1000,
            segment=1000,
            overrides=("algo.hidden_sizes=[]",),
        ),
    ],
    "trpo": [
        Comparison(
            algo="trpo",
            env="halfcheetah",
            env_id="HalfCheetah-v4",
            num_envs=2,
            warm_up=4096,
            segment=8192,
            peer={
                "n_steps": 1024,
                "batch_size": 128,
                "n_critic_updates": 20,
                "cg_max_steps": 25,
                "cg_damping": 0.1,
                "target_kl": 0.04,
                "learning_rate": 1e-3,
            },
            overrides=RAW,  # the tuned values are the peer's, for a KL that is summed over the entries of an action
        )
    ],
}


class Worker:
    """Process that runs one segment whenever it gets a line on stdin, see `levin.bench.pace`."""

    def __init__(self, command: list[str]) -> None:
        # libgomp's default: these processes take turns, so none has to give way (`levin.core.process.share_cores`).
        environment = {"GOMP_SPINCOUNT": "300000", **os.environ}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def segment(self) -> float:
        """Run one segment; return env steps (or estimates) per second.

        Raises:
            ConfigError: The process has ended.
        """
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(REPORT):
                steps, seconds = line.removeprefix(REPORT).split()
                return int(steps) / float(seconds)
        command = " ".join(map(str, self.process.args))  # type: ignore[arg-type]
        code = self.process.wait()
        raise ConfigError(f"{command} ended with exit code {code}; if it is a peer, run make bench-setup again")

    def stop(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()


class Floor:
    """Upper bound on the speed of a Levin run: only steps of its envs and its updates, without a Trainer."""

    def __init__(self, task: Comparison, threads: int) -> None:
        overrides = [f"algo={task.algo}", f"env={task.env}", f"env.num_envs={task.num_envs}", *task.overrides]
        keep_freed_memory()
        self.algorithm, self.loader = build_run(compose([*overrides, f"trainer.threads={threads}"]))
        self.algorithm.configure_optimizers()
        self.algorithm.manual_backward = torch.Tensor.backward  # type: ignore[method-assign]
        self.steps = 0

    def segment(self) -> float:
        """Run for at least half a second; return env steps per second."""
        env, steps, seconds = self.loader.env, 0, 0.0
        while seconds < 0.5:
            rollout = next(self.loader)
            actions = rollout["action"].transpose(0, 1).numpy()  # [N, T, *A] -> [T, N, *A]
            start = perf_counter()
            for action in actions:
                *_, terminated, truncated, _ = env.env.step(action)
                done = terminated | truncated
                if done.any():
                    env.env.reset(seed=[None] * env.num_envs, options={"reset_mask": done})  # type: ignore[arg-type]
            self.algorithm.env_steps += rollout.numel()
            self.algorithm.training_step(rollout, 0)
            seconds += perf_counter() - start
            steps += rollout.numel()
        return steps / seconds

    def stop(self) -> None:
        """Close the envs."""
        self.loader.collector.shutdown()


def pace_callback(task: Comparison) -> str:
    """Return the override that adds the `Pace` callback to a run."""
    return f"+callbacks.pace={{_target_:levin.bench.pace.Pace,start:{task.warm_up},segment:{task.segment}}}"


def levin_command(task: Comparison, variant: tuple[str, ...], folder: Path, threads: int, callback: str) -> list[str]:
    """Return the command of a training run, without evaluation and checkpoints, which the peer does not do either."""
    return [
        *(sys.executable, "-m", "levin.train", f"algo={task.algo}", f"env={task.env}", f"env.num_envs={task.num_envs}"),
        *(*task.overrides, *variant, "logger=csv", f"run={folder}", f"total_env_steps={NEVER}"),
        *("trainer.accelerator=cpu", f"trainer.threads={threads}", callback),
        *(f"eval.every={NEVER}", f"checkpoint.every={NEVER}"),
    ]


def compare(task: Comparison, *, segments: int, threads: int) -> None:
    """Run the peers, Levin and the floor in turns; print medians, ratios and Levin's share of the floor.

    Raises:
        ConfigError: The peers are not installed, or one of the processes ends.
    """
    if not PYTHON.exists():
        raise ConfigError(f"{' and '.join(task.peers)} are not installed in .venv-bench: run make bench-setup")
    if sys.platform == "linux":  # also for XLA and Atari games, which have threads of their own
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    script = Path(__file__).with_name("peer_sb3.py")
    arguments = (task.num_envs, threads, task.warm_up, task.segment, json.dumps(task.peer))
    print(f"\n{task.algo} {task.env_id} x {task.num_envs}, {threads} threads", end="", flush=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        commands = {
            name: [str(PYTHON), str(script), LIBRARIES[name], task.algo, task.env_id, *map(str, arguments)]
            for name in task.peers
        }
        for i, (name, variant) in enumerate(task.variants.items()):
            commands[name] = levin_command(task, variant, Path(folder) / str(i), threads, pace_callback(task))
        workers: dict[str, Worker | Floor] = {name: Worker(command) for name, command in commands.items()}
        workers[FLOOR] = Floor(task, threads)
        for worker in workers.values():
            stack.callback(worker.stop)
        for worker in workers.values():
            worker.segment()  # warm-up and the first segment
        rates = {name: [] for name in workers}
        for _ in range(segments):
            for name, worker in workers.items():
                rates[name].append(worker.segment())
    for peer in task.peers:
        print_table(rates, peer, "env steps/s")
    kept = without_stalls(rates)
    for name in (name for name, words in task.variants.items() if "algo.compile=true" not in words):
        share = statistics.median(a / b for a, b in zip(kept[name], kept[FLOOR], strict=True))
        print(f"{name} runs at {share:.0%} of {FLOOR}")


def fake_env_spec(observation: Space, action: Space) -> EnvSpec:
    """Return the spec of a made-up env with these spaces; algorithms need no more than the spec."""
    return {
        "id": "a benchmark",
        "num_envs": 1,
        "observation": observation,
        "action": action,
        "action_units": "none",
        "action_repeat": 1,
        "observation_clip": None,
        "reward_clip": None,
    }


def without_stalls(rates: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the rates of the rounds in which no side took more than `STALL` times its median time.

    If there is no such round, return all.
    """
    slowest = {name: statistics.median(values) / STALL for name, values in rates.items()}
    rounds = [
        i for i in range(len(next(iter(rates.values())))) if all(rates[name][i] >= slowest[name] for name in rates)
    ]
    return {name: [values[i] for i in rounds] for name, values in rates.items()} if rounds else rates


def print_table(rates: dict[str, list[float]], peer: str, unit: str) -> None:
    """Print the median rate of each side, and the median over rounds of its ratio to `peer` in the same round.

    Rounds that were hit by a stall of the machine are counted and left out.
    """
    kept = without_stalls(rates)
    stalled = len(rates[peer]) - len(kept[peer])
    note = f"; {stalled} more were hit by a stall" if stalled else ""
    print(f"\n{provenance.processor_name()}; medians of {len(kept[peer])} rounds, interleaved{note}")
    for name, values in kept.items():
        ratios = [a / b for a, b in zip(values, kept[peer], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} x {peer} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:<32}{statistics.median(values):>9,.0f} {unit}   {ratio}")
