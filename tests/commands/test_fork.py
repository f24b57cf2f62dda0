"""Forks of an algorithm in `experiments/<name>/`."""

import re
import shutil
import subprocess
import sys

import pytest

from levin.config.compose import compose
from levin.core import paths
from levin.core.errors import ConfigError
from levin.fork import fork
from processes import run_python

SMALL = (
    *("env=pendulum", "total_env_steps=64", "algo.learning_starts=16", "algo.batch_size=4", "algo.hidden_sizes=[4]"),
    *("eval.episodes=1", "trainer.threads=1", "trainer.accelerator=cpu", "logger=csv"),
)


def run(folder, *command):
    """Run a command in a folder and return its output."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Copy the repository to a git repository with one commit, in which the user and the template can commit."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("src", "configs", "experiments"):
        shutil.copytree(paths.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(paths.ROOT / "README.md", folder)
    run(folder, "git", "init", "--quiet", "--initial-branch=main")
    run(folder, "git", "config", "user.email", "a@b.c")
    run(folder, "git", "config", "user.name", "a")
    commit(folder, "template")
    monkeypatch.setenv("PYTHONPATH", str(folder / "src"))
    return folder


def commit(folder, message):
    """Commit all changes."""
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "--message", message)


def test_a_fork_trains_with_its_own_loss_and_merges_with_upstream(clone, tmp_path):
    python = sys.executable
    run(clone, python, "-m", "levin.fork", "algo=sac", "name=my_idea")
    made = {str(file.relative_to(clone)) for file in clone.glob("experiments/my_idea/**/*") if file.is_file()}
    assert {f"experiments/my_idea/{each}" for each in ("algorithm.py", "algo/my_idea.yaml", "README.md")} <= made
    assert set(run(clone, "git", "status", "--porcelain").split()) == {"??", "experiments/my_idea/"}
    tuned = (clone / "experiments/my_idea/tuned/my_idea_pendulum.yaml").read_text()
    assert tuned == (paths.CONFIGS / "tuned" / "sac_pendulum.yaml").read_text()
    assert [each.name for each in (clone / "experiments/my_idea/tune").iterdir()] == ["my_idea.yaml"]

    train = "from levin.config.compose import compose; from levin.training.session import train\n"
    train += "from pathlib import Path; import sys\n"
    train += "for algo, run in [each.split('=') for each in sys.argv[1:]]:\n"
    train += f"    train(compose(['algo=' + algo, *{SMALL}]), Path(run))"
    run(clone, python, "-c", train, f"sac={tmp_path}/sac", f"my_idea={tmp_path}/my_idea")
    before = untimed(tmp_path / "sac" / "metrics.csv")
    assert before == untimed(tmp_path / "my_idea" / "metrics.csv")  # the fork is still unchanged

    file = clone / "experiments/my_idea/algorithm.py"
    code = file.read_text()
    assert "class MyIdea(Algorithm)" in code
    file.write_text(code.replace(".amin(0)", ".mean(0)"))
    run(clone, python, "-m", "levin.train", "algo=my_idea", *SMALL, f"run={tmp_path}/changed")
    assert untimed(tmp_path / "changed" / "metrics.csv") != before
    script = f"import levin, numpy; print(levin.load('{tmp_path}/changed')(numpy.zeros(3)).shape)"
    assert run(tmp_path, python, "-c", script) == "(1,)\n"  # from any folder

    run(clone, "git", "switch", "--quiet", "--create", "mine")
    commit(clone, "my idea")
    run(clone, "git", "switch", "--quiet", "main")
    upstream = clone / "src/levin/algorithms/sac.py"
    upstream.write_text(
        upstream.read_text().replace("LOG_STD_MIN, LOG_STD_MAX = -20, 2", "LOG_STD_MIN, LOG_STD_MAX = -5, 2")
    )
    (clone / "experiments/README.md").write_text("another\n")
    commit(clone, "update")
    run(clone, "git", "switch", "--quiet", "mine")
    run(clone, "git", "merge", "--quiet", "main")  # exits with an error on a conflict
    assert "-5, 2" in upstream.read_text()
    assert file.exists()


def untimed(metrics):
    """Return the values of a metrics.csv without the columns of measured times."""
    header, *rows = [line.split(",") for line in metrics.read_text().splitlines()]
    return [[value for name, value in zip(header, row, strict=True) if not name.startswith("time/")] for row in rows]


@pytest.mark.parametrize(
    ("algo", "name", "sentence"),
    [
        ("sacc", "my_idea", "algo=sacc is unknown; valid: sac"),
        ("sac", "sac", "name=sac is taken"),
        ("sac", "MyIdea", "not a Python name in lower case"),
        ("sac", "my-idea", "not a Python name in lower case"),
        ("sac", "class", "not a Python name in lower case"),
        ("sac", "", "not a Python name in lower case"),
        ("sac", "_", "not a Python name in lower case"),
        ("sac", "_x", "not a Python name in lower case"),
    ],
)
def test_an_invalid_fork_is_a_config_error(tmp_path, monkeypatch, algo, name, sentence):
    monkeypatch.setattr(paths, "EXPERIMENTS", tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        fork(algo=algo, name=name)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def forks(tmp_path, monkeypatch):
    """Write the fork `mine` of SAC into an experiments folder of its own, and return that folder."""
    monkeypatch.setattr(paths, "EXPERIMENTS", tmp_path)
    for group, name, text in (
        ("algo", "mine", (paths.CONFIGS / "algo" / "sac.yaml").read_text()),
        ("tuned", "mine_pendulum", "# @package _global_\nalgo:\n  tau: 0.125\n"),
    ):
        (tmp_path / "mine" / group).mkdir(parents=True)
        (tmp_path / "mine" / group / f"{name}.yaml").write_text(text)
    return tmp_path


def test_a_fork_has_its_own_tuned_values(forks):
    assert compose(["algo=mine", "env=pendulum"]).algo.tau == 0.125
    assert compose(["algo=sac", "env=pendulum"]).algo.tau == 0.005


def test_a_fork_copies_the_values_of_families_and_of_envs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "EXPERIMENTS", tmp_path)
    names = {file.name for file in (fork(algo="ppo", name="mine") / "tuned").iterdir()}
    assert {"mine_batched.yaml", "mine_atari.yaml", "mine_cartpole.yaml", "mine_cartpole_batched.yaml"} <= names
    names = {file.name for file in (fork(algo="sac", name="other") / "tuned").iterdir()}
    assert "other_batched.yaml" in names
    assert not [name for name in names if "discrete" in name]


@pytest.mark.parametrize("place", ["tuned/sac_hopper.yaml", "env/hopper.yaml", "debug_algo/smoke_mine.yaml"])
def test_a_fork_with_other_configs_is_refused_and_changes_no_other_algorithm(forks, place):
    before = compose(["algo=sac", "env=hopper"])
    file = forks / "mine" / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("# @package _global_\nseed: 7\n")
    assert compose(["algo=sac", "env=hopper"]) == before
    with pytest.raises(ConfigError, match=f"{place} does not belong to the fork mine"):
        compose(["algo=mine", "env=hopper"])


def test_a_fork_must_have_the_name_of_its_folder(forks):
    (forks / "mine").rename(forks / "yours")
    with pytest.raises(ConfigError, match="a fork must have the name of its folder"):
        compose(["algo=mine"])


def test_an_unknown_algorithm_is_answered_with_the_forks_too(forks):
    with pytest.raises(ConfigError, match="algo=min is unknown; valid: mine"):
        compose(["algo=min"])


@pytest.mark.parametrize("place", ["levin (copy)", "größe=1", "it's, [here]"])
def test_a_fork_works_in_a_checkout_with_any_name(place, tmp_path, monkeypatch):
    experiments = tmp_path / place / "experiments"
    experiments.mkdir(parents=True)
    monkeypatch.setattr(paths, "EXPERIMENTS", experiments)
    fork(algo="sac", name="my_idea")
    assert compose(["algo=my_idea", "env=pendulum"], check_values=False).algo._target_.endswith("MyIdea")


def test_a_new_keyword_of_a_fork_is_in_the_config_of_its_runs(clone):
    run(clone, sys.executable, "-m", "levin.fork", "algo=sac", "name=my_idea")
    file = clone / "experiments/my_idea/algorithm.py"
    keyword = "        bonus: float = 0.5,\n        gamma: Fraction"
    assert file.read_text().count("        gamma: Fraction") == 1
    file.write_text(file.read_text().replace("        gamma: Fraction", keyword))
    config = run(clone, sys.executable, "-m", "levin.config", "algo=my_idea", "env=pendulum")
    assert re.search("algo.bonus: 0.5 +# default of __init__\n", config)
    answer = run_python("-m", "levin.train", "algo=my_idea", "env=pendulum", "algo.bonus=1", cwd=clone)
    assert answer.returncode == 2
    assert "keyword argument of __init__ and a line in experiments/my_idea/algo/my_idea.yaml" in answer.stderr


def test_a_fork_of_a_fork_has_modules_of_its_own(tmp_path, monkeypatch):
    experiments = tmp_path / "experiments"
    monkeypatch.setattr(paths, "EXPERIMENTS", experiments)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (experiments / "one/algo").mkdir(parents=True)
    (experiments / "one/algo/one.yaml").write_text("algo: {_target_: experiments.one.algorithm.One}\n")
    (experiments / "one/algorithm.py").write_text("from experiments.one.network import Net\n\n\nclass One(Net): ...\n")
    (experiments / "one/network.py").write_text("class Net: ...\n")
    monkeypatch.setattr("levin.runs.trust.record_code", lambda _: None)
    folder = fork(algo="one", name="two")
    assert (folder / "algorithm.py").read_text() == "from experiments.two.network import Net\n\n\nclass Two(Net): ...\n"
    assert (folder / "network.py").read_text() == "class Net: ...\n"
    for name in ("net", "none"):
        with pytest.raises(ConfigError, match=f"name={name} would name its class {name.title()}, which one uses"):
            fork(algo="one", name=name)
