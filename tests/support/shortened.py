"""Run a command of Levin as a page of the documentation has it, but short: `shortened.py levin.train algo=sac ...`.

The words are checked as they are typed. Then lengths, and sizes of networks and batches, are replaced by small ones.
With `--check` the command is not run.
"""

import runpy
import sys
from collections.abc import Callable

ENV_STEPS = 200
SHORT = {  # key of the config -> its value in a test, whatever the page or the YAML files say
    "total_env_steps": str(ENV_STEPS),
    "eval.every": "120",  # most runs end between two evaluations, and are evaluated after their last checkpoint
    "eval.episodes": "1",
    "checkpoint.every": "100",
    "log_every": "100",
    "env.time_limit": "60",
    "algo.steps_per_iteration": "16",
    "algo.batch_size": "16",
    "algo.learning_starts": "100",
    "algo.replay_ratio": "0.25",
    "algo.hidden_sizes": "[16,16]",
    "algo.critic_hidden_sizes": "[16,16]",
    "algo.epochs": "2",
    "algo.critic_epochs": "2",
    "algo.sequence_length": "8",
    "algo.memory_size": "8",
    "algo.size": "micro",
    "algo.batch_length": "4",
    "algo.horizon": "3",
    "algo.collect_env_steps": "100",
    "algo.vision_updates": "8",
    "algo.vision_batch_size": "8",
    "algo.memory_updates": "8",
    "algo.memory_batch_size": "4",
    "algo.memory_batch_length": "8",
    "algo.latent_size": "4",
    "algo.population": "3",
    "algo.rollouts": "1",
}
MAX_ENVS = 8
LOGGER = ("logger=csv", "trainer.accelerator=cpu")  # unless the page says something else


def replace_values(words: list[str], values: dict[str, str]) -> list[str]:
    """Return the words with the values of these keys, which are left out where they are typed."""
    return [*(word for word in words if word.partition("=")[0] not in values), *map("=".join, values.items())]


def shorten_training(words: list[str]) -> list[str]:
    """Check the words of `levin.train` by composing the config of every run, and return them with the values of SHORT.

    Raises:
        ConfigError: A word is not valid.
    """
    from levin import sweep
    from levin.config import cli
    from levin.config.compose import compose
    from levin.core.omega import flat_keys, to_plain

    cli.check_arguments(words)
    typed, _ = cli.pop_flag(words, "trust")
    typed, _ = cli.pop_count(typed, "jobs")
    typed, seeds = cli.pop_seeds(typed)
    runs = [word for word in typed if not word.startswith(("launcher=", "hydra."))]  # launchers need other packages
    if sweep.is_sweep(typed):
        configs = [compose(each) for each in sweep.list_runs(runs, seeds)[0].values()]
    else:
        configs = [compose(sweep.with_seeds(runs, seeds[:1]))]
    first = configs[0]
    keys = set(flat_keys(to_plain(first)))
    small = {key: value for key, value in SHORT.items() if key in keys}
    if first.env.num_envs > MAX_ENVS:
        small["env.num_envs"] = str(MAX_ENVS)
    if seeds:
        small["seeds"] = seeds[0]  # with several, a plot or a table takes seconds for its intervals
    given = {word.partition("=")[0] for word in words}
    return [*replace_values(words, small), *(word for word in LOGGER if word.partition("=")[0] not in given)]


def shorten_tuning(words: list[str]) -> list[str]:
    """Return the words of `levin.tune` for a study of two trials without fresh seeds."""
    own = ("trials", "seeds_per_trial", "retrain", "show")
    training = [word for word in words if word.partition("=")[0] not in own]
    few = {"trials": "2", "seeds_per_trial": "1", "retrain": "0"}
    return replace_values([*shorten_training(training), *(word for word in words if word.startswith("show="))], few)


def shorten_given(**values: str) -> Callable[[list[str]], list[str]]:
    """Return a function that replaces values of keys that are typed."""

    def shorten(words: list[str]) -> list[str]:
        given = {word.partition("=")[0] for word in words}
        return replace_values(words, {key: value for key, value in values.items() if key in given})

    return shorten


SHORTEN: dict[str, Callable[[list[str]], list[str]]] = {
    "levin.train": shorten_training,
    "levin.tune": shorten_tuning,
    "levin.resume": shorten_given(total_env_steps=str(2 * ENV_STEPS)),
    "levin.evaluate": lambda words: replace_values(words, {"episodes": "1"}),
    "levin.play": lambda words: replace_values(words, {"episodes": "1"}),
    "levin.reproduce": lambda words: replace_values(words, {"total_env_steps": str(ENV_STEPS), "seeds": "0"}),
}


if __name__ == "__main__":
    from levin.core.errors import exit_on_user_error

    check_only = sys.argv[1] == "--check"
    module, *typed_words = sys.argv[1 + check_only :]
    with exit_on_user_error():
        shorter = SHORTEN.get(module, list)(typed_words)
    if not check_only:
        sys.argv[:] = [module, *shorter]
        sys.path[0] = ""  # as `python -m` has it, not the folder of this file
        runpy.run_module(module, run_name="__main__", alter_sys=True)
