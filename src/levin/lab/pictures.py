"""Figures of the lab's tables: lab.png and curves.png."""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

UNBIASED, BIASED = "#2b6cb0", "#c05621"


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw_lab(folder: Path) -> None:
    """Draw lab.png and curves.png from lab.csv and curves.csv."""
    draw_table(read_csv(folder / "lab.csv"), folder / "lab.png")
    draw_curves(read_csv(folder / "curves.csv"), folder / "curves.png")


def draw_table(rows: list[dict[str, str]], path: Path) -> None:
    """Draw the mean squared error of one estimate over the squared gradient norm, one panel per problem.

    Ticks mark the squared bias of relaxations. Other estimators are unbiased, so their measured bias is only noise.
    """
    by_problem = defaultdict(list)
    for row in rows:
        by_problem[row["problem"]].append(row)
    figure, grid = plt.subplots(2, 4, figsize=(17, 9), layout="constrained")
    for axes, (problem, group) in zip(grid.flat, by_problem.items(), strict=False):
        # Exact estimators, with error 0, do not fit on a logarithmic axis
        bars = sorted((row for row in group if float(row["mse"]) > 1e-12), key=lambda row: -float(row["mse"]))
        names, values = [row["estimator"] for row in bars], [float(row["relative_mse"]) for row in bars]
        relaxed = [row["kind"] == "relaxation" for row in bars]
        axes.barh(names, values, color=[BIASED if is_relaxed else UNBIASED for is_relaxed in relaxed], alpha=0.55)
        squared = [float(row["relative_bias"]) ** 2 for row in bars]
        for name, value, is_relaxed in zip(names, squared, relaxed, strict=True):
            if is_relaxed:
                axes.plot([value], [name], "|", color="black", markersize=9)
        axes.set(xscale="log", title=problem, xlim=(min(values) / 30, max(values) * 2))
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(by_problem) :]:
        axes.axis("off")
        for y, (color, text) in enumerate(((BIASED, "relaxations"), (UNBIASED, "unbiased"))):
            axes.barh([y], [1], color=color, alpha=0.55)
            axes.text(1.1, y, text, va="center")
        legend = (
            "bars: mean squared error of one estimate,\nover the squared gradient norm\nticks: the squared bias in it"
        )
        axes.text(0, -1, legend, va="top")
        axes.set(xlim=(0, 6), ylim=(-6, 4))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curves(rows: list[dict[str, str]], path: Path) -> None:
    """Draw the variance over theta, and bias and variance over the temperature."""
    panels = [
        ("theta", "variance", "theta of a coin, E[(b - 0.45)^2]", "variance", "linear"),
        ("tau", "relative_bias", "temperature, a choice of five", "relative bias", "log"),
        ("tau", "variance", "temperature, a choice of five", "variance", "log"),
    ]
    figure, grid = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for axes, (axis, column, xlabel, ylabel, xscale) in zip(grid, panels, strict=True):
        lines = defaultdict(list)
        for row in rows:
            noise = 2 * float(row["standard_error"]) if column == "relative_bias" else 1e-12
            if row["axis"] == axis and float(row[column]) > noise:
                lines[row["estimator"]].append((float(row["x"]), float(row[column])))
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, yscale="log")
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
