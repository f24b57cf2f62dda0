"""Tables and texts in `experiments/` and the README that follow from the stored curves."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    judge_scores,
)

BEGIN, END = "<!-- made by `make report` -->", "<!-- end -->"


def expected_texts(results: list[Result]) -> Iterator[tuple[Path, str]]:
    """Every text file that is made here, as it should be."""
    rows = []
    for result in results:
        summary = summarise(result)
        rows.append(table_row(result, summary))
        yield result.cell / CONFIG, config_header(result, summary) + OmegaConf.to_yaml(result.config)
        if summary:
            yield result.cell / SUMMARY, json.dumps(summary, indent=2) + "\n"
    for path, columns in ((paths.EXPERIMENTS / "README.md", COLUMNS), (paths.ROOT / "README.md", SHORT)):
        yield path, _between_marks(path, markdown_table(rows, columns))


def summarise(result: Result) -> dict[str, Any]:
    """The numbers of a result; empty before the first run."""
    if not result.evaluations:
        return {}
    verdict, said = judge_scores(result.reference, result.scores)
    wall = [each["wall_seconds"] for each in result.provenance["seeds"].values()]
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
        "gate": result.reference.gate,
        "verdict": verdict,
        "because": said,
        "wall_seconds": wall,
        "env_steps_per_second": round(env_steps * len(wall) / sum(wall), 1),
    }


def _statistics(scores: np.ndarray) -> dict[str, Any]:
    """Rounded: the last digits of a sum depend on the processor."""
    iqm, interval = aggregates.iqm_with_interval(scores[:, None, None])
    per_seed, mean, middle, ends = (
        [round(float(x), 2) for x in each] for each in (scores, [scores.mean()], iqm, interval[:, 0])
    )
    return {"per_seed": per_seed, "mean": mean[0], "iqm": middle[0], "interval": ends}


def config_header(result: Result, summary: dict[str, Any]) -> str:
    """The comments that a pinned config opens with."""
    lines = [f"make reproduce EXP={result.name}"]
    if summary:
        minutes, facts = max(summary["wall_seconds"]) / 60, result.provenance
        lines = [facts["command"], f"{_hardware(facts)}: {minutes:.0f} minutes a seed"]
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
    return f"{device}, {facts['cpu_capability']}, {threads} of {facts['cores']} cores"


def _describe_measure(result: Result) -> str:
    """How this result is measured, as its source is."""
    last, episodes = result.reference.last, result.config.eval.episodes
    return {
        "evaluations": f"{'last evaluation' if last == 1 else f'last {last} evaluations'} of {episodes} episodes",
        "training_episodes": f"last {last} training episodes",
        "training_env_steps": f"training episodes of the last {last:,} env steps",
    }[result.reference.metric]


def _required_extra(result: Result) -> str | None:
    """What the env's YAML says must be installed."""
    mark = "# needs the extra:"
    for file in sorted((paths.CONFIGS / "env").glob("*.yaml")):
        text = file.read_text()
        if (yaml.safe_load(text) or {}).get("id") == result.config.env.id and mark in text:
            return text.split(mark)[1].splitlines()[0].strip()
    return None


COLUMNS = ("result", "env steps", "seeds", "ours", "95% interval", "measured by", "published", "gate", "verdict")
SHORT = ("result", "env steps", "seeds", "ours", "published, nearest", "verdict")


def table_row(result: Result, summary: dict[str, Any]) -> dict[str, str]:
    """A result in the tables."""
    ours = summary.get("as_the_source_measures")
    return {
        "result": f"[{result.algorithm} {result.env}{result.variant}](experiments/{result.name})",
        "env steps": f"{result.reference.env_steps:,}",
        "seeds": str(len(result.evaluations)),
        "ours": f"{ours['mean']:.1f}" if ours else "",
        "95% interval": f"{ours['interval'][0]:.1f} to {ours['interval'][1]:.1f}" if ours else "",
        "measured by": _describe_measure(result),
        "published": "; ".join(map(_citation, result.reference.published)) or "none",
        "published, nearest": next(map(_citation, result.reference.published), "none"),
        "gate": f"{result.reference.gate:g}: {result.reference.gate_from}",
        "verdict": summary.get("verdict", "not run"),
    }


def _citation(published: Published) -> str:
    runs = "one run" if published.seeds == 1 else f"{published.seeds} seeds"
    repository, at, rest = published.source.partition("@")
    commit, _, path = rest.partition(":")
    path = re.sub(r":(\d+).*$", r"#L\1", path.split(" ")[0])
    name = f"{published.family}, {published.env}, {runs}"
    if published.source.startswith("https://"):
        return f"{published.number} ([{name}]({published.source}))"
    if at and "/" in repository:
        return f"{published.number} ([{name}](https://github.com/{repository}/blob/{commit}/{path}))"
    return f"{published.number} ({name}: {published.source})"


def markdown_table(rows: list[dict[str, str]], columns: tuple[str, ...]) -> str:
    """In Markdown."""
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _between_marks(path: Path, text: str) -> str:
    """The page with its generated part replaced. Links are those of the page's own folder."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path.relative_to(paths.ROOT)} has lost its marks {BEGIN} and {END}")
    if path.parent == paths.EXPERIMENTS:
        text = text.replace("](experiments/", "](")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"
