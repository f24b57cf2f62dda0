"""Checks that every row of rows.py must pass; test_toy.py runs them for a new algorithm as well."""

import copy
import csv
import hashlib
import inspect
import math
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch._dynamo.utils import counters

from levin import resume
from levin.algorithms.base import Algorithm
from levin.config import schema
from levin.config.compose import compose
from levin.core.omega import to_plain
from levin.deploy import package
from levin.deploy.graph import PolicyGraph
from levin.envs.config import EnvConfig
from levin.nn import cuda_graphs
from levin.runs.checkpoint_io import FolderCheckpointIO
from levin.runs.load import algorithm_class, export_policy
from levin.runs.policy import Policy
from levin.training.session import build_run, train
from recording import simulate_cuda_graphs
from rows import LATE, Row

CHECKS = []


def check(function):
    """Add a function to the list of checks."""
    CHECKS.append(function)
    return function


def run_row(row: Row, run: Path, *overrides: str, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Train a row and return its last checkpoint, replay buffer included."""
    all_overrides = [
        f"algo={row.algo}",
        f"env={row.env}",
        *LATE,
        "eval.episodes=2",
        *row.small,
        f"total_env_steps={row.env_steps}",
        *overrides,
    ]
    train(compose(all_overrides), run, ckpt_path=ckpt_path)
    return saved_state(run)


@cache
def _file_of(algo: str, compose: Callable[..., Any]) -> str:
    """Return the file of an algorithm's class; tests of the toy patch `compose` to find its YAML."""
    return inspect.getfile(algorithm_class(compose([f"algo={algo}"])))


PLAIN_RUNS = tempfile.TemporaryDirectory(prefix="levin-test-rows-")  # removed when the tests end


def plain_run(row: Row) -> Path:
    """Train a row without overrides, once for all its checks; return the run folder, which no check may change."""
    file = _file_of(row.algo, compose)
    key = repr((row.algo, row.env, row.small, row.env_steps, file, Path(file).read_text()))
    run = Path(PLAIN_RUNS.name, hashlib.sha256(key.encode()).hexdigest())
    if not run.exists():
        try:
            run_row(row, run)
        except BaseException:
            shutil.rmtree(run, ignore_errors=True)
            raise
    return run


def saved_state(run: Path) -> dict[str, Any]:
    """Return the contents of the last checkpoint of a run, without measured times."""
    state = FolderCheckpointIO(run / "checkpoints").load_checkpoint(run / "checkpoints" / "last" / "state.ckpt")
    if state.get("buffer"):
        state["buffer"]["data"] = torch.cat(list(state["buffer"]["data"])).flatten_keys().to_dict()
    del state["callbacks"]["Checkpointing"]  # its list of checkpoints: interrupting a run adds one
    row = state["callbacks"]["Metrics"]["row"]
    state["callbacks"]["Metrics"]["row"] = {key: value for key, value in row.items() if not key.startswith("time/")}
    return state


def build_algorithm(*overrides: str) -> Any:
    """Build an algorithm with its optimizers, without a Trainer."""
    return _build(compose(list(overrides)))[0]


def _build(config: DictConfig) -> tuple[Any, Any]:
    """Build an algorithm with its optimizers, and its loader of rollouts."""
    algorithm, rollouts = build_run(config)
    algorithm.configure_optimizers()
    algorithm.manual_backward = torch.Tensor.backward
    return algorithm, rollouts


def build_row(row: Row, *overrides: str) -> Algorithm:
    """Build the algorithm of a row with its optimizers, without a Trainer."""
    return build_algorithm(f"algo={row.algo}", f"env={row.env}", *LATE, *row.small, *overrides)


def run_without_trainer(config: DictConfig) -> dict[str, torch.Tensor]:
    """Train as `train` does, but without a run folder, metrics and evaluations; return the state of the algorithm."""
    algorithm, rollouts = _build(config)
    for number, rollout in enumerate(rollouts):
        algorithm.on_train_batch_start(rollout, number)
        algorithm.training_step(rollout, number)
        if algorithm.finished(config.total_env_steps):
            break
    rollouts.collector.shutdown()
    return dict(algorithm.state_dict())


def with_value(config: DictConfig, key: str, value: Any) -> DictConfig:
    """Return a composed config with another value of a key; a text is read as YAML, as in an override."""
    changed = copy.deepcopy(config)
    OmegaConf.set_readonly(changed, False)
    OmegaConf.update(changed, key, OmegaConf.create(f"x: {value}").x)
    schema.check(changed)
    return changed


def make_batch(algorithm: Algorithm, size: int = 8) -> TensorDict:
    """Return random transitions `[size]` in the spaces of the algorithm's env."""
    generator = torch.Generator().manual_seed(1)
    space, action = algorithm.env["observation"], algorithm.env["action"]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator)

    actions = (
        normal(*action["shape"]).tanh() * 0.9
        if action["type"] == "box"
        else torch.randint(action["n"], (size,), generator=generator)
    )
    seen, follows = normal(*space["shape"]), normal(*space["shape"])
    if space["dtype"] == "uint8":
        seen, follows = ((128 + 40 * each).clamp(0, 255).byte() for each in (seen, follows))
    flags = torch.zeros(size, 1, dtype=torch.bool)
    after = {"observation": follows, "reward": normal(1), "terminated": flags.clone()}
    after |= {"truncated": flags.clone(), "done": flags.clone()}
    return TensorDict({"observation": seen, "action": actions, "next": after}, batch_size=(size,))


