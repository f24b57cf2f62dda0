"""Videos of policies: what is said when an env can't be drawn."""

import gymnasium as gym
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.training.session import train
from levin.training.video import record_video

WORDS = (
    *(
        "algo=ppo",
        "env=cartpole",
        "algo.steps_per_iteration=16",
        "algo.batch_size=16",
        "algo.epochs=1",
        "env.num_envs=1",
    ),
    *("algo.hidden_sizes=[4]", "total_env_steps=16", "eval.episodes=1", "logger=csv"),
)


def fail(self):
    raise RuntimeError


@pytest.mark.parametrize(
    ("render", "sentence"), [(gym.Env.render, "has no render method"), (fail, r"can't be rendered .*\(RuntimeError\)")]
)
def test_an_env_that_cannot_be_drawn_is_a_sentence(render, sentence, tmp_path, monkeypatch):
    train(compose([*WORDS]), tmp_path / "run")
    monkeypatch.setattr(CartPoleEnv, "render", render)
    with pytest.raises(ConfigError, match=sentence):
        record_video(run=str(tmp_path / "run"))
