"""Frame replay stores each frame once and returns the collected transitions."""

import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from camera import Camera, key
from checks import same
from levin.core.errors import ConfigError, RunError
from levin.data import replay

CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_envs", "steps", "stack", "channels"), [(1, 1, 4, 1), (3, 6, 4, 1), (2, 5, 1, 3)])
@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_sampled_transitions_equal_the_collected_ones(num_envs, steps, stack, channels, storage):
    camera, buffer = Camera(num_envs, stack, channels), replay.FrameReplay(200, storage, stack)
    seen: list[bytes] = []
    for _ in range(120 // steps):
        rollout = camera.rollout(steps)
        buffer.extend(rollout)
        seen += [key(each) for each in rollout.reshape(-1)]
    drawn = [key(each) for each in buffer.sample(20, 100, CPU).reshape(-1)]
    assert set(drawn) <= set(seen), "only collected transitions, also at the ends of episodes and of the ring buffer"
    oldest = min(seen.index(each) for each in set(drawn))
    lost = len(seen) - len(set(drawn))
    assert oldest > 0, "the ring buffer has wrapped"
    assert set(seen[-num_envs * steps :]) <= set(drawn), "the newest rollout is there"
    assert lost - oldest <= 2 * num_envs * (steps + stack), "all between, except overwritten stacks"


def test_frames_are_stored_once():
    camera, buffer = Camera(2, 4), replay.FrameReplay(1000, "memory", 4)
    for _ in range(10):
        buffer.extend(camera.rollout(20, end_probability=0))
    assert buffer.written == 2 * (4 + 10 * 20), "a stack per episode, then a frame per step"
    assert buffer.data["frame"].shape[1:] == (1, 4, 4)


def test_a_reset_without_an_end_flag_is_detected():
    """An env that does not replay starts a new episode after a resume, without an end flag in replay."""
    first, second, buffer = Camera(1, 4), Camera(1, 4, seed=1), replay.FrameReplay(1000, "memory", 4)
    rollouts = [first.rollout(5, end_probability=0), second.rollout(5, end_probability=0)]
    for rollout in rollouts:
        buffer.extend(rollout)
    seen = {key(each) for rollout in rollouts for each in rollout.reshape(-1)}
    assert {key(each) for each in buffer.sample(1, 200, CPU).reshape(-1)} == seen


def test_samples_are_uniform():
    camera, buffer = Camera(2, 4), replay.FrameReplay(1000, "memory", 4)
    buffer.extend(camera.rollout(50))
    torch.manual_seed(0)
    drawn = [key(each) for each in buffer.sample(1, 10_000, CPU).reshape(-1)]
    counts = np.array([drawn.count(each) for each in set(drawn)])
    assert len(counts) == 100
    assert ((counts - 100) ** 2 / 100).sum() < 149  # chi-squared test with 99 degrees of freedom, p = 0.001


def test_a_restored_buffer_continues_identically():
    camera, buffer, restored = Camera(2, 4), *(replay.FrameReplay(200, "memory", 4) for _ in range(2))
    for _ in range(12):
        buffer.extend(camera.rollout(10))
    state = buffer.state_dict()
    assert state
    assert state["written"] > 200
    oldest = state["written"] % 200  # index of the oldest frame in the ring buffer
    restored.load_state_dict({**state, "data": [buffer.data[oldest:], buffer.data[:oldest]]}, CPU)
    rollout = camera.rollout(10)
    for each in (buffer, restored):
        each.extend(rollout)
    assert same(buffer.data.to_dict(), restored.data.to_dict())
    assert buffer.written == restored.written


def test_a_buffer_too_small_for_a_rollout_is_refused():
    with pytest.raises(ConfigError, match="buffer_size=199 is less than 200"):
        replay.FrameReplay(199, "memory", 4).extend(Camera(2, 4).rollout(10))
    camera, smallest = Camera(2, 4), replay.FrameReplay(200, "memory", 4)
    for end_probability in (0.0, 0.5, 1.9) * 5:  # the smallest buffer works for any episode lengths
        smallest.extend(camera.rollout(10, end_probability=end_probability))
        assert smallest.sample(1, 10, CPU).shape == (1, 10)


def test_pixel_batches_are_sampled_in_small_portions():
    vectors, pixels = replay.Replay(100, "memory"), replay.FrameReplay(1000, "memory", 4)
    pixels.extend(Camera(1, 4).rollout(50))
    assert pixels.transition_bytes == 5 * (16 + 4 * 8 + 8 + 4 + 1 + 1)
    assert pixels.batches_per_draw(256) == 128
    assert pixels.batches_per_draw(2**20) == 1
    vectors.extend(Camera(1, 4).rollout(50))
    assert vectors.batches_per_draw(256) == 128


def test_a_rollout_larger_than_the_buffer_is_refused():
    rollout = Camera(2, 4).rollout(20)
    with pytest.raises(ConfigError, match="buffer_size=30 is less than 40, the transitions of one rollout"):
        replay.Replay(30, "memory").extend(rollout)
    replay.Replay(40, "memory").extend(rollout)


def test_the_number_of_stored_transitions_has_no_limit():
    buffer = replay.Replay(50, "memory")
    buffer.extend(Camera(1, 4).rollout(40))
    state = buffer.state_dict()
    restored = replay.Replay(50, "memory")
    restored.load_state_dict({**state, "written": 2**31 - 1, "data": [state["data"].clone()]}, CPU)
    restored.extend(Camera(1, 4).rollout(10))
    assert restored.written == 2**31 + 9


def test_the_files_of_memmap_are_on_the_disk_and_end_with_the_process(tmp_path, monkeypatch):
    """Files in /dev/shm would be in memory, and those of a process that is killed must not stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    buffer = replay.Replay(50, "memmap")
    for _ in range(3):
        buffer.extend(Camera(1, 4).rollout(20))
        assert not list(tmp_path.iterdir())
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == len(replay.KEYS)
    assert all(line.endswith("(deleted)") for line in mapped)
    assert buffer.sample(1, 100, CPU)["observation"].any()


def test_a_buffer_that_the_disk_has_no_room_for_is_announced(monkeypatch):
    """Its files are sparse, and a page that can't be written ends the process without a message."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.warns(UserWarning, match=r"needs 0.0 GB of .* when .*lower algo.buffer_size, or export TMPDIR="):
        replay.Replay(1000, "memmap").extend(Camera(1, 4).rollout(20))


def test_a_gpu_that_has_no_room_for_the_buffer_is_named(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("torchrl.data.LazyTensorStorage._init", fail)
    with pytest.raises(
        RunError, match=r"needs 0.0 GB of memory, and the device that trains has less.*set algo.buffer_storage=memmap"
    ):
        replay.Replay(1000, "memory").extend(Camera(1, 4).rollout(20))


@pytest.mark.parametrize(("ranks", "here"), [(1, None), (3, None), (4, "2"), (6, "3")])
def test_the_buffers_of_the_ranks_of_a_machine_are_on_one_disk(ranks, here, monkeypatch):
    monkeypatch.setattr("levin.core.distributed.world_size", lambda: ranks)
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=16_000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replay.UnnamedFiles(1000)._init(TensorDict({"reward": torch.zeros(2)}))  # 8 bytes
    assert len(caught) == (ranks in (3, 6))
