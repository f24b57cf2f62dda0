"""Classic control of gymnasium as batched TorchRL envs: N copies are stepped as tensors, on any device.

A step and a reset are tensor operations only, without a wait for the device, and `torch.compile` captures them whole.
On the CPU, all numbers equal those of gymnasium 1.4 bit for bit, but for two roundings that `Acrobot` describes. On a
GPU, cosines and sines are those of CUDA, which can differ in the last bit of a float64.

`BatchedEnv` holds the state and draws the episodes. A subclass is one env: `initial`, `dynamics` and `observe`.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase


class BatchedEnv(EnvBase):
    """Batch of N independent copies of one env. Time limits are not part of it.

    Its buffers are all there is to save: `state_dict` and `load_state_dict` restore an env exactly, with the episodes
    that it will begin.

    - `state` `[N, S]`: state of each env, float64.
    - `episode` `[N]`: number of each env's current episode, from 0; -1 before the first reset.
    - `seed` `[]`: the seed from which all episodes are drawn.

    A reset draws the initial state from the seed, the number of the env and the number of the episode, and from nothing
    else. So the episodes of an env do not depend on N, on the other envs or on the device; `initial_states` returns
    the initial state of any of them. `set_seed` begins again with episode 0.

    Args:
        num_envs: Number of envs N.
        device: Device of all tensors; None: the CPU.
    """

    seeds_episodes: ClassVar[bool] = True  # resets draw from the seed, the number of the env and of the episode

    variables: ClassVar[int]  # S, size of the state
    draws: ClassVar[int]  # K, uniform random numbers for an initial state
    actions: ClassVar[int | None] = None  # number of discrete actions; None: one continuous action
    action_bound: ClassVar[float] = 1.0  # continuous actions are in [-bound, bound]
    low: ClassVar[tuple[float, ...]]  # bounds of the observation
    high: ClassVar[tuple[float, ...]]

    state: Tensor
    episode: Tensor
    seed: Tensor

    def __init__(self, *, num_envs: int = 1, device: torch.device | str | None = None) -> None:
        super().__init__(device=device or "cpu", batch_size=torch.Size([num_envs]))
        self.num_envs = num_envs
        self.register_buffer("state", torch.zeros(num_envs, self.variables, dtype=torch.float64, device=self.device))
        self.register_buffer("episode", torch.full((num_envs,), -1, device=self.device))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64, device=self.device))
        flag = Categorical(2, shape=torch.Size([num_envs, 1]), dtype=torch.bool, device=self.device)
        self.observation_spec = Composite(observation=self._observation_spec(), shape=self.batch_size)
        self.action_spec = self._action_spec()
        self.reward_spec = Unbounded(torch.Size([num_envs, 1]), device=self.device)
        self.full_done_spec = Composite(done=flag, terminated=flag.clone(), shape=self.batch_size)

    def _observation_spec(self) -> Bounded | Unbounded:
        shape = torch.Size([self.num_envs, len(self.high)])
        if math.inf in self.high:
            return Unbounded(shape, device=self.device)
        low, high = (torch.tensor(bound, device=self.device).expand(shape) for bound in (self.low, self.high))
        return Bounded(low, high, shape, device=self.device)

    def _action_spec(self) -> Bounded | Categorical:
        if self.actions is not None:
            return Categorical(self.actions, shape=self.batch_size, device=self.device)
        shape = torch.Size([self.num_envs, 1])
        return Bounded(-self.action_bound, self.action_bound, shape, device=self.device)

    @abstractmethod
    def initial(self, uniform: Tensor) -> Tensor:
        """Return initial states `[*, S]` for uniform random numbers `[*, K]` in [0, 1)."""

    @abstractmethod
    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the state after an action, the reward and whether the episode terminates.

        Args:
            state: States `[N, S]`.
            action: Discrete actions, int64 `[N]`, or continuous ones, float32 `[N, 1]`, which may be out of bounds.

        Returns:
            `[N, S]`, `[N]` in float32 or float64, and `[N]`.
        """

    @abstractmethod
    def observe(self, state: Tensor) -> Tensor:
        """Return the observations of states `[N, S]`, float32 `[N, O]`."""

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        state, reward, terminated = self.dynamics(self.state, tensordict.get("action").detach())
        self.state.copy_(state)
        terminated = terminated.unsqueeze(-1)
        after = {
            "observation": self.observe(self.state),
            "reward": reward.to(torch.float32).unsqueeze(-1),
            "done": terminated,
            "terminated": terminated.clone(),
        }
        return TensorDict(after, batch_size=self.batch_size, device=self.device)

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)  # [N, 1]
        self.episode.add_(1 if mask is None else mask.reshape(self.num_envs))
        state = self.initial_states(torch.arange(self.num_envs, device=self.state.device), self.episode)
        self.state.copy_(state if mask is None else torch.where(mask.reshape(self.num_envs, 1), state, self.state))
        done = torch.zeros(self.num_envs, 1, dtype=torch.bool, device=self.state.device)
        first = {"observation": self.observe(self.state), "done": done, "terminated": done.clone()}
        return TensorDict(first, batch_size=self.batch_size, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        """Begin again with episode 0 of a seed (None: of the present one)."""
        if seed is not None:
            self.seed.fill_((seed + 2**63) % 2**64 - 2**63)  # 64 bits, as int64
        self.episode.fill_(-1)

    def initial_states(self, env: Tensor | int, episode: Tensor | int) -> Tensor:
        """Return the initial states `[*, S]` of episodes, whose envs and numbers `[*]` may be any, beyond N as well."""
        env, episode = (torch.as_tensor(number, device=self.state.device) for number in (env, episode))
        return self.initial(uniforms(self.seed, env, episode, self.draws))


class CartPole(BatchedEnv):
    """CartPole-v1 (Barto, Sutton and Anderson, 1983). State and observation: x, velocity, angle, angular velocity.

    A step after the end of an episode is rewarded with 1, where gymnasium gives 0 and a warning.
    """

    variables, draws, actions = 4, 4, 2
    low, high = (-math.inf,) * 4, (math.inf,) * 4

    force, gravity, time_step = 10.0, 9.8, 0.02
    pole_mass, total_mass, half_length = 0.1, 0.1 + 1.0, 0.5
    max_position, max_angle = 2.4, 12 * 2 * math.pi / 360

    def initial(self, uniform: Tensor) -> Tensor:
        return -0.05 + (0.05 - -0.05) * uniform

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, velocity, angle, angular_velocity = state.unbind(-1)
        force = action.double() * (2 * self.force) - self.force
        cos, sin = cos_and_sin(angle)
        moment = self.pole_mass * self.half_length
        push = (force + moment * angular_velocity.square() * sin) / self.total_mass
        angular_acceleration = (self.gravity * sin - cos * push) / (
            self.half_length * (4.0 / 3.0 - self.pole_mass * cos.square() / self.total_mass)
        )
        acceleration = push - moment * angular_acceleration * cos / self.total_mass
        change = torch.stack([velocity, acceleration, angular_velocity, angular_acceleration], dim=-1)
        state = state + self.time_step * change
        terminated = (state[:, 0].abs() > self.max_position) | (state[:, 2].abs() > self.max_angle)
        return state, torch.ones_like(push, dtype=torch.float32), terminated

    def observe(self, state: Tensor) -> Tensor:
        return state.to(torch.float32)


class Pendulum(BatchedEnv):
    """Pendulum-v1, a pendulum that swings up with a limited torque. State: angle (0: upright) and angular velocity.

    Episodes don't terminate.
    """

    variables, draws, action_bound = 2, 2, 2.0
    low, high = (-1.0, -1.0, -8.0), (1.0, 1.0, 8.0)

    max_speed, gravity, time_step = 8.0, 10.0, 0.05

    def initial(self, uniform: Tensor) -> Tensor:
        angle, velocity = uniform.unbind(-1)
        return torch.stack([2 * math.pi * angle - math.pi, 2.0 * velocity - 1.0], dim=-1)

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle, velocity = state.unbind(-1)
        torque = action.squeeze(-1).clamp(-self.action_bound, self.action_bound)  # float32, as in gymnasium
        turn = torch.fmod(angle + math.pi, 2 * math.pi)
        turn = torch.where(turn < 0, turn + 2 * math.pi, turn) - math.pi  # the angle in [-pi, pi)
        cost = turn.square() + 0.1 * velocity.square() + 0.001 * torque.square()
        acceleration = 3 * self.gravity / 2 * cos_and_sin(angle)[1] + 3.0 * torque
        velocity = (velocity + acceleration * self.time_step).clamp(-self.max_speed, self.max_speed)
        state = torch.stack([angle + velocity * self.time_step, velocity], dim=-1)
        return state, -cost, torch.zeros_like(cost, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:
        angle, velocity = state.unbind(-1)
        return torch.stack([*cos_and_sin(angle), velocity], dim=-1).to(torch.float32)


class Acrobot(BatchedEnv):
    """Acrobot-v1 (Sutton, 1996), with the equations of the book. State: two angles and their velocities.

    Two roundings differ from gymnasium's. Its `x**2` is `pow` of the C library, whose last bit is not that of `x * x`
    in one of 1,200 cases: the float64 state differs after one of 800 steps, and as the system is chaotic, trajectories
    have drifted apart some hundred steps later. (In Pendulum, squares are only in the reward.) And the cosines and
    sines of the observation after a reset are taken in float32 there, in float64 here.
    """

    variables, draws, actions = 4, 4, 3
    low = (-1.0, -1.0, -1.0, -1.0, -4 * math.pi, -9 * math.pi)
    high = (1.0, 1.0, 1.0, 1.0, 4 * math.pi, 9 * math.pi)

    mass, length, center, inertia = 1.0, 1.0, 0.5, 1.0  # of each of the two links; `center`: of its mass
    gravity, time_step = 9.8, 0.2
    max_velocities = (4 * math.pi, 9 * math.pi)

    def initial(self, uniform: Tensor) -> Tensor:
        return (-0.1 + (0.1 - -0.1) * uniform).to(torch.float32).double()  # gymnasium rounds them to float32

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torque = action.double() - 1.0
        step, half = self.time_step, self.time_step / 2.0
        k1 = self.derivative(state, torque)
        k2 = self.derivative(state + half * k1, torque)
        k3 = self.derivative(state + half * k2, torque)
        k4 = self.derivative(state + step * k3, torque)
        state = state + step / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = wrap_angle(state[:, :2])
        velocity, second_velocity = (
            state[:, 2 + i].clamp(-bound, bound) for i, bound in enumerate(self.max_velocities)
        )
        angle, second_angle = angles.unbind(-1)
        cos, _ = cos_and_sin(torch.stack([angle, second_angle + angle]))
        terminated = -cos[0] - cos[1] > 1.0
        state = torch.stack([angle, second_angle, velocity, second_velocity], dim=-1)
        return state, terminated.to(torch.float32) - 1.0, terminated

    def derivative(self, state: Tensor, torque: Tensor) -> Tensor:
        """Return the derivative `[N, 4]` of a state `[N, 4]` under torques `[N]`."""
        angle, second_angle, velocity, second_velocity = state.unbind(-1)
        m, l, c, i, g = self.mass, self.length, self.center, self.inertia, self.gravity  # noqa: E741
        right = math.pi / 2
        cos, sin = cos_and_sin(torch.stack([second_angle, angle + second_angle - right, angle - right]))
        sin = sin[0]
        d1 = m * c**2 + m * (l**2 + c**2 + 2 * l * c * cos[0]) + i + i
        d2 = m * (c**2 + l * c * cos[0]) + i
        phi2 = m * c * g * cos[1]
        phi1 = (
            -m * l * c * second_velocity.square() * sin
            - 2 * m * l * c * second_velocity * velocity * sin
            + (m * c + m * l) * g * cos[2]
            + phi2
        )
        second_acceleration = (torque + d2 / d1 * phi1 - m * l * c * velocity.square() * sin - phi2) / (
            m * c**2 + i - d2.square() / d1
        )
        acceleration = -(d2 * second_acceleration + phi1) / d1
        return torch.stack([velocity, second_velocity, acceleration, second_acceleration], dim=-1)

    def observe(self, state: Tensor) -> Tensor:
        cos, sin = cos_and_sin(state[:, :2])
        parts = [cos[:, 0], sin[:, 0], cos[:, 1], sin[:, 1], state[:, 2], state[:, 3]]
        return torch.stack(parts, dim=-1).to(torch.float32)


class MountainCarContinuous(BatchedEnv):
    """MountainCarContinuous-v0 (Moore, 1990). State: position, velocity, and 1 in the first step of an episode, else 0.

    The third entry is there because gymnasium takes the first step of an episode in float64, the others in float32.
    """

    variables, draws, action_bound = 3, 1, 1.0
    low, high = (-1.2, -0.07), (0.6, 0.07)

    power, gravity, goal = 0.0015, 0.0025, 0.45
    min_position, max_position, max_speed = -1.2, 0.6, 0.07

    def initial(self, uniform: Tensor) -> Tensor:
        position = -0.6 + (-0.4 - -0.6) * uniform
        return torch.cat([position, torch.zeros_like(position), torch.ones_like(position)], dim=-1)

    def dynamics(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        exact_position, old_velocity, is_first = state.unbind(-1)
        is_first = is_first > 0
        action = action.squeeze(-1)
        slope = torch.where(is_first, 3 * exact_position, (3 * exact_position.to(torch.float32)).double())
        pull = self.gravity * cos_and_sin(slope)[0]
        # Gymnasium's force is a float32 between the bounds, and a Python float where it replaces a larger action.
        change = (action * self.power - pull.to(torch.float32)).double()
        limit = action.double().clamp(-self.action_bound, self.action_bound) * self.power
        change = torch.where(action.abs() > self.action_bound, limit - pull, change)
        velocity = (old_velocity.to(torch.float32) + change.to(torch.float32)).clamp(-self.max_speed, self.max_speed)
        position = exact_position + torch.where(is_first, change, velocity.double())
        position = position.to(torch.float32).clamp(self.min_position, self.max_position)
        at_wall = (position == self.min_position) & (velocity < 0)
        velocity = velocity.masked_fill(at_wall, 0.0)
        terminated = (position >= self.goal) & (velocity >= 0)
        reward = torch.where(terminated, 100.0, 0.0) - action.double().square() * 0.1
        state = torch.stack([position, velocity, torch.zeros_like(position)], dim=-1).double()
        return state, reward, terminated

    def observe(self, state: Tensor) -> Tensor:
        return state[:, :2].to(torch.float32)


def cos_and_sin(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of float64 angles.

    On the CPU, `torch.polar` calls the C library, as NumPy and `math` do, eager and compiled. `torch.cos` is faster,
    but for one angle of 400 its last bit is another.
    """
    if angle.device.type != "cpu":
        return torch.cos(angle), torch.sin(angle)
    cos, sin = torch.view_as_real(torch.polar(torch.ones_like(angle), angle)).unbind(-1)
    return cos, sin


def wrap_angle(angle: Tensor) -> Tensor:
    """Return angles up to 9 pi in [-pi, pi], as gymnasium finds them: by adding or subtracting 2 pi until they are."""
    for _ in range(4):  # one step from the largest velocities can turn a link by as much
        angle = torch.where(angle.abs() > math.pi, angle - 2 * math.pi * angle.sign(), angle)
    return angle


MASK = 0xFFFFFFFF  # of a 32-bit word
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four random 32-bit words for each counter: Philox4x32-10 (Salmon et al., 2011, section 3.3).

    Integer operations on int64, whose products wrap: the words are the same on every device and when compiled.

    Args:
        counter: Four tensors of 32-bit words, int64, whose shapes can be broadcast.
        key: Two tensors `[]` of 32-bit words, int64.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    rounds = torch.arange(10, device=key[0].device)
    keys = [((word + weyl * rounds) & MASK).unbind() for word, weyl in zip(key, WEYL, strict=True)]
    for k0, k1 in zip(*keys, strict=True):
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0 = (second >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(MASK)
        c2 = (first >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(MASK)
        c1, c3 = second.bitwise_and_(MASK), first.bitwise_and_(MASK)
    return c0, c1, c2, c3


def uniforms(seed: Tensor, env: Tensor, episode: Tensor, count: int) -> Tensor:
    """Return uniform random numbers in [0, 1), float64 `[*, count]` with 53 random bits each.

    Args:
        seed: Seed, int64 `[]`.
        env: Numbers of envs below 2^32, int64 `[*]`.
        episode: Numbers of their episodes, int64 `[*]`.
        count: Random numbers for each env and episode.
    """
    env, episode = env.unsqueeze(-1), episode.unsqueeze(-1)
    block = torch.arange((count + 1) // 2, device=seed.device)  # each gives four words, for two numbers
    counter = (env & MASK, block, episode & MASK, (episode >> 32) & MASK)
    a, b, c, d = philox(counter, (seed & MASK, (seed >> 32) & MASK))
    bits = torch.stack([(a >> 5) << 26 | b >> 6, (c >> 5) << 26 | d >> 6], dim=-1)
    return bits.flatten(-2)[..., :count].double() * 2.0**-53
