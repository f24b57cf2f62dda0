"""Vector env that seeds every episode separately, and converts the policy's actions to the env's units."""

import multiprocessing
import traceback
import warnings
from functools import partial
from typing import Any, cast

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.async_vector_env import AsyncState
from gymnasium.vector.utils import batch_space

from levin.core.errors import ObservationError, RunError
from levin.core.network_input import NetworkInput
from levin.core.spaces import (
    ACTION_MASK,
    action_converter,
    count_actions,
    describe_action,
    describe_space,
    forbids_all,
    has_bound,
    mark_mask,
    to_gym,
    unusual_channels,
)
from levin.envs.config import EnvConfig, channels_of
from levin.envs.sync import ENDED, EnvProcessError, SyncEnvs
from levin.envs.torchrl import TorchRLVectorEnv
from levin.model_based.dream_env import LatentEnv


def episode_seed(seed: int, purpose: int, rank: int, env: int, episode: int) -> int:
    """Return the seed of one episode, a hash of all arguments of 32 bits.

    Two given episodes have the same seed with a probability of 1 / 2^32. Among the 10^5 episodes of a long run there
    are one or two such pairs.
    """
    return int(np.random.SeedSequence(seed, spawn_key=(purpose, rank, env, episode)).generate_state(1)[0])


