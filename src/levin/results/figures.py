"""Figures in experiments/: one per result, with the published numbers, and one of all results together."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from levin.core import files, paths
from levin.core.errors import ConfigError
from levin.results import aggregates
from levin.results.curves import CURVES, TRAINING, Curve, align_curves
from levin.results.result import PICTURE, Result, file_fingerprints, judge_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGGREGATE = "aggregate.png"
DRAWING = "2"  # version of the drawing code: change it to have all figures redrawn


def expected_figures(results: list[Result]) -> Iterator[tuple[Path, str, Callable[[], None]]]:
    """Yield each figure that experiments/ should have: path, fingerprint of its data, and a function that draws it."""
    done = [result for result in results if result.evaluations]
    for result in done:
        yield result.folder / PICTURE, _source(result), lambda result=result: draw_result(result)
    # The normalised return needs a published number, which is its 1.
    comparable = [result for result in done if result.reference.published]
    if comparable:
        yield paths.EXPERIMENTS / AGGREGATE, _source(*comparable), lambda: draw_aggregate(comparable)


def _source(*results: Result) -> str:
    """Return a fingerprint of all data that a figure of these results shows."""
    digest = hashlib.sha256(DRAWING.encode())
    for result in results:
        digest.update(result.name.encode())
        files = file_fingerprints(result.folder)
        digest.update(files[CURVES].encode())
        digest.update(files[TRAINING].encode())
        digest.update(result.reference.model_dump_json().encode())
    return digest.hexdigest()


def read_fingerprint(path: Path) -> str | None:
    """Return the fingerprint stored in a figure's file; None without a file."""
    if not path.is_file():
        return None
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Description")


def draw_result(result: Result) -> None:
    """Draw the learning curve of a result with the published numbers."""
    figure, axes = new_figure()
    curves = result.evaluations if result.reference.metric == "evaluations" else result.training
    draw_line(axes, f"{result.algorithm}, {len(curves)} seeds", list(curves.values()))
    if result.reference.metric != "evaluations":
        axes.set_ylabel("training return")
    for published, color in zip(
        result.reference.published, ("black", "tab:red", "tab:green", "tab:purple"), strict=False
    ):
        axes.errorbar(
            *([result.reference.env_steps], [published.mean], [published.std or 0]),
            label=plain(f"{published.family}: {published.number}"),
            fmt="o", color=color, capsize=4, clip_on=False, zorder=3,
        )  # fmt: skip
    axes.axhline(
        result.reference.gate, color="gray", linestyle=":", linewidth=1, label=f"gate: {result.reference.gate:g}"
    )
    axes.set_title(plain(f"{result.env}: {judge_scores(result.reference, result.scores)[0]}"))
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, result.folder / PICTURE, _source(result))


def draw_aggregate(results: list[Result]) -> None:
    """Draw each algorithm over all its results: sample efficiency, final scores, and comparisons on shared tasks."""
    by_algorithm: dict[str, list[Result]] = {}
    for result in results:
        by_algorithm.setdefault(result.algorithm, []).append(result)
    compared = list(algorithm_pairs(by_algorithm))
    figure, axes = new_figure(3 if compared else 2)
    efficiency, end, *improvement = axes  # type: ignore[misc]
    shares, labels = np.linspace(0.05, 1, 20), []
    for i, (name, own) in enumerate(by_algorithm.items()):
        curves = _stack_tasks([_normalised_curves(result, shares) for result in own])  # [seeds, tasks, 20]
        iqm, interval = aggregates.iqm_with_interval(curves)
        (line,) = efficiency.plot(shares, iqm, linewidth=2)
        efficiency.fill_between(shares, *interval, color=line.get_color(), alpha=0.2, linewidth=0)
        scores = _stack_tasks([result.reference.normalise(result.scores)[:, None] for result in own])
        iqm, interval = aggregates.iqm_with_interval(scores)
        end.barh(i, interval[1] - interval[0], left=interval[0], color=line.get_color(), alpha=0.4, height=0.5)
        end.plot([iqm[0]] * 2, [i - 0.25, i + 0.25], color=line.get_color(), linewidth=3)
        labels.append(f"{name} ({len(own)})")
    efficiency.set(xlabel="share of the env steps", ylabel="normalised return", title="IQM of published tasks")
    end.axvline(1, color="gray", linestyle=":")
    end.set(xlabel="0: uniform actions, 1: published", title="At the end: IQM, 95% interval (results)")
    end.margins(x=0.05)
    end.set_xlim(left=min(0, end.get_xlim()[0]))
    end.set_yticks(range(len(labels)), labels)  # also serves as the legend of the left axes
    end.set_ylim(-0.6, len(by_algorithm) - 0.4)
    for axis in improvement:
        for i, (_, probability, interval) in enumerate(compared):
            axis.barh(i, interval[1] - interval[0], left=interval[0], color="gray", alpha=0.4, height=0.5)
            axis.plot([probability] * 2, [i - 0.25, i + 0.25], color="black", linewidth=2)
            axis.set_yticks(range(len(compared)), [each[0] for each in compared])
        axis.axvline(0.5, color="gray", linestyle=":")
        axis.set(xlim=(0, 1), title="P(the first is better) on one task (pairs)")
    save_figure(figure, paths.EXPERIMENTS / AGGREGATE, _source(*results))


