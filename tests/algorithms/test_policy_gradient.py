"""Exact means and variances of policy gradients: losses of the algorithms on every trajectory of a small MDP.

The MDP has three states, two actions, four steps and random transitions: 512 trajectories with known probabilities, in
float64. Observations contain the state and the time, because values depend on the time in a finite horizon.
"""

from functools import cache

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Categorical

from levin.algorithms.a2c import A2C
from levin.algorithms.actor_critic import ActorCritic
from levin.algorithms.reinforce import REINFORCE
from levin.estimators import LeaveOneOut, ScoreFunction, StochasticGraph

STATES, ACTIONS, STEPS, GAMMA = 3, 2, 4, 0.8
START = torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64)
# P[s, a, s'], in multiples of 1/4, so that four transitions can represent the distribution
TRANSITION = torch.tensor(
    [
        [[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]],
        [[0.5, 0.0, 0.5], [0.75, 0.25, 0.0]],
        [[0.0, 0.25, 0.75], [0.25, 0.0, 0.75]],
    ],
    dtype=torch.float64,
)
REWARD = torch.tensor(  # r[s, a, s']
    [
        [[2.0, 1.0, 0.0], [0.0, 3.0, 1.5]],
        [[2.0, 0.0, 1.0], [1.5, 1.0, 0.0]],
        [[0.0, 1.0, 2.0], [3.0, 0.0, 0.5]],
    ],
    dtype=torch.float64,
)
ENV = {
    "id": "three states",
    "num_envs": 1,
    "observation": {
        "type": "box",
        "shape": [STATES + STEPS + 1],
        "dtype": "float32",
        "low": [],
        "high": [],
        "n": 0,
        "start": 0,
    },
    "action": {"type": "discrete", "shape": [], "dtype": "int64", "low": [], "high": [], "n": ACTIONS, "start": 0},
    "action_units": "none",
    "action_repeat": 1,
    "observation_clip": None,
    "reward_clip": None,
}
THEORY = {"gamma": GAMMA, "discount_state_weighting": True, "normalize_advantage": False, "hidden_sizes": (5,)}
EPISODES, ONE_EPISODE = {"average_over": "episodes"}, {"episodes_per_update": 1}


def observation(state: Tensor, time: Tensor) -> Tensor:
    """Return one-hot observations of state and time: `[...] -> [..., STATES + STEPS + 1]`."""
    one_hot = nn.functional.one_hot
    return torch.cat([one_hot(state, STATES), one_hot(time, STEPS + 1)], -1).double()


def every_state() -> Tensor:
    """Return the observations of every time and state: `[STEPS + 1, STATES, *]`."""
    time, state = torch.meshgrid(torch.arange(STEPS + 1), torch.arange(STATES), indexing="ij")
    return observation(state, time)


