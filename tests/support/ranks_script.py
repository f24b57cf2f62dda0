"""Script that test_data_parallel.py starts once per rank, as torchrun would: `ranks_script.py FOLDER`.

Each rank trains all algorithms, resumes two runs, and saves its gradients and statistics to FOLDER.
"""

import os
import sys
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from levin import resume
from levin.algorithms.base import standardize
from levin.config.compose import compose
from levin.estimators import pathwise
from levin.nn.normalizers import RunningMoments
from levin.training.session import build_run, train, train_rank
from rows import LATE, ROWS, Row
from short_runs import SMALL

TWO = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.threads=1")
ITERATIONS = 5
OWN = {
    "reinforce": ("algo.episodes_per_update=2", "total_env_steps=400"),
    "ppo": ("env.normalize_observation=true", "env.normalize_reward=true", "total_env_steps=160"),
    "trpo": ("total_env_steps=80",),
    "a2c": ("total_env_steps=50",),
    "actor_critic": ("total_env_steps=40",),
}
OFF_POLICY = ("algo.steps_per_iteration=8", "total_env_steps=80")
PARALLEL = [row for row in ROWS if row.algo not in ("a3c", "world_models")]
HALVES = {
    "sac": (*SMALL, "env.num_envs=2"),
    "ppo": (
        *("algo=ppo", "env=pendulum", "logger=csv", "eval.every=128", "eval.episodes=2", "checkpoint.every=96"),
        *("algo.steps_per_iteration=16", "algo.batch_size=8", "env.num_envs=2"),
    ),
}
GRADIENTS = (
    *("reinforce", "actor_critic", "a2c", "trpo", "ppo", "dqn", "ddpg", "td3", "sac", "tqc", "sac_discrete"),
    *("dreamer", "dreamer_v3"),
)


def overrides(row: Row) -> list[str]:
    """Return the overrides of a short run of a row on two ranks."""
    own = OWN.get(row.algo, OFF_POLICY)
    return [f"algo={row.algo}", f"env={row.env}", *LATE, "eval.episodes=1", *row.small, "env.num_envs=2", *own, *TWO]


