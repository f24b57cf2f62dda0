"""Variance of the gradient by number of trajectories, and learning of simple REINFORCE by samples per update."""

from experiments.lecture.cartpole import FORMS, gradients, total_variance
from experiments.lecture.drawing import HERE, INK, panels, read, save
from experiments.lecture.learning import draw_curves, measure_curves, read_curves, variance_curves
from experiments.study import write_table

NAME = "gradient_variance"
CURVES = HERE / f"{NAME}_curves.csv"
SIZES = tuple(2**k for k in range(8))  # trajectories of one estimate
TRANSITIONS = (250, 4000)  # per update; 1000 is in the study of the variance


def measure() -> None:
    """Write gradient_variance.csv, and the learning curves for several numbers of transitions per update."""
    rows = []
    for name in FORMS:
        samples = gradients()[name]
        for size in SIZES:
            batches = samples[: len(samples) // size * size].view(-1, size, samples.shape[1]).mean(1)  # [batches, P]
            rows.append([name, size, len(batches), *(f"{each:.5g}" for each in total_variance(batches))])
    write_table(HERE / f"{NAME}.csv", ["form", "trajectories", "estimates", "variance", "standard_error"], rows)
    forms = {str(number): ["algo.advantage=return", f"algo.transitions_per_update={number}"] for number in TRANSITIONS}
    measure_curves(forms, range(3), CURVES)


def draw() -> None:
    """Draw the variances with lines of slope -1, and the learning curves."""
    figure, (left, right) = panels(2)
    rows = read(NAME)
    for name in FORMS:
        mine = [row for row in rows if row["form"] == name]
        variance = [float(row["variance"]) for row in mine]
        (line,) = left.plot(SIZES, variance, "o", label=name)
        left.plot(SIZES, [variance[0] / size for size in SIZES], color=line.get_color(), linewidth=1)
    left.plot([], [], color=INK, linewidth=1, label="$1/N$")
    left.set(xscale="log", yscale="log", xlabel="trajectories $N$", ylabel="Var[g]", title="variance of the mean")
    left.legend()
    curves = {**read_curves(CURVES), "1000": variance_curves("simple REINFORCE")["simple REINFORCE"]}
    draw_curves(right, {name: curves[name] for name in sorted(curves, key=int)})
    right.set_title("simple REINFORCE: learning")
    right.legend(title="transitions per update", loc="upper left")
    right.get_legend().get_title().set_color(INK)
    save(figure, NAME)
