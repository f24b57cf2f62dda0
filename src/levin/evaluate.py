"""Evaluate the deterministic policy of a run in new envs: `python -m levin.evaluate run=...`."""

from pathlib import Path
from typing import Any

from levin.config import cli
from levin.core import files, paths
from levin.core.errors import RunError, exit_on_user_error
from levin.core.process import share_cores, silence_libraries
from levin.core.types import NonNegativeInt, PositiveInt
from levin.envs.config import EVALUATION
from levin.runs import checkpoint
from levin.runs import folder as run_folder
from levin.runs.load import check_has_policy, load_algorithm
from levin.runs.trust import trusted


def evaluate_run(
    *,
    run: str,
    episodes: PositiveInt = 100,
    seed: NonNegativeInt = 1,
    out: str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, and print and write the result.

    Args:
        run: Run folder; or one of its checkpoints, such as `checkpoints/best`.
        episodes: Number of episodes.
        seed: Root of the envs' seeds; with another value than `eval.seed`, the episodes are not those that were
            evaluated during training.
        out: Path of the result; None: `evaluation.json` in the run folder, and of a result in
            experiments/ in `runs/results/<name>/`.
        trust: Whether to run code from outside this checkout that the run's config names (`levin.runs.trust`).

    Returns:
        The contents of the file.

    Raises:
        ConfigError: There is no undamaged checkpoint, or the config names code that was not accepted.
        RunError: An env failed, an episode does not end, or the result can't be written.
    """
    check_has_policy(run)
    import numpy as np  # late: a command that is mistyped is refused before torch is imported

    from levin.collectors.episodes import evaluate, mean_numbers
    from levin.envs.factory import load_env, make_env

    silence_libraries()
    folder = checkpoint.run_of(Path(run))
    with trusted(trust):
        algorithm = load_algorithm(Path(run)).eval()
        env = make_env(load_env(folder), seed=seed, purpose=EVALUATION, num_envs=min(episodes, 10))
        run_folder.report_changed_code(folder)
        returns, _ = evaluate(algorithm.policy(deterministic=True), env, episodes)
        numbers = mean_numbers(env.ended)
        env.close()
    result = {
        **numbers,
        "return_mean": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "episodes": episodes,
        "env_steps": algorithm.env_steps,
        "seed": seed,
    }
    print(
        f"{result['return_mean']:.1f} +- {result['return_std']:.1f} "
        f"(mean and standard deviation of the return over {episodes} episodes)",
        *(f"{name} {value:.3f}" for name, value in numbers.items()),
        sep=", ",
        flush=True,
    )
    path = paths.output_folder(folder) / "evaluation.json" if out is None else Path(out)
    try:
        files.save_json(result, path.parent, path.name)
    except OSError as error:
        advice = 'set out=<another path> (with make: ARGS="out=<another path>")'
        raise RunError(f"{path} can't be written: {error.strerror}; {advice}") from error
    return result


def main() -> None:
    """Evaluate the run that the command line names."""
    with exit_on_user_error():
        share_cores()
        evaluate_run(**cli.command_arguments(evaluate_run))


if __name__ == "__main__":
    main()
