"""Table of algorithms: every check in checks.py runs for every row."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

import oracles


@dataclass(frozen=True, kw_only=True)
class Row:
    """Description of an algorithm for the checks.

    Args:
        algo: Name of the algorithm: that of its file and of its YAML.
        env: Name of a small env config in which the algorithm can act.
        small: Overrides that make an iteration cheap.
        env_steps: Env steps of a short run in which every optimizer makes several steps.
        optimizers: Attribute of each optimizer -> its steps per update.
        targets: Attribute of each target network -> (attribute of its source, step size tau, updates between steps).
        losses: Function that returns the losses of the algorithm on a batch of transitions `[B]`.
        oracle: Function that returns the same losses from a reference implementation, in the same order.
        bootstraps: Function that returns the critic loss on a batch; it must depend on `terminated` and not on
            `truncated`.
        batch: Function that converts transitions `[B]` to the argument of `update`.
        graphs: Number of methods that run as CUDA graphs on a GPU.
        learns: Overrides of a training run, and the mean return that it must reach.
    """

    algo: str
    env: str
    small: tuple[str, ...]
    env_steps: int
    optimizers: dict[str, float]
    targets: dict[str, tuple[str, float, int]] = field(default_factory=dict)
    losses: Callable[[Any, TensorDict], list[Tensor]] | None = None
    oracle: Callable[[Any, TensorDict], list[Tensor]] | None = None
    bootstraps: Callable[[Any, TensorDict], Tensor] | None = None
    batch: Callable[[Any, TensorDict], Any] = lambda _, transitions: transitions
    graphs: int = 0
    learns: tuple[tuple[str, ...], float]


POINT = "env=gym", "env.id=toy_envs:Point-v0"
LATE = ("eval.every=100_000", "eval.episodes=5", "checkpoint.every=100_000", "logger=csv")
SMALL = (
    *("algo.learning_starts=40", "algo.batch_size=16", "algo.hidden_sizes=[16,16]", "algo.replay_ratio=0.25"),
    "log_every=30",
)
OFF_POLICY = (
    *(*POINT, "env.action=rescale", "total_env_steps=1200"),
    *("algo.learning_starts=100", "algo.batch_size=64", "algo.hidden_sizes=[64,64]"),
)
DISCRETE = (
    *("env=gym", "env.id=toy_envs:Steps-v0", "algo.learning_starts=100", "algo.batch_size=64"),
    "algo.hidden_sizes=[64,64]",
)


ROWS = [
    Row(
        algo="sac",
        env="pendulum",
        small=SMALL,
        env_steps=256,
        optimizers={"critic_optimizer": 1, "actor_optimizer": 1},
        targets={"target_critic": ("critic", 0.005, 1)},
        losses=oracles.sac_losses,
        oracle=oracles.sac_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(batch)[0],
        graphs=1,
        learns=((*OFF_POLICY, "algo.actor_lr=3e-3", "algo.critic_lr=3e-3", "algo.alpha_lr=3e-3"), -1.5),
    ),
    Row(
        algo="crossq",
        env="pendulum",
        small=(*SMALL, "algo.critic_hidden_sizes=[16,16]", "algo.norm_warm_up=12"),
        env_steps=256,
        optimizers={"critic_optimizer": 1, "actor_optimizer": 1 / 3},
        losses=oracles.crossq_losses,
        oracle=oracles.crossq_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(batch)[0],
        graphs=2,
        learns=((*OFF_POLICY, "algo.critic_hidden_sizes=[64,64]", "algo.actor_lr=3e-3", "algo.critic_lr=3e-3"), -1.5),
    ),
    Row(
        algo="tqc",
        env="pendulum",
        small=(*SMALL, "algo.critic_hidden_sizes=[16,16]", "algo.num_critics=3", "algo.num_atoms=5"),
        env_steps=256,
        optimizers={"critic_optimizer": 1, "actor_optimizer": 1},
        targets={"target_critic": ("critic", 0.005, 1)},
        losses=oracles.tqc_losses,
        oracle=oracles.tqc_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(batch)[0],
        graphs=1,
        learns=(
            (
                *(*OFF_POLICY, "algo.critic_hidden_sizes=[64,64]"),
                *("algo.actor_lr=3e-3", "algo.critic_lr=3e-3", "algo.alpha_lr=3e-3"),
            ),
            -1.5,
        ),
    ),
    Row(
        algo="td3",
        env="pendulum",
        small=SMALL,
        env_steps=256,
        optimizers={"critic_optimizer": 1, "actor_optimizer": 0.5},
        targets={"target_critic": ("critic", 0.005, 2), "target_actor": ("actor", 0.005, 2)},
        losses=oracles.td3_losses,
        oracle=oracles.td3_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(batch)[0],
        graphs=2,
        learns=((*OFF_POLICY, "algo.actor_lr=3e-3", "algo.critic_lr=3e-3"), -1.5),
    ),
    Row(
        algo="ddpg",
        env="pendulum",
        small=(*SMALL, "algo.noise=ornstein_uhlenbeck", "env.num_envs=2"),
        env_steps=256,
        optimizers={"critic_optimizer": 1, "actor_optimizer": 1},
        targets={"target_critic": ("critic", 0.005, 1), "target_actor": ("actor", 0.005, 1)},
        losses=oracles.ddpg_losses,
        oracle=oracles.ddpg_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(batch)[0],
        graphs=1,
        learns=((*OFF_POLICY, "algo.actor_lr=3e-3", "algo.critic_lr=3e-3"), -1.5),
    ),
    Row(
        algo="dqn",
        env="acrobot",
        small=(*SMALL, "algo.target_update_every=3", "algo.double_q=true", "algo.huber=true", "env.time_limit=100"),
        env_steps=256,
        optimizers={"optimizer": 1},
        targets={"target_critic": ("critic", 1.0, 3)},
        losses=oracles.dqn_losses,
        oracle=oracles.dqn_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(batch)[0],
        graphs=1,
        learns=(
            (*DISCRETE, "total_env_steps=3000", "algo.replay_ratio=0.5", "algo.lr=3e-3", "algo.gamma=0.9"),
            -4.5,
        ),
    ),
    Row(
        algo="sac_discrete",
        env="acrobot",
        small=(*SMALL, "env.time_limit=100"),
        env_steps=256,
        optimizers={"critic_optimizer": 1, "actor_optimizer": 1, "alpha_optimizer": 1},
        targets={"target_critic": ("critic", 0.005, 1)},
        losses=oracles.sac_discrete_losses,
        oracle=oracles.sac_discrete_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(batch)[0],
        graphs=1,
        learns=(
            (
                *(*DISCRETE, "total_env_steps=1500", "algo.actor_lr=3e-3", "algo.critic_lr=3e-3", "algo.alpha_lr=3e-3"),
                *("algo.gamma=0.9", "algo.target_entropy=0.3"),
            ),
            -4.5,
        ),
    ),
    Row(
        algo="reinforce",
        env="cartpole",
        small=("algo.advantage=baseline", "algo.normalize_advantage=false", "algo.transitions_per_update=20"),
        env_steps=400,
        optimizers={"optimizer": 1, "critic_optimizer": 10},
        losses=oracles.reinforce_losses,
        oracle=oracles.reinforce_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(batch.unsqueeze(1)),
        learns=((*POINT, "total_env_steps=8000", "algo.transitions_per_update=200", "algo.lr=1e-2"), -6.0),
    ),
    Row(
        algo="actor_critic",
        env="cartpole",
        small=("env.num_envs=2", "algo.steps_per_iteration=4", "algo.normalize_advantage=false"),
        env_steps=128,
        optimizers={"critic_optimizer": 10, "actor_optimizer": 1},
        losses=oracles.actor_critic_losses,
        oracle=oracles.actor_critic_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(batch),
        graphs=1,
        learns=((*POINT, "total_env_steps=10000", "algo.actor_lr=3e-3", "algo.critic_lr=3e-3", "algo.gamma=0.9"), -6.0),
    ),
    Row(
        algo="a2c",
        env="cartpole",
        small=("env.num_envs=2", "algo.gae_lambda=0.9"),
        env_steps=120,
        optimizers={"optimizer": 1},
        losses=oracles.a2c_losses,
        oracle=oracles.a2c_oracle,
        bootstraps=lambda algorithm, batch: oracles.a2c_losses(algorithm, batch.unsqueeze(1))[1],
        graphs=1,
        learns=((*POINT, "total_env_steps=20000", "algo.lr=3e-3", "algo.gamma=0.9"), -6.0),
    ),
    Row(
        algo="a3c",
        env="cartpole",
        small=("algo.gae_lambda=0.9", "trainer.workers=1", "env.num_envs=1"),
        env_steps=80,
        optimizers={},
        losses=oracles.a2c_losses,
        oracle=oracles.a2c_oracle,
        bootstraps=lambda algorithm, batch: oracles.a2c_losses(algorithm, batch.unsqueeze(1))[1],
        learns=((*POINT, "total_env_steps=20000", "algo.lr=3e-3", "algo.gamma=0.9", "env.num_envs=8"), -6.0),
    ),
    Row(
        algo="trpo",
        env="pendulum",
        small=("algo.steps_per_iteration=8", "algo.batch_size=8", "algo.critic_epochs=3"),
        env_steps=160,
        optimizers={"critic_optimizer": 6},
        losses=oracles.trpo_losses,
        oracle=oracles.trpo_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(algorithm.advantages(batch.unsqueeze(1))),
        learns=(
            (*POINT, "total_env_steps=8000", "algo.steps_per_iteration=200", "algo.batch_size=100", "algo.gamma=0.9"),
            -6.0,
        ),
    ),
    Row(
        algo="ppo",
        env="mountaincar_continuous",
        small=("algo.steps_per_iteration=16", "algo.batch_size=8", "algo.epochs=2", "env.time_limit=100"),
        env_steps=64,
        optimizers={"optimizer": 1},
        losses=oracles.ppo_losses,
        oracle=oracles.ppo_oracle,
        bootstraps=lambda algorithm, batch: algorithm.critic_loss(
            (data := algorithm.evaluate(batch.unsqueeze(1))[0]), data["value"], torch.tensor(0.2)
        ),
        graphs=1,
        learns=(
            (*POINT, "total_env_steps=8000", "algo.steps_per_iteration=200", "algo.batch_size=50", "algo.lr=3e-3"),
            -6.0,
        ),
    ),
    Row(
        algo="recurrent_ppo",
        env="cartpole_novel",
        small=(
            *("env.num_envs=2", "algo.steps_per_iteration=16", "algo.sequence_length=8", "algo.batch_size=16"),
            *("algo.epochs=2", "algo.memory_size=8", "algo.hidden_sizes=[16]", "log_every=30"),
            *("algo.lr_schedule=constant", "algo.clip_schedule=constant", "algo.clip_value=true"),
        ),
        env_steps=128,
        optimizers={"optimizer": 1},
        losses=oracles.recurrent_ppo_losses,
        oracle=oracles.recurrent_ppo_oracle,
        bootstraps=oracles.recurrent_ppo_critic_loss,
        learns=(
            (
                *("env=gym", "env.id=toy_envs:Recall-v0", "env.num_envs=4", "total_env_steps=4000", "algo.gamma=0.5"),
                *("algo.steps_per_iteration=64", "algo.sequence_length=16", "algo.batch_size=64"),
                *("algo.memory_size=16", "algo.lr=1e-2"),
            ),
            4.8,
        ),
    ),
    Row(
        algo="dreamer",
        env="pendulum",
        small=(
            *("algo.size=micro", "algo.batch_size=4", "algo.batch_length=4", "algo.horizon=3", "algo.replay_ratio=0.1"),
            *("algo.learning_starts=40", "algo.free_nats=0", "algo.continue_scale=1", "log_every=30"),
            "env.time_limit=60",
        ),
        env_steps=256,
        optimizers={"model_optimizer": 1, "actor_optimizer": 1, "critic_optimizer": 1},
        bootstraps=lambda algorithm, batch: algorithm.model_loss(oracles.records_of(batch))[1],
        graphs=1,
        learns=(
            (
                *(*POINT, "env.action=rescale", "total_env_steps=1500", "algo.size=micro", "algo.batch_size=8"),
                *("algo.batch_length=10", "algo.horizon=8", "algo.replay_ratio=0.5", "algo.learning_starts=200"),
                *("algo.model_lr=2e-3", "algo.actor_lr=1e-3", "algo.critic_lr=1e-3", "algo.free_nats=1"),
                *("algo.kl_scale=0.1", "algo.initial_std=0.5"),
            ),
            -1.5,
        ),
    ),
    Row(
        algo="dreamer_v3",
        env="pendulum",
        small=(
            *("algo.size=micro", "algo.batch_size=4", "algo.batch_length=4", "algo.horizon=3", "algo.replay_ratio=0.1"),
            *("algo.learning_starts=40", "algo.free_nats=0", "algo.warm_up=2", "log_every=30", "env.num_envs=1"),
            *("algo.steps_per_iteration=32", "algo.lr=1e-3", "env.time_limit=60"),
        ),
        env_steps=256,
        optimizers={"optimizer": 1},
        targets={"slow_critic": ("critic", 0.02, 1)},
        bootstraps=oracles.dreamer_v3_loss,
        batch=oracles.sequences_of,
        graphs=1,
        learns=(
            (
                *(*POINT, "env.action=rescale", "env.num_envs=1", "total_env_steps=2800", "algo.size=micro"),
                *("algo.batch_size=8", "algo.batch_length=8", "algo.horizon=8", "algo.replay_ratio=0.6"),
                *("algo.learning_starts=200", "algo.lr=2e-3", "algo.warm_up=50", "algo.gamma=0.9"),
            ),
            -1.5,
        ),
    ),
    Row(
        algo="world_models",
        env="dodge",
        small=(
            *("env.num_envs=3", "algo.collect_env_steps=100", "algo.vision_updates=8", "algo.memory_updates=8"),
            *("algo.vision_batch_size=8", "algo.memory_batch_size=4", "algo.memory_batch_length=8"),
            *("algo.latent_size=4", "algo.memory_size=8", "algo.controller_training=real", "algo.population=3"),
            *("algo.rollouts=1", "algo.steps_per_iteration=20", "algo.kl_tolerance=0", "log_every=30"),
            "algo.initial_std=1.0",
        ),
        env_steps=400,
        optimizers={"vision_optimizer": 0.5, "memory_optimizer": 0.5},
        bootstraps=oracles.world_models_loss,
        learns=(
            (
                *("env=gym", "env.id=toy_envs:Light-v0", "env.num_envs=4", "total_env_steps=4000"),
                *("algo.collect_env_steps=500", "algo.vision_updates=300", "algo.vision_lr=1e-3"),
                *("algo.memory_updates=100", "algo.memory_batch_size=10", "algo.memory_batch_length=10"),
                *("algo.latent_size=2", "algo.memory_size=8", "algo.population=8", "algo.rollouts=2"),
                *("algo.steps_per_iteration=10", "algo.buffer_size=10000", "algo.buffer_storage=memory"),
            ),
            8.5,
        ),
    ),
]