def same(a: Any, b: Any) -> bool:
    """Return whether two nested values are bitwise equal."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def metrics(run: Path) -> list[dict[str, str]]:
    """Read the rows of metrics.csv, without the columns of measured times."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


@check
def optimizers_step_and_parameters_move(row: Row, tmp_path: Path) -> None:
    """Check that training changes every trainable parameter, and that only target networks are frozen."""
    before = build_row(row)
    trainable = {name for name, parameter in before.named_parameters() if parameter.requires_grad}
    after = saved_state(plain_run(row))["state_dict"]
    assert trainable
    for name in trainable:
        assert not torch.equal(before.state_dict()[name], after[name]), f"{name} did not move"
    frozen = {name for name, parameter in before.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in after if name.split(".")[0] in row.targets}


@check
def mixed_precision_keeps_parameters_whole(row: Row, tmp_path: Path) -> None:
    """Check that bf16-mixed precision trains other parameters; they, statistics and moments stay in full precision."""
    before = build_row(row)
    state = run_row(row, tmp_path / "run", "trainer.precision=bf16-mixed")
    after = state["state_dict"]
    assert not same(after, saved_state(plain_run(row))["state_dict"]), "bf16-mixed has no effect"
    for name, value in before.state_dict().items():
        assert after[name].dtype == value.dtype
        assert after[name].isfinite().all(), name
    for name, parameter in before.named_parameters():
        rounded = after[name].bfloat16().to(parameter)
        assert not parameter.requires_grad or not torch.equal(rounded, after[name]), f"{name} did not move"
    moments = [each for optimizer in state["optimizer_states"] for each in optimizer.get("state", {}).values()]
    assert {value.dtype for each in moments for value in each.values()} <= {torch.float32}


@check
def cadence_is_what_the_row_says(row: Row, tmp_path: Path) -> None:
    """Check that every optimizer makes as many steps per update as the row says."""
    state = saved_state(plain_run(row))
    updates = state["levin"]["updates"]
    assert updates >= 8
    # Without an optimizer, Lightning saves an empty state.
    optimizers = [each for each in state["optimizer_states"] if each]
    assert len(optimizers) == len(row.optimizers)
    for optimizer, per_update in zip(optimizers, row.optimizers.values(), strict=True):
        steps = {int(each["step"]) for each in optimizer["state"].values()}
        assert steps == {int(updates * per_update)}


@check
def targets_follow_their_source(row: Row, tmp_path: Path) -> None:
    """Check that target networks start as copies and move by tau towards their source, as often as the row says."""
    for name, (source, tau, every) in row.targets.items():
        algorithm = build_row(row)
        target, online = getattr(algorithm, name), getattr(algorithm, source)
        assert all(torch.equal(a, b) for a, b in zip(target.parameters(), online.parameters(), strict=True))
        for parameter in target.parameters():  # far from the source, to make a small step visible
            parameter.data += torch.randn_like(parameter)
        for update in range(1, 2 * every + 1):
            before = [parameter.clone() for parameter in target.parameters()]
            algorithm.update(row.batch(algorithm, make_batch(algorithm)))
            algorithm.updates = update
            for old, new, source_value in zip(before, target.parameters(), online.parameters(), strict=True):
                expected = old + tau * (source_value - old) if update % every == 0 else old
                torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-6)


