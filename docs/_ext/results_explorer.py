"""Pages of the reported results, and the explorer that filters and plots them.

Before the sources are read, a page `results/<name>.md` is written for each result in experiments/. The directive
`results-explorer` shows a table of all results. With the site, the data of its charts are written as a script, so that
the page also works when it is opened as a file.
"""

import json
import shutil
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from docstring_markdown import table
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.builders import Builder
from sphinx.util.docutils import SphinxDirective
from sphinx.util.osutil import copyfile

from levin.core import files
from levin.results.curves import Curve, Curves, align_curves
from levin.results.result import ANIMATION, CONFIG, PICTURE, REFERENCE, SUMMARY, Published, Result, result_folders
from levin.results.tables import source_address, source_label, table_row

EXPLORER = "results/index"
MAX_POINTS = 200  # of a curve in the charts
TABLE = {  # heading: class of its cells
    "result": "",
    "env": "wide",
    "env steps": "wide number",
    "seeds": "wide number",
    "ours": "number",
    "required": "wide number",
    "published": "wide widest",
    "verdict": "",
}


@cache
def read_results() -> list[Result]:
    """Return all results, sorted by name."""
    return [Result.read(folder) for folder in result_folders()]


def read_summary(result: Result) -> dict[str, Any]:
    """Return the contents of a result's summary.json; empty before its first run."""
    file = result.folder / SUMMARY
    return json.loads(file.read_text()) if file.is_file() else {}


def title(result: Result) -> str:
    """Return algorithm, env and variant of a result, such as `SAC HalfCheetah-v4 (300k)`."""
    return f"{result.algorithm} {result.env}{result.variant}"


def commands(result: Result) -> str:
    """Return the commands for a result: training it again, and using its policy if there is one."""
    names = ("reproduce", "evaluate", "play") if result.provenance else ("reproduce",)
    return "\n".join(f"make {name} EXP={result.name}" for name in names)


def config_text(result: Result) -> str:
    """Return a result's config without the comments at its top."""
    lines = (result.folder / CONFIG).read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def describe_provenance(result: Result) -> dict[str, str]:
    """Return on what commit and machine a result was made, by label; empty before its first run."""
    facts = result.provenance
    if not facts:
        return {}
    dates = sorted(seed["date"][:10] for seed in facts["seeds"].values())
    minutes = max(seed["wall_seconds"] for seed in facts["seeds"].values()) / 60
    cores = f"{facts['threads']} thread{'s' * (facts['threads'] > 1)} of {facts['cores']} cores"
    return {
        "command": facts["command"],
        "commit": facts["git_sha"],
        "date": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        "time": f"{minutes:.0f} minutes for the slowest seed",
        "machine": ", ".join([*facts["gpus"], facts["processor"], facts["cpu_capability"], cores]),
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version),
    }


# --- pages


def page_text(result: Result) -> str:
    """Return the page of a result as Markdown."""
    summary, reference, folder = read_summary(result), result.reference, f"../../experiments/{result.name}"
    verdict = summary.get("verdict", "not run")
    parts = ["---\norphan: true\n---", f"# {title(result)}", badge_and_animation(result, verdict)]
    because = summary.get("because", "this result has a config and a required score, and no runs")
    parts.append(f"{because[0].upper()}{because[1:]}.")
    if summary:
        parts.append(f"![Learning curves of all seeds, with the published numbers]({folder}/{PICTURE})")
        link = f'<a href="index.html#{result.name}">results explorer</a>'
        parts.append(f"The {link} plots these curves, and those of other results beside them.")
    measured = table_row(result, summary)["measured by"]
    parts += ["## Scores", f"Measured by: {measured}, at {reference.env_steps:,} env steps."]
    if summary:
        scores = summary["as_the_source_measures"]["per_seed"]
        seconds = summary["wall_seconds"]
        rows = zip(summary["seeds"], scores, seconds, strict=True)
        parts.append(
            table(("seed", "score", "minutes"), ((seed, f"{score:.1f}", f"{s / 60:.0f}") for seed, score, s in rows))
        )
    parts.append(f"Required: {reference.gate:g} ({reference.gate_from}). Uniform actions: {reference.random_return:g}.")
    parts.append("## Published numbers")
    rows = ((each.number, link_source(each), each.metric) for each in reference.published)
    parts.append(
        table(("return", "source", "measured by"), rows)
        if reference.published
        else "There is no published number for this algorithm, env and number of env steps."
    )
    if reference.source_run:
        run = reference.source_run
        parts.append(f"{run.family} was run here on {run.env}, with `{run.command}`.")
    parts += ["## Commands", f"```text\n{commands(result)}\n```", "## Config", f"```yaml\n{config_text(result)}```"]
    if facts := describe_provenance(result):
        parts += ["## Provenance", "\n\n".join(f"{label}\n: {escape(text)}" for label, text in facts.items())]
    return "\n\n".join(parts) + "\n"


