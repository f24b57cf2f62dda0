"""Networks of World Models: V encodes images, M predicts what follows, C acts."""

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
from levin.nn.layers import as_float32, mlp
from levin.nn.networks import action_size

HIDDEN = 256  # width of V's hidden layer for images other than 64 x 64
LOG_STD = (-7.0, 7.0)  # bounds of the log-std of a mixture's Gaussians
RANDOM_WALK_STD = 0.14  # std of a step of random continuous actions, sqrt(1 / 50)
RESAMPLE_PROBABILITY = 0.3  # of random discrete actions, at each step


class Vision(nn.Module):
    """V: a variational autoencoder of images `[B, C, H, W]` uint8; z is `[B, Z]`.

    For 64 x 64 images it has the paper's convolutions, 4,348,547 parameters with three channels and Z = 32.

    # Deviation: for other sizes, of games smaller than the paper's, encoder and decoder have one hidden layer instead.
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
        """Return mean and log-variance of q(z | image), both `[B, Z]`."""
        features = self.encoder(pixels.float() / 255)
        return as_float32(self.mean(features)), as_float32(self.log_variance(features))

    def decode(self, z: Tensor) -> Tensor:
        """Return the decoded image in (0, 1): `[B, C, H, W]`."""
        return as_float32(self.decoder(z)).sigmoid()


class Mixture(NamedTuple):
    """A mixture of K Gaussians for each entry of z; log-weights, means and log-std are all `[..., Z, K]`."""

    log_share: Tensor
    mean: Tensor
    log_std: Tensor

    def nll(self, z: Tensor) -> Tensor:
        """Return -log sum_k share_k N(z_d | mean_k, std_k) of z `[..., Z]`, averaged over its entries d: `[...]`."""
        error = (z.unsqueeze(-1) - self.mean) * (-self.log_std).exp()
        log_prob = self.log_share - self.log_std - 0.5 * (error.square() + math.log(2 * math.pi))
        return -log_prob.logsumexp(-1).mean(-1)

    def sample(self, noise: Tensor, temperature: float) -> Tensor:
        """Return a sample `[..., Z]` made from standard normal values `[..., 2 Z]`.

        The temperature tau raises the weights of the Gaussians to the power 1 / tau and multiplies their std by
        sqrt(tau).
        """
        component_noise, value_noise = noise.chunk(2, -1)
        share = (self.log_share / temperature).softmax(-1)
        cumulative = share.cumsum(-1)[..., :-1]
        component = (torch.special.ndtr(component_noise).unsqueeze(-1) >= cumulative).sum(-1, keepdim=True)
        mean, log_std = (each.gather(-1, component).squeeze(-1) for each in (self.mean, self.log_std))
        return torch.addcmul(mean, log_std.exp(), value_noise, value=math.sqrt(temperature))


class Memory(nn.Module):
    """M: an LSTM over (z, a) that predicts the next z, its reward, and whether the episode ends there.

    LSTM and mixture have 422,368 parameters with Z = 32, A = 3, 256 cells and K = 5.

    Args:
        z: Size of z, Z.
        actions: Size of an action, A.
        cells: Cells of the LSTM.
        mixtures: Gaussians for each entry of z, K.
    """

    def __init__(self, z: int, actions: int, cells: int, mixtures: int) -> None:
        super().__init__()
        self.z, self.cells, self.mixtures = z, cells, mixtures
        self.from_input = nn.Linear(z + actions, 4 * cells)
        self.from_hidden = nn.Linear(cells, 4 * cells, bias=False)
        self.mixture_head = nn.Linear(cells, 3 * z * mixtures)
        self.reward_head, self.end_head = nn.Linear(cells, 1), nn.Linear(cells, 1)
        with torch.no_grad():
            self.from_input.bias[cells : 2 * cells] += 1  # bias of the forget gate: keep the cell state at first

    def forward(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next hidden and cell state `[B, cells]`; `inputs` `[B, 4 cells]` is `from_input([z, a])`."""
        gates = as_float32(inputs) + as_float32(self.from_hidden(hidden))
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4, -1)
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
        return output_gate.sigmoid() * cell.tanh(), cell

    def unroll(self, z: Tensor, action: Tensor, is_first: Tensor) -> Tensor:
        """Return the hidden states `[B, T, cells]` after each step of a window, starting from zeros.

        Args:
            z: Latents `[B, T, Z]`.
            action: Actions `[B, T, A]`.
            is_first: Starts of episodes `[B, T, 1]`; the state is set to zero there.
        """
        inputs = self.from_input(torch.cat([z, action], -1)).unbind(1)
        continues = (~is_first).unbind(1)
        hidden = cell = z.new_zeros(len(z), self.cells)
        hiddens = []
        for t in range(len(inputs)):
            hidden, cell = self(inputs[t], hidden * continues[t], cell * continues[t])
            hiddens.append(hidden)
        return torch.stack(hiddens, 1)

    def predict(self, hidden: Tensor) -> tuple[Mixture, Tensor, Tensor]:
        """Return the mixture of the next z, its reward, and the logit of the episode's end, for `[..., cells]`."""
        numbers = as_float32(self.mixture_head(hidden)).unflatten(-1, (3, self.z, self.mixtures))
        log_share, mean, log_std = numbers.unbind(-3)
        mixture = Mixture(log_share.log_softmax(-1), mean, log_std.clamp(*LOG_STD))
        return mixture, as_float32(self.reward_head(hidden)), as_float32(self.end_head(hidden))


