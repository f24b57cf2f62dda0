"""Prioritized replay: with TorchRL's C++ trees where they load, and everywhere with a stand-in for them."""

import copy

import numpy as np
import pytest
import torch
from torchrl.data.replay_buffers.samplers import prioritized

from camera import Camera, key
from checks import same
from levin.core.errors import ConfigError
from levin.data import replay
from levin.data.n_step import NStep
from levin.data.priorities import Priorities

CPU = torch.device("cpu")
ALPHA, BETA = 0.6, 0.4


pytestmark = pytest.mark.usefixtures("trees")


def make(kind: type, size: int, n: int = 1) -> replay.Replay:
    stack = [4] if kind is replay.FrameReplay else []
    windows = NStep(size, n, 0.9) if n > 1 else None
    return kind(size, "memory", *stack, windows, Priorities(size, ALPHA, BETA))


def sample(buffer: replay.Replay, num: int, seed: int = 0):
    np.random.seed(seed)
    return buffer.sample(1, num, CPU)[0]


def set_all(buffer: replay.Replay) -> torch.Tensor:
    """Give every transition that can be sampled a TD error; return the errors [size], 0 where there is none."""
    batch = sample(buffer, 5000)
    errors = torch.linspace(0.1, 2, buffer.size)
    buffer.set_priorities(batch, errors[batch["index"]].unsqueeze(-1))
    used = torch.zeros(buffer.size, dtype=torch.bool)
    used[batch["index"]] = True
    return errors * used


@pytest.mark.parametrize("kind", [replay.Replay, replay.FrameReplay])
@pytest.mark.parametrize("n", [1, 3])
def test_probabilities_and_weights_are_those_of_the_paper(kind, n):
    camera, buffer = Camera(2, 4), make(kind, 400, n)
    for _ in range(30):  # the ring buffer wraps, so there are priorities of overwritten transitions
        buffer.extend(camera.rollout(10))
        set_all(buffer)
    errors = set_all(buffer)
    probability = (errors.double() + 1e-8) ** ALPHA * (errors > 0)
    probability /= probability.sum()
    batch = sample(buffer, 100_000, seed=1)
    count = torch.bincount(batch["index"], minlength=400)
    assert not count[errors == 0].any()
    drawn = (errors > 0).sum()
    assert drawn > 100
    deviation = (count - 100_000 * probability)[errors > 0] / (100_000 * probability[errors > 0]).sqrt()
    assert deviation.square().sum() < drawn + 4 * (2 * drawn) ** 0.5  # chi-squared test
    weight = (drawn * probability[batch["index"]]) ** -BETA
    torch.testing.assert_close(batch["weight"].squeeze(-1), (weight / weight.max()).float(), rtol=1e-3, atol=0)


def test_the_largest_weight_of_a_batch_is_one():
    buffer = make(replay.Replay, 300)
    buffer.extend(Camera(1, 4).rollout(100))
    set_all(buffer)
    buffer.set_priorities(sample(buffer, 1), torch.zeros(1, 1))  # TorchRL would divide by the weight of this one
    weight = sample(buffer, 8, seed=1)["weight"]
    assert weight.max() == 1
    assert 0.3 < weight.min() < 0.9


def test_new_transitions_have_the_highest_priority():
    camera, buffer = Camera(1, 4), make(replay.Replay, 300)
    buffer.extend(camera.rollout(100))
    batch = sample(buffer, 5000)
    assert batch["weight"].unique().tolist() == [1], "all have the same priority at the start"
    buffer.set_priorities(batch, torch.full((5000, 1), 0.1))
    buffer.set_priorities(batch[:1], torch.tensor([[3.0]]))
    buffer.set_priorities(batch[:1], torch.tensor([[0.1]]))
    buffer.extend(camera.rollout(100))
    new = sample(buffer, 20_000, seed=1)["index"] >= 100
    assert new.float().mean() == pytest.approx(3**ALPHA / (3**ALPHA + 0.1**ALPHA), abs=0.02)