def badge_and_animation(result: Result, verdict: str) -> str:
    """Return a result's verdict and the animation of its policy, if there is one, as HTML."""
    badge = f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>'
    if not (result.folder / ANIMATION).is_file():
        return badge
    picture = f'<img class="policy" src="../_static/results/{result.name}.webp" alt="The trained policy in its env">'
    return f'<div class="result-top">{badge}{picture}</div>'


def link_source(published: Published) -> str:
    """Return the source of a published number, as a Markdown link where it has an address."""
    label, address = source_label(published), source_address(published)
    return f"{label}: {published.source}" if address is None else f"[{label}]({address})"


def write_pages(app: Sphinx) -> None:
    """Write the page of each result into docs/results/, and remove those of results that are gone."""
    folder = Path(app.srcdir) / "results"
    texts = {f"{result.name}.md": page_text(result) for result in read_results()}
    for path in folder.glob("*.md"):
        if path.name not in texts and path.name != "index.md":
            path.unlink()
    for name, text in texts.items():
        path = folder / name
        if not path.is_file() or path.read_text() != text:  # an unchanged page is not read again
            files.write_text(folder, name, text)


# --- explorer


class ResultsExplorer(SphinxDirective):
    """Directive that shows the table of all results and room for the chart, which results.js fills."""

    def run(self) -> list[nodes.Node]:
        for result in read_results():
            for name in (REFERENCE, SUMMARY):
                if (result.folder / name).is_file():
                    self.env.note_dependency(str(result.folder / name))
        self.env.note_dependency(__file__)
        return [nodes.raw("", explorer_html(), format="html")]


def explorer_html() -> str:
    """Return the explorer's HTML: filters, the table, and empty places for chart and details."""
    results = read_results()
    verdicts = {result.name: read_summary(result).get("verdict", "not run") for result in results}
    filters = "".join(
        filter_html(key, label, values)
        for key, label, values in (
            ("algo", "Algorithm", [result.algorithm for result in results]),
            ("env", "Environment", [result.env for result in results]),
            ("verdict", "Verdict", list(verdicts.values())),
        )
    )
    headings = "".join(f'<th class="{kind}">{heading}</th>' for heading, kind in TABLE.items())
    rows = "\n".join(row_html(result, verdicts[result.name]) for result in results)
    return f"""<div id="results-explorer" class="mathjax_ignore">
<form class="filters">{filters}
<button type="button" class="reset">Show all</button><output class="count"></output></form>
<div class="rows" tabindex="0"><table>
<thead><tr><th class="pick" title="Compare"></th>{headings}</tr></thead>
<tbody>
{rows}
</tbody></table></div>
<div class="chart-top"><h2 class="chart-title"></h2><span class="curve-kinds"></span></div>
<div class="chart"></div>
<div class="details"></div>
<noscript>The chart needs JavaScript. Each result links to its page, which has a picture of its curves.</noscript>
</div>"""


def filter_html(key: str, label: str, values: list[str]) -> str:
    """Return a drop-down list of the distinct values with their counts."""
    options = "".join(
        f'<option value="{escape(value)}">{escape(value)} ({values.count(value)})</option>'
        for value in sorted(set(values), key=str.lower)
    )
    return f'<label>{label}<select name="{key}"><option value="">all</option>{options}</select></label>'


