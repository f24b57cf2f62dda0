"""DreamerV3: latent states in replay, learning of the world model, open-loop predictions."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from dreamer_v3_data import fix_noise, make_dreamer_v3, random_batch
from levin.algorithms.dreamer import Dreamer
from levin.algorithms.dreamer_v3 import DreamerV3
from levin.algorithms.dreamer_v3_networks import symexp
from levin.core import files
from levin.core.errors import ConfigError
from levin.core.spaces import EMPTY
from levin.data.sequences import LATENT, SequenceReplay
from levin.model_based import open_loop
from levin.model_based.recurrent import State
from levin.runs import checkpoint
from levin.runs.checkpoint_io import FolderCheckpointIO
from world_model_data import env_description, numbered_rollouts

# --- latent states in replay


def make_numbered_replay(storage: str = "memory") -> SequenceReplay:
    """Return a replay of two envs whose latents are numbered."""
    buffer = SequenceReplay(env_description(num_envs=2), 60, storage, 5, keeps_latents=True)
    parts, _ = numbered_rollouts([[3], [7, 4]], 20, 5)
    for number, part in enumerate(parts):
        latent = torch.arange(10).view(2, 5, 1) + 10.0 * number
        buffer.extend(part.set(LATENT, latent.bfloat16()))
    return buffer


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_overwrite_latents_changes_only_the_sampled_records(storage):
    buffer = make_numbered_replay(storage)
    is_last = buffer.data["is_last"]
    assert (buffer.data[LATENT][is_last] == 0).all()
    before = buffer.data.clone()
    batch = buffer.sample(1, 3, torch.device("cpu"))[0]
    new = 200 + torch.arange(12).view(3, 4, 1).float()
    buffer.overwrite_latents(batch, new)
    after = buffer.data
    written: dict[tuple[int, int], list[float]] = {}  # a record sampled twice keeps one of its latents
    places = (each.flatten().tolist() for each in (batch["row"][:, 1:], batch["env"][:, 1:], new))
    for row, env, value in zip(*places, strict=True):
        written.setdefault((row, env), []).append(value)
    for (row, env), values in written.items():
        assert after[LATENT][row, env].item() in values
    untouched = torch.ones(len(buffer), 2, dtype=torch.bool)
    for row, env in written:
        untouched[row, env] = False
    assert torch.equal(after[LATENT][untouched], before[LATENT][untouched])
    for key in ("observation", "action", "reward", "is_first"):
        assert torch.equal(after[key], before[key])


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_stored_latents_are_restored_from_a_checkpoint(storage, tmp_path):
    """Latents change, so they have files of their own: records are written once, and state.ckpt holds no latents."""
    buffer = make_numbered_replay(storage)
    writer = FolderCheckpointIO(tmp_path)
    for step in (1, 2):
        batch = buffer.sample(1, 8, torch.device("cpu"))[0]
        buffer.overwrite_latents(batch, torch.full((8, 4, 1), 7.0 * step))
        state = {"algorithm": "Toy", "levin": {"env_steps": step}, "buffer": buffer.state_dict()}
        writer.save_checkpoint(state, tmp_path / str(step) / checkpoint.STATE)
    checkpoint.discard(tmp_path / "1")
    checkpoint.verify(tmp_path / "2", buffer=True)
    assert not {"rewritten", LATENT} & set(files.load(tmp_path / "2" / checkpoint.STATE)["buffer"])
    state = FolderCheckpointIO(tmp_path).load_checkpoint(tmp_path / "2" / checkpoint.STATE)["buffer"]
    resumed = SequenceReplay(env_description(num_envs=2), 60, storage, 5, keeps_latents=True)
    resumed.load_state_dict(state, torch.device("cpu"))
    for key in (*buffer.keys,):
        assert torch.equal(resumed.data[key], buffer.data[key]), key


def test_updates_overwrite_the_latents_in_replay():
    algorithm = make_dreamer_v3()
    generator = torch.Generator().manual_seed(0)
    done = (torch.arange(60) % 20 == 19).view(1, 60, 1)
    after = {"observation": torch.randn(1, 60, 3, generator=generator), "reward": torch.ones(1, 60, 1)}
    after |= {"done": done, "terminated": done}
    latent = torch.zeros(1, 60, algorithm.model.deter + algorithm.model.choices[0], dtype=torch.bfloat16)
    steps = {"observation": torch.randn(1, 60, 3, generator=generator), "action": torch.zeros(1, 60, 1)}
    algorithm.env_steps = 45
    algorithm.training_step(TensorDict({**steps, LATENT: latent, "next": after}, batch_size=(1, 60)), 0)
    assert algorithm.updates == 5
    assert algorithm.buffer.data[LATENT].any()


def test_updates_per_env_step_carry_their_remainder():
    """The published train ratio of 512 with batches of 16 x 64 is half an update per env step."""
    algorithm = make_dreamer_v3("algo.replay_ratio=0.5", "algo.learning_starts=40")
    algorithm.update = lambda batch: None
    algorithm.buffer.sample = lambda num, *_: TensorDict({"x": torch.zeros(num, 1)}, batch_size=(num, 1))
    algorithm.buffer.batches_per_draw = lambda _: 10_000
    for env_steps in range(0, 10_001, 3):
        algorithm.env_steps = env_steps
        for _ in algorithm.replay():
            pass
    assert algorithm.updates == (9_999 - 40) // 2


# --- learning and predictions


def errors_in_echo_env(shifted: bool) -> tuple[float, float]:
    """Train a world model of an env whose observation is the last action and whose reward is twice that.

    Args:
        shifted: Whether stored actions are shifted by one step, which must increase the error.

    Returns:
        Mean squared errors of imagined next observations and of predicted rewards.
    """
    torch.manual_seed(0)
    steps = 400
    action = torch.rand(1, steps, 1) * 2 - 1
    shown = torch.cat([torch.zeros(1, 1, 1), action], 1).expand(1, steps + 1, 3)
    done = (torch.arange(steps) % 20 == 19).view(1, -1, 1)
    after = {"observation": shown[:, 1:], "reward": 2 * shown[:, 1:, :1], "done": done, "terminated": done}
    first = torch.cat([torch.ones(1, 1, 1, dtype=torch.bool), done[:, :-1]], 1)
    seen = torch.where(first, 0.0, shown[:, :-1])
    algorithm = make_dreamer_v3("algo.lr=2e-3", "algo.batch_length=9")
    latent = torch.zeros(1, steps, algorithm.model.deter + algorithm.model.choices[0], dtype=torch.bfloat16)
    rollout = {"observation": seen, "action": action, LATENT: latent, "next": after}
    algorithm.buffer.extend(TensorDict(rollout, batch_size=(1, steps)))
    if shifted:
        algorithm.buffer.data["action"][:] = algorithm.buffer.data["action"].roll(1, 0)
    for _ in range(300):
        batch = algorithm.buffer.sample(1, 16, torch.device("cpu"))[0]
        state, posterior = algorithm.observe(batch)
        loss, _ = algorithm.model_loss(batch, state, posterior)
        algorithm.step(algorithm.optimizer, loss)
        algorithm.buffer.overwrite_latents(batch, algorithm.model.pack(state))
    batch = algorithm.buffer.sample(1, 64, torch.device("cpu"))[0]
    with torch.no_grad():
        state, _ = algorithm.observe(batch)
        before = State(*(part[:, 4] for part in state))
        imagined = State(*algorithm.model.imagine_step(*before, batch["action"][:, 5]))
        follows = ~batch["is_first"][:, 6, 0]
        decoded = symexp(algorithm.model.decode(imagined)[""])
        error = (decoded - batch["observation"][:, 6])[follows].square().mean()
        reward = algorithm.two_hot.mean(algorithm.model.reward_model(state.feature)) - batch["reward"][:, 1:]
    return float(error), float(reward.square().mean())


def test_actions_rewards_and_observations_are_aligned():
    """The next observation is the action (variance 1/3); with actions shifted by one step, prediction fails."""
    imagined, reward = errors_in_echo_env(shifted=False)
    assert imagined < 0.1
    assert reward < 0.1
    wrong, _ = errors_in_echo_env(shifted=True)
    assert wrong > 0.2


@pytest.mark.parametrize("algo", [Dreamer, DreamerV3])
@pytest.mark.parametrize("kind", ["vector", "pixels", "both"])
def test_open_loop_predictions_of_every_kind_of_observation(kind, algo, tmp_path):
    """For vectors, pixels and both: one update, and the metrics and images of an evaluation."""
    env = env_description(pixels=kind == "pixels")
    parts = {"vector": torch.randn(1, 61, 5), "camera": torch.randint(256, (1, 61, 3, 64, 64), dtype=torch.uint8)}
    if kind == "both":
        vector = {**EMPTY, "shape": [5], "dtype": "float32"}
        camera = {**EMPTY, "shape": [3, 64, 64], "dtype": "uint8"}
        env["observation"] = {**EMPTY, "type": "dict", "spaces": {"vector": vector, "camera": camera}}
        seen: Any = parts
    else:
        seen = {"": parts["camera"] if kind == "pixels" else parts["vector"][..., :3]}
    algorithm = algo(env=env, size="micro", batch_length=6, batch_size=2, horizon=3, buffer_size=400)
    algorithm.configure_optimizers()
    algorithm.manual_backward = lambda loss: loss.backward()

    def at(places: slice) -> Any:
        selected = {name: part[:, places] for name, part in seen.items()}
        return selected if kind == "both" else selected[""]

    done = torch.zeros(1, 60, 1, dtype=torch.bool)
    after = {"observation": at(slice(1, 61)), "reward": torch.randn(1, 60, 1), "done": done, "terminated": done}
    steps = {"observation": at(slice(0, 60)), "action": torch.randn(1, 60, 1), "next": after}
    if algo is DreamerV3:
        size = algorithm.model.deter + algorithm.model.choices[0]
        steps[LATENT] = torch.zeros(1, 60, size, dtype=torch.bfloat16)
    algorithm.buffer.extend(TensorDict(steps, batch_size=(1, 60)))
    algorithm.update(algorithm.buffer.sample(1, 2, torch.device("cpu"))[0])
    metrics = algorithm.on_evaluation(tmp_path)
    names = ["_vector", "_camera"] if kind == "both" else [""]
    expected = [
        (what, ahead, name) for what in ("open_loop", "repeat_last") for ahead in (1, 5, 15, 45) for name in names
    ]
    assert metrics.keys() == {f"eval/{what}_{ahead}{name}" for what, ahead, name in expected}
    assert all((tmp_path / f"0{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_unsupported_settings_are_refused():
    for overrides, sentence in (
        (("algo.buffer_size=6",), "too small for one sequence of each env"),
        (("algo.batch_length=1",), "algo.batch_length=1 is too short"),
        (("algo.learning_starts=6",), "for one sequence of each env: it must be at least 7"),
        (("env.normalize_observation=true",), "needs unnormalized observations"),
        (("env=gym", "env.id=toy_envs:Robot-v0"), "reads vectors, or pixels of 64 x 64"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make_dreamer_v3(*overrides)


@pytest.mark.parametrize("estimator", ["straight_through", "reinmax", "gumbel_softmax"])
def test_every_latent_estimator_trains_the_encoder(estimator):
    algorithm = make_dreamer_v3(f"algo.latent_estimator={estimator}")
    torch.manual_seed(0)
    algorithm.update(random_batch(algorithm))
    assert algorithm.model.encoders["_"][0].weight.grad.any()


def test_open_loop_predictions_start_at_the_stored_latent():
    """The first state of a window is the stored latent, not a zero state."""
    algorithm = make_dreamer_v3()
    data = random_batch(algorithm)
    window = torch.cat([data, data], 1)[:, : open_loop.CONTEXT + 1]
    fix_noise(0)
    with torch.no_grad():
        base, _ = algorithm.predict_open_loop(window)
        fix_noise(0)
        window[LATENT][:, 0] = 0
        other, _ = algorithm.predict_open_loop(window)
    assert base[""].shape == (3, open_loop.CONTEXT + 1, 3)
    assert not torch.equal(base[""][:, 0], other[""][:, 0])
