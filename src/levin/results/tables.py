"""Text generated from the stored curves: config headers and summaries in `experiments/`, and tables in the READMEs."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml
from omegaconf import OmegaConf

from levin.core import paths
from levin.core.errors import ConfigError
from levin.results import aggregates
from levin.results.result import (
    CONFIG,
    FINAL,
    SUMMARY,
    Published,
    Result,
    Verdict,
)

BEGIN, END = "<!-- made by `make report` -->", "<!-- end -->"
# Columns of the tables in experiments/README.md and README.md. README.md shows the headline results only.
COLUMNS = (
    *("result", "env steps", "seeds", "ours", "95% interval", "worst seed", "measured by", "published", "required"),
    "verdict",
)
HEADLINE_COLUMNS = ("result", "env steps", "seeds", "ours", "published", "verdict")
HEADLINES = (
    *("reinforce_inverted_pendulum", "a2c_acrobot", "trpo_halfcheetah", "ppo_halfcheetah", "dqn_cartpole"),
    *("ddpg_halfcheetah_300k", "td3_halfcheetah_300k", "sac_halfcheetah"),
)


def expected_texts(results: list[Result]) -> Iterator[tuple[Path, str]]:
    """Yield the path of each generated text file and the text that it should have."""
    summaries = {result.name: summarise(result) for result in results}
    for result in results:
        summary = summaries[result.name]
        yield result.folder / CONFIG, config_header(result, summary) + OmegaConf.to_yaml(result.config)
        if summary:
            yield result.folder / SUMMARY, json.dumps(summary, indent=2) + "\n"
    rows = [table_row(result, summaries[result.name]) for result in results]
    page = paths.EXPERIMENTS / "README.md"
    yield page, _replace_between_marks(page, markdown_table(rows, COLUMNS))
    by_name = {result.name: result for result in results}
    headlines = [by_name[name] for name in HEADLINES if name in by_name]
    rows = [table_row(result, summaries[result.name], published=1) for result in headlines]
    page = paths.ROOT / "README.md"
    text = f"{markdown_table(rows, HEADLINE_COLUMNS)}\n{count_verdicts(list(summaries.values()))}"
    yield page, _replace_between_marks(page, text)


def count_verdicts(summaries: list[dict[str, Any]]) -> str:
    """Return the paragraph of README.md that counts the verdicts of all results and explains them."""
    counts = Counter(summary.get("verdict", "not run") for summary in summaries)
    numbers = ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict) if counts[verdict])
    return (
        f"{len(summaries)} results: {numbers}; [all of them](experiments/README.md).\n"
        "Reproduced: our 95% interval lies at or above the required score, usually the published mean minus one\n"
        "standard deviation. Exceeds: above the mean plus one. Passed: reproduced, but without a published deviation.\n"
        "Matched: we miss the score, but so does the source's code, run here. Inconclusive: the interval contains it.\n"
        "Partial: it lies below, or seeds are missing.\n"
    )


def summarise(result: Result) -> dict[str, Any]:
    """Return the contents of a result's summary.json; empty before its first run."""
    if not result.evaluations:
        return {}
    verdict, message = result.verdict
    source_scores = result.source_scores
    wall = [seed["wall_seconds"] for seed in result.provenance["seeds"].values()]
    env_steps = int(min(curve.env_steps[-1] for curve in result.evaluations.values()))
    return {
        "env_steps": env_steps,
        "seeds": list(result.evaluations),
        f"mean_of_last_{FINAL}_evaluations": _statistics(result.finals),
        "as_the_source_measures": {
            "metric": result.reference.metric,
            "last": result.reference.last,
            **_statistics(result.scores),
        },
        **({} if source_scores is None else {"source_run": _statistics(source_scores)}),
        "gate": result.reference.gate,
        "verdict": verdict,
        "because": message,
        "wall_seconds": wall,
        "env_steps_per_second": round(env_steps * len(wall) / sum(wall), 1),
    }


def _statistics(scores: np.ndarray) -> dict[str, Any]:
    """Return the scores and their statistics, rounded because the last digits of a sum depend on the processor."""
    iqm, interval = aggregates.iqm_with_interval(scores[:, None, None])
    per_seed, mean, middle, ends = (
        [round(float(x), 2) for x in each] for each in (scores, [scores.mean()], iqm, interval[:, 0])
    )
    return {"per_seed": per_seed, "mean": mean[0], "worst": min(per_seed), "iqm": middle[0], "interval": ends}


