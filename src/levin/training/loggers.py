"""Loggers of a run's metrics: `metrics.csv` always, Weights & Biases or TensorBoard by choice.

The x-axis is `env_steps`. In TensorBoard it is `Algorithm.clock`, which is the same for most algorithms.
"""

import csv
import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from levin.algorithms.base import Algorithm
from levin.core import files
from levin.core.errors import ConfigError, one_line
from levin.core.process import print_line
from levin.runs import checkpoint, trust

# For Weights & Biases, which would wait for days otherwise. A complete run waits longer for its uploads.
SECONDS_TO_CONNECT, SECONDS_TO_FINISH, SECONDS_TO_UPLOAD = 30, 60, 600


def make_loggers(
    name: str | None, run: Path, config: dict[str, Any], git_sha: str, ckpt_path: Path | None = None
) -> list[Logger]:
    """Build the loggers: `metrics.csv`, and the one that `name` selects.

    Args:
        name: `csv`, `tensorboard` or `wandb`; None means Weights & Biases if the user is logged in there.
        run: Run folder.
        config: Config of the run, which is logged.
        git_sha: Commit of the run, which is logged.
        ckpt_path: Checkpoint that the run is continued from.

    Raises:
        ConfigError: The logger that `name` selects can't be started.
    """
    try:
        return _make_loggers(name, run, config, git_sha, ckpt_path)
    except Exception as error:  # each logger raises its own errors
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"logger={name} can't be started: {type(error).__name__}: {one_line(error)}") from error


def _make_loggers(
    name: str | None, run: Path, config: dict[str, Any], git_sha: str, ckpt_path: Path | None
) -> list[Logger]:
    wandb_id, clock = None, -1
    if ckpt_path is not None:
        _, wandb_id = checkpoint.env_steps_and_wandb_id(ckpt_path)
        clock = int(ckpt_path.resolve().parent.name)
    metrics = CSVMetrics(run)
    if ckpt_path is None:
        metrics.truncate(0)  # a run that was stopped before its first checkpoint begins anew
    loggers: list[Logger] = [metrics]
    if name == "tensorboard":
        files.subfolder(run, "tensorboard")
        loggers.append(TensorBoardLogger(run, name="tensorboard", version="", purge_step=clock + 1))
    elif name == "wandb":
        loggers.append(_wandb_run(run, config, wandb_id, must_connect=ckpt_path is None))
    elif name is None:
        try:
            if _wandb_login():
                loggers.append(_wandb_run(run, config, wandb_id))
        except Exception as error:  # nobody has asked for it
            reason = (str(error).splitlines() or [""])[0]
            print(f"levin: Weights & Biases is not used: {type(error).__name__}: {reason}", file=sys.stderr)
    for logger in loggers:
        logger.log_hyperparams({**config, "git_sha": git_sha})
    return loggers


def check_login(name: str | None) -> None:
    """Check that Weights & Biases takes the user's key, if `name` selects it, before the folder of a new run is made.

    Raises:
        ConfigError: The key is not valid, or there is no connection.
    """
    if name == "wandb":
        try:
            _wandb_login()
        except Exception as error:  # wandb raises errors of several types
            raise ConfigError(
                f"logger=wandb can't be started: {one_line(error)}; without a connection: export WANDB_MODE=offline"
            ) from error


