"""Build the collector that `collector=` names, and the loader that passes its rollouts to the Trainer."""

from importlib.util import find_spec

from tensordict.nn import TensorDictModule
from torchrl.collectors import BaseCollector, Collector

from levin.algorithms.base import Algorithm
from levin.collectors.batched import BatchedCollector, BatchedLoader
from levin.collectors.loader import CollectorLoader
from levin.collectors.torchrl import to_torchrl
from levin.collectors.vector import VectorCollector
from levin.collectors.workers import NAMES, WorkersCollector
from levin.core.errors import ConfigError
from levin.core.spaces import IS_FIRST
from levin.data.rollout import WholeEpisodes
from levin.envs.vector import SeededVectorEnv
from levin.nn.exploration import OrnsteinUhlenbeckNoise


def make_loader(
    name: str, env: SeededVectorEnv, algorithm: Algorithm, *, seed: int = 0, workers: int = 1
) -> CollectorLoader:
    """Build the loader that collects rollouts with an algorithm's policy and passes them to the Trainer.

    Args:
        name: `vector`, `batched`, `torchrl`, or one of `workers.NAMES`.
        env: Envs to collect from.
        algorithm: Algorithm whose policy acts.
        seed: Root of the workers' random streams.
        workers: Number of worker processes, for the collectors in `workers.NAMES`.

    Raises:
        ConfigError: The collector does not support the env or the algorithm.
    """
    if name == "batched":
        return make_batched_loader(env, algorithm)
    if name in NAMES:
        collector = make_workers_collector(name, env, algorithm, seed=seed, workers=workers)
    else:
        steps, random_env_steps = algorithm.steps_per_iteration, algorithm.random_env_steps
        collector = make_collector(name, env, acting_policy(algorithm), steps=steps, random_env_steps=random_env_steps)
    return CollectorLoader(
        collector,
        env,
        lambda: algorithm.iterations,
        step_count=algorithm.step_count,
        collects=lambda: algorithm.collects,
    )


def acting_policy(algorithm: Algorithm) -> TensorDictModule:
    """Return an algorithm's policy that collects.

    Raises:
        ConfigError: It has a buffer that the algorithm has not, which would not be saved, nor moved to the GPU.
    """
    policy, saved = algorithm.policy(), {id(buffer) for buffer in algorithm.buffers()}
    for name, buffer in policy.named_buffers():
        if id(buffer) not in saved:
            raise ConfigError(
                f"the policy of {type(algorithm).__name__} has a buffer {name} that checkpoints would not save: make "
                "its module an attribute of the algorithm, too"
            )
    return policy


def make_batched_loader(env: SeededVectorEnv, algorithm: Algorithm) -> BatchedLoader:
    """Build the loader for an env that steps N envs as tensors.

    Raises:
        ConfigError: The env is not one batched `EnvBase`, or the algorithm learns from whole episodes.
    """
    steps = algorithm.steps_per_iteration
    if isinstance(steps, WholeEpisodes):
        raise ConfigError(
            f"{type(algorithm).__name__} learns from whole episodes, but collector=batched collects rollouts of fixed "
            "length: set collector=vector env.num_envs=1"
        )
    collector = BatchedCollector(
        env,
        acting_policy(algorithm),
        steps=steps,
        random_env_steps=algorithm.random_env_steps,
        step_count=algorithm.step_count,
        compile=bool(algorithm.hparams.get("compile")),
    )
    return BatchedLoader(collector, env, lambda: algorithm.iterations, collects=lambda: algorithm.collects)


