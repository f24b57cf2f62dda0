"""Write a run's policy as one file, check it over an episode, and write a card beside it."""

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from levin.core import files, paths
from levin.core.errors import ConfigError, RunError, one_line
from levin.core.network_input import NetworkInput
from levin.core.omega import to_plain
from levin.core.types import PolicyFormat
from levin.deploy.card import write_card
from levin.deploy.graph import PolicyGraph
from levin.envs.config import EVALUATION
from levin.envs.factory import load_env, make_env
from levin.results.result import REFERENCE
from levin.results.result import read_provenance as read_result
from levin.runs import checkpoint
from levin.runs.folder import read_provenance as read_run
from levin.runs.folder import report_changed_code
from levin.runs.load import load_config
from levin.runs.policy import Policy

NAMES = {"onnx": "policy.onnx", "torch": "policy.pt2"}
TOLERANCE = 1e-5  # largest difference of an action from that of `levin.load`, in units of `_scale`
METADATA = "metadata.json"
# Keys of the env's config that a caller must follow, and their values in configs of older runs.
PREPROCESSING = {"frame_stack": 1, "action_repeat": 1, "observation_entries": None, "pixels": None}

Function = Callable[[Sequence[NDArray]], list[NDArray]]


class Recorder(NetworkInput):
    """Converter of observations that keeps the last batch of the env's own observations."""

    raw: Any = None

    def __call__(self, observation: Any) -> Any:
        self.raw = deepcopy(observation)
        return super().__call__(observation)


def package(
    run: Path,
    format: PolicyFormat,  # noqa: A002
    *,
    seed: int,
    steps: int,
    out: str | None = None,
) -> tuple[Path, dict[str, float]]:
    """Write the policy of a run and its card, check it over an episode, and return its path and `compare`'s outcome.

    The arguments are as in `levin.export.export_run`.

    Raises:
        ConfigError: A package is missing, or the policy can't be exported.
        RunError: The actions differ by more than `TOLERANCE`; then no file is written.
    """
    source = checkpoint.run_of(run)
    config = load_env(source)
    if config.family == "dream" or config.wrappers:
        raise ConfigError(
            f"{run} has learned from the latent state of the world model in env.run={config.run}, which is not part of "
            "an exported file: act with levin.load instead"
        )
    folder = paths.output_folder(source, out)
    reference, graph = Policy.load(run), PolicyGraph(Policy.load(run))
    metadata = describe(graph, reference, source)
    write, load = (write_onnx, load_onnx) if format == "onnx" else (write_torch, load_torch)
    with files.replace(folder, NAMES[format]) as path:
        write(graph, metadata, path)
        env = make_env(config, seed=seed, purpose=EVALUATION, num_envs=1)
        report_changed_code(source)
        checked = compare(load(path), graph, reference, env, steps)
        env.close()
        if not checked["largest_difference"] <= TOLERANCE:
            raise RunError(
                f"the exported policy differs from levin.load by {checked['largest_difference']:.2g} within "
                f"{checked['steps']} steps, which is more than {TOLERANCE:g}: {NAMES[format]} was not written"
            )
    write_card(folder, NAMES[format], source, metadata, checked)
    return folder / NAMES[format], checked


def describe(graph: PolicyGraph, policy: Policy, run: Path) -> dict[str, Any]:
    """Return what a caller needs to know of the file: inputs, outputs, spaces, env, algorithm, commit."""
    config = load_config(run, code_sections=())
    plain = to_plain(config.env)
    inputs = dict(zip(graph.input_names, graph.example(1), strict=True))
    return {
        "inputs": {name: [*each.shape[1:]] for name, each in inputs.items()},
        "dtypes": {name: str(each.dtype).removeprefix("torch.") for name, each in inputs.items()},
        "outputs": graph.output_names,
        "memory": {name: list(shape) for name, shape in graph.memory.items()},
        "observation_space": _null_for_infinity(policy.shown),
        "action_space": _null_for_infinity(policy.env["action"]),
        "env": str(config.env.get("target") or config.env.id),
        **{key: plain.get(key, default) for key, default in PREPROCESSING.items()},
        "algorithm": type(policy.algorithm).__name__,
        "env_steps": policy.algorithm.env_steps,
        "commit": _commit(run),
    }


def _commit(run: Path) -> str | None:
    """Return the commits that trained the policy of a run, or the one of a result, whose policy has its lowest seed."""
    if not (run / REFERENCE).is_file():
        facts = read_run(run)
        commits = [each["git_sha"] for each in (facts, *facts.get("resumed", ())) if each.get("git_sha")]
        return ", ".join(dict.fromkeys(commits)) or None  # a run may have been resumed with other code
    facts = read_result(run)
    return facts["seeds"][min(facts["seeds"], key=int)].get("git_sha", facts["git_sha"]) if facts else None


