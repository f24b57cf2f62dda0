"""Atari on ale-py's vector env, which plays and prepares all games in C++ threads.

Preprocessing is that of Mnih et al. 2015 in the form of OpenAI Baselines: up to 30 frames without action, each action
for 4 frames, the maximum of the last two, grey 84 x 84, the newest 4 together. In training an episode ends with a life
and rewards are cut to their sign; an evaluation plays whole games for the score.

Deviations from Baselines, all of ale-py:
    - FIRE is pressed once, for one frame, at the beginning of a game, before the frames without action; not after a
      lost life.
    - The first observation of a game is one frame on top of three black ones, and the stack outlives a lost life.
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
    """N consoles with autoreset DISABLED: the observation that ends an episode is the true one.

    Ale-py knows no such mode; a masked reset before the next step takes the place of the reset that it has in mind.

    To seed a game, ale-py 0.12 loads it anew, which takes as long as three hundred of its steps. So a console is seeded
    and then plays on, game after game, for `reseed_every` steps. What an earlier game has left in the memory of
    a console may change the next one (BeamRider, Seaquest): what must be replayed is all since the seed.

    Args:
        game: As ale-py spells it: `space_invaders`.
        num_envs: Consoles.
        training: Whether a lost life ends an episode, rewards are cut, and several games share a seed.
        episodic_life: The first of these.
        reward_clipping: The second.
        reseed_every: Steps of a console after which its next game has a seed of its own; in an evaluation each has.
        view: Whether `render` gives frames in colour, those of a twin that is stepped along.
        kwargs: Of `AtariVectorEnv`.
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
        self.games: list[tuple[float, int]] = []  # score and steps of those that ended; whoever reads it clears it
        self.continues_without_seed, self.over = np.zeros(
            (2, num_envs), dtype=bool
        )  # [N]: without a new seed; whose game is over
        self.lives, self.steps, self.score, self.length = np.zeros((4, num_envs), dtype=np.int64)  # since seed; of game

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Seed the consoles of `options["reset_mask"]` `[N]`, of all without it.

        Args:
            seed: `[N]`. A console whose seed is None goes on, with a new game if the last one is over.
            options: May hold the mask.
        """
        mask = options["reset_mask"] if options else np.ones(self.num_envs, dtype=bool)
        seeded = mask & np.array([each is not None for each in seed])
        begins = seeded | (mask & self.over)
        info = {}
        if begins.any():
            seeds = np.array([-1 if each is None else each >> 1 for each in seed])[begins]  # ale-py reads 31 bits
            self.observation, info = super().reset(seed=seeds, options={"reset_mask": begins})
            self.lives = info["lives"]
            self.steps[seeded] = self.score[begins] = self.length[begins] = self.over[begins] = 0
            if self.view:
                self.frames, _ = self.view.reset(seed=seeds, options={"reset_mask": begins})
        return self.observation, info

    def send(self, actions: np.ndarray) -> None:
        """Begin a step of all games. What they showed before stays as it is."""
        super().send(actions)
        if self.view:
            self.view.send(actions)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of all games."""
        self.send(actions)
        return self.receive()

    def receive(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """What has become of it."""
        # Ale-py has flags for lost lives: one begins the whole game anew, the other hides that it is over.
        self.observation, rewards, ends, cuts, info = self.recv()
        if self.view:
            self.frames, *_ = self.view.recv()
        self.steps += 1
        self.score += rewards
        self.length += 1
        lives, self.lives = self.lives, info["lives"]
        lost = self.lives < lives
        self.over, self.continues_without_seed = ends | cuts, np.zeros(self.num_envs, dtype=bool)
        if lost.any() or self.over.any():
            self.games += [(float(self.score[i]), int(self.length[i])) for i in np.flatnonzero(self.over)]
            lost &= (self.lives > 0) & self.episodic_life
            self.continues_without_seed = np.where(self.over, self.steps < self.reseed_every, lost)
            ends = ends | lost
        return self.observation, np.sign(rewards) if self.reward_clipping else rewards, ends, cuts, info

    def render(self) -> tuple[np.ndarray, ...]:
        """`N x [210, 160, 3]`."""
        return tuple(self.frames[:, -1])


def make_atari_games(config: EnvConfig, num_envs: int, *, training: bool, view: bool) -> AtariGames:
    """The games that a config asks for.

    Raises:
        ConfigError: There is no such game, or a key means nothing here.
    """
    if config.id not in roms.get_all_rom_ids():
        valid = valid_names(config.id.split("/")[-1].lower(), roms.get_all_rom_ids())  # ALE/Pong-v5 is near pong
        raise ConfigError(f"env.id={config.id} is no game of ale-py; {valid}")
    for key, value, why in (
        ("vectorization", "async", "ale-py steps its games in threads of its own"),
        ("action", "rescale", "a joystick has no bounds"),
        ("normalize_observation", True, "networks scale pixels themselves"),
        ("pixels", config.pixels or 0, "it shows nothing else; env.kwargs.img_height and img_width are their size"),
    ):
        if getattr(config, key) == value:
            raise ConfigError(f"env.{key}={value} is not for env.family=atari: {why}")
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
