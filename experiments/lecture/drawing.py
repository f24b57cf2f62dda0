"""Look of the lecture's figures: transparent, and readable on a light and on a dark page."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from levin.lab.pictures import read_csv

HERE = Path(__file__).parent
INK = "#808488"  # of text and axes: enough contrast with white and with black
COLORS = ("#2f7ed8", "#e8833a", "#2fa36b", "#d04a63", "#8d6cc9", "#a7862f")


def panels(
    columns: int = 1, *, width: float = 9.0, height: float = 3.6, ratios: tuple[float, ...] | None = None
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a row of axes. Sizes are in inches; `ratios` are the widths of the axes (None: equal)."""
    style = {"axes.prop_cycle": mpl.cycler(color=COLORS), "font.size": 10, "axes.titlesize": 10.5}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with mpl.rc_context(style):
        figure, axes = plt.subplots(
            1, columns, figsize=(width, height), layout="constrained", squeeze=False, width_ratios=ratios
        )
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def save(figure: Figure, name: str) -> None:
    """Write `<name>.png` beside this file, with a transparent background, and close the figure."""
    for axes in figure.axes:
        if (legend := axes.get_legend()) is not None:
            legend.set_frame_on(False)
            for text in legend.get_texts():
                text.set_color(INK)
    figure.savefig(HERE / f"{name}.png", dpi=150, transparent=True, metadata={"Software": None})
    plt.close(figure)


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of `<name>.csv` beside this file."""
    return read_csv(HERE / f"{name}.csv")
