"""The env of docs/batched_envs.md trains as it is printed, resumes to the bit, and keeps the page's contract."""

import re
import sys

import pytest
import torch
from tensordict import TensorDict

from checks import metrics
from levin.config.compose import compose
from levin.core import paths
from levin.training.session import build_run, train
from short_runs import check_resumed_run_is_identical, last_words

DOC = (paths.ROOT / "docs/batched_envs.md").read_text()
SMALL = ("logger=csv", "eval.episodes=2", "eval.every=300", "checkpoint.every=130", "log_every=64")
PPO = ("algo=ppo", "algo.steps_per_iteration=8", "algo.batch_size=32", "algo.hidden_sizes=[8]", "algo.epochs=2")


@pytest.fixture
def words(tmp_path, monkeypatch) -> tuple[str, ...]:
    """Save the page's env as `reach.py`; return the overrides of its command, with few envs."""
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    (tmp_path / "reach.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "reach", raising=False)
    (arguments,) = re.findall(r'ALGO=ppo ENV=torchrl STEPS=\d+ ARGS="(.*?)"', DOC)
    assert "env.num_envs=256" in arguments
    return ("env=torchrl", *arguments.replace("env.num_envs=256", "env.num_envs=8").split())


def test_the_documented_env_trains_and_resumes_exactly(words, tmp_path):
    short = last_words((*words, *PPO, *SMALL, "algo.schedule_env_steps=640", "env.time_limit=20"))
    check_resumed_run_is_identical(tmp_path, short, 640)
    last = metrics(tmp_path / "straight")[-1]
    assert int(last["env_steps"]) == 640
    assert int(last["updates"]) > 0


def test_the_documented_env_keeps_the_contract(words):
    _, loader = build_run(compose([*last_words((*words, *PPO, *SMALL, "algo.steps_per_iteration=120"))]))
    rollout = next(loader)
    observation, after = rollout["observation"], rollout["next", "observation"]
    torch.testing.assert_close(after[..., :2], observation[..., :2] + 0.2 * after[..., 2:])  # also where it ends
    done = rollout["next", "done"][:, :-1, 0]
    assert done.any()
    assert torch.equal((observation[:, 1:] == after[:, :-1]).all(-1), ~done)
    env = loader.collector.env
    before = env.point.clone()
    env._reset(TensorDict({"_reset": torch.zeros(8, 1, dtype=torch.bool)}, [8]))
    assert torch.equal(env.point, before)


def test_the_documented_env_learns(words, tmp_path):
    more = ["env.num_envs=64", "algo.steps_per_iteration=32", "algo.batch_size=256", "algo.lr=3e-3"]
    more += ["env.normalize_observation=false", "env.normalize_reward=false", "algo.schedule_env_steps=61440"]
    more += ["total_env_steps=61440", "eval.every=70000", "checkpoint.every=70000", "log_every=6000", "logger=csv"]
    train(compose([*last_words(("algo=ppo", *words, *more))]), tmp_path / "run")
    returns = [float(row["episode/return"]) for row in metrics(tmp_path / "run") if row["episode/return"]]
    assert returns[-1] > -15 > -50 > returns[0]
