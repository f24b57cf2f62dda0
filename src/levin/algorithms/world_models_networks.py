"""The networks of World Models: V sees, M remembers and foresees, C acts."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from levin.core.errors import ConfigError
from levin.core.spaces import EnvSpec
from levin.model_based.dream_env import STARTS
from levin.model_based.recurrent import Carry
from levin.nn.networks import action_size, as_float32, mlp

HIDDEN = 256  # of V, where pictures are not 64 x 64
LOG_STD = (-7.0, 7.0)  # of a mixture's parts
WANDER = 0.14  # how much random actions change at a step, sqrt(1 / 50)
CHANGE = 0.3  # how often random finite actions are drawn anew


class Vision(nn.Module):
    """V: a variational autoencoder of pictures `[B, C, H, W]` uint8; z is `[B, Z]`.

    64 x 64: the paper's convolutions, 4,348,547 parameters with three channels and Z = 32.

    # Deviation: other sizes, for games smaller than the paper's, have one hidden layer on both sides instead.
    """

    def __init__(self, shape: Sequence[int], size: int) -> None:
        super().__init__()
        channels, *sides = shape
        if sides == [64, 64]:
            self.encoder = nn.Sequential(
                *(nn.Conv2d(channels, 32, 4, stride=2), nn.ReLU(inplace=True)),
                *(nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(inplace=True)),
                *(nn.Conv2d(64, 128, 4, stride=2), nn.ReLU(inplace=True)),
                *(nn.Conv2d(128, 256, 4, stride=2), nn.ReLU(inplace=True), nn.Flatten()),
            )
            self.decoder = nn.Sequential(
                *(nn.Linear(size, 1024), nn.Unflatten(1, (1024, 1, 1))),
                *(nn.ConvTranspose2d(1024, 128, 5, stride=2), nn.ReLU(inplace=True)),
                *(nn.ConvTranspose2d(128, 64, 5, stride=2), nn.ReLU(inplace=True)),
                *(nn.ConvTranspose2d(64, 32, 6, stride=2), nn.ReLU(inplace=True)),
                nn.ConvTranspose2d(32, channels, 6, stride=2),
            )
            features = 1024
        else:
            pixels = math.prod(shape)
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, HIDDEN), nn.ReLU(inplace=True))
            self.decoder = nn.Sequential(*mlp([size, HIDDEN, pixels], "relu"), nn.Unflatten(1, tuple(shape)))
            features = HIDDEN
        self.mean, self.log_variance = nn.Linear(features, size), nn.Linear(features, size)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | picture), both `[B, Z]`."""
        features = self.encoder(pixels.float() / 255)
        return as_float32(self.mean(features)), as_float32(self.log_variance(features))

    def decode(self, z: Tensor) -> Tensor:
        """The picture in (0, 1): `[B, C, H, W]`."""
        return as_float32(self.decoder(z)).sigmoid()


class Mixture(NamedTuple):
    """Of K Gaussians, for each entry of z: all `[..., Z, K]`."""

    log_share: Tensor
    mean: Tensor
    log_std: Tensor

    def nll(self, z: Tensor) -> Tensor:
        """-log sum_k share_k N(z_d | mean_k, std_k) of `[..., Z]`, averaged over d: `[...]`."""
        error = (z.unsqueeze(-1) - self.mean) * (-self.log_std).exp()
        log_prob = self.log_share - self.log_std - 0.5 * (error.square() + math.log(2 * math.pi))
        return -log_prob.logsumexp(-1).mean(-1)

    def sample(self, noise: Tensor, temperature: float) -> Tensor:
        """A draw `[..., Z]`, made of standard normal numbers `[..., 2 Z]`: shares^(1/tau) and std sqrt(tau)."""
        which, how = noise.chunk(2, -1)
        share = (self.log_share / temperature).softmax(-1)
        below = share.cumsum(-1)[..., :-1]
        part = (torch.special.ndtr(which).unsqueeze(-1) >= below).sum(-1, keepdim=True)
        mean, log_std = (each.gather(-1, part).squeeze(-1) for each in (self.mean, self.log_std))
        return torch.addcmul(mean, log_std.exp(), how, value=math.sqrt(temperature))


