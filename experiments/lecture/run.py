"""Measurements behind the figures of docs/lecture: `make study NAME=lecture`.

Each part of `PARTS` is a module beside this file with a function `measure`, which writes `<part>.csv`, and a function
`draw`, which writes `<part>.png` from it. `ARGS="kl sac"` runs these parts only, and `ARGS=draw` draws all figures
from the stored tables.
"""
# needs the extra: box2d

import importlib

from experiments.study import read_words

from levin.core.errors import exit_on_user_error
from levin.core.process import silence_libraries

# In the order of the pages.
PARTS: tuple[str, ...] = (
    *("trajectory", "expected_return", "score_function", "simple_reinforce", "credit_assignment"),
    *("gradient_variance", "constant_baseline", "value_targets", "reinforce_with_baseline"),
    *("q_critic", "max_q", "advantage", "online", "parallel", "staleness", "kl", "trpo_steps", "ppo_ratios"),
    *("gradient_estimation", "pathwise", "reparameterisation", "gumbel_softmax", "storchastic"),
    *("sac", "world_models", "dreaming", "world_models_vmc", "dreamer"),
)


def main() -> None:
    """Measure and draw the parts that are named, or all."""
    words = read_words("draw", *PARTS)
    with exit_on_user_error():
        silence_libraries()
        for name in [word for word in words if word != "draw"] or PARTS:
            part = importlib.import_module(f"experiments.lecture.{name}")
            if "draw" not in words:
                print(f"measuring {name}", flush=True)
                part.measure()
            part.draw()


if __name__ == "__main__":
    main()
