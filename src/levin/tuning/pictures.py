"""Show a search: table of its trials, importance of its parameters, and its history as a picture."""

from pathlib import Path

import numpy as np
import optuna
from optuna.trial import TrialState

from levin.results.tables import plain_table, short_number
from levin.tuning.study import best_trials

PICTURE = "history.png"
ROWS = 15  # of the table


def trials_table(study: optuna.Study) -> str:
    """Return the best trials of a search as a table, and how many others there are in each state."""
    trials = study.get_trials(deepcopy=False)
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    rows = [
        [str(trial.number), short_number(trial.value or 0.0), *(_text(trial.params.get(key, "")) for key in keys)]
        for trial in best_trials(study, ROWS)
    ]
    counts = [f"{sum(trial.state == state for trial in trials)} {state.name.lower()}" for state in TrialState]
    table = plain_table(["trial", "IQM", *(key.removeprefix("algo.") for key in keys)], rows)
    return f"{len(trials)} trials: {', '.join(each for each in counts if not each.startswith('0 '))}\n{table}"


def importance_table(study: optuna.Study) -> str:
    """Return the importance of each parameter (fANOVA: share of the variance of the values), the largest first."""
    values = [trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    if len(values) < 2 or len(set(values)) == 1:
        return "importance of the parameters: needs two complete trials with different values"
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return plain_table(("parameter", "importance"), [(key, f"{share:.2f}") for key, share in found.items()])


def draw_history(study: optuna.Study, folder: Path) -> Path:
    """Draw the value of each trial and the best value so far; return the path of the picture."""
    from levin.results.figures import new_figure, save_figure

    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED and trial.value is not None]
    figure, axes = new_figure()
    for group, marker, label in ((complete, "o", "complete"), (pruned, "x", "pruned: its last value")):
        axes.plot([trial.number for trial in group], [trial.value or 0.0 for trial in group], marker, label=label)
    if complete:
        best = np.maximum.accumulate([trial.value or 0.0 for trial in complete])
        axes.step([trial.number for trial in complete], best, where="post", label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("IQM of the last evaluations")
    axes.legend(frameon=False)
    save_figure(figure, folder / PICTURE)
    return folder / PICTURE


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
