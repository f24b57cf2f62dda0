"""Figures in experiments/: one per result, with the published numbers, and one of all results together."""

import hashlib
import textwrap
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from levin.core import files, paths
from levin.core.errors import ConfigError
from levin.results import aggregates
from levin.results.curves import CURVES, TRAINING, Curve, align_curves
from levin.results.result import PICTURE, Result, file_fingerprints

if TYPE_CHECKING:
    from types import ModuleType

    from cycler import Cycler
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGGREGATE = "aggregate.png"
DRAWING = "4"  # version of the drawing code: change it to have all figures redrawn

# Number of each algorithm's colour in matplotlib's tab20: related algorithms have two shades of one colour.
COLOR_NUMBERS = {
    "A2C": 0, "A3C": 1, "DDPG": 2, "WorldModels": 3, "DQN": 4, "SACDiscrete": 5, "PPO": 6, "RecurrentPPO": 7,
    "TRPO": 8, "REINFORCE": 10, "ActorCritic": 11, "TQC": 12, "CrossQ": 13, "Dreamer": 14, "DreamerV3": 15,
    "TD3": 16, "SAC": 18,
}  # fmt: skip

Color = tuple[float, float, float]


def expected_figures(results: list[Result]) -> Iterator[tuple[Path, str, Callable[[], None]]]:
    """Yield each figure that experiments/ should have: path, fingerprint of its data, and a function that draws it."""
    done = [result for result in results if result.evaluations]
    for result in done:
        yield result.folder / PICTURE, _fingerprint(result), lambda result=result: draw_result(result)
    if any(result.reference.published for result in done):
        yield paths.EXPERIMENTS / AGGREGATE, _aggregate_fingerprint(results), lambda: draw_aggregate(results)


def _fingerprint(*results: Result) -> str:
    """Return a fingerprint of all data that a figure of these results shows."""
    digest = hashlib.sha256(DRAWING.encode())
    for result in results:
        digest.update(result.name.encode())
        fingerprints = file_fingerprints(result.folder)
        digest.update(fingerprints[CURVES].encode())
        digest.update(fingerprints[TRAINING].encode())
        if result.source:
            digest.update((result.folder / result.reference.source_file).read_bytes())
        digest.update(result.reference.model_dump_json(exclude_defaults=True).encode())
    return digest.hexdigest()


def _aggregate_fingerprint(results: list[Result]) -> str:
    """Return a fingerprint of all that the aggregate shows, also of the algorithms that it names as missing."""
    return hashlib.sha256(f"{_fingerprint(*results)} {describe_missing(results)}".encode()).hexdigest()


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
    curves = result.compared
    drawn = f": IQM, 95% interval, each of {len(curves)} seeds" if len(curves) > 1 else ", one seed"
    (color,) = algorithm_colors([result.algorithm]).values()
    draw_line(axes, f"{result.algorithm}{drawn}", list(curves.values()), color)
    if result.source:
        own = f"{result.reference.source_run.family}, run here: {len(result.source)} seeds"  # type: ignore[union-attr]
        draw_line(axes, own, list(result.source.values()), "dimgray")
    if result.reference.metric != "evaluations":
        axes.set_ylabel("training return")
    for published, color in zip(
        result.reference.published, ("black", "tab:red", "tab:green", "tab:purple"), strict=False
    ):
        axes.errorbar(
            *([result.reference.env_steps], [published.mean], [published.std or 0]),
            label=escape_dollars(f"{published.family}: {published.number}"),
            fmt="o", color=color, capsize=4, clip_on=False, zorder=3,
        )  # fmt: skip
    axes.axhline(
        result.reference.gate, color="gray", linestyle=":", linewidth=1, label=f"required: {result.reference.gate:g}"
    )
    axes.set_title(escape_dollars(f"{result.env}: {result.verdict[0]}"))
    axes.legend(frameon=False)
    save_figure(figure, result.folder / PICTURE, _fingerprint(result))


