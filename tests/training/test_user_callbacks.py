"""Callbacks of users: saving checkpoints of their own, Lightning's EarlyStopping, and those that can't work here."""

from pathlib import Path

import pytest
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
from short_runs import SMALL


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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["seed=5", "seed=0"], "seed is given twice, as 5 and as 0.*SEED= or SEEDS="),
        (["-m", "seed=0,1,2", "seed=0"], "seed is given twice, as 0,1,2 and as 0"),
        (["-m", "algo.tau=.1,.2", "algo.tau=.3"], r"algo.tau is given twice, as \.1,\.2 and as \.3: leave one out"),
    ],
)
def test_a_seed_or_several_values_are_never_dropped(words, sentence, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", *SMALL, *words])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    with pytest.raises(ConfigError, match=sentence):
        cli.refuse_repeated(words)
    assert not list(Path(tmp_path).iterdir())


def test_a_repeated_key_is_announced(capsys):
    cli.refuse_repeated(["algo.hidden_sizes=[8,8]", "algo.hidden_sizes=[4]", "log_every=3", "log_every=3"])
    assert capsys.readouterr().err == "levin: algo.hidden_sizes is given twice, as [8,8] and as [4]: the last is used\n"
