"""n-step returns: the same as TorchRL's, over the ends of episodes, rollouts and the ring buffer."""

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.transforms import MultiStepTransform

from camera import Camera
from checks import same
from levin.core.errors import ConfigError
from levin.data import replay
from levin.data.n_step import NStep

CPU = torch.device("cpu")
GAMMA = 0.9


def make(kind: type, size: int, n: int, storage: str = "memory") -> replay.Replay:
    stack = [4] if kind is replay.FrameReplay else []
    return kind(size, storage, *stack, NStep(size, n, GAMMA))


def name_of(observation: torch.Tensor) -> bytes:
    """Return an observation as bytes; random frames make it unique."""
    return observation.numpy().tobytes()


def expected_windows(recorded: list[TensorDict], n: int, restarts: tuple[tuple[int, int], ...] = ()) -> dict:
    """Return all complete windows of rollouts, by their first observation, computed step by step.

    At `restarts`, pairs of an env and a step, an episode begins although none has ended.
    """
    windows = {}
    for env, steps in enumerate(torch.cat(recorded, 1)):
        for t in range(len(steps)):
            total, discount, done = 0.0, 1.0, False
            for k in range(t, min(t + n, len(steps))):
                total += discount * float(steps["next", "reward"][k])
                discount *= GAMMA
                done = bool(steps["next", "done"][k]) or (env, k + 1) in restarts
                if done:
                    break
            if done or k == t + n - 1:
                end = steps["next"][k]
                windows[name_of(steps["observation"][t])] = (
                    *(int(steps["action"][t]), pytest.approx(total, abs=1e-5), pytest.approx(discount)),
                    *(bool(end["terminated"]), name_of(end["observation"])),
                )
    return windows


def as_windows(batch: TensorDict) -> dict:
    batch = batch.reshape(-1)
    keys = ("action", ("next", "reward"), "discount", ("next", "terminated"))
    columns = [batch[key].flatten().tolist() for key in keys]
    names, following = map(name_of, batch["observation"]), map(name_of, batch["next", "observation"])
    return {
        name: (int(action), reward, discount, bool(terminated), end)
        for name, action, reward, discount, terminated, end in zip(names, *columns, following, strict=True)
    }


def sample_all(buffer: replay.Replay) -> dict:
    """Return every transition that can be sampled."""
    entries = torch.arange(buffer.written - len(buffer), buffer.written)
    entries = entries[buffer.is_usable(buffer.follow(entries))]
    buffer.propose = lambda num: (entries, torch.empty(num))  # type: ignore[method-assign]
    sample = as_windows(buffer.sample(1, len(entries), CPU))
    del buffer.propose
    return sample


