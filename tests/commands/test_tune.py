"""`levin.tune`: from the words to the winner."""

import csv

import pytest
from omegaconf import OmegaConf

pytest.importorskip("optuna", reason="the extra `tune`")
pytest.importorskip("rliable", reason="the extra `report` computes the intervals")

from processes import run_python

STUDY = (
    *("algo=sac", "env=gym", "env.id=toy_envs:Point-v0", "env.action=rescale", "logger=csv", "trainer.accelerator=cpu"),
    *("algo.learning_starts=16", "algo.hidden_sizes=[8]", "total_env_steps=64", "eval.every=32", "eval.episodes=1"),
    *("trials=2", "seeds_per_trial=2", "retrain=2", "jobs=2"),
)


def test_a_study_ends_with_a_config_and_can_be_shown_and_continued(tmp_path):
    answer = run_python("-m", "levin.tune", *STUDY, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    study = tmp_path / "runs" / "tune_sac_toy_envs_Point-v0"
    rows = list(csv.DictReader((study / "trials.csv").open()))
    assert [list(row)[:3] for row in rows] == [["number", "state", "value"]] * 2
    winner = OmegaConf.load(study / "winner.yaml")
    values = {key: OmegaConf.select(winner, key) for key in list(rows[0])[3:]}
    assert values in [{key: OmegaConf.create(f"x: {row[key]}").x for key in values} for row in rows]
    assert winner.total_env_steps == 64
    assert "present values" in answer.stdout
    seeds = (
        sorted(each.name for each in study.glob("trials/0000/s*")),
        sorted(each.name for each in study.glob("retrained/trial_0/s*")),
    )
    assert seeds == (["s0", "s1"], ["s2", "s3"])
    written = {path: path.read_bytes() for path in study.rglob("metrics.csv")}
    answer = run_python("-m", "levin.tune", *STUDY, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert {path: path.read_bytes() for path in study.rglob("metrics.csv")} == written
    more = ("-m", "levin.tune", *STUDY[:-4], "trials=3", *STUDY[-3:])
    assert run_python(*more, cwd=tmp_path).returncode == 0
    assert len((study / "trials.csv").read_text().splitlines()) == 4
    answer = run_python("-m", "levin.tune", *STUDY, "show=true", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("3 trials: 3 complete\ntrial ")
    assert answer.stdout.splitlines()[-1] == "runs/tune_sac_toy_envs_Point-v0/history.png"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trials=0"], "trials=0 must be a whole number of 1 or more"),
        (["algo=sacc"], "algo=sacc is unknown; valid: sac,"),
        (["algo.gama=1"], "algo.gama is unknown; valid: algo.gamma,"),
        (["show=true"], "run=runs/tune_sac_halfcheetah holds no search"),
        (["trial=3"], "trial is unknown; valid: trials,"),
        (["seed=0,1"], "seed=0,1 has several values"),
    ],
)
def test_wrong_words_are_sentences(words, sentence, tmp_path):
    answer = run_python("-m", "levin.tune", *words, cwd=tmp_path)
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.startswith(f"levin: {sentence}")
    assert not list(tmp_path.iterdir())
