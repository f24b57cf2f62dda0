"""Comparison of networks for SAC on HalfCheetah-v4: linear layers, layer normalisation, SimBa.

`make study NAME=networks` writes networks.png and README.md beside this file from the results stored in
`experiments/`. It trains nothing: `make reproduce EXP=sac_halfcheetah_layer_norm SEEDS="0 1 2" STORE=1` trains one.
"""
# needs the extra: mujoco

from pathlib import Path

import numpy as np
from experiments.study import read_words

from levin.results.aggregates import iqm_with_interval
from levin.results.curves import align_curves
from levin.results.figures import draw_line, new_figure, save_figure
from levin.results.result import Result, result_folder
from levin.results.tables import markdown_table
from levin.training.session import build_run

HERE = Path(__file__).parent
RESULTS = {"mlp": "sac_halfcheetah", "layer_norm": "sac_halfcheetah_layer_norm", "simba": "sac_halfcheetah_simba"}
ENV_STEPS = (25_000, 50_000, 100_000)
COLUMNS = ("network", "parameters of actor + critics", *(f"{steps:,} env steps" for steps in ENV_STEPS), "seeds")
REPORT = """# Networks of SAC

SAC on HalfCheetah-v4 with three values of `algo.network`, all else equal. The table has the interquartile mean of the
evaluation return over the seeds, with its 95% interval, at the evaluation nearest to these env steps. `make study
NAME=networks` writes this page from the stored results.

{table}
{missing}With three seeds the intervals are wide, so that only large differences show.

![Learning curves of each network](networks.png)
"""


def table_row(network: str, result: Result) -> dict[str, str]:
    """Return a network's row of the table: its size, and its return after some numbers of env steps."""
    algorithm, _ = build_run(result.config)
    sizes = [sum(each.numel() for each in getattr(algorithm, part).parameters()) for part in ("actor", "critic")]
    grid, returns = align_curves(list(result.evaluations.values()))  # [evaluations], [seeds, evaluations]
    row = {"network": f"`{network}`", "seeds": str(len(returns))}
    row[COLUMNS[1]] = f"{sizes[0]:,} + {sizes[1]:,}"
    for env_steps in ENV_STEPS:
        nearest = np.abs(grid - env_steps).argmin()
        iqm, (low, high) = iqm_with_interval(returns[:, None, [nearest]])
        row[f"{env_steps:,} env steps"] = f"{iqm[0]:,.0f} ({low[0]:,.0f} to {high[0]:,.0f})"
    return row


def main() -> None:
    """Draw the figure and write the report."""
    results = {network: Result.read(result_folder(name)) for network, name in RESULTS.items()}
    done = {network: result for network, result in results.items() if result.evaluations}
    figure, axes = new_figure()
    for network, result in done.items():
        draw_line(axes, f"algo.network={network}", list(result.evaluations.values()))
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, HERE / "networks.png")
    rows = [table_row(network, result) for network, result in done.items()]
    missing = "".join(f"`{network}` was not trained yet. " for network in results if network not in done)
    (HERE / "README.md").write_text(REPORT.format(table=markdown_table(rows, COLUMNS), missing=missing))


if __name__ == "__main__":
    read_words()
    main()
