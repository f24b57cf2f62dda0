"""The winner of a study: how candidates are compared, and what the tuned config holds."""

import subprocess

import pytest

pytest.importorskip("optuna", reason="the extra `tune`")
pytest.importorskip("rliable", reason="the extra `report` computes the intervals")

from omegaconf import OmegaConf

from levin.core import paths
from levin.runs import provenance
from levin.tuning.winner import Candidate, describe_candidates, tuned_path, winner_text, write_winner

ALIKE = [[11, 13], [0, 4]]  # variances 2 and 8
TRIAL = Candidate("trial 3", 12.0, [11, 13], [9, 10], ALIKE)
OLD = """# @package _global_
# Source: a paper.
total_env_steps: 1000

algo:
  lr: 0.1       # from the paper
  epochs: 7
"""


def test_candidates_are_compared_on_fresh_seeds():
    lines = describe_candidates([Candidate("present values", None, [], [1.0, 2.0], []), TRIAL]).splitlines()
    assert lines[1].split() == ["present", "values", "1.5", "1.5", "1", "to", "2"]
    mean, half = 12.0, 4.3027 * 5**0.5 * (1 / 2 + 1 / 2) ** 0.5  # Student's t with two degrees of freedom
    assert lines[2].split() == [
        *(
            "trial",
            "3",
            "12",
            f"{mean - half:.4g}",
            "to",
            f"{mean + half:.4g}",
            "9.5",
            "yes",
            "9.5",
            "9",
            "to",
            "10",
        )
    ]


def test_the_tuned_config_has_the_old_values_those_typed_and_those_found(tmp_path):
    before = tmp_path / "old.yaml"
    before.write_text(OLD)
    config = OmegaConf.create(
        {"algo": {"lr": 1e-5, "sizes": [64], "actor": None}, "env": {"num_envs": 4}, "total_env_steps": 500, "seed": 3}
    )
    keys = ["algo", "env", "total_env_steps", "env.num_envs", "logger", "seed", "algo.lr", "algo.sizes", "algo.actor"]
    text = winner_text(config, keys, before, ["Tuned by: me"])
    assert text.startswith("# @package _global_\n# Tuned by: me\n")
    assert "# Source: a paper.\n" in text
    assert OmegaConf.create(text) == {
        "total_env_steps": 500,
        "algo": {"lr": 1e-5, "epochs": 7, "sizes": [64], "actor": None},
        "env": {"num_envs": 4},
    }
    before.write_text(text)
    again = winner_text(config, ["algo.lr"], before, ["Tuned by: you"])
    assert [line for line in again.splitlines() if line.startswith("#")] == [
        *("# @package _global_", "# Tuned by: you", "# Other values are those of the earlier file, whose comment was:"),
        "# Source: a paper.",
    ]
    assert OmegaConf.create(winner_text(config, ["algo.lr"], tmp_path / "none.yaml", [])) == {"algo": {"lr": 1e-5}}


def test_the_tuned_config_is_that_of_the_algorithm_or_of_the_fork(tmp_path, monkeypatch):
    assert tuned_path("ppo", "pendulum") == paths.CONFIGS / "tuned" / "ppo_pendulum.yaml"
    assert tuned_path("ppo", "gym") is None  # the env of any id
    monkeypatch.setattr(paths, "EXPERIMENTS", tmp_path)
    (tmp_path / "mine" / "algo").mkdir(parents=True)
    (tmp_path / "mine" / "algo" / "mine.yaml").touch()
    assert tuned_path("mine", "pendulum") == tmp_path / "mine" / "tuned" / "mine_pendulum.yaml"


def test_a_file_with_changes_of_the_user_is_left_alone(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=tmp_path, check=True, capture_output=True
        )

    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    path, folder = tmp_path / "tuned" / "ppo_pendulum.yaml", tmp_path / "study"
    folder.mkdir()
    path.parent.mkdir()
    path.write_text("mine: 1\n")  # without a repository
    assert "is left alone; the values are in" in write_winner("new: 1\n", folder, path)
    assert (path.read_text(), (folder / "winner.yaml").read_text()) == ("mine: 1\n", "new: 1\n")
    git("init")
    assert "is left alone" in write_winner("new: 2\n", folder, path)
    git("add", "tuned")
    git("commit", "-m", "x")
    assert "git diff tuned/ppo_pendulum.yaml shows what has changed" in write_winner("new: 3\n", folder, path)
    assert write_winner("new: 4\n", folder, path) == "the values are in tuned/ppo_pendulum.yaml"  # its own file
    assert path.read_text() == "new: 4\n"
    path.write_text("new: 4\nmine: 1\n")
    assert "is left alone" in write_winner("new: 5\n", folder, path)
    path.unlink()
    assert write_winner("new: 6\n", folder, path) == "the values are in tuned/ppo_pendulum.yaml"