@check
def another_seed_another_run(row: Row, tmp_path: Path) -> None:
    """Check that another seed gives other parameters; `resume_is_exact` checks that the same seed gives the same."""
    first = saved_state(plain_run(row))
    other = run_row(row, tmp_path / "run", "seed=1")
    names = [name for name in first["state_dict"] if not name.endswith(".count")]
    different = [name for name in names if not torch.equal(first["state_dict"][name], other["state_dict"][name])]
    assert len(different) >= len(names) - len(row.targets) * 4


@check
def resume_is_exact(row: Row, tmp_path: Path) -> None:
    """Check that a run with the same seed that is resumed halfway is identical to an uninterrupted one.

    The global generators have another state before each half than before the uninterrupted run.
    """
    overrides = [f"algo={row.algo}", f"env={row.env}"]
    # The first half needs the schedule of the full run, which ends with the run.
    annealed = compose(overrides).algo.get("schedule_env_steps") is not None
    schedule = [f"algo.schedule_env_steps={row.env_steps}"] if annealed else []
    straight = plain_run(row)
    expected = saved_state(straight)
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    run_row(row, tmp_path / "halves", *schedule, f"total_env_steps={row.env_steps // 2}")
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    resume.resume(run=str(tmp_path / "halves"), total_env_steps=row.env_steps)
    resumed = saved_state(tmp_path / "halves")
    assert expected.keys() == resumed.keys()
    for key in expected:
        assert same(expected[key], resumed[key]), key
    assert metrics(straight) == metrics(tmp_path / "halves")


@check
def truncation_bootstraps_and_termination_does_not(row: Row, tmp_path: Path) -> None:
    """Check that the critic loss does not depend on `truncated` but depends on `terminated`."""
    if row.bootstraps is None:
        pytest.fail("the row has no `bootstraps`")
    algorithm = build_row(row)

    def loss(**flags: bool) -> torch.Tensor:
        batch = make_batch(algorithm)
        for name, value in flags.items():
            batch["next", name] = torch.full_like(batch["next", name], value)
        torch.manual_seed(0)
        return row.bootstraps(algorithm, batch)

    torch.testing.assert_close(loss(truncated=True, done=True), loss(), rtol=0, atol=0)
    assert not torch.allclose(loss(terminated=True, done=True), loss())


@check
def losses_equal_the_oracle(row: Row, tmp_path: Path) -> None:
    """Check that the losses equal those of the reference implementation."""
    if row.oracle is None or row.losses is None:
        pytest.skip("there is no reference implementation of these losses")
    # At the default temperature of 1, alpha and its logarithm or a missing alpha could not be told apart.
    temperature = ["algo.initial_alpha=0.3"] if "initial_alpha" in compose([f"algo={row.algo}"]).algo else []
    algorithm = build_row(row, *temperature)
    for target in row.targets:  # unlike its source, to notice if the two are confused
        for parameter in getattr(algorithm, target).parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    batch = make_batch(algorithm)
    batch["next", "terminated"][:2] = batch["next", "done"][:2] = True
    actual, reference = row.losses(algorithm, batch), row.oracle(algorithm, batch)
    for a, b in zip(actual, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@check
def compiled_and_eager_are_the_same(row: Row, tmp_path: Path, backend: str = "aot_eager") -> None:
    """Check that compiled losses give the same parameters, each as one graph that is compiled once."""
    eager = saved_state(plain_run(row))["state_dict"]
    losses, torch_compile = [], torch.compile

    def compile_(loss: Any, *, options: dict[str, Any], **kwargs: Any) -> Any:
        losses.append(loss)
        return torch_compile(loss, backend=backend, options=options if backend == "inductor" else None, **kwargs)

    counters.clear()
    with patch.object(torch, "compile", compile_), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = run_row(row, tmp_path / "compiled", "algo.compile=true")["state_dict"]
    assert losses
    assert counters["stats"]["unique_graphs"] == len(losses)
    assert not counters["graph_break"]
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-5)