def draw_aggregate(results: list[Result]) -> None:
    """Draw each algorithm over all its results: sample efficiency, final scores, and comparisons on shared tasks."""
    by_algorithm: dict[str, list[Result]] = {}
    for result in results:
        if _is_comparable(result):
            by_algorithm.setdefault(result.algorithm, []).append(result)
    compared = list(algorithm_pairs(by_algorithm))
    colors = algorithm_colors(by_algorithm)
    figure, axes = _new_aggregate(improvement=bool(compared))
    efficiency, end = axes["efficiency"], axes["end"]
    for i, (name, own) in enumerate(by_algorithm.items()):
        _draw_efficiency(efficiency, name, own, colors[name])
        _draw_end(end, i, own, colors[name])
    efficiency.axhline(1, color="gray", linestyle=":")
    efficiency.set(
        xlabel="share of the env steps",
        ylabel="normalised return",
        title="Interquartile mean (IQM) over all results of an algorithm",
    )
    lines = {line.get_label(): line for line in efficiency.get_lines()}
    legend = {
        str(name): lines[name]
        for name in sorted(by_algorithm, key=lambda name: -np.asarray(lines[name].get_ydata())[-1])
    }
    efficiency.legend(
        legend.values(), legend, frameon=False, fontsize=11, loc="center left", bbox_to_anchor=(1, 0.5),
        title="by their end",
    )  # fmt: skip
    end.axvline(1, color="gray", linestyle=":")
    end.set(xlabel="normalised: 0 is uniform actions, 1 published", title="At the end (number of results)")
    end.margins(x=0.05)
    end.set_xlim(left=min(0, end.get_xlim()[0]))
    end.set_yticks(range(len(by_algorithm)), [f"{name} ({len(own)})" for name, own in by_algorithm.items()])
    end.set_ylim(-0.6, len(by_algorithm) - 0.4)
    handles = dict(zip(*reversed(end.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    if compared:
        _draw_improvement(axes["improvement"], compared, colors)
    figure.suptitle(escape_dollars(textwrap.fill(describe_missing(results), 110)), fontsize=10, color="gray")
    save_figure(figure, paths.EXPERIMENTS / AGGREGATE, _aggregate_fingerprint(results))


def _new_aggregate(*, improvement: bool) -> "tuple[Figure, dict[str, Axes]]":
    """Return a figure that can be read at the width of a page, and its axes by name."""
    rows = [["efficiency", "efficiency"], ["end", "improvement" if improvement else "end"]]
    figure, axes = _pyplot().subplot_mosaic(rows, figsize=(10, 9.5), height_ratios=[4, 5], layout="constrained")
    for each in axes.values():
        _plain_frame(each)
    return figure, axes


def _draw_improvement(axes: "Axes", compared: list[tuple], colors: dict[str, Color]) -> None:
    """Draw for each two algorithms with shared tasks the probability that the first has the better final return."""
    for i, (first, _, _, probability, interval) in enumerate(compared):
        axes.barh(i, interval[1] - interval[0], left=interval[0], color=colors[first], alpha=0.4, height=0.5)
        axes.plot([probability] * 2, [i - 0.25, i + 0.25], color=colors[first], linewidth=3)
    labels = [f"{first} > {second} ({count})" for first, second, count, *_ in compared]
    axes.set_yticks(range(len(labels)), labels)
    axes.axvline(0.5, color="gray", linestyle=":")
    axes.set(xlim=(0, 1), title="P(first is better) on one task (tasks)", xlabel="in the colour of the first")


def _draw_efficiency(axes: "Axes", name: str, own: list[Result], color: Color) -> None:
    first = max(_first_share(result) for result in own)  # before it a result has no value yet
    shares = np.array([share for share in np.linspace(0.05, 1, 20) if share >= min(first, 1)])
    iqm, interval = aggregates.iqm_with_interval(_stack_tasks([_normalised_curves(result, shares) for result in own]))
    axes.plot(shares, iqm, linewidth=2, color=color, label=name)
    axes.fill_between(shares, *interval, color=color, alpha=0.2, linewidth=0)


def _draw_end(axes: "Axes", i: int, own: list[Result], color: Color) -> None:
    """Draw one algorithm's normalised scores: IQM with interval, mean, worst seed, and the published deviation."""
    spreads = [each.reference.normalised_std for each in own if each.reference.normalised_std is not None]
    if spreads:
        spread = float(np.mean(spreads))
        axes.barh(i, 2 * spread, left=1 - spread, color="black", alpha=0.15, height=0.8, label="published deviation")
    scores = [result.reference.normalise(result.scores) for result in own]
    iqm, interval = aggregates.iqm_with_interval(_stack_tasks([each[:, None] for each in scores]))
    axes.barh(i, interval[1] - interval[0], left=interval[0], color=color, alpha=0.4, height=0.5, label="95% interval")
    axes.plot([iqm[0]] * 2, [i - 0.25, i + 0.25], color=color, linewidth=3, label="IQM")
    mean, worst = float(np.mean([each.mean() for each in scores])), float(min(each.min() for each in scores))
    axes.plot(mean, i, "D", color="black", markersize=4, label="mean")
    axes.plot(worst, i, "x", color="black", markersize=6, label="worst seed")


def algorithm_colors(names: Iterable[str]) -> dict[str, Color]:
    """Return the colour of each algorithm: the same in all figures. Algorithms of forks get the colours left over."""
    from matplotlib import colormaps

    palette = list(colormaps["tab20"].colors)  # type: ignore[attr-defined]
    names = list(names)
    others = [name for name in names if name not in COLOR_NUMBERS]
    left_over = [number for number in range(len(palette)) if number not in COLOR_NUMBERS.values()]
    numbers = COLOR_NUMBERS | dict(zip(others, cycle(left_over)))
    return {name: palette[numbers[name]] for name in names}


def describe_missing(results: list[Result]) -> str:
    """Return which algorithms of Levin the aggregate leaves out, and why, as one line."""
    classes = {
        yaml.safe_load(file.read_text(encoding="utf-8"))["algo"]["_target_"].rpartition(".")[2]
        for file in paths.CONFIGS.glob("algo/*.yaml")
    }
    shown = {result.algorithm for result in results if _is_comparable(result)}
    reasons = []
    for name in sorted(classes - shown):
        own = [result for result in results if result.algorithm == name]
        trained = [result for result in own if result.evaluations]
        if any(result.reference.published for result in trained):
            why = "fewer than two seeds"
        else:
            why = "no published number" if trained else "not run" if own else "no result"
        reasons.append(f"{name} ({why})")
    left_out = sum(1 for each in results if each.algorithm in shown and not _is_comparable(each))
    if left_out:
        reasons.append(f"{left_out} results of these algorithms that have fewer than two seeds or no published number")
    return f"Not shown: {', '.join(reasons)}" if reasons else ""


def _is_comparable(result: Result) -> bool:
    """Return whether a result has two seeds, for an interval, and a published number, to normalise its returns."""
    return len(result.evaluations) > 1 and bool(result.reference.published)


def _normalised_curves(result: Result, shares: np.ndarray) -> np.ndarray:
    """Return the normalised curves, of the published number's kind, at shares of the env steps: `[seeds, shares]`."""
    curves = result.compared
    grid, returns = align_curves(list(curves.values()))
    env_steps = shares * result.config.total_env_steps
    return result.reference.normalise(np.stack([np.interp(env_steps, grid, curve) for curve in returns]))


def _first_share(result: Result) -> float:
    """Return the share of the env steps at which all curves of `_normalised_curves` have a value."""
    curves = result.compared
    return max(int(curve.env_steps[0]) for curve in curves.values()) / result.config.total_env_steps


def _stack_tasks(tasks: list[np.ndarray]) -> np.ndarray:
    """Stack the scores `[seeds, frames]` of tasks to `[seeds, tasks, frames]`; surplus seeds of a task are dropped."""
    seeds = min(len(each) for each in tasks)
    return np.stack([each[:seeds] for each in tasks], axis=1)


def algorithm_pairs(by_algorithm: dict[str, list[Result]]) -> Iterator[tuple[str, str, int, float, np.ndarray]]:
    """Yield each two algorithms that share tasks.

    Yields:
        Names of the two, number of tasks, P(the first has the better return at the end), and its 95% interval.
    """
    names = list(by_algorithm)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = [one_per_task(by_algorithm[name]) for name in (first, second)]
            shared = [[each[task] for each in both] for task in both[0] if task in both[1]]
            if shared:
                left, right = (_stack_tasks([pair[k].last_tenth[:, None] for pair in shared])[..., 0] for k in (0, 1))
                yield first, second, len(shared), *aggregates.probability_of_improvement(left, right)


def one_per_task(results: list[Result]) -> dict[tuple[str, ...], Result]:
    """Return one result of an algorithm for each task, with several seeds: the plainest of several variants."""
    chosen: dict[tuple[str, ...], Result] = {}
    for result in sorted(results, key=lambda each: len(each.variant)):
        if len(result.evaluations) > 1:
            chosen.setdefault(result.task, result)
    return chosen


def draw_line(axes: "Axes", label: str, seeds: list[Curve], color: "Color | str | None" = None) -> None:
    """Draw the interquartile mean of the seeds' curves, its 95% interval as a band, and each seed."""
    grid, returns = align_curves(seeds)
    iqm, interval = aggregates.iqm_with_interval(returns[:, None])  # one task: [seeds, 1, evaluations]
    marker = "o" if len(grid) == 1 else ""  # a line of one point can't be seen
    (line,) = axes.plot(grid, iqm, label=_legend_label(label), linewidth=2, marker=marker, color=color)
    for values in returns if len(seeds) > 1 else []:
        style = {"color": line.get_color(), "linestyle": line.get_linestyle(), "marker": marker}
        axes.plot(grid, values, linewidth=0.7, alpha=0.8, markersize=3, **style)
    axes.fill_between(grid, *interval, color=line.get_color(), alpha=0.2, linewidth=0)


def new_figure() -> "tuple[Figure, Axes]":
    """Return a figure and its axes, for returns over env steps, without needing a display."""
    figure, axes = _pyplot().subplots(figsize=(7, 4), layout="constrained")
    _plain_frame(axes)
    axes.set(xlabel="env steps", ylabel="evaluation return")
    axes.locator_params(axis="x", nbins=7)  # their labels are long
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure, axes


def many_styles() -> "Cycler":
    """Return the styles of up to 60 curves that differ from each other, as 20 colors with 3 kinds of lines."""
    from cycler import cycler

    return cycler(linestyle=["-", "--", ":"]) * cycler(color=_pyplot().colormaps["tab20"].colors)


def _pyplot() -> "ModuleType":
    """Return matplotlib's pyplot, which draws into files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _plain_frame(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _legend_label(text: str) -> str:
    """Return the label of a curve. Matplotlib leaves out of the legend what begins with an underscore."""
    return escape_dollars(f" {text}" if text.startswith("_") else text)


def escape_dollars(text: str) -> str:
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
