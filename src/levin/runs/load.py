"""Load the config, the algorithm or the trained weights of a run."""

import sys
from pathlib import Path

import yaml
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from levin.algorithms.base import Algorithm
from levin.core import files
from levin.core.errors import ConfigError
from levin.core.paths import ROOT
from levin.runs import checkpoint

POLICY = "policy.ckpt"  # of a result in experiments/: the policy alone


def load_config(run: Path) -> DictConfig:
    """The config that a run was made from.

    Raises:
        ConfigError: The folder has none, or it is damaged.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run={run} is no run folder: it has no config.yaml")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not config or not isinstance(config, DictConfig):
        raise ConfigError(f"{path} is damaged: it holds no keys")
    return config


def algorithm_class(config: DictConfig) -> type[Algorithm]:
    """The class that `algo._target_` names.

    Raises:
        ConfigError: It names no algorithm.
    """
    target = config.algo.get("_target_")
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # a fork is experiments.<name>.algorithm, from whatever folder it is called
    try:
        found = get_class(target)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"algo._target_={target} can't be imported: {' '.join(str(error).split())}") from error
    if not issubclass(found, Algorithm):
        raise ConfigError(f"algo._target_={target} is no levin.algorithms.base.Algorithm")
    return found


def load_algorithm(run: Path) -> Algorithm:
    """The algorithm of a run, with its newest weights, statistics and counters; on the CPU, without its buffer.

    Of a result in experiments/, only what its policy needs has been kept: the rest is as it was initialised.
    """
    if (run / POLICY).is_file():
        saved = files.load(run / POLICY)
        algorithm = _class_of(run)(**saved["hyper_parameters"])
        algorithm.policy(deterministic=True).load_state_dict(saved["policy"])
        algorithm.env_steps = saved["env_steps"]
        return algorithm
    path = checkpoint.newest_checkpoint(run)
    return _class_of(path.resolve().parents[2]).load_from_checkpoint(path, map_location="cpu", weights_only=True)


def export_policy(run: Path, path: Path) -> None:
    """Write the newest policy of a run, and nothing else of its algorithm, to a file that `load_algorithm` reads."""
    algorithm = load_algorithm(run)
    policy = algorithm.policy(deterministic=True).state_dict()
    files.save({"hyper_parameters": dict(algorithm.hparams), "env_steps": algorithm.env_steps, "policy": policy}, path)


def _class_of(run: Path) -> type[Algorithm]:
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run={run} has no config.yaml beside its checkpoints folder")
    return algorithm_class(load_config(run))