@check
def captured_and_eager_are_the_same(row: Row, tmp_path: Path) -> None:
    """Check that updates replayed as (simulated) CUDA graphs give the parameters and metrics of eager updates."""
    overrides = [f"algo={row.algo}", f"env={row.env}"]
    # A captured optimizer stores its learning rate in float32; this rate is exact in float32.
    rates = [f"algo.{key}={2**-11}" for key in compose(overrides).algo if key == "lr" or key.endswith("_lr")]
    more = [f"total_env_steps={2 * row.env_steps}", *rates]
    eager = run_row(row, tmp_path / "eager", *more)
    with simulate_cuda_graphs() as recorded, patch.object(Algorithm, "compile_losses"):
        captured = run_row(row, tmp_path / "captured", *more, "algo.compile=true")
    assert len(recorded) == row.graphs
    assert eager["levin"]["updates"] == captured["levin"]["updates"] > cuda_graphs.WARM_UP
    for name, value in eager["state_dict"].items():
        torch.testing.assert_close(captured["state_dict"][name], value, rtol=1e-5, atol=1e-5)
    for actual, reference in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "captured"), strict=True):
        assert actual.keys() == reference.keys()
        for name in actual:
            if actual[name] != reference[name]:
                assert float(actual[name]) == pytest.approx(float(reference[name]), rel=1e-3, abs=1e-4), name
    groups = [[each["param_groups"] for each in run["optimizer_states"] if each] for run in (eager, captured)]
    assert same(*groups)


@check
def learns_a_small_env(row: Row, tmp_path: Path) -> None:
    """Check that a short run reaches the mean return of the row."""
    overrides, threshold = row.learns
    all_overrides = [f"algo={row.algo}", *LATE, *overrides]
    result = train(compose(all_overrides), tmp_path / "run")
    assert result is not None
    assert result >= threshold


@check
def yaml_and_signature_agree(row: Row, tmp_path: Path) -> None:
    """Check that the YAML has the keyword-only parameters of the algorithm's `__init__`, and their defaults."""
    cfg = compose([f"algo={row.algo}"])
    algorithm, _ = build_run(compose([f"algo={row.algo}", f"env={row.env}"]))
    parameters = dict(inspect.signature(type(algorithm)).parameters)
    del parameters["env"]
    assert set(cfg.algo) - {"_target_"} == set(parameters), "the YAML must list every hyper-parameter"
    assert all(each.kind is each.KEYWORD_ONLY for each in parameters.values())
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    defaults.pop("schedule_env_steps", None)  # in the YAML that of the run
    untuned = to_plain(compose([f"algo={row.algo}", "env=gym", "env.id=x"]).algo)
    plain = {name: [*value] if isinstance(value, tuple) else value for name, value in defaults.items()}
    other = {name: value for name, value in plain.items() if untuned[name] != value}
    assert not other, f"other defaults than in the YAML: {other}"
    assert EnvConfig(**to_plain(cfg.env)).id


@check
def exported_files_act_alike(row: Row, tmp_path: Path) -> None:
    """Check that the policy as ONNX and as `torch.export` acts like the run over an episode, for any batch size."""
    run, rng = tmp_path / "run", np.random.default_rng(0)
    shutil.copytree(plain_run(row), run)

    def random_values(example: np.ndarray) -> np.ndarray:
        if example.dtype == bool:  # is_first: the second episode goes on
            return np.array([[True], [False], [True]])
        if example.dtype == np.float32:
            return rng.normal(size=example.shape).astype(np.float32)
        return rng.integers(256 if example.dtype == np.uint8 else 2, size=example.shape, dtype=example.dtype)

    for kind, load in (("onnx", package.load_onnx), ("torch", package.load_torch)):
        path, checked = package.package(run, kind, seed=1, steps=100)
        assert checked["largest_difference"] <= package.TOLERANCE
        assert checked["own_memory_difference"] <= package.TOLERANCE
        graph = PolicyGraph(Policy.load(run))
        inputs, function = [random_values(each.numpy()) for each in graph.example(3)], load(path)
        alone = [function([each[i : i + 1] for each in inputs]) for i in range(3)]
        for together, *parts in zip(function(inputs), *alone, strict=True):
            np.testing.assert_allclose(together, np.concatenate(parts), rtol=1e-5, atol=package.TOLERANCE)


@check
def exported_policy_acts_alike(row: Row, tmp_path: Path) -> None:
    """Check that the exported policy, which `experiments/` stores, acts like the policy of the run."""
    run, kept = plain_run(row), tmp_path / "kept"
    kept.mkdir()
    shutil.copy(run / "config.yaml", kept)
    export_policy(run, kept)
    trained, exported = Policy.load(run), Policy.load(kept)
    observation = make_batch(trained.algorithm)["observation"].numpy()
    before = Policy(build_row(row))
    assert np.array_equal(trained(observation), exported(observation))
    actual, reference, fresh = (each.module.state_dict() for each in (trained, exported, before))
    assert same(dict(actual), dict(reference))
    assert not same(dict(actual), dict(fresh))
