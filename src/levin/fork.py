"""Copy an algorithm as the start of a new one: `python -m levin.fork algo=sac name=my_idea`.

Copies the algorithm, its config, its tuned configs and its search spaces into `experiments/my_idea/`. Nothing outside
that folder changes, so later updates of Levin merge without conflicts.
"""

import io
import keyword
import re
import tokenize
from pathlib import Path

import yaml

from levin.config import cli
from levin.core import files, paths
from levin.core.errors import ConfigError, exit_on_user_error, valid_names
from levin.runs import provenance, trust

README = """# {name}

A copy of `{algo}` (commit {commit}). Describe here what you changed, and why.

```sh
make train ALGO={name} ENV=pendulum SEEDS="0 1 2"
make plot RUNS="runs/{algo}_pendulum runs/{name}_pendulum"
git diff --no-index {source} experiments/{name}/algorithm.py
```

The first command trains three seeds, the second plots them beside runs of `{algo}`, the third shows your changes. Run
the first with `ALGO={algo}`, too, to have these. Replace `pendulum` by an env that `{algo}` can act in.

- `algorithm.py`: the algorithm.
- `algo/{name}.yaml`: its hyper-parameters. To add one, add a keyword argument to `__init__` and a line to this file.
- `tuned/`: hyper-parameters for single envs and families of envs, if `{algo}` has any.
- `tune/`: search spaces of `make tune ALGO={name}`.

To report a result, start with `make pin EXP={name}_pendulum ALGO={name} ENV=pendulum`.
"""


def fork(*, algo: str, name: str) -> Path:
    """Write `experiments/<name>/`: algorithm.py, algo/<name>.yaml, tuned/<name>_<env>.yaml, tune/ and README.md.

    Args:
        algo: Algorithm to copy; it may be a fork itself.
        name: Name of the fork: a Python name in lower case.

    Returns:
        The folder of the fork.

    Raises:
        ConfigError: There is no such algorithm, or the name is taken or not valid.
    """
    yamls = {file.stem: file for file in (*paths.CONFIGS.glob("algo/*.yaml"), *paths.fork_files())}
    folder = paths.EXPERIMENTS / name
    if algo not in yamls:
        raise ConfigError(f"algo={algo} is unknown; {valid_names(algo, yamls)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"name={name} is not a Python name in lower case, such as my_idea")
    if name in yamls or folder.exists() or folder.with_suffix(".py").exists():
        raise ConfigError(f"name={name} is taken; choose another name")

    text = yamls[algo].read_text(encoding="utf-8")
    target = yaml.safe_load(text)["algo"]["_target_"]
    module, _, parent_class = target.rpartition(".")
    source = (
        paths.ROOT if module.startswith("experiments.") else paths.ROOT / "src"
    ) / f"{module.replace('.', '/')}.py"
    child_class = "".join(word.capitalize() for word in name.split("_"))
    child_target = f"experiments.{name}.algorithm.{child_class}"
    commit = provenance.run_git("rev-parse", "--short", "HEAD") or "unknown"
    code = source.read_text(encoding="utf-8")
    used = {token.string for token in tokenize.generate_tokens(io.StringIO(code).readline)}
    if child_class in {*used, *keyword.kwlist}:
        raise ConfigError(
            f"name={name} would name its class {child_class}, which {algo} uses already; choose another name"
        )
    texts = {
        "algorithm.py": _rename_class(code, parent_class, child_class),
        f"algo/{name}.yaml": text.replace(target, child_target),
        "README.md": README.format(name=name, algo=algo, commit=commit, source=source.relative_to(paths.ROOT)),
    }
    for group in ("tuned", "tune"):
        for file in (yamls[algo].parents[1] / group).glob(f"{algo}*.yaml"):
            env = file.stem.removeprefix(algo)
            # For sac, skips sac_discrete.yaml and sac_discrete_cartpole.yaml.
            name_of = env.removeprefix("_")
            if not env or any((paths.CONFIGS / kind / f"{name_of}.yaml").exists() for kind in ("env", "family")):
                texts[f"{group}/{name}{env}.yaml"] = file.read_text(encoding="utf-8")
    if module.startswith("experiments."):  # a fork of a fork: its other modules are copied too
        parent = module.removesuffix("algorithm")
        for file in source.parent.glob("*.py"):
            texts.setdefault(file.name, file.read_text(encoding="utf-8"))
        texts = {path: content.replace(parent, f"experiments.{name}.") for path, content in texts.items()}
    folder.mkdir()
    for path, content in texts.items():
        files.write_text(folder, path, content)
    trust.record_code(trust.Code("algo._target_", child_target, child_target))
    return folder


def _rename_class(code: str, old: str, new: str) -> str:
    """Return the code with a class renamed, except in strings and comments."""
    lines = code.splitlines(keepends=True)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(code).readline) if token.string == old]
    for token in reversed([token for token in tokens if token.type == tokenize.NAME]):
        row, column = token.start
        line = lines[row - 1]
        lines[row - 1] = line[:column] + new + line[column + len(old) :]
    return "".join(lines)


def main() -> None:
    """Write the fork and print its path."""
    with exit_on_user_error():
        folder = fork(**cli.command_arguments(fork))
    name = folder.name
    print(f"experiments/{name}/algorithm.py is your copy: change it, then run make train ALGO={name}")


if __name__ == "__main__":
    main()
