"""Compare runs in a table: `python -m levin.compare runs="runs/sweep_x/*"`.

One row per learning curve, as `levin.plot` draws them: what differs, the seeds, the interquartile mean (IQM) of their
values where the shortest run ends, with its 95% interval, the speed, and the state of the runs. Rows of one env are
together, the largest value first.
"""

from collections import Counter

import numpy as np

from levin.config import cli
from levin.core.errors import exit_on_user_error
from levin.plot import RETURN, Runs, collect_runs
from levin.results.aggregates import iqm_with_interval
from levin.results.curves import align_curves, read_metric
from levin.results.tables import plain_table, short_number
from levin.runs import folder as run_folder
from levin.runs.load import load_config

COLUMNS = ("runs", "seeds", "env steps", "IQM", "95% interval", "steps/s", "state")


def compare(*, runs: str, metric: str = RETURN) -> str:
    """Return a table of runs, sorted by env and the IQM of a metric over seeds.

    The values of the seeds are those at the env steps where the shortest one ends.

    Args:
        runs: Run folders, folders of runs, or results in experiments/, separated by spaces; `*` is a wildcard.
        metric: Column of metrics.csv; default: mean return of an evaluation.

    Raises:
        ConfigError: There is no run, or no run has a value of the metric yet.
    """
    rows = []
    for label, group in collect_runs(runs, metric).items():
        env_steps, values = align_curves(list(group.seeds.values()))
        last = values[:, -1]  # where the shortest run ends
        (value,), interval = iqm_with_interval(last[:, None, None])
        ends = " to ".join(map(short_number, interval[:, 0])) if len(last) > 1 else ""
        row = (label, str(len(last)), f"{env_steps[-1]:,.0f}", short_number(value), ends, _speed(group), _state(group))
        rows.append(((group.config.get("env.id", ""), np.isnan(value), -value), row))
    return plain_table(COLUMNS, [row for _, row in sorted(rows, key=lambda each: each[0])])


def _speed(group: Runs) -> str:
    """Return the env steps per second of a run, the median over its rows of metrics and the mean over the runs."""
    rates = [read_metric(run, "time/env_steps_per_second").return_mean for run in group.sources.values()]
    medians = [np.median(rate) for rate in rates if len(rate)]
    return f"{np.mean(medians):,.0f}" if medians else ""


def _state(group: Runs) -> str:
    """Return how many runs are in each state; empty for copied metrics and for a stored result, which are no runs."""
    states = Counter(
        "running"
        if run_folder.is_locked(run)
        else "complete"
        if run_folder.has_ended(run, load_config(run, code_sections=()).total_env_steps)
        else "stopped"
        for run in group.sources.values()
        if (run / run_folder.CONFIG).is_file()
    )
    return ", ".join(f"{count} {state}" if len(states) > 1 else state for state, count in states.items())


def main() -> None:
    """Print the table."""
    with exit_on_user_error():
        print(compare(**cli.command_arguments(compare)))


if __name__ == "__main__":
    main()
