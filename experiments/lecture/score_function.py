"""Score-function gradient of a small MDP against its exact gradient, and the expectation of the score."""

import torch
from experiments.lecture.drawing import HERE, INK, panels, read, save
from experiments.study import write_table
from torch import Tensor
from torch.distributions import Categorical

from levin.estimators import ScoreFunction, StochasticGraph

NAME = "score_function"
STATES, ACTIONS, STEPS, GAMMA = 4, 2, 5, 0.9
COUNTS, REPETITIONS = tuple(4**k for k in range(2, 9)), 10  # trajectories of one estimate


def make_mdp() -> tuple[Tensor, Tensor, Tensor]:
    """Return P[s, a, s'], r[s, a] and the policy's logits theta[s, a]: random, but the same in every call."""
    generator = torch.Generator().manual_seed(0)
    transition = torch.rand(STATES, ACTIONS, STATES, generator=generator).double().square()
    reward = torch.randn(STATES, ACTIONS, generator=generator).double()
    logits = torch.randn(STATES, ACTIONS, generator=generator).double()
    return transition / transition.sum(-1, keepdim=True), reward, logits.requires_grad_()


def exact_objective(transition: Tensor, reward: Tensor, logits: Tensor) -> Tensor:
    """Return J by dynamic programming; the first state is 0."""
    value = torch.zeros(STATES, dtype=torch.float64)
    for _ in range(STEPS):
        value = (logits.softmax(-1) * (reward + GAMMA * transition @ value)).sum(-1)
    return value[0]


def sampled_objective(transition: Tensor, reward: Tensor, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return a surrogate of J from `count` trajectories, and the mean of sum_t log pi(a_t|s_t).

    The transitions are sampled outside of autograd: their derivative is not needed.
    """
    graph, state, score = StochasticGraph(), torch.zeros(count, dtype=torch.long), torch.zeros(())
    for t in range(STEPS):
        policy = Categorical(logits=logits[state])
        action = graph.sample(f"a{t}", policy, ScoreFunction())
        score = score + policy.log_prob(action).mean()
        graph.cost(f"r{t}", GAMMA**t * reward[state, action])
        state = transition[state, action].multinomial(1).squeeze(1)
    return graph.surrogate(causal=False).mean(), score  # not causal: every action is weighted by the whole return


def measure() -> None:
    """Write score_function.csv: every component of the gradient, estimated and exact, and of the mean score."""
    torch.manual_seed(0)
    transition, reward, logits = make_mdp()
    (exact,) = torch.autograd.grad(exact_objective(transition, reward, logits), logits)
    rows = []
    for count in COUNTS:
        for repetition in range(REPETITIONS):
            surrogate, score = sampled_objective(transition, reward, logits, count)
            (estimate,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
            (mean_score,) = torch.autograd.grad(score, logits)
            for index, numbers in enumerate(
                zip(exact.flatten(), estimate.flatten(), mean_score.flatten(), strict=True)
            ):
                rows.append([count, repetition, index, *(f"{float(number):.6f}" for number in numbers)])
    write_table(HERE / f"{NAME}.csv", ["trajectories", "repetition", "component", "exact", "estimate", "score"], rows)


def draw() -> None:
    """Draw estimates against the exact gradient, and the errors against the number of trajectories."""
    rows = read(NAME)
    table = torch.tensor([[float(row[key]) for key in ("exact", "estimate", "score")] for row in rows])
    exact, estimate, score = table.view(len(COUNTS), REPETITIONS, -1, 3).unbind(-1)  # [counts, repetitions, 8]
    error = (estimate - exact).square().sum(-1).mean(-1).sqrt() / exact[0, 0].norm()
    norm = score.square().sum(-1).mean(-1).sqrt()
    figure, (left, right) = panels(2)
    for index, count in ((1, COUNTS[1]), (-1, COUNTS[-1])):
        left.plot(exact[index].flatten(), estimate[index].flatten(), ".", label=f"{count:,} trajectories")
    ends = [float(exact.min()), float(exact.max())]
    left.plot(ends, ends, color=INK, linewidth=1)
    left.set(xlabel="exact gradient", ylabel="score-function estimate", title="8 components, 10 estimates each")
    left.legend()
    right.plot(COUNTS, error, "o-", label=r"error of $\nabla J$, relative to its norm")
    right.plot(COUNTS, norm, "s-", label=r"norm of the mean of $\sum_t \nabla \log \pi$")
    right.plot(COUNTS, error[0] * (COUNTS[0] / torch.tensor(COUNTS)).sqrt(), ":", color=INK, label=r"$1 / \sqrt{N}$")
    right.set(xscale="log", yscale="log", xlabel="trajectories $N$", title="errors", ylim=(5e-4, 2))
    right.legend(loc="lower left", fontsize=9)
    save(figure, NAME)
