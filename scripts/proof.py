"""Compare every algorithm's numbers and speed between a commit and this tree: `make proof BASE=<commit>`.

Each row of tests/rows.py is trained for a short run at BASE, in a git worktree, and in this tree, with the command that
users type. Checkpoints are read with `torch.load` only, so the code under test does not take part in the comparison.
Runs alternate between the two trees, so that the ratio of their speeds is meaningful on a busy machine. Exits with 0 if
every number is identical to the bit and no row is slower, with 1 otherwise. Speed is judged with `--pairs 3` or more.

A row is trained in one process, with one collector and without torch.compile. `--words collector=torchrl` and other
overrides test other settings.
"""

import argparse
import csv
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from rows import ROWS, Row  # noqa: E402

PARTS = ("parameters", "optimiser", "buffer", "random state", "other state", "metrics")
# Entries of a checkpoint that are compared as a part of their own, or not at all (hyper_parameters).
NOT_OTHER_STATE = ("state_dict", "optimizer_states", "buffer", "rng", "hyper_parameters")
COMMON = ("trainer.accelerator=cpu", "trainer.threads=1", "logger=csv", "eval.every=100_000", "eval.episodes=1")
SLOWER = 0.9  # a row is called slower if all its pairs, PAIRS_TO_JUDGE or more, have a lower ratio of steps/s
PAIRS_TO_JUDGE = 3


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check out a commit into a temporary git worktree, and remove it when the context ends."""
    with tempfile.TemporaryDirectory(prefix="levin-proof-") as folder:
        tree = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def train(tree: Path, row: Row, env_steps: int, more: list[str], run: Path) -> str | None:
    """Train a row with the code of a tree. Return None, or the last line of its output if it failed."""
    words = [f"algo={row.algo}", f"env={row.env}", *row.small, *COMMON, f"total_env_steps={env_steps}", *more]
    words += [f"log_every={max(1, env_steps // 8)}", f"checkpoint.every={env_steps}", f"run={run}"]
    done = subprocess.run(
        [sys.executable, "-m", "levin.train", *words],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree / "src"), "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    return lines[-1] if done.returncode else None


def read(run: Path) -> dict[str, Any]:
    """Return the numbers that a run computed, by the names of PARTS.

    Raises:
        ValueError: The run made no update, so there is nothing to compare.
    """
    checkpoint = run / "checkpoints" / "last"
    state = torch.load(checkpoint / "state.ckpt", weights_only=True)
    if not state["levin"]["updates"]:
        raise ValueError(f"{run} made no update")
    files = sorted((checkpoint / "buffer").glob("*"))
    buffer = {file.name: torch.load(file, weights_only=True) for file in files}
    other = untimed({key: value for key, value in state.items() if key not in NOT_OTHER_STATE})
    values = (state["state_dict"], state["optimizer_states"], [state.get("buffer"), buffer], state["rng"], other)
    values = (*values, [list(row.items()) for row in map(untimed, rows_of(run))])
    return dict(zip(PARTS, values, strict=True))


def untimed(value: Any) -> Any:
    """Return a nested value without the entries `time/...` of its dicts."""
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if not str(key).startswith("time/")}
    return type(value)(map(untimed, value)) if isinstance(value, list | tuple) else value


def rows_of(run: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def steps_per_second(run: Path) -> float:
    """Return the env steps per second of a run, without its first row of metrics and rows with an evaluation."""
    steps = seconds = last = 0.0
    for i, row in enumerate(rows_of(run)):
        taken, last = float(row["env_steps"]) - last, float(row["env_steps"])
        if i and taken and not row.get("eval/return_mean"):
            steps += taken
            seconds += taken / float(row["time/env_steps_per_second"])
    return steps / seconds if seconds else math.nan


def identical(a: Any, b: Any) -> bool:
    """Return whether two nested values of tensors and plain values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, float):
        return isinstance(b, float) and a.hex() == b.hex()
    return type(a) is type(b) and a == b


def stored_results(algos: set[str]) -> list[str]:
    """Return the names of the stored results of these algorithms in experiments/."""
    configs = {algo: yaml.safe_load((ROOT / f"configs/algo/{algo}.yaml").read_text(encoding="utf-8")) for algo in algos}
    targets = {config["algo"]["_target_"] for config in configs.values()}
    folders = sorted(file.parent for file in ROOT.glob("experiments/*/curves.csv.gz"))
    return [
        folder.name
        for folder in folders
        if yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["algo"]["_target_"] in targets
    ]


