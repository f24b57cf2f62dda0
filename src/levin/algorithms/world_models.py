"""World Models (Ha & Schmidhuber 2018, arXiv:1803.10122): see, remember, dream, act; lecture rows 25 to 27.

V, a variational autoencoder, makes z of a picture. M, a recurrent mixture density network, foresees the next z. C, a
linear policy on z and on what M remembers, is so small that evolution finds it: in the env, or in a dream of M's, where
no env takes a step.

Pseudocode:

    for each round:
        collect:     play with random actions, later with what C's distribution offers;  D <- D + {(o, a, r, end)}
        vision:      V <- Adam( sum (o - o')^2 + max(KL(q(z|o) || N(0, 1)), 0.5 Z) )                    see
        memory:      h_t = LSTM(z_t, a_t, h_{t-1}),  z ~ q(z|o)                                         remember
                     M <- Adam( -log p(z_{t+1} | h_t) + (r_{t+1} - r'(h_t))^2 - 10 end log e(h_t) - ... )
        controller:  for each generation:                                                               dream, act
            W_1, ..., W_P ~ CMA-ES
            play R episodes with a = W [z, h], of a dream (z' ~ p(z' | h)^(1/tau)) or of the env
            CMA-ES <- mean returns

Deviations:
    - M also says the reward, in every task, and learns from windows of records, which begin without a memory.
    - z is the mean of q(z|o) where an env is played, and drawn where M learns.
    - In the env, candidates do not share the seeds of their episodes; in a dream they do.
    - In a dream the end is drawn, of M's probability of it.
    - Random actions are a walk, or mostly those before; the paper draws random networks.
    - The norm of M's gradient is clipped, not each of its entries.

Metrics:
    train/reconstruction: sum of squared errors of a picture in (0, 1).
    train/kl: KL(q(z|o) || N(0, 1)), nats.
    train/nll: -log p(z'|h), the mean over the entries of z.
    train/reward_loss, train/end_loss: of M's other predictions.
    train/fitness, train/fitness_best: mean return of a generation, and that of its best candidate.
    train/generations: of this round.
    train/dream_length: steps of dreamt episodes.
    eval/dream_return: of the controller that is evaluated, in 100 dreams.
    eval/open_loop_5, ...: see `levin.model_based.open_loop`.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Adam, Optimizer

from levin.algorithms.base import Algorithm, Batch
from levin.algorithms.world_models_evolution import Evolution, dream_returns
from levin.algorithms.world_models_networks import Controllers, Player, Trials, WorldModel
from levin.core import distributed
from levin.core.errors import ConfigError
from levin.core.spaces import IS_FIRST, EnvSpec
from levin.core.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from levin.data.sequences import LATENT, SequenceReplay
from levin.model_based import open_loop
from levin.model_based.dream_env import STARTS, policy_space
from levin.model_based.recurrent import Carry

UPDATES = 50  # of V or M in an iteration, at most
EVALUATED = 100  # dreams of an evaluation
TRIAL = "trial"
KEPT = ("round", "stage", "spent", "dreams", "dream_steps_taken", "returns", "open")


class WorldModels(Algorithm):
    """V, M and C, one after the other.

    Values are those of the paper and of its code for CarRacing, https://github.com/hardmaru/WorldModelsExperiments.

    Args:
        env: Spaces of the env (`levin.envs.factory.describe_env`).
        rounds: How often all of it is done; each begins with what the one before has learned.
        collect_env_steps: Env steps of all collections together.
        latent_size: Z: 32.
        memory_size: Cells of M's LSTM: 256.
        mixtures: K, Gaussians for each entry of z: 5.
        vision_updates: Of V, in each round: 1,000,000, ten times through 10,000 episodes.
        vision_batch_size: Pictures: 100.
        vision_lr: Adam: 1e-4.
        kl_tolerance: KL that costs nothing, for each entry of z: 0.5.
        memory_updates: Of M, in each round: 4000.
        memory_batch_size: Windows: 100.
        memory_batch_length: Records of each: whole episodes there.
        memory_lr: Adam: 1e-3.
        max_grad_norm: Of M's gradient.
        end_weight: How much more an end counts than that there is none: 10.
        controller_training: Where C is evolved: `real`, or `dream`.
        controller_input: What C reads: `latent_memory` is z and what M remembers; `latent`: z alone.
        temperature: Of the dream, tau: 1.15.
        dream_length: Steps after which a dream is over.
        generations: Of C, in each round: 1800.
        population: P: 64.
        rollouts: R, episodes of each candidate: 16.
        initial_std: Of the first generation: 0.1.
        buffer_size: Records that replay keeps.
        buffer_storage: `memory`, or `memmap` for a file.
        steps_per_iteration: Vector steps of a rollout.
        compile: The losses of V and M; the same numbers, after minutes at the start.
    """

    actions: ClassVar = ("box", "discrete")
    observations: ClassVar = ("uint8",)
    buffer: SequenceReplay

    def __init__(
        self,
        *,
        env: EnvSpec,
        rounds: PositiveInt = 1,
        collect_env_steps: PositiveInt = 10_000_000,
        latent_size: PositiveInt = 32,
        memory_size: PositiveInt = 256,
        mixtures: PositiveInt = 5,
        vision_updates: NonNegativeInt = 1_000_000,
        vision_batch_size: PositiveInt = 100,
        vision_lr: PositiveFloat = 1e-4,
        kl_tolerance: NonNegativeFloat = 0.5,
        memory_updates: NonNegativeInt = 4000,
        memory_batch_size: PositiveInt = 100,
        memory_batch_length: PositiveInt = 1000,
        memory_lr: PositiveFloat = 1e-3,
        max_grad_norm: PositiveFloat = 1.0,
        end_weight: PositiveFloat = 10.0,
        controller_training: Literal["real", "dream"] = "real",
        controller_input: Literal["latent_memory", "latent"] = "latent_memory",
        temperature: PositiveFloat = 1.15,
        dream_length: PositiveInt = 1000,
        generations: PositiveInt = 1800,
        population: PositiveInt = 64,
        rollouts: PositiveInt = 16,
        initial_std: PositiveFloat = 0.1,
        buffer_size: PositiveInt = 10_000_000,
        buffer_storage: Literal["memory", "memmap"] = "memmap",
        steps_per_iteration: PositiveInt = 100,
        compile: bool = False,  # noqa: A002
    ) -> None:
        super().__init__(env, gamma=1.0)
        del self.hparams["gamma"]  # is none of ours: returns are not discounted
        if env["observation_clip"] is not None or env["reward_clip"] is not None:
            raise ConfigError("WorldModels reads pixels and true rewards: env.normalize_... must be false")
        least = (memory_batch_length + 1) * env["num_envs"]
        if collect_env_steps // rounds < least:
            raise ConfigError(
                f"algo.collect_env_steps={collect_env_steps} in {rounds} rounds is less than a window of each env: "
                f"{least * rounds}"
            )
        if buffer_size // env["num_envs"] < memory_batch_length + 1:
            raise ConfigError(f"algo.buffer_size={buffer_size} is less than a window of each env")
        if population < 2:
            raise ConfigError("algo.population=1 has nothing to choose from: two are the least")
        self.rounds, self.collect_env_steps = rounds, collect_env_steps
        self.vision_updates, self.vision_batch_size, self.vision_lr = vision_updates, vision_batch_size, vision_lr
        self.kl_tolerance, self.latent_size = kl_tolerance, latent_size
        self.memory_updates, self.memory_batch_size, self.memory_lr = memory_updates, memory_batch_size, memory_lr
        self.memory_batch_length, self.max_grad_norm, self.end_weight = memory_batch_length, max_grad_norm, end_weight
        self.controller_training, self.temperature, self.dream_length = controller_training, temperature, dream_length
        self.generations, self.population, self.rollouts = generations, population, rollouts
        self.steps_per_iteration = steps_per_iteration

        self.model = WorldModel(env, latent_size, memory_size, mixtures, end_weight)
        self.controllers = Controllers(latent_size if controller_input == "latent" else self.model.features, env)
        self.trials = Trials(env["num_envs"])
        self.carry = Carry(env["num_envs"], self.model)
        self.buffer = SequenceReplay(env, buffer_size, buffer_storage, memory_batch_length + 1, keeps_latents=True)
        self.round, self.stage = 0, "collect"  # collect, vision, memory, controller
        self.spent = 0  # updates or generations of this stage
        self.dream_steps_taken, self.dreams = 0, 0  # episodes
        self.evolution = Evolution(population, initial_std)
        self.returns: dict[int, float] = {}  # of the trials of this generation
        self.open = [(-1, 0.0)] * env["num_envs"]  # trial and return so far, of the open episode
        if compile:
            self.compile_losses("vision_loss", "memory_loss")

    def configure_optimizers(self) -> list[Optimizer]:
        self.vision_optimizer = Adam(self.model.vision.parameters(), lr=self.vision_lr, fused=True)
        self.memory_optimizer = Adam(self.model.memory.parameters(), lr=self.memory_lr, fused=True)
        return [self.vision_optimizer, self.memory_optimizer]

    def policy(self, *, deterministic: bool = False) -> TensorDictModule:
        carry = Carry(0, self.model).to(self.device) if deterministic else self.carry
        trials = None if deterministic else self.trials
        player = Player(self.model, self.controllers, carry, trials)
        out_keys: list[NestedKey] = ["action"] if deterministic else ["action", TRIAL]
        return TensorDictModule(player, in_keys=["observation", IS_FIRST], out_keys=out_keys)

    def on_train_start(self) -> None:
        super().on_train_start()
        if distributed.world_size() > 1:
            raise ConfigError("WorldModels trains in one process: trainer.devices=1")
        if self.stage == "controller":
            self.evolution.restore()
            if self.controller_training == "real":
                self.asked = self.evolution.ask()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        stages = {name: getattr(self, name) for name in KEPT} | self.evolution.state_dict()
        checkpoint["stages"] = {**stages, "trials": self.trials.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name in KEPT:
            setattr(self, name, checkpoint["stages"][name])
        self.evolution.load_state_dict(checkpoint["stages"])
        self.trials.load_state_dict(checkpoint["stages"]["trials"])

    def on_evaluation(self, folder: Path) -> dict[str, float]:
        row: dict[str, float] = {}
        if self.evolution.fitness:
            dreams, _ = self.evaluate_in_dreams(self.controllers.best.unsqueeze(0), list(range(EVALUATED)))
            row["eval/dream_return"] = float(dreams.mean())
        if self.stage != "collect" and len(self.buffer) > open_loop.CONTEXT:
            row |= open_loop.evaluate_open_loop(
                self.buffer, self.device, self.predict_open_loop, folder / f"{self.clock}.png"
            )
        return row

    def predict_open_loop(self, window: TensorDict) -> tuple[dict[str, Tensor], Tensor]:
        """Pictures and rewards of a window `[B, L]` of which the first moments are seen, and then the actions."""
        latent = self.model.initial_state(window["observation"][:, 0])
        latents, rewards = [latent], [torch.zeros_like(window["reward"][:, 0])]
        for t in range(window.shape[1] - 1):
            action = window["action"][:, t]
            if t + 1 < open_loop.CONTEXT:
                latent = self.model.observe(latent, action, window["observation"][:, t + 1])
                _, reward, _ = self.model.memory.predict(latent.hidden)
            else:
                noise = torch.randn(len(action), self.model.noise, device=action.device)
                latent, reward, _ = self.model.imagine(latent, action, noise, 1.0)
            latents.append(latent)
            rewards.append(reward)
        pictures = torch.stack([self.model.decode(latent) for latent in latents], 1)
        return {"": pictures}, torch.stack(rewards, 1)

    @torch.no_grad()
    def imagine_pictures(self, observation: Tensor, length: int) -> Tensor:
        latent, pictures = self.model.initial_state(observation), [observation[0]]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(length - 1):
                action = self.controllers(self.controllers.best.unsqueeze(0), latent.feature.unsqueeze(1)).squeeze(1)
                noise = torch.randn(1, self.model.noise)
                latent, _, ends = self.model.imagine(latent, self.model.encode_action(action), noise, self.temperature)
                pictures.append(self.model.decode(latent)[0].byte())
                if ends:
                    break
        last = pictures[-1:] * (length - len(pictures))  # stays where it ended
        return torch.stack([*pictures, *last])

    def dream_model(self) -> WorldModel:
        """What can be dreamt in. Raises ConfigError when V or M is not trained yet."""
        if not self.model.starts.any():
            raise ConfigError(f"V and M of that run are not trained yet, its stage is {self.stage}: make resume")
        return self.model

    # --- the stages

    @property
    def collects(self) -> bool:  # type: ignore[override]
        """Whether this stage takes env steps."""
        return self.stage == "collect" or (self.stage == "controller" and self.controller_training == "real")

    @property
    def clock(self) -> int:
        """Env steps; and updates and dreamt episodes, in whose stages there are none."""
        return self.env_steps + self.updates + self.dreams

    @property
    def dream_steps(self) -> int:
        """Steps that were dreamt."""
        return self.dream_steps_taken

    @property
    def status(self) -> str:  # type: ignore[override]
        """Round, stage, and how far that is."""
        if self.round == self.rounds:
            return ""
        budget = {"vision": self.vision_updates, "memory": self.memory_updates, "controller": self.generations}
        progress = f" {self.spent:,}/{budget[self.stage]:,}" if self.stage in budget else ""
        return f" · {self.stage}{progress}, round {self.round + 1}/{self.rounds}"

    def finished(self, total_env_steps: int) -> bool:
        """All rounds are over; or, where C is evolved in the env, its steps are.

        Raises:
            ConfigError: None would be left for C.
        """
        in_env = self.controller_training == "real"
        if in_env and total_env_steps <= self.collect_env_steps:
            raise ConfigError(
                f"total_env_steps={total_env_steps} leaves none to evolve a controller in: "
                f"algo.collect_env_steps={self.collect_env_steps} are collected before"
            )
        over = in_env and self.stage == "controller" and self.env_steps >= total_env_steps
        return self.round == self.rounds or over

    def training_step(self, rollout: TensorDictBase, _: int) -> None:
        if self.stage == "collect":
            self.collect(rollout)
        elif self.stage == "vision":
            self.train_vision()
        elif self.stage == "memory":
            self.train_memory()
        elif self.controller_training == "dream":
            self.evolve_in_dreams()
        else:
            self.evolve_in_env(rollout)

    def enter_stage(self, stage: str) -> None:
        """Begin a stage."""
        self.stage, self.spent = stage, 0

    def collect(self, rollout: TensorDictBase) -> None:
        """Store what was played, until this round's share is there."""
        latent = torch.zeros(*rollout.shape, 2 * self.latent_size, device=rollout.device)
        self.buffer.extend(rollout.exclude(TRIAL).set(LATENT, latent))
        if self.env_steps - self.evolution.begun.get("env_steps", 0) >= self.collect_env_steps / self.rounds:
            self.enter_stage("vision")

    def train_vision(self) -> None:
        """Some updates of V, on pictures drawn uniformly."""
        for _ in range(min(UPDATES, self.vision_updates - self.spent)):
            row, env = self.buffer.sample_positions(self.vision_batch_size, 1)
            observation = self.buffer.data["observation"][row[:, 0], env[:, 0]].to(self.device)
            loss, terms = self.vision_loss(observation)
            self.step(self.vision_optimizer, loss)
            self.record(**terms)
            self.updates += 1
            self.spent += 1
        if self.spent >= self.vision_updates:
            self.encode_buffer()
            self.enter_stage("memory")

    def train_memory(self) -> None:
        """Some updates of M, on windows drawn uniformly."""
        keys = (LATENT, "action", "reward", "is_first", "is_terminal", "is_last")
        for _ in range(min(UPDATES, self.memory_updates - self.spent)):
            rows, env = self.buffer.sample_positions(self.memory_batch_size, self.memory_batch_length + 1)
            batch: Batch = {key: self.buffer.data.get(key)[rows, env].to(self.device) for key in keys}
            loss, terms = self.memory_loss(batch)
            self.step(self.memory_optimizer, loss, self.max_grad_norm)
            self.record(**terms)
            self.updates += 1
            self.spent += 1
        if self.spent >= self.memory_updates:
            self.store_starts()
            seed = int(torch.randint(1, 2**31, ()))
            self.evolution.begin(seed, self.controllers.best.cpu().clone())
            self.enter_stage("controller")
            if self.controller_training == "real":
                self.next_generation()

    def evolve_in_dreams(self) -> None:
        """One generation of C, in dreams; all candidates have the same chances."""
        asked = self.evolution.ask()
        seeds = torch.randint(2**31, (self.rollouts,)).tolist()
        returns, lengths = self.evaluate_in_dreams(torch.from_numpy(np.stack(asked)).float(), seeds)
        self.dreams += returns.numel()
        self.dream_steps_taken += int(lengths.sum())
        self.record(dream_length=lengths.mean())
        self.tell(asked, returns.mean(1))

    def evolve_in_env(self, rollout: TensorDictBase) -> None:
        """C in the env: take in the returns of the trials, and when all are there, begin the next generation."""
        trial, reward, done = (
            part.squeeze(-1).tolist() for part in (rollout[TRIAL], rollout["next", "reward"], rollout["next", "done"])
        )
        for env in range(len(trial)):
            playing, total = self.open[env]
            for number, gained, ends in zip(trial[env], reward[env], done[env], strict=True):
                if number != playing:
                    if playing >= 0:  # an episode that a resume cut short: its trial is made again
                        self.trials.queue.append(self.trials.queue[playing])
                    playing, total = number, 0.0
                total += gained
                if ends:
                    if playing >= 0:
                        self.returns[playing] = total
                    playing, total = -1, 0.0
            self.open[env] = (playing, total)
        if len(self.returns) == self.population * self.rollouts:
            returns = torch.zeros(self.population, dtype=torch.float64)
            for number, total in self.returns.items():
                returns[self.trials.queue[number]] += total / self.rollouts
            self.tell(self.asked, returns)
            if self.stage == "controller":
                self.next_generation()

    def next_generation(self) -> None:
        """Let the next candidates play, each as often as it has to."""
        self.asked = self.evolution.ask()
        self.returns, self.open = {}, [(-1, 0.0)] * len(self.open)
        queue = [candidate for _ in range(self.rollouts) for candidate in range(self.population)]
        self.trials.begin(torch.from_numpy(np.stack(self.asked)).float(), queue)

    # --- V

    def vision_loss(self, observation: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """E[sum (o - o')^2 + max(KL(q(z|o) || N(0, 1)), 0.5 Z)], of pictures `[B, C, H, W]`. Also gives the terms."""
        mean, log_variance = self.model.vision.encode(observation)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        error = (self.model.vision.decode(z) - observation.float() / 255).square().flatten(1).sum(1).mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        loss = error + kl.clamp(min=self.kl_tolerance * self.latent_size).mean()
        return loss, {"reconstruction": error.detach(), "kl": kl.mean().detach()}

    @torch.no_grad()
    def encode_buffer(self) -> None:
        """Let replay keep V's distribution of every picture."""
        data = self.buffer.data
        for start in range(0, len(data), 1000):
            rows: Tensor = data.get("observation")[start : start + 1000]  # [n, N, *S]
            encoded = self.model.vision.encode(rows.flatten(0, 1).to(self.device))
            data[LATENT][start : start + 1000] = torch.cat(encoded, -1).unflatten(0, rows.shape[:2])

    def store_starts(self) -> None:
        """Let the model keep pictures that episodes begin with: dreams begin there."""
        data = self.buffer.data
        begins = data.get("is_first").squeeze(-1)
        first, env = (begins if begins.any() else ~begins).nonzero(as_tuple=True)  # else anywhere
        chosen = torch.randint(len(first), (STARTS,))
        self.model.starts.copy_(data["observation"][first[chosen], env[chosen]])

    # --- M

    def memory_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """E[-log p(z'|h) + (r' - r(h))^2 - 10 end log e(h) - (1 - end) log(1 - e(h))], of windows `[B, 1 + T]`.

        z is drawn anew from q(z|o) each time. What leads from one episode into the next is not learned. Also gives the
        terms.
        """
        mean, log_variance = batch[LATENT].chunk(2, -1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        hidden = self.model.memory.run(z[:, :-1], batch["action"][:, :-1], batch["is_first"][:, :-1])
        mixture, reward, end = self.model.memory.predict(hidden)
        continues = (~batch["is_last"][:, :-1] & ~batch["is_first"][:, 1:]).float()  # [B, T, 1]
        share = continues / continues.sum().clamp(min=1)
        nll = (share * mixture.nll(z[:, 1:]).unsqueeze(-1)).sum()
        reward_loss = (share * (reward - batch["reward"][:, 1:]).square()).sum()
        ends, weight = batch["is_terminal"][:, 1:].float(), torch.tensor(self.end_weight, device=end.device)
        end_loss = binary_cross_entropy_with_logits(end, ends, share, reduction="sum", pos_weight=weight)
        terms = {"nll": nll.detach(), "reward_loss": reward_loss.detach(), "end_loss": end_loss.detach()}
        return nll + reward_loss + end_loss, terms

    # --- C, whose evolution is in `world_models_evolution.py`

    def tell(self, asked: list[np.ndarray], fitness: Tensor) -> None:
        """Report the mean returns `[P]` of a generation; the controller becomes the mean of their distribution."""
        self.controllers.best.copy_(self.evolution.tell(asked, fitness))
        self.spent += 1
        self.record(fitness=fitness.mean(), fitness_best=fitness.max(), generations=torch.tensor(float(self.spent)))
        if self.spent >= self.generations:
            self.round += 1
            self.evolution.begun["env_steps"] = self.env_steps
            self.trials.begin(torch.from_numpy(np.stack(self.evolution.ask())).float(), [])
            if self.controller_training == "real":  # what was played since is not stored
                self.buffer.restart(torch.ones(len(self.open), dtype=torch.bool))
            self.enter_stage("collect")

    def evaluate_in_dreams(self, numbers: Tensor, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Returns and lengths of controllers `[P, n]` in dreams with these seeds `[R]`: both `[P, R]`."""
        actions, numbers = policy_space(self.env["action"]), numbers.to(self.device)
        how = {"temperature": self.temperature, "time_limit": self.dream_length}
        return dream_returns(self.model, self.controllers, numbers, seeds, actions, **how)
