"""Directives of the pages in docs/algorithms: what the repository's files say about an algorithm, as Markdown.

`algorithm-facts` lists paper, spaces, lecture pages and code. `algorithm` adds the module docstring, the metrics, the
hyper-parameters and the results. `algorithm-table` is the table of all algorithms. Nothing is imported from the
algorithms: docstrings and class attributes are read from their source.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from docstring_markdown import blocks, entries, markdown, reference, sections, table
from docutils import nodes
from repository_links import rewrite
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
PAPER = re.compile(r"([A-Z][\w&. ]+? \d{4}(?: [a-z])?)(?:, | \()((?:arXiv|doi):[\w./-]*\w)")
KINDS = ("on-policy", "off-policy", "model-based")
OBSERVATIONS = {"float32": "vectors", "uint8": "pixels"}


@dataclass(frozen=True)
class Page:
    """An algorithm's page: its name, as in `make train ALGO=name`, and the files that it is made from."""

    name: str

    @property
    def path(self) -> Path:
        """Path of the page, whose front matter has `kind` and `lecture`."""
        return ROOT / "docs" / "algorithms" / f"{self.name}.md"

    @property
    def config(self) -> Path:
        """Path of the YAML file with the default hyper-parameters."""
        return ROOT / "configs" / "algo" / f"{self.name}.yaml"

    @cached_property
    def front_matter(self) -> dict:
        """Front matter of the page."""
        return yaml.safe_load(self.path.read_text().split("---\n")[1])

    @cached_property
    def title(self) -> str:
        """Title of the page."""
        return re.findall("^# (.*)", self.path.read_text(), re.MULTILINE)[0]

    @cached_property
    def target(self) -> str:
        """Import path of the class, `levin.algorithms.sac.SAC`."""
        return yaml.safe_load(self.config.read_text())["algo"]["_target_"]

    @cached_property
    def source(self) -> Path:
        """Path of the module."""
        return ROOT / "src" / Path(*self.target.split(".")[:-1]).with_suffix(".py")

    @cached_property
    def module(self) -> ast.Module:
        """Syntax tree of the module."""
        return ast.parse(self.source.read_text())

    @cached_property
    def cls(self) -> ast.ClassDef:
        """Syntax tree of the class."""
        name = self.target.rpartition(".")[2]
        return next(node for node in self.module.body if isinstance(node, ast.ClassDef) and node.name == name)

    @cached_property
    def docstring(self) -> dict[str, str]:
        """Sections of the module docstring, by header; the text before the first header is `""`."""
        return sections(ast.get_docstring(self.module) or "")

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the value of an annotated attribute of the class, such as `actions`."""
        assigned = [node for node in self.cls.body if isinstance(node, ast.AnnAssign) and node.value]
        values = [node.value for node in assigned if ast.unparse(node.target) == name]
        return ast.literal_eval(values[0]) if values else default

    @property
    def tuned(self) -> list[Path]:
        """Paths of the tuned configs of this algorithm, and of no other whose name begins with this one's."""
        names = [file.stem for file in self.config.parent.glob("*.yaml")]
        files = sorted((ROOT / "configs" / "tuned").glob(f"{self.name}_*.yaml"))
        return [
            file for file in files if max((n for n in names if file.stem.startswith(f"{n}_")), key=len) == self.name
        ]

    @property
    def results(self) -> list[Path]:
        """Folders of the results whose config uses this algorithm."""
        configs = sorted((ROOT / "experiments").glob("*/config.yaml"))
        return [file.parent for file in configs if f"_target_: {self.target}\n" in file.read_text()]


def papers(page: Page) -> str:
    """Return links to the papers that the module docstring names before its pseudocode."""
    found = PAPER.findall(" ".join(page.docstring[""].split()))
    return ", ".join(f"[{authors}]({reference(number)})" for authors, number in found)


