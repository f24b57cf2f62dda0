"""Videos of policies: what is said when an env can't be drawn."""

from contextlib import nullcontext

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.training import loggers
from levin.training.session import train
from levin.training.video import load_policy_and_env, record_video

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


def test_one_env_is_recorded_without_a_process(tmp_path):
    train(compose([*WORDS, "env.vectorization=async"]), tmp_path / "run")
    _, env = load_policy_and_env(str(tmp_path / "run"), seed=1)
    assert env.config.vectorization == "sync"
    env.close()


@pytest.mark.parametrize(
    ("render", "sentence"),
    [
        (gym.Env.render, "has no render method"),
        (fail, r"can't be rendered .*\(RuntimeError\)"),
        (lambda _: np.zeros((3, 8, 8), np.uint8), r"renders an array \[3, 8, 8\] of uint8, not \[H, W, 3\]"),
        (lambda _: np.full((8, 8, 3), 200), r"renders an array \[8, 8, 3\] of int64"),
    ],
)
def test_an_env_that_cannot_be_drawn_is_a_sentence(render, sentence, tmp_path, monkeypatch):
    train(compose([*WORDS]), tmp_path / "run")
    monkeypatch.setattr(CartPoleEnv, "render", render)
    with pytest.raises(ConfigError, match=sentence):
        record_video(run=str(tmp_path / "run"))


@pytest.mark.parametrize("error", [ConfigError("no display"), RuntimeError("no codec")])
def test_the_checkpoint_is_uploaded_even_without_a_video(error, tmp_path, monkeypatch, capsys):
    def record(**_):
        raise error

    done = []
    monkeypatch.setattr(loggers, "upload_checkpoint", lambda *_: done.append("checkpoint"))
    monkeypatch.setattr(loggers, "close", lambda *_, **__: done.append("close"))
    monkeypatch.setattr("levin.training.video.record_video", record)
    with nullcontext() if isinstance(error, ConfigError) else pytest.raises(RuntimeError, match="no codec"):
        train(compose([*WORDS, "upload=true"]), tmp_path / "run")
    assert done == ["checkpoint", "close"]
    assert ("no video is uploaded: no display" in capsys.readouterr().out) == isinstance(error, ConfigError)