class LatentState(NamedTuple):
    """Latent state: z of the current image, and M's hidden and cell state after the previous step, all `[N, *]`."""

    z: Tensor
    hidden: Tensor
    cell: Tensor

    @property
    def feature(self) -> Tensor:
        """Return the features that C reads: `[N, Z + cells]`."""
        return torch.cat([self.z, self.hidden], -1)


class WorldModel(nn.Module):
    """V and M together: the world model that a policy acts with, and that dreams are generated from.

    Args:
        env: Spaces of the env.
        z: Size of z, Z.
        cells: Cells of M's LSTM.
        mixtures: Gaussians for each entry of z, K.
        end_weight: Loss weight of steps that end an episode, relative to all others.

    Raises:
        ConfigError: The observations are not pixels.
    """

    starts: Tensor  # [STARTS, C, H, W]: first images of episodes; zeros until V and M are trained

    def __init__(self, env: EnvSpec, z: int, cells: int, mixtures: int, end_weight: float) -> None:
        super().__init__()
        space = env["observation"]
        if space["type"] != "box" or space["dtype"] != "uint8":
            raise ConfigError(
                f"WorldModels reads pixels, but the observations of {env['id']} are {space['type']} of {space['dtype']}"
            )
        self.actions, self.discrete = action_size(env), env["action"]["type"] == "discrete"
        self.vision = Vision(space["shape"], z)
        self.memory = Memory(z, self.actions, cells, mixtures)
        self.features, self.noise, self.end_weight = z + cells, 2 * z + 1, end_weight
        self.deter, self.stoch = 2 * cells, z  # sizes for `Carry`: M's hidden and cell state together, and z
        self.register_buffer("starts", torch.zeros(STARTS, *space["shape"], dtype=torch.uint8))

    def encode_action(self, action: Tensor) -> Tensor:
        """Return actions as M reads them: `[N, A]` in [-1, 1]; discrete ones `[N]` become one-hot."""
        return one_hot(action, self.actions).float() if self.discrete else action.clamp(-1, 1)

    def initial_state(self, observation: Tensor) -> LatentState:
        """Return the state at the first observation of an episode."""
        z, _ = self.vision.encode(observation)
        zeros = z.new_zeros(len(z), self.memory.cells)
        return LatentState(z, zeros, zeros)

    def step_memory(self, latent: LatentState, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return M's hidden and cell state after an action `[N, A]`."""
        return self.memory(self.memory.from_input(torch.cat([latent.z, action], -1)), latent.hidden, latent.cell)

    def observe(self, latent: LatentState, action: Tensor, observation: Tensor) -> LatentState:
        """Return the state after an action and the observation it led to, z being the mean of q(z | image).

        # Deviation: the paper samples z when acting, too.
        """
        z, _ = self.vision.encode(observation)
        return LatentState(z, *self.step_memory(latent, action))

    def imagine(
        self, latent: LatentState, action: Tensor, noise: Tensor, temperature: float
    ) -> tuple[LatentState, Tensor, Tensor]:
        """Return the state that M samples after an action, the reward, and whether the episode ends, both `[N, 1]`.

        Args:
            latent: States `[N, *]` before the action.
            action: Actions `[N, A]`.
            noise: Standard normal values `[N, 2 Z + 1]`, the only source of randomness.
            temperature: Sampling temperature tau of mixture weights, Gaussians and end of episode.

        # Deviation: the end is sampled too, with `end_weight` taken out of its probability again; in the published code
        an episode ends where the logit is above 0.
        """
        hidden, cell = self.step_memory(latent, action)
        mixture, reward, logit = self.memory.predict(hidden)
        terminated = torch.special.ndtr(noise[:, -1:]) < ((logit - math.log(self.end_weight)) / temperature).sigmoid()
        return LatentState(mixture.sample(noise[:, :-1], temperature), hidden, cell), reward, terminated

    def decode(self, latent: LatentState) -> Tensor:
        """Return the decoded images `[N, C, H, W]`, from 0 to 255."""
        return 255 * self.vision.decode(latent.z)


class Controllers(nn.Module):
    """C: linear policies `a = W [z, h] + b`, one for each of the P weight vectors `[P, (F + 1) A]` of a call.

    The buffer `best` holds the weights that act in evaluation: the mean of the search distribution of CMA-ES.

    Args:
        num_features: Number of features that are read, F; those of z come first.
        env: Spaces of the env.
    """

    best: Tensor  # [(F + 1) A]

    def __init__(self, num_features: int, env: EnvSpec) -> None:
        super().__init__()
        self.num_features, self.actions = num_features, action_size(env)
        self.discrete = env["action"]["type"] == "discrete"
        self.size = (num_features + 1) * self.actions
        self.register_buffer("best", torch.zeros(self.size))

    def forward(self, weights: Tensor, feature: Tensor) -> Tensor:
        """Return the actions of P controllers: `[P, n], [P, R, *] -> [P, R, A]` in [-1, 1], or `[P, R]` if discrete."""
        weight, bias = weights.unflatten(-1, (self.num_features + 1, self.actions)).tensor_split([self.num_features], 1)
        output = torch.baddbmm(bias, feature[..., : self.num_features], weight)
        return output.argmax(-1) if self.discrete else output.tanh()


class Trials:
    """Assignment of controllers to envs. A trial is one episode that one controller plays.

    Args:
        num_envs: Number of envs N.
    """

    def __init__(self, num_envs: int) -> None:
        self.weights: Tensor | None = None  # [P, n], of the controllers; None: actions are random
        self.queue: list[int] = []  # controller of each trial; empty: all controllers in turn, without end
        self.next = 0  # index of the next trial
        self.trial = [-1] * num_envs  # index of each env's trial; -1: no trial

    def begin(self, weights: Tensor | None, queue: list[int]) -> None:
        """Replace all trials; episodes that are not finished belong to no trial."""
        self.weights, self.queue, self.next, self.trial = weights, queue, 0, [-1] * len(self.trial)

    def assign_next(self, is_first: Tensor) -> None:
        """Assign the next trial to each env that starts an episode, `[N]`."""
        for env in is_first.nonzero().flatten().tolist():
            available = not self.queue or self.next < len(self.queue)
            self.trial[env] = self.next if available else -1
            self.next += available

    def current_weights(self) -> Tensor:
        """Return the weights `[N, n]` of each env's controller; an env without a trial gets the one of trial 0."""
        assert self.weights is not None
        trials = [max(0, trial) for trial in self.trial]
        return self.weights[[self.queue[trial] if self.queue else trial % len(self.weights) for trial in trials]]

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": self.weights, "queue": self.queue, "next": self.next, "trial": list(self.trial)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights, self.queue = state["numbers"], list(state["queue"])
        self.next, self.trial = state["next"], list(state["trial"])


class Player(nn.Module):
    """Policy for training and evaluation, `[N, *S], [N, 1] -> [N, *A]`: V, M and C, or random actions.

    Args:
        model: V and M.
        controllers: C; without `trials`, its `best` acts.
        carry: Latent state and action of the last step of each env.
        trials: Assignment of other controllers; the indices of the trials `[N, 1]` are then returned too.
    """

    def __init__(self, model: WorldModel, controllers: Controllers, carry: Carry, trials: Trials | None = None) -> None:
        super().__init__()
        self.model, self.controllers, self.carry, self.trials = model, controllers, carry, trials

    def forward(self, observation: Tensor, is_first: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        carry = self.carry
        carry.begin(is_first)
        if self.trials is None or self.trials.weights is not None:
            before = LatentState(carry.stoch, *carry.deter.chunk(2, -1))
            carry.deter = torch.cat(self.model.step_memory(before, carry.action), -1) * ~is_first
            carry.stoch, _ = self.model.vision.encode(observation)
        if self.trials is None:
            action = self.controller_action(self.controllers.best.expand(is_first.shape[0], -1))
        else:
            self.trials.assign_next(is_first.squeeze(-1))
            at_random = self.trials.weights is None
            action = (
                self.random_action(is_first)
                if at_random
                else self.controller_action(self.trials.current_weights().to(is_first.device))
            )
        carry.action = self.model.encode_action(action)
        return action if self.trials is None else (action, torch.tensor(self.trials.trial).unsqueeze(-1))

    def controller_action(self, weights: Tensor) -> Tensor:
        """Return the action of each env's controller, `[N, n] -> [N, *A]`."""
        latent = LatentState(self.carry.stoch, *self.carry.deter.chunk(2, -1))
        return self.controllers(weights, latent.feature.unsqueeze(1)).squeeze(1)

    def random_action(self, is_first: Tensor) -> Tensor:
        """Return random actions correlated in time, as independent ones would average out and hardly move.

        An episode starts with a uniform action. Then continuous actions follow a random walk, and discrete ones are
        resampled with probability `RESAMPLE_PROBABILITY`.
        """
        if self.model.discrete:
            new = torch.randint(self.model.actions, (len(is_first),), device=is_first.device)
            changes = is_first.squeeze(-1) | (torch.rand(len(is_first), device=is_first.device) < RESAMPLE_PROBABILITY)
            return torch.where(changes, new, self.carry.action.argmax(-1))
        before = torch.where(is_first, torch.rand_like(self.carry.action) * 2 - 1, self.carry.action)
        return (before + RANDOM_WALK_STD * torch.randn_like(before)).clamp(-1, 1)
