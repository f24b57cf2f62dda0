"""Read a reported result from its folder `experiments/<algo>_<env>/`, and judge its scores.

`config.yaml` is the pinned config: the config that was run, frozen. `curves.csv.gz` has every evaluation of every seed,
`training.csv.gz` the returns of the training episodes, and `policy.ckpt` the policy of the lowest seed.
`provenance.json` says on what commit and machine they were made. `reference.yaml` has the published numbers with their
sources, and the required score (`gate`). `source_curves.csv.gz` or `source_training.csv.gz`, if there is one, has the
curves of the source's own code, run on the same machine. `scripts/agents.py` draws `policy.webp`, `levin.report` all
other files, from these.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import yaml
from omegaconf import DictConfig

from levin.core import paths
from levin.core.errors import ConfigError, valid_names
from levin.core.omega import to_plain
from levin.core.validate import read_json
from levin.results.curves import CURVES, SOURCE_CURVES, SOURCE_TRAINING, TRAINING, Curve, Curves, read_curves
from levin.runs.folder import CONFIG, PROVENANCE
from levin.runs.load import POLICY, load_config

MAX_POLICY_BYTES = 7 << 20  # in the repository: the CNN of Atari games, the largest network, has 6.8 MB
ANIMATION = "policy.webp"  # of the stored policy, by scripts/agents.py
REFERENCE, SUMMARY, PICTURE = "reference.yaml", "summary.json", "curve.png"
SEEDS_OF_A_REPRODUCTION = 3
TASK_KEYS = ("observation_entries", "wrappers", "kwargs", "pixels", "action_repeat", "time_limit")
FINAL = 10  # number of last evaluations whose mean is the final return of a run

Verdict = Literal["exceeds", "reproduced", "passed", "matched", "inconclusive", "partial", "not run"]


# Text that is copied into comments and tables: one line, without the characters that have a meaning there.
Line = Annotated[str, pydantic.Field(pattern=r"^[^\n\r|<>]*$")]
Count = Annotated[int, pydantic.Field(gt=0, le=2**53)]


class Published(pydantic.BaseModel, extra="forbid", frozen=True):
    """A number that others have published."""

    family: Line  # authors or library, and version
    env: Line
    mean: float
    std: float | None  # standard deviation over seeds
    seeds: pydantic.PositiveInt
    metric: Line
    # repository@commit:path, an address, or a paper with its year
    source: str = pydantic.Field(pattern=r"^([\w.-]+/[\w.-]+@\w+:|https://|[^\n\r|<>]* \d{4})[^\n\r|<>]*$")

    @property
    def number(self) -> str:
        """Mean, with the standard deviation if there is one."""
        return f"{self.mean:g}" if self.std is None else f"{self.mean:g} ± {self.std:g}"


class SourceRun(pydantic.BaseModel, extra="forbid", frozen=True):
    """Training runs of the source's own code, on the machine and with the env version of the result."""

    family: Line  # library and version
    env: Line
    command: Line
    sha256: Line  # of the file with the curves


class Reference(pydantic.BaseModel, extra="forbid", frozen=True):
    """Published numbers that a result is compared with, and its required score.

    `gate` is the required score, and `gate_from` says how it was chosen. The first published number is the one that
    `gate` comes from. It has normalised score 1, and decides whether a result can be "reproduced" or only "passed".

    `metric` and `last` say what our score is: the mean of the `last` evaluations (deterministic episodes), of the
    `last` training episodes, or of the training episodes in the `last` env steps. The kind is that of the source, which
    may average another number of them (`published.metric`).
    """

    env_steps: Count
    metric: Literal["evaluations", "training_episodes", "training_env_steps"]
    last: Count
    gate: float
    gate_from: Line
    random_return: float  # mean return of uniform actions, which has normalised score 0
    published: list[Published]  # empty if there is no published number
    source_run: SourceRun | None = None

    @property
    def source_file(self) -> str:
        """Name of the file with the curves of the source's own code."""
        return SOURCE_CURVES if self.metric == "evaluations" else SOURCE_TRAINING

    @property
    def has_spread(self) -> bool:
        """Return whether the source gives a standard deviation over enough seeds to call a result reproduced."""
        first = next(iter(self.published), None)
        return first is not None and first.seeds >= SEEDS_OF_A_REPRODUCTION and first.std is not None

    def normalise(self, returns: np.ndarray) -> np.ndarray:
        """Return normalised returns: 0 is the return of uniform actions, 1 the published number."""
        return (returns - self.random_return) / (self.published[0].mean - self.random_return)

    @property
    def normalised_std(self) -> float | None:
        """Published standard deviation on the scale of normalised returns; None if the source reports none."""
        published = self.published[0]
        return None if published.std is None else published.std / abs(published.mean - self.random_return)