class Table(nn.Module):
    """Tabular critic with a value for every state and time: `[B, F] -> [B, outputs]`."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())  # [STEPS + 1, STATES, outputs]

    def forward(self, features: Tensor) -> Tensor:
        state, time = features.split([STATES, STEPS + 1], -1)
        return self.values[time.argmax(-1), state.argmax(-1)]


@cache
def trajectories() -> tuple[Tensor, Tensor]:
    """Return the states `[512, STEPS + 1]` and actions `[512, STEPS]` of all trajectories with nonzero probability."""
    paths = [([int(s)], []) for s in START.nonzero()]
    for _ in range(STEPS):
        paths = [
            ([*states, int(after)], [*actions, action])
            for states, actions in paths
            for action in range(ACTIONS)
            for after in TRANSITION[states[-1], action].nonzero()
        ]
    states, actions = zip(*paths, strict=True)
    return torch.tensor(states), torch.tensor(actions)


def log_policy(algorithm) -> Tensor:
    """Return log pi(a|s) for every time and state: `[STEPS + 1, STATES, ACTIONS]`."""
    return algorithm.actor(every_state().flatten(0, 1)).log_probs.view(STEPS + 1, STATES, ACTIONS)


def log_probability(algorithm) -> tuple[Tensor, Tensor]:
    """Return the policy's and the dynamics' part of log p(tau) of every trajectory: `[512]` each."""
    states, actions = trajectories()
    time = torch.arange(STEPS).expand_as(actions)
    policy = log_policy(algorithm)[time, states[:, :-1], actions].sum(1)
    world = START[states[:, 0]].log() + TRANSITION[states[:, :-1], actions, states[:, 1:]].log().sum(1)
    return policy, world


def rewards() -> Tensor:
    """Return the rewards of every trajectory: `[512, STEPS]`."""
    states, actions = trajectories()
    return REWARD[states[:, :-1], actions, states[:, 1:]]


def returns() -> Tensor:
    """Return R = sum_t gamma^t r_{t+1} of every trajectory: `[512]`."""
    return (rewards() * GAMMA ** torch.arange(STEPS).double()).sum(1)


def exact_values(algorithm) -> tuple[Tensor, Tensor]:
    """Return V^pi `[STEPS + 1, STATES, 1]` and Q^pi `[STEPS + 1, STATES, ACTIONS]`, by dynamic programming."""
    policy = log_policy(algorithm).exp().detach()
    value, q = torch.zeros(STEPS + 1, STATES, dtype=torch.float64), torch.zeros_like(policy)
    for time in reversed(range(STEPS)):
        q[time] = (TRANSITION * (REWARD + GAMMA * value[time + 1])).sum(-1)
        value[time] = (policy[time] * q[time]).sum(-1)
    return value.unsqueeze(-1), q


def rollout(i: int) -> TensorDict:
    """Return trajectory i as a rollout `[1, STEPS]`."""
    return _cached_rollout(i).clone(False)


@cache
def _cached_rollout(i: int) -> TensorDict:
    states, actions = (each[i : i + 1] for each in trajectories())
    time = torch.arange(STEPS).unsqueeze(0)
    done = (time == STEPS - 1).unsqueeze(-1)
    after = {"observation": observation(states[:, 1:], time + 1), "reward": rewards()[i : i + 1].unsqueeze(-1)}
    after |= {"terminated": done, "truncated": torch.zeros_like(done), "done": done}
    content = {"observation": observation(states[:, :-1], time), "action": actions, "step_count": time.unsqueeze(-1)}
    return TensorDict({**content, "next": after}, batch_size=(1, STEPS))


def make_algorithm(kind, **options):
    """Build an algorithm in float64 with a non-uniform policy and, if it has a critic, exact values."""
    torch.manual_seed(0)
    algorithm = kind(env=ENV, **options).double()
    for layer in algorithm.actor.network:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.7)
    value, q = exact_values(algorithm)
    if getattr(algorithm, "critic", None) is not None:
        algorithm.critic = Table(q if options.get("critic") == "q" else value)
    return algorithm


def gradient(algorithm, objective: Tensor, **options) -> Tensor:
    """Return the gradient of an objective with respect to the actor's parameters: `[P]`."""
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(objective, list(algorithm.actor.parameters()), **options)]
    )


def loss(algorithm, data: TensorDict) -> Tensor:
    """Return the actor loss of one trajectory, computed by the algorithm."""
    if isinstance(algorithm, A2C):
        return algorithm.losses(data, algorithm.last_value(data))[0] * STEPS  # A2C averages over the four transitions
    if isinstance(algorithm, ActorCritic):
        data = data.flatten(0, 1)
    return algorithm.actor_loss(data, algorithm.weight(data))[0]


def moments(algorithm) -> tuple[Tensor, float]:
    """Return the exact mean `[P]` and total variance of the estimator -grad loss of one trajectory."""
    probability = sum(log_probability(algorithm)).exp().detach()
    each = torch.stack([-gradient(algorithm, loss(algorithm, rollout(i))) for i in range(len(probability))])
    mean = probability @ each
    return mean, float(probability @ (each - mean).square().sum(1))


FORMS = {
    "simple": lambda **o: make_algorithm(REINFORCE, advantage="return", **THEORY | EPISODES | o),
    "reward-to-go": lambda **o: make_algorithm(REINFORCE, advantage="reward_to_go", **THEORY | EPISODES | o),
    "value baseline": lambda **o: make_algorithm(REINFORCE, advantage="baseline", **THEORY | EPISODES | o),
    "Q critic": lambda **o: make_algorithm(ActorCritic, critic="q", **THEORY | EPISODES | ONE_EPISODE | o),
    "advantage": lambda **o: make_algorithm(ActorCritic, critic="advantage", **THEORY | EPISODES | ONE_EPISODE | o),
    "A2C, n-step": lambda **o: make_algorithm(A2C, **THEORY | o),
    "A2C, GAE": lambda **o: make_algorithm(A2C, gae_lambda=0.9, **THEORY | o),
}


