"""Options of an environment: every key of `configs/env/*.yaml`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from levin.core.types import PositiveFloat, PositiveInt

# Purpose of an episode, one of the numbers that its seed is derived from.
TRAINING, EVALUATION = 0, 1


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Options of an environment, the keys of `configs/env/*.yaml`.

    Args:
        id: Gymnasium id; `my_module:MyEnv-v0` imports `my_module` first. For Atari the name of a game, such as
            `space_invaders`. For `torchrl` and `dream` only a label, but envs of `levin.envs.batched` are drawn by the
            gymnasium env of this id.
        family: Library behind the id. `dm_control` takes Shimmy's ids, such as `dm_control/walker-walk-v0`; `atari` is
            ale-py's vector env (`levin.envs.atari`); `torchrl` calls `target`; `dream` is the world model of `run`.
        target: `my_module:make_env`, a function that returns a `torchrl.envs.EnvBase`, single or batched. If it
            has a parameter `num_envs`, it is called with the number of envs, and returns one `EnvBase` of that size.
        num_envs: Number of envs N that are stepped together.
        vectorization: `sync` steps all envs in this process, `async` each in a process of its own (for slow envs).
        timeout: Seconds that async envs, and those of a collector's workers, may take for a step or a reset.
        action: `rescale` maps the policy's [-1, 1] to the env's bounds, `clip` clips to them, `none` does neither.
        time_limit: Steps of the env before truncation; null keeps the limit the id was registered with.
        action_repeat: Number of times each action is applied, with the rewards summed. `time_limit` counts every
            repeat (for Atari, frames).
        pixels: Side of a square image of the scene, `[3, pixels, pixels]`, which replaces the state as the observation
            (MuJoCo and dm_control).
        observation_entries: Indices of the vector entries that are observed; null: all. `[0, 1]` hides the angular
            velocity of Pendulum-v1.
        channels: Axis of the channels of images: `first` `[C, H, W]` or `last` `[H, W, C]`; null: recognise it.
        frame_stack: Number K of newest observations that are stacked along the first axis, oldest first; `[C, H, W]` or
            `[H, W]` pixels become `[K * C, H, W]` or `[K, H, W]`. An episode begins with its first observation K times;
            for Atari, a game begins with a frame and black ones, and an episode after a lost life with the last K.
        action_mask: Where masks of discrete actions are: `info`, in `info["action_mask"]` of `reset` and `step`; or the
            name of a part of a Dict observation; null: no masks. A mask is `[A]`, 1 for allowed actions and 0 for
            others, which are never taken; for MultiDiscrete, A is the sum of `nvec`.
        normalize_observation: Whether to subtract the running mean and divide by the running standard deviation.
            Pixels are left as they are: networks scale them.
        observation_clip: Bound on a normalised observation.
        normalize_reward: Whether to divide by the running standard deviation of the discounted return.
        reward_clip: Bound on a normalised reward.
        run: Run of world_models, dreamer or dreamer_v3 whose world model is used, for `family=dream` and for
            `wrappers=[latent]`. See `levin.model_based.dream_env`.
        temperature: Sampling temperature tau of the `dream` family.
        wrappers: `[latent]` replaces each observation by the features of the latent state of the world model of `run`.
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
    channels: Literal["first", "last"] | None = None
    frame_stack: PositiveInt = 1
    action_mask: str | None = None
    normalize_observation: bool = False
    observation_clip: PositiveFloat = 10.0
    normalize_reward: bool = False
    reward_clip: PositiveFloat = 10.0
    run: str | None = None
    temperature: PositiveFloat = 1.0
    wrappers: list[Literal["latent"]] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)


def channels_of(config: EnvConfig) -> Literal["first", "last"] | None:
    """Return the axis of the channels of the images that an algorithm receives; None: guess it."""
    return "first" if config.frame_stack > 1 else config.channels  # stacked: [K * C, H, W]
