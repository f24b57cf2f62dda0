"""A run folder or a result of somebody else runs no code and writes nothing outside itself without `trust=true`."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

import levin
from commands import exit_code_and_errors
from levin import compare, evaluate, export, fork, plot, report, reproduce, resume
from levin import play as play_command
from levin import train as train_command
from levin.config.compose import compose
from levin.core import files, paths
from levin.core.errors import CheckpointError, ConfigError, RunError, exit_on_user_error
from levin.runs import checkpoint, load, trust
from levin.training import loggers
from levin.training.session import train
from short_runs import TINY

# The module that a stranger puts into the run folder: whatever runs of it leaves a file.
PAYLOAD = """
import os, pathlib
from levin.algorithms.sac import SAC
pathlib.Path(os.environ["LEVIN_TEST_MARK"]).touch()
class Evil(SAC): pass
class Call:
    def __init__(self): pass
def make(**_): pass
"""
SMALL = (*TINY, "env.time_limit=8", "eval.episodes=1", "total_env_steps=64", "algo.learning_starts=16")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(compose(list(SMALL)), folder)
    return folder


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LEVIN_TEST_MARK", str(tmp_path / "mark"))
    return tmp_path / "mark"


def edit_config(run: Path, **values) -> None:
    """Set dotted keys in a run's config.yaml: `env__id="x"` sets `env.id`."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in values.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def copy_run(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True)
    return target


def touch(mark: Path) -> dict:
    return {"command": f"touch {mark}"}


# Payload -> the values in config.yaml that name it.
PAYLOADS = {
    "algorithm in the current folder": lambda _: {"algo___target_": "payload.Evil"},
    "algorithm in an experiments folder": lambda _: {"algo___target_": "experiments.evil.algorithm.Evil"},
    "algorithm in a path": lambda _: {"algo___target_": "payload.Evil.__init__"},
    "env id with a module": lambda _: {"env__id": "payload:Pendulum-v1"},
    "env id with a module, dm_control": lambda _: {"env__id": "payload:x-v0", "env__family": "dm_control"},
    "env id with a module of Levin": lambda _: {"env__id": "levin.train:Pendulum-v1"},
    "shell as TorchRL target": lambda mark: {
        "env__family": "torchrl",
        "env__target": "os:system",
        "env__kwargs": touch(mark),
    },
    "module as TorchRL target": lambda _: {"env__family": "torchrl", "env__target": "payload:make"},
    "Hydra's instantiate as TorchRL target": lambda mark: {
        "env__family": "torchrl",
        "env__target": "levin.training.trainer:instantiate",
        "env__kwargs": {"config": {"_target_": "os.system", **touch(mark)}},
    },
    "network": lambda _: {"algo__network": {"_target_": "payload.Call"}},
    "shell as network": lambda mark: {"algo__network": {"_target_": "os.system", **touch(mark)}},
    "callback": lambda _: {"callbacks__evil": {"_target_": "payload.Call"}},
    "shell as callback": lambda mark: {"callbacks__evil": {"_target_": "os.system", **touch(mark)}},
}


def load_policy(run: str) -> None:
    with exit_on_user_error():
        levin.load(run)


