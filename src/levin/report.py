"""Rebuild all that follows from the stored curves. `python -m levin.report [check=true]`.

Of each result: the header of `config.yaml`, `summary.json`, `curve.png`. Of all: the tables in `experiments/README.md`
and `README.md`, and `experiments/aggregate.png`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf

from levin.config import cli
from levin.core import paths
from levin.core.errors import ConfigError, one_sentence
from levin.results import aggregates, figures
from levin.results.result import (
    CONFIG,
    FINAL,
    MAX_POLICY_BYTES,
    SUMMARY,
    Published,
    Result,
    fingerprints,
    judge_scores,
    result_folders,
)
from levin.runs.load import POLICY

BEGIN, END = "<!-- made by `make report` -->", "<!-- end -->"


def report(*, check: bool = False) -> list[str]:
    """Write everything that follows from the curves, or only compare.

    Args:
        check: Write nothing.

    Returns:
        One sentence for each file that is not what it should be.

    Raises:
        ConfigError: A result lacks its reference or a source in it.
    """
    results = [Result.read(cell) for cell in result_folders()]
    faults = {result.name: list(broken(result)) for result in results}
    wrong = [f"{name}: {each}" for name, found in faults.items() for each in found]
    if wrong and not check:
        raise ConfigError("; ".join(wrong))
    texts = dict(expected_texts([result for result in results if not faults[result.name]]))
    for path, text in texts.items():
        if not path.is_file() or path.read_text() != text:
            wrong.append(f"{path.relative_to(paths.ROOT)} does not follow from the curves")
            if not check:
                path.write_text(text)
    for path, source, draw in figures.expected(results):
        if figures.description(path) != source:
            wrong.append(f"{path.relative_to(paths.ROOT)} was not drawn from these curves")
            if not check:
                draw()
    return wrong


def broken(result: Result) -> Iterator[str]:
    """What no rebuilding mends: files that are not those of the provenance, and seeds that did not run to the end."""
    if not result.provenance:
        if result.evaluations:
            yield "there are curves without provenance.json"
        return
    for name, found in fingerprints(result.cell).items():
        if found != result.provenance["files"].get(name):
            yield f"{name} is not the file that provenance.json tells of"
    if sorted(map(str, result.evaluations)) != sorted(result.provenance["seeds"]):
        yield "the seeds of curves.csv.gz are not those of provenance.json"
    grids = [curve.env_steps.tolist() for curve in result.evaluations.values()]
    every = result.config.eval.every  # an iteration of whole episodes, or of several workers, ends a little later
    if any([step // every for step in grid] != [step // every for step in grids[0]] for grid in grids):
        yield "the seeds were not evaluated at the same env steps"
    if any(grid[-1] < result.config.total_env_steps for grid in grids):
        yield "a seed did not run to the end"
    if (result.cell / POLICY).stat().st_size > MAX_POLICY_BYTES:
        yield f"{POLICY} is larger than {MAX_POLICY_BYTES} bytes"


def expected_texts(results: list[Result]) -> Iterator[tuple[Path, str]]:
    """Every text file that is made here, as it should be."""
    rows = []
    for result in results:
        summary = summarise(result)
        rows.append(row(result, summary))
        yield result.cell / CONFIG, header(result, summary) + OmegaConf.to_yaml(result.config)
        if summary:
            yield result.cell / SUMMARY, json.dumps(summary, indent=2) + "\n"
    for path, columns in ((paths.EXPERIMENTS / "README.md", COLUMNS), (paths.ROOT / "README.md", SHORT)):
        yield path, _between_marks(path, table(rows, columns))


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


def header(result: Result, summary: dict[str, Any]) -> str:
    """The comments that a pinned config opens with."""
    lines = [f"make reproduce EXP={result.name}"]
    if summary:
        minutes, facts = max(summary["wall_seconds"]) / 60, result.provenance
        lines = [facts["command"], f"{_hardware(facts)}: {minutes:.0f} minutes a seed"]
        score = summary["as_the_source_measures"]
        lines.append(f"expected: {score['mean']:.1f} at {summary['env_steps']:,} env steps, {_measured(result)}")
    first = next(iter(result.reference.published), None)
    number = f"published: {first.number} ({first.family}, {first.env})" if first else "no published number"
    lines.append(f"{number}; {summary.get('verdict', 'not run')}")
    if extra := _extra(result):
        lines.append(f"needs the extra: {extra}")
    return "".join(f"# {line}\n" for line in lines)


def _hardware(facts: dict[str, Any]) -> str:
    device = facts["gpus"][0] if facts["gpus"] else facts["processor"]
    threads = f"{facts['threads']} thread{'s' if facts['threads'] > 1 else ''}"
    return f"{device}, {facts['cpu_capability']}, {threads} of {facts['cores']} cores"


def _measured(result: Result) -> str:
    """How this result is measured, as its source is."""
    last, episodes = result.reference.last, result.config.eval.episodes
    return {
        "evaluations": f"{'last evaluation' if last == 1 else f'last {last} evaluations'} of {episodes} episodes",
        "training_episodes": f"last {last} training episodes",
        "training_env_steps": f"training episodes of the last {last:,} env steps",
    }[result.reference.metric]


def _extra(result: Result) -> str | None:
    """What the env's YAML says must be installed."""
    mark = "# needs the extra:"
    for file in sorted((paths.CONFIGS / "env").glob("*.yaml")):
        text = file.read_text()
        if (yaml.safe_load(text) or {}).get("id") == result.config.env.id and mark in text:
            return text.split(mark)[1].splitlines()[0].strip()
    return None


COLUMNS = ("result", "env steps", "seeds", "ours", "95% interval", "measured by", "published", "gate", "verdict")
SHORT = ("result", "env steps", "seeds", "ours", "published, nearest", "verdict")


def row(result: Result, summary: dict[str, Any]) -> dict[str, str]:
    """A result in the tables."""
    ours = summary.get("as_the_source_measures")
    return {
        "result": f"[{result.algorithm} {result.env}{result.variant}](experiments/{result.name})",
        "env steps": f"{result.reference.env_steps:,}",
        "seeds": str(len(result.evaluations)),
        "ours": f"{ours['mean']:.1f}" if ours else "",
        "95% interval": f"{ours['interval'][0]:.1f} to {ours['interval'][1]:.1f}" if ours else "",
        "measured by": _measured(result),
        "published": "; ".join(map(_cited, result.reference.published)) or "none",
        "published, nearest": next(map(_cited, result.reference.published), "none"),
        "gate": f"{result.reference.gate:g}: {result.reference.gate_from}",
        "verdict": summary.get("verdict", "not run"),
    }


def _cited(published: Published) -> str:
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


def table(rows: list[dict[str, str]], columns: tuple[str, ...]) -> str:
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


def main() -> None:
    """Say what was rebuilt; with check=true, what is wrong, and exit 1."""
    with one_sentence():
        arguments = cli.arguments(report)
        wrong = report(**arguments)
    if arguments.get("check"):
        print("\n".join(wrong) or "every number follows from its curves")
        raise SystemExit(1 if wrong else 0)
    print(
        "\n".join(each.replace(" does not follow", ": rebuilt, did not follow") for each in wrong)
        or "nothing to rebuild"
    )


if __name__ == "__main__":
    main()
