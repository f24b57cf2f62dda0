"""Envs that are stepped together, whose every episode has a seed of its own."""

import multiprocessing
import traceback
from functools import partial
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from levin.core.errors import RunError
from levin.core.spaces import NetworkInput, action_converter, describe_action, describe_space, to_gym
from levin.envs.config import EnvConfig
from levin.envs.torchrl import TorchRLVectorEnv


def episode_seed(seed: int, purpose: int, rank: int, env: int, episode: int) -> int:
    """The seed of one episode. No two of (seed, purpose, rank, env, episode) share a stream."""
    return int(np.random.SeedSequence(seed, spawn_key=(purpose, rank, env, episode)).generate_state(1)[0])


class SeededVectorEnv(VectorWrapper):
    """Seeds every episode of every env, and turns the policy's actions into the env's units.

    `episodes[i]` is the number of the episode that env `i` is in. Resetting an env that has not moved since its last
    reset begins the same episode again, so that a library which resets twice at the start changes nothing.

    Not every episode of every family has a seed of its own: see `goes_on`. `episodes` counts those that have.
    """

    def __init__(
        self, env: VectorEnv, config: EnvConfig, *, seed: int, purpose: int, rank: int, first: int = 0
    ) -> None:
        super().__init__(env)
        self.config, self.first = config, first
        self.paired_episodes = False  # whether two episodes in a row have the same seed
        self._seed_of = partial(episode_seed, seed, purpose, rank)
        self.episodes = [-1] * self.num_envs
        # Returns and lengths of the games that ended, where an episode is less than a game; whoever reads it clears it.
        self.games: list[tuple[float, int]] | None = getattr(env, "games", None)
        self._nobody = np.zeros(self.num_envs, dtype=bool)
        self._moves = 0  # vector steps so far
        self._begun = [-1] * self.num_envs  # of them, when each was reset; no reset yet counts as a move
        self._actions: np.ndarray | None = None  # sent, in the env's units
        self.action = describe_action(env.single_action_space)
        self._to_env = action_converter(self.action, config.action)
        if config.action == "rescale" and isinstance(env.single_action_space, Box):  # the space is the policy's too
            self.single_action_space = Box(-1.0, 1.0, env.single_action_space.shape)
            self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.shown = describe_space(env.single_observation_space)
        self.read = NetworkInput(self.shown)
        self.observation = self.read.space
        if not self.read.is_identity:
            self.single_observation_space = to_gym(self.observation)
            self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def episode_seed_of(self, env: int, episode: int) -> int:
        """The seed of an episode of one of the envs."""
        return self._seed_of(env, episode // 2 if self.paired_episodes else episode)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        return self.metadata["autoreset_mode"]

    @property
    def continues_without_seed(self) -> np.ndarray:
        """`[N]`: whose episode is over, and the next one goes on without a seed: after a lost life, say."""
        return self._nobody if self.games is None else self.env.continues_without_seed  # type: ignore[attr-defined]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode of the envs in `options["reset_mask"]` `[N]`, of all without it. `seed` is ours."""
        mask = np.ones(self.num_envs, dtype=bool) if not options else options.get("reset_mask", True)
        seeds: list[int | None] = [None] * self.num_envs
        for i in np.flatnonzero(mask & ~self.continues_without_seed).tolist():
            self.episodes[i] += self._moves > self._begun[i]
            self._begun[i] = self._moves
            seeds[i] = self.episode_seed_of(self.first + i, self.episodes[i])
        options = dict(options) if options else None
        try:
            if isinstance(self.env, AsyncVectorEnv):
                self.env.reset_async(seed=seeds, options=options)
                observation, info = self.env.reset_wait(timeout=self.config.timeout)
            else:
                observation, info = self.env.reset(seed=seeds, options=options)  # type: ignore[arg-type]
            return self.read(observation), info
        except Exception as error:
            raise self._failure("reset", error) from error

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of all envs. Raises RunError when one raises, or an async one takes longer than the timeout."""
        self.send(actions)
        return self.receive()

    def send(self, actions: np.ndarray) -> None:
        """The first half of a step. Atari begins now, while what it showed last is copied; others share that memory."""
        self._moves += 1
        self._actions = self._to_env(actions)
        if self.config.family == "atari":
            self.env.send(self._actions)  # type: ignore[attr-defined]

    def receive(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """The second half."""
        try:
            if isinstance(self.env, AsyncVectorEnv):
                self.env.step_async(self._actions)  # type: ignore[arg-type]
                observation, *rest = self.env.step_wait(timeout=self.config.timeout)
            elif self.config.family == "atari":
                observation, *rest = self.env.receive()  # type: ignore[attr-defined]
            else:
                observation, *rest = self.env.step(self._actions)  # type: ignore[arg-type]
            return self.read(observation), *rest  # type: ignore[return-value]
        except Exception as error:
            raise self._failure("step", error) from error

    def _failure(self, what: str, error: Exception) -> RunError:
        culprit, said = self._culprit(error), f"raised {type(error).__name__}: {error}"
        if isinstance(error, multiprocessing.TimeoutError):
            said = f"did not come back within env.timeout={self.config.timeout:g} seconds"
        elif isinstance(error, EOFError | ConnectionError):
            said = "lost its process"
        elif isinstance(self.env, AsyncVectorEnv):
            said += " (env.vectorization=sync shows where)"
        if isinstance(self.env, AsyncVectorEnv):
            self.env.close(terminate=True)  # a worker that hangs would be waited for
        if culprit is not None:
            env, episode = self.first + culprit, self.episodes[culprit]
            step, seed = self._moves - self._begun[culprit], self.episode_seed_of(env, episode)
            said += f"; env {env}, step {step} of episode {episode}, seed {seed}"
        return RunError(f"the {what} of {self.config.id} {said}")

    def _culprit(self, error: Exception) -> int | None:
        """Which env it was, as far as one can tell."""
        if isinstance(self.env, AsyncVectorEnv):
            for i, (pipe, process) in enumerate(zip(self.env.parent_pipes, self.env.processes, strict=True)):
                if pipe is None:  # closed by Gymnasium when its env raised
                    return i
                if isinstance(error, multiprocessing.TimeoutError):
                    if not pipe.poll():
                        return i
                elif isinstance(error, EOFError | ConnectionError):
                    process.join(0.2)  # its pipe is closed before it has ended
                    if process.exitcode is not None:
                        return i
        for frame, _ in traceback.walk_tb(error.__traceback__):  # where the loop over the envs stands
            if frame.f_code in (SyncVectorEnv.step.__code__, SyncVectorEnv.reset.__code__):
                return frame.f_locals["i"]
            if frame.f_code in (TorchRLVectorEnv.step.__code__, TorchRLVectorEnv.reset.__code__):
                return frame.f_locals["part"].start
        return None

    def begin(self, episodes: list[int], mask: np.ndarray) -> Any:
        """Begin episode `episodes[i]` in every env of the mask `[N]`; returns the observations `[N, *shape]`."""
        for i in np.flatnonzero(mask):
            self.episodes[i], self._begun[i] = episodes[i], self._moves
        self.continues_without_seed[mask] = False
        return self.reset(options={"reset_mask": mask})[0]