def _null_for_infinity(value: Any) -> Any:
    """Return a space with None in place of infinite bounds, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _null_for_infinity(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_null_for_infinity(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def export_graph(graph: PolicyGraph) -> torch.export.ExportedProgram:
    """Trace a policy with a batch dimension of any size.

    Raises:
        ConfigError: An operation of the policy can't be traced.
    """
    num = torch.export.Dim("num", min=1)
    inputs = graph.example(2)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(graph, inputs, dynamic_shapes=((*({0: num} for _ in inputs),),), strict=False)
    except Exception as error:  # the code of a user's networks may fail in any way
        raise ConfigError(f"the policy can't be exported: {type(error).__name__}: {one_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out warnings about libraries that are not installed."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_torch(graph: PolicyGraph, metadata: dict[str, Any], path: Path) -> None:
    """Write a policy for `torch.export.load`, with the metadata as an extra file `metadata.json`."""
    torch.export.save(export_graph(graph), path, extra_files={METADATA: json.dumps(metadata)})


def write_onnx(graph: PolicyGraph, metadata: dict[str, Any], path: Path) -> None:
    """Write a policy as ONNX, with the metadata as properties of the model.

    Raises:
        ConfigError: The extra `export` is not installed, or an operation has no form in ONNX.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed: `make export` installs it, or type make .venv/.export"
        ) from error
    program = export_graph(graph)
    try:
        with torch.no_grad(), _quiet():
            exported = torch.onnx.export(
                program, input_names=graph.input_names, output_names=graph.output_names, dynamo=True, verbose=False
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ConfigError(f"the policy can't be written as ONNX, try format=torch: {one_line(error)}") from error
    assert exported is not None
    model = exported.model_proto
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.save(model, path)


def load_onnx(path: Path) -> Function:
    """Return a policy file as a function of the arrays of its inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda inputs: list(map(np.asarray, session.run(None, dict(zip(names, inputs, strict=True)))))


def load_torch(path: Path) -> Function:
    """Return a policy file as a function of the arrays of its inputs."""
    module = torch.export.load(path).module()

    def call(inputs: Sequence[NDArray]) -> list[NDArray]:
        with torch.no_grad():
            return [each.numpy() for each in module(*map(torch.from_numpy, inputs))]

    return call


def compare(function: Function, graph: PolicyGraph, reference: Policy, env: Any, steps: int) -> dict[str, float]:
    """Play an episode with `levin.load`, and compare the actions of the exported policy on the same observations.

    With a memory, each step is compared twice: after the memory of `levin.load`, and after the exported policy's own,
    in which differences by rounding may grow from step to step.

    Returns:
        `largest_difference` of the action of one step, relative to `_scale`; `own_memory_difference`, the same with its
        own memory; `steps`; and `microseconds` and `reference_microseconds`, the median times of an action.
    """
    env.read = recorder = Recorder(env.shown)
    env.to_env = np.asarray  # `levin.load` returns actions in the env's units
    first, done = np.ones(env.num_envs, dtype=bool), False  # several, if an `env.target` makes no single env
    env.begin([*range(env.num_envs)], first)
    own = given = [np.zeros((env.num_envs, *shape), np.float32) for shape in graph.memory.values()]
    differences, own_differences, times, reference_times = [], [], [], []
    while not done and len(differences) < steps:
        inputs = [*graph.split(recorder.raw), *([first[:, None]] if graph.has_memory else [])]
        begun = perf_counter()
        expected = reference(recorder.raw, first)
        reference_times.append(perf_counter() - begun)
        begun = perf_counter()
        actual, *own = function([*inputs, *own])
        times.append(perf_counter() - begun)
        scale = _scale(reference, expected)
        own_differences.append(_difference(actual, expected, scale))
        if graph.has_memory:
            actual, *_ = function([*inputs, *given])
            given = [reference.module.get_buffer(path).numpy().copy() for path in graph.memory_paths.values()]
        differences.append(_difference(actual, expected, scale))
        first = np.zeros(env.num_envs, dtype=bool)
        _, _, terminated, truncated, _ = env.step(expected)
        done = bool((terminated | truncated).any())
    return {
        "largest_difference": max(differences),
        "own_memory_difference": max(own_differences),
        "steps": len(differences),
        "microseconds": 1e6 * float(np.median(times)),
        "reference_microseconds": 1e6 * float(np.median(reference_times)),
    }


def _difference(actual: NDArray, expected: NDArray, scale: NDArray) -> float:
    return float((np.abs(actual.astype(float) - expected) / scale).max())


def _scale(policy: Policy, action: NDArray) -> NDArray:
    """Return the scale of actions `[N, *A]`, at least 1, with which the rounding errors of float32 grow.

    It is half the range of actions that are rescaled to their bounds, else their absolute value; 1 for discrete ones.
    """
    space = policy.env["action"]
    if space["type"] != "box":
        return np.ones(1)
    scale = np.abs(action.astype(float))
    if policy.env["action_units"] == "rescale":
        scale = (np.array(space["high"]) - np.array(space["low"])).reshape(space["shape"]) / 2
    return np.maximum(scale, 1)
