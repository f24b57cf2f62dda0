"""What a config may hold: every value is checked against the hints of the code that takes it."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_type_hints

import pydantic
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf

from levin.core.errors import ConfigError, valid_names
from levin.core.omega import to_plain
from levin.core.types import NonNegativeInt, PositiveInt
from levin.envs.config import EnvConfig
from levin.runs.load import algorithm_class
from levin.training.checkpointing import Checkpointing
from levin.training.distributed import sharding
from levin.training.evaluation import Evaluation

# Lightning's arguments that would act on the wrong clock, or not at all under manual optimisation.
OWN_TRAINER_KEYS = {
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


def check(config: DictConfig) -> None:
    """Hold every value against the hints of the code that takes it; a whole float where an int belongs becomes one.

    Raises:
        ConfigError: Unknown or missing key, wrong type, out of range.
    """
    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{key} has no value: give one by {key}=...")
    for key in ("env", "algo", "eval", "checkpoint", "trainer", "callbacks"):
        if not isinstance(config.get(key), DictConfig):
            raise ConfigError(f"{key} is a section, not a value; say {key}.<key>=...")
    for key, callback in config.callbacks.items():
        if not isinstance(callback, DictConfig) or "_target_" not in callback:
            raise ConfigError(f"callbacks.{key} is a section with a _target_: {{_target_: my_module.MyCallback}}")
    check_section(top_level, "", config, skip=("env", "algo", "eval", "checkpoint", "trainer", "callbacks"))
    check_section(EnvConfig, "env.", config.env)
    check_section(algorithm_class(config), "algo.", config.algo, skip=("_target_",), given=("env",))
    check_section(Evaluation, "eval.", config.eval, given=("env", "metrics", "budget", "run"))
    check_section(Checkpointing, "checkpoint.", config.checkpoint, given=("run", "evaluation"))
    for name, ours in OWN_TRAINER_KEYS.items():
        if name in config.trainer:
            raise ConfigError(f"trainer.{name} does not act here; say {ours} instead")
    check_section(trainer_options, "trainer.", config.trainer, ignore_unknown=True)
    _check_trainer_keys(config.trainer)
    _check_workers(config)


def top_level(
    *,
    name: str,
    seed: NonNegativeInt,
    total_env_steps: PositiveInt,
    run: str | None,
    collector: Literal["vector", "torchrl", "torchrl-process", "torchrl-async", "ray"],
    collector_workers: PositiveInt = 2,  # runs that were begun before it came have none
    logger: Literal["csv", "tensorboard", "wandb"] | None,
    log_every: PositiveInt,
    wandb_project: str,
    upload: bool,
) -> None:
    """What the plain keys of train.yaml may hold."""


def trainer_options(
    *,
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"],
    devices: PositiveInt,
    strategy: Literal["auto", "ddp", "hogwild"],
    workers: PositiveInt = 1,
    # Half "true" precisions cast the batch and lose its shape; 16-mixed needs a gradient scaler per optimiser.
    precision: Literal["32-true", "bf16-mixed"],
    threads: PositiveInt | None,
) -> None:
    """What the `trainer` keys that we read ourselves may hold."""


def _check_trainer_keys(trainer: DictConfig) -> None:
    valid = {"threads", "workers", *inspect.signature(Trainer.__init__).parameters} - {"self", *OWN_TRAINER_KEYS}
    for key in map(str, trainer):
        if key not in valid:
            raise ConfigError(f"trainer.{key} is unknown; {valid_names(key, valid)}")


def _check_workers(config: DictConfig) -> None:
    trainer, workers = config.trainer, config.trainer.get("workers", 1)
    if trainer.strategy != "hogwild":
        if workers > 1:
            raise ConfigError(f"trainer.workers={workers} are processes of trainer.strategy=hogwild")
        if sharding.configured_world_size(config) > 1 and algorithm_class(config).lock_free:
            raise ConfigError(
                f"the workers of {algorithm_class(config).__name__} share their parameters, not their gradients: "
                f"trainer.strategy=hogwild trainer.workers={trainer.devices}"
            )
        sharding.shard_config(config)  # refuses what can't be divided
        return
    if trainer.devices > 1:
        raise ConfigError("trainer.strategy=hogwild has workers, not devices: trainer.devices=1")
    if trainer.accelerator not in ("auto", "cpu"):
        raise ConfigError(f"trainer.strategy=hogwild shares the memory of the CPU, not of {trainer.accelerator}")
    if config.collector not in ("vector", "torchrl"):
        raise ConfigError(f"trainer.strategy=hogwild has workers of its own, without collector={config.collector}")
    if workers > 1:
        name = algorithm_class(config).__name__
        if not algorithm_class(config).lock_free:
            raise ConfigError(
                f"{name} keeps what workers can't share without a lock: trainer.strategy=hogwild is for A3C"
            )
        if trainer.threads != 1:
            raise ConfigError("threads do not survive the fork of trainer.strategy=hogwild: trainer.threads=1")
        if config.env.normalize_observation or config.env.normalize_reward:
            raise ConfigError("running statistics can't be shared without a lock: env.normalize_*=false, or one worker")


def check_section(
    target: Callable[..., Any],
    prefix: str,
    section: DictConfig | dict[str, Any],
    *,
    skip: tuple[str, ...] = (),
    given: tuple[str, ...] = (),
    ignore_unknown: bool = False,
) -> None:
    """Check a section against the signature that will take it. `given` arguments are not the config's to say."""
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    parameters = inspect.signature(target).parameters
    content = to_plain(section) if isinstance(section, DictConfig) else section
    values = {str(key): value for key, value in content.items() if key not in skip}
    valid = [name for name in parameters if name not in given]
    for name, value in values.items():
        if name in valid:
            whole = _validate(f"{prefix}{name}", hints[name], value)
            if whole is not value:
                section[name] = whole
        elif not ignore_unknown:
            raise ConfigError(f"{prefix}{name} is unknown; {valid_names(name, valid)}")
    for name in valid:
        if name not in values and parameters[name].default is inspect.Parameter.empty:
            raise ConfigError(f"{prefix}{name} is missing")


def _validate(key: str, hint: Any, value: Any) -> Any:
    adapter = pydantic.TypeAdapter(hint)
    try:
        valid = adapter.validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        if isinstance(value, float) and value.is_integer():  # 1e5 env steps
            return _validate(key, hint, int(value))
        first = error.errors()[0]
        raise ConfigError(f"{key}={value}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    return valid if isinstance(valid, float) else value  # 1, where 1.0 is meant
