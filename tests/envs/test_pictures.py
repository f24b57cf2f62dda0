"""Pictures of users' envs: their channels, small ones, and the other parts of the observation."""

import warnings

import numpy as np
import pytest
import torch

import levin
from checks import saved_state
from levin.algorithms.ppo import PPO
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.core.network_input import NetworkInput
from levin.nn.encoders import NatureCNN, SmallCNN
from levin.runs.load import load_algorithm
from levin.training.session import train
from short_runs import check_resumed_run_is_identical

PPO_PICTURE = (
    *("algo=ppo", "env=gym", "env.num_envs=2", "algo.steps_per_iteration=32", "algo.batch_size=16", "algo.epochs=1"),
    *("env.id=careless_envs:Picture-v0", "total_env_steps=128", "eval.episodes=2", "logger=csv", "algo.compile=false"),
)


@pytest.mark.parametrize(
    ("shape", "channels", "trunk"),
    [((7, 7, 3), 3, SmallCNN), ((16, 16, 1), 1, SmallCNN), ((1, 1, 3), 3, SmallCNN), ((36, 36, 3), 3, NatureCNN)],
)
def test_small_pictures_have_a_small_network(shape, channels, trunk, tmp_path):
    train(compose([*PPO_PICTURE, f"+env.kwargs.shape={list(shape)}"]), tmp_path / "run")
    algorithm = load_algorithm(tmp_path / "run")
    assert isinstance(algorithm.trunk, trunk)
    assert algorithm.trunk.layers[0].in_channels == channels
    assert levin.load(tmp_path / "run")(np.zeros(shape, np.uint8)) in (0, 1)


@pytest.mark.parametrize(("shape", "count"), [((84, 84, 6), 6), ((64, 64, 40), 40)])
def test_an_unusual_number_of_channels_is_a_warning_that_names_the_key(shape, count):
    sentence = rf"\[{', '.join(map(str, shape))}\], which are taken for {count} channels: set env.channels=first or"
    overrides = [*PPO_PICTURE, f"+env.kwargs.shape={list(shape)}"]
    with pytest.warns(UserWarning, match=sentence):
        levin.training.session.build_run(compose(overrides))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algorithm, _ = levin.training.session.build_run(compose([*overrides, "env.channels=last"]))
    assert algorithm.trunk.layers[0].in_channels == count


@pytest.mark.parametrize("channels", ["first", "last"])
def test_the_channels_of_a_cube_are_those_that_are_named(channels):
    space = {"type": "box", "shape": [8, 8, 8], "dtype": "uint8", "channels": channels}
    observation = np.arange(512, dtype=np.uint8).reshape(1, 8, 8, 8)
    expected = observation if channels == "first" else np.moveaxis(observation, -1, 1)
    np.testing.assert_array_equal(NetworkInput(space)(observation), expected)


def test_frames_are_stacked_along_the_named_axis(tmp_path):
    overrides = [*PPO_PICTURE, "+env.kwargs.shape=[40,48,64]", "env.frame_stack=2"]
    with pytest.raises(ConfigError, match=r"set env\.channels=first or env\.channels=last"):
        train(compose(overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for channels, shape in (("first", [80, 48, 64]), ("last", [128, 40, 48])):
        algorithm, _ = levin.training.session.build_run(compose([*overrides, f"env.channels={channels}"]))
        assert algorithm.env["observation"]["shape"] == shape


def test_of_a_dict_the_vector_is_normalised_and_texts_are_left_out(tmp_path):
    overrides = [*PPO_PICTURE, "+env.kwargs.shape=[7,7,3]", "+env.kwargs.text=true", "env.normalize_observation=true"]
    with pytest.warns(UserWarning, match="has texts, which are left out: mission"):
        train(compose(overrides), tmp_path / "run")
    state = saved_state(tmp_path / "run")["state_dict"]
    moments = {name.rpartition(".")[2]: value for name, value in state.items() if "normalizer.vector" in name}
    assert moments["count"] == 128
    assert moments["var"] == pytest.approx(torch.full((2,), 100**2 / 12), rel=0.5)  # of U(-50, 50)
    picture, vector = np.zeros((7, 7, 3), np.uint8), np.zeros(2, np.float32)
    action = levin.load(tmp_path / "run")({"picture": picture, "mission": "go", "vector": vector})
    assert action in (0, 1)
    assert isinstance(load_algorithm(tmp_path / "run"), PPO)


def test_a_resumed_run_with_pictures_a_vector_and_a_text_is_identical(tmp_path):
    overrides = (*PPO_PICTURE, "+env.kwargs.shape=[7,7,3]", "+env.kwargs.text=true", "env.normalize_observation=true")
    check_resumed_run_is_identical(
        tmp_path, (*overrides, "env.vectorization=async", "algo.schedule_env_steps=256"), 256
    )


def test_minigrid(tmp_path):
    overrides = ("algo=ppo", "env=gym", "env.id=minigrid:MiniGrid-Empty-5x5-v0", "logger=csv", "eval.episodes=10")
    assert train(compose([*overrides, "total_env_steps=10_240", "eval.every=10_240"]), tmp_path / "run") > 0.9
