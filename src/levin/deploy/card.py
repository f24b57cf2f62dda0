"""Card of an exported policy: what it is, how it was trained, what it scores, and how to call it."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from levin.core import files
from levin.core.omega import to_plain
from levin.results.curves import Curves, read_curves
from levin.results.result import FINAL
from levin.runs.load import load_config

CARD = "policy.md"
FEWEST = 10  # episodes that have an interval
ONNX = """```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("policy.onnx")
inputs = {{{inputs}}}
action, *memory = session.run(None, inputs)
```"""
TORCH = """```python
import torch

policy = torch.export.load("policy.pt2").module()
action, *memory = policy({inputs})
```"""


def write_card(folder: Path, name: str, run: Path, metadata: dict[str, Any], checked: dict[str, float]) -> None:
    """Write `policy.md` beside an exported policy.

    Args:
        folder: Folder of the policy.
        name: Name of its file.
        run: Run folder or result that it comes from.
        metadata: Contents of `levin.deploy.package.describe`.
        checked: Outcome of `levin.deploy.package.compare`.
    """
    inputs = [
        f"| `{each}` | [N{''.join(f', {size}' for size in shape)}] | {metadata['dtypes'][each]} |"
        for each, shape in metadata["inputs"].items()
    ]
    frames, repeat, entries = (metadata[key] for key in ("frame_stack", "action_repeat", "observation_entries"))
    stacked = f" Observations are stacks of the last {frames} frames." if frames > 1 else ""
    stacked += f" An action is repeated for {repeat} steps of the env." if repeat > 1 else ""
    stacked += f" It sees only the entries {list(entries)} of the env's observations." if entries else ""
    stacked += f" Observations are the env's images, {metadata['pixels']}." if metadata["pixels"] else ""
    env = to_plain(load_config(run, code_sections=()).env)
    if env["family"] == "atari":
        options = {"frameskip": repeat, "stack_num": frames, **env["kwargs"]}
        for key in ("reseed_every", "episodic_life", "reward_clipping"):  # of `levin.envs.atari`, for training
            options.pop(key, None)
        options = "".join(f", {key}={value!r}" for key, value in options.items())
        stacked += (
            f' Observations are those of `ale_py.vector_env.AtariVectorEnv("{env["id"]}", num_envs{options})`: the '
            "maximum of the last two frames, by default in grey and of 84 x 84 pixels."
        )
    memory = ""
    if metadata["memory"]:
        memory = (
            "The policy has a memory: pass zeros before the first step, then the outputs "
            f"{', '.join(f'`{each}`' for each in metadata['outputs'][1:])} of the step before. "
            "`is_first` is true where an episode begins. Rounding may add up in the memory: with its own memory, the "
            f"actions of that episode differed by at most {checked['own_memory_difference']:.1g}.\n\n"
        )
    lines = [
        f"# {metadata['algorithm']} in {metadata['env']}",
        "",
        f"Deterministic policy after {metadata['env_steps']:,} env steps of training, at commit "
        f"{metadata['commit'] or 'unknown'}. {read_score(run, metadata['env_steps'])}",
        "",
        f"`{name}` takes observations as the env gives them and returns actions in the env's units; normalisation is "
        f"inside.{stacked} Over {checked['steps']:,.0f} steps of an episode, its actions differed from those of "
        f"`levin.load` by at most {checked['largest_difference']:.1g}, relative to half the range of a rescaled "
        "action, or else to an action larger than 1.",
        "",
        "| input | shape | dtype |",
        "| --- | --- | --- |",
        *inputs,
        "",
        f"N is the number of envs, of any size. Outputs: {', '.join(f'`{each}`' for each in metadata['outputs'])}.",
        "",
        memory + _example(name, metadata),
        "",
        "Action space, observation space and the rest are in the file's metadata.",
        "",
        "## Config",
        "",
        "```yaml",
        (run / "config.yaml").read_text(encoding="utf-8").rstrip(),
        "```",
        "",
    ]
    files.write_text(folder, CARD, "\n".join(lines))


def _example(name: str, metadata: dict[str, Any]) -> str:
    """Return code that calls the policy for one env at the beginning of an episode."""
    dtypes = metadata["dtypes"]
    if name.endswith(".onnx"):
        arrays = [
            f'"{each}": np.{_fill(dtypes[each])}({[1, *shape]}, "{dtypes[each]}")'
            for each, shape in metadata["inputs"].items()
        ]
        return ONNX.format(inputs=", ".join(arrays))
    tensors = [
        f"torch.{_fill(dtypes[each])}({[1, *shape]}, dtype=torch.{dtypes[each]})"
        for each, shape in metadata["inputs"].items()
    ]
    return TORCH.format(inputs=", ".join(tensors))


def _fill(dtype: str) -> str:
    """Return the function that fills an example input: an episode begins (bool), and all actions are allowed (int8)."""
    return "ones" if dtype in ("bool", "int8") else "zeros"


def read_score(run: Path, env_steps: int) -> str:
    """Return a sentence with the score after these env steps and its 95% interval; empty if there is none."""
    summary, evaluation, metrics = run / "summary.json", run / "evaluation.json", run / "metrics.csv"
    if summary.is_file():
        return _sentence_of_result(json.loads(summary.read_text(encoding="utf-8")), read_curves(run))
    if evaluation.is_file():
        score = json.loads(evaluation.read_text(encoding="utf-8"))
        if score["env_steps"] == env_steps:
            return _sentence(score["return_mean"], score["return_std"], score["episodes"])
    if metrics.is_file():
        with metrics.open(encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if int(row["env_steps"]) == env_steps]
        if rows and rows[-1].get("eval/return_mean"):
            episodes = to_plain(load_config(run, code_sections=()).eval)["episodes"]
            return _sentence(float(rows[-1]["eval/return_mean"]), float(rows[-1]["eval/return_std"]), episodes)
    return ""


def _sentence_of_result(summary: dict[str, Any], curves: Curves) -> str:
    """Return the sentence of a result, whose score is that of deterministic episodes of all its seeds."""
    score, finals = summary["as_the_source_measures"], [curve.return_mean[-FINAL:] for curve in curves.values()]
    if score["metric"] == "evaluations":
        mean, interval, last = score["mean"], score["interval"], score["last"]
    elif min(map(len, finals)) == FINAL:  # the source counts training episodes, in which the policy explores
        score = summary[f"mean_of_last_{FINAL}_evaluations"]
        mean, interval, last = score["mean"], score["interval"], FINAL
    else:
        mean, interval, last = float(np.mean([each[-1] for each in finals])), None, 1
    over = "its last evaluation" if last == 1 else f"its last {last} evaluations"
    if len(finals) == 1:
        return f"Mean return in {over}: {mean:,.1f} (of this run alone; other seeds differ)."
    between = (
        f" (95% interval of their interquartile mean: {interval[0]:,.1f} to {interval[1]:,.1f})" if interval else ""
    )
    return f"Mean return of {len(finals)} seeds, of which this is one, each in {over}: {mean:,.1f}{between}."


def _sentence(mean: float, std: float, episodes: int) -> str:
    """Return the sentence of an evaluation; `std` is divided by the number of episodes, not by one less."""
    alone = "(of this run alone; other seeds differ)"
    if episodes < FEWEST:
        return f"Mean return over {episodes} episode{'s' * (episodes > 1)}: {mean:,.1f} {alone}."
    free, z = episodes - 1, 1.96
    # The quantile of Student's t, by its expansion around that of the normal distribution (Fisher and Cornish 1960)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    error = t * std / math.sqrt(free)
    return (
        f"Mean return over {episodes} episodes: {mean:,.1f}, 95% interval {mean - error:,.1f} to {mean + error:,.1f} "
        f"{alone}."
    )
