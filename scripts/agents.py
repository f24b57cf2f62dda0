"""Draw the trained agents: `.venv/bin/python scripts/agents.py [results...]`.

For each result in experiments/ that has a stored policy, play one episode and write its first seconds as a looping
animation, `experiments/<result>/policy.webp`. An algorithm that dreams pictures is shown beside its dream. Without
names, all results are drawn, and docs/agents.webp, the strip of agents in the README. `--strip` draws only the strip.

Rendering needs the extras mujoco and box2d, and for MuJoCo a display or the Debian packages libegl1 and libgl1. The
same policy, versions and rendering library give the same file.
"""

import argparse
import io
import os
import sys
from collections.abc import Iterable
from itertools import islice, product
from pathlib import Path

if sys.platform == "linux":  # macOS has one way to render, and no EGL
    os.environ.setdefault("MUJOCO_GL", "egl")

import torch
from PIL import Image, ImageDraw, ImageFont

from levin.core import files, paths
from levin.core.errors import ConfigError
from levin.results.result import ANIMATION, result_folder, result_folders
from levin.runs.load import POLICY
from levin.training import video

SEED = 1
EPISODES = {"world_models_dodge": 6}  # number of the episode, else 0; the dream of this one does not end early
SECONDS, FRAMES_PER_SECOND = 6, 10  # of an animation, at most
HOLD_MS = 600  # how long the last frame is shown before the animation starts again
WIDTHS, MAX_BYTES = (200, 150), 120_000  # of policy.webp: pixels, and size of the file
QUALITIES = (70, 60, 50, 40, 30)

STRIP = paths.ROOT / "docs" / "agents.webp"
STRIP_HEIGHT, STRIP_GAP, STRIP_MAX_BYTES = 148, 3, 700_000
STRIP_AGENTS = {  # result: label
    "sac_halfcheetah": "SAC, HalfCheetah",
    "ppo_hopper": "PPO, Hopper",
    "ppo_lunarlander": "PPO, LunarLander",
    "dqn_cartpole": "DQN, CartPole",
    "world_models_dodge": "World Models, Dodge: env and dream",
}


def play_frames(folder: Path) -> tuple[list[Image.Image], int]:
    """Play the first seconds of an episode of a result's policy; return the frames and their duration in ms."""
    policy, env = video.load_policy_and_env(str(folder), SEED)
    every = max(1, round(video.frames_per_second(env) / FRAMES_PER_SECOND))
    duration, observations = round(1000 * every / video.frames_per_second(env)), []
    played = video.play(policy, env, EPISODES.get(folder.name, 0), sys.maxsize, observations, every=every)
    frames = list(islice(played, SECONDS * 1000 // duration))
    if (beside := video.dream_beside(policy, env, observations)) is not None:
        frames = beside[::every]
    env.close()
    return [Image.fromarray(frame) for frame in frames], duration


def encode(frames: list[Image.Image], duration: int, max_bytes: int, widths: Iterable[int]) -> bytes:
    """Return the frames as a looping animated WebP: the largest of the widths and best quality that fit.

    Raises:
        ConfigError: None fits.
    """
    durations = [duration] * (len(frames) - 1) + [HOLD_MS]
    for width, quality in product(widths, QUALITIES):
        height = round(frames[0].height * width / frames[0].width)
        first, *rest = (frame.resize((width, height), Image.Resampling.BOX) for frame in frames)
        packed = io.BytesIO()
        options = {"duration": durations, "loop": 0, "quality": quality, "method": 6}
        first.save(packed, "WEBP", save_all=True, append_images=rest, **options)
        if packed.tell() <= max_bytes:
            return packed.getvalue()
    raise ConfigError(f"{len(frames)} frames of {frames[0].size} pixels do not fit into {max_bytes:,} bytes")


def write(path: Path, content: bytes) -> None:
    """Write a file and print its path and size."""
    with files.replace(path.parent, path.name) as partial:
        partial.write_bytes(content)
    print(f"{path.relative_to(paths.ROOT)}: {len(content):,} bytes", flush=True)


def make_tile(frame: Image.Image, label: str) -> Image.Image:
    """Return the middle of a frame as a square of the strip's height, or two squares of a dream, with a label."""
    squares = 2 if frame.width > 1.9 * frame.height else 1
    side = min(frame.height, frame.width // squares)
    left, top = (frame.width - squares * side) // 2, (frame.height - side) // 2
    frame = frame.crop((left, top, left + squares * side, top + side))
    tile = frame.resize((squares * STRIP_HEIGHT, STRIP_HEIGHT), Image.Resampling.BOX)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(11)
    draw.rectangle((0, STRIP_HEIGHT - 17, tile.width, STRIP_HEIGHT), fill=(32, 36, 42))
    draw.text((tile.width // 2, STRIP_HEIGHT - 8), label, fill=(240, 240, 240), font=font, anchor="mm")
    return tile


def make_strip(agents: dict[str, tuple[list[Image.Image], int]]) -> tuple[list[Image.Image], int]:
    """Return the frames of the strip and their duration in ms; `agents` has the frames of each result."""
    duration = 1000 // FRAMES_PER_SECOND
    strip = []
    for time in range(0, SECONDS * 1000, duration):
        tiles = []
        for name, label in STRIP_AGENTS.items():
            frames, own_duration = agents[name]
            tiles.append(make_tile(frames[time // own_duration % len(frames)], label))
        width = sum(tile.width for tile in tiles) + STRIP_GAP * (len(tiles) - 1)
        row, left = Image.new("RGB", (width, STRIP_HEIGHT), "white"), 0
        for tile in tiles:
            row.paste(tile, (left, 0))
            left += tile.width + STRIP_GAP
        strip.append(row)
    return strip, duration


def main() -> None:
    """Draw the results that were named, or all results and the strip."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", help="names of results in experiments/; none: all, and the strip")
    parser.add_argument("--strip", action="store_true", help="draw docs/agents.webp")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    everything = not arguments.results and not arguments.strip
    strip = arguments.strip or everything
    folders = result_folders() if everything else [result_folder(name) for name in arguments.results]
    wanted = {folder.name for folder in folders}
    agents = {}
    for folder in sorted({*folders, *(result_folder(name) for name in STRIP_AGENTS if strip)}):
        if not (folder / POLICY).is_file():
            print(f"{folder.name}: no stored policy", flush=True)
            continue
        frames, duration = play_frames(folder)
        if folder.name in STRIP_AGENTS:
            agents[folder.name] = frames, duration
        if folder.name in wanted:
            write(folder / ANIMATION, encode(frames, duration, MAX_BYTES, WIDTHS))
    if strip:
        frames, duration = make_strip(agents)
        write(STRIP, encode(frames, duration, STRIP_MAX_BYTES, (frames[0].width,)))


if __name__ == "__main__":
    main()