# Command -> its main function, its arguments, and the sections of the config whose code it runs.
COMMANDS = {
    "evaluate": (evaluate.main, ("run={run}", "episodes=1"), ("algo", "env")),
    "play": (play_command.main, ("run={run}",), ("algo", "env")),
    "resume": (resume.main, ("run={run}", "total_env_steps=96"), ("algo", "env", "callbacks")),
    "reproduce": (reproduce.main, ("exp=theirs", "seeds=0", "total_env_steps=64"), ("algo", "env", "callbacks")),
    "export": (export.main, ("run={run}", "format=torch"), ("algo", "env")),
    "plot": (plot.main, ("runs={run}", "out={run}/plot.png"), ()),
    "compare": (compare.main, ("runs={run}",), ()),
    "load": (load_policy, (), ("algo",)),
    "dream": (train_command.main, ("algo=sac", "env=dream", "env.run={run}", "total_env_steps=64"), ("env",)),
    "evaluate exp": (evaluate.main, ("run={experiments}/theirs", "episodes=1"), ("algo", "env")),
}


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command in this process and returns its exit code and what it wrote to stderr."""

    def run_command(command: str, run: Path, *more: str) -> tuple[int, str]:
        main, words, _ = COMMANDS[command]
        words = [word.format(run=run, experiments=paths.EXPERIMENTS) for word in words]
        monkeypatch.setattr("sys.argv", [command, *words, *more])
        return exit_code_and_errors(main if words else partial(main, str(run)), capsys)

    return run_command


@pytest.fixture
def stranger(plain_run, mark, tmp_path, monkeypatch) -> Path:
    """Go to a folder with a stranger's run, a result and modules that leave a file `mark`; return the run folder."""
    run = copy_run(plain_run, tmp_path / "run")
    (tmp_path / "experiments/evil/algo").mkdir(parents=True)
    for place in ("payload.py", "run/payload.py", "experiments/evil/algorithm.py", "experiments/evil/__init__.py"):
        (tmp_path / place).write_text(PAYLOAD)
    (tmp_path / "experiments/evil/algo/evil.yaml").write_text("algo: {_target_: experiments.evil.algorithm.Evil}\n")
    (tmp_path / "experiments/theirs").symlink_to(run)
    published = {"env_steps": 64, "metric": "evaluations", "last": 1, "gate": 0, "gate_from": "x", "random_return": 0}
    (run / "reference.yaml").write_text(yaml.safe_dump({**published, "published": []}))
    monkeypatch.setattr(paths, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as with `python -m levin...` in this folder
    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_command_runs_code_from_a_run_folder_or_a_result(command, payload, stranger, mark, call):
    pytest.importorskip("rliable", reason="needs the extra `report`")
    if command in ("export", "resume"):
        (stranger / "reference.yaml").unlink()  # a run, and no result
    values = PAYLOADS[payload](mark)
    edit_config(stranger, **values)
    code, message = call(command, stranger)
    sys.modules.pop("payload", None)
    assert not mark.exists()
    (section,) = {key.partition("__")[0] for key in values}
    if section in COMMANDS[command][2]:
        assert code == 2, message
        assert re.search(rf"names code that is not a part of Levin.*{section}\..*=.*trust=true", message), message


@pytest.mark.parametrize("command", ["evaluate", "load"])
def test_the_payload_would_leave_its_mark(command, stranger, mark, call):
    edit_config(stranger, algo___target_="payload.Evil")
    call(command, stranger, *(["trust=true"] if command == "evaluate" else []))
    assert mark.exists() == (command == "evaluate")
    sys.modules.pop("payload", None)


def test_a_policy_can_not_name_another_network_than_the_config(stranger, mark):
    load.export_policy(stranger, stranger)
    saved = files.load(stranger / load.POLICY)
    saved["hyper_parameters"]["network"] = {"_target_": "payload.Call"}
    files.save(saved, stranger / load.POLICY)
    with pytest.raises(CheckpointError, match=r"names other code in hyper_parameters\.network than config"):
        levin.load(str(stranger))
    assert not mark.exists()


class Nothing(Callback):
    """Callback of a user."""


OWN = (
    *("algo=sac", "env=gym", "env.id=toy_envs:Point-v0", "env.action=rescale", "algo.hidden_sizes=[8]", "logger=csv"),
    *("algo.learning_starts=16", "algo.batch_size=8", "total_env_steps=64", "eval.episodes=1"),
    "+callbacks.mine={_target_:test_trust.Nothing}",
)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory) -> Path:
    """Return a run with an env and a callback of the user."""
    sys.path.insert(0, str(Path(__file__).parent))
    folder = tmp_path_factory.mktemp("own") / "run"
    train(compose(list(OWN)), folder)
    return folder


def test_code_of_the_user_runs_without_a_word_where_the_run_was_begun(own_run, tmp_path, call):
    run = copy_run(own_run, tmp_path / "moved")
    for command in ("evaluate", "resume", "load"):
        code, message = call(command, run)
        assert code == 0, message
    assert checkpoint.list_checkpoints(run / "checkpoints")[-1].name == "96"


def test_elsewhere_the_same_run_needs_trust_in_every_command(own_run, tmp_path, monkeypatch, call):
    run = copy_run(own_run, tmp_path / "run")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # another machine
    for command in ("evaluate", "resume"):
        code, message = call(command, run)
        assert code == 2
        assert "env.id=toy_envs:Point-v0 would run the module toy_envs" in message
        code, message = call(command, run, "trust=true")
        assert code == 0, message
        code, message = call(command, run)  # said once is not said for good
        assert code == 2
    assert trust.VARIABLE not in os.environ
    with pytest.raises(ConfigError, match="trust=maybe"):
        resume.resume(run=str(run), trust="maybe")