class WandbRun(WandbLogger):
    """Logger of Weights & Biases. Its data go through a process of wandb, and the run goes on if that has ended."""

    folder: Path | None = None  # of this session's data
    uploads: tuple[Any, ...] = ()  # artifacts
    failed = False

    def attempt(self, action: Callable[[], object]) -> None:
        """Call a function that sends something. Once one fails, print a line and send nothing any more."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # those of a broken connection to wandb's process are of many types
            self.failed = True
            print(
                f"levin: Weights & Biases has stopped, metrics.csv goes on: {type(error).__name__}: {one_line(error)}; "
                f"to upload the rest later: wandb sync {self.folder}",
                file=sys.stderr,
            )
            self._disconnect()

    def _disconnect(self) -> None:
        """Leave no connection to a dead process: a later run of this process would use it, and its exit would fail."""
        import wandb

        for end in (self.experiment.finish, wandb.teardown):
            with suppress(Exception):
                end(exit_code=1)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.attempt(lambda: super(WandbRun, self).log_metrics(metrics, step))

    def close(self, *, ended: bool, interrupted: bool) -> None:
        """Send what is left. A run that has not ended counts as preempted there if `interrupted`, or else as failed."""
        if interrupted:
            self.attempt(self.experiment.mark_preempting)
        for artifact in self.uploads:
            if not self.experiment.offline:
                self.attempt(partial(artifact.wait, timeout=SECONDS_TO_UPLOAD))
        self.attempt(lambda: self.experiment.finish(exit_code=0 if ended else 1))


def _wandb_run(run: Path, config: dict[str, Any], wandb_id: str | None, *, must_connect: bool = True) -> WandbRun:
    """Build the logger of Weights & Biases: online if the user is logged in there, else offline.

    Args:
        run: Run folder.
        config: Config of the run.
        wandb_id: Id of the Weights & Biases run to continue; None: a new one.
        must_connect: Whether it is an error if the user's key can't be checked. If not, the session is offline.
    """
    import wandb

    if wandb_id and not trust.is_accepted(_trust_record(wandb_id)):
        print_line(f"Weights & Biases: a new run, since {wandb_id} of the checkpoint was not begun here")
        wandb_id = None
    mode = os.environ.get("WANDB_MODE") or ("online" if _is_online(must_connect) else "offline")
    group, name = _place_in_wandb(run, config["name"])
    experiment = wandb.init(
        project=config["wandb_project"],
        name=name,
        group=group,
        dir=run,
        id=wandb_id,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        notes=config.get("note"),
        settings=wandb.Settings(
            init_timeout=SECONDS_TO_CONNECT,
            finish_timeout=SECONDS_TO_FINISH,
            finish_timeout_raises=True,
            silent=True,
        ),
    )
    folder = Path(experiment.dir).parent
    offline = f"offline; to upload it: wandb sync {folder}"
    where = offline if mode == "offline" else experiment.url or mode
    print_line(f"Weights & Biases: {where}")
    trust.record_code(_trust_record(experiment.id))
    experiment.define_metric("env_steps")
    experiment.define_metric("*", step_metric="env_steps")
    logger = WandbRun(experiment=experiment, save_dir=run)
    logger.folder = folder
    return logger


def _place_in_wandb(run: Path, config_name: str) -> tuple[str, str]:
    """Return group and name of a run: those of a sweep or a search are told apart by their folders below `runs/`."""
    run = run.absolute()
    _, runs, below = str(run.parent).rpartition("/runs/")
    group = below if runs else ""
    name = run.name if run.parent.name == config_name or not group else f"{run.parent.name}/{run.name}"
    return (group or config_name)[-128:], name[-128:]  # Weights & Biases takes no longer ones


def _trust_record(wandb_id: str) -> trust.Code:
    """Return the trust record of a Weights & Biases run begun here: no foreign checkpoint may continue it."""
    return trust.Code("wandb_id", wandb_id, wandb_id)


def _wandb_login() -> bool:
    import wandb  # here: the import takes a second, and most runs don't need it

    return os.environ.get("WANDB_MODE") not in ("offline", "disabled") and wandb.login(prompt=False)


def _is_online(must_connect: bool) -> bool:
    """Return whether the user is logged in. If it can't be found out, that is an error or means no."""
    try:
        return _wandb_login()
    except Exception as error:  # wandb raises errors of several types
        if must_connect:
            raise
        print(f"levin: the login to Weights & Biases failed, so it is offline: {one_line(error)}", file=sys.stderr)
        return False


def use_clock(loggers: list[Logger], algorithm: Algorithm) -> None:
    """Let everything that is logged, also by users' callbacks, have the env steps as its x-axis."""
    for logger in loggers:
        logger.log_metrics = partial(_log_at_clock, logger.log_metrics, algorithm)  # type: ignore[method-assign]


def _log_at_clock(
    log: Callable[..., None], algorithm: Algorithm, metrics: dict[str, float], step: int | None = None
) -> None:
    """Log metrics at the current clock. `step`, which Lightning's callbacks count in batches, has no effect."""
    plain = {name: each.item() if isinstance(each, Tensor | np.generic) else each for name, each in metrics.items()}
    log({**plain, "env_steps": algorithm.env_steps}, step=algorithm.clock)