def true_gradient(algorithm) -> Tensor:
    """Return the gradient of J = sum_tau p(tau) R by enumeration: `[P]`."""
    return gradient(algorithm, (sum(log_probability(algorithm)).exp() * returns()).sum())


def test_the_probabilities_of_all_trajectories_sum_to_1():
    probability = sum(log_probability(FORMS["simple"]())).exp().detach()
    assert len(probability) == 512
    torch.testing.assert_close(float(probability.sum()), 1.0, rtol=0, atol=1e-12)
    value, _ = exact_values(FORMS["simple"]())
    torch.testing.assert_close(START @ value[0, :, 0], (probability * returns()).sum())


def test_the_dynamics_drop_out_of_the_score_function_gradient():
    """grad J = sum_tau p(tau) R grad log p(tau), with and without the terms of the dynamics."""
    algorithm = FORMS["simple"]()
    policy, world = log_probability(algorithm)
    weight = (policy + world).exp().detach() * returns()
    exact = true_gradient(algorithm)
    assert float(exact.norm()) > 0.1
    full = gradient(algorithm, (weight * (policy + world)).sum(), retain_graph=True)
    torch.testing.assert_close(full, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(algorithm, (weight * policy).sum()), exact, rtol=0, atol=1e-12)


def test_a_baseline_has_expectation_zero():
    """E_pi[b grad log pi(a|s)] = 0 for every state."""
    algorithm = FORMS["simple"]()
    log_probs = log_policy(algorithm)
    for row in log_probs[:STEPS].flatten(0, 1):
        zero = gradient(algorithm, 7.0 * (row.exp().detach() * row).sum(), retain_graph=True)
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def exact() -> dict[str, tuple[Tensor, float]]:
    return {name: moments(form()) for name, form in FORMS.items()}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_unbiased(exact, name):
    torch.testing.assert_close(exact[name][0], true_gradient(FORMS[name]()), rtol=0, atol=1e-10)


def test_each_form_of_the_lecture_reduces_the_variance(exact, capsys):
    variance = {name: of for name, (_, of) in exact.items()}
    with capsys.disabled():
        print("\n\nexact variance of one trajectory's gradient")
        for name, of in variance.items():
            print(f"  {name:<16}{of:>8.3f}{of / variance['simple']:>8.2f} x simple")
    assert variance["simple"] > variance["reward-to-go"] > variance["value baseline"] > variance["advantage"]
    # Q in place of G reduces the variance of every term, but not always that of their sum: terms are correlated.
    assert variance["simple"] > variance["Q critic"]
    torch.testing.assert_close(variance["A2C, n-step"], variance["value baseline"])  # the same estimator
    assert variance["advantage"] < variance["A2C, GAE"] < variance["A2C, n-step"]


class FixedSamples(Categorical):
    """Categorical distribution whose `sample` returns a prescribed action."""

    def __init__(self, logits: Tensor, action: Tensor) -> None:
        super().__init__(logits=logits, validate_args=False)
        self.action = action

    def sample(self, sample_shape=()):
        return self.action.expand(*sample_shape, *self.batch_shape)


@pytest.mark.parametrize(("name", "causal"), [("reward-to-go", True), ("simple", False)])
def test_a_stochastic_graph_of_the_mdp_is_reinforce(name, causal):
    """A causal graph charges an action with later rewards (reward-to-go), else with all rewards; equal to 1e-12."""
    algorithm = FORMS[name]()
    for i in range(0, 512, 37):
        data = rollout(i)
        by_graph = gradient(algorithm, make_graph(algorithm, data).surrogate(causal=causal))
        torch.testing.assert_close(by_graph, -gradient(algorithm, loss(algorithm, data)), rtol=0, atol=1e-12)
        other = make_graph(algorithm, data).surrogate(causal=not causal)
        assert not torch.allclose(gradient(algorithm, other), by_graph)


def make_graph(algorithm, data: TensorDict) -> StochasticGraph:
    """Build the stochastic computation graph of one trajectory."""
    logits = algorithm.actor(data["observation"].flatten(0, 1)).logits  # [STEPS, ACTIONS]
    graph = StochasticGraph()
    for t in range(STEPS):
        graph.sample(f"a{t}", FixedSamples(logits[t], data["action"][0, t]), ScoreFunction())
        graph.cost(f"r{t}", GAMMA**t * data["next", "reward"][0, t, 0])
    return graph


