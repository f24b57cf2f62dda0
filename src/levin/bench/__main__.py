"""`python -m levin.bench what=sac|collect|checkpoint`: prints medians and ratios."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from levin import config, paths, provenance
from levin.bench.pace import REPORT
from levin.errors import ConfigError, one_sentence
from levin.hints import PositiveInt

PEERS = paths.ROOT / ".venv-bench" / "bin" / "python"
WARM_UP, LEARNING_STARTS = 640, 320


class Worker:
    """A process that works when it is told to."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def segment(self) -> float:
        """Env steps per second over one segment.

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
        raise ConfigError(f"{' '.join(map(str, self.process.args))} ended with {self.process.wait()}")  # type: ignore[arg-type]

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def ours(folder: Path, steps_per_iteration: int, threads: int, segment: int) -> list[str]:
    """The real command, with everything but evaluation and checkpoints, which the peer does not do either."""
    pace = f"{{_target_:levin.bench.pace.Pace,start:{WARM_UP},segment:{segment}}}"
    return [
        *(sys.executable, "-m", "levin.train", "algo=sac", "env=halfcheetah", "logger=csv"),
        *(f"algo.learning_starts={LEARNING_STARTS}", f"algo.steps_per_iteration={steps_per_iteration}"),
        *("trainer.accelerator=cpu", f"trainer.threads={threads}", f"run={folder / f'size{steps_per_iteration}'}"),
        *("eval.every=1_000_000_000", "checkpoint.every=1_000_000_000", f"+callbacks.pace={pace}"),
    ]


def sac(*, segments: int, segment: int, threads: int) -> None:
    """SAC on HalfCheetah-v4 end to end: batch 256, one update per env step, 256-256, beside Stable-Baselines3."""
    if not PEERS.exists():
        raise ConfigError("the peers are not installed: make bench-setup")
    script = Path(__file__).with_name("peer_sb3.py")
    words = (threads, LEARNING_STARTS, WARM_UP, segment)
    with tempfile.TemporaryDirectory() as folder:
        workers = {
            "Stable-Baselines3": Worker([str(PEERS), str(script), "HalfCheetah-v4", *map(str, words)]),
            "levin, 32 steps per iteration": Worker(ours(Path(folder), 32, threads, segment)),
            "levin, 1 step per iteration": Worker(ours(Path(folder), 1, threads, segment)),
        }
        try:
            for worker in workers.values():
                worker.segment()  # warm-up and the first segment
            rates = {name: [] for name in workers}
            for _ in range(segments):
                for name, worker in workers.items():
                    rates[name].append(worker.segment())
        finally:
            for worker in workers.values():
                worker.stop()
    table(rates, "Stable-Baselines3", "env steps/s")


def checkpoint(*, rounds: int, segment: int, threads: int) -> None:
    """SAC on HalfCheetah-v4 with a buffer of a million transitions, full, saved every 10,000 env steps."""
    print(provenance.processor(), flush=True)
    probe = f"{{_target_:levin.bench.checkpoint.Probe,start:{WARM_UP},segment:{segment},rounds:{rounds}}}"
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk that runs are on
        words = [*ours(Path(folder), 32, threads, segment)[:-1], f"+callbacks.probe={probe}"]
        subprocess.run(words, check=True)


def table(rates: dict[str, list[float]], peer: str, unit: str) -> None:
    """Median rate of each, and the median over rounds of its ratio to the peer in the same round."""
    print(f"\n{provenance.processor()}; medians of {len(rates[peer])} rounds, interleaved")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[peer], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} x {peer} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:<32}{statistics.median(values):>9,.0f} {unit}   {ratio}")


def bench(
    *,
    what: Literal["sac", "collect", "checkpoint"],
    segments: PositiveInt = 10,
    segment: PositiveInt = 512,
    threads: PositiveInt = 2,
) -> None:
    """Run one comparison.

    Args:
        what: `sac`: a training run; `collect`: rollouts alone; `checkpoint`: what saving costs a run.
        segments: Rounds, each one segment of every side.
        segment: Env steps per segment of training.
        threads: Torch threads of each side.
    """
    if what == "sac":
        sac(segments=segments, segment=segment, threads=threads)
    elif what == "checkpoint":
        checkpoint(rounds=segments, segment=segment, threads=threads)
    else:
        from levin.bench.collect import collect

        for env_id, num_envs in (("CartPole-v1", 8), ("HalfCheetah-v4", 1)):
            print(f"\n{env_id} x {num_envs}, 64-64 policy", end="")
            table(collect(env_id, num_envs, segments), "hand-written loop", "vector steps/s")


if __name__ == "__main__":
    with one_sentence():
        bench(**config.arguments(bench))
