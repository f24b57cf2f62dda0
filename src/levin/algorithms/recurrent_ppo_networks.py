"""Networks of recurrent PPO: the memory, the policy that carries it from step to step, and the layout of sequences."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from levin.data.replay import to_device

MemoryKind = Literal["lstm", "gru"]


class Memory(nn.Module):
    """One layer of LSTM or GRU, for one step or for whole sequences.

    The state is `[*, D]`: hidden and cell state of an LSTM joined, D = 2 H; the hidden state of a GRU, D = H. Weights
    begin orthogonal and biases at zero (Huang et al. 2022). It is computed in float32 also in mixed precision.

    Args:
        kind: `lstm` or `gru`.
        num_features: Size F of the input.
        size: Units H.
    """

    def __init__(self, kind: MemoryKind, num_features: int, size: int) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        self.state_size = 2 * size if kind == "lstm" else size
        gates = 4 * size if kind == "lstm" else 3 * size
        # In the order of cuDNN, which else copies them in each call once `flatten_parameters` has joined them.
        self.input_weight = nn.Parameter(nn.init.orthogonal_(torch.empty(gates, num_features)))
        self.hidden_weight = nn.Parameter(nn.init.orthogonal_(torch.empty(gates, size)))
        self.input_bias, self.hidden_bias = (nn.Parameter(torch.zeros(gates)) for _ in range(2))

    @property
    def weights(self) -> list[Tensor]:
        """Weights in the order in which PyTorch's functions take them."""
        return [self.input_weight, self.hidden_weight, self.input_bias, self.hidden_bias]

    def step(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the next state after one step: `[N, F], [N, D] -> [N, H], [N, D]`."""
        if self.kind == "gru":
            hidden = torch.gru_cell(features, state, *self.weights)
            return hidden, hidden
        hidden, cell = torch.lstm_cell(features, list(state.chunk(2, -1)), *self.weights)
        return hidden, torch.cat([hidden, cell], -1)

    def forward(self, features: Tensor, state: Tensor) -> Tensor:
        """Return the outputs of sequences, by one fused kernel: `[L, S, F], [S, D] -> [L, S, H]`."""
        options = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "train": self.training}
        options |= {"bidirectional": False, "batch_first": False}
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self.kind == "gru":
                return torch.gru(features, state.unsqueeze(0), self.weights, **options)[0]
            parts = [part.unsqueeze(0).contiguous() for part in state.chunk(2, -1)]  # [S, 2 H] -> 2 x [1, S, H]
            return torch.lstm(features, parts, self.weights, **options)[0]


class Carry(nn.Module):
    """State of the memories of each env after its last step, `[N, D]`. Saved with the algorithm."""

    state: Tensor

    def __init__(self, num_envs: int, size: int) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(num_envs, size))

    def begin(self, is_first: Tensor) -> Tensor:
        """Return the state before a step `[N, D]`: zero where an episode begins, and everywhere if N has changed."""
        if self.state.shape[0] != is_first.shape[0]:  # `len` would fix the batch size in an exported policy
            return self.state.new_zeros(is_first.shape[0], self.state.shape[1], device=is_first.device)
        return self.state * ~is_first


class RecurrentPolicy(nn.Module):
    """Policy with a memory: `[N, *S]` and `is_first` `[N, 1]` to actions `[N, *A]`.

    Args:
        normalizer: Normaliser of observations.
        trunk: Network from observations to features.
        memories: Memory that the actor reads, and others whose states are stored with the rollout.
        actor: Network from the output of the first memory to the distribution of actions.
        carry: State of all memories.
        deterministic: Whether to take the mode of the distribution and to return the action alone, without the state of
            the memories before the step, `[N, D]`.
    """

    def __init__(
        self,
        normalizer: nn.Module,
        trunk: nn.Module,
        memories: Sequence[Memory],
        actor: nn.Module,
        carry: Carry,
        *,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.normalizer, self.trunk, self.memories = normalizer, trunk, nn.ModuleList(memories)
        self.actor, self.carry, self.deterministic = actor, carry, deterministic
        self.sizes = [memory.state_size for memory in memories]

    def forward(self, observation: Tensor, is_first: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        before = self.carry.begin(is_first)
        features = self.trunk(self.normalizer(observation))
        states = zip(self.memories, before.split(self.sizes, -1), strict=True)
        steps = [memory.step(features, state) for memory, state in states]  # type: ignore[operator]
        self.carry.state = torch.cat([state for _, state in steps], -1)
        distribution = self.actor(steps[0][0])
        return distribution.mode if self.deterministic else (distribution.sample(), before)


class Segments:
    """Layout of K sequences of T steps for a kernel that knows no ends of episodes: split there, and padded.

    A segment begins where a sequence or an episode does. All S segments are padded to the length L of the longest. The
    padding is never read: the outputs of the B = K T steps are picked from it. The layout is computed on the CPU, so
    that the update does not wait for the device.

    Args:
        done: End flags of the sequences, `[K, T]`, on the CPU.
        device: Device of the data.
        lookahead: Whether each segment is followed by one more step, for the observation after its last. The data then
            have B + S steps.

    Attributes:
        last: Index of the last step of each segment, `[S]`.
    """

    def __init__(self, done: Tensor, device: torch.device, *, lookahead: bool = False) -> None:
        begins = torch.ones_like(done)
        begins[:, 1:] = done[:, :-1]
        first = begins.flatten().nonzero().squeeze(-1)  # [S]
        self.num = len(first)
        lengths = torch.diff(first, append=torch.tensor([done.numel()]))  # [S]
        segment = torch.arange(self.num).repeat_interleave(lengths)  # [B]
        step = torch.arange(done.numel()) - first[segment]  # [B]
        if lookahead:
            segment, step = torch.cat([segment, torch.arange(self.num)]), torch.cat([step, lengths])  # [B + S]
        self.length = int(step.max()) + 1
        self.place = to_device(step * self.num + segment, device)  # [B] or [B + S]: index into the padded [L S]
        self.last = to_device(first + lengths - 1, device)
        self.sequence = to_device(first.div(done.shape[1], rounding_mode="floor"), device)  # [S]
        begins = first % done.shape[1] == 0
        self.continues = to_device(begins.unsqueeze(-1), device)  # [S, 1]: begins with its sequence

    def initial(self, state: Tensor) -> Tensor:
        """Return the state before each segment `[S, D]`: that of its sequence, `[K, D]`, or 0 if it begins later."""
        return state[self.sequence] * self.continues

    def pad(self, steps: Tensor) -> Tensor:
        """Lay out steps `[B, F]` as segments `[L, S, F]`."""
        padded = steps.new_zeros(self.length * self.num, steps.shape[1]).index_copy_(0, self.place, steps)
        return padded.view(self.length, self.num, -1)

    def pick(self, padded: Tensor) -> Tensor:
        """Return the steps `[B, F]` of segments `[L, S, F]`."""
        return padded.flatten(0, 1).index_select(0, self.place)
