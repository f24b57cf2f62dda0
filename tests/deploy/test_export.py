"""Exported policies: all kinds of observations and actions, without torch or Levin, and what is refused."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn

import levin
from commands import exit_code_and_errors
from levin.config.compose import compose
from levin.core.errors import ConfigError, RunError
from levin.core.paths import ROOT
from levin.core.spaces import describe_action
from levin.deploy import package
from levin.deploy.card import read_score
from levin.deploy.graph import PolicyGraph
from levin.export import export_run, main
from levin.results.curves import read_curves
from levin.runs.policy import Policy
from levin.training.session import train

SMALL = ("total_env_steps=64", "algo.hidden_sizes=[8]", "eval.episodes=2", "logger=csv", "trainer.threads=1")
PPO = ("algo=ppo", "algo.steps_per_iteration=32", "algo.batch_size=32", "algo.epochs=1", "env.num_envs=1", *SMALL)
WITHOUT = "import sys; sys.modules['torch'] = sys.modules['levin'] = None\n"


def make_run(folder, *words):
    train(compose([*PPO, *words]), folder)
    return folder


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize(
    "words",
    [
        ("env=gym", "env.id=toy_envs:Robot-v0"),  # a Dict of numbers and images
        ("env=gym", "env.id=toy_envs:Buttons-v0"),
        ("env=gym", "env.id=toy_envs:Forbidding-v0", "env.action_mask=info"),
        ("env=gym", "env.id=toy_envs:Colour-v0"),
        ("env=pendulum", "env.normalize_observation=true", "env.action=clip"),
    ],
    ids=lambda words: words[1],
)
def test_observations_and_actions_of_all_kinds(words, kind, tmp_path):
    run = make_run(tmp_path / "run", *words)
    _, checked = package.package(run, kind, seed=1, steps=50)
    assert checked["largest_difference"] <= package.TOLERANCE
    assert checked["steps"] > 1


def test_an_env_that_exists_only_in_a_batch_is_exported(tmp_path):
    words = ("env=torchrl", "env.target=toy_torchrl:line", "env.num_envs=4", "+env.kwargs.batch=4")
    _, checked = package.package(make_run(tmp_path / "run", *words), "torch", seed=1, steps=50)
    assert checked["largest_difference"] <= package.TOLERANCE


def test_onnx_runs_without_torch_and_levin(tmp_path):
    run = make_run(tmp_path / "run", "env=pendulum")
    export_run(run=str(run))
    code = (run / "policy.md").read_text().split("```python\n")[1].split("```")[0]
    asked = "inputs['observation'][:] = [[0.6, 0.8, -1.5]]\nprint(session.run(None, inputs)[0].tolist())"
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT + code + asked], cwd=run, capture_output=True, text=True, check=True
    )
    expected = levin.load(run)(np.array([0.6, 0.8, -1.5], np.float32))
    np.testing.assert_allclose(json.loads(answer.stdout)[0], expected, atol=1e-5)


def test_the_card_allows_all_actions_and_metadata_is_json(tmp_path):
    words = ("env=gym", "env.id=toy_envs:Forbidding-v0", "env.action_mask=legal", "+env.kwargs.where=legal")
    run = make_run(tmp_path / "run", *words)
    export_run(run=str(run))
    card = (run / "policy.md").read_text()
    assert '"legal": np.ones([1, 6], "int8")' in card

    policy = Policy.load(run)
    policy.env["action"] = {"type": "box", "low": [-np.inf], "high": [1.0]}
    metadata = package.describe(PolicyGraph(Policy.load(run)), policy, run)
    assert metadata["action_space"] == {"type": "box", "low": [None], "high": [1.0]}
    json.dumps(metadata, allow_nan=False)


def test_torch_export_runs_without_levin(tmp_path):
    run = make_run(tmp_path / "run", "env=pendulum")
    export_run(run=str(run), format="torch")
    code = (run / "policy.md").read_text().split("```python\n")[1].split("```")[0] + "print(action.tolist())"
    without = "import sys; sys.modules['levin'] = None\n"
    answer = subprocess.run([sys.executable, "-c", without + code], cwd=run, capture_output=True, text=True, check=True)
    np.testing.assert_allclose(json.loads(answer.stdout)[0], levin.load(run)(np.zeros(3, np.float32)), atol=1e-5)


def test_metadata_says_what_a_caller_needs(tmp_path):
    run = make_run(tmp_path / "run", "env=gym", "env.id=toy_envs:Robot-v0")
    export_run(run=str(run))
    facts = onnxruntime.InferenceSession(run / "policy.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(facts["env"]) == "toy_envs:Robot-v0"
    assert json.loads(facts["env_steps"]) == 64
    assert json.loads(facts["action_space"])["type"] == "box"
    assert set(json.loads(facts["inputs"])) == set(PolicyGraph(Policy.load(run)).input_names)


def test_a_result_is_exported_beside_runs_and_its_card_has_its_score(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ROOT / "experiments/td3_pendulum"
    read = package.read_result  # as if another seed was added at another commit
    monkeypatch.setattr(package, "read_result", lambda run: {**read(run), "git_sha": "later"})
    path = export_run(run=str(result), steps=20)
    summary, provenance = (json.loads((result / f"{name}.json").read_text()) for name in ("summary", "provenance"))
    assert path.parent.resolve() == tmp_path / "runs/results/td3_pendulum"
    facts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(facts["commit"]) == provenance["seeds"]["0"]["git_sha"]
    assert f"{summary['as_the_source_measures']['mean']:,.1f}" in (path.parent / "policy.md").read_text()


def test_a_file_names_every_commit_that_trained_its_policy(tmp_path):
    run = make_run(tmp_path / "run", "env=pendulum")
    facts = json.loads((run / "provenance.json").read_text())
    sessions = [{**facts, "git_sha": "later"}] * 2
    (run / "provenance.json").write_text(json.dumps({**facts, "git_sha": "first", "resumed": sessions}))
    assert package._commit(run) == "first, later"


def test_files_can_be_written_elsewhere(tmp_path):
    run = make_run(tmp_path / "run", "env=pendulum")
    assert export_run(run=str(run), format="torch", steps=5, out=str(tmp_path / "mine")).parent == tmp_path / "mine"
    assert (tmp_path / "mine" / "policy.md").exists()
    assert not (run / "policy.pt2").exists()


def test_actions_are_compared_relative_to_their_size():
    def scale(space, units, action):
        policy = SimpleNamespace(env={"action": describe_action(space), "action_units": units})
        return package._scale(policy, np.array(action)).tolist()

    torques = Box(np.float32([-1000, -0.1]), np.float32([1000, 0.1]))
    assert scale(torques, "rescale", [[3.0, 0.0]]) == [1000, 1]
    assert scale(torques, "clip", [[-300.0, 0.0]]) == [[300, 1]]
    assert scale(Discrete(5000), "none", [4000]) == [1]  # another choice is another choice


def test_a_policy_that_acts_differently_is_not_written(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", "env=pendulum")
    load = package.load_onnx
    monkeypatch.setattr(package, "load_onnx", lambda path: lambda inputs: [load(path)(inputs)[0] + 1e-3])
    with pytest.raises(RunError, match="exported policy differs"):
        export_run(run=str(run))
    assert not (run / "policy.onnx").exists()


def test_memory_outside_buffers_is_refused(tmp_path):
    run = make_run(
        tmp_path / "run", "algo=recurrent_ppo", "algo.memory_size=4", "algo.sequence_length=8", "env=cartpole_novel"
    )
    policy = Policy.load(run)
    policy.module.carry.begin = lambda is_first: torch.zeros(len(is_first), 8)
    policy.module.carry = nn.Module()
    policy.module.carry.begin = lambda is_first: torch.zeros(len(is_first), sum(policy.module.sizes))
    with pytest.raises(ConfigError, match="memory of its policy"):
        PolicyGraph(policy)


def test_the_card_has_the_score_of_its_own_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", "env=pendulum")
    assert "Mean return over 2 episodes" in read_score(run, 64)
    assert read_score(run, 128) == ""
    with (run / "metrics.csv").open("a") as file:  # a row that belongs to a later checkpoint
        file.write((run / "metrics.csv").read_text().splitlines()[-1].replace("64", "96", 1) + "\n")
    assert "Mean return over 2 episodes" in read_score(run, 64)
    score = {"return_mean": -1.0, "return_std": 2.0, "episodes": 100, "env_steps": 32}
    (run / "evaluation.json").write_text(json.dumps(score))
    assert "2 episodes" in read_score(run, 64), "an evaluation of an older checkpoint is left out"
    (run / "evaluation.json").write_text(json.dumps({**score, "env_steps": 64}))
    assert "100 episodes: -1.0, 95% interval -1.4 to -0.6" in read_score(run, 64)


@pytest.mark.parametrize(("episodes", "quantile"), [(10, 2.262), (30, 2.045)])
def test_the_interval_of_few_episodes_is_that_of_students_t(tmp_path, episodes, quantile):
    score = {"return_mean": 0.0, "return_std": 100.0, "episodes": episodes, "env_steps": 64}
    (tmp_path / "evaluation.json").write_text(json.dumps(score))
    ((low, high),) = re.findall(r"interval (\S+) to (\S+) ", read_score(tmp_path, 64))
    assert float(high) == -float(low) == pytest.approx(100 * quantile / (episodes - 1) ** 0.5, abs=0.2)


@pytest.mark.parametrize("episodes", [1, 9])
def test_fewer_than_ten_episodes_have_no_interval(tmp_path, episodes):
    score = {"return_mean": 0.0, "return_std": 0.0, "episodes": episodes, "env_steps": 64}
    (tmp_path / "evaluation.json").write_text(json.dumps(score))
    assert read_score(tmp_path, 64).startswith(f"Mean return over {episodes} episode{'s' * (episodes > 1)}: 0.0 (of")


@pytest.mark.parametrize(
    ("name", "last", "key"),
    [
        ("td3_pendulum", 10, "as_the_source_measures"),
        ("sac_halfcheetah_300k", 1, "as_the_source_measures"),
        ("ppo_hopper", 10, "mean_of_last_10_evaluations"),  # the source counts training episodes, with exploration
        ("a2c_pong", 1, None),  # has five evaluations
        ("recurrent_ppo_pendulum_novel", 1, "as_the_source_measures"),
    ],
)
def test_the_card_of_a_result_has_the_score_of_deterministic_episodes(name, last, key):
    folder = ROOT / "experiments" / name
    summary = json.loads((folder / "summary.json").read_text())
    mean = summary[key]["mean"] if key else np.mean([each.return_mean[-1] for each in read_curves(folder).values()])
    sentence = read_score(folder, 0)
    assert f": {mean:,.1f}" in sentence
    assert ("95% interval" in sentence) == (len(summary["seeds"]) > 1)
    assert ("its last evaluation:" if last == 1 else f"its last {last} evaluations:") in sentence


def test_the_card_names_the_preprocessing_of_atari(tmp_path):
    card = export_run(run=str(ROOT / "experiments/a2c_pong"), steps=5, out=str(tmp_path)).with_name("policy.md")
    assert '`ale_py.vector_env.AtariVectorEnv("pong", num_envs, frameskip=4, stack_num=4)`' in card.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=nowhere"], "nowhere"),
        (["run="], "run is missing"),
        (["run=experiments/ppo_pendulum", "format=tflite"], "onnx"),
        (["run=experiments/ppo_pendulum", "steps=0"], "steps"),
    ],
)
def test_bad_input_is_a_sentence(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["export", *words])
    code, errors = exit_code_and_errors(main, capsys)
    assert code == 2
    assert message in errors
    assert errors.startswith("levin: ")
    assert errors.count("\n") == 1
