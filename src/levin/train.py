"""Train an algorithm: `python -m levin.train algo=sac env=pendulum`."""

import sys
from pathlib import Path

from levin import resume
from levin.config import cli
from levin.config.compose import compose
from levin.core.errors import exit_on_user_error
from levin.runs import folder as run_folder
from levin.runs import slurm
from levin.runs.trust import trusted
from levin.sweep import sweep
from levin.training.distributed import sharding
from levin.training.session import train, train_rank


def main() -> None:
    """Train the config of the command line. With `-m` train a sweep; with `launcher=` submit the runs as jobs."""
    with exit_on_user_error():
        cli.refuse_repeated(sys.argv[1:])
        words, given = cli.take_flag(sys.argv[1:], "trust")
        with trusted(given):
            _train(words)


def _train(words: list[str]) -> None:
    if any(word in ("-m", "--multirun") or word.startswith("launcher=") for word in words):
        sweep(words)
        return
    slurm.requeue_on_signal()
    cfg = compose(words)
    if (requeued := run_folder.find_requeued_run(cfg)) is not None:
        resume.resume(run=str(requeued))
    elif sharding.process_rank(cfg):
        train_rank(cfg, Path(cfg.run or "runs"))
    else:
        train(cfg, run_folder.new_run_path(cfg))


if __name__ == "__main__":
    main()
