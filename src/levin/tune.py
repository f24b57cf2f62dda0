"""Search for hyper-parameters: `python -m levin.tune algo=ppo env=pendulum trials=40 seeds_per_trial=3 jobs=2`.

Optuna proposes the values of each trial from the search space in `configs/tune/`. A trial is a run per seed; its value
is the interquartile mean (IQM) of their last evaluations, and a trial that stays below the median of the others is
stopped. The best three are retrained with seeds that the search has not seen, and the winner is written to
`configs/tuned/<algo>_<env>.yaml`. The same command continues a study; several commands may work on one.
"""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from levin.config import cli, schema
from levin.config.compose import GROUPS, chosen_algo_and_env, compose, compose_one_of_many
from levin.core.errors import ConfigError, RunError, exit_on_user_error, valid_names
from levin.core.process import print_line, silence_libraries
from levin.resume import STOPPED, resume, resume_side_by_side
from levin.runs import folder as run_folder
from levin.runs import slurm
from levin.runs.provenance import run_git
from levin.runs.trust import trusted
from levin.scheduler.resources import Resources, prepare_cores

if TYPE_CHECKING:
    import optuna

BEST = 3  # trials that are retrained
OWN = ("trials", "seeds_per_trial", "jobs", "retrain", "run", "show", "trust")
TRIALS, SEEDS_PER_TRIAL, RETRAIN = 40, 3, 5  # defaults


class Tuning:
    """A study of the config that overrides describe.

    Args:
        words: Overrides, such as `algo=ppo env=pendulum`.
        trials: Number of trials.
        seeds_per_trial: Number of runs of each trial. Their seeds are `seed`, `seed` + 1, ...
        jobs: Number of runs at the same time; None: as many as the cores or GPUs can run.
        folder: Folder of the study.
        retrain: Number of further seeds that the best trials are retrained with; 0: write no values.
    """

    def __init__(
        self, words: list[str], *, trials: int, seeds_per_trial: int, jobs: int | None, folder: Path, retrain: int
    ) -> None:
        self.words, self.trials, self.seeds_per_trial = words, trials, seeds_per_trial
        self.jobs, self.folder, self.retrain = jobs, folder, retrain
        self.base = compose_one_of_many(words)

    def search(self) -> "optuna.Study | None":
        """Make the trials of the study that are missing; return the study, None if a signal has stopped it.

        Raises:
            ConfigError: The search space or a value is not valid, or the folder holds another study.
            RunError: A run has failed for another reason than the values of its trial.
        """
        from levin.scheduler.scheduler import Scheduler  # late: these import torch and Optuna
        from levin.scheduler.table import Table
        from levin.tuning.space import read_space
        from levin.tuning.study import Trials, open_study

        space = read_space(self.words)
        study = open_study(self.folder, self.base, space, self.seeds_per_trial)
        steps = f"{self.base.total_env_steps:,} env steps each"
        print_line(f"{self.folder}: {self.trials} trials of {self.seeds_per_trial} runs, {steps}")
        resources = Resources.of([self.base], self.jobs)
        with Table({}, self.folder) as table, Scheduler(lambda run: resume(run=str(run)), resources) as scheduler:
            own = Trials(
                study=study,
                folder=self.folder,
                space=space,
                make_configs=self._first_seeds,
                number=self.trials,
                scheduler=scheduler,
                table=table,
            )
            return study if own.run() else None

    def _first_seeds(self, values: dict[str, Any]) -> list[DictConfig]:
        return self._configs(values, range(self.seeds_per_trial))

    def _configs(self, values: dict[str, Any], seeds: Iterable[int]) -> list[DictConfig]:
        """Return the config of each seed, counted from that of the study, with the values of a trial."""
        from levin.tuning.space import as_word

        chosen = [f"{key}={as_word(value)}" for key, value in values.items()]
        words = [word for word in self.words if not word.startswith("seed=")]
        return [compose_one_of_many([*words, *chosen, f"seed={self.base.seed + seed}"]) for seed in seeds]

    def choose(self, study: "optuna.Study") -> bool:
        """Retrain the best trials, and the values that the study has started from, and write the winner.

        Returns:
            Whether that is done; False if a signal has stopped it.
        """
        from levin.tuning import winner as tuned
        from levin.tuning.study import best_trials, last_return, trial_folder

        fresh = range(self.seeds_per_trial, self.seeds_per_trial + self.retrain)
        folder = self.folder / tuned.RETRAINED
        best = {folder / f"{trial.number:04d}": trial for trial in best_trials(study, BEST)}
        configs = {
            each / f"s{config.seed}": config
            for each, values in [(folder / "present", {}), *((path, trial.params) for path, trial in best.items())]
            for config in self._configs(values, fresh)
        }
        for run, config in configs.items():
            if not run_folder.has_begun(run):
                run_folder.begin(run, config)
        if not resume_side_by_side(configs, self.jobs):
            return False

        def returns(path: Path) -> list[float]:
            return [last_return(run.parent) for run in sorted(path.glob("s*/metrics.csv"))]

        present = tuned.Candidate("present values", {}, None, [], returns(folder / "present"), [])
        scores = {
            trial.number: returns(trial_folder(self.folder, trial.number))
            for trial in best_trials(study, len(study.trials))
        }
        candidates = [
            tuned.Candidate(
                f"trial {trial.number}",
                trial.params,
                trial.value,
                scores[trial.number],
                returns(path),
                list(scores.values()),
            )
            for path, trial in best.items()
        ]
        print_line(tuned.describe_candidates([present, *candidates]))
        winner = max(candidates, key=lambda each: each.result)
        path = tuned.tuned_path(*chosen_algo_and_env(self.words))
        text = tuned.winner_text(winner, path, self.words, self._comments(winner, present, study))
        print_line(tuned.write_winner(text, self.folder, path))
        if present.result > winner.result:
            print_line("levin: the values from before are better on the fresh seeds: keep those")
        return True

    def _comments(self, winner: Any, present: Any, study: "optuna.Study") -> list[str]:
        """Return the comment of the tuned config: how its values were found, and how good they are."""
        mean, low, high = winner.interval
        count = len(study.get_trials(deepcopy=False))
        own = [f"trials={self.trials}", f"seeds_per_trial={self.seeds_per_trial}", f"retrain={self.retrain}"]
        return [
            f"Tuned by: python -m levin.tune {' '.join([*self.words, *own])}",
            f"Commit {run_git('rev-parse', 'HEAD') or 'unknown'}, {winner.name} of {count}.",
            f"IQM of {len(winner.fresh)} fresh seeds: {mean:.1f} (95% interval {low:.1f} to {high:.1f}); "
            f"with the values from before: {present.result:.1f}.",
        ]