def group(*indices: int) -> TensorDict:
    """Return trajectories one after the other as a rollout `[1, T]`."""
    return torch.cat([rollout(i) for i in indices], 1)


def sample_pairs(algorithm, num: int, greedy: bool) -> list[tuple[int, int]]:
    """Sample pairs of trajectories: independent ones, or one and a greedy one from the same first state."""
    policy, world = (each.detach().exp() for each in log_probability(algorithm))
    first = (policy * world).multinomial(num, replacement=True)
    if not greedy:
        return list(zip(first.tolist(), (policy * world).multinomial(num, replacement=True).tolist(), strict=True))
    states, actions = trajectories()
    time = torch.arange(STEPS).expand_as(actions)
    is_mode = (log_policy(algorithm).argmax(-1)[time, states[:, :-1]] == actions).all(1)
    chance = (states[first, :1] == states[:, 0]) * (world * is_mode)  # [num, 512]
    return list(zip(first.tolist(), chance.multinomial(1).squeeze(1).tolist(), strict=True))


@pytest.mark.parametrize("form", ["leave_one_out", "self_critical", "biased"])
def test_baselines_from_other_episodes(form, monkeypatch):
    """The baselines are unbiased; a mean that includes the episode itself is biased, and the test detects it."""
    if form == "biased":
        monkeypatch.setattr(
            REINFORCE, "leave_one_out_mean", lambda _, g, __: g.view(1, -1, STEPS, 1).mean(1).repeat(1, 2, 1)
        )
    options = THEORY | EPISODES | {"episodes_per_update": 2, "advantage": "leave_one_out"}
    algorithm = make_algorithm(REINFORCE, **options | ({"advantage": form} if form == "self_critical" else {}))
    each = []
    for pair in sample_pairs(algorithm, 3000, greedy=form == "self_critical"):
        data, weight = algorithm.without_greedy_episodes(data := group(*pair), algorithm.weight(data))
        each.append(-gradient(algorithm, algorithm.actor_loss(data, weight)[0]))
    estimates = torch.stack(each)
    error = estimates.mean(0) - true_gradient(algorithm)
    moving = estimates.std(0) > 1e-6
    z = (error[moving] / (estimates[:, moving].std(0) / len(estimates) ** 0.5)).abs().max()
    assert (z < 4.5) == (form != "biased"), z


def test_leave_one_out_baselines_with_episodes_of_different_lengths():
    done = torch.tensor([0, 0, 1, 1, 0, 1]).bool().view(1, -1, 1)  # three episodes: 3, 1 and 2 steps
    step = torch.tensor([0, 1, 2, 0, 0, 1]).view(1, -1, 1)
    data = TensorDict({"step_count": step, "next": {"done": done}}, batch_size=(1, 6))
    g = torch.tensor([5.0, 3.0, 1.0, 7.0, 4.0, 2.0]).view(1, -1, 1)
    algorithm = make_algorithm(REINFORCE, advantage="leave_one_out", episodes_per_update=2)
    assert algorithm.leave_one_out_mean(g, data).flatten().tolist() == [5.5, 1.0, 0.0, 4.5, 6.0, 1.5]
    data, g = data[:, :4], g[:, :4]
    assert algorithm.greedy_return(g, data).flatten()[:3].tolist() == [7.0, 0.0, 0.0]
    assert algorithm.episode(data).flatten().tolist() == [0, 0, 0, 1]


def test_leave_one_out_is_the_estimator_of_that_name():
    """For episodes of one step, REINFORCE has the gradient of LeaveOneOut's surrogate."""
    algorithm = make_algorithm(
        REINFORCE, **THEORY | EPISODES | {"advantage": "leave_one_out", "episodes_per_update": 2}
    )
    data = TensorDict(
        {
            "observation": observation(torch.tensor([[0, 0, 0]]), torch.zeros(1, 3, dtype=torch.long)),
            "action": torch.tensor([[0, 1, 1]]),
            "step_count": torch.zeros(1, 3, 1, dtype=torch.long),
            "next": {
                "reward": torch.tensor([[[1.0], [3.0], [-2.0]]]).double(),
                "terminated": torch.ones(1, 3, 1, dtype=torch.bool),
                "done": torch.ones(1, 3, 1, dtype=torch.bool),
            },
        },
        batch_size=(1, 3),
    )
    logits = algorithm.actor(data["observation"][0, :1]).logits  # [1, ACTIONS]
    draws = LeaveOneOut(3).sample(FixedSamples(logits, data["action"].view(3, 1)))
    surrogate = LeaveOneOut(3).surrogate(draws, data["next", "reward"].view(3, 1))
    gradient_of_loss = -gradient(algorithm, algorithm.actor_loss(data, algorithm.weight(data))[0])
    torch.testing.assert_close(gradient(algorithm, surrogate.sum()), gradient_of_loss, rtol=0, atol=1e-12)


