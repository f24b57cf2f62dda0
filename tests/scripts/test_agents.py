"""scripts/agents.py: animations of stored policies."""

import io

import numpy as np
import pytest
from PIL import Image

from levin.core import paths
from levin.core.errors import ConfigError
from script_modules import load_script


@pytest.fixture(scope="module")
def agents():
    """Load scripts/agents.py as a module."""
    return load_script("agents")


def noise(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)) for _ in range(count)]


def test_a_stored_policy_is_drawn_and_twice_the_same(agents):
    drawn = []
    for _ in range(2):
        frames, duration = agents.play_frames(paths.EXPERIMENTS / "dqn_cartpole")
        drawn.append(agents.encode(frames, duration, agents.MAX_BYTES, agents.WIDTHS))
    assert (len(frames), duration) == (60, 100)
    assert drawn[0] == drawn[1]
    with Image.open(io.BytesIO(drawn[0])) as image:
        assert image.size[0] == agents.WIDTHS[0]
        assert image.is_animated
        assert image.info["loop"] == 0  # for ever


def test_the_quality_and_then_the_width_are_lowered_until_the_animation_fits(agents):
    best = agents.encode(noise(5), 100, 10**6, (60, 30))
    lower = agents.encode(noise(5), 100, len(best) - 1, (60, 30))
    assert width_of(best) == width_of(lower) == 60
    assert len(lower) < len(best)
    assert width_of(agents.encode(noise(5), 100, len(best) // 3, (60, 30))) == 30
    with pytest.raises(ConfigError, match="do not fit into 100 bytes"):
        agents.encode(noise(5), 100, 100, (60, 30))


def width_of(animation):
    with Image.open(io.BytesIO(animation)) as image:
        return image.width


def test_stored_animations_are_small(agents):
    stored = [file.stat().st_size for file in paths.EXPERIMENTS.glob(f"*/{agents.ANIMATION}")]
    assert max(stored) <= agents.MAX_BYTES
    assert agents.STRIP.stat().st_size <= agents.STRIP_MAX_BYTES
