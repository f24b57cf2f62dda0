"""Train an algorithm: `python -m levin.train algo=sac env=pendulum`; `seeds="0 1 2"` trains a run per seed, in turn."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from levin.config import cli
from levin.config.compose import compose
from levin.core.errors import ConfigError, exit_on_user_error
from levin.core.process import SIGNALS, handle_signals, restore_signals, share_cores, silence_libraries
from levin.runs import folder as run_folder
from levin.runs import slurm
from levin.runs.trust import trusted
from levin.sweep import sweep


def main() -> None:
    """Train the config of the command line. With `-m` train a sweep; with `launcher=` submit the runs as jobs."""
    silence_libraries()
    with exit_on_user_error():
        cli.refuse_repeated(sys.argv[1:])
        words, given = cli.take_flag(sys.argv[1:], "trust")
        submits = any(word.startswith("launcher=") and word != "launcher=null" for word in words)
        if not submits:  # else the jobs do
            share_cores()
        with trusted(given):
            if submits or "-m" in words or "--multirun" in words:
                sweep(words)
            else:
                _train_seeds(words)


def _train_seeds(words: list[str]) -> None:
    """Train one run per seed, one after the other, each in a fork of this process, which imports everything once.

    The first run that fails ends the command with its exit code, and a signal ends it after the current run.
    """
    given = [word.removeprefix("seeds=") for word in words if word.startswith("seeds=")]
    words = [word for word in words if not word.startswith("seeds=")]
    if not given:
        _train(words)
        return
    seeds = given[-1].split()
    if not seeds or not all(seed.isdigit() for seed in seeds):
        raise ConfigError(f"seeds={given[-1]} must be whole numbers separated by spaces")
    if len(seeds) == 1:
        _train([*words, f"seed={seeds[0]}"])
        return
    compose([*words, f"seed={seeds[0]}"])
    import levin.training.session  # noqa: F401  # for all runs, before the first fork

    child, received = 0, 0

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        forward()

    def forward() -> None:
        # Ctrl-C in a terminal reaches the run itself, and a second one would not let it save.
        if child and not (received == signal.SIGINT and sys.stdin.isatty()):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM if received == signal.SIGINT else received)

    handlers = handle_signals(stop)
    for number, seed in enumerate(seeds):
        own = [f"{word}/s{seed}" if word.startswith("run=") and word != "run=null" else word for word in words]
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a signal waits until the child is known and can be told
        child = os.fork()
        if not child:
            restore_signals(handlers)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            _train([*own, f"seed={seed}"])
            return
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        child = 0
        if code or received:
            if left := seeds[number + 1 :]:
                print(f"levin: the seeds {' '.join(left)} were not begun", file=sys.stderr)
            raise SystemExit(code if code >= 0 else 128 - code)
    restore_signals(handlers)


def _train(words: list[str]) -> None:
    slurm.requeue_on_signal()
    cfg = compose(words)
    from levin import resume  # late: a command that is mistyped is refused before torch and Lightning are imported
    from levin.training.distributed import sharding
    from levin.training.session import train, train_rank

    if (requeued := run_folder.find_requeued_run(cfg)) is not None:
        resume.resume(run=str(requeued))
    elif sharding.process_rank(cfg):
        train_rank(cfg, Path(cfg.run or "runs"))
    else:
        train(cfg, run_folder.new_run_path(cfg))


if __name__ == "__main__":
    main()
