"""Random overrides, with a fixed seed: valid ones train, invalid ones give a one-line error."""

import functools
import random
import sys

import pytest

from levin import train as command
from levin.config.compose import compose
from levin.core.omega import flat_keys, to_plain
from short_runs import SMALL

# Values of each key that are valid in combination with all values of the other keys.
VALID = {
    "algo.gamma": ("0", "0.5", "0.99", "1"),
    "algo.tau": ("0.005", "1", "1e-3"),
    "algo.actor_lr": ("3e-4", "0.01"),
    "algo.critic_lr": ("3e-4", "0.01"),
    "algo.alpha_lr": ("3e-4", "0.01"),
    "algo.initial_alpha": ("0.1", "2"),
    "algo.target_entropy": ("null", "-1", "0.5"),
    "algo.batch_size": ("1", "7", "64"),
    "algo.replay_ratio": ("0", "0.3", "1", "2"),
    "algo.learning_starts": ("0", "33", "1000"),
    "algo.buffer_size": ("64", "100", "1e3"),
    "algo.buffer_storage": ("memory", "memmap"),
    "algo.n_step": ("1", "2", "5"),
    "algo.priority_alpha": ("0", "0.7"),
    "algo.steps_per_iteration": ("1", "5", "32"),
    "algo.hidden_sizes": ("[8]", "[16,8]", "[8,8,8]", "[]"),
    "algo.activation": ("relu", "tanh", "elu", "silu"),
    "algo.network": ("mlp", "layer_norm", "{_target_:own_networks.Features,width:8}"),
    "env": ("pendulum", "mountaincar_continuous", "inverted_pendulum", "reacher"),
    "env.num_envs": ("1", "2", "3"),
    "env.vectorization": ("sync", "sync", "async"),
    "env.action": ("rescale", "clip", "none"),
    "env.time_limit": ("null", "11", "100"),
    "env.action_repeat": ("1", "2"),
    "env.normalize_observation": ("true", "false"),
    "env.normalize_reward": ("true", "false"),
    "eval.every": ("50", "64", "1e6"),
    "eval.episodes": ("1", "3"),
    "eval.seed": ("0", "12"),
    "checkpoint.every": ("20", "64"),
    "checkpoint.keep": ("1", "3"),
    "log_every": ("10", "100"),
    "seed": ("0", "7", "123456789"),
    "trainer.precision": ("32-true", "bf16-mixed"),
    "trainer.threads": ("1", "2"),
    "collector": ("vector", "vector", "torchrl"),
}
NUMBER_KEYS = [
    key for key, values in VALID.items() if values[-1].replace(".", "").replace("e", "").replace("-", "").isdigit()
]
TEXT_KEYS = [key for key in VALID if key not in NUMBER_KEYS and key != "env"]


@functools.cache
def valid_keys() -> set[str]:
    """Return the keys of the default config."""
    return set(flat_keys(to_plain(compose([]))))


def misspell(word: str, dice: random.Random) -> str:
    """Delete, replace or insert a random letter."""
    at = dice.randrange(len(word))
    letter = dice.choice("qxz7_")
    return dice.choice(
        (word[:at] + word[at + 1 :], word[:at] + letter + word[at + 1 :], word[:at] + letter + word[at:])
    )


def broken(dice: random.Random) -> list[str]:
    """Return random valid overrides and an invalid one."""
    good = [f"{key}={dice.choice(VALID[key])}" for key in dice.sample(sorted(VALID), 3)]
    key = dice.choice(sorted(VALID))
    number, word = dice.choice(NUMBER_KEYS), dice.choice(TEXT_KEYS)
    wrong = key
    while wrong in valid_keys() or wrong in ("env", ""):
        wrong = misspell(key, dice)
    bad = dice.choice(
        (
            f"{wrong}={dice.choice(VALID[key])}",
            f"{number}={dice.choice(('-3', 'much', '[1]', 'true', '{a: 1}', 'null' if number == 'seed' else '-0.5'))}",
            f"{word}={dice.choice(('17.5', 'nonsense', '[x]', '{a: 1}', '-1'))}",
            f"algo={misspell('sac', dice)}",
            f"env={misspell('pendulum', dice)}",
            f"debug={misspell('smoke', dice)}",
            f"+{dice.choice(('algo', 'env', 'eval', 'trainer', 'checkpoint'))}.{misspell('number', dice)}=1",
            dice.choice(
                ("algo", "=", "seed", "algo.gamma", "a=b=c=[", "env.kwargs={", "seed=", "'", "--seed=1", "~~x")
            ),
            f"{dice.choice(('algo', 'env', 'eval', 'trainer'))}={dice.choice(('3', 'null', '[]'))}",
            f"total_env_steps={dice.choice(('0', '-5', '1.5', 'many', 'null'))}",
        )
    )
    good = [each for each in good if each.split("=")[0] != bad.split("=")[0]]
    return dice.sample([*good, bad], len(good) + 1)


@pytest.mark.parametrize("number", range(30))
def test_random_valid_overrides_train(number, tmp_path, monkeypatch):
    dice = random.Random(number)
    overrides = [f"{key}={dice.choice(VALID[key])}" for key in dice.sample(sorted(VALID), 8)]
    monkeypatch.setattr(sys, "argv", ["train", *SMALL, "total_env_steps=64", *overrides, f"run={tmp_path / 'run'}"])
    command.main()
    assert (tmp_path / "run" / "checkpoints" / "last" / "state.ckpt").is_file(), overrides


@pytest.mark.parametrize("number", range(200))
def test_random_invalid_overrides_give_a_one_line_error(number, tmp_path, monkeypatch, capsys):
    overrides = broken(random.Random(number))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *overrides])
    with pytest.raises(SystemExit) as stop:
        command.main()
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2, overrides
    assert message.startswith("levin: "), overrides
    assert "\n" not in message, overrides
    assert not list(tmp_path.iterdir()), overrides
