"""Check every value of a config against the type hints of the code that takes it."""

import inspect
from typing import Literal

from omegaconf import DictConfig, OmegaConf

from levin.core.errors import ConfigError, valid_names
from levin.core.types import NonNegativeInt, PositiveInt
from levin.core.validate import check_section
from levin.envs.config import EnvConfig
from levin.runs.load import algorithm_class

# Trainer arguments that would count Lightning's steps instead of env steps, or that have no effect under manual
# optimisation -> config key to use instead.
REPLACED_TRAINER_KEYS = {
    "max_epochs": "total_env_steps",
    "min_epochs": "total_env_steps",
    "max_steps": "total_env_steps",
    "min_steps": "total_env_steps",
    "limit_train_batches": "total_env_steps",
    "callbacks": "callbacks",
    "logger": "logger",
    "log_every_n_steps": "log_every",
    "enable_checkpointing": "checkpoint.every",
    "val_check_interval": "eval.every",
    "limit_val_batches": "eval.episodes",
    "check_val_every_n_epoch": "eval.every",
    "accumulate_grad_batches": "algo.batch_size",
    "gradient_clip_val": "the algorithm's own max_grad_norm",
    "gradient_clip_algorithm": "the algorithm's own max_grad_norm",
    "default_root_dir": "run",
    "fast_dev_run": "debug=smoke",
    "barebones": "debug=profile",
    "plugins": "checkpoint.every",
    "overfit_batches": "debug=overfit",
    "use_distributed_sampler": "trainer.devices",
}

PLAIN_TYPES = (type(None), bool, int, float, str, tuple, list, dict)  # of the values in a config
SECTIONS = ("env", "algo", "eval", "checkpoint", "trainer", "callbacks")


def check(config: DictConfig) -> None:
    """Check every value against the type hints of the code that takes it; convert whole floats such as 1e5 to int.

    Raises:
        ConfigError: A key is unknown or missing, or a value has the wrong type or is out of range.
    """
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{key} has no value: set {key}=...")
    for key in SECTIONS:
        if not isinstance(config.get(key), DictConfig):
            raise ConfigError(f"{key} is a section, not a value: set {key}.<key>=...")
    for key, callback in config.callbacks.items():
        if not isinstance(callback, DictConfig) or "_target_" not in callback:
            raise ConfigError(f"callbacks.{key} must be a section with a _target_: {{_target_: my_module.MyCallback}}")
    check_section(top_level, "", config, skip=SECTIONS)
    # Late, because torch and Lightning take seconds to import: a command that is mistyped is refused before.
    from levin.training.checkpointing import Checkpointing
    from levin.training.evaluation import Evaluation

    check_section(EnvConfig, "env.", config.env)
    check_section(algorithm_class(config), "algo.", config.algo, skip=("_target_",), given=("env",))
    check_section(Evaluation, "eval.", config.eval, given=("env", "metrics", "budget", "run", "stop"))
    check_section(Checkpointing, "checkpoint.", config.checkpoint, given=("run", "evaluation"))
    for name, replacement in REPLACED_TRAINER_KEYS.items():
        if name in config.trainer:
            raise ConfigError(f"trainer.{name} has no effect here; use {replacement} instead")
    check_section(trainer_options, "trainer.", config.trainer, ignore_unknown=True)
    _check_trainer_keys(config.trainer)
    _check_workers(config)


def add_defaults(config: DictConfig) -> None:
    """Add hyper-parameters that the config does not list, such as a new one of a fork, with their default values.

    Then config.yaml has every value of a run.

    Raises:
        ConfigError: A default value can't be written into config.yaml, or is not valid when it is read from there.
    """
    for name, parameter in inspect.signature(algorithm_class(config)).parameters.items():
        default = parameter.default
        if name not in config.algo and default is not inspect.Parameter.empty:
            if type(default) not in PLAIN_TYPES:
                raise ConfigError(
                    f"algo.{name} has the default {default!r}, which config.yaml can't hold: use a number, a text, a "
                    "list or None; instead of an Enum, a text with the type hint Literal[...]"
                )
            config.algo[name] = list(default) if isinstance(default, tuple) else default
    check_section(algorithm_class(config), "algo.", config.algo, skip=("_target_",), given=("env",))


