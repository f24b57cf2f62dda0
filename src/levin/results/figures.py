"""The pictures in experiments/: each result with the published numbers drawn in, and all of them together."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from levin.core import paths
from levin.core.errors import ConfigError
from levin.results import aggregates
from levin.results.curves import CURVES, TRAINING, Curve, align_curves
from levin.results.result import PICTURE, Result, file_fingerprints, judge_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGGREGATE = "aggregate.png"
DRAWING = "2"  # change it when the pictures are drawn in another way


def expected(results: list[Result]) -> Iterator[tuple[Path, str, Callable[[], None]]]:
    """Every picture: its path, what its description should say, and how to draw it."""
    done = [result for result in results if result.evaluations]
    for result in done:
        yield result.cell / PICTURE, _source(result), lambda result=result: draw_result(result)
    comparable = [result for result in done if result.reference.published]  # 1 is the published number
    if comparable:
        yield paths.EXPERIMENTS / AGGREGATE, _source(*comparable), lambda: draw_aggregate(comparable)


def _source(*results: Result) -> str:
    """A fingerprint of all that a picture shows."""
    digest = hashlib.sha256(DRAWING.encode())
    for result in results:
        digest.update(result.name.encode())
        files = file_fingerprints(result.cell)
        digest.update(files[CURVES].encode())
        digest.update(files[TRAINING].encode())
        digest.update(result.reference.model_dump_json().encode())
    return digest.hexdigest()


def read_description(path: Path) -> str | None:
    """The fingerprint that a picture carries."""
    if not path.is_file():
        return None
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Description")


def draw_result(result: Result) -> None:
    """The curve of a result, with the published numbers drawn in."""
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
            fmt="o", color=color, capsize=4, label=f"{published.family}: {published.number}", clip_on=False, zorder=3,
        )  # fmt: skip
    axes.axhline(
        result.reference.gate, color="gray", linestyle=":", linewidth=1, label=f"gate: {result.reference.gate:g}"
    )
    axes.set_title(f"{result.env}: {judge_scores(result.reference, result.scores)[0]}")
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, result.cell / PICTURE, _source(result))


def draw_aggregate(results: list[Result]) -> None:
    """All results of each algorithm as one: efficiency, the end, and who is better where two share their tasks."""
    by_algorithm: dict[str, list[Result]] = {}
    for result in results:
        by_algorithm.setdefault(result.algorithm, []).append(result)
    compared = list(algorithm_pairs(by_algorithm))
    figure, axes = new_figure(3 if compared else 2)
    efficiency, end, *improvement = axes  # type: ignore[misc]
    share, labels = np.linspace(0.05, 1, 20), []
    for i, (name, those) in enumerate(by_algorithm.items()):
        curves = _aligned([_normalised(result, share) for result in those])  # [seeds, tasks, 20]
        iqm, interval = aggregates.iqm_with_interval(curves)
        (line,) = efficiency.plot(share, iqm, linewidth=2)
        efficiency.fill_between(share, *interval, color=line.get_color(), alpha=0.2, linewidth=0)
        scores = _aligned([result.reference.normalise(result.scores)[:, None] for result in those])
        iqm, interval = aggregates.iqm_with_interval(scores)
        end.barh(i, interval[1] - interval[0], left=interval[0], color=line.get_color(), alpha=0.4, height=0.5)
        end.plot([iqm[0]] * 2, [i - 0.25, i + 0.25], color=line.get_color(), linewidth=3)
        labels.append(f"{name} ({len(those)})")
    efficiency.set(xlabel="share of the env steps", ylabel="normalised return", title="IQM of published tasks")
    end.axvline(1, color="gray", linestyle=":")
    end.set(xlabel="0: uniform actions, 1: published", title="At the end: IQM, 95% interval (results)")
    end.margins(x=0.05)
    end.set_xlim(left=min(0, end.get_xlim()[0]))
    end.set_yticks(range(len(labels)), labels)  # the legend of the left one, too
    end.set_ylim(-0.6, len(by_algorithm) - 0.4)
    for axis in improvement:
        for i, (_, probability, interval) in enumerate(compared):
            axis.barh(i, interval[1] - interval[0], left=interval[0], color="gray", alpha=0.4, height=0.5)
            axis.plot([probability] * 2, [i - 0.25, i + 0.25], color="black", linewidth=2)
            axis.set_yticks(range(len(compared)), [each[0] for each in compared])
        axis.axvline(0.5, color="gray", linestyle=":")
        axis.set(xlim=(0, 1), title="P(the first is better) on one task (pairs)")
    save_figure(figure, paths.EXPERIMENTS / AGGREGATE, _source(*results))


def _normalised(result: Result, share: np.ndarray) -> np.ndarray:
    """Evaluation curves on shares of the budget: `[seeds, shares]`."""
    grid, returns = align_curves(list(result.evaluations.values()))
    at = share * result.config.total_env_steps
    return result.reference.normalise(np.stack([np.interp(at, grid, each) for each in returns]))


def _aligned(tasks: list[np.ndarray]) -> np.ndarray:
    """`[seeds, tasks, frames]` of as many seeds as every task has."""
    seeds = min(len(each) for each in tasks)
    return np.stack([each[:seeds] for each in tasks], axis=1)


def algorithm_pairs(by_algorithm: dict[str, list[Result]]) -> Iterator[tuple[str, float, np.ndarray]]:
    """Each two algorithms that share tasks, and the number of results that do: P(the first is better) at the end."""
    names = list(by_algorithm)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = product(by_algorithm[first], by_algorithm[second])
            shared = [(ours, theirs) for ours, theirs in both if ours.task == theirs.task]
            if shared:
                left, right = (_aligned([pair[k].finals[:, None] for pair in shared])[..., 0] for k in (0, 1))
                yield f"{first} > {second} ({len(shared)})", *aggregates.probability_of_improvement(left, right)


def draw_line(axes: "Axes", label: str, seeds: list[Curve]) -> None:
    """One line, and around it the interval when there are seeds enough for one."""
    grid, returns = align_curves(seeds)
    iqm, interval = aggregates.iqm_with_interval(returns[:, None])  # one task: [seeds, 1, evaluations]
    (line,) = axes.plot(grid, iqm, label=label, linewidth=2)
    axes.fill_between(grid, *interval, color=line.get_color(), alpha=0.2, linewidth=0)


def new_figure(columns: int = 1) -> "tuple[Figure, Axes]":
    """A picture that needs no display; with more than one column, the axes are an array."""
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


def save_figure(figure: "Figure", out: Path, source: str = "") -> None:
    """Write the picture; `source` goes into the file as its description.

    Raises:
        ConfigError: It can't be written.
    """
    from matplotlib import pyplot as plt

    try:
        figure.savefig(out, dpi=150, metadata={"Description": source} if source else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"out={out} can't be written: {error}") from error
    finally:
        plt.close(figure)
