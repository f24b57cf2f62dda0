"""Search for hyper-parameters: `python -m levin.tune algo=ppo env=pendulum trials=40 seeds_per_trial=3 jobs=2`.

Optuna proposes the values of each trial from the search space in `configs/tune/`. A trial is a run per seed; its value
is the interquartile mean (IQM) of their last evaluations, and a trial that stays below the median of the others is
stopped. The best three are retrained with seeds that the search has not seen. The winner is written to `winner.yaml`,
and to `configs/tuned/<algo>_<env>.yaml` if it is better than the values that the search began with. The same command
continues a search; several commands may work on one.
"""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from levin.config import cli, schema
from levin.config.compose import GROUPS, chosen_algo_and_env, compose
from levin.core.errors import ConfigError, LockedError, RunError, exit_on_user_error, valid_names
from levin.core.process import print_line, silence_libraries
from levin.results.curves import METRICS
from levin.results.tables import short_number
from levin.resume import STOPPED, resume, resume_side_by_side
from levin.runs import folder as run_folder
from levin.runs import slurm
from levin.runs.provenance import run_git
from levin.runs.trust import trusted
from levin.scheduler.resources import Resources, prepare_cores
from levin.scheduler.scheduler import NOT_FINITE

BEST = 3  # trials that are retrained
PRESENT = "present values"  # those that the search started from
OWN = ("trials", "seeds_per_trial", "jobs", "retrain", "run", "show", "trust")
TRIALS, SEEDS_PER_TRIAL, RETRAIN = 40, 3, 5  # defaults


class Tuning:
    """Search for hyper-parameters of the config that the overrides describe.

    Args:
        overrides: Overrides of the config, such as `algo=ppo env=pendulum`.
        trials: Number of trials.
        seeds_per_trial: Number of runs of each trial. Their seeds are `seed`, `seed` + 1, ...
        jobs: Number of runs at the same time; None: as many as the cores or GPUs can run.
        folder: Folder of the search.
        retrain: Number of further seeds that the best trials are retrained with; 0: write no values.

    Raises:
        ConfigError: The search space or a value is not valid, or the folder holds another search.
    """

    def __init__(
        self, overrides: list[str], *, trials: int, seeds_per_trial: int, jobs: int | None, folder: Path, retrain: int
    ) -> None:
        from levin.tuning.space import read_space  # late: these import torch and Optuna
        from levin.tuning.study import open_study

        self.overrides, self.trials, self.seeds_per_trial = overrides, trials, seeds_per_trial
        self.jobs, self.folder, self.retrain = jobs, folder, retrain
        self.space = read_space(overrides)
        self.study, self.base = open_study(folder, overrides, self.space, seeds_per_trial)

    def search(self) -> bool:
        """Run the trials of the search that are missing; return False if a signal has stopped it.

        Raises:
            RunError: A run has failed for another reason than the values of its trial.
        """
        from levin.scheduler.scheduler import Scheduler
        from levin.scheduler.table import Table
        from levin.tuning.trials import Trials

        steps = f"{self.base.total_env_steps:,} env steps each"
        print_line(f"{self.folder}: {self.trials} trials of {self.seeds_per_trial} runs, {steps}")
        resources = Resources.of([self.base], self.jobs)
        with Table({}, self.folder) as table, Scheduler(lambda run: resume(run=str(run)), resources) as scheduler:
            own = Trials(
                study=self.study,
                folder=self.folder,
                space=self.space,
                make_configs=lambda values: self._configs(values, range(self.seeds_per_trial)),
                number=self.trials,
                scheduler=scheduler,
                table=table,
            )
            return own.run()

    def _configs(self, values: dict[str, Any], seeds: Iterable[int]) -> list[DictConfig]:
        """Return the config of each seed, counted from that of the search, with the values of a trial."""
        from levin.tuning.study import with_values

        return [with_values(self.base, values, self.base.seed + seed) for seed in seeds]

    def choose(self) -> bool:
        """Retrain the best trials, and the values that the search started from, and write the winner.

        Returns:
            Whether that is done; False if a signal has stopped it.

        Raises:
            RunError: A run has failed, or those of all trials end with numbers that are not finite.
        """
        import optuna

        from levin.tuning import winner as tuned
        from levin.tuning.study import BASE, TUNED, best_trials
        from levin.tuning.trials import last_return, trial_folder

        fresh = range(self.seeds_per_trial, self.seeds_per_trial + self.retrain)
        best = {f"trial {trial.number}": trial for trial in best_trials(self.study, BEST)}
        chosen: dict[str, optuna.trial.FrozenTrial | None] = {PRESENT: None, **best}
        configs: dict[str, dict[Path, DictConfig]] = {}
        for name, trial in chosen.items():
            folder = self.folder / tuned.RETRAINED / name.replace(" ", "_")
            own = self._configs(trial.params if trial else {}, fresh)
            configs[name] = {folder / f"s{config.seed}": config for config in own}
        together = {run: config for own in configs.values() for run, config in own.items()}
        for run, config in together.items():
            if not run_folder.has_begun(run):
                run_folder.begin(run, config)
        if not resume_side_by_side(together, self.jobs, tolerated=(NOT_FINITE,)):
            return False
        scores = {}
        for trial in best_trials(self.study, len(self.study.trials)):
            runs = sorted(trial_folder(self.folder, trial.number).glob(f"s*/{METRICS}"))
            if len(runs) == self.seeds_per_trial:  # else the user has deleted some
                scores[trial.number] = [last_return(metrics.parent) for metrics in runs]
        candidates = [
            tuned.Candidate(
                name,
                trial.value if trial else None,
                scores.get(trial.number, []) if trial else [],
                [last_return(run) for run in configs[name]],
                list(scores.values()),
            )
            for name, trial in chosen.items()
            if all(run_folder.has_ended(run, each.total_env_steps) for run, each in configs[name].items())  # else NaN
        ]
        trials = [each for each in candidates if each.name != PRESENT]
        if not trials:
            raise RunError("the best trials all end with numbers that are not finite when they are retrained")
        print_line(tuned.describe_candidates(candidates))
        winner = max(trials, key=lambda each: each.result)
        present = next((each for each in candidates if each.name == PRESENT), None)
        keys = [*cli.keys_of(self.overrides), *self.space]
        config = next(iter(configs[winner.name].values()))
        text = tuned.winner_text(config, keys, self.folder / BASE / TUNED, self._comments(winner, present))
        path = tuned.tuned_path(*chosen_algo_and_env(self.overrides))
        if present is not None and present.result > winner.result:
            print_line(
                "levin: the values that the search started from beat the best trials on the fresh seeds, and are kept"
            )
            path = None
        print_line(tuned.write_winner(text, self.folder, path))
        return True

    def _comments(self, winner: Any, present: Any) -> list[str]:
        """Return the comment of the tuned config: how its values were found, and how good they are."""
        mean, low, high = map(short_number, winner.interval)
        interval = f" (95% interval {low} to {high})" if len(winner.fresh) > 1 else ""
        own = [f"trials={self.trials}", f"seeds_per_trial={self.seeds_per_trial}", f"retrain={self.retrain}"]
        before = "numbers that are not finite" if present is None else short_number(present.result)
        return [
            f"Tuned by: python -m levin.tune {' '.join([*self.overrides, *own])}",
            f"Commit {run_git('rev-parse', 'HEAD') or 'unknown'}, {winner.name} of {len(self.study.trials)}.",
            f"IQM of {len(winner.fresh)} fresh seeds: {mean}{interval}, the best of the retrained trials by this.",
            f"With the values that the search started from: {before}.",
        ]