def test_frames_that_no_transition_ends_with_are_hardly_proposed():
    """There are four per episode; with the priority of new transitions they would be proposed most of the time."""
    camera, buffer = Camera(2, 4), make(replay.FrameReplay, 2000)
    for _ in range(10):
        buffer.extend(camera.rollout(10))
        buffer.set_priorities(sample(buffer, 500), torch.full((500, 1), 1e-4))
    raised, leads_on = buffer.priorities.state_dict()["raised"][: len(buffer)], buffer.data["leads_on"]
    assert (~leads_on).sum() > 20
    assert raised[~leads_on].sum() < 0.01 * raised[leads_on].sum()


def test_the_priority_is_the_mean_over_critics():
    one, two = (make(replay.Replay, 300) for _ in range(2))
    for each, errors in ((one, [[2.0], [0.5]]), (two, [[[-3.0], [0.25]], [[1.0], [-0.75]]])):
        each.extend(Camera(1, 4).rollout(100))
        each.set_priorities(sample(each, 2), torch.tensor(errors))
    states = [each.priorities.state_dict() for each in (one, two)]
    assert same(*states)
    assert states[0]["highest"] == 2


def test_an_error_that_is_not_finite_does_not_break_the_sampler():
    buffer = make(replay.Replay, 300)
    buffer.extend(Camera(1, 4).rollout(100))
    buffer.set_priorities(sample(buffer, 2), torch.tensor([[float("nan")], [float("inf")]]))
    assert sample(buffer, 50)["weight"].isfinite().all()


def test_beta_rises_to_one():
    buffer = make(replay.Replay, 300)
    buffer.extend(Camera(1, 4).rollout(100))
    set_all(buffer)
    weights = []
    for remaining in (1.0, 0.5, 0.0):
        buffer.anneal(remaining)
        weights.append(sample(buffer, 100)["weight"])
    torch.testing.assert_close(weights[1], weights[0] ** (0.7 / BETA))
    torch.testing.assert_close(weights[2], weights[0] ** (1 / BETA))


@pytest.mark.parametrize("kind", [replay.Replay, replay.FrameReplay])
def test_a_restored_buffer_continues_identically(kind):
    camera, buffer, restored = Camera(2, 4), make(kind, 400, 3), make(kind, 400, 3)
    for _ in range(30):
        buffer.extend(camera.rollout(10))
        set_all(buffer)
    buffer.set_priorities(batch := sample(buffer, 32), batch["next", "reward"])
    state = buffer.state_dict()
    assert state
    oldest = state["written"] % 400
    state["n_step"] = copy.deepcopy(state["n_step"])
    restored.load_state_dict({**state, "data": [buffer.data[oldest:], buffer.data[:oldest]]}, CPU)
    assert same(buffer.priorities.state_dict(), restored.priorities.state_dict())
    rollout, batches = camera.rollout(10), []
    for each in (buffer, restored):
        each.extend(rollout)
        batches.append(sample(each, 1000))
        each.set_priorities(batches[-1], batches[-1]["next", "reward"])
        batches.append(sample(each, 1000, seed=1))
    assert same(*(batches[i].to_dict() for i in (0, 2)))
    assert same(*(batches[i].to_dict() for i in (1, 3)))


def test_transitions_are_the_collected_ones():
    camera, buffer = Camera(2, 4), make(replay.FrameReplay, 400)
    seen = []
    for _ in range(30):
        rollout = camera.rollout(10)
        buffer.extend(rollout)
        seen += [key(each) for each in rollout.reshape(-1)]
        assert {key(each) for each in sample(buffer, 500)} <= set(seen)
    assert buffer.batches_per_draw(32) == 1, "the next batch depends on the priorities that this update sets"


def test_without_the_extension_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(prioritized, "SumSegmentTreeFp32", None)
    with pytest.raises(ConfigError, match=r"needs the C\+\+ extension of TorchRL .* or set algo.replay=uniform"):
        Priorities(10, ALPHA, BETA)