class StoredSeed(pydantic.BaseModel):
    """Facts of provenance.json about one seed."""

    date: Line
    wall_seconds: pydantic.PositiveFloat


class StoredProvenance(pydantic.BaseModel):
    """Contents of a result's provenance.json, as far as Levin reads them."""

    command: Line
    git_sha: Line
    versions: dict[str, Line | None]
    processor: Line
    cpu_capability: Line
    cores: pydantic.PositiveInt
    threads: pydantic.PositiveInt
    gpus: list[Line]
    mixed: list[Line] = []  # facts that were not the same in all sessions
    seeds: dict[Annotated[str, pydantic.Field(pattern=r"^\d{1,18}$")], StoredSeed]
    files: dict[str, Line]


def result_path(exp: str) -> Path:
    """Return the path of a result's folder, which need not exist.

    Raises:
        ConfigError: The name has other letters than a-z, digits and `_`.
    """
    if not exp:
        raise ConfigError("exp is missing: set exp=<name of a result in experiments/> (with make: EXP=<name>)")
    if not re.fullmatch(r"[a-z0-9_]+", exp):
        raise ConfigError(f"exp={exp}: the name of a result has only the letters a-z, digits and _")
    return paths.EXPERIMENTS / exp


def result_folder(exp: str) -> Path:
    """Return the folder of a result.

    Raises:
        ConfigError: There is no result of this name.
    """
    folder = result_path(exp)
    if not (folder / CONFIG).is_file():
        names = [other.name for other in result_folders()]
        raise ConfigError(
            f"exp={exp} is not a result in experiments/; {valid_names(exp, names)}; make pin starts a new one"
        )
    return folder


def result_folders() -> list[Path]:
    """Return the folders of all results, sorted by name."""
    return sorted(result_path(file.parent.name) for file in paths.EXPERIMENTS.glob(f"*/{CONFIG}"))


