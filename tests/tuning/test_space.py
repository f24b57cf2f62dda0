"""Search spaces: those in configs/tune/, their types, and wrong ones."""

import pytest

pytest.importorskip("optuna", reason="the extra `tune`")

from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from levin.config.compose import compose
from levin.core import paths
from levin.core.errors import ConfigError
from levin.tuning.space import as_word, read_space

NAMES = sorted(file.stem for file in (paths.CONFIGS / "algo").glob("*.yaml"))


def test_every_algorithm_has_a_search_space():
    files = {file.stem for file in (paths.CONFIGS / "tune").glob("*.yaml")}
    envs = {file.stem for file in (paths.CONFIGS / "env").glob("*.yaml")}
    of_envs = files - set(NAMES)
    assert set(NAMES) <= files
    assert of_envs <= {f"{algo}_{env}" for algo in NAMES for env in envs}


@pytest.mark.parametrize("algo", NAMES)
def test_the_values_of_a_space_can_be_composed_together(algo):
    space = read_space([f"algo={algo}"])
    assert len(space) > 1
    for pick in (0, -1):
        words = []
        for key, distribution in space.items():
            if isinstance(distribution, CategoricalDistribution):
                ends = distribution.choices
            else:
                assert isinstance(distribution, IntDistribution | FloatDistribution)
                ends = (distribution.low, distribution.high)
            words.append(f"{key}={as_word(ends[pick])}")
        compose([f"algo={algo}", *words])


@pytest.fixture
def spaces(tmp_path, monkeypatch):
    """Return a function that writes a file of configs/tune/ and reads the space of SAC on Pendulum-v1."""
    (tmp_path / "configs").symlink_to(paths.CONFIGS)
    folder = tmp_path / "tune"
    folder.mkdir()

    def read(text, name="sac"):
        (folder / f"{name}.yaml").write_text(text)
        return read_space(["algo=sac", "env=pendulum"])

    monkeypatch.setattr("levin.tuning.space.FOLDER", folder)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    return read


def test_types_come_from_the_hints_of_the_algorithm(spaces):
    space = spaces(
        "algo.batch_size: {low: 8, high: 64, step: 8}\n"
        "algo.gamma: {low: 0, high: 1}\n"  # whole numbers, but gamma is a float
        "algo.actor_lr: {low: 1e-5, high: 1e-2, log: true}\n"
        "algo.hidden_sizes: {choices: [[64, 64], [256]]}\n"
        "env.normalize_observation: {choices: [false, true]}\n"
    )
    assert space == {
        "algo.batch_size": IntDistribution(8, 64, step=8),
        "algo.gamma": FloatDistribution(0.0, 1.0),
        "algo.actor_lr": FloatDistribution(1e-5, 1e-2, log=True),
        "algo.hidden_sizes": CategoricalDistribution(["[64,64]", "[256]"]),
        "env.normalize_observation": CategoricalDistribution(["false", "true"]),
    }


def test_the_file_of_an_env_changes_single_lines(spaces):
    spaces("algo.gamma: {low: 0.9, high: 0.99}\nalgo.tau: {low: 0.001, high: 0.01}\n")
    space = spaces("algo.gamma: null\nalgo.tau: {low: 0.01, high: 0.1}\n", name="sac_pendulum")
    assert space == {"algo.tau": FloatDistribution(0.01, 0.1)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("algo.gama: {low: 0, high: 1}", r"tune/sac\.yaml: algo\.gama is unknown; valid: algo\.gamma"),
        ("algo.gamma: {low: 0.99, high: 0.9}", r"tune/sac\.yaml: algo\.gamma: low=0\.99 is not below high=0\.9"),
        ("algo.gamma: {low: 0.9, high: 1.5}", r"algo\.gamma=1\.5: input should be less"),
        ("algo.gamma: {low: 0, high: 1, log: true}", "log: true needs low above 0"),
        ("algo.gamma: {low: 0.9}", r"algo\.gamma must be \{low: \.\.\., high: \.\.\.\}"),
        ("algo.gamma: {low: a, high: b}", r"algo\.gamma: low"),
        ("algo.gamma: {low: 0.9, high: 0.99, base: 2}", r"algo\.gamma: base: extra inputs are not permitted"),
        ("algo.gamma: [0.9, 0.99]", r"algo\.gamma must be"),
        ("algo.gamma: {choices: [0.9]}", r"algo\.gamma: choices"),
        ("algo.gamma: {choices: [0.9, 0.9]}", r"algo\.gamma has equal choices"),
        ("algo.gamma: {choices: [0.9, high]}", r"algo\.gamma=high: input should be a valid number"),
        ("algo.batch_size: {low: 8, high: 9.5}", r"algo\.batch_size=9\.5"),
        ("[1, 2]", "must hold lines such as"),
        ("a: {b", "can't be read"),
        ("algo.gamma: null", "leaves nothing to search"),
    ],
)
def test_a_wrong_space_is_a_sentence(text, sentence, spaces):
    with pytest.raises(ConfigError, match=sentence):
        spaces(text)


def test_a_key_that_refers_to_a_searched_one_is_refused(spaces, monkeypatch):
    real = compose

    def refer(words):
        rate = next((word.partition("=")[2] for word in words if word.startswith("algo.actor_lr=")), "3e-4")
        return real([*words, f"algo.critic_lr={rate}"])

    monkeypatch.setattr("levin.tuning.space.compose", refer)
    with pytest.raises(ConfigError, match=r"algo\.critic_lr refers to a key that is searched"):
        spaces("algo.actor_lr: {low: 1e-4, high: 1e-2, log: true}")


def test_a_value_that_is_typed_is_not_searched(spaces):
    spaces("algo.gamma: {low: 0.9, high: 0.99}\nalgo.tau: {low: 0.001, high: 0.01}")
    assert list(read_space(["algo=sac", "env=pendulum", "algo.gamma=0.95"])) == ["algo.tau"]
    with pytest.raises(ConfigError, match="leaves nothing to search"):
        read_space(["algo=sac", "env=pendulum", "algo.gamma=0.95", "algo.tau=0.01"])


def test_an_algorithm_without_a_space_says_where_to_write_one(spaces):
    with pytest.raises(ConfigError, match=r"algo=sac has no search space: write .*sac\.yaml"):
        read_space(["algo=sac", "env=pendulum"])


def test_values_are_written_as_on_the_command_line():
    values = [None, True, 1e-5, 64, [64, 64], "tanh"]
    assert [as_word(each) for each in values] == ["null", "true", "1e-05", "64", "[64,64]", "tanh"]
    assert OmegaConf.create(f"x: {as_word(1e-5)}").x == 1e-5