def row_html(result: Result, verdict: str) -> str:
    """Return the row of a result in the explorer's table."""
    row = table_row(result, read_summary(result))
    first = next(iter(result.reference.published), None)
    cells = {
        "result": f'<a href="{result.name}.html">{escape(result.algorithm + result.variant)}</a>'
        f'<span class="narrow">{escape(result.env)}</span>',
        "env": escape(result.env),
        "env steps": row["env steps"],
        "seeds": row["seeds"],
        "ours": row["ours"],
        "required": f"{result.reference.gate:g}",
        "published": escape(f"{first.number}, {first.family}") if first else "none",
        "verdict": f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>',
    }
    attributes = {"name": result.name, "algo": result.algorithm, "env": result.env, "verdict": verdict}
    data = " ".join(f'data-{key}="{escape(value)}"' for key, value in attributes.items())
    inner = "".join(f'<td class="{TABLE[heading]}">{cell}</td>' for heading, cell in cells.items())
    pick = f'<td class="pick"><input type="checkbox" aria-label="Compare {escape(title(result))}"></td>'
    return f"<tr {data}>{pick}{inner}</tr>"


# --- data


def explorer_data() -> list[dict[str, Any]]:
    """Return what results.js shows of each result."""
    return [result_data(result) for result in read_results()]


def result_data(result: Result) -> dict[str, Any]:
    """Return numbers, curves and texts of a result as plain values."""
    summary, reference = read_summary(result), result.reference
    curves = {"evaluation return": result.evaluations, "training return": result.training}
    row = table_row(result, summary)
    return {
        "name": result.name,
        "title": title(result),
        "verdict": summary.get("verdict", "not run"),
        "because": summary.get("because", "not run yet"),
        "measured": row["measured by"],
        "ours": summary["as_the_source_measures"]["mean"] if summary else None,
        "envSteps": reference.env_steps,
        "gate": reference.gate,
        "gateFrom": reference.gate_from,
        "published": [
            {
                "label": source_label(each),
                "family": each.family,
                "number": each.number,
                "mean": each.mean,
                "std": each.std,
                "address": source_address(each),
                "measured": each.metric,
            }
            for each in reference.published
        ],
        "kind": "evaluation return" if reference.metric == "evaluations" else "training return",
        "curves": {kind: curves_data(seeds) for kind, seeds in curves.items() if seeds},
        "source": {"family": reference.source_run.family, "curves": curves_data(result.source)["seeds"]}
        if reference.source_run
        else None,
        "commands": commands(result),
        "config": config_text(result),
        "provenance": describe_provenance(result),
        "animation": (result.folder / ANIMATION).is_file(),
    }


def curves_data(seeds: Curves) -> dict[str, Any]:
    """Return the curve of each seed and of their mean, each as `[env steps, returns]`."""
    grid, returns = align_curves(list(seeds.values()))
    mean = Curve(grid, returns.mean(0), np.ones(len(grid)))
    return {"seeds": {seed: thin_curve(curve) for seed, curve in seeds.items()}, "mean": thin_curve(mean)}


def thin_curve(curve: Curve) -> list[list[float]]:
    """Return the env steps and returns of a curve; the means of neighbours where it has too many points."""
    parts = np.array_split(np.arange(len(curve.env_steps)), min(len(curve.env_steps), MAX_POINTS))
    return [
        [round(float(curve.env_steps[part].mean())) for part in parts],
        [float(f"{curve.return_mean[part].mean():.5g}") for part in parts],
    ]


# --- files of the site


def add_assets(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Load the styles on the pages of results, and the scripts on the explorer's page."""
    if page.startswith("results/"):
        app.add_css_file("results.css")
    if page == EXPLORER:
        for name in ("plotly.min.js", "results_data.js", "results.js"):
            app.add_js_file(name, loading_method="defer")


def write_assets(app: Sphinx, builder: Builder) -> None:
    """Write Plotly, the data of the charts and the animations into the built site, before the pages that load them."""
    if builder.format != "html":
        return
    static = Path(builder.outdir) / "_static"
    (static / "results").mkdir(parents=True, exist_ok=True)
    with resources.as_file(resources.files("plotly") / "package_data" / "plotly.min.js") as script:
        copyfile(script, static / "plotly.min.js")
    data = json.dumps(explorer_data(), separators=(",", ":"))
    (static / "results_data.js").write_text(f"window.levinResults = {data};\n")
    for result in read_results():
        if (result.folder / ANIMATION).is_file():
            shutil.copy(result.folder / ANIMATION, static / "results" / f"{result.name}.webp")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive and the hooks."""
    app.add_directive("results-explorer", ResultsExplorer)
    app.connect("builder-inited", write_pages)
    app.connect("html-page-context", add_assets)
    app.connect("write-started", write_assets)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
