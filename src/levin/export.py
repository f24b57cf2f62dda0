"""Write the policy of a run as a file that needs no Levin: `python -m levin.export run=... format=onnx`."""

from pathlib import Path

from levin.config import cli
from levin.core.errors import exit_on_user_error
from levin.core.process import share_cores, silence_libraries
from levin.core.types import NonNegativeInt, PolicyFormat, PositiveInt
from levin.runs.load import check_has_policy
from levin.runs.trust import trusted


def export_run(
    *,
    run: str,
    format: PolicyFormat = "onnx",  # noqa: A002
    seed: NonNegativeInt = 1,
    steps: PositiveInt = 1000,
    out: str | None = None,
    trust: bool = False,
) -> Path:
    """Write the deterministic policy of a run as `policy.onnx` or `policy.pt2`, with a card `policy.md` beside it.

    The file needs neither Levin nor the run. It is checked over an episode: its actions must be those of `levin.load`.

    Args:
        run: Run folder; or one of its checkpoints, such as `checkpoints/best`.
        format: `onnx` for onnxruntime, which needs no torch; `torch` for `torch.export.load`, which needs no Levin.
        seed: Seed of the env of the check.
        steps: Maximum number of steps of the check.
        out: Folder of the files; None: the run folder, and for a result in experiments/ `runs/results/<name>/`.
        trust: Whether to run code from outside this checkout that the run's config names (`levin.runs.trust`).

    Returns:
        The path of the policy.

    Raises:
        ConfigError: A package is missing, or the policy can't be exported.
        RunError: The actions differ.
    """
    check_has_policy(run)
    # Late: a command that is mistyped is refused before torch is imported.
    from levin.deploy.package import TOLERANCE, package

    silence_libraries()
    with trusted(trust):
        path, checked = package(Path(run), format, seed=seed, steps=steps, out=out)
    own = checked["own_memory_difference"]
    print(
        f"{path}: {path.stat().st_size / 1000:,.0f} kB, {checked['microseconds']:.0f} us per action (levin.load: "
        f"{checked['reference_microseconds']:.0f}), largest difference {checked['largest_difference']:.1g} in "
        f"{checked['steps']:,.0f} steps" + (f", {own:.1g} with its own memory" if own > TOLERANCE else "")
    )
    return path


def main() -> None:
    """Write the policy of the run that the command line names."""
    with exit_on_user_error():
        share_cores()
        export_run(**cli.command_arguments(export_run))


if __name__ == "__main__":
    main()