def transitions(env, num: int, length: int) -> TensorDict:
    """Return random transitions `[num, length]` in float64; each of the `num` sequences is one episode."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(num, length, *shape, generator=generator, dtype=torch.float64)

    action = normal(*env["action"]["shape"]).tanh()
    if env["action"]["type"] == "discrete":
        action = torch.randint(env["action"]["n"], (num, length), generator=generator)
    done = torch.zeros(num, length, 1, dtype=torch.bool)
    done[:, -1] = True
    after = {"observation": normal(*env["observation"]["shape"]), "reward": normal(1), "done": done}
    after |= {"terminated": done.clone(), "truncated": torch.zeros_like(done)}
    count = torch.arange(length).view(1, -1, 1).expand(num, length, 1)
    observation = normal(*env["observation"]["shape"])
    data = {"observation": observation, "action": action, "next": after, "step_count": count}
    return TensorDict(data, batch_size=(num, length))


def gradients(algo: str, rank: int | None) -> list[Tensor]:
    """Return the gradients of all optimizer steps of two updates, and the parameters after them.

    Args:
        algo: Name of the algorithm.
        rank: Rank, which gets half of the transitions; None for one process with all of them.
    """
    row = next(row for row in ROWS if row.algo == algo)
    torch.set_default_dtype(torch.float64)
    normalized = [] if "advantage" not in " ".join(row.small) else ["algo.normalize_advantage=true"]
    own = ["env.num_envs=1" if algo == "reinforce" else "env.num_envs=2", *normalized]
    algorithm, _ = build_run(compose([f"algo={algo}", f"env={row.env}", *LATE, *row.small, *own]))
    algorithm.double()
    optimizers = algorithm.configure_optimizers()
    recorded: list[Tensor] = []
    for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:

        def step(optimizer=optimizer, real=optimizer.step) -> None:
            each = [each.grad.flatten() for group in optimizer.param_groups for each in group["params"]]
            recorded.append(torch.cat(each))
            real()

        optimizer.step = step
    algorithm.manual_backward = lambda loss: loss.backward()
    randn_like, torch.randn_like = torch.randn_like, lambda value: torch.sin(1000 * value.detach() + 1)
    gumbel, pathwise.sample_gumbel = pathwise.sample_gumbel, torch.zeros_like
    rand_like, torch.rand_like = torch.rand_like, lambda value: torch.full_like(value, 0.5)
    if algo.startswith("dreamer"):  # its noise depends on earlier noise, so sin(1000 x) would amplify rounding errors
        torch.randn_like = torch.zeros_like
    data = transitions(algorithm.env, 4, 6)
    data = data if rank is None else data[2 * rank : 2 * rank + 2]
    if algo == "reinforce":  # whole episodes; rank 1 has more of them than rank 0
        data = transitions(algorithm.env, 4, 6)
        data = data if rank is None else data[:1] if rank == 0 else data[1:]
        data = data.reshape(1, -1)
    for _ in range(2):
        if algo == "ppo":
            algorithm.update(algorithm.evaluate(data)[0], None, torch.tensor(0.2))
        elif algo == "trpo":
            algorithm.update(algorithm.advantages(data))
        elif algo == "reinforce":
            algorithm.update(data)
        elif algo == "a2c":
            algorithm.update(data, algorithm.last_value(data))
        elif algo == "dreamer":
            algorithm.update(records_of(data))
        elif algo == "dreamer_v3":
            records = records_of(data)
            records["latent"] = torch.zeros(*data.shape, algorithm.model.deter + algorithm.model.choices[0])
            algorithm.update(records)
        else:
            algorithm.update(data.reshape(-1))
    torch.randn_like, torch.rand_like, pathwise.sample_gumbel = randn_like, rand_like, gumbel
    torch.set_default_dtype(torch.float32)
    return [*(each.clone() for each in recorded), *(each.detach().clone() for each in algorithm.parameters())]


def records_of(data: TensorDict) -> TensorDict:
    """Return rollouts `[N, T]` as records of sequence replay, one per step."""
    done, none = data["next", "done"], torch.zeros_like(data["next", "done"])
    first = none.clone()
    first[:, 0] = True
    record = {"observation": data["observation"], "action": data["action"], "reward": data["next", "reward"]}
    return TensorDict({**record, "is_first": first, "is_terminal": done, "is_last": done}, batch_size=data.shape)


def statistics(rank: int | None) -> list[Tensor]:
    """Return running moments and standardized samples; rank 0 has 3 of 10 samples, rank 1 has 7, rank None all."""
    samples = torch.arange(20.0).square().view(10, 2)
    part = samples if rank is None else samples[:3] if rank == 0 else samples[3:]
    moments = RunningMoments((2,))
    moments.update(part)
    moments.update(part + 1)
    standardized = standardize(samples.double()) if rank is None else standardize(part.double())
    return [moments.mean, moments.var, moments.count, standardized]


def main() -> None:
    """Run everything that test_data_parallel.py checks, on this rank."""
    folder, rank = Path(sys.argv[1]), int(os.environ["LOCAL_RANK"])
    for row in PARALLEL:
        (train_rank if rank else train)(compose(overrides(row)), folder / row.algo)
    for name, pair in HALVES.items():
        run = train_rank if rank else train
        run(compose([*pair, *TWO, "total_env_steps=320"]), folder / f"{name}_straight")
        run(compose([*pair, *TWO, "total_env_steps=160"]), folder / f"{name}_halves")
        resume.resume(run=str(folder / f"{name}_halves"), total_env_steps=320)
    all_gradients = {algo: gradients(algo, rank) for algo in GRADIENTS}
    torch.save({"gradients": all_gradients, "statistics": statistics(rank)}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main()