def test_a_callback_is_run_by_resume_alone(own_run, tmp_path, monkeypatch):
    run = copy_run(own_run, tmp_path / "run")
    edit_config(run, env__id="Pendulum-v1")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(ConfigError, match=r"test_trust\.Nothing would run the module"):
        resume.resume(run=str(run))
    levin.load(run)


@pytest.mark.parametrize(
    "values",
    [
        {"env__kwargs": {"length": 3}},
        {"env__id": "toy_envs:Counting-v0"},
        {"callbacks__mine": {"_target_": "test_trust.Nothing", "x": 1}},
        {"callbacks__mine": {"_target_": "os.system", "command": "true"}},
    ],
)
def test_a_changed_entry_needs_trust_even_where_the_run_was_begun(values, own_run, tmp_path):
    run = copy_run(own_run, tmp_path / "run")
    edit_config(run, **values)
    with pytest.raises(ConfigError, match="names code that is not a part of Levin"):
        resume.resume(run=str(run))


def test_a_module_of_the_same_name_from_another_place_needs_trust(tmp_path, monkeypatch, mark):
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    code = "import gymnasium as gym\nfrom toy_envs import Point\ngym.register('Mine-v0', Point, max_episode_steps=5)\n"
    (tmp_path / "mine/my_env_module.py").write_text(code)
    (tmp_path / "theirs/my_env_module.py").write_text(PAYLOAD)
    with monkeypatch.context() as here:
        here.syspath_prepend(str(tmp_path / "mine"))
        train(compose([*OWN[:-1], "env.id=my_env_module:Mine-v0"]), tmp_path / "run")
        assert evaluate.evaluate_run(run=str(tmp_path / "run"), episodes=1)["episodes"] == 1
    del sys.modules["my_env_module"]
    with pytest.raises(ConfigError, match="Python does not find the module my_env_module"):
        evaluate.evaluate_run(run=str(tmp_path / "run"), episodes=1)
    monkeypatch.syspath_prepend(str(tmp_path / "theirs"))
    with pytest.raises(ConfigError, match="my_env_module"):
        evaluate.evaluate_run(run=str(tmp_path / "run"), episodes=1)
    assert not mark.exists()