def spaces(page: Page) -> tuple[str, str]:
    """Return the action spaces and the observations that the algorithm supports."""
    actions = ", ".join(page.attribute("actions")).replace("_", "-")
    actions += ", with masks" if page.attribute("action_masks") else ""
    return actions, ", ".join(OBSERVATIONS[dtype] for dtype in page.attribute("observations", ("float32",)))


def lecture(page: Page) -> str:
    """Return links to the pages of the lecture about this algorithm, with their titles."""
    return "; ".join(f"[](docs/lecture/{name}.md)" for name in page.front_matter["lecture"])


def facts(page: Page) -> str:
    """Return the list under the title of a page."""
    actions, observations = spaces(page)
    module = page.target.rpartition(".")[0]
    source = page.source.relative_to(ROOT)
    return "\n".join(
        [
            f"- Paper: {papers(page)}",
            f"- Kind: {page.front_matter['kind']}",
            f"- Actions: {actions}. Observations: {observations}",
            f"- In the lecture: {lecture(page)}",
            f"- Code: [`{source}`]({source}), {{py:obj}}`API reference <{module}>`",
        ]
    )


def metrics(page: Page) -> dict[str, str]:
    """Return the meaning of each metric of the module docstring, by name; `...` stands for more of a name's kind."""
    return entries(page.docstring["Metrics:"])


def hyper_parameters(page: Page) -> list[tuple[str, str, str]]:
    """Return name, value in the YAML file as written there, and meaning with its source, of each hyper-parameter."""
    meaning = entries(sections(ast.get_docstring(page.cls) or "")["Args:"])
    block = page.config.read_text().partition("\nalgo:\n")[2].partition("\n\n")[0]
    rows = []
    for name, value, comment in re.findall(r"^  (\w+): +(.*?)(?: +# (.*))?$", block, re.MULTILINE):
        if name != "_target_":
            deviation = f" {comment}." if comment.startswith("Deviation") else ""
            rows.append((name, value, meaning[name] + deviation))
    return rows


def configs(page: Page) -> Iterator[str]:
    """Yield the hyper-parameters and the tuned values as Markdown."""
    text, name = page.config.read_text(), page.config.relative_to(ROOT)
    comment = " ".join(re.findall(r"^# ([^@].*)", text, re.MULTILINE))
    yield f"Values of `{name}`: {markdown(comment)}"
    yield from blocks(sections(ast.get_docstring(page.cls) or "")[""].partition("\n")[2])
    rows = ((f"`{key}`", f"`{value}`", markdown(meaning)) for key, value, meaning in hyper_parameters(page))
    yield table(("`algo.*`", "value", "meaning and source"), rows)
    others = {key: value for key, value in yaml.safe_load(text).items() if key not in ("algo", "defaults")}
    default_env = re.findall(r"override /env: (\w+)", text)[0]
    pairs = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in _flat(others)]
    yield f"The file also sets {', '.join(f'`{pair}`' for pair in [f'env={default_env}', *pairs])}."
    if page.tuned:
        envs = ", ".join(file.stem.removeprefix(f"{page.name}_") for file in page.tuned)
        yield f"<details><summary>Values for {len(page.tuned)} envs and families: {envs}</summary>"
        for file in page.tuned:
            yield f"`{file.relative_to(ROOT)}`\n\n```yaml\n{file.read_text().partition('global_')[2].strip()}\n```"
        yield "</details>"