@pytest.mark.parametrize("kind", [replay.Replay, replay.FrameReplay])
@pytest.mark.parametrize("storage", ["memory", "memmap"])
@pytest.mark.parametrize(("num_envs", "steps", "n"), [(1, 1, 3), (3, 7, 2), (2, 4, 6)])
def test_windows_are_those_of_torchrl(kind, storage, num_envs, steps, n):
    camera, buffer = Camera(num_envs, 4), make(kind, 2000, n, storage)
    recorded = [camera.rollout(steps) for _ in range(60 // steps)]
    for rollout in recorded:
        buffer.extend(rollout)
    ours = sample_all(buffer)
    assert ours == expected_windows(recorded, n), "all complete windows, also those over the ends of rollouts"
    transform = MultiStepTransform(n_steps=n, gamma=GAMMA)
    parts = [transform._inv_call(each.clone()) for each in recorded]
    theirs = torch.cat([each for each in parts if each is not None], 1)
    assert theirs.numel() >= num_envs * (60 // steps * steps - n - steps)
    lengths = set()
    for each in theirs.reshape(-1):
        action, total, discount, terminated, last = ours[name_of(each["observation"])]
        assert action == int(each["action"])
        assert total == pytest.approx(float(each["next", "reward"]), abs=1e-5)
        assert discount == pytest.approx(float(each["gamma"]))
        assert last == name_of(each["next", "observation"])
        length = int(each["steps_to_next_obs"])
        lengths.add(length)
        if length == 1:  # else TorchRL's flag is that of the first step of the window
            assert terminated == bool(each["next", "terminated"])
    assert lengths == {*range(1, n + 1)}


@pytest.mark.parametrize(("kind", "size"), [(replay.Replay, 50), (replay.FrameReplay, 200)])
def test_a_full_buffer_has_the_newest_windows(kind, size):
    camera, buffer = Camera(2, 4), make(kind, size, 3)
    recorded, expected = [], {}
    for _ in range(30):
        recorded.append(camera.rollout(5))
        buffer.extend(recorded[-1])
        sampled = as_windows(buffer.sample(10, 200, CPU))
        expected |= expected_windows(recorded[-2:], 3)  # a window of 3 steps spans at most two rollouts of 5
        assert sampled.items() <= expected.items()
    assert buffer.written > 1.5 * size
    assert sample_all(buffer) == {name: expected[name] for name in sampled}, "the sample was large enough for all"
    if kind is replay.Replay:
        kept = {name_of(each) for rollout in recorded[-5:] for each in rollout["observation"].reshape(50 // 5, -1)}
        assert sampled.keys() == kept & expected.keys()


@pytest.mark.parametrize("kind", [replay.Replay, replay.FrameReplay])
def test_an_env_that_does_not_replay_ends_its_windows(kind):
    cameras, buffer = [Camera(2, 4, seed=seed) for seed in (0, 1)], make(kind, 500, 3)
    recorded = [camera.rollout(4, end_probability=0) for camera in cameras]
    recorded[1][0] = cameras[0].rollout(4, end_probability=0)[0]  # env 0 goes on, env 1 does not
    buffer.extend(recorded[0])
    if kind is replay.Replay:  # the other one sees it in the frames
        buffer.restart(torch.tensor([False, True]))
    buffer.extend(recorded[1])
    expected = expected_windows(recorded, 3, restarts=((1, 4),))
    assert len(expected) == 2 * 8 - 2 - 2
    assert sample_all(buffer) == expected


@pytest.mark.parametrize("kind", [replay.Replay, replay.FrameReplay])
def test_nothing_is_sampled_before_a_window_is_complete(kind):
    camera, buffer = Camera(1, 4), make(kind, 500, 3)
    ready = []
    for _ in range(4):
        buffer.extend(camera.rollout(1, end_probability=0))
        ready.append(buffer.ready)
    assert ready == [False, False, True, True]
    assert len(as_windows(buffer.sample(1, 50, CPU))) == 2


@pytest.mark.parametrize("kind", [replay.Replay, replay.FrameReplay])
def test_a_restored_buffer_continues_identically(kind):
    camera, buffer, restored = Camera(2, 4), make(kind, 400, 3), make(kind, 400, 3)
    for _ in range(30):
        buffer.extend(camera.rollout(10))
    state = buffer.state_dict()
    assert state
    oldest = state["written"] % 400
    state["n_step"] = copy.deepcopy(state["n_step"])
    restored.load_state_dict({**state, "data": [buffer.data[oldest:], buffer.data[:oldest]]}, CPU)
    batches = []
    rollout = camera.rollout(10)
    for each in (buffer, restored):
        each.extend(rollout)
        torch.manual_seed(0)
        batches.append(each.sample(1, 50, CPU).to_dict())
    assert same(*batches)


def test_rewards_are_normalised_before_they_are_summed():
    camera, buffer = Camera(2, 4), make(replay.Replay, 200, 3)
    recorded = camera.rollout(20)
    buffer.extend(recorded)

    def clip(sample):
        sample["next", "reward"] = sample["next", "reward"].clamp(-0.1, 0.1)
        return sample

    torch.manual_seed(0)
    sampled = as_windows(buffer.sample(1, 100, CPU, clip))
    recorded["next", "reward"] = recorded["next", "reward"].clamp(-0.1, 0.1)
    assert sampled.items() <= expected_windows([recorded], 3).items()


def test_buffers_that_hold_no_window_are_refused():
    vectors = {"observation": {"dtype": "float32"}, "num_envs": 4}
    assert replay.make_replay(vectors, 12, "memory", n_step=3).n_step is not None  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"buffer_size=11 .*n_step=3: it must be at least 12"):
        replay.make_replay(vectors, 11, "memory", n_step=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="buffer_size=399 is less than 400, the frames of 4 rollouts"):
        make(replay.FrameReplay, 399, 3).extend(Camera(2, 4).rollout(10))
    camera, smallest = Camera(2, 4), make(replay.FrameReplay, 400, 3)
    for end_probability in (0.0, 0.5, 1.9) * 5:
        smallest.extend(camera.rollout(10, end_probability=end_probability))
        assert smallest.sample(1, 10, CPU).shape == (1, 10)