def show(folder: Path) -> str:
    """Draw the history of a study; return the tables of its trials and of the importance of its parameters.

    Raises:
        ConfigError: The folder holds no study.
    """
    from levin.tuning.pictures import draw_history, importance_table, trials_table
    from levin.tuning.study import load_study

    study = load_study(folder)
    return f"{trials_table(study)}\n\n{importance_table(study)}\n\n{draw_history(study, folder)}"


def tune(words: list[str]) -> None:
    """Run the command line.

    Raises:
        ConfigError: A word is not valid.
        RunError: The study can't go on.
    """
    words, shows = cli.take_flag(words, "show")
    words, trials = cli.take_count(words, "trials")
    words, seeds_per_trial = cli.take_count(words, "seeds_per_trial")
    words, jobs = cli.take_count(words, "jobs")
    words, retrain = cli.take_count(words, "retrain", least=0)
    for word in words:
        key = word.partition("=")[0]
        if key.isidentifier() and key not in (*GROUPS, *inspect.signature(schema.top_level).parameters):
            raise ConfigError(f"{key} is unknown; {valid_names(key, OWN)}")
    named = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    words = [word for word in words if not word.startswith("run=")]
    first = compose(words, check_values=False)
    folder = Path(named[-1] if named else f"runs/tune_{first.name}")
    if shows:
        print_line(show(folder))
        return
    prepare_cores(first.trainer.threads or 1, jobs)
    tuning = Tuning(
        words,
        trials=trials or TRIALS,
        seeds_per_trial=seeds_per_trial or SEEDS_PER_TRIAL,
        jobs=jobs,
        folder=folder,
        retrain=RETRAIN if retrain is None else retrain,
    )
    study = tuning.search()
    if study is None:
        print_line(STOPPED)
        return
    print_line(show(folder))
    if not any(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False)):
        raise RunError(f"no trial is complete: see trials.csv, and output.txt of the runs in {folder}/trials")
    if tuning.retrain:
        with run_folder.lock_file(folder / ".retrain.lock", f"the best trials of {folder} are retrained"):
            if not tuning.choose(study):
                print_line(STOPPED)


def main() -> None:
    """Tune what the command line describes."""
    silence_libraries()
    with exit_on_user_error():
        cli.refuse_repeated(sys.argv[1:])
        words, given = cli.take_flag(sys.argv[1:], "trust")
        if slurm.is_later_rank():
            raise ConfigError("a study is several processes of one command: start it once, not as ranks of one run")
        slurm.requeue_on_signal()
        with trusted(given):
            tune(words)


if __name__ == "__main__":
    main()