def top_level(
    *,
    name: str,
    note: str | None = None,  # default for configs of runs older than this key
    seed: NonNegativeInt,
    total_env_steps: PositiveInt,
    run: str | None,
    collector: Literal["vector", "batched", "torchrl", "torchrl-process", "torchrl-async", "ray"],
    collector_workers: PositiveInt = 2,  # default for configs of runs older than this key
    logger: Literal["csv", "tensorboard", "wandb"] | None,
    log_every: PositiveInt,
    wandb_project: str,
    upload: bool,
) -> None:
    """Declare the types of the top-level keys of train.yaml; never called."""


def trainer_options(
    *,
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"],
    devices: PositiveInt,
    strategy: Literal["auto", "ddp", "hogwild"],
    workers: PositiveInt = 1,
    num_nodes: PositiveInt = 1,
    # No bf16-true or 16-true: they cast the batch, which loses its shape. No 16-mixed: it needs a gradient scaler per
    # optimiser.
    precision: Literal["32-true", "bf16-mixed"],
    threads: PositiveInt | None,
) -> None:
    """Declare the types of the `trainer` keys that Levin itself reads; never called."""


def _check_trainer_keys(trainer: DictConfig) -> None:
    from lightning import Trainer

    valid = {"threads", "workers", *inspect.signature(Trainer.__init__).parameters} - {"self", *REPLACED_TRAINER_KEYS}
    for key in map(str, trainer):
        if key not in valid:
            names = [f"trainer.{name}" for name in valid]
            raise ConfigError(f"trainer.{key} is unknown; {valid_names(f'trainer.{key}', names)}")


def _check_workers(config: DictConfig) -> None:
    from levin.training.distributed import sharding

    trainer, workers = config.trainer, config.trainer.get("workers", 1)
    if trainer.strategy != "hogwild":
        if workers > 1:
            raise ConfigError(f"trainer.workers={workers} needs trainer.strategy=hogwild")
        if sharding.configured_world_size(config) > 1 and algorithm_class(config).lock_free:
            raise ConfigError(
                f"{algorithm_class(config).__name__} trains with Hogwild workers, not with data-parallel ranks: "
                f"set trainer.strategy=hogwild trainer.workers={trainer.devices} trainer.devices=1"
            )
        sharding.shard_config(config)  # raises an error if a value can't be divided
        return
    for key in ("devices", "num_nodes"):
        if trainer.get(key, 1) > 1:
            raise ConfigError(
                f"trainer.strategy=hogwild has workers, not trainer.{key}={trainer[key]}: set trainer.{key}=1"
            )
    if trainer.accelerator not in ("auto", "cpu"):
        raise ConfigError(
            f"trainer.strategy=hogwild runs on the CPU: set trainer.accelerator=cpu instead of {trainer.accelerator}"
        )
    if config.collector not in ("vector", "torchrl"):
        raise ConfigError(
            f"collector={config.collector} is not for trainer.strategy=hogwild, which has its own workers; "
            "valid: torchrl, vector"
        )
    if workers > 1:
        name = algorithm_class(config).__name__
        if not algorithm_class(config).lock_free:
            raise ConfigError(
                f"trainer.strategy=hogwild with several workers is for A3C: {name} can't be trained without a lock"
            )
        if trainer.threads != 1:
            raise ConfigError(
                "trainer.strategy=hogwild forks its workers, and threads do not survive a fork: set trainer.threads=1"
            )
        if config.env.normalize_observation or config.env.normalize_reward:
            raise ConfigError(
                "running statistics can't be shared without a lock: set env.normalize_observation=false and "
                "env.normalize_reward=false, or use one worker"
            )