def test_a_fork_is_accepted_where_it_was_made_or_if_git_tracks_it(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.setattr("levin.core.paths.ROOT", tmp_path)
    monkeypatch.setattr("levin.runs.provenance.ROOT", tmp_path)
    paths.EXPERIMENTS.mkdir()
    folder = paths.EXPERIMENTS / "my_try"
    target = "experiments.my_try.algorithm.MyTry"
    (tmp_path / "src").symlink_to(Path(levin.__file__).parents[1])
    fork.fork(algo="sac", name="my_try")
    assert accepts(target)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert not accepts(target)
    for words in (["init", "--quiet"], ["add", "experiments"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert accepts(target)
    assert not accepts("experiments.my_try.other.MyTry")
    assert not accepts("experiments.another.algorithm.MyTry")
    shutil.rmtree(folder)


def accepts(target: str) -> bool:
    """Return whether the algorithm class may be imported for a saved config."""
    config = OmegaConf.create({"algo": {"_target_": target}})
    try:
        trust.check(config, ("algo",), Path("config.yaml"))
    except ConfigError:
        return False
    return True


def test_without_a_place_for_the_record_a_run_still_trains(tmp_path, monkeypatch, capsys):
    (tmp_path / "state").write_text("not a folder")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    train(compose(list(OWN[:-1])), tmp_path / "run")
    assert "later commands on this run need trust=true for env.id=toy_envs:Point-v0" in capsys.readouterr().err
    evaluate.evaluate_run(run=str(tmp_path / "run"), episodes=1)  # by the command that named the code
    monkeypatch.setattr(trust, "UNRECORDED", set())  # by a later one
    with pytest.raises(ConfigError, match="trust=true"):
        evaluate.evaluate_run(run=str(tmp_path / "run"), episodes=1)
    assert evaluate.evaluate_run(run=str(tmp_path / "run"), episodes=1, trust=True)["episodes"] == 1


@pytest.mark.parametrize("env", ["pendulum", "dodge", "halfcheetah_v5", "cheetah_run", "pong", "lunarlander"])
def test_envs_of_the_supported_families_are_accepted(env):
    config = compose(["algo=ppo", f"env={env}"], check_values=False)
    assert list(trust.foreign_code(config, trust.SECTIONS)) == []


def test_ids_that_pass_another_id_on_are_not_accepted():
    code = """if True:
        import shimmy, gymnasium as gym
        from levin.config.compose import compose
        from levin.runs import trust
        gym.register_envs(shimmy)
        for name in ("GymV21Environment-v0", "levin.dodge:GymV26Environment-v0"):
            config = compose(["algo=sac", "env=gym", f"env.id={name}"])
            print([each.key for each in trust.foreign_code(config, ("env",))])
    """
    pytest.importorskip("shimmy", reason="needs the extra `dmc`")
    answer = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == ["['env.id']", "['env.id']"]


# --- writes

LINKS = {
    "evaluate": ("evaluation.json",),
    "play": ("videos", "videos/64_0.mp4"),
    "resume": (
        *("metrics.csv", "provenance.json", "config.yaml", ".lock", "checkpoints", "checkpoints/96", "pictures"),
        *("tensorboard", "tensorboard/hparams.yaml", "wandb", "videos", "traceback.txt", "checkpoints/.96.partial"),
    ),
    "export": ("policy.pt2", "policy.md"),
    "plot": ("plot.png",),
}


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, names in LINKS.items() for name in names])
def test_no_command_writes_through_a_link(command, name, plain_run, tmp_path, call):
    pytest.importorskip("rliable", reason="needs the extra `report`")
    run, outside = copy_run(plain_run, tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    path = run / name
    target = outside / "file"
    if path.is_dir():
        shutil.copytree(path, outside / "folder", symlinks=True)
        shutil.rmtree(path)
        target = outside / "folder"
    elif path.exists():
        target.write_bytes(path.read_bytes())
        path.unlink()
    elif "." not in path.name:
        (target := outside / "folder").mkdir()
    else:
        target.write_text("untouched")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)
    before = {each: each.read_bytes() for each in outside.rglob("*") if each.is_file()}
    code, message = call(command, run)
    after = {each: each.read_bytes() for each in outside.rglob("*") if each.is_file()}
    assert after == before
    assert "Traceback" not in message
    if code:
        assert "is a link" in message
    else:
        assert not path.is_symlink()


@pytest.mark.parametrize("env_steps", ["../../outside", 1.5, -1, None, True])
def test_a_counter_in_a_checkpoint_that_names_files_must_be_a_whole_number(env_steps, plain_run, tmp_path):
    run = copy_run(plain_run, tmp_path / "run")
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    state = torch.load(newest / "state.ckpt", weights_only=True)
    state["levin"]["env_steps"] = env_steps
    manifest = yaml.safe_load((newest / "manifest.json").read_text())
    manifest["files"]["state.ckpt"] = files.save(state, newest / "state.ckpt")
    files.save_json(manifest, newest, "manifest.json")
    for command in (levin.load, lambda run: resume.resume(run=str(run), total_env_steps=96)):
        with pytest.raises(ConfigError, match=r"env_steps=.* is not a whole number"):
            command(run)


def test_a_checkpoint_names_no_code(plain_run, tmp_path, mark, monkeypatch):
    run = copy_run(plain_run, tmp_path / "run")
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    (tmp_path / "payload.py").write_text(PAYLOAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    state = torch.load(newest / "state.ckpt", weights_only=True)
    state["hyper_parameters"] |= {"_instantiator": "payload.make", "_class_path": "payload.Evil"}  # of Lightning's CLI
    manifest = yaml.safe_load((newest / "manifest.json").read_text())
    manifest["files"]["state.ckpt"] = files.save(state, newest / "state.ckpt")
    files.save_json(manifest, newest, "manifest.json")
    assert levin.load(run)(np.zeros(3)).shape == (1,)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/x", "a b", "Upper", "$(touch x)", ""])
def test_the_name_of_a_result_cannot_leave_experiments(name, monkeypatch, capsys):
    for command in (reproduce.main, levin_pin):
        monkeypatch.setattr("sys.argv", ["command", f"exp={name}"])
        with pytest.raises(SystemExit, match="2"):
            command()
        message = capsys.readouterr().err
        expected = (
            ("the name of a result has only the letters",) if name else ("exp is missing", "exp must be given once")
        )
        assert any(each in message for each in expected)


def levin_pin() -> None:
    from levin import pin

    pin.main()


RESULT_FILES = [
    ("reference.yaml", "a: ["),
    ("reference.yaml", b"\xff\xfe"),
    ("reference.yaml", "env_steps: 1" + "0" * 401),
    ("provenance.json", "{"),
    ("provenance.json", "\0"),
    ("provenance.json", "[" * 100_000),
    ("provenance.json", "[1]"),
    ("provenance.json", {"files": None}),
    ("provenance.json", {"seeds": {"x": {}}}),
    ("provenance.json", {"command": "make\n# needs the extra: clean"}),
    ("provenance.json", {"seeds": {"0": {"date": "x", "wall_seconds": 0}}}),
    ("provenance.json", {"threads": "x"}),
    ("curves.csv.gz", b"x"),
    ("curves.csv.gz", gzip.compress(b"seed,env_steps,return_mean,return_std\n0,-1e308,1,1\n", mtime=0)),
    ("policy.ckpt", b"x"),
]


@pytest.mark.parametrize(("name", "content"), RESULT_FILES)
def test_a_damaged_result_is_a_one_line_error(name, content, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rliable", reason="needs the extra `report`")
    folder = tmp_path / "experiments/theirs"
    shutil.copytree(paths.EXPERIMENTS / "sac_pendulum", folder)
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / name).read_text()) | content)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for page in ("README.md", "experiments/README.md"):
        shutil.copy(paths.ROOT / page, tmp_path / page)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "EXPERIMENTS", tmp_path / "experiments")
    monkeypatch.setattr("sys.argv", ["report", "check=true"])
    with pytest.raises(SystemExit):
        report.main()
    message = "".join(capsys.readouterr())
    assert "theirs" in message
    assert "Traceback" not in message
    if name == "policy.ckpt":
        with pytest.raises(ConfigError, match=r"policy.ckpt can't be read as tensors and plain values \(") as error:
            levin.load(folder)
        assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"trainer__num_nodes": "x"}, "trainer.num_nodes=x"),
        ({"trainer__num_nodes": None}, "trainer.num_nodes=None"),
        ({"trainer__profiler": "xla"}, "the Trainer or a callback can't be built"),
        ({"trainer__benchmark": "x"}, "the Trainer or a callback can't be built"),
    ],
)
def test_values_that_lightning_refuses_are_one_line(values, sentence, plain_run, tmp_path):
    run = copy_run(plain_run, tmp_path / "run")
    edit_config(run, **values)
    with pytest.raises(ConfigError, match=sentence):
        resume.resume(run=str(run), total_env_steps=96)