def config_header(result: Result, summary: dict[str, Any]) -> str:
    """Return the comment lines at the top of a pinned config, the frozen config of a reported result."""
    lines = [f"make reproduce EXP={result.name}"]
    if summary:
        seconds, facts = max(summary["wall_seconds"]), result.provenance
        duration = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
        lines = [facts["command"], f"{_hardware(facts)}: {duration} a seed"]
        score = summary["as_the_source_measures"]
        lines.append(
            f"expected: {score['mean']:.1f} at {summary['env_steps']:,} env steps, {_describe_measure(result)}"
        )
    first = next(iter(result.reference.published), None)
    number = f"published: {first.number} ({first.family}, {first.env})" if first else "no published number"
    lines.append(f"{number}; {summary.get('verdict', 'not run')}")
    if extra := _required_extra(result):
        lines.append(f"needs the extra: {extra}")
    return "".join(f"# {line}\n" for line in lines)


def _hardware(facts: dict[str, Any]) -> str:
    device = facts["gpus"][0] if facts["gpus"] else facts["processor"]
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    others = " and other machines" if set(facts.get("mixed", ())) - {"python", "versions", "threads"} else ""
    return f"{device}, {facts['cpu_capability']}, {threads} of {facts['cores']} cores{others}"


def _describe_measure(result: Result) -> str:
    """Return how the score of a result is measured, in words; its source measures in the same way."""
    last, episodes = result.reference.last, result.config.eval.episodes
    return {
        "evaluations": f"{'last evaluation' if last == 1 else f'last {last} evaluations'} of {episodes} episodes",
        "training_episodes": f"last {last} training episodes",
        "training_env_steps": f"training episodes of the last {last:,} env steps",
    }[result.reference.metric]


def _required_extra(result: Result) -> str | None:
    """Return the extra that the env's YAML says must be installed, if any."""
    mark = "# needs the extra:"
    for file in sorted((paths.CONFIGS / "env").glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        if (yaml.safe_load(text) or {}).get("id") == result.config.env.id and mark in text:
            return text.split(mark)[1].splitlines()[0].strip()
    return None


def table_row(result: Result, summary: dict[str, Any], published: int | None = None) -> dict[str, str]:
    """Return the row of a result in the tables, by column.

    Args:
        result: The result.
        summary: Content of its summary.json; empty if it has not been run.
        published: Number of published numbers to show; None: all.
    """
    score = summary.get("as_the_source_measures")
    return {
        "result": f"[{result.algorithm} {result.env}{result.variant}](experiments/{result.name})",
        "env steps": f"{result.reference.env_steps:,}",
        "seeds": str(len(result.evaluations)) if result.evaluations else "",
        "ours": f"{score['mean']:.1f}" if score else "",
        "95% interval": _interval(score) if score and len(result.evaluations) > 1 else "",
        "worst seed": f"{score['worst']:.1f}" if score else "",
        "measured by": _describe_measure(result),
        "published": "; ".join(map(_citation, result.reference.published[:published])) or "none",
        "required": f"{result.reference.gate:g}: {result.reference.gate_from}",
        "verdict": summary.get("verdict", "not run"),
    }


def _interval(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{low:.1f} to {high:.1f}"


def _citation(published: Published) -> str:
    label, address = source_label(published), source_address(published)
    if address is None:
        return f"{published.number} ({label}: {published.source})"
    return f"{published.number} ([{label}]({address}))"


def source_label(published: Published) -> str:
    """Return who published a number, on which env, and over how many seeds."""
    runs = "one run" if published.seeds == 1 else f"{published.seeds} seeds"
    return f"{published.family}, {published.env}, {runs}"


def source_address(published: Published) -> str | None:
    """Return the web address of a published number's source; None if the source is a paper."""
    if published.source.startswith("https://"):
        return published.source
    repository, at, rest = published.source.partition("@")
    commit, _, path = rest.partition(":")
    path = re.sub(r":(\d+).*$", r"#L\1", path.split(" ")[0])
    return f"https://github.com/{repository}/blob/{commit}/{path}" if at and "/" in repository else None


def markdown_table(rows: list[dict[str, str]], columns: tuple[str, ...]) -> str:
    """Return a Markdown table with these columns of the rows."""
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _replace_between_marks(path: Path, text: str) -> str:
    """Return the content of a page with its generated part replaced by the text.

    Links in the text are relative to the repository's root, and are adapted to the page's folder.

    Raises:
        ConfigError: The page lacks the marks around its generated part.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(
            f"{path.relative_to(paths.ROOT)} lacks the lines {BEGIN} and {END}: put them back around the table"
        )
    if path.parent == paths.EXPERIMENTS:
        text = text.replace("](experiments/", "](")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def short_number(value: float) -> str:
    """Return a number with one decimal, or with four significant digits if it is small, such as a success rate."""
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.4g}"


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for the terminal: aligned columns, those of numbers to the right."""
    rows = [list(row) for row in rows]
    lines = []
    numeric = [all(re.fullmatch(r"-?[\d,.]*", row[i]) for row in rows) for i in range(len(columns))]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
