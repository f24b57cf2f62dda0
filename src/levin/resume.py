"""Continue a run from its newest checkpoint. `python -m levin.resume run=... [total_env_steps=...]`."""

from pathlib import Path

from omegaconf import OmegaConf

from levin import checkpoint, config, schema
from levin.errors import ConfigError, one_sentence
from levin.hints import PositiveInt


def resume(*, run: str, total_env_steps: PositiveInt | None = None) -> float | None:
    """Train on, with the config that the run was made from.

    Args:
        run: The run folder.
        total_env_steps: A new total; null keeps the old one.

    Raises:
        ConfigError: There is no checkpoint, or it is beyond the new total.
    """
    from levin.train import train

    path = checkpoint.newest(Path(run)).resolve()
    cfg = config.load(Path(run))
    env_steps = checkpoint.env_steps(path)
    total = cfg.total_env_steps if total_env_steps is None else total_env_steps
    if env_steps >= total:
        sentence = f"run={run} has {env_steps} env steps already; to go on, say a larger total_env_steps"
        if total_env_steps is not None:
            raise ConfigError(sentence)
        print(sentence)  # a job that resumes until it is done must see no failure
        return None
    if total != cfg.total_env_steps:
        print(f"total_env_steps: {cfg.total_env_steps} -> {total}")
        cfg.total_env_steps = total
    schema.check(cfg)
    OmegaConf.set_readonly(cfg, True)
    return train(cfg, Path(run), ckpt_path=path)


def main() -> None:
    """Continue the run that the command line names."""
    with one_sentence():
        resume(**config.arguments(resume))


if __name__ == "__main__":
    main()
