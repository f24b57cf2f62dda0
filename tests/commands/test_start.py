"""Commands answer a wrong word before they import torch and Lightning, and all seeds of a command import them once."""

import subprocess
import sys

import pytest

from levin.config import __main__ as config
from levin.core import paths
from processes import run_python

HEAVY = ("torch", "tensordict", "torchrl", "lightning", "gymnasium", "rliable", "matplotlib.pyplot")
WRONG = {
    "train algo=sacc": "algo=sacc is unknown; valid: sac,",
    "train env=pendulm": "env=pendulm is unknown; valid: pendulum,",
    "train algo.gama=0.9": "algo.gama is unknown; valid: algo.gamma,",
    "train eval.evers=5": "eval.evers is unknown; valid: eval.every,",
    "train seeds=one": "seeds=one must be whole numbers",
    "train -m algo=sac,sacc": "algo=sacc is unknown",
    "config algo=sac,ppo": "algo=sac,ppo has several values",
    "evaluate run=x episodes=1,000": "episodes=1,000 has several values, and this command takes one (write 30_000,",
    "resume rum=x": "rum is unknown; valid: run,",
    "resume run=nothere": "run=nothere is not a run folder",
    "config algo=sacc": "algo=sacc is unknown",
    "evaluate run=": "run is missing: set run=",
    "play run=": "run is missing: set run=",
    "plot runs=": "runs is missing: set runs=",
    "reproduce exp=": "exp is missing: set exp=",
    "evaluate run=nothere": "run=nothere holds no checkpoint",
    "evaluate run=nothere episode=3": "episode is unknown; valid: episodes,",
    "play run=nothere": "run=nothere holds no checkpoint",
    "fork algo=sacc name=idea": "algo=sacc is unknown",
    "pin exp=idea algo=sacc": "algo=sacc is unknown",
    "reproduce exp=sac_halfcheeta": "exp=sac_halfcheeta is not a result",
    "report checks=true": "checks is unknown; valid: check",
    "bench what=sax": "what=sax",
}
CODE = """
import runpy, sys
sys.argv = ["levin", *sys.argv[2:]]
try:
    runpy.run_module(module := "levin." + {module!r}, run_name="__main__")
except SystemExit as end:
    print("code", end.code)
print("imported", *(name for name in {heavy!r} if name in sys.modules))
"""


def run_command(module, *words, cwd):
    code = CODE.format(module=module, heavy=HEAVY)
    return subprocess.run(
        [sys.executable, "-c", code, "-", *words], cwd=cwd, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_word_is_answered_before_anything_heavy_is_imported(command, tmp_path):
    module, *words = command.split()
    answer = run_command(module, *words, cwd=tmp_path)
    assert WRONG[command] in answer.stderr
    assert answer.stdout.split("\n")[-3:] == ["code 2", "imported", ""], answer.stdout


def test_the_config_is_printed_before_anything_heavy_is_imported(tmp_path):
    answer = run_command("config", "algo=td3", "env=pendulum", cwd=tmp_path)
    assert "algo.tau: 0.005 " in answer.stdout
    assert answer.stdout.endswith("imported\n")
    assert "algo.gamma=2" in run_command("config", "algo=td3", "algo.gamma=2", cwd=tmp_path).stderr


def test_every_value_has_an_origin(monkeypatch, capsys):
    """Also the parts of a section that is given as a whole."""
    section = "+callbacks.stop={_target_:lightning.pytorch.callbacks.Timer,duration:{days:1}}"
    monkeypatch.setattr(sys, "argv", ["config", "algo=td3", "env=pendulum", "+env.kwargs={g:9.8}", section])
    config.main()
    lines = capsys.readouterr().out.splitlines()
    origins = {line.split(": ")[0]: line.partition("  # ")[2] for line in lines}
    assert origins["callbacks.stop.duration.days"] == "command line"
    assert origins["env.kwargs.g"] == "command line"
    assert all(origins.values())


def test_every_value_has_its_comment(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["config", "algo=td3", "env=pendulum"])
    config.main()
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    meanings = {key: line.partition("  # ")[2] for key, line in lines.items()}
    assert meanings["algo.tau"].startswith("configs/algo/td3.yaml: step of the target networks")
    assert meanings["total_env_steps"].startswith("configs/tuned/td3_pendulum.yaml: length of the run in env steps")
    assert meanings["env.wrappers"].endswith("observe the latent state of that world model")


def test_a_plot_needs_no_torch(tmp_path):
    pytest.importorskip("matplotlib")
    answer = run_command("plot", f"runs={paths.EXPERIMENTS}/sac_pendulum", "out=x.png", cwd=tmp_path)
    assert (tmp_path / "x.png").exists(), answer.stderr
    imported = answer.stdout.split("imported")[-1].split()
    assert not {"torch", "tensordict", "torchrl", "lightning", "gymnasium"} & set(imported)


SEEDS = (
    *("algo=ppo", "env=cartpole", "logger=csv", "algo.steps_per_iteration=64", "eval.episodes=1", "run=runs"),
    *("trainer.threads=1", "algo.batch_size=64"),
)


def test_all_seeds_of_a_command_are_forks_of_one_process(tmp_path):
    train = [sys.executable, "-X", "importtime", "-m", "levin.train", *SEEDS, "total_env_steps=512", "seeds=3 5"]
    answer = subprocess.run(train, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert sum(line.split("|")[-1].strip() == "torch" for line in answer.stderr.splitlines()) == 1
    assert sorted(each.name for each in tmp_path.glob("runs/*/")) == ["s3", "s5"]
    alone = ("-m", "levin.train", *SEEDS, "total_env_steps=512", "seed=5", "run=alone")
    assert run_python(*alone, cwd=tmp_path).returncode == 0
    curves = [(tmp_path / run / "metrics.csv").read_text().splitlines() for run in ("runs/s5", "alone")]
    names = curves[0][0].split(",")
    column = names.index("eval/return_mean")
    assert [row.split(",")[column] for row in curves[0]] == [row.split(",")[column] for row in curves[1]]
