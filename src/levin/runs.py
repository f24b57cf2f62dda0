"""The run folder: config.yaml, provenance.json, metrics.csv, checkpoints/, videos/."""

import ctypes
import json
import logging
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from levin.errors import ConfigError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def folder(config: DictConfig) -> Path:
    """Where a new run will live: `run`, or `runs/<algo>_<env>/s<seed>_<time>`.

    Raises:
        ConfigError: It exists already.
    """
    now = f"{datetime.now():%Y%m%d-%H%M%S}"
    run = Path(config.run or f"runs/{config.name}/s{config.seed}_{now}")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ConfigError(f"run={run} exists; name another folder, or continue that run with make resume RUN={run}")
    return run


def create(run: Path, config: DictConfig, provenance: dict[str, Any], *, resumed: bool) -> None:
    """Make the folder with its config and provenance. A resumed run adds to the list of its sessions.

    Raises:
        ConfigError: It can't be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        config = config.copy()
        OmegaConf.set_readonly(config, False)
        config.trainer.threads = torch.get_num_threads()  # results depend on it: a resumed run takes as many
        OmegaConf.save(config, run / "config.yaml")
    except OSError as error:
        raise ConfigError(f"run={run} can't be written: {error.strerror}") from error
    file = run / "provenance.json"
    before = json.loads(file.read_text()) if resumed and file.exists() else {"wall_seconds": 0.0, "resumed": []}
    first = {key: value for key, value in before.items() if key not in ("wall_seconds", "resumed")}
    sessions = [*before["resumed"], provenance] if resumed else []
    _write(file, {**(first or provenance), "wall_seconds": before["wall_seconds"], "resumed": sessions})


def finish(run: Path, seconds: float) -> None:
    """Add the wall time of this session."""
    file = run / "provenance.json"
    facts = json.loads(file.read_text())
    _write(file, {**facts, "wall_seconds": round(facts["wall_seconds"] + seconds, 1)})


def _write(file: Path, facts: dict[str, Any]) -> None:
    file.write_text(json.dumps(facts, indent=2) + "\n")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed. The tensors of one update are those of the next: giving their pages back to the
    system and faulting them in again costs a tenth of an update on the CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 512 << 20), (M_TOP_PAD, 64 << 20)):
            libc.mallopt(option, value)


def quiet() -> None:
    """Silence what the libraries say at every start and no user can act on."""
    for name in ("torchrl", "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning's profilers report through the same logger as its greetings.
    spoken = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    spoken.addFilter(lambda record: record.levelno >= logging.WARNING or "Report" in record.getMessage())
    for message in (".*is out of date.*", ".*isinstance.treespec, LeafSpec.*", ".*does not have many workers.*"):
        warnings.filterwarnings("ignore", message=message)
