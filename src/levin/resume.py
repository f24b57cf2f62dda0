"""Continue a run from its newest checkpoint. `python -m levin.resume run=... [total_env_steps=...]`."""

from pathlib import Path

from omegaconf import OmegaConf

from levin import checkpoint, config
from levin.errors import one_sentence
from levin.hints import PositiveInt


def resume(*, run: str, total_env_steps: PositiveInt | None = None) -> float | None:
    """Train on, with the config that the run was made from.

    Args:
        run: The run folder.
        total_env_steps: A new total; null keeps the old one.
    """
    from levin.train import train

    path = checkpoint.newest(Path(run))
    cfg = config.load(Path(run))
    if total_env_steps is not None and total_env_steps != cfg.total_env_steps:
        print(f"total_env_steps: {cfg.total_env_steps} -> {total_env_steps}")
        cfg.total_env_steps = total_env_steps
    config.check(cfg)
    OmegaConf.set_readonly(cfg, True)
    return train(cfg, Path(run), ckpt_path=path.resolve())


def main() -> None:
    """Continue the run that the command line names."""
    with one_sentence():
        resume(**config.arguments(resume))


if __name__ == "__main__":
    main()
