"""The packages of `levin` are layers: each imports only from earlier layers, and there are no import cycles."""

import ast
import os
import re
import runpy
import subprocess
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest

from pages import SAVE

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "levin"
LAYERS = (
    *("core", "estimators", "nn", "data", "model_based", "algorithms", "runs", "envs", "collectors", "training"),
    *("config", "results", "deploy", "scheduler", "tuning", "lab", "bench"),
)
ALLOWED = {"core": set(), "estimators": {"core"}, "results": {"core", "runs"}}  # packages restricted to these layers
COMMANDS = {
    "train",
    "resume",
    "sweep",
    "evaluate",
    "export",
    "play",
    "plot",
    "pin",
    "fork",
    "reproduce",
    "report",
    "compare",
    "tune",
}
ENV_IDS = {"dodge", "racing"}  # modules named in env ids: levin.dodge:Dodge-v0
MAX_FILES = 12  # per package, `__init__.py` included


def modules() -> dict[str, Path]:
    """Return the path of every module by its name within `levin`, e.g. `envs.vector`; packages by their own name."""
    paths = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Return the modules of `levin` that a file imports, also within functions and for type hints."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            imported |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("levin.") for name in imported if name.startswith("levin.")}
    return names & MODULES.keys()


GRAPH = {name: imports(path) - {name} for name, path in MODULES.items()}


def import_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of two or more nodes (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    cycles = []

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
                cycles.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return cycles


def package_of(name: str) -> str:
    """Return the top-level package of a module: `envs` for `envs.vector`."""
    return name.partition(".")[0]


def forbidden_imports(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports from a package that is not an earlier layer, as "module -> imported"."""
    wrong = []
    for name, others in graph.items():
        if package_of(name) not in LAYERS:
            continue
        above = ALLOWED.get(package_of(name), set(LAYERS[: LAYERS.index(package_of(name))])) | {package_of(name)}
        wrong += [f"{name} -> {other}" for other in sorted(others) if other and package_of(other) not in above]
    return wrong


def test_every_package_has_a_layer_and_every_file_is_in_a_package():
    assert {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()} == set(LAYERS)
    assert {path.stem for path in SOURCE.glob("*.py")} == {"__init__"} | COMMANDS | ENV_IDS


def test_packages_import_only_from_earlier_layers():
    assert forbidden_imports(GRAPH) == []


def test_imports_have_no_cycles():
    assert import_cycles(GRAPH) == []


def test_forbidden_imports_and_cycles_are_detected():
    assert import_cycles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert import_cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    graph = {"nn.networks": {"envs.vector", "core.errors"}, "results.result": {"envs.config", "runs.load"}}
    assert forbidden_imports(graph) == ["nn.networks -> envs.vector", "results.result -> envs.config"]
    assert GRAPH["lab.measure"] >= {"lab.pictures", "core.errors"}, "imports within functions count"


@pytest.mark.parametrize("package", [*LAYERS, "training.distributed"])
def test_a_package_is_small_and_its_docstring_says_where_to_start(package):
    folder = SOURCE / package.replace(".", "/")
    files = sorted(path.name for path in folder.glob("*.py"))
    if package != "algorithms":
        assert len(files) <= MAX_FILES
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
        assert not {package_of(name) for name in names} & {"experiments", "tests", *helpers}, path


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
        "docs/**/*.md",
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
def test_every_file_module_and_test_named_in_prose_exists(path):
    text = path.read_text()
    for name in re.findall(r"`levin\.([a-z_0-9.]*[a-z_0-9])", text):
        parts = name.split(".")
        assert any(".".join(parts[:n]) in MODULES for n in (len(parts), len(parts) - 1)) or name in ("load", "name"), (
            name
        )
    for name in re.findall(r"\b((?:src|tests|configs|scripts)/[\w/]+\.(?:py|yaml|md))", text):
        assert (ROOT / name).exists() or "x." in name or name in SAVE.findall(text), name
    if path.suffix == ".md":
        files = {file.name for folder in ("src", "tests") for file in (ROOT / folder).rglob("*.py")}
        defined = set(
            re.findall(r"def (test_\w+)", "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py")))
        )
        for name in re.findall(r"`(?:\w+/)*(\w+\.py)`", text):
            assert name in files or name in ("x.py", "algorithm.py", "run.py", *SAVE.findall(text)), name
        assert set(re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", text)) <= defined


def test_the_readme_shows_code_of_sac_as_it_is():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    source = {line.strip() for line in (SOURCE / "algorithms" / "sac.py").read_text().splitlines()}
    assert {line.strip() for line in block.splitlines()} <= source


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_every_test_that_is_named_as_quick_or_long_exists():
    folder = Path(__file__).parent
    conftest = types.SimpleNamespace(**runpy.run_path(str(folder / "conftest.py")))  # other folders have one too
    assert [name for name in (*conftest.QUICK, *conftest.LONG) if not (folder / name).exists()] == []
    for name, functions in conftest.LONG_FUNCTIONS.items():
        text = (folder / name).read_text()
        assert [each for each in functions if f"def {each}(" not in text] == []
    text = (folder / "checks.py").read_text()
    assert [each for each in (*conftest.QUICK_CHECKS, *conftest.LONG_CHECKS) if f"def {each}(" not in text] == []


def test_texts_are_read_as_utf_8_whatever_the_locale():
    for file in (*SOURCE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")):
        assert not re.findall(r"(?<!def )read_text\((?!\s*encoding)", file.read_text(encoding="utf-8")), file
