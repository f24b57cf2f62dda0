"""Load the config, the algorithm or the trained weights of a run."""

import re
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

POLICY = "policy.ckpt"  # the policy alone, which a result in experiments/ has instead of checkpoints


def load_config(run: Path) -> DictConfig:
    """Load the config of a run from its `config.yaml`.

    Raises:
        ConfigError: The file is missing or damaged, or refers to other values or to environment variables.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run={run} is not a run folder: it has no config.yaml")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not config or not isinstance(config, DictConfig):
        raise ConfigError(f"{path} is damaged: it holds no keys")
    if reference := re.search(r"\$\{[^\n]*", OmegaConf.to_yaml(config)):  # could name environment variables
        raise ConfigError(f"{path} holds the reference {reference[0]}; the config of a run holds plain values only")
    return config


def algorithm_class(config: DictConfig) -> type[Algorithm]:
    """Import the algorithm class that `algo._target_` names.

    Raises:
        ConfigError: It can't be imported, or is not an `Algorithm`.
    """
    target = config.algo.get("_target_")
    if str(ROOT) not in sys.path:
        # A forked algorithm is experiments.<name>.algorithm, importable from any working directory.
        sys.path.append(str(ROOT))
    try:
        algorithm = get_class(target)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"algo._target_={target} can't be imported: {' '.join(str(error).split())}") from error
    if not issubclass(algorithm, Algorithm):
        raise ConfigError(f"algo._target_={target} is not a subclass of levin.algorithms.base.Algorithm")
    return algorithm


def load_algorithm(run: Path) -> Algorithm:
    """Load the algorithm of a run on the CPU, with its newest weights, statistics and counters but without its buffer.

    A result in experiments/ has stored only its policy and its env steps: everything else keeps its initial values.
    """
    if (run / POLICY).is_file():
        saved = files.load(run / POLICY)
        algorithm = _class_of_run(run)(**saved["hyper_parameters"])
        algorithm.policy(deterministic=True).load_state_dict(saved["policy"])
        algorithm.env_steps = saved["env_steps"]
        return algorithm
    path = checkpoint.newest_checkpoint(run)
    return _class_of_run(path.resolve().parents[2]).load_from_checkpoint(path, map_location="cpu", weights_only=True)


def export_policy(run: Path, path: Path) -> None:
    """Write the newest policy of a run, without the rest of its algorithm, to a file that `load_algorithm` reads."""
    algorithm = load_algorithm(run)
    policy = algorithm.policy(deterministic=True).state_dict()
    files.save({"hyper_parameters": dict(algorithm.hparams), "env_steps": algorithm.env_steps, "policy": policy}, path)


def _class_of_run(run: Path) -> type[Algorithm]:
    """Return the algorithm class that a run folder's config names."""
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run={run} has no config.yaml next to its checkpoints folder")
    return algorithm_class(load_config(run))
