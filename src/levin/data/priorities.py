"""Prioritized replay (Schaul et al. 2016, arXiv:1511.05952), on TorchRL's `PrioritizedSampler`."""

from typing import Any

import torch
import torchrl
from torchrl.data import PrioritizedSampler

from levin.core.errors import ConfigError


class Priorities(PrioritizedSampler):
    """TorchRL's prioritized sampler with an annealed beta, whose state can be saved as a tensor.

    P(i) = p_i^alpha / sum_j p_j^alpha,  p_i = |delta_i| + 1e-8      Eq. 1
    w_i = (N P(i))^-beta                                            Sec. 3.4

    New transitions get the highest priority so far (Algorithm 1).

    Args:
        size: Size of the replay buffer.
        alpha: Exponent of the priorities; 0 samples uniformly.
        beta: Exponent of the importance weights at the start.

    Raises:
        ConfigError: TorchRL's C++ extension, which has the trees of priorities, does not load.
    """

    def __init__(self, size: int, alpha: float, beta: float) -> None:
        try:
            super().__init__(size, alpha, beta, device="cpu")
        except RuntimeError as error:
            raise ConfigError(
                f"algo.replay=prioritized needs the C++ extension of TorchRL {torchrl.__version__}, which torch "
                f"{torch.__version__} can't load: install the torch that it was built for (torch 2.14.1 for TorchRL "
                "0.14.1), or set algo.replay=uniform"
            ) from error
        self.initial_beta = beta

    def anneal(self, remaining: float) -> None:
        """Set beta, which rises linearly from its initial value to 1; `remaining` falls from 1 to 0."""
        self.beta = 1 - remaining * (1 - self.initial_beta)

    def state_dict(self) -> dict[str, Any]:
        """Return p_i^alpha of every index (0: nothing is stored there) and the highest priority so far."""
        raised = torch.as_tensor(self._sum_tree[torch.arange(self.max_size)])
        return {"raised": raised, "highest": float(self.default_priority)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        stored = state["raised"].nonzero().squeeze(1)
        for tree in (self._sum_tree, self._min_tree):
            tree[stored] = state["raised"][stored]
        self._max_priority = (torch.tensor(state["highest"]), None)  # type: ignore[assignment]
