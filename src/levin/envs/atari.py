"""Atari games on ale-py's vector env, which steps and preprocesses all games in C++ threads.

Preprocessing follows Mnih et al. 2015 as implemented in OpenAI Baselines: no-op frames at the start, each action
repeated for 4 frames, the pixelwise maximum of the last two frames, 84 x 84 greyscale, and a stack of the newest 4. In
training, a lost life ends an episode and rewards are clipped to their sign; an evaluation plays whole games and reports
the score.

Deviations from Baselines, all due to ale-py:
    - FIRE is pressed once, for one frame, at the beginning of a game, before the no-op frames; not after a lost life.
    - There are 0 to 29 no-op frames, or 0 to 28 after FIRE, instead of 1 to 30.
    - The first observation of a game is one frame and three black ones, and a lost life does not clear the stack: the
      next episode begins with the observation at which it was lost, without a no-op step.
    - The maximum is that of two grey frames, instead of the colours.
    - A game is truncated after 108,000 frames, unless `env.time_limit` says otherwise.
"""

from typing import Any

import numpy as np
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode

from levin.core.errors import ConfigError, valid_names
from levin.envs.config import EnvConfig

FRAMES_PER_SECOND = 60


class AtariGames(AtariVectorEnv):
    """N games with autoreset DISABLED, so that the last observation of an episode is the true one.

    Ale-py has no such mode: it would reset a finished game at the next step, and a masked reset before that step
    replaces its own.

    To seed a game, ale-py 0.12 reloads it, which takes as long as three hundred steps. So an env is seeded once and
    then plays one game after the other for `reseed_every` steps. What an earlier game left in the console's memory may
    change the next one (BeamRider, Seaquest), so a replay must repeat everything since the last seed.

    Args:
        game: Name of the game as ale-py spells it, such as `space_invaders`.
        num_envs: Number of envs N.
        training: Whether to train: a lost life ends an episode, rewards are clipped, and several games share a seed.
        episodic_life: Whether a lost life ends an episode in training.
        reward_clipping: Whether rewards are clipped to their sign in training.
        reseed_every: Steps of an env after which its next game gets a new seed; in an evaluation every game does.
        view: Whether `render` returns colour frames, which needs a second copy of each game.
        kwargs: Passed on to `AtariVectorEnv`.
    """

    def __init__(
        self,
        game: str,
        num_envs: int,
        *,
        training: bool,
        episodic_life: bool = True,
        reward_clipping: bool = True,
        reseed_every: int = 20_000,
        view: bool = False,
        **kwargs: Any,
    ) -> None:
        self.metadata = {"render_fps": FRAMES_PER_SECOND // kwargs.get("frameskip", 4)}
        super().__init__(game, num_envs, reward_clipping=False, **kwargs)
        self.autoreset_mode = self.metadata["autoreset_mode"] = AutoresetMode.DISABLED
        colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1, "reward_clipping": False}
        self.view = AtariVectorEnv(game, num_envs, **{**kwargs, **colour}) if view else None
        self.episodic_life, self.reward_clipping = training and episodic_life, training and reward_clipping
        self.reseed_every = reseed_every if training else 0
        self.games: list[tuple[float, int]] = []  # score and steps of each finished game; the reader clears it
        # [N] each: whether the next episode begins without a new seed, and whether the game is over
        self.continues_without_seed, self.game_over = np.zeros((2, num_envs), dtype=bool)
        # [N] each: lives left, steps since the last seed, score and steps of the current game
        self.lives, self.steps, self.score, self.length = np.zeros((4, num_envs), dtype=np.int64)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset the envs in `options["reset_mask"]` `[N]`, or all envs if there is no mask.

        Args:
            seed: `[N]`. An env whose seed is None continues its game, or begins a new one if that is over.
            options: Holds the mask, or is None.
        """
        mask = options["reset_mask"] if options else np.ones(self.num_envs, dtype=bool)
        seeded = mask & np.array([each is not None for each in seed])
        begins = seeded | (mask & self.game_over)
        info = {}
        if begins.any():
            seeds = np.array([-1 if each is None else each >> 1 for each in seed])[begins]  # ale-py reads 31 bits
            self.observation, info = super().reset(seed=seeds, options={"reset_mask": begins})
            self.lives = info["lives"]
            self.steps[seeded] = self.score[begins] = self.length[begins] = self.game_over[begins] = 0
            if self.view:
                self.frames, _ = self.view.reset(seed=seeds, options={"reset_mask": begins})
        return self.observation, info

    def send(self, actions: np.ndarray) -> None:
        """Start a step of all games. The previous observation is not overwritten."""
        super().send(actions)
        if self.view:
            self.view.send(actions)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all games."""
        self.send(actions)
        return self.receive()

    def receive(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Finish the step that `send` started; return observations, rewards, end flags and infos."""
        # Ale-py's own options for lost lives do not fit: one restarts the whole game, the other hides that it is over.
        self.observation, rewards, terminated, truncated, info = self.recv()
        if self.view:
            self.frames, *_ = self.view.recv()
        self.steps += 1
        self.score += rewards
        self.length += 1
        lives, self.lives = self.lives, info["lives"]
        lost = self.lives < lives
        self.game_over, self.continues_without_seed = terminated | truncated, np.zeros(self.num_envs, dtype=bool)
        if lost.any() or self.game_over.any():
            self.games += [(float(self.score[i]), int(self.length[i])) for i in np.flatnonzero(self.game_over)]
            lost &= (self.lives > 0) & self.episodic_life
            self.continues_without_seed = np.where(self.game_over, self.steps < self.reseed_every, lost)
            terminated = terminated | lost
        return self.observation, np.sign(rewards) if self.reward_clipping else rewards, terminated, truncated, info

    def render(self) -> tuple[np.ndarray, ...]:
        """Return the current colour frames, N times `[210, 160, 3]`."""
        return tuple(self.frames[:, -1])


def make_atari_games(config: EnvConfig, num_envs: int, *, training: bool, view: bool) -> AtariGames:
    """Build the vector env of Atari games that a config describes.

    Raises:
        ConfigError: There is no such game, or a key has a value that Atari does not support.
    """
    if config.id not in roms.get_all_rom_ids():
        valid = valid_names(config.id.split("/")[-1].lower(), roms.get_all_rom_ids())  # for ALE/Pong-v5, suggest pong
        raise ConfigError(f"env.id={config.id} is not a game of ale-py; {valid}")
    for key, value, reason in (
        ("vectorization", "async", "ale-py steps games in threads of its own"),
        ("normalize_observation", True, "networks scale pixels themselves"),
        ("observation_entries", config.observation_entries or [], "it always shows pixels"),
        ("pixels", config.pixels or 0, "it always shows pixels; env.kwargs.img_height and img_width set their size"),
    ):
        if getattr(config, key) == value:
            raise ConfigError(f"env.{key}={value} is not for env.family=atari: {reason}")
    limit = {"max_num_frames_per_episode": config.time_limit} if config.time_limit else {}
    return AtariGames(
        config.id,
        num_envs,
        training=training,
        view=view,
        frameskip=config.action_repeat,
        stack_num=config.frame_stack,
        **limit,
        **config.kwargs,
    )
