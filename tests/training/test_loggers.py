"""Contents of the loggers after a run: CSV, TensorBoard, W&B, videos."""

import json
import os
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace

import imageio.v3
import numpy as np
import pytest
from lightning import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checks import metrics
from levin import resume
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.core.omega import to_plain
from levin.envs.factory import load_env
from levin.runs import checkpoint
from levin.runs.provenance import run_git
from levin.training import loggers
from levin.training.loggers import CSVMetrics
from levin.training.session import train
from levin.training.video import record_video
from processes import children, has_exited, run_python, wait_until
from short_runs import SMALL


def wandb_records(file: Path):
    """Yield the records of an offline W&B run, a LevelDB log: blocks of 32 KiB, a 7-byte header per record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):  # W&B is still writing it
            return
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a complete record, or its last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_an_offline_wandb_run_can_be_read_back(tmp_path):
    overrides = [*SMALL, "logger=wandb", "total_env_steps=320", "wandb_project=test", "upload=true"]
    train(compose(overrides), tmp_path / "run")
    (file,) = (tmp_path / "run").rglob("*.wandb")
    end = time.monotonic() + 60
    while not (records := list(wandb_records(file))) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end
        time.sleep(0.1)  # W&B writes the file in its own process, which may end later than `finish`
    history, settings, axes = [], {}, {}
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        elif kind in ("config", "run"):
            update = record.config.update if kind == "config" else record.run.config.update
            settings |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in update}
        elif kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    rows = [row for row in history if "train/critic_loss" in row]
    names = {"env_steps", "updates", "train/critic_loss", "episode/return", "time/env_steps_per_second"}
    assert names <= set().union(*rows)
    assert any("eval/return_mean" in row for row in rows)
    assert [row["env_steps"] for row in rows] == sorted({row["env_steps"] for row in rows})
    assert rows[-1]["env_steps"] == 320
    cfg = to_plain(compose(overrides))
    assert {key: settings[key] for key in cfg} == cfg
    assert "gamma" not in settings
    assert settings["seed"] == 0
    assert settings["git_sha"] == run_git("rev-parse", "HEAD")
    assert set(axes.values()) <= {"env_steps", ""}
    assert "env_steps" in axes.values()
    assert any(key.startswith("video/") for row in history for key in row)
    (artifact,) = (record.artifact for record in records if record.WhichOneof("record_type") == "artifact")
    assert {"state.ckpt", "config.yaml"} <= {content.path for content in artifact.manifest.contents}


def test_tensorboard_is_indexed_by_env_steps(tmp_path):
    train(compose([*SMALL, "logger=tensorboard", "total_env_steps=320"]), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("eval/return_mean")] == [224, 320]


def test_pictures_are_logged_on_the_axis_of_the_metrics(tmp_path):
    imageio.v3.imwrite(tmp_path / "96_x.png", np.zeros((8, 8), dtype=np.uint8))
    imageio.v3.imwrite(tmp_path / "64_x.png", np.zeros((8, 8), dtype=np.uint8))
    rows = []
    wandb_run = SimpleNamespace(id="a", project="b", name="c", log=rows.append)
    both = [TensorBoardLogger(tmp_path, name="tensorboard", version=""), loggers.WandbRun(experiment=wandb_run)]
    loggers.log_pictures(both, tmp_path, clock=96, env_steps=64)
    both[0].finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Images("pictures/x")] == [96]
    assert [(row["env_steps"], "pictures/x" in row) for row in rows] == [(64, True)]


def test_csv_grows_a_column_without_losing_a_row(tmp_path):
    logger = CSVMetrics(tmp_path)
    logger.log_metrics({"updates": 0}, step=1)
    logger.log_metrics({"updates": 1, "train/loss": 0.5}, step=2)
    logger = CSVMetrics(tmp_path)  # as after a restart
    logger.log_metrics({"updates": 2, "eval/return_mean": 7.0}, step=3)
    rows = logger.rows()
    assert list(rows[0]) == ["env_steps", "updates", "train/loss", "eval/return_mean"]
    assert [row["updates"] for row in rows] == ["0", "1", "2"]
    assert [row["train/loss"] for row in rows] == ["", "0.5", ""]
    logger.truncate(2)
    assert [row["env_steps"] for row in logger.rows()] == ["1", "2"]


def test_the_name_of_a_metric_may_hold_a_comma(tmp_path):
    CSVMetrics(tmp_path).log_metrics({"Q(s,a)": 0.5}, step=1)
    logger = CSVMetrics(tmp_path)
    logger.truncate(1)
    logger.log_metrics({"Q(s,a)": 0.25}, step=2)
    assert [row["Q(s,a)"] for row in logger.rows()] == ["0.5", "0.25"]


@pytest.mark.parametrize("env", ["pendulum", "inverted_pendulum"])
def test_the_video_has_a_frame_per_step_and_is_not_black(env, tmp_path):
    overrides = [*SMALL, f"env={env}", "total_env_steps=64"]
    train(compose(overrides), tmp_path / "run")
    (path,) = record_video(run=str(tmp_path / "run"))
    frames = imageio.v3.imread(path)
    assert path.suffix == ".mp4"
    assert len(frames) == (200 if env == "pendulum" else _steps(tmp_path / "run"))
    assert frames.max() > 100
    assert frames.std() > 5
    assert not np.array_equal(frames[0], frames[-1])


def test_a_machine_that_cannot_render_names_the_missing_package(tmp_path):
    train(compose([*SMALL, "env=inverted_pendulum", "total_env_steps=64"]), tmp_path / "run")
    environment = {key: value for key, value in os.environ.items() if "DISPLAY" not in key} | {"MUJOCO_GL": "glfw"}
    answer = run_python("-m", "levin.play", f"run={tmp_path / 'run'}", env=environment)
    assert answer.returncode == 2
    assert "libegl1" in answer.stderr
    assert "Traceback" not in answer.stderr


def _steps(run: Path) -> int:
    """Return the length of the episode that `levin.play` records."""
    import levin
    from levin.envs.config import EVALUATION
    from levin.envs.factory import make_env

    policy = levin.load(run)
    env = make_env(load_env(run), seed=1, purpose=EVALUATION, num_envs=1)
    observation = env.begin([0], np.ones(1, dtype=bool))
    for step in range(1, 10_000):
        observation, _, terminated, truncated, _ = env.env.step(policy(observation))
        if terminated[0] or truncated[0]:
            return step
    raise AssertionError


def test_a_resumed_run_continues_the_same_wandb_run(tmp_path):
    overrides = [*SMALL, "logger=wandb", "wandb_project=test", "checkpoint.every=100"]
    train(compose([*overrides, "total_env_steps=160"]), tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"), total_env_steps=320)
    files = sorted((tmp_path / "run").rglob("*.wandb"))
    runs = [record.run for file in files for record in wandb_records(file) if record.WhichOneof("record_type") == "run"]
    assert len(files) == 2
    assert len({each.run_id for each in runs}) == 1


def test_a_session_without_wandb_keeps_the_id_of_the_wandb_run(tmp_path):
    overrides = [*SMALL, "wandb_project=test", "checkpoint.every=100"]
    train(compose([*overrides, "total_env_steps=160", "logger=wandb"]), tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"), total_env_steps=320, logger="csv")
    ids = [checkpoint.env_steps_and_wandb_id(each / "state.ckpt")[1] for each in _checkpoints(tmp_path / "run")]
    assert len(set(ids)) == 1
    assert ids[0] is not None


def _checkpoints(run: Path) -> list[Path]:
    return checkpoint.list_checkpoints(run / "checkpoints")


class EndWandb(Callback):
    """Callback that ends the process of wandb, as SLURM does when it ends a job."""

    def on_train_batch_end(self, trainer, algorithm, *_) -> None:
        if algorithm.env_steps == 160:
            (process,) = (pid for pid in children(os.getpid()) if "wandb" in Path(f"/proc/{pid}/comm").read_text())
            os.kill(process, signal.SIGTERM)
            wait_until(lambda: has_exited(process))


def test_a_run_goes_on_without_the_process_of_wandb(tmp_path, capsys):
    overrides = [*SMALL, "logger=wandb", "total_env_steps=320", "log_every=32"]
    train(compose([*overrides, "+callbacks.end={_target_:test_loggers.EndWandb}"]), tmp_path / "run")
    assert capsys.readouterr().err.count("levin: Weights & Biases has stopped, metrics.csv goes on") == 1
    assert metrics(tmp_path / "run")[-1]["env_steps"] == "320"
    assert _checkpoints(tmp_path / "run")[-1].name == "320"


@pytest.mark.parametrize(
    ("folder", "group", "name"),
    [
        ("runs/sac_pendulum/s0_2026", "sac_pendulum", "s0_2026"),
        ("runs/sac_pendulum/m_2026/algo.lr=0.1/s0", "sac_pendulum/m_2026/algo.lr=0.1", "algo.lr=0.1/s0"),
        ("elsewhere/x", "sac_pendulum", "x"),
        ("runs/levin/runs/sac_pendulum/s0", "sac_pendulum", "s0"),
    ],
)
def test_runs_of_a_sweep_are_told_apart_in_wandb(folder, group, name):
    assert loggers._place_in_wandb(Path("/home") / folder, "sac_pendulum") == (group, name)


def test_a_resumed_run_goes_on_offline_without_a_connection(monkeypatch, capsys):
    monkeypatch.setattr(loggers, "_wandb_login", refuse_key)
    assert loggers._is_online(must_connect=False) is False
    assert "failed, so it is offline" in capsys.readouterr().err
    with pytest.raises(ValueError, match="API key"):
        loggers._is_online(must_connect=True)


def test_every_task_of_srun_that_trains_a_run_writes_its_metrics(tmp_path):
    task = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}
    words = [*SMALL, "total_env_steps=64", "logger=csv", f"run={tmp_path / 'run'}"]
    answer = run_python("-m", "levin.train", *words, env={**os.environ, **task}, forked=False)
    assert answer.returncode == 0, answer.stderr
    assert metrics(tmp_path / "run")[-1]["env_steps"] == "64"


def test_resuming_hides_tensorboard_events_logged_after_the_checkpoint(tmp_path):
    overrides = [*SMALL, "logger=tensorboard", "eval.every=32", "checkpoint.every=96"]
    train(compose([*overrides, "total_env_steps=256"]), tmp_path / "run")
    checkpoint.discard(tmp_path / "run" / "checkpoints" / "256")
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())
    (tmp_path / "run" / "provenance.json").write_text(json.dumps({**facts, "env_steps": None}))
    resume.resume(run=str(tmp_path / "run"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("eval/return_mean")] == list(range(32, 257, 32))


def refuse_key() -> bool:
    raise ValueError("API key must have 40+ characters, has 3")


def test_a_run_that_did_not_ask_for_wandb_trains_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "_wandb_login", refuse_key)
    train(compose([*SMALL, "logger=null", "total_env_steps=64"]), tmp_path / "run")
    assert "levin: Weights & Biases is not used: ValueError: API key must have 40+" in capsys.readouterr().err
    assert metrics(tmp_path / "run")[-1]["env_steps"] == "64"


def test_with_a_bad_key_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "_wandb_login", refuse_key)
    with pytest.raises(ConfigError, match="logger=wandb can't be started: API key must have 40"):
        train(compose([*SMALL, "logger=wandb", "total_env_steps=64"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_env_of_which_only_evaluation_needs_two_copies_is_refused_before_the_run_begins(tmp_path, monkeypatch):
    def refuse(*_, num_envs=None, **__):
        raise ConfigError("no second copy")

    monkeypatch.setattr("levin.training.evaluation.make_env", refuse)
    with pytest.raises(ConfigError, match="no second copy"):
        train(compose([*SMALL, "total_env_steps=64"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_library("EGL") is None, reason="needs libegl1")
def test_a_display_that_cannot_be_opened_is_not_used():
    code = """if True:
        from levin.envs.config import EnvConfig
        from levin.envs.factory import make_env
        env = make_env(EnvConfig(id="InvertedPendulum-v5"), seed=0, num_envs=1, render=True)
        env.reset()
        print(env.render()[0].shape)
    """
    environment = {**os.environ, "DISPLAY": ":77"}
    environment.pop("MUJOCO_GL", None)
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert answer.stdout == "(480, 480, 3)\n"
    assert "GLFW" not in answer.stderr


@pytest.mark.parametrize("offline", [True, False])
def test_uploads_are_waited_for_before_the_end(offline):
    made = []
    wandb_run = SimpleNamespace(offline=offline, finish=lambda exit_code: made.append("finish"))
    logger = loggers.WandbRun(experiment=wandb_run)
    logger.uploads = (SimpleNamespace(wait=lambda timeout: made.append(f"wait {timeout}")),)
    loggers.close([logger], ended=True)
    assert made == (["finish"] if offline else ["wait 600", "finish"])


@pytest.mark.parametrize(
    ("ended", "interrupted", "calls"),
    [(True, False, ["finish 0"]), (False, True, ["preempting", "finish 1"]), (False, False, ["finish 1"])],
)
def test_a_run_that_failed_is_not_shown_as_finished_in_wandb(ended, interrupted, calls):
    made = []
    wandb_run = SimpleNamespace(
        mark_preempting=lambda: made.append("preempting"), finish=lambda exit_code: made.append(f"finish {exit_code}")
    )
    loggers.close([loggers.WandbRun(experiment=wandb_run)], ended=ended, interrupted=interrupted)
    assert made == calls
