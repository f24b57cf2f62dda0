"""Numbers that an env reports of an episode in its last info are logged, of training and of evaluation episodes."""

import json
from pathlib import Path

import pytest

from checks import metrics
from levin.config.compose import compose
from levin.evaluate import evaluate_run
from levin.training.session import train
from short_runs import check_resumed_run_is_identical

WORDS = (
    *("algo=ppo", "env=gym", "env.id=toy_envs:Reporting-v0", "logger=csv", "env.num_envs=2", "eval.episodes=3"),
    *("algo.steps_per_iteration=10", "algo.batch_size=20", "algo.epochs=1", "algo.hidden_sizes=[8]"),
    *("eval.every=40", "log_every=20", "checkpoint.every=30", "algo.schedule_env_steps=160"),
)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_numbers_of_an_episode_are_columns(vectorization, tmp_path):
    train(compose([*WORDS, "total_env_steps=80", f"env.vectorization={vectorization}"]), tmp_path / "run")
    rows = metrics(tmp_path / "run")
    # Each row has the episodes 2k and 2k + 1 of both envs: one of two succeeds.
    assert [row["episode/is_success"] for row in rows] == ["0.5"] * 4
    assert [row["episode/distance"] for row in rows] == ["0.5", "2.5", "4.5", "6.5"]
    assert [row["episode/first"] for row in rows] == ["1.0", "", "", ""]
    assert not any("text" in name or "picture" in name for name in rows[0])
    evaluations = [row for row in rows if row["eval/return_mean"]]
    assert len(evaluations) == 2
    assert evaluations[0]["eval/is_success"] == "1.0"  # three envs, episode 0 of each
    assert evaluations[1]["eval/distance"] == "2.0"  # every episode that ends is followed by a reset


def test_an_evaluation_counts_only_its_own_episodes(tmp_path, capsys):
    train(compose([*WORDS, "total_env_steps=20"]), tmp_path / "run")
    result = evaluate_run(run=str(tmp_path / "run"), episodes=13)  # ten envs: the first three play a second episode
    assert result["is_success"] == pytest.approx(10 / 13)
    assert result["distance"] == pytest.approx(3 / 13)
    assert json.loads((tmp_path / "run/evaluation.json").read_text()) == result
    assert "is_success 0.769" in capsys.readouterr().out


def test_numbers_survive_a_resume(tmp_path):
    check_resumed_run_is_identical(tmp_path, (*WORDS, "log_every=70", "env.kwargs.counts=false"), 160)
    assert all(row["episode/is_success"] for row in metrics(Path(tmp_path, "halves")))