def show(folder: Path) -> str:
    """Draw the history of a search; return the tables of its trials and of the importance of its parameters.

    Raises:
        ConfigError: The folder holds no search.
    """
    from levin.tuning.pictures import draw_history, importance_table, trials_table
    from levin.tuning.study import load_study

    study = load_study(folder)
    return f"{trials_table(study)}\n\n{importance_table(study)}\n\n{draw_history(study, folder)}"


def tune(arguments: list[str]) -> None:
    """Search for hyper-parameters, or show a search, as the command line says.

    Raises:
        ConfigError: An argument is not valid.
        RunError: The search can't go on.
    """
    arguments, shows = cli.pop_flag(arguments, "show")
    arguments, trials = cli.pop_count(arguments, "trials")
    arguments, seeds_per_trial = cli.pop_count(arguments, "seeds_per_trial")
    arguments, jobs = cli.pop_count(arguments, "jobs")
    arguments, retrain = cli.pop_count(arguments, "retrain", least=0)
    for argument in arguments:
        key = argument.partition("=")[0]
        if key.isidentifier() and key not in (*GROUPS, *inspect.signature(schema.top_level).parameters):
            raise ConfigError(f"{key} is unknown; {valid_names(key, OWN)}")
    arguments, named = cli.pop_argument(arguments, "run")
    first = compose(arguments, check_values=False)
    folder = Path(named or f"runs/tune_{first.name}")
    if shows:
        print(show(folder))
        return
    prepare_cores(first.trainer.threads or 1, jobs)
    tuning = Tuning(
        arguments,
        trials=trials or TRIALS,
        seeds_per_trial=seeds_per_trial or SEEDS_PER_TRIAL,
        jobs=jobs,
        folder=folder,
        retrain=RETRAIN if retrain is None else retrain,
    )
    if not tuning.search():
        print_line(STOPPED)
        return
    print_line(show(folder))
    if not any(trial.state.name == "COMPLETE" for trial in tuning.study.trials):
        raise RunError(f"no trial is complete: see trials.csv, and output.txt of the runs in {folder}/trials")
    if not tuning.retrain:
        return
    try:
        with run_folder.lock_file(folder / ".retrain.lock", f"the best trials of {folder} are retrained"):
            if not tuning.choose():
                print_line(STOPPED)
    except LockedError as error:
        print_line(str(error))  # that process writes the winner


def main() -> None:
    """Tune what the command line describes."""
    silence_libraries()
    with exit_on_user_error():
        cli.check_arguments(sys.argv[1:])
        arguments, given = cli.pop_flag(sys.argv[1:], "trust")
        if slurm.is_later_rank():
            raise ConfigError(
                "a search starts the processes of its runs itself: run the command once, without torchrun or with "
                "srun --ntasks=1"
            )
        slurm.requeue_on_signal()
        with trusted(given):
            tune(arguments)


if __name__ == "__main__":
    main()
