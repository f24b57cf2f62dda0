"""Each algorithm has a page of the documentation with its equations, its code and the meaning of its metrics."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

import algorithm_pages  # noqa: E402
import docstring_markdown  # noqa: E402
from algorithm_pages import Page  # noqa: E402

PAGES = algorithm_pages.pages()
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def losses(cls: ast.ClassDef) -> set[str]:
    """Return the names of the methods of a class that compute a loss."""
    return {node.name for node in cls.body if isinstance(node, ast.FunctionDef) and re.search("loss(es)?$", node.name)}


def recorded(cls: ast.ClassDef) -> set[str]:
    """Return the names of the metrics that a class records: keywords of `self.record`, and keys of dicts given to it.

    Such a dict is named `metrics` or `terms`, or is returned by a method. A name without `/` gets the prefix `train/`.
    """
    names = set()
    for node in ast.walk(cls):
        dicts: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.record":
            names |= {keyword.arg for keyword in node.keywords if keyword.arg}
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]:
                if ast.unparse(target) in ("metrics", "terms"):
                    dicts.append(node.value)
                elif isinstance(target, ast.Subscript) and ast.unparse(target.value) in ("metrics", "terms"):
                    names.add(ast.literal_eval(target.slice))
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            dicts += node.value.elts
        names |= {ast.literal_eval(key) for each in dicts if isinstance(each, ast.Dict) for key in each.keys if key}
    return {name if "/" in name else f"train/{name}" for name in names if name}


def test_every_algorithm_has_a_page_and_every_page_an_algorithm():
    folder = ROOT / "docs" / "algorithms"
    assert {file.stem for file in folder.glob("*.md")} == {page.name for page in PAGES} | {"index"}


@each_page
def test_every_loss_is_shown_as_code_between_equations(page):
    text = page.path.read_text()
    shown = set(re.findall(rf"^:pyobject: {page.cls.name}\.(\w+)$", text, re.MULTILINE))
    methods = {node.name for node in page.cls.body if isinstance(node, ast.FunctionDef)}
    assert losses(page.cls)
    assert losses(page.cls) <= shown <= methods
    assert len(re.findall(r"^\$\$$", text, re.MULTILINE)) >= 2


@each_page
def test_every_recorded_metric_is_explained(page):
    explained = {name for names in algorithm_pages.metrics(page) for name in names.split(", ")}
    assert recorded(page.cls) == {
        name for name in explained if name.startswith("train/") or name == "eval/dream_return"
    }


@each_page
def test_a_page_names_its_paper_its_spaces_and_every_hyper_parameter(page):
    assert re.fullmatch(r"(\[[^\]]+ \d{4}( b)?\]\(https://(arxiv|doi)\.org/\S+\)(, )?)+", algorithm_pages.papers(page))
    assert page.front_matter["kind"] in algorithm_pages.KINDS
    actions, observations = algorithm_pages.spaces(page)
    assert actions
    assert observations
    rows = algorithm_pages.hyper_parameters(page)
    init = next(node for node in page.cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert [name for name, _, _ in rows] == [each.arg for each in init.args.kwonlyargs if each.arg != "env"]
    assert all(meaning for _, _, meaning in rows)


@each_page
def test_every_tuned_config_is_on_one_page(page):
    assert all(file.name.startswith(f"{page.name}_") for file in page.tuned)
    others = [file for other in PAGES if other != page for file in other.tuned]
    assert not set(page.tuned) & set(others)
    assert len(page.tuned) + len(others) == len(list((ROOT / "configs" / "tuned").glob("*.yaml")))


def test_the_page_of_sac():
    page = Page("sac")
    assert algorithm_pages.papers(page) == "[Haarnoja et al. 2018 b](https://arxiv.org/abs/1812.05905)"
    assert algorithm_pages.spaces(page) == ("box", "vectors, pixels")
    assert algorithm_pages.metrics(page)["train/alpha"] == "the temperature."
    assert ("tau", "0.005", "Step of the target critics towards the critics. Table 1: 0.005.") in (
        algorithm_pages.hyper_parameters(page)
    )
    value, meaning = next(row[1:] for row in algorithm_pages.hyper_parameters(page) if row[0] == "steps_per_iteration")
    assert value == "32"
    assert meaning.startswith("Vector steps between two rounds of updates. Deviation: ")
    assert list(page.docstring) == ["", "Pseudocode (Algorithm 1):", "Deviations:", "Metrics:"]
    pseudocode, *rest = docstring_markdown.blocks(page.docstring["Pseudocode (Algorithm 1):"])
    assert pseudocode.startswith("```text\ninitialise Q_1, Q_2, pi;")
    assert "    a ~ pi(.|s)" in pseudocode
    assert len(rest) == 1
    (deviations,) = docstring_markdown.blocks(page.docstring["Deviations:"])
    assert [line[:2] for line in deviations.splitlines()] == ["- "] * 3
    assert "configs/tuned/sac_pendulum.yaml" in "".join(algorithm_pages.configs(page))
    names = [folder.name for folder in page.results]
    assert {"sac_halfcheetah", "sac_pendulum"} <= set(names)
    assert "sac_discrete_cartpole" not in names
    table, curves = algorithm_pages.results(page)
    assert "[SAC HalfCheetah-v4](experiments/sac_halfcheetah)" in table
    assert "(../../experiments/sac_halfcheetah/curve.png)" in curves


def test_code_over_two_lines_of_a_docstring_is_joined_and_other_lines_are_not():
    pytest.importorskip("sphinx", reason="the extra `docs` builds the pages")
    import docstrings

    lines = ["Args:", "    out: `a.json`.", "    trust: See (`levin.runs", "        .trust`), `b`.", "    more: `c`."]
    assert docstrings.convert(lines) == [
        "Args:",
        "    out: ``a.json``.",
        "    trust: See (``levin.runs .trust``), ``b``.",
        "    more: ``c``.",
    ]


def test_a_list_of_a_docstring_stays_a_list_and_a_formula_after_it_becomes_a_block():
    pytest.importorskip("sphinx", reason="the extra `docs` builds the pages")
    import docstrings

    items = ["- One goes", "  on over", "  three lines.", "- Two."]
    assert docstrings.convert(["Of:", "", *items, "", "Then", "", "    x = y"]) == [
        *["Of:", "", *items, "", "Then", "", "", "::", "", "    x = y"]
    ]


def test_docstrings_become_markdown():
    assert docstring_markdown.markdown("`|A|` and Q*,\n  by arXiv:1812.05905v2.") == (
        r"`\|A\|` and Q\*, by [arXiv:1812.05905v2](https://arxiv.org/abs/1812.05905v2)."
    )
    assert docstring_markdown.markdown("E[a_t|s], **bold**, https://x.org/y.") == (
        r"E\[a\_t\|s\], **bold**, <https://x.org/y>."
    )
    assert docstring_markdown.entries("    a: one\n        two: three\n    b, c: four\nAfter it.\n") == {
        "a": "one two: three",
        "b, c": "four",
    }
