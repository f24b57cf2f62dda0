from pathlib import Path

import pytest

from levin.config.compose import compose
from levin.training.session import train
from short_runs import TINY


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(compose([*TINY, "total_env_steps=320"]), folder)
    return folder
