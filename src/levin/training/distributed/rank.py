"""Entry point of one data-parallel rank, started by `data_parallel.RanksLauncher`."""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from omegaconf import OmegaConf

from levin.core import distributed
from levin.core.errors import ConfigError, RunError
from levin.core.process import signal_at_parents_end
from levin.training.session import train_rank


def main() -> None:
    """Train as one rank with the arguments from stdin. On an error, write a report for `RanksLauncher`, and exit 1."""
    arguments = json.load(sys.stdin)
    signal_at_parents_end(signal.SIGKILL, int(arguments["rank_0"]))
    config = OmegaConf.create(arguments["config"])
    OmegaConf.set_readonly(config, True)
    ckpt_path = Path(arguments["ckpt_path"]) if arguments["ckpt_path"] else None
    try:
        train_rank(config, Path(arguments["run"]), ckpt_path)  # type: ignore[arg-type]
    except distributed.RankLostError:  # the rank that was lost reports why
        raise SystemExit(1) from None
    except Exception as error:
        message = str(error) if isinstance(error, RunError | ConfigError) else f"raised {type(error).__name__}: {error}"
        (Path(arguments["reports"]) / os.environ["LOCAL_RANK"]).write_text(
            json.dumps([message, traceback.format_exc()])
        )
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
