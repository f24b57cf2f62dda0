"""Memory of a full replay buffer, and time to sample a batch from it."""

import resource
import statistics
from time import perf_counter

import torch
from tensordict import TensorDict

from levin.data import replay
from levin.runs import provenance

CPU = torch.device("cpu")
BATCH = 256


def vector_transitions(num: int) -> TensorDict:
    """Return random transitions `[1, num]` with the shapes of HalfCheetah."""
    flags = torch.zeros(1, num, 1, dtype=torch.bool)
    after = {"observation": torch.randn(1, num, 17), "reward": torch.randn(1, num, 1), "terminated": flags}
    first = {"observation": torch.randn(1, num, 17), "action": torch.randn(1, num, 6)}
    return TensorDict({**first, "next": {**after, "done": flags}}, batch_size=[1, num])


def frame_transitions(num: int) -> TensorDict:
    """Return random transitions `[1, num]` with the shapes of Atari, stacks of 4 frames, in episodes of 500 steps."""
    stream = torch.randint(256, (1, num + 4, 84, 84), dtype=torch.uint8)
    observation = stream.unfold(1, 4, 1).movedim(-1, 2)  # [1, num + 1, 4, 84, 84]
    flags = torch.zeros(1, num, 1, dtype=torch.bool)
    flags[:, 499::500] = True
    after = {"observation": observation[:, 1:], "reward": torch.randn(1, num, 1), "terminated": flags, "done": flags}
    action = torch.zeros(1, num, dtype=torch.int64)
    return TensorDict({"observation": observation[:, :-1], "action": action, "next": after}, batch_size=[1, num])


def resident_megabytes() -> float:
    """Return the resident memory of this process, in MB."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def memory(*, rounds: int, threads: int) -> None:
    """Fill buffers; print their memory and the median time to sample a batch."""
    torch.set_num_threads(threads)
    print(f"{provenance.processor_name()}, {threads} threads; medians of {rounds} x 100 batches of {BATCH}")
    buffers = (
        ("HalfCheetah, 1,000,000 transitions", replay.Replay(1_000_000, "memory"), vector_transitions, 1_000_000),
        ("Atari, 100,000 frames", replay.FrameReplay(100_000, "memory", 4), frame_transitions, 100_000),
    )
    for name, buffer, rollout, size in buffers:
        before = resident_megabytes()
        while len(buffer) < size:
            buffer.extend(rollout(1000))
        after = resident_megabytes()
        times = []
        for _ in range(rounds):
            start = perf_counter()
            for _ in range(100):
                buffer.sample(1, BATCH, CPU)
            times.append((perf_counter() - start) * 10)
        print(f"{name:<36}{after - before:>9,.0f} MB   {statistics.median(times):.2f} ms per batch")
