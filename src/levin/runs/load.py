"""Load the config, the algorithm or the trained weights of a run."""

import inspect
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from levin.core import files, paths
from levin.core.errors import CheckpointError, ConfigError, one_line
from levin.core.omega import to_plain
from levin.core.validate import as_count, check_section
from levin.runs import checkpoint, trust

if TYPE_CHECKING:
    from levin.algorithms.base import Algorithm

POLICY = "policy.ckpt"  # the policy alone, which a result in experiments/ has instead of checkpoints


def load_config(run: Path, *, code_sections: tuple[str, ...] = trust.SECTIONS) -> DictConfig:
    """Load the config of a run from its `config.yaml`.

    Args:
        run: Run folder.
        code_sections: Sections of `levin.runs.trust.SECTIONS` whose code the caller is about to run; `()` if it only
            reads values.

    Raises:
        ConfigError: The file is missing or damaged, refers to other values or to environment variables, or names code
            that was not accepted (`levin.runs.trust`).
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run={run} is not a run folder: it has no config.yaml")
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ConfigError(f"{path} is damaged: the config of a run holds no YAML aliases")  # few bytes, huge values
        config = OmegaConf.create(text)
        if not config or not isinstance(config, DictConfig):
            raise ConfigError(f"{path} is damaged: it holds no keys")
        if reference := re.search(r"\$\{[^\n]*", OmegaConf.to_yaml(config)):  # could name environment variables
            raise ConfigError(f"{path} holds the reference {reference[0]}; the config of a run holds plain values only")
        for key in trust.SECTIONS:
            if not isinstance(config.get(key, OmegaConf.create() if key == "callbacks" else None), DictConfig):
                raise ConfigError(f"{path} is damaged: it has no section {key}")
    except ConfigError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {one_line(error)}") from error
    trust.check(config, code_sections, path)
    world_model = str(config.env.get("run") or "")
    if world_model and not os.path.exists(world_model):  # the runs were moved, or the command is typed elsewhere
        moved = (folder / world_model for folder in run.absolute().parents)
        config.env.run = next((str(found) for found in moved if os.path.exists(found)), world_model)
    return config


def algorithm_class(config: DictConfig) -> "type[Algorithm]":
    """Import the algorithm class that `algo._target_` names.

    Raises:
        ConfigError: It can't be imported, or is not an `Algorithm`.
    """
    from hydra.utils import get_class

    from levin.algorithms.base import Algorithm  # late: commands that read only configs need not wait for Lightning

    target = config.algo.get("_target_")
    paths.make_forks_importable()
    try:
        algorithm = get_class(target)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"algo._target_={target} can't be imported: {one_line(error)}") from error
    if not issubclass(algorithm, Algorithm):
        raise ConfigError(f"algo._target_={target} is not a subclass of levin.algorithms.base.Algorithm")
    return algorithm


def check_has_policy(run: str) -> None:
    """Raise a ConfigError if there is no policy to load; cheaper than `load_algorithm`, which imports Lightning."""
    if not run:
        raise ConfigError("run is missing: set run=<run folder> (with make: RUN=<run folder>, or EXP=<result>)")
    folder = Path(run)
    if not (folder / POLICY).is_file() and not checkpoint.list_checkpoints(folder / "checkpoints"):
        checkpoint.newest_checkpoint(folder)


def load_algorithm(run: Path) -> "Algorithm":
    """Load the algorithm of a run on the CPU, with its newest weights, statistics and counters but without its buffer.

    A result in experiments/ has stored only its policy and its env steps: everything else keeps its initial values.

    Raises:
        ConfigError: There is no checkpoint, it is damaged, or the config names code that was not accepted.
    """
    if (run / POLICY).is_file():
        path, config = run / POLICY, load_config(run, code_sections=("algo",))
    else:
        path = checkpoint.newest_checkpoint(run)
        config = load_config(checkpoint.run_of(path), code_sections=("algo",))
    kind = algorithm_class(config)
    saved = files.load(path)
    try:
        taken = inspect.signature(kind).parameters  # an older checkpoint may have others, which are left out
        values = {name: value for name, value in saved["hyper_parameters"].items() if name in taken}
        check_section(kind, "hyper_parameters.", values)
        for name, value in values.items():  # the config was checked (`levin.runs.trust`), the checkpoint was not
            if isinstance(value, dict) and "_target_" in value and value != to_plain(config.algo).get(name):
                raise ValueError(f"it names other code in hyper_parameters.{name} than config.yaml does")
        if "compile" in values:
            values["compile"] = False  # it needs a compiler, and only updates are compiled
        algorithm = kind(**values)
        if path.name == POLICY:
            algorithm.env_steps = as_count("env_steps", saved["env_steps"])
            algorithm.policy(deterministic=True).load_state_dict(saved["policy"])
        else:
            algorithm.on_load_checkpoint(saved)
            algorithm.load_state_dict(saved["state_dict"])
            if extra := saved.get("extra"):
                _restore_attributes(algorithm, extra)
    except Exception as error:  # values of the wrong type or size raise errors of many types
        raise CheckpointError(
            f"{path} does not fit {kind.__name__}: {type(error).__name__}: {one_line(error)}"
        ) from error
    return algorithm


def _restore_attributes(algorithm: "Algorithm", extra: dict[str, Any]) -> None:
    """Restore the attributes of a user's algorithm. Print a line if some exist only in a training run."""
    from levin.runs.extra_state import ExtraState

    try:
        ExtraState(algorithm).restore(extra)
    except CheckpointError as error:
        print(f"levin: {error}; a policy must not depend on them", file=sys.stderr)


def export_policy(run: Path, folder: Path) -> None:
    """Write the newest policy of a run, without the rest of its algorithm, to a file that `load_algorithm` reads."""
    algorithm = load_algorithm(run)
    policy = algorithm.policy(deterministic=True).state_dict()
    saved = {"hyper_parameters": dict(algorithm.hparams), "env_steps": algorithm.env_steps, "policy": policy}
    with files.replace(folder, POLICY) as path:
        files.save(saved, path)
