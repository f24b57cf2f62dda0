"""Pages of the lecture: each has an equation, the code that is it, and a figure measured from data in git."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from experiments.lecture.run import PARTS

ROOT = Path(__file__).parents[1]
LECTURE = ROOT / "docs" / "lecture"
PAGES = sorted(path for path in LECTURE.glob("*.md") if path.name != "index.md")
IMAGE = re.compile(r"!\[[^\]]+\]\(([^)\s]+\.png)\)")


def images(page: Path) -> list[Path]:
    """Return the images that a page shows, relative to the repository."""
    return [(page.parent / name).resolve().relative_to(ROOT) for name in IMAGE.findall(page.read_text())]


def tracked() -> set[str]:
    """Return the files in git."""
    return set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


def defined(path: Path) -> set[str]:
    """Return the names of the functions, classes and methods of a Python file: `REINFORCE.weight`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{each.name}" for each in getattr(node, "body", ()) if hasattr(each, "name")}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_an_equation_the_code_and_a_measured_figure(page):
    text = page.read_text()
    assert re.search(r"^\$\$.+?\$\$", text, re.DOTALL | re.MULTILINE)

    blocks = re.findall(r"```\{literalinclude\} (\S+)\n(.*?)```", text, re.DOTALL)
    assert blocks
    for name, options in blocks:
        (pyobject,) = re.findall(r":pyobject: (\S+)", options)
        assert pyobject in defined(page.parent / name), f"{name} has no {pyobject}"

    figures = [path for path in images(page) if path.parts[0] == "experiments"]
    assert figures
    files = tracked()
    for path in figures:
        study = path.parts[1]
        tables = {name for name in files if Path(name).parent == path.parent and name.endswith((".csv", ".csv.gz"))}
        if study == "lecture":
            tables &= {f"experiments/lecture/{path.stem}{suffix}" for suffix in (".csv", ".csv.gz")}
        assert tables, f"{path} has no data in git"
        assert str(path) in files
        command = f"make study NAME=lecture ARGS={path.stem}" if study == "lecture" else f"make study NAME={study}"
        assert command in text


def test_every_part_is_shown_on_a_page():
    shown = {path.stem for page in PAGES for path in images(page) if path.parent == Path("experiments/lecture")}
    assert set(PARTS) == shown


def test_the_index_lists_every_page():
    text = (LECTURE / "index.md").read_text()
    (toctree,) = re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL)
    listed = [line for line in toctree.split() if re.match(r"\d\d_", line)]
    assert listed == sorted(listed)
    assert {page.stem for page in PAGES} <= set(listed)
    assert re.findall(r"\]\((\d\d_\w+)\.md\)", text) == listed
