"""Callbacks of users: saving checkpoints of their own, Lightning's EarlyStopping, and those that can't work here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback

from checks import metrics, saved_state
from levin import resume
from levin import train as command
from levin.algorithms.sac import SAC
from levin.config import cli
from levin.config.compose import compose
from levin.core.errors import ConfigError, RunError
from levin.runs import checkpoint
from levin.training.session import train
from short_runs import SMALL, TINY, check_resumed_run_is_identical


class Keep(Callback):
    """Callback that saves a checkpoint to a path after every third iteration."""

    def __init__(self, path: str) -> None:
        self.path, self.seen = path, 0

    def on_train_batch_end(self, trainer, *_) -> None:
        self.seen += 1
        if self.seen % 3 == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", ["best.ckpt", "state.ckpt", "checkpoints/7/state.ckpt", "new/folder/x.ckpt"])
def test_a_checkpoint_saved_by_a_callback_leaves_its_neighbours_alone(name, tmp_path):
    mine = tmp_path / "mine"
    path = mine / name
    path.parent.mkdir(parents=True)
    (path.parent / "notes.txt").write_text("precious")
    words = [*SMALL, "total_env_steps=160", f"+callbacks.keep={{_target_:test_user_callbacks.Keep,path:'{path}'}}"]
    train(compose(words), tmp_path / "run")
    assert sorted(each.name for each in path.parent.iterdir()) == sorted(["notes.txt", path.name])
    assert (path.parent / "notes.txt").read_text() == "precious"
    assert SAC.load_from_checkpoint(path, weights_only=True).env_steps == 96
    assert saved_state(tmp_path / "run")["levin"]["env_steps"] == 160
    resume.resume(run=str(tmp_path / "run"), total_env_steps=192)


def test_a_callback_may_save_in_a_folder_of_its_own_beside_the_checkpoints(tmp_path):
    path = tmp_path / "run/checkpoints/mine/state.ckpt"
    words = [*SMALL, "total_env_steps=160", f"+callbacks.keep={{_target_:test_user_callbacks.Keep,path:{path}}}"]
    train(compose(words), tmp_path / "run")
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert saved_state(tmp_path / "run")["levin"]["env_steps"] == 160


@pytest.mark.parametrize("name", ["last/state.ckpt", "last/mine.ckpt", "96/mine.ckpt"])
def test_a_callback_does_not_save_among_the_checkpoints_of_the_run(name, tmp_path):
    path = tmp_path / "run/checkpoints" / name
    words = [*SMALL, "total_env_steps=160", f"+callbacks.keep={{_target_:test_user_callbacks.Keep,path:{path}}}"]
    with pytest.raises(RunError, match="is in a folder of Levin's checkpoints"):
        train(compose(words), tmp_path / "run")


class Rotate(Callback):
    """Callback that saves a checkpoint after every iteration and removes the one before."""

    def __init__(self, folder: str) -> None:
        self.folder, self.last = Path(folder), None

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if self.last is not None:
            trainer.strategy.remove_checkpoint(self.last)
        self.last = self.folder / f"{pl_module.env_steps}.ckpt"
        trainer.save_checkpoint(self.last)


def test_a_checkpoint_removed_by_a_callback_leaves_its_neighbours_alone(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("precious")
    words = [*SMALL, "total_env_steps=160", f"+callbacks.keep={{_target_:test_user_callbacks.Rotate,folder:'{mine}'}}"]
    train(compose(words), tmp_path / "run")
    assert sorted(each.name for each in mine.iterdir()) == ["160.ckpt", "notes.txt"]


def test_a_checkpoint_with_a_relative_name_is_saved_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "total_env_steps=160", "+callbacks.keep={_target_:test_user_callbacks.Keep,path:best.ckpt}"]
    train(compose(words), tmp_path / "run")
    assert SAC.load_from_checkpoint("best.ckpt", weights_only=True).env_steps == 96


def test_a_checkpoint_that_cannot_be_written_is_a_one_line_error(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "best.ckpt"
    words = [*SMALL, "total_env_steps=160", f"+callbacks.keep={{_target_:test_user_callbacks.Keep,path:'{path}'}}"]
    with pytest.raises(RunError, match=r"the checkpoint .*best.ckpt can't be written"):
        train(compose(words), tmp_path / "run")


EARLY = (
    "+callbacks.early={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:eval/return_mean,mode:max,patience:2}"
)


def test_early_stopping_stops_by_an_evaluation_and_can_be_resumed(tmp_path, monkeypatch):
    returns = iter([-1.0, -3.0, -2.0, 0.0, -5.0, -6.0, -7.0])
    monkeypatch.setattr("levin.training.evaluation.evaluate", lambda *_: ([next(returns)], [1]))
    train(compose([*SMALL, "eval.every=32", "total_env_steps=640", EARLY]), tmp_path / "run")
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "96"
    assert metrics(tmp_path / "run")[-1]["eval/return_mean"] == "-2.0"
    resume.resume(run=str(tmp_path / "run"))  # the return of 0 begins a new patience
    assert checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "192"


def test_early_stopping_without_its_metric_is_a_one_line_error(tmp_path):
    words = EARLY.replace("eval/return_mean", "val_loss")
    with pytest.raises((ConfigError, RunError), match="val_loss"):
        train(compose([*SMALL, "eval.every=32", "total_env_steps=96", words]), tmp_path / "run")


def test_a_callback_that_cannot_work_is_refused_at_the_start(tmp_path):
    words = f"+callbacks.best={{_target_:lightning.pytorch.callbacks.ModelCheckpoint,dirpath:'{tmp_path}/own'}}"
    with pytest.raises(ConfigError, match=r"ModelCheckpoint counts Lightning's steps.*set checkpoint\.every"):
        train(compose([*SMALL, words]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["pytorch_lightning.callbacks.Callback", "pathlib.Path"])
def test_a_callback_of_another_package_is_refused_at_the_start(target, tmp_path):
    with pytest.raises(ConfigError, match=r"callbacks.mine is a .*, not a lightning.Callback"):
        train(compose([*SMALL, f"+callbacks.mine={{_target_:{target}}}"]), tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["seed=5", "seed=0"], "seed is given twice, as 5 and as 0.*SEED= or SEEDS="),
        (["-m", "seed=0,1,2", "seed=0"], "seed is given twice, as 0,1,2 and as 0"),
        (["-m", "algo.tau=.1,.2", "algo.tau=.3"], r"algo.tau is given twice, as \.1,\.2 and as \.3: leave one out"),
        (["-m", "algo.hidden_sizes=[8],[16]", "algo.hidden_sizes=[4]"], "algo.hidden_sizes is given twice"),
        (["-m", "algo.n_step=range(1,4)", "algo.n_step=1"], "algo.n_step is given twice"),
    ],
)
def test_a_seed_or_several_values_are_never_dropped(words, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", *SMALL, *words])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    with pytest.raises(ConfigError, match=sentence):
        cli.check_arguments(words)
    assert not list(Path(tmp_path).iterdir())


def test_a_repeated_key_is_announced(capsys):
    cli.check_arguments(["algo.hidden_sizes=[8,8]", "algo.hidden_sizes=[4]", "log_every=3", "log_every=3"])
    assert capsys.readouterr().err == "levin: algo.hidden_sizes is given twice, as [8,8] and as [4]: the last is used\n"


class Logs(Callback):
    """Callback that logs in every way: with `log`, with `log_dict` and to the loggers, with a step of its own."""

    def on_train_start(self, trainer, pl_module) -> None:
        for logger in trainer.loggers:
            if pl_module.env_steps == 0:
                logger.log_metrics({"mine/first": np.float32(1.5)})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        pl_module.log("mine/batch", float(batch_idx), prog_bar=True, on_step=True)
        pl_module.log_dict({"mine/steps": torch.tensor(2.0 * pl_module.env_steps), "env_steps": -1.0})
        for logger in trainer.loggers:
            logger.log_metrics({"mine/direct": torch.tensor(3.0 * pl_module.env_steps)}, step=batch_idx)

    def on_validation_end(self, trainer, pl_module) -> None:
        pl_module.log("mine/evaluation", 7.0)


LOGS = [*TINY, "+callbacks.logs={_target_:test_user_callbacks.Logs}"]


def test_what_a_callback_logs_has_the_env_steps_as_its_axis(tmp_path):
    train(compose([*LOGS, "total_env_steps=224"]), tmp_path / "run")
    rows = metrics(tmp_path / "run")
    plain = [row for row in rows if row["updates"]]
    assert [int(row["env_steps"]) for row in plain] == [64, 96, 128, 160, 224]
    assert [float(row["mine/steps"]) for row in plain] == [96, 192, 256, 320, 416]  # means of 2 x (32, 64), (96), ...
    direct = {int(row["env_steps"]): float(row["mine/direct"]) for row in rows if row["mine/direct"]}
    assert direct == {steps: 3.0 * steps for steps in range(32, 225, 32)}
    assert [row["env_steps"] for row in plain if row["mine/evaluation"]] == ["96", "160", "224"]
    assert next((row["env_steps"], row["mine/first"]) for row in rows) == ("0", "1.5")
    assert [int(row["env_steps"]) for row in rows] == sorted(int(row["env_steps"]) for row in rows)


def test_what_a_callback_logs_survives_a_resume(tmp_path):
    check_resumed_run_is_identical(tmp_path, tuple(LOGS), 448)


def test_lightnings_own_callbacks_log_on_the_axis(tmp_path):
    monitor = "{_target_:lightning.pytorch.callbacks.LearningRateMonitor,logging_interval:step}"
    # The monitor logs when every 50th batch begins.
    words = [*SMALL, "algo.steps_per_iteration=1", "algo.replay_ratio=0.25", f"+callbacks.rate={monitor}"]
    train(compose([*words, "total_env_steps=110"]), tmp_path / "run")
    rows = [row for row in metrics(tmp_path / "run") if any(row[key] for key in row if key.startswith("lr-"))]
    assert [int(row["env_steps"]) for row in rows] == [49, 99]


class Keeps(Callback):
    """Callback that keeps a state, a tensor or one that can't be loaded again."""

    def __init__(self, what: str) -> None:
        values = {"tensor": torch.zeros(2), "set": {1}, "array": np.zeros(2), "object": self, "function": lambda: 0}
        self.value, self.what, self.loaded = values[what.removesuffix("_added")], what, False

    def state_dict(self):
        return {} if self.what.endswith("added") else {"value": self.value}

    def load_state_dict(self, state_dict):
        Keeps.got = state_dict["value"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.what.endswith("added"):
            checkpoint["mine"] = self.value


@pytest.mark.parametrize("what", ["array", "object", "function", "array_added"])
def test_a_state_that_cannot_be_loaded_again_is_refused_at_the_first_save(what, tmp_path):
    words = [*SMALL, "total_env_steps=192", f"+callbacks.keeps={{_target_:test_user_callbacks.Keeps,what:{what}}}"]
    name = "mine" if what.endswith("added") else "Keeps"
    with pytest.raises(RunError, match=f"keeps in checkpoints as {name} can't be loaded again: .*; use tensors"):
        train(compose(words), tmp_path / "run")


def test_a_state_that_can_be_loaded_is_loaded(tmp_path):
    words = [*SMALL, "total_env_steps=192", "+callbacks.keeps={_target_:test_user_callbacks.Keeps,what:tensor}"]
    train(compose(words), tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"), total_env_steps=224)
    assert torch.equal(Keeps.got, torch.zeros(2))


def test_two_states_of_one_name_are_refused(tmp_path):
    words = [f"+callbacks.{name}={{_target_:test_user_callbacks.Keeps,what:tensor}}" for name in "ab"]
    with pytest.raises(ConfigError, match="more than one stateful callback of type `Keeps`"):
        train(compose([*SMALL, "total_env_steps=192", *words]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class TimerStats(Callback):
    """Callback with a state, whose name begins as that of Lightning's Timer."""

    def state_dict(self):
        return {"value": 1}


def test_the_time_limit_of_a_session_is_not_saved_and_a_callback_of_a_similar_name_is(tmp_path):
    words = ["total_env_steps=32", "+trainer.max_time=01:00:00:00"]
    words.append("+callbacks.stats={_target_:test_user_callbacks.TimerStats}")
    train(compose([*SMALL, *words]), tmp_path / "run")
    callbacks = saved_state(tmp_path / "run")["callbacks"]
    assert callbacks["TimerStats"] == {"value": 1}
    assert "Timer" not in callbacks