class SeededVectorEnv(VectorWrapper):
    """Wrapper of a vector env that seeds every episode of every env, and converts actions to the env's units.

    `episodes[i]` is the number of the current episode of env `i`. An env that is reset again before it has taken a step
    begins the same episode again, so a library that resets twice at the start changes nothing.

    Some families also have episodes without a seed of their own, which `episodes` does not count: see
    `continues_without_seed`.

    Args:
        env: Vector env with autoreset DISABLED.
        config: Options of the env.
        seed: Root of all episode seeds, together with `purpose` and `rank`.
        purpose: `TRAINING` or `EVALUATION`.
        rank: Rank that steps the envs.
        first: Number of the first env, if these envs are a part of the run's.
    """

    def __init__(
        self, env: VectorEnv, config: EnvConfig, *, seed: int, purpose: int, rank: int, first: int = 0
    ) -> None:
        super().__init__(env)
        self.config, self.rank, self.first = config, rank, first
        self.paired_episodes = False  # whether episodes 2k and 2k + 1 have the same seed
        self._seed_of = partial(episode_seed, seed, purpose, rank)
        self.episodes = [-1] * self.num_envs
        self.base = env.env if isinstance(env, LatentEnv) else env
        # Env and numbers of the episodes that have ended, of envs that report any. The reader clears it.
        self.ended: list[tuple[int, dict[str, float]]] = getattr(self.base, "ended", [])
        # Scores and lengths of finished games, if an episode may be less than a game; else None. The reader clears it.
        self.games: list[tuple[float, int]] | None = getattr(env, "games", None)
        self._no_envs = np.zeros(self.num_envs, dtype=bool)
        self._vector_steps = 0  # since this object was made
        self._reset_at = [-1] * self.num_envs  # `_vector_steps` at the last reset of each env; -1: not reset yet
        self._actions: np.ndarray | None = None  # of the current step, in the env's units
        self.action = describe_action(env.single_action_space)
        self.to_env = action_converter(self.action, config.action)
        if config.action == "rescale" and isinstance(env.single_action_space, Box):
            # The action space that the policy sees.
            self.single_action_space = Box(-1.0, 1.0, env.single_action_space.shape)
            self.action_space = batch_space(self.single_action_space, self.num_envs)
        elif isinstance(space := env.single_action_space, Box) and ((space.low >= 1) | (space.high <= -1)).any():
            is_finite = (has_bound(space.low) & has_bound(space.high)).all()
            advice = "set env.action=rescale" if is_finite else "give the env finite bounds and set env.action=rescale"
            warnings.warn(
                f"the action bounds of {config.id} exclude (-1, 1), where policies such as SAC's act: {advice}",
                stacklevel=1,
            )
        channels = channels_of(config)
        self.shown = describe_space(env.single_observation_space, channels)
        for shape, count in unusual_channels(self.shown) if channels is None else []:
            warnings.warn(
                f"{config.id} shows pixels of the shape {shape}, which are taken for {count} channels: set "
                "env.channels=first or env.channels=last to say which axis they are",
                stacklevel=1,
            )
        if config.action_mask is not None:
            key = ACTION_MASK if config.action_mask == "info" else config.action_mask
            self.shown = mark_mask(self.shown, key, count_actions(env.single_action_space))
        self.read = NetworkInput(self.shown)
        self.observation = self.read.space
        if not self.read.is_identity:
            self.single_observation_space = to_gym(self.observation)
            self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def episode_seed_of(self, env: int, episode: int) -> int:
        """Return the seed of an episode of an env, both by their numbers."""
        return self._seed_of(env, episode // 2 if self.paired_episodes else episode)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        return self.metadata["autoreset_mode"]

    @property
    def continues_without_seed(self) -> np.ndarray:
        """Flags `[N]`: an episode is over, and the next begins without a new seed, as after a lost life in Atari."""
        return self._no_envs if self.games is None else self.env.continues_without_seed  # type: ignore[attr-defined]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode of the envs in `options["reset_mask"]` `[N]`, or of all envs. `seed` is ignored.

        Raises:
            RunError: An env failed.
        """
        mask = np.ones(self.num_envs, dtype=bool) if not options else options.get("reset_mask", True)
        seeds: list[int | None] = [None] * self.num_envs
        for i in (mask & ~self.continues_without_seed).nonzero()[0].tolist():
            self.episodes[i] += self._vector_steps > self._reset_at[i]
            self._reset_at[i] = self._vector_steps
            seeds[i] = self.episode_seed_of(self.first + i, self.episodes[i])
        options = dict(options) if options else None
        try:
            if isinstance(self.env, AsyncVectorEnv):
                self.env.reset_async(seed=seeds, options=options)
                observation, info = self.env.reset_wait(timeout=self.config.timeout)
            else:
                observation, info = self.env.reset(seed=seeds, options=options)  # type: ignore[arg-type]
            return self._read(observation, mask), info
        except Exception as error:
            raise self._run_error("reset", error) from error

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all envs.

        Raises:
            RunError: An env raised an error, or an async env took longer than `env.timeout`.
        """
        self.send(actions)
        return self.receive()

    def send(self, actions: np.ndarray) -> None:
        """Start a step, the first half of `step`.

        Atari starts to compute at once, while the caller copies the last observation. Other envs only start in
        `receive`, because they would overwrite that observation.
        """
        self._vector_steps += 1
        self._actions = self.to_env(actions)
        if self.config.family == "atari":
            self.env.send(self._actions)  # type: ignore[attr-defined]

    def receive(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Finish the step that `send` started; return its observations, rewards, end flags and infos.

        Raises:
            RunError: An env failed.
        """
        try:
            if isinstance(self.env, AsyncVectorEnv):
                self.env.step_async(self._actions)  # type: ignore[arg-type]
                observation, *rest = self.env.step_wait(timeout=self.config.timeout)
                infos = cast(dict[str, Any], rest[-1])
                if ENDED in infos:
                    self._add_ended(infos[ENDED])
            elif self.config.family == "atari":
                observation, *rest = self.env.receive()  # type: ignore[attr-defined]
            else:
                observation, *rest = self.env.step(self._actions)  # type: ignore[arg-type]
            return self._read(observation, ~rest[1], rest[2]), *rest  # type: ignore[return-value, operator]
        except Exception as error:
            raise self._run_error("step", error) from error

    def _read(self, observation: Any, acts: np.ndarray, truncated: np.ndarray | None = None) -> Any:
        """Convert observations to network input.

        Args:
            observation: Observations of all envs.
            acts: `[N]`, envs whose mask must allow an action: all that were reset, or whose episode has not terminated.
            truncated: `[N]`, envs whose episode was truncated, for the message; None: the envs were reset.

        Raises:
            ObservationError: The mask of an env in `acts` allows no action.
        """
        converted = self.read(observation)
        if self.read.mask:
            wrong = np.flatnonzero(forbids_all(converted[ACTION_MASK], self.action) & acts)
            if wrong.size:
                reason = "the action mask allows no action"
                if truncated is not None and truncated[wrong[0]]:
                    reason += ", but a truncated episode bootstraps from its last state"
                reason += ": return a mask with a 1" + ("" if truncated is None else ", or terminated=True")
                raise ObservationError(int(wrong[0]), reason)
        return converted

    def _add_ended(self, numbers: dict[str, np.ndarray]) -> None:
        """Add the numbers of ended episodes, which Gymnasium has gathered as `name -> [N]` and `_name -> mask [N]`."""
        names = [name for name in numbers if f"_{name}" in numbers]
        for i in range(self.num_envs):
            own = {name: float(numbers[name][i]) for name in names if numbers[f"_{name}"][i]}
            if own:
                self.ended.append((i, own))

    def _run_error(self, operation: str, error: Exception) -> RunError:
        """Build the error for a failed `step` or `reset`: the cause, and the env, step, episode and seed."""
        failed = error.env if isinstance(error, ObservationError) else self._failed_env(error)
        reason = f"raised {type(error).__name__}: {error}"
        if isinstance(error, EnvProcessError):
            reason = f"raised {error} (env.vectorization=sync shows the traceback)"
        elif isinstance(error, ObservationError):
            reason = f"failed: {error}"
        elif isinstance(error, multiprocessing.TimeoutError):
            reason = f"did not come back within env.timeout={self.config.timeout:g} seconds"
            reason += " (raise env.timeout if it may take longer)"
        elif isinstance(error, EOFError | ConnectionError):
            reason = "failed: its process has ended"
        elif isinstance(self.env, AsyncVectorEnv):
            reason += " (env.vectorization=sync shows the traceback)"
        if isinstance(self.env, AsyncVectorEnv):
            self.env._state = AsyncState.DEFAULT  # otherwise `close` would wait for the answers of this call,
            self.env.close(terminate=True)  # and without `terminate` for a process that hangs
        if failed is not None:
            env, episode = self.first + failed, self.episodes[failed]
            step, seed = self._vector_steps - self._reset_at[failed], self.episode_seed_of(env, episode)
            reason += f"; env {env}, step {step} of episode {episode}, seed {seed}"
        return RunError(f"the {operation} of {self.config.id} {reason}")

    def _failed_env(self, error: Exception) -> int | None:
        """Return the index of the env that failed (with TorchRL, of the first env of its batch); None: unknown."""
        if isinstance(self.env, AsyncVectorEnv):
            for i, (pipe, process) in enumerate(zip(self.env.parent_pipes, self.env.processes, strict=True)):
                if pipe is None:  # closed by Gymnasium when its env raised
                    return i
                if isinstance(error, multiprocessing.TimeoutError):
                    if not pipe.poll():
                        return i
                elif isinstance(error, EOFError | ConnectionError):
                    process.join(0.2)  # its pipe closes before the process has ended
                    if process.exitcode is not None:
                        return i
        for frame, _ in traceback.walk_tb(error.__traceback__):  # read the index from the loop over the envs
            if frame.f_code in (SyncEnvs._step_envs.__code__, SyncEnvs._reset_envs.__code__):
                return frame.f_locals["i"]
            if frame.f_code in (TorchRLVectorEnv.step.__code__, TorchRLVectorEnv.reset.__code__):
                return frame.f_locals["part"].start
        return None

    def begin(self, episodes: list[int], mask: np.ndarray) -> Any:
        """Begin episode `episodes[i]` in every env `i` of the mask `[N]`; return the observations `[N, *S]`."""
        for i in np.flatnonzero(mask):
            self.episodes[i], self._reset_at[i] = episodes[i], self._vector_steps
        self.continues_without_seed[mask] = False
        if isinstance(self.base, TorchRLVectorEnv):
            self.base.restart()
        return self.reset(options={"reset_mask": mask})[0]
