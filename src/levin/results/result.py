"""A reported result: the folder `experiments/<algo>_<env>/`, and what its files say.

`config.yaml` is what was run, `curves.csv.gz` every evaluation of every seed, `training.csv.gz` the returns of the
training episodes, `provenance.json` where they came from, `reference.yaml` the published numbers and their sources.
Everything else follows from these: see `levin.report`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import yaml
from omegaconf import DictConfig

from levin.core import paths
from levin.core.errors import ConfigError, valid_names
from levin.results.curves import CURVES, TRAINING, Curve, Curves, read_curves
from levin.runs.load import POLICY, load_config

CONFIG = "config.yaml"
MAX_POLICY_BYTES = 1 << 20
PROVENANCE, REFERENCE, SUMMARY, PICTURE = "provenance.json", "reference.yaml", "summary.json", "curve.png"
SEEDS_OF_A_REPRODUCTION = 3
FINAL = 10  # evaluations whose mean is the end of a run

Verdict = Literal["reproduced", "passed", "partial", "not run"]


class Published(pydantic.BaseModel, extra="forbid", frozen=True):
    """A number that somebody else reported."""

    family: str  # who, and which version
    env: str
    mean: float
    std: float | None  # over seeds
    seeds: pydantic.PositiveInt
    metric: str
    source: str = pydantic.Field(pattern=r"^[\w.-]+/[\w.-]+@\w+:.+|^https://.+|^.* \d{4}.*")  # repository@commit:path

    @property
    def number(self) -> str:
        """The mean, and the deviation where there is one."""
        return f"{self.mean:g}" if self.std is None else f"{self.mean:g} ± {self.std:g}"


class Reference(pydantic.BaseModel, extra="forbid", frozen=True):
    """What a result is held against. The first of the published numbers is the one that the gate comes from.

    `metric` and `last` are how the source measures: the mean of the `last` evaluations (deterministic episodes), of the
    `last` training episodes, or of the training episodes in the `last` env steps.
    """

    env_steps: pydantic.PositiveInt
    metric: Literal["evaluations", "training_episodes", "training_env_steps"]
    last: pydantic.PositiveInt
    gate: float
    gate_from: str
    random_return: float  # of uniform actions: where the normalised score is 0
    published: list[Published]  # empty where nobody has reported one

    @property
    def has_spread(self) -> bool:
        """Whether the source has the seeds and the deviation that a reproduction can be held against."""
        first = next(iter(self.published), None)
        return first is not None and first.seeds >= SEEDS_OF_A_REPRODUCTION and first.std is not None

    def normalise(self, returns: np.ndarray) -> np.ndarray:
        """0 is what uniform actions get, 1 the published number."""
        return (returns - self.random_return) / (self.published[0].mean - self.random_return)


def result_folder(exp: str) -> Path:
    """Where the result of this name is.

    Raises:
        ConfigError: There is none.
    """
    found = paths.EXPERIMENTS / exp
    if not (found / CONFIG).is_file():
        names = [each.name for each in result_folders()]
        raise ConfigError(f"exp={exp} is no result in experiments/; {valid_names(exp, names)}; a new one: make pin")
    return found


def result_folders() -> list[Path]:
    """All of them, by name."""
    return sorted(each.parent for each in paths.EXPERIMENTS.glob(f"*/{CONFIG}"))


def read_reference(cell: Path) -> Reference:
    """The published numbers.

    Raises:
        ConfigError: They are not there, or one of them lacks its source.
    """
    file = cell / REFERENCE
    try:
        return Reference(**yaml.safe_load(file.read_text()))
    except FileNotFoundError as error:
        raise ConfigError(f"{cell.name} has no {REFERENCE}: a number without a source is no result") from error
    except (pydantic.ValidationError, TypeError) as error:
        said = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, said["loc"]))
        raise ConfigError(f"{cell.name}/{REFERENCE}: {where}: {said['msg']}") from error


def read_provenance(cell: Path) -> dict[str, Any]:
    """Where the curves came from; empty before the first run."""
    file = cell / PROVENANCE
    return json.loads(file.read_text()) if file.is_file() else {}


def file_fingerprints(cell: Path) -> dict[str, str]:
    """The SHA-256 of each file that a run made or was made from. Comments of the config do not count."""
    found = {}
    for name in (CONFIG, CURVES, TRAINING, POLICY):
        content = (cell / name).read_bytes() if (cell / name).is_file() else b""
        if name == CONFIG:
            content = b"".join(line for line in content.splitlines(keepends=True) if not line.startswith(b"#"))
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def score_seeds(evaluations: Curves, training: Curves, reference: Reference) -> np.ndarray:
    """One number of each seed, measured as the source does: `[seeds]`.

    Raises:
        ConfigError: A seed has not come to the reference's env steps.
    """
    of = evaluations if reference.metric == "evaluations" else training
    found = []
    for seed, curve in sorted(of.items()):
        if not len(curve.env_steps) or evaluations[seed].env_steps[-1] < reference.env_steps:
            raise ConfigError(f"seed {seed} has not come to {reference.env_steps} env steps")
        found.append(_score(curve.until(reference.env_steps), reference))
    return np.array(found)


def _score(curve: Curve, reference: Reference) -> float:
    if reference.metric == "evaluations":
        return float(curve.return_mean[-reference.last :].mean())
    episodes = curve.second.copy()
    if reference.metric == "training_env_steps":
        episodes[curve.env_steps <= curve.env_steps[-1] - reference.last] = 0
    else:  # of the oldest row in the window, only the episodes that are still within it
        newer = np.cumsum(episodes[::-1])[::-1] - episodes
        episodes = np.clip(reference.last - newer, 0, episodes)
    return float(np.average(curve.return_mean, weights=episodes))


def judge_scores(reference: Reference, found: np.ndarray) -> tuple[Verdict, str]:
    """What the scores `[seeds]` amount to, and one sentence with the numbers."""
    if not len(found):
        return "not run", f"the gate is {reference.gate:g} at {reference.env_steps:,} env steps"
    mean, gate, n = float(found.mean()), reference.gate, len(found)
    said = f"mean of {n} seed{'s' if n > 1 else ''} {mean:.1f}, gate {gate:g} ({reference.gate_from})"
    if mean < gate:
        return "partial", f"{said}: {gate - mean:.1f} below"
    if not reference.has_spread:
        return "passed", said
    if n < SEEDS_OF_A_REPRODUCTION:
        return "partial", f"{said}: reached, but {SEEDS_OF_A_REPRODUCTION} seeds are needed"
    return "reproduced", said


@dataclass(frozen=True)
class Result:
    """A cell as it was read, and what it amounts to."""

    cell: Path
    config: DictConfig
    reference: Reference
    provenance: dict[str, Any]
    evaluations: Curves
    training: Curves

    @classmethod
    def read(cls, cell: Path) -> "Result":
        """Read a folder in experiments/."""
        return cls(
            cell,
            load_config(cell),
            read_reference(cell),
            read_provenance(cell),
            read_curves(cell),
            read_curves(cell, TRAINING),
        )

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.cell.name

    @property
    def algorithm(self) -> str:
        """The name of its class."""
        return self.config.algo._target_.rpartition(".")[2]

    @property
    def env(self) -> str:
        """Its id, without the module that registers it."""
        return self.config.env.id.rpartition(":")[2]

    @property
    def variant(self) -> str:
        """What its folder's name says beyond algorithm and env, in brackets: ` (online)`; mostly nothing."""
        usual = self.config.name.split("_")
        more = [word for word in self.name.split("_") if word not in usual]
        return f" ({' '.join(more)})" if more else ""

    @property
    def task(self) -> tuple[str, int]:
        """What another algorithm must share to be compared."""
        return self.config.env.id, self.config.total_env_steps

    @property
    def scores(self) -> np.ndarray:
        """`[seeds]`, measured as the source does."""
        return score_seeds(self.evaluations, self.training, self.reference)

    @property
    def finals(self) -> np.ndarray:
        """`[seeds]`: the mean of the last evaluations of each."""
        return np.array([curve.return_mean[-FINAL:].mean() for curve in self.evaluations.values()])


def find_broken(result: Result) -> Iterator[str]:
    """What no rebuilding mends: files that are not those of the provenance, and seeds that did not run to the end."""
    if not result.provenance:
        if result.evaluations:
            yield "there are curves without provenance.json"
        return
    for name, found in file_fingerprints(result.cell).items():
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
