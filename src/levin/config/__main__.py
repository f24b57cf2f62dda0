"""Print every value of a composed config and the file that sets it: `python -m levin.config algo=sac`."""

import sys
from pathlib import Path

import yaml
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import OmegaConf

from levin.config.cli import parse_hydra_overrides, refuse_repeated
from levin.config.compose import (
    GROUPS,
    SEARCH_PATH,
    add_pluses,
    compose,
    refuse_several_values,
    take_paths,
    with_search_path,
)
from levin.core.errors import exit_on_user_error
from levin.core.omega import flat_keys, to_plain
from levin.core.paths import CONFIGS, EXPERIMENTS, ROOT, fork_files
from levin.core.process import silence_libraries


def value_origins(overrides: list[str]) -> dict[str, str]:
    """Return the origin of each config value: dotted key -> YAML file or "command line"."""
    overrides, typed = take_paths(with_search_path(add_pluses(overrides)))
    parsed = parse_hydra_overrides(overrides)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        from hydra.core.global_hydra import GlobalHydra

        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        files = loader.compute_defaults_list("train", overrides, RunMode.RUN).defaults
    origin = {}
    for file in files:
        candidates = [folder / f"{file.config_path}.yaml" for folder in (CONFIGS, *EXPERIMENTS.glob("*"))]
        for path in filter(Path.exists, candidates):
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            values.pop("defaults", None)
            prefix = f"{file.package}." if file.package and file.package != "_global_" else ""
            origin |= dict.fromkeys(flat_keys(values, prefix), str(path.relative_to(ROOT)))
    for override in parsed:
        if override.key_or_group not in (*GROUPS, SEARCH_PATH):
            origin = {key: file for key, file in origin.items() if not key.startswith(f"{override.key_or_group}.")}
            origin[override.key_or_group] = "command line"
    origin |= dict.fromkeys(typed, "command line")
    if origin.get("name") != "command line":
        origin["name"] = "configs/algo, configs/env"
    return origin


def origin_of(key: str, origins: dict[str, str]) -> str:
    """Return the origin of a key or, if it is part of a section given as a whole, of this section."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins[key] if key else "default of __init__"


def main() -> None:
    """Print `key: value  # file` for every value of the composed config."""
    silence_libraries()
    with exit_on_user_error():
        overrides = sys.argv[1:]
        refuse_repeated(overrides)
        # The values in configs/ are checked by the tests. Checking others takes seconds, for it imports Lightning.
        chosen = parse_hydra_overrides(take_paths(overrides)[0])
        refuse_several_values(chosen)
        forks = {file.stem for file in fork_files()}
        check = any(each.key_or_group not in GROUPS or each.value() in forks for each in chosen)
        config, origins = compose(overrides, check_values=check), value_origins(overrides)
        rows = [(key, OmegaConf.select(config, key)) for key in flat_keys(to_plain(config))]
        lines = [(f"{key}: {'null' if value is None else value}", origin_of(key, origins)) for key, value in rows]
        width = max(len(line) for line, _ in lines)
        for line, source in lines:
            print(f"{line:<{width}}  # {source}")


if __name__ == "__main__":
    main()