def make_collector(
    name: str, env: SeededVectorEnv, policy: TensorDictModule, *, steps: int | WholeEpisodes, random_env_steps: int = 0
) -> BaseCollector:
    """Build a collector that runs in this process.

    Args:
        name: `vector` is Levin's `VectorCollector`, `torchrl` is TorchRL's `Collector` over the same env.
        env: Envs to collect from.
        policy: Policy that acts.
        steps: Vector steps per rollout (T), or whole episodes.
        random_env_steps: Number of env steps with uniformly random actions before the policy acts.

    Raises:
        ConfigError: Whole episodes are asked for with several envs, or from TorchRL's collector.
    """
    if isinstance(steps, WholeEpisodes) and env.num_envs > 1:
        # With several envs, taking the episodes that finish first would favour short ones.
        raise ConfigError(f"whole episodes are collected one after the other: env.num_envs={env.num_envs} must be 1")
    if name == "vector":
        return VectorCollector(env, policy, steps=steps, random_env_steps=random_env_steps)
    if isinstance(steps, WholeEpisodes):
        raise ConfigError(f"collector={name} collects rollouts of fixed length; whole episodes need collector=vector")
    return Collector(
        to_torchrl(env, is_first=IS_FIRST in policy.in_keys),
        policy,
        frames_per_batch=steps * env.num_envs,
        total_frames=-1,
        init_random_frames=random_env_steps or None,
        trust_policy=True,
        auto_register_policy_transforms=False,
        track_traj_ids=False,
    )


def make_workers_collector(
    name: str, env: SeededVectorEnv, algorithm: Algorithm, *, seed: int, workers: int
) -> WorkersCollector:
    """Build a collector whose envs are stepped by several worker processes.

    Raises:
        ConfigError: The envs can't be divided among the workers, or the algorithm can't learn from such rollouts.
    """
    policy = acting_policy(algorithm)
    for is_set, message in _unsupported_options(name, env, algorithm, policy, workers):
        if is_set:
            raise ConfigError(message)
    return WorkersCollector(
        name,
        env,
        policy,
        steps=algorithm.steps_per_iteration,  # type: ignore[arg-type]  # whole episodes are refused
        random_env_steps=algorithm.random_env_steps,
        seed=seed,
        version=lambda: algorithm.iterations,
        workers=workers,
    )


def _unsupported_options(
    name: str, env: SeededVectorEnv, algorithm: Algorithm, policy: TensorDictModule, workers: int
) -> list[tuple[bool, str]]:
    """List what collectors with workers do not support: whether this run asks for it, and the error message."""
    num_envs, asynchronous = env.num_envs, name == "torchrl-async"
    size = getattr(env.env, "size", 1)  # envs per `EnvBase` that `env.target` makes
    return [
        (
            num_envs % workers > 0,
            f"env.num_envs={num_envs} can't be shared among collector_workers={workers}: "
            f"set env.num_envs={-(-num_envs // workers) * workers}, or collector_workers to a divisor",
        ),
        (
            env.config.family == "atari",
            f"ale-py steps games in threads of its own, and collector={name} does not support it: set collector=vector",
        ),
        (
            (num_envs // workers) % size > 0,
            f"env.target makes {size} envs at once, and collector_workers={workers} have {num_envs // workers} each: "
            f"set env.num_envs={size * workers}",
        ),
        (
            isinstance(algorithm.steps_per_iteration, WholeEpisodes),
            f"collector={name} collects rollouts of fixed length; whole episodes need collector=vector",
        ),
        (
            env.config.vectorization == "async",
            f"the workers of collector={name} are processes already: set env.vectorization=sync",
        ),
        (
            any(isinstance(each, OrnsteinUhlenbeckNoise) for each in policy.modules()),
            f"Ornstein-Uhlenbeck noise has a state that can't be sent to the workers of collector={name}: "
            "set algo.noise=gaussian",
        ),
        (
            IS_FIRST in policy.in_keys,
            f"a policy with a memory can't be sent to the workers of collector={name}: "
            "set collector=vector or collector=torchrl",
        ),
        (
            asynchronous and algorithm.buffer is None,
            f"{type(algorithm).__name__} learns from rollouts of its current policy, but collector=torchrl-async "
            "yields those of older ones: set collector=torchrl-process",
        ),
        (
            asynchronous and bool(getattr(algorithm.buffer, "n_step", None)),
            f"algo.n_step={algorithm.hparams.get('n_step')} needs the transitions of an env in their order, but "
            "collector=torchrl-async yields the envs of one worker at a time: set collector=torchrl-process",
        ),
        (
            asynchronous and env.config.normalize_reward,
            "env.normalize_reward needs the rewards of all envs at each step, but collector=torchrl-async yields the "
            "envs of one worker at a time: set env.normalize_reward=false",
        ),
        (
            name == "ray" and find_spec("ray") is None,
            "collector=ray needs a package that is missing: type make .venv/.scale",
        ),
    ]