def _flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the leaves of nested dicts with dotted keys."""
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def results(page: Page) -> Iterator[str]:
    """Yield the table of results and the figures of their learning curves as Markdown."""
    from levin.results.result import SUMMARY, Result  # imports torch
    from levin.results.tables import HEADLINE_COLUMNS, markdown_table, table_row

    rows, figures = [], []
    for folder in page.results:
        summary = json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).exists() else {}
        rows.append(table_row(Result.read(folder), summary, published=1))
        picture = folder / "curve.png"
        if picture.exists():
            label = rows[-1]["result"].partition("]")[0].removeprefix("[")
            figures.append(f"![Learning curves of {label}](../../{picture.relative_to(ROOT)})")
    yield markdown_table(rows, HEADLINE_COLUMNS)
    if figures:
        yield "```{container} curves\n" + "\n".join(figures) + "\n```"


def body(page: Page) -> str:
    """Return the generated sections of a page as Markdown."""
    parts = ["## Idea", *blocks(page.docstring[""].partition("\n\n")[2])]
    for header, text in page.docstring.items():
        kind = next((kind for kind in ("Pseudocode", "Deviations", "Metrics") if header.startswith(kind)), "")
        in_title = re.fullmatch(rf"{kind}( \(.*\))?:", header)  # such as "Pseudocode (Algorithm 1):"
        parts += [f"## {header[:-1] if in_title else kind}"] if kind else []
        parts += [markdown(header)] if header and not in_title else []
        if kind == "Metrics":
            rows = ((re.sub(r"([\w/]+)", r"`\1`", name), markdown(each)) for name, each in metrics(page).items())
            parts += ["Columns of `metrics.csv`, and curves of the loggers.", table(("metric", "meaning"), rows)]
        elif header:
            parts += blocks(text)
    return "\n\n".join([*parts, "## Hyper-parameters", *configs(page), "## Results", *results(page)])


def pages() -> list[Page]:
    """Return the pages of all algorithms, sorted by name."""
    return [Page(file.stem) for file in sorted((ROOT / "configs" / "algo").glob("*.yaml"))]


def overview(all_pages: Iterable[Page]) -> str:
    """Return the table of all algorithms as Markdown."""
    rows = []
    for page in sorted(all_pages, key=lambda page: KINDS.index(page.front_matter["kind"])):
        short = page.title.partition("(")[2].removesuffix(")") or page.title  # "SAC" of "Soft actor-critic (SAC)"
        numbers = ", ".join(f"[{name[:2]}](docs/lecture/{name}.md)" for name in page.front_matter["lecture"])
        link = f"[{short}]({page.path.relative_to(ROOT)})"
        rows.append((link, page.front_matter["kind"], *spaces(page), papers(page), numbers))
    return table(("algorithm", "kind", "actions", "observations", "paper", "lecture"), rows)


class Generated(SphinxDirective):
    """A directive whose Markdown is generated from files of the repository."""

    def render(self, text: str, *files: Path) -> list[nodes.Node]:
        """Parse Markdown whose links are relative to the repository; a change of these files rebuilds the page."""
        for file in (Path(__file__), *files):
            self.env.note_dependency(str(file))
        return self.parse_text_to_nodes(rewrite(text, self.env.docname, "README.md"), allow_section_headings=True)


class AlgorithmFacts(Generated):
    """`algorithm-facts`: list of paper, kind, spaces, lecture pages and code of an algorithm."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        page = Page(self.arguments[0])
        return self.render(facts(page), page.source, page.config)


class AlgorithmBody(Generated):
    """`algorithm`: docstring, metrics, hyper-parameters and results of an algorithm."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        page = Page(self.arguments[0])
        stored = [file for folder in page.results for file in folder.glob("*.*")]
        index = ROOT / "experiments" / "README.md"  # changes with every new result
        return self.render(body(page), page.source, page.config, *page.tuned, index, *stored)


class AlgorithmTable(Generated):
    """`algorithm-table`: table of all algorithms."""

    def run(self) -> list[nodes.Node]:
        all_pages = pages()
        files = [file for page in all_pages for file in (page.path, page.source, page.config)]
        return self.render(overview(all_pages), *files)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("algorithm-facts", AlgorithmFacts)
    app.add_directive("algorithm", AlgorithmBody)
    app.add_directive("algorithm-table", AlgorithmTable)
    return {"parallel_read_safe": True}
