"""Entry point of one data-parallel rank, started by `data_parallel.RanksLauncher`."""

import json
import os
import sys
import traceback
from pathlib import Path

from omegaconf import OmegaConf

from levin.core import distributed
from levin.core.errors import ConfigError, RunError
from levin.training.session import train_rank


def main() -> None:
    """One of the ranks that `RanksLauncher` starts."""
    orders = json.load(sys.stdin)
    config = OmegaConf.create(orders["config"])
    OmegaConf.set_readonly(config, True)
    ckpt_path = Path(orders["ckpt_path"]) if orders["ckpt_path"] else None
    try:
        train_rank(config, Path(orders["run"]), ckpt_path)  # type: ignore[arg-type]
    except distributed.RankLostError:  # the one that was lost says why
        raise SystemExit(1) from None
    except Exception as error:
        said = str(error) if isinstance(error, RunError | ConfigError) else f"raised {type(error).__name__}: {error}"
        (Path(orders["reports"]) / os.environ["LOCAL_RANK"]).write_text(json.dumps([said, traceback.format_exc()]))
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