def read_reference(folder: Path) -> Reference:
    """Return the contents of a result's reference.yaml.

    Raises:
        ConfigError: The file is missing or not valid, such as a number without a source.
    """
    file = folder / REFERENCE
    try:
        return Reference(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder.name} has no {REFERENCE}, which must name the published numbers and their sources"
        ) from error
    except (pydantic.ValidationError, TypeError, ValueError, yaml.YAMLError, OSError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        message = " ".join(f"{where}: {first['msg']}".split())
        raise ConfigError(f"{folder.name}/{REFERENCE}: {message}") from error


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the contents of a result's provenance.json; empty before its first run.

    Raises:
        ConfigError: The file is damaged.
    """
    file = folder / PROVENANCE
    try:
        return read_json(file, StoredProvenance) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from error


def file_fingerprints(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the result's config, curves and policy. Comment lines of the config are left out."""
    fingerprints = {}
    for name in (CONFIG, CURVES, TRAINING, POLICY):
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if name == CONFIG:
            content = b"".join(line for line in content.splitlines(keepends=True) if not line.startswith(b"#"))
        fingerprints[name] = hashlib.sha256(content).hexdigest()
    return fingerprints


def score_seeds(evaluations: Curves, training: Curves, reference: Reference) -> np.ndarray:
    """Return the score of each seed, `[seeds]`, measured in the way of the reference's source.

    Raises:
        ConfigError: A seed has not reached the reference's env steps.
    """
    curves = evaluations if reference.metric == "evaluations" else training
    scores = []
    for seed, curve in sorted(curves.items()):
        if not len(curve.env_steps) or evaluations[seed].env_steps[-1] < reference.env_steps:
            raise ConfigError(f"seed {seed} has not reached {reference.env_steps} env steps")
        scores.append(_score(curve.until(reference.env_steps), reference))
    return np.array(scores)


def score_source(source: Curves, reference: Reference) -> np.ndarray | None:
    """Return the score of each seed of the source's own code, `[seeds]`; None if it was not run.

    Raises:
        ConfigError: A seed has not reached the reference's env steps. The last 1% may be without a training episode.
    """
    share = 1.0 if reference.metric == "evaluations" else 0.99
    for seed, curve in source.items():
        if curve.env_steps[-1] < share * reference.env_steps:
            raise ConfigError(f"{reference.source_file}: seed {seed} has not reached {reference.env_steps} env steps")
    scores = [_score(curve.until(reference.env_steps), reference) for _, curve in sorted(source.items())]
    return np.array(scores) if scores else None


def _score(curve: Curve, reference: Reference) -> float:
    if reference.metric == "evaluations":
        return float(curve.return_mean[-reference.last :].mean())
    episodes = curve.second.copy()
    if reference.metric == "training_env_steps":
        episodes[curve.env_steps <= curve.env_steps[-1] - reference.last] = 0
    else:  # the oldest row in the window counts with only those of its episodes that are among the `last`
        newer = np.cumsum(episodes[::-1])[::-1] - episodes
        episodes = np.clip(reference.last - newer, 0, episodes)
    return float(np.average(curve.return_mean, weights=episodes))


def judge_scores(reference: Reference, scores: np.ndarray, source: np.ndarray | None = None) -> tuple[Verdict, str]:
    """Judge the scores `[seeds]` against the required score; return the verdict and a message with the numbers.

    Args:
        reference: Required score, and the published numbers that it comes from.
        scores: Score of each of our seeds.
        source: Score of each seed `[seeds]` of the source's own code, run here.

    In this list, the interval is the 95% interval of the interquartile mean over our seeds.

    Verdicts:
        - "exceeds": the source has a standard deviation over at least three seeds, and the interval lies above the
          published mean plus this deviation.
        - "reproduced": the source has one, and the interval lies at or above the required score.
        - "passed": the interval lies at or above the required score, but the source has no such deviation.
        - "inconclusive": the required score lies inside the interval.
        - "partial": the interval lies below the required score; or the source has such a deviation, but we have fewer
          than three seeds.
        - "matched": it would be "inconclusive" or "partial", but the source's own code, run here, misses the required
          score as well on average, and our mean is neither below its worst seed nor below its mean less one standard
          deviation. "matched" needs three seeds of ours and of the source.
        - "not run": there are no scores.
    """
    verdict, message = _judge_by_gate(reference, scores)
    if source is None or reference.source_run is None or not len(scores):
        return verdict, message
    mean = float(source.mean())
    message += f"; {reference.source_run.family} here: mean of {len(source)} seed{'s' * (len(source) > 1)} {mean:.1f}"
    if min(len(scores), len(source)) < SEEDS_OF_A_REPRODUCTION:
        return verdict, message
    std = float(source.std(ddof=1))
    needed = max(float(source.min()), mean - std)
    message += f" ± {std:.1f}, to match: {needed:.1f}"
    if verdict in ("inconclusive", "partial") and mean < reference.gate and scores.mean() >= needed:
        return "matched", message
    return verdict, message


def _judge_by_gate(reference: Reference, scores: np.ndarray) -> tuple[Verdict, str]:
    from levin.results import aggregates  # its libraries belong to an extra

    if not len(scores):
        return "not run", f"the required score is {reference.gate:g} at {reference.env_steps:,} env steps"
    mean, gate, n = float(scores.mean()), reference.gate, len(scores)
    _, ends = aggregates.iqm_with_interval(scores[:, None, None])
    low, high = float(ends[0, 0]), float(ends[1, 0])
    message = f"mean of {n} seeds {mean:.1f}, 95% interval {low:.1f} to {high:.1f}" if n > 1 else f"one seed {mean:.1f}"
    message += f", required score {gate:g} ({reference.gate_from})"
    if not high >= gate:  # also if a score is not a number
        return "partial", f"{message}: {'the interval ends' if n > 1 else 'it is'} {gate - high:.1f} below"
    if reference.has_spread and n < SEEDS_OF_A_REPRODUCTION:
        return "partial", f"{message}: {SEEDS_OF_A_REPRODUCTION} seeds are needed"
    if low < gate:
        return "inconclusive", f"{message}: the required score lies inside the interval"
    if not reference.has_spread:
        return "passed", message
    first = reference.published[0]
    return "exceeds" if low > first.mean + (first.std or 0) else "reproduced", message


@dataclass(frozen=True)
class Result:
    """A reported result as read from its folder, with its scores."""

    folder: Path
    config: DictConfig
    reference: Reference
    provenance: dict[str, Any]
    evaluations: Curves
    training: Curves
    source: Curves  # of the source's own code, run here

    @classmethod
    def read(cls, folder: Path) -> "Result":
        """Read a result from its folder in experiments/."""
        reference = read_reference(folder)
        return cls(
            folder,
            load_config(folder, code_sections=()),
            reference,
            read_provenance(folder),
            read_curves(folder),
            read_curves(folder, TRAINING),
            read_curves(folder, reference.source_file),
        )

    @property
    def name(self) -> str:
        """Name of the result: that of its folder."""
        return self.folder.name

    @property
    def algorithm(self) -> str:
        """Class name of the algorithm."""
        return self.config.algo._target_.rpartition(".")[2]

    @property
    def env(self) -> str:
        """Id of the env, without the module that registers it."""
        return self.config.env.id.rpartition(":")[2]

    @property
    def variant(self) -> str:
        """Words of the folder's name besides algorithm and env, in parentheses, such as ` (online)`; often empty."""
        usual = self.config.name.split("_")
        extra = [word for word in self.name.split("_") if word not in usual]
        return f" ({' '.join(extra)})" if extra else ""

    @property
    def task(self) -> tuple[str, ...]:
        """Env, what the agent sees of it, and number of env steps: results are compared if these are equal."""
        env = to_plain(self.config.env)
        seen = [env.get(key) for key in TASK_KEYS]  # older configs lack some of them
        changed = [str(value) if value not in (None, [], {}, 1) else "" for value in seen]
        return self.config.env.id, *changed, str(self.config.total_env_steps)

    @property
    def compared(self) -> Curves:
        """Curves of the kind that the published number comes from: evaluations, or training episodes."""
        return self.evaluations if self.reference.metric == "evaluations" else self.training

    @property
    def scores(self) -> np.ndarray:
        """Score of each seed, `[seeds]`, measured in the way of the reference's source."""
        return score_seeds(self.evaluations, self.training, self.reference)

    @property
    def source_scores(self) -> np.ndarray | None:
        """Score of each seed of the source's own code, `[seeds]`; None if it was not run."""
        return score_source(self.source, self.reference)

    @property
    def verdict(self) -> tuple[Verdict, str]:
        """Verdict, and a message with the numbers."""
        return judge_scores(self.reference, self.scores, self.source_scores)

    @property
    def finals(self) -> np.ndarray:
        """Final return of each seed, `[seeds]`: the mean of its last evaluations."""
        return np.array([curve.return_mean[-FINAL:].mean() for curve in self.evaluations.values()])

    @property
    def last_tenth(self) -> np.ndarray:
        """Mean evaluation return of each seed in the last tenth of its run, `[seeds]`."""
        start = 0.9 * self.config.total_env_steps
        return np.array(
            [
                curve.return_mean[np.append(curve.env_steps[:-1] > start, True)].mean()
                for curve in self.evaluations.values()
            ]
        )


def find_broken(result: Result) -> Iterator[str]:
    """Yield a message for each fault that `levin.report` can't repair.

    Faults are files that do not match the provenance, seeds that did not run to the end, and too large a policy.
    """
    if bool(result.source) != bool(result.reference.source_run):
        yield f"{result.reference.source_file} and source_run in {REFERENCE} belong together, and one is missing"
    elif result.reference.source_run:
        content = (result.folder / result.reference.source_file).read_bytes()
        if hashlib.sha256(content).hexdigest() != result.reference.source_run.sha256:
            yield f"{result.reference.source_file} does not match its checksum in {REFERENCE}"
    if not result.provenance:
        left = [
            name for name in (CURVES, TRAINING, POLICY, SUMMARY, PICTURE, ANIMATION) if (result.folder / name).exists()
        ]
        if left:
            yield f"{', '.join(left)} without provenance.json: remove them to run the result anew"
        return
    for name, fingerprint in file_fingerprints(result.folder).items():
        if fingerprint != result.provenance["files"].get(name):
            yield f"{name} does not match its checksum in provenance.json"
    if sorted(map(str, result.evaluations)) != sorted(result.provenance["seeds"]):
        yield "curves.csv.gz and provenance.json have different seeds"
    grids = [curve.env_steps.tolist() for curve in result.evaluations.values()]
    if not grids or not all(grids):
        yield "a seed has no evaluation"
        return
    # Compared by multiples: an iteration of whole episodes, or of several workers, ends a little later.
    every = result.config.eval.every
    if any([step // every for step in grid] != [step // every for step in grids[0]] for grid in grids):
        yield "the seeds were not evaluated at the same env steps"
    if any(grid[-1] < result.config.total_env_steps for grid in grids):
        yield "a seed ended before total_env_steps"
    if (result.folder / POLICY).is_file() and (result.folder / POLICY).stat().st_size > MAX_POLICY_BYTES:
        yield f"{POLICY} is larger than {MAX_POLICY_BYTES} bytes"