def test_a2c_is_the_score_function_with_a_value_baseline():
    algorithm = make_algorithm(A2C, **THEORY | {"discount_state_weighting": False})
    value, _ = exact_values(algorithm)
    for i in range(0, 512, 37):
        data = rollout(i)
        states, _ = trajectories()
        baseline = value[torch.arange(STEPS), states[i, :-1], 0]
        reward_to_go = torch.stack(
            [(GAMMA ** torch.arange(STEPS - t).double() * rewards()[i, t:]).sum() for t in range(STEPS)]
        )
        logits = algorithm.actor(data["observation"].flatten(0, 1)).logits  # [STEPS, ACTIONS]
        estimator = ScoreFunction(baseline=baseline)
        draws = estimator.sample(FixedSamples(logits, data["action"]))
        surrogate = estimator.surrogate(draws, reward_to_go.unsqueeze(0)).sum()
        gradient_of_loss = -gradient(algorithm, loss(algorithm, data))
        torch.testing.assert_close(gradient(algorithm, surrogate), gradient_of_loss, rtol=0, atol=1e-12)


def test_bias_of_common_practice(exact, capsys):
    """Dropping gamma^t and bootstrapping from wrong values give biased gradients; a wrong baseline does not."""

    def bias(algorithm) -> float:
        target = true_gradient(algorithm)
        return float((moments(algorithm)[0] - target).norm() / target.norm())

    biases = {f"{name}, gamma^t dropped": bias(FORMS[name](discount_state_weighting=False)) for name in list(FORMS)[1:]}
    for name in ("value baseline", "advantage", "A2C, n-step", "A2C, GAE"):
        algorithm = FORMS[name]()
        algorithm.critic.values.data += torch.randn(STEPS + 1, STATES, 1, dtype=torch.float64)
        biases[f"{name}, wrong V"] = bias(algorithm)
    with capsys.disabled():
        print("\n\nbias, relative to the gradient")
        for name, value in biases.items():
            print(f"  {name:<34}{value:>10.1e}")
    for name, value in biases.items():
        if name in (
            "value baseline, wrong V",
            "A2C, n-step, wrong V",
        ):  # bootstraps only from the terminal state, whose value is not used
            assert value < 1e-10, name
        else:
            assert value > 1e-2, name


def transitions(copies: int) -> TensorDict:
    """Return 4 `copies` transitions of every (time, state, action), with next states in exact proportions."""
    rows = [
        (time, state, action, after)
        for time in range(STEPS)
        for state in range(STATES)
        for action in range(ACTIONS)
        for after in range(STATES)
        for _ in range(copies * int(4 * TRANSITION[state, action, after]))
    ]
    time, state, action, after = torch.tensor(rows).T
    done = (time == STEPS - 1).unsqueeze(-1)
    reward = REWARD[state, action, after].unsqueeze(-1)
    nxt = {"observation": observation(after, time + 1), "reward": reward, "terminated": done, "done": done}
    return TensorDict({"observation": observation(state, time), "action": action, "next": nxt}, batch_size=len(rows))


def test_sarsa_and_expected_learn_q_of_the_policy_and_max_does_not():
    error = {}
    for target, copies in (("sarsa", 2000), ("expected", 1), ("max", 1)):
        algorithm = make_algorithm(ActorCritic, critic="q", q_target=target, **THEORY)
        q = algorithm.critic.values.data[:STEPS].clone()
        algorithm.critic.values.data.zero_()
        batch = transitions(copies)
        optimizer = torch.optim.SGD(algorithm.critic.parameters(), lr=0.4 * STEPS * STATES * ACTIONS)
        for _ in range(60):
            optimizer.zero_grad()
            algorithm.critic_loss(batch).backward()
            optimizer.step()
        error[target] = float((algorithm.critic.values.data[:STEPS] - q).abs().max())
    assert error["expected"] < 1e-8
    assert error["sarsa"] < 0.05
    assert error["max"] > 0.5