@pytest.mark.parametrize(
    ("logger", "project", "sentence"),
    [
        ("tensorboard", "levin", "File exists"),
        ("wandb", "a/b", "logger=wandb can't be started"),
        ("wandb", "../../x", "logger=wandb can't be started"),
        ("wandb", "x" * 500, "logger=wandb can't be started"),
    ],
)
def test_a_logger_that_cannot_start_is_one_line(logger, project, sentence, plain_run, tmp_path):
    run = copy_run(plain_run, tmp_path / "run")
    (run / "tensorboard").write_text("a file")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"logger": logger, "wandb_project": project}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises((ConfigError, RunError), match=sentence):
        resume.resume(run=str(run), total_env_steps=96)


def test_a_checkpoint_continues_no_wandb_run_of_another_machine(tmp_path, monkeypatch):
    code = loggers._trust_record("abc123")
    assert not trust.is_accepted(code)
    trust.record_code(code)
    assert trust.is_accepted(code)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert not trust.is_accepted(code)


def test_settings_of_wandb_in_a_run_are_refused(plain_run, tmp_path):
    run = copy_run(plain_run, tmp_path / "run")
    (run / "wandb").mkdir()
    (run / "wandb/settings").write_text("[default]\nbase_url = http://example.com\n")
    with pytest.raises(ConfigError, match="could send the run's data elsewhere"):
        resume.resume(run=str(run), total_env_steps=96)


def test_a_pipe_among_the_pictures_is_skipped(tmp_path):
    os.mkfifo(tmp_path / "96_x.png")
    loggers.log_pictures([TensorBoardLogger(tmp_path)], tmp_path, clock=96, env_steps=96)


def test_the_run_of_a_world_model_is_found_again_when_both_runs_were_moved(tmp_path, monkeypatch):
    run = tmp_path / "moved" / "runs" / "ppo_dream"
    run.mkdir(parents=True)
    config = OmegaConf.to_container(compose(["algo=ppo", "env=cartpole"]))
    config["env"]["run"] = "runs/dreamer"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert load.load_config(run, code_sections=()).env.run == "runs/dreamer"  # there is none yet
    (tmp_path / "moved" / "runs" / "dreamer").mkdir()
    assert load.load_config(run, code_sections=()).env.run == str(tmp_path / "moved" / "runs" / "dreamer")
    monkeypatch.chdir(tmp_path / "moved")
    assert load.load_config(run, code_sections=()).env.run == "runs/dreamer"
