"""Tests of envs whose packages are not installed, because they exist for older Python versions only, are skipped."""

import re

import pytest

from levin.core import paths

PACKAGES = {"mujoco": "mujoco", "box2d": "Box2D", "atari": "ale_py", "dmc": "shimmy"}


def skip_without_packages(env: str) -> None:
    """Skip the test if the extra that an env config names in its first line is not installed."""
    named = re.match(r"# needs the extra: (\w+)", (paths.CONFIGS / "env" / f"{env}.yaml").read_text())
    if named:
        pytest.importorskip(PACKAGES[named[1]], reason=f"the extra `{named[1]}`")
