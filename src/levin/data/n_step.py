"""n-step returns: find the transitions that follow a stored one in its episode."""

from typing import Any

import torch
from torch import Tensor


class NStep:
    """Windows of at most n successive transitions of an episode, which n-step returns are computed from.

    y = sum_{k<m} gamma^k r_{t+k} + gamma^m (1 - terminated) V(s_{t+m})

    m is n, or the number of steps to the end of the episode if that is less; a truncated episode bootstraps from its
    last observation. Windows are put together when they are sampled: they go on from one rollout to the next. The
    newest transitions of an open episode wait until their windows are complete.

    Source: Sutton 1988; same windows as TorchRL's `MultiStepTransform`, whose `terminated` is that of the first step.

    Args:
        size: Size of the replay buffer. The entry with number k lies at index k modulo `size`.
        n_step: Length n of a complete window, 2 or more.
        gamma: Discount factor.
    """

    def __init__(self, size: int, n_step: int, gamma: float) -> None:
        self.size, self.n_step, self.gamma = size, n_step, gamma
        # [size]: entries from a transition to the next one of its episode; 0: there is none
        self.ahead = torch.zeros(size, dtype=torch.int32)
        self.newest: Tensor | None = None  # [N]: the entry of each env's last transition
        self.open = torch.zeros(0, dtype=torch.bool)  # [N]: whether its episode goes on
        self.steps = 0  # transitions stored of each env

    @property
    def ready(self) -> bool:
        """Whether some window is complete."""
        return self.steps >= self.n_step

    def link(self, entry: Tensor, done: Tensor) -> None:
        """Note the entries `[N, T]` of a rollout that was stored in this order, and whether episodes end there."""
        if self.newest is None:
            self.newest, self.open = entry[:, 0], torch.zeros_like(done[:, 0])
            self.ahead = self.ahead.to(entry.device)
        ahead = torch.zeros_like(entry, dtype=torch.int32)
        ahead[:, :-1] = entry.diff() * ~done[:, :-1]
        self.ahead[self.newest % self.size] = ((entry[:, 0] - self.newest) * self.open).int()
        kept = slice(-self.size, None)  # of a rollout that does not fit
        self.ahead[entry.flatten()[kept] % self.size] = ahead.flatten()[kept]
        self.newest, self.open = entry[:, -1], ~done[:, -1]
        self.steps += entry.shape[1]

    def restart(self, envs: Tensor) -> None:
        """Mark envs, by a mask `[N]`, whose next transition does not continue the last stored one."""
        if self.newest is not None:
            self.open = self.open & ~envs.to(self.open.device)

    def follow(self, entry: Tensor) -> Tensor:
        """Return the entries of the windows `[num, n]` that begin with the entries `[num]`.

        The last entry of a window with less than n transitions is repeated.
        """
        window = [entry]
        for _ in range(1, self.n_step):
            window.append(window[-1] + self.ahead[window[-1] % self.size])
        return torch.stack(window, 1)

    def is_within(self, window: Tensor) -> Tensor:
        """Return a mask `[num, n]` of windows `[num, n]`: false where an entry is repeated."""
        return window.diff(dim=1, prepend=window[:, :1] - 1) > 0

    def is_complete(self, window: Tensor) -> Tensor:
        """Return `[num]`, whether the windows `[num, n]` have n transitions or end with their episode."""
        open_ends = torch.where(self.open, self.newest, -1)  # type: ignore[arg-type]
        return (window[:, -1] > window[:, -2]) | ~torch.isin(window[:, -1], open_ends)

    def discount(self, window: Tensor) -> Tensor:
        """Return gamma^m, `[num, 1]`, of windows `[num, n]`."""
        return self.gamma ** self.is_within(window).sum(1, keepdim=True).float()

    def sum_rewards(self, reward: Tensor) -> Tensor:
        """Return sum_{k<m} gamma^k r_{t+k}: rewards of windows, 0 beyond their ends, `[..., n] -> [..., 1]`."""
        return (reward * self.gamma ** torch.arange(self.n_step, device=reward.device)).sum(-1, keepdim=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the pointers and counters, as tensors and numbers."""
        return {"ahead": self.ahead, "newest": self.newest, "open": self.open, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the result of `state_dict`; `device` is that of the stored transitions."""
        self.ahead, self.newest, self.open = (state[key].to(device) for key in ("ahead", "newest", "open"))
        self.steps = state["steps"]