def compare(
    row: Row, trees: dict[str, Path], env_steps: int, more: list[str], pairs: int
) -> tuple[list[str], list[float]]:
    """Train a row in both trees. Return a word for each of PARTS, and the ratios of steps/s here / BASE.

    The words are "identical" or "DIFFERS"; "new" if BASE does not have the algorithm; "failed" if a run failed.
    """
    if not (trees["base"] / f"configs/algo/{row.algo}.yaml").exists():
        return ["new"] * len(PARTS), []
    ratios, same = [], dict.fromkeys(PARTS, True)
    for pair in range(pairs):
        with tempfile.TemporaryDirectory(prefix="levin-proof-") as folder:
            runs = {name: Path(folder) / name for name in trees}
            for name in sorted(trees, reverse=bool(pair % 2)):  # base first, then here first, ...
                if failed := train(trees[name], row, env_steps, more, runs[name]):
                    print(f"{row.algo} failed at {name}: {failed}", file=sys.stderr)
                    return ["failed"] * len(PARTS), []
            before, after = read(runs["base"]), read(runs["here"])
            for part in PARTS:
                same[part] &= identical(before[part], after[part])
            ratio = steps_per_second(runs["here"]) / steps_per_second(runs["base"])
            ratios += [] if math.isnan(ratio) else [ratio]
    return ["identical" if same[part] else "DIFFERS" for part in PARTS], ratios


def main() -> None:
    """Print the table, and the stored results of the algorithms whose numbers changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", required=True, help="commit to compare with")
    parser.add_argument(
        "--rows", nargs="*", default=[], help="algorithms to compare (default: all rows of tests/rows.py)"
    )
    parser.add_argument("--pairs", type=int, default=1, help="number of runs of each row in each tree (default: 1)")
    parser.add_argument(
        "--length", type=int, default=4, help="length of a run, in multiples of the row's env steps (default: 4)"
    )
    parser.add_argument("--words", nargs="*", default=[], help="more config overrides, such as algo.compile=true")
    options = parser.parse_args()
    if options.pairs < 1 or options.length < 1:
        parser.error("--pairs and --length must be 1 or more")
    if unknown := set(options.rows) - {row.algo for row in ROWS}:
        parser.error(f"--rows {' '.join(sorted(unknown))}: not in tests/rows.py")
    commit = ["git", "rev-parse", "--quiet", "--verify", f"{options.base}^{{commit}}"]
    if subprocess.run(commit, cwd=ROOT, capture_output=True, check=False).returncode:
        parser.error(f"--base {options.base}: not a commit of this repository (with make: BASE=<commit>)")
    chosen = [row for row in ROWS if not options.rows or row.algo in options.rows]
    rows: dict[str, set[str]] = {"changed": set(), "slower": set(), "new": set(), "failed": set()}
    with worktree(options.base) as base:
        print("| row | env steps |", " | ".join(PARTS), "| steps/s here / base |")
        print("|---|---|" + "---|" * (len(PARTS) + 1))
        for row in chosen:
            env_steps = row.env_steps * options.length
            parts, ratios = compare(row, {"base": base, "here": ROOT}, env_steps, options.words, options.pairs)
            if set(parts) != {"identical"}:
                rows[parts[0] if parts[0] in rows else "changed"].add(row.algo)
            if len(ratios) >= PAIRS_TO_JUDGE and max(ratios) < SLOWER:
                rows["slower"].add(row.algo)
            speed = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
            print(f"| {row.algo} | {env_steps} | {' | '.join(parts)} | {speed} |", flush=True)
    raise SystemExit(print_outcome(rows, len(chosen)))


def print_outcome(rows: dict[str, set[str]], num: int) -> bool:
    """Print which of `num` rows changed, are slower or failed. Return whether there is work left."""
    if rows["changed"]:
        print(f"numbers changed: {' '.join(sorted(rows['changed']))}")
        print(f"stored results of these algorithms: {' '.join(stored_results(rows['changed'])) or 'none'}")
    for name, words in (
        ("slower", "slower in every pair"),
        ("new", "not compared, because the commit does not have these algorithms"),
        ("failed", "not compared, because a run failed (the reason is above)"),
    ):
        if rows[name]:
            print(f"{words}: {' '.join(sorted(rows[name]))}")
    compared = num - len(rows["new"]) - len(rows["failed"])
    if compared and not rows["changed"] and not rows["slower"]:
        print(f"every number is identical to the bit in {compared} rows")
    return bool(rows["changed"] or rows["slower"] or rows["failed"] or not compared)


if __name__ == "__main__":
    main()