def log_pictures(loggers: list[Logger], folder: Path, *, clock: int, env_steps: int) -> None:
    """Send the pictures `<clock>.png` and `<clock>_<part>.png` to Weights & Biases or TensorBoard.

    Args:
        loggers: Loggers of the run.
        folder: Folder of the pictures.
        clock: `Algorithm.clock` at the evaluation, the x-axis of TensorBoard.
        env_steps: Env steps at the evaluation, the x-axis of Weights & Biases.
    """
    for picture in sorted([*folder.glob(f"{clock}.png"), *folder.glob(f"{clock}_*.png")]):
        if not picture.is_file():
            continue
        part = picture.stem.partition("_")[2]
        name = f"pictures/{part or 'open_loop'}"
        for logger in loggers:
            if isinstance(logger, WandbRun):
                logger.attempt(partial(_log_picture, logger, name, picture, env_steps))
            elif isinstance(logger, TensorBoardLogger):
                import imageio

                pixels = np.atleast_3d(imageio.imread(picture))
                logger.experiment.add_image(name, pixels, clock, dataformats="HWC")


def _log_picture(logger: WandbRun, name: str, picture: Path, env_steps: int) -> None:
    import wandb

    logger.experiment.log({name: wandb.Image(str(picture)), "env_steps": env_steps})


def upload_checkpoint(loggers: list[Logger], run: Path) -> None:
    """Send the run's config and its last checkpoint without the replay buffer to Weights & Biases."""
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.attempt(partial(_log_checkpoint, logger, checkpoint.newest_checkpoint(run), run / "config.yaml"))


def _log_checkpoint(logger: WandbRun, *files_of_run: Path) -> None:
    import wandb

    artifact = wandb.Artifact(f"{logger.experiment.id}-checkpoint", type="checkpoint")
    for path in files_of_run:
        artifact.add_file(str(path))
    logger.uploads = (*logger.uploads, logger.experiment.log_artifact(artifact))


def upload_videos(loggers: list[Logger], run: Path) -> None:
    """Send the run's videos to Weights & Biases."""
    for logger in loggers:
        if isinstance(logger, WandbRun):
            for video in sorted((run / "videos").glob("*.mp4")):
                logger.attempt(partial(_log_video, logger, video))


def _log_video(logger: WandbRun, video: Path) -> None:
    import wandb

    logger.experiment.log({f"video/{video.stem}": wandb.Video(str(video))})


def close(loggers: list[Logger], *, ended: bool, interrupted: bool = False) -> None:
    """Flush and close the loggers.

    Args:
        loggers: Loggers of the run.
        ended: Whether the run is complete, or was ended by a callback.
        interrupted: Whether a signal or `trainer.max_time` has stopped it.
    """
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbRun):
            logger.close(ended=ended, interrupted=interrupted)


class CSVMetrics(Logger):
    """Logger that writes one `metrics.csv`, first column `env_steps`. A metric that appears later adds a column."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.path = run / "metrics.csv"
        self.columns: list[str] = []
        self.count = 0  # rows in the file
        if self.path.is_file():
            self.columns = next(csv.reader([self._read().partition("\n")[0]]), [])

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` in the run folder has the hyper-parameters."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"env_steps": step, **metrics}
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self.rows()
            self.columns += new
            self._rewrite(rows)
        with open(self.path, "a", encoding="utf-8", newline="", opener=files.no_link) as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        self.count += 1

    def rows(self) -> list[dict[str, str]]:
        """Return the rows written so far."""
        if not self.path.is_file():
            return []
        return list(csv.DictReader(io.StringIO(self._read(), newline="")))

    def _read(self) -> str:
        # A crash may leave garbage after the last complete row.
        return self.path.read_text(encoding="utf-8", errors="replace")

    def truncate(self, count: int) -> None:
        """Keep the first `count` rows: those written before the checkpoint from which the run is continued."""
        rows = self.rows()
        if len(rows) < count:
            warnings.warn(f"{self.path} has lost {count - len(rows)} of its {count} rows", stacklevel=1)
        if self.columns:
            self._rewrite(rows[:count])
        self.count = min(count, len(rows))

    def sync(self) -> None:
        """Force the file onto the disk."""
        if self.path.is_file():
            files.sync(self.path)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with (
            files.replace(self.path.parent, self.path.name) as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
