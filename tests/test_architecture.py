"""The packages of `levin` are layers: each imports only from those above it, and nothing goes in circles."""

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "levin"
LAYERS = (
    *("core", "estimators", "nn", "data", "model_based", "algorithms", "runs", "envs", "collectors", "training"),
    *("config", "results", "lab", "bench"),
)
ONLY = {"core": set(), "estimators": {"core"}, "results": {"core", "runs"}}  # packages that need fewer than they may
COMMANDS = {"train", "resume", "sweep", "evaluate", "play", "plot", "pin", "fork", "reproduce", "report"}
ENV_IDS = {"dodge", "racing"}  # modules that configs name: levin.dodge:Dodge-v0
FILES = 12  # of a package, `__init__.py` included


def modules() -> dict[str, Path]:
    """Every module by its name below `levin`: `envs.vector`; a package by its own."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The modules that a file imports, also within functions and for type hints."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("levin.") for name in found if name.startswith("levin.")}
    return names & MODULES.keys()


GRAPH = {name: imports(path) - {name} for name, path in MODULES.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of two or more nodes (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def layer(name: str) -> str:
    return name.partition(".")[0]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports of packages that no package may have."""
    wrong = []
    for name, others in graph.items():
        if layer(name) not in LAYERS:
            continue
        above = ONLY.get(layer(name), set(LAYERS[: LAYERS.index(layer(name))])) | {layer(name)}
        wrong += [f"{name} -> {other}" for other in sorted(others) if other and layer(other) not in above]
    return wrong


def test_every_package_is_in_the_list_and_every_file_is_in_a_package():
    assert {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()} == set(LAYERS)
    assert {path.stem for path in SOURCE.glob("*.py")} == {"__init__"} | COMMANDS | ENV_IDS


def test_packages_import_only_from_those_above_them():
    assert upward(GRAPH) == []


def test_no_import_goes_in_circles():
    assert circles(GRAPH) == []


def test_what_these_tests_look_for_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    graph = {"nn.networks": {"envs.vector", "core.errors"}, "results.result": {"envs.config", "runs.load"}}
    assert upward(graph) == ["nn.networks -> envs.vector", "results.result -> envs.config"]
    assert GRAPH["lab.measure"] >= {"lab.pictures", "core.errors"}, "imports within functions count"


@pytest.mark.parametrize("package", [*LAYERS, "training.distributed"])
def test_a_package_is_small_and_its_docstring_says_where_to_start(package):
    folder = SOURCE / package.replace(".", "/")
    files = sorted(path.name for path in folder.glob("*.py"))
    if package != "algorithms":
        assert len(files) <= FILES
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert docstring is not None
    named = [word.strip("`.,;:") for word in docstring.split()]
    assert any(word.endswith((".py", ".md")) and (folder / word).exists() for word in named), "names a file to start at"


def test_nothing_in_src_imports_experiments_or_tests():
    for path in MODULES.values():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        helpers = {file.stem for folder in ("tests", "tests/support") for file in (ROOT / folder).glob("*.py")}
        assert not {layer(name) for name in names} & {"experiments", "tests", *helpers}, path


def test_the_drill_starts_without_pytest():
    code = "import runpy, sys; sys.path.insert(0, 'tests'); runpy.run_path('tests/drill.py', run_name='drill')"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_tests_mirror_the_packages():
    folders = defaultdict(list)
    for path in Path(__file__).parent.rglob("test_*.py"):
        folders[path.parent.name].append(path.name)
    assert set(folders) <= {"tests", "commands", "scripts", *LAYERS}
    names = [name for each in folders.values() for name in each]
    assert len(names) == len(set(names)), "pytest imports test files by their names alone"


PROSE = [
    path
    for pattern in (
        "*.md",
        "Makefile",
        "pyproject.toml",
        "src/**/*.py",
        "src/**/*.md",
        "configs/**/*.yaml",
        "experiments/**/*.md",
    )
    for path in ROOT.glob(pattern)
]


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_module_and_test_that_prose_names_is_there(path):
    text = path.read_text()
    for name in re.findall(r"`levin\.([a-z_0-9.]*[a-z_0-9])", text):
        parts = name.split(".")
        assert any(".".join(parts[:n]) in MODULES for n in (len(parts), len(parts) - 1)) or name in ("load", "name"), (
            name
        )
    for name in re.findall(r"\b((?:src|tests|configs|scripts)/[\w/]+\.(?:py|yaml|md))", text):
        assert (ROOT / name).exists() or "x." in name, name
    if path.suffix == ".md":
        files = {file.name for folder in ("src", "tests") for file in (ROOT / folder).rglob("*.py")}
        defined = set(
            re.findall(r"def (test_\w+)", "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py")))
        )
        for name in re.findall(r"`(?:\w+/)*(\w+\.py)`", text):
            assert name in files or name in ("x.py", "algorithm.py", "run.py"), name
        assert set(re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", text)) <= defined
