"""Print every value of a composed config, the file that sets it, and its meaning: `python -m levin.config algo=sac`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import OmegaConf

from levin.config.cli import check_arguments, parse_hydra_overrides
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


def value_origins(overrides: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the origin and the meaning of config values, by dotted key.

    The origin is a YAML file or "command line". The meaning is the comment behind the value in that file or, if there
    is none, in the algorithm's file or train.yaml: a comment in other files may be about their value.
    """
    overrides, typed = take_paths(with_search_path(add_pluses(overrides)))
    origin: dict[str, str] = {}
    comments: dict[str, dict[str, str]] = {}  # file -> comment of each key
    for path, prefix in _composed_files(overrides):
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text) or {}
        values.pop("defaults", None)
        file = str(path.relative_to(ROOT))
        origin |= dict.fromkeys(flat_keys(values, prefix), file)
        comments[file] = _comments(yaml.compose(text), text.splitlines(), prefix)
    for override in parse_hydra_overrides(overrides):
        if override.key_or_group not in (*GROUPS, SEARCH_PATH):
            origin = {key: file for key, file in origin.items() if not key.startswith(f"{override.key_or_group}.")}
            origin[override.key_or_group] = "command line"
    origin |= dict.fromkeys(typed, "command line")
    if origin.get("name") != "command line":
        origin["name"] = "configs/algo, configs/env"
    meaning: dict[str, str] = {}
    for file, lines in comments.items():
        general = Path(file).name == "train.yaml" or Path(file).parent.name == "algo"
        meaning |= {key: line for key, line in lines.items() if general or origin.get(key) == file}
    return origin, meaning


def _composed_files(overrides: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield the YAML files that Hydra composes, in their order, and the prefix of their keys: "" or such as "algo."."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        from hydra.core.global_hydra import GlobalHydra

        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        files = loader.compute_defaults_list("train", overrides, RunMode.RUN).defaults
    for file in files:
        prefix = f"{file.package}." if file.package and file.package != "_global_" else ""
        for folder in (CONFIGS, *EXPERIMENTS.glob("*")):
            if (path := folder / f"{file.config_path}.yaml").exists():
                yield path, prefix


def _comments(node: yaml.Node | None, lines: list[str], prefix: str) -> dict[str, str]:
    """Return the comments behind the values of a YAML mapping, by dotted key."""
    comments = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name, end = f"{prefix}{key.value}", value.end_mark
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            comments |= _comments(value, lines, f"{name}.")
        elif (rest := lines[end.line][end.column :].strip() if end.line < len(lines) else "").startswith("#"):
            comments[name] = rest.lstrip("# ")
    return comments


def origin_of(key: str, origins: dict[str, str]) -> str:
    """Return the origin of a key or, if it is part of a section given as a whole, of this section."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins[key] if key else "default of __init__"


def main() -> None:
    """Print `key: value  # file: meaning` for every value of the composed config."""
    silence_libraries()
    with exit_on_user_error():
        overrides = sys.argv[1:]
        check_arguments(overrides)
        # The values in configs/ are checked by the tests. Checking others takes seconds, for it imports Lightning.
        chosen = parse_hydra_overrides(take_paths(overrides)[0])
        refuse_several_values(chosen)
        forks = {file.stem for file in fork_files()}
        check = any(each.key_or_group not in GROUPS or each.value() in forks for each in chosen)
        config, (origins, meanings) = compose(overrides, check_values=check), value_origins(overrides)
        values = {key: OmegaConf.select(config, key) for key in flat_keys(to_plain(config))}
        lines = {key: f"{key}: {'null' if value is None else value}" for key, value in values.items()}
        width = max(map(len, lines.values()))
        for key, line in lines.items():
            meaning = f": {meanings[key]}" if key in meanings else ""
            print(f"{line:<{width}}  # {origin_of(key, origins)}{meaning}")


if __name__ == "__main__":
    main()
