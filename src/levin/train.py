"""Train an algorithm: `python -m levin.train algo=sac env=pendulum`; several seeds with `seeds="0 1 2" jobs=2`."""

import sys
from pathlib import Path

from levin import sweep
from levin.config import cli
from levin.config.compose import compose, compose_one_of_many
from levin.core.errors import ConfigError, exit_on_user_error
from levin.core.process import share_cores, silence_libraries
from levin.resume import print_end, resume, resume_side_by_side
from levin.runs import folder as run_folder
from levin.runs import slurm, trust
from levin.runs.trust import trusted
from levin.scheduler.plan import open_sweep
from levin.scheduler.resources import prepare_cores


def main() -> None:
    """Train the config of the command line; with several seeds or `-m` all runs, with `launcher=` as jobs."""
    silence_libraries()
    with exit_on_user_error():
        cli.check_arguments(sys.argv[1:])
        arguments, given = cli.pop_flag(sys.argv[1:], "trust")
        arguments, jobs = cli.pop_count(arguments, "jobs")
        arguments, seeds = cli.pop_seeds(arguments)
        with trusted(given):
            if sweep.needs_hydra(arguments):
                if jobs is not None:
                    slurm_limit = f"write hydra.launcher.array_parallelism={jobs} instead"
                    advice = slurm_limit if "launcher=slurm" in arguments else "leave it out"
                    raise ConfigError(f"jobs={jobs} has no effect on runs that Hydra starts: {advice}")
                if not any(each.startswith("launcher=") for each in arguments):  # else each job calls it (`run_job`)
                    share_cores()
                sweep.submit(arguments, seeds)
            elif sweep.is_sweep(arguments) or len(seeds) > 1:
                _train_all(arguments, seeds, jobs)
            else:
                share_cores()
                _train(sweep.with_seeds(arguments, seeds))


def _train_all(arguments: list[str], seeds: list[str], jobs: int | None) -> None:
    """Train every run of a sweep, some at the same time, or continue the sweep that the same arguments began."""
    if slurm.is_later_rank():
        raise ConfigError(
            "a command that trains several runs starts their processes itself: run it once, without torchrun or with "
            "srun --ntasks=1"
        )
    slurm.requeue_on_signal()
    overrides, folder = sweep.list_runs(arguments, seeds)
    first = compose(next(iter(overrides.values())), check_values=False)
    prepare_cores(first.trainer.threads or 1, jobs)
    configs = {name: compose_one_of_many(each) for name, each in overrides.items()}
    with open_sweep(configs, folder, beside_others=not sweep.is_sweep(arguments)) as runs:
        ended = resume_side_by_side(dict(zip(runs, configs.values(), strict=True)), jobs)
        print_end(runs, ended=ended)


def _train(overrides: list[str]) -> None:
    slurm.requeue_on_signal()
    cfg = compose(overrides)
    from levin.training.distributed import sharding  # late: torch and Lightning take seconds to import
    from levin.training.session import train, train_rank

    if (requeued := run_folder.find_requeued_run(cfg)) is not None:
        trust.record(cfg)  # this command names its code, too, and the record of its beginning may be gone
        resume(run=str(requeued))
    elif sharding.process_rank(cfg):
        train_rank(cfg, Path(cfg.run or "runs"))
    else:
        train(cfg, run_folder.new_run_path(cfg))


if __name__ == "__main__":
    main()
