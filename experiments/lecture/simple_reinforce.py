"""Direction and learning of simple REINFORCE: cosine with the mean gradient, and learning curves."""

import torch
from experiments.lecture.cartpole import FORMS, TRAJECTORIES, gradients
from experiments.lecture.drawing import HERE, INK, panels, read, save
from experiments.lecture.learning import draw_curves, variance_curves
from experiments.study import write_table

NAME = "simple_reinforce"
SIZES = tuple(2**k for k in range(9))  # trajectories of one estimate


def measure() -> None:
    """Write simple_reinforce.csv: cosines of estimates from N trajectories with the mean gradient.

    The first half of the trajectories gives the mean gradient: that of reward-to-go, which has the same expectation as
    simple REINFORCE and less noise. The estimates use the second half.
    """
    half = TRAJECTORIES // 2
    direction = gradients()["reward-to-go"][:half].mean(0)
    rows = []
    for name in list(FORMS)[:2]:
        samples = gradients()[name][half:]
        for size in SIZES:
            batches = samples[: half // size * size].view(-1, size, samples.shape[1]).mean(1)  # [batches, P]
            cosine = torch.cosine_similarity(batches, direction.unsqueeze(0))
            low, middle, high = cosine.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            rows.append([name, size, len(batches), *(f"{each:.4f}" for each in (low, middle, high))])
    write_table(
        HERE / f"{NAME}.csv", ["form", "trajectories", "estimates", "cosine_10%", "cosine_median", "cosine_90%"], rows
    )


def draw() -> None:
    """Draw the cosines, and the learning curves of simple REINFORCE."""
    figure, (left, right) = panels(2)
    rows = read(NAME)
    for name in list(FORMS)[:2]:
        mine = [row for row in rows if row["form"] == name]
        sizes = [int(row["trajectories"]) for row in mine]
        low, middle, high = ([float(row[f"cosine_{key}"]) for row in mine] for key in ("10%", "median", "90%"))
        (line,) = left.plot(sizes, middle, "o-", label=name, markersize=4)
        left.fill_between(sizes, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    left.axhline(0, color=INK, linewidth=1, linestyle=":")
    left.set(
        xscale="log", xlabel="trajectories of one estimate", ylabel="cosine with the mean gradient", title="direction"
    )
    left.legend(loc="lower right")
    draw_curves(right, variance_curves("simple REINFORCE", "reward-to-go"))
    right.set_title("learning, 5 seeds")
    right.legend(loc="upper left")
    save(figure, NAME)
