"""Options of an environment: every key of `configs/env/*.yaml`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from levin.core.types import PositiveFloat, PositiveInt

# The first word of an episode's seed: what the episode is for.
TRAINING, EVALUATION = 0, 1


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """What a `configs/env/*.yaml` may say.

    Args:
        id: A gymnasium id; `my_module:MyEnv-v0` imports `my_module` first. Of Atari a game, as in `space_invaders`.
        family: The library behind the id; `dm_control` ids are those of Shimmy, `dm_control/walker-walk-v0`; `atari` is
            ale-py's vector env, see `levin.envs.atari`; with `torchrl` the id is only a name, and with `dream`,
            which is the model of `run`.
        target: `my_module:make_env`, what makes a `torchrl.envs.EnvBase`, of one env or a batch of them.
        num_envs: Copies that are stepped together.
        vectorization: `sync` steps them in this process, `async` in one process each (for slow envs).
        timeout: Seconds that async envs may take for a step or a reset.
        action: `rescale` maps the policy's [-1, 1] onto the env's bounds, `clip` cuts at them, `none` does neither.
        time_limit: Steps of the env before truncation; null keeps the limit the id was registered with.
        action_repeat: Env steps per action. The rewards of the repeats are summed; `time_limit` counts env steps, which
            of Atari are frames.
        pixels: Show a picture of the scene, `[3, pixels, pixels]`, instead of the state (MuJoCo and dm_control).
        observation_entries: The numbers of a vector that are shown, by their places; null: all. `[0, 1]` hides how fast
            Pendulum-v1 turns.
        frame_stack: The newest observations, shown together along the first axis, oldest first; `[C, H, W]` or `[H, W]`
            pixels become `[K * C, H, W]` or `[K, H, W]`. An episode begins with its first observation K times.
        normalize_observation: Subtract the running mean and divide by the running deviation.
        observation_clip: Bound on a normalised observation.
        normalize_reward: Divide by the running deviation of the discounted return.
        reward_clip: Bound on a normalised reward.
        run: Whose model is dreamt in, or seen with: of world_models, dreamer or dreamer_v3. See
            `levin.model_based.dream_env`.
        temperature: Of a dream's draws, tau.
        wrappers: `[latent]` shows what the model of `run` makes of each observation.
        kwargs: Passed on to `gymnasium.make`, `levin.envs.atari.AtariGames`, or the target.
    """

    id: str
    family: Literal["gymnasium", "dm_control", "atari", "torchrl", "dream"] = "gymnasium"
    target: str | None = None
    num_envs: PositiveInt = 1
    vectorization: Literal["sync", "async"] = "sync"
    timeout: PositiveFloat = 300.0
    action: Literal["rescale", "clip", "none"] = "none"
    time_limit: PositiveInt | None = None
    action_repeat: PositiveInt = 1
    pixels: PositiveInt | None = None
    observation_entries: list[int] | None = None
    frame_stack: PositiveInt = 1
    normalize_observation: bool = False
    observation_clip: PositiveFloat = 10.0
    normalize_reward: bool = False
    reward_clip: PositiveFloat = 10.0
    run: str | None = None
    temperature: PositiveFloat = 1.0
    wrappers: list[Literal["latent"]] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