class Memory(nn.Module):
    """M: an LSTM over (z, a) that says what z comes next, with which reward, and whether the episode ends there.

    LSTM and mixture have 422,368 parameters with Z = 32, A = 3, 256 cells and K = 5.
    """

    def __init__(self, z: int, actions: int, cells: int, mixtures: int) -> None:
        super().__init__()
        self.z, self.cells, self.mixtures = z, cells, mixtures
        self.from_input = nn.Linear(z + actions, 4 * cells)
        self.from_hidden = nn.Linear(cells, 4 * cells, bias=False)
        self.mixture_head = nn.Linear(cells, 3 * z * mixtures)
        self.reward_head, self.end_head = nn.Linear(cells, 1), nn.Linear(cells, 1)
        with torch.no_grad():
            self.from_input.bias[cells : 2 * cells] += 1  # remember, at first

    def forward(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """One step: `inputs` `[B, 4 cells]` is `from_input([z, a])`; `hidden` and `cell` `[B, cells]`."""
        gates = as_float32(inputs) + as_float32(self.from_hidden(hidden))
        come_in, keep, candidate, go_out = gates.chunk(4, -1)
        cell = keep.sigmoid() * cell + come_in.sigmoid() * candidate.tanh()
        return go_out.sigmoid() * cell.tanh(), cell

    def run(self, z: Tensor, action: Tensor, is_first: Tensor) -> Tensor:
        """What is remembered after each of `z` `[B, T, Z]` and `action` `[B, T, A]`, from nothing: `[B, T, cells]`.

        Args:
            is_first: `[B, T, 1]`: there everything before is forgotten.
        """
        inputs = self.from_input(torch.cat([z, action], -1)).unbind(1)
        continues = (~is_first).unbind(1)
        hidden = cell = z.new_zeros(len(z), self.cells)
        found = []
        for t in range(len(inputs)):
            hidden, cell = self(inputs[t], hidden * continues[t], cell * continues[t])
            found.append(hidden)
        return torch.stack(found, 1)

    def predict(self, hidden: Tensor) -> tuple[Mixture, Tensor, Tensor]:
        """The mixture of the next z, the reward that comes with it, and the logit of the end: of `[..., cells]`."""
        numbers = as_float32(self.mixture_head(hidden)).unflatten(-1, (3, self.z, self.mixtures))
        log_share, mean, log_std = numbers.unbind(-3)
        mixture = Mixture(log_share.log_softmax(-1), mean, log_std.clamp(*LOG_STD))
        return mixture, as_float32(self.reward_head(hidden)), as_float32(self.end_head(hidden))


class LatentState(NamedTuple):
    """What is known at a moment: z of what is seen, and what M remembers of before, all `[N, *]`."""

    z: Tensor
    hidden: Tensor
    cell: Tensor

    @property
    def feature(self) -> Tensor:
        """What C reads: `[N, Z + cells]`."""
        return torch.cat([self.z, self.hidden], -1)


class WorldModel(nn.Module):
    """V and M together, as what a policy remembers with and dreams in.

    Args:
        env: Spaces.
        z: Size of what V makes of a picture, Z.
        cells: Of M's LSTM.
        mixtures: K, Gaussians for each entry of z.
        end_weight: How much more ends count where M learns.

    Raises:
        ConfigError: Observations that are not pixels.
    """

    starts: Tensor  # [STARTS, C, H, W]: first pictures of episodes; zeros until V and M are trained

    def __init__(self, env: EnvSpec, z: int, cells: int, mixtures: int, end_weight: float) -> None:
        super().__init__()
        space = env["observation"]
        if space["type"] != "box" or space["dtype"] != "uint8":
            raise ConfigError(f"WorldModels reads pixels; {env['id']} shows {space['type']} of {space['dtype']}")
        self.actions, self.discrete = action_size(env), env["action"]["type"] == "discrete"
        self.vision = Vision(space["shape"], z)
        self.memory = Memory(z, self.actions, cells, mixtures)
        self.features, self.noise, self.end_weight = z + cells, 2 * z + 1, end_weight
        self.deter, self.stoch = 2 * cells, z  # as `Carry` has them: M's hidden and cell, and z
        self.register_buffer("starts", torch.zeros(STARTS, *space["shape"], dtype=torch.uint8))

    def encode_action(self, action: Tensor) -> Tensor:
        """Actions as M reads them: `[N, A]` in [-1, 1], of finite ones `[N]` one-hot."""
        return one_hot(action, self.actions).float() if self.discrete else action.clamp(-1, 1)

    def initial_state(self, observation: Tensor) -> LatentState:
        """At the first observation of an episode."""
        z, _ = self.vision.encode(observation)
        nothing = z.new_zeros(len(z), self.memory.cells)
        return LatentState(z, nothing, nothing)

    def remember(self, latent: LatentState, action: Tensor) -> tuple[Tensor, Tensor]:
        """M's step: what is remembered after an action `[N, A]`."""
        return self.memory(self.memory.from_input(torch.cat([latent.z, action], -1)), latent.hidden, latent.cell)

    def observe(self, latent: LatentState, action: Tensor, observation: Tensor) -> LatentState:
        """After an action, and what it led to. z is the mean of q(z | picture).

        # Deviation: the paper draws z also when it acts.
        """
        z, _ = self.vision.encode(observation)
        return LatentState(z, *self.remember(latent, action))

    def imagine(
        self, latent: LatentState, action: Tensor, noise: Tensor, temperature: float
    ) -> tuple[LatentState, Tensor, Tensor]:
        """After an action, as M has it: the mind, the reward `[N, 1]`, and whether the episode ends `[N, 1]`.

        Args:
            noise: Standard normal numbers `[N, 2 Z + 1]`: the only chance there is.
            temperature: tau, of all three draws.

        # Deviation: the end is drawn, too, of probabilities without the weight that ends had in training; in the code
        beside the paper an episode ends where the logit is above 0.
        """
        hidden, cell = self.remember(latent, action)
        mixture, reward, logit = self.memory.predict(hidden)
        ends = torch.special.ndtr(noise[:, -1:]) < ((logit - math.log(self.end_weight)) / temperature).sigmoid()
        return LatentState(mixture.sample(noise[:, :-1], temperature), hidden, cell), reward, ends

    def decode(self, latent: LatentState) -> Tensor:
        """What it looks like: `[N, C, H, W]`, from 0 to 255."""
        return 255 * self.vision.decode(latent.z)


class Controllers(nn.Module):
    """C: linear policies `a = W [z, h] + b`, one for each row of numbers `[P, (F + 1) A]`. `best`: what they lead to.

    Args:
        reads: F, how many of the features are read: those of z come first.
        env: Spaces.
    """

    best: Tensor  # [(F + 1) A]

    def __init__(self, reads: int, env: EnvSpec) -> None:
        super().__init__()
        self.reads, self.actions = reads, action_size(env)
        self.discrete = env["action"]["type"] == "discrete"
        self.size = (reads + 1) * self.actions
        self.register_buffer("best", torch.zeros(self.size))

    def forward(self, numbers: Tensor, feature: Tensor) -> Tensor:
        """What each chooses: `[P, R, *] -> [P, R, A]` in [-1, 1], or the numbers of finite actions `[P, R]`."""
        weight, bias = numbers.unflatten(-1, (self.reads + 1, self.actions)).tensor_split([self.reads], 1)
        chosen = torch.baddbmm(bias, feature[..., : self.reads], weight)
        return chosen.argmax(-1) if self.discrete else chosen.tanh()


class Trials:
    """Which of several controllers plays the next episode of which env.

    Args:
        num_envs: N.
    """

    def __init__(self, num_envs: int) -> None:
        self.numbers: Tensor | None = None  # [P, n] the controllers; None: actions are random
        self.queue: list[int] = []  # which controller each trial is of; empty: all of them in turn, for ever
        self.next = 0  # trial
        self.trial = [-1] * num_envs  # that each env is in; -1: none, while others end theirs

    def begin(self, numbers: Tensor | None, queue: list[int]) -> None:
        """New trials; what is open goes on as no trial."""
        self.numbers, self.queue, self.next, self.trial = numbers, queue, 0, [-1] * len(self.trial)

    def assign_next(self, first: Tensor) -> None:
        """Where an episode begins `[N]`, the next trial does."""
        for env in first.nonzero().flatten().tolist():
            waits = not self.queue or self.next < len(self.queue)
            self.trial[env] = self.next if waits else -1
            self.next += waits

    def current_weights(self) -> Tensor:
        """The numbers of the controller of each env `[N, n]`, the first one's where there is no trial."""
        assert self.numbers is not None
        trials = [max(0, trial) for trial in self.trial]
        return self.numbers[[self.queue[trial] if self.queue else trial % len(self.numbers) for trial in trials]]

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": self.numbers, "queue": self.queue, "next": self.next, "trial": list(self.trial)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.numbers, self.queue = state["numbers"], list(state["queue"])
        self.next, self.trial = state["next"], list(state["trial"])


class Player(nn.Module):
    """What the collector asks for an action, `[N, *S], [N, 1] -> [N, *A]`: V, M and C, or actions at random.

    Args:
        model: V and M.
        controllers: C, the best of them.
        carry: Its memory.
        trials: Which others play instead; then their trial is given too, `[N, 1]`.
    """

    def __init__(self, model: WorldModel, controllers: Controllers, carry: Carry, trials: Trials | None = None) -> None:
        super().__init__()
        self.model, self.controllers, self.carry, self.trials = model, controllers, carry, trials

    def forward(self, observation: Tensor, is_first: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        carry = self.carry
        carry.begin(is_first)
        if self.trials is None or self.trials.numbers is not None:
            before = LatentState(carry.stoch, *carry.deter.chunk(2, -1))
            carry.deter = torch.cat(self.model.remember(before, carry.action), -1) * ~is_first
            carry.stoch, _ = self.model.vision.encode(observation)
        if self.trials is None:
            action = self.controller_action(self.controllers.best.expand(len(is_first), -1))
        else:
            self.trials.assign_next(is_first.squeeze(-1))
            at_random = self.trials.numbers is None
            action = (
                self.random_action(is_first)
                if at_random
                else self.controller_action(self.trials.current_weights().to(is_first.device))
            )
        carry.action = self.model.encode_action(action)
        return action if self.trials is None else (action, torch.tensor(self.trials.trial).unsqueeze(-1))

    def controller_action(self, numbers: Tensor) -> Tensor:
        """Of one controller each, `[N, n] -> [N, *A]`."""
        latent = LatentState(self.carry.stoch, *self.carry.deter.chunk(2, -1))
        return self.controllers(numbers, latent.feature.unsqueeze(1)).squeeze(1)

    def random_action(self, is_first: Tensor) -> Tensor:
        """At random, as white noise stays where it is: uniform at first, then in small steps, or mostly the same."""
        if self.model.discrete:
            new = torch.randint(self.model.actions, (len(is_first),), device=is_first.device)
            changes = is_first.squeeze(-1) | (torch.rand(len(is_first), device=is_first.device) < CHANGE)
            return torch.where(changes, new, self.carry.action.argmax(-1))
        before = torch.where(is_first, torch.rand_like(self.carry.action) * 2 - 1, self.carry.action)
        return (before + WANDER * torch.randn_like(before)).clamp(-1, 1)