def _normalised_curves(result: Result, shares: np.ndarray) -> np.ndarray:
    """Return the normalised evaluation curves at these shares of the env steps: `[seeds, shares]`."""
    grid, returns = align_curves(list(result.evaluations.values()))
    env_steps = shares * result.config.total_env_steps
    return result.reference.normalise(np.stack([np.interp(env_steps, grid, curve) for curve in returns]))


def _stack_tasks(tasks: list[np.ndarray]) -> np.ndarray:
    """Stack the scores `[seeds, frames]` of tasks to `[seeds, tasks, frames]`; surplus seeds of a task are dropped."""
    seeds = min(len(each) for each in tasks)
    return np.stack([each[:seeds] for each in tasks], axis=1)


def algorithm_pairs(by_algorithm: dict[str, list[Result]]) -> Iterator[tuple[str, float, np.ndarray]]:
    """Yield each two algorithms that share tasks: label, P(the first has the better final return), 95% interval."""
    names = list(by_algorithm)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = product(by_algorithm[first], by_algorithm[second])
            shared = [pair for pair in both if pair[0].task == pair[1].task]
            if shared:
                left, right = (_stack_tasks([pair[k].finals[:, None] for pair in shared])[..., 0] for k in (0, 1))
                yield f"{first} > {second} ({len(shared)})", *aggregates.probability_of_improvement(left, right)


def draw_line(axes: "Axes", label: str, seeds: list[Curve], *, single: bool = False) -> None:
    """Draw the interquartile mean of the seeds' curves, its 95% interval as a band, and with `single` each seed."""
    grid, returns = align_curves(seeds)
    iqm, interval = aggregates.iqm_with_interval(returns[:, None])  # one task: [seeds, 1, evaluations]
    marker = "o" if len(grid) == 1 else ""  # a line of one point can't be seen
    (line,) = axes.plot(grid, iqm, label=plain(label), linewidth=2, marker=marker)
    for values in returns if single and len(seeds) > 1 else []:
        axes.plot(grid, values, color=line.get_color(), linewidth=0.6, alpha=0.5, marker=marker, markersize=3)
    axes.fill_between(grid, *interval, color=line.get_color(), alpha=0.2, linewidth=0)


def new_figure(columns: int = 1) -> "tuple[Figure, Axes]":
    """Return a figure and its axes, without needing a display. With several columns, the axes are an array."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(ncols=columns, figsize=(7 if columns == 1 else 5 * columns, 4), layout="constrained")
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.3)
    if columns == 1:
        axes.set(xlabel="env steps", ylabel="evaluation return")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure, axes


def plain(text: str) -> str:
    """Return text for a figure in which `$` is a dollar sign, not the start of a formula."""
    return text.replace("$", r"\$")


def save_figure(figure: "Figure", out: Path, source: str = "") -> None:
    """Write a figure to a file.

    Args:
        figure: Figure to write; it is closed afterwards.
        out: Path of the file.
        source: Fingerprint of the data, stored in the file as its description.

    Raises:
        ConfigError: The file can't be written.
    """
    from matplotlib import pyplot as plt

    try:
        with files.replace(out.parent, out.name) as path:
            figure.savefig(path, dpi=150, metadata={"Description": source} if source else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"out={out} can't be written: {error}") from error
    finally:
        plt.close(figure)
