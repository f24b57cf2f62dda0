"""Off-policy algorithms: effects of hyper-parameters, exploration, pixels."""

import math
from dataclasses import replace

import pytest
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

import oracles
from checks import (
    build_algorithm,
    captured_and_eager_are_the_same,
    compiled_and_eager_are_the_same,
    make_batch,
    metrics,
    run_without_trainer,
    same,
    saved_state,
    with_value,
)
from levin import resume
from levin.collectors.factory import make_collector
from levin.config.compose import compose
from levin.data.replay import FrameReplay
from levin.envs.config import EnvConfig
from levin.envs.factory import make_env
from levin.envs.single import make_single_env
from levin.nn.distributions import Categorical, MultiCategorical, OneHot
from levin.nn.exploration import EpsilonGreedy, GaussianNoise, NoisyPolicy, OrnsteinUhlenbeckNoise
from levin.training.session import build_run, train
from rows import LATE, ROWS

CONTINUOUS, DISCRETE = ("ddpg", "td3", "sac", "crossq", "tqc"), ("dqn", "sac_discrete")
SMALL = (
    *LATE,
    "env.num_envs=1",
    "algo.learning_starts=20",
    "algo.batch_size=8",
    "algo.hidden_sizes=[8]",
    "log_every=10",
)


def small_env(algo: str) -> str:
    """Return the override of a small env for an algorithm."""
    return "env=pendulum" if algo in CONTINUOUS else "env=cartpole"


def make_algorithm(algo: str, *overrides: str):
    """Build an algorithm with its optimizers, without a Trainer."""
    return build_algorithm(f"algo={algo}", small_env(algo), *SMALL, *overrides)


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of steps that an optimizer has made."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def updated(algorithm, num: int):
    """Make `num` updates and return the algorithm."""
    for update in range(num):
        algorithm.updates = update
        algorithm.update(make_batch(algorithm))
    return algorithm


# --- hyper-parameters


@pytest.mark.parametrize("algo", ["td3", "crossq"])
@pytest.mark.parametrize("delay", [1, 2, 3])
def test_policy_delay(algo, delay):
    """Actor and target networks are updated every `policy_delay` updates, critics in every update."""
    algorithm = make_algorithm(algo, f"algo.policy_delay={delay}")
    delayed = list(algorithm.actor.parameters()) if algo == "crossq" else algorithm.target_parameters
    before = [each.clone() for each in delayed]
    updated(algorithm, delay - 1)
    assert all(map(torch.equal, before, delayed))
    updated(algorithm, 7 * delay)
    assert steps_of(algorithm.critic_optimizer) == 8 * delay - 1
    assert steps_of(algorithm.actor_optimizer) == 7
    assert not any(map(torch.equal, before, delayed))


def test_target_noise_and_its_clip():
    """Both affect only the action of the target actor."""
    observation = torch.randn(20_000, 3)

    def offsets(**values: float) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        algorithm = make_algorithm("td3", *(f"algo.{key}={value}" for key, value in values.items()))
        algorithm.target_actor.network[-1].weight.data /= 100  # far from the bounds -1 and 1
        batch = make_batch(algorithm)
        return algorithm.target_action(observation) - algorithm.target_actor(observation), algorithm.actor_loss(batch)

    none, actor_loss = offsets(target_noise=0)
    assert not none.any()
    usual, same_actor_loss = offsets(target_noise=0.1, target_noise_clip=9)
    assert usual.std() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(actor_loss, same_actor_loss)
    clipped, _ = offsets(target_noise=0.1, target_noise_clip=0.15)
    assert clipped.abs().max() == pytest.approx(0.15)
    torch.testing.assert_close(clipped, usual.clamp(-0.15, 0.15))
    wide, _ = offsets(target_noise=9, target_noise_clip=9)
    assert wide.abs().max() < 2, "target actions are clipped to the action bounds"


@pytest.mark.parametrize("algo", ["ddpg", "td3", "sac", "tqc", *DISCRETE])
@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0])
def test_tau(algo, tau):
    every = {"td3": ("algo.policy_delay=1",), "dqn": ("algo.target_update_every=1",)}
    algorithm = make_algorithm(algo, f"algo.tau={tau}", *every.get(algo, ()))
    for each in algorithm.target_parameters:
        each.data += torch.randn_like(each)
    before = [each.clone() for each in algorithm.target_parameters]
    updated(algorithm, 1)
    online = [*algorithm.critic_parameters, *(algorithm.actor.parameters() if algo in ("ddpg", "td3") else ())]
    for old, new, of in zip(before, algorithm.target_parameters, online, strict=True):
        torch.testing.assert_close(new, (1 - tau) * old + tau * of, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("every", [1, 4])
def test_target_update_every(every):
    algorithm = make_algorithm("dqn", f"algo.target_update_every={every}")
    before = [each.clone() for each in algorithm.target_parameters]
    updated(algorithm, every)
    assert all(map(torch.equal, algorithm.target_parameters, algorithm.critic_parameters))
    algorithm.updates = every
    algorithm.update(make_batch(algorithm))
    agrees = all(map(torch.equal, algorithm.target_parameters, algorithm.critic_parameters))
    assert agrees == (every == 1)
    assert not all(map(torch.equal, before, algorithm.target_parameters))


@pytest.mark.parametrize("algo", [*CONTINUOUS, *DISCRETE])
@pytest.mark.parametrize(
    ("train_every", "updates_per_step", "updates"),
    [
        (10, 1.0, [0, 0, 10, 20]),
        (20, 1.0, [0, 20]),
        (10, 0.25, [0, 0, 2, 5]),
        (10, 0.33, [0, 0, 3, 6]),
        (5, 2.0, [0, 0, 0, 0, 10, 20, 30, 40]),
        (5, 0.0, [0] * 8),
    ],
)
def test_train_every_and_updates_per_step(algo, train_every, updates_per_step, updates):
    """`steps_per_iteration` sets how often updates are made, `replay_ratio` how many."""
    algorithm = make_algorithm(algo, f"algo.steps_per_iteration={train_every}", f"algo.replay_ratio={updates_per_step}")
    assert algorithm.steps_per_iteration == train_every
    done = []
    for _ in updates:
        algorithm.env_steps += train_every
        algorithm.training_step(make_batch(algorithm, train_every).unsqueeze(0), 0)
        done.append(algorithm.updates)
    assert done == updates


@pytest.mark.parametrize("algo", [*CONTINUOUS, "sac_discrete"])
def test_random_env_steps_and_learning_starts(algo):
    """Actions are random for `random_env_steps`, by default as many as `learning_starts`."""
    assert make_algorithm(algo).random_env_steps == 20
    algorithm, loader = build_run(compose([f"algo={algo}", small_env(algo), *SMALL, "algo.random_env_steps=70"]))
    assert (algorithm.random_env_steps, algorithm.learning_starts) == (70, 20)
    assert loader.collector.random_env_steps == 70


@pytest.mark.parametrize(("double_q", "huber"), [(False, False), (True, False), (False, True)])
def test_double_q_and_huber_are_those_of_torchrl(double_q, huber):
    """The row of DQN tests the fourth combination."""
    algorithm = make_algorithm("dqn", f"algo.double_q={double_q}", f"algo.huber={huber}", "algo.hidden_sizes=[]")
    for each in algorithm.target_parameters:
        each.data += torch.randn_like(each)
    batch = make_batch(algorithm, 32)
    batch["next", "reward"] *= 3  # errors below and above 1
    (actual,), (reference,) = oracles.dqn_losses(algorithm, batch), oracles.dqn_oracle(algorithm, batch)
    torch.testing.assert_close(actual, reference)
    other = make_algorithm("dqn", f"algo.double_q={not double_q}", f"algo.huber={huber}", "algo.hidden_sizes=[]")
    other.load_state_dict(algorithm.state_dict())
    assert not torch.isclose(actual, other.critic_loss(batch)[0])


def test_huber_of_discrete_sac_is_that_of_torchrl():
    algorithm = make_algorithm("sac_discrete", "algo.huber=true")
    batch = make_batch(algorithm, 32)
    batch["next", "reward"] *= 3
    actual, reference = oracles.sac_discrete_losses(algorithm, batch), oracles.sac_discrete_oracle(algorithm, batch)
    torch.testing.assert_close(actual, reference)
    squared = make_algorithm("sac_discrete")
    squared.load_state_dict(algorithm.state_dict())
    assert not torch.isclose(actual[0], squared.critic_loss(batch)[0])


def test_the_exact_expectation_is_the_mean_of_samples():
    """Discrete SAC sums its actor loss over all actions; the mean over sampled actions agrees."""
    algorithm = make_algorithm("sac_discrete")
    algorithm.actor.network[-1].weight.data *= 100  # far from uniform
    batch = make_batch(algorithm, 1)
    policy = algorithm.actor(batch["observation"])
    value = algorithm.critic(batch["observation"]).amin(0)
    torch.manual_seed(0)
    actions = policy[torch.zeros(100_000, dtype=torch.int64)].sample().unsqueeze(-1)  # [B, 1]
    alpha = algorithm.log_alpha.exp()
    samples = alpha * policy.log_probs.expand(100_000, -1).gather(1, actions) - value.expand(100_000, -1).gather(
        1, actions
    )
    error = samples.std() / 100_000**0.5
    assert abs(samples.mean() - algorithm.actor_loss(batch)[0]) < 4 * error


def actor_gradient(algorithm, logits: torch.Tensor, observation: torch.Tensor, sizes=()) -> torch.Tensor:
    """Return the gradient of E[Q] with respect to the logits, for N copies of one state: `[N, A]`."""
    leaf = logits.expand(len(observation), -1).clone().requires_grad_()
    policy = MultiCategorical(leaf, sizes) if sizes else Categorical(leaf)
    return torch.autograd.grad(algorithm.expected_q(observation, policy).sum(), leaf)[0]


@pytest.mark.parametrize(
    ("env", "critic"), [("cartpole", "state"), ("cartpole", "state_action"), ("Buttons", "state_action")]
)
def test_estimators_of_the_actor(env, critic):
    """Leave-one-out is unbiased; straight-through and ReinMax are for `critic: state`, with Q linear in the action."""
    where = ["env=cartpole"] if env == "cartpole" else ["env=gym", "env.id=toy_envs:Buttons-v0"]
    overrides = ["algo=sac_discrete", *where, f"algo.critic={critic}", "algo.hidden_sizes=[16]", "seed=1"]
    torch.manual_seed(0)
    algorithm = build_run(compose(overrides))[0]
    for parameter in algorithm.critic.parameters():  # far from linear
        parameter.data *= 4
    sizes = algorithm.env["action"].get("nvec")
    logits = torch.randn(sum(sizes) if sizes else 2)
    observation = torch.randn(1, algorithm.env["observation"]["shape"][0]).expand(60_000, -1)
    exact = actor_gradient(algorithm, logits, observation[:1], sizes)[0]
    agreeing = {"loo"} | ({"straight_through", "reinmax"} if critic == "state" else set())
    for name in ("loo", "straight_through", "gumbel_softmax", "reinmax"):
        algorithm.estimator = algorithm.make_estimator(name, 2, 1.0)
        gradients = actor_gradient(algorithm, logits, observation, sizes)
        error = (gradients.mean(0) - exact).abs() / (gradients.std(0) / 60_000**0.5 + 1e-6)
        assert (error.max() < 4.5) == (name in agreeing), (name, error)


@pytest.mark.parametrize("name", ["exact", "loo", "straight_through", "gumbel_softmax", "reinmax"])
def test_estimators_of_the_actor_are_compiled_once_and_captured(name, tmp_path):
    (row,) = (row for row in ROWS if row.algo == "sac_discrete")
    overrides = ("env=gym", "env.id=toy_envs:Buttons-v0", "algo.critic=state_action", f"algo.actor_estimator={name}")
    row = replace(row, small=(*row.small, *overrides))
    compiled_and_eager_are_the_same(row, tmp_path / "compiled")
    captured_and_eager_are_the_same(row, tmp_path / "captured")


def test_one_hot_encoding_of_multi_discrete_actions():
    one_hot = OneHot([2, 3])
    action = torch.tensor([[1, 2], [0, 0]])
    expected = torch.tensor([[0.0, 1, 0, 0, 1], [1, 0, 1, 0, 0]])
    assert torch.equal(one_hot.encode(action), expected)
    logits = torch.tensor([[0.3, -0.2, 1.0, 0.0, -1.0]])
    dist, actual = one_hot.distribution(logits), MultiCategorical(logits.expand(50, 1, 5), [2, 3])
    points = dist.sample(torch.Size([50]))
    assert points.shape == (50, 1, 2, 3)
    assert not points[:, 0, 0, 2].any()  # padding of the shorter choice
    joined = one_hot.join(points)
    chosen = torch.stack([joined[..., :2].argmax(-1), joined[..., 2:].argmax(-1)], -1)
    torch.testing.assert_close(dist.log_prob(points), actual.log_prob(chosen).squeeze(-1))
    assert one_hot.max_entropy == pytest.approx(math.log(6))


@pytest.mark.parametrize("algo", ["sac", "sac_discrete"])
def test_a_learning_rate_of_zero_keeps_the_temperature(algo):
    overrides = ("algo.initial_alpha=0.2",)
    assert updated(make_algorithm(algo, *overrides, "algo.alpha_lr=0"), 3).log_alpha.exp().item() == pytest.approx(0.2)
    assert updated(make_algorithm(algo, *overrides), 3).log_alpha.exp().item() != pytest.approx(0.2)


def test_max_grad_norm_of_discrete_sac():
    def norms(norm: str) -> list[float]:
        torch.manual_seed(0)
        algorithm = make_algorithm("sac_discrete", f"algo.max_grad_norm={norm}")
        algorithm.update(make_batch(algorithm))
        gradients = ([each.grad for each in part.parameters()] for part in (algorithm.critic, algorithm.actor))
        return [float(torch.cat([each.flatten() for each in part]).norm()) for part in gradients]

    # PyTorch adds 1e-6 to the norm before it divides by it.
    assert norms("1e-5") == pytest.approx([1e-5, 1e-5], rel=0.2)
    assert min(norms("null")) > 1e-4


def test_max_grad_norm_of_dqn():
    algorithm, free = make_algorithm("dqn", "algo.max_grad_norm=1e-3"), make_algorithm("dqn")
    assert updated(algorithm, 1).optimizer.param_groups[0]["params"][0].grad.norm() == pytest.approx(1e-3, rel=1e-2)
    assert updated(free, 1).optimizer.param_groups[0]["params"][0].grad.norm() > 1e-2


def test_target_entropy_of_discrete_sac():
    default = 0.98 * math.log(2)  # Christodoulou 2019
    assert make_algorithm("sac_discrete", "algo.target_entropy=null").target_entropy == pytest.approx(default)
    assert make_algorithm("sac_discrete", "algo.target_entropy=0.1").target_entropy == 0.1


CHANGES = {
    "gamma": 0.5,
    "tau": 0.5,
    "batch_size": 4,
    "replay_ratio": 0.5,
    "learning_starts": 10,
    "random_env_steps": 50,
    "buffer_size": 30,
    "n_step": 3,
    "replay": "prioritized",
    "priority_alpha": 0.9,
    "priority_beta": 0.9,
    "schedule_env_steps": 40,
    "steps_per_iteration": 8,
    "hidden_sizes": "[8,4]",
    "activation": "tanh",
    "network": "layer_norm",
}
ACTOR_CRITIC = {"actor_lr": 1e-2, "critic_lr": 1e-2}
NOISY = {**ACTOR_CRITIC, "exploration_noise": 0.5}
OWN = {
    "ddpg": NOISY | {"noise": "ornstein_uhlenbeck"},
    "td3": NOISY | {"target_noise": 0.5, "target_noise_clip": 0.1, "policy_delay": 3},
    "dqn": {
        "lr": 1e-2,
        "target_update_every": 3,
        "double_q": "true",
        "huber": "true",
        "max_grad_norm": 0.01,
        "initial_epsilon": 0.5,
        "final_epsilon": 0.5,
        "epsilon_fraction": 1.5,
    },
    "crossq": ACTOR_CRITIC
    | {"alpha_lr": 1e-2, "initial_alpha": 0.1, "target_entropy": 3.0, "adam_beta1": 0.9, "policy_delay": 1}
    | {"norm_momentum": 0.5, "norm_warm_up": 100, "critic_hidden_sizes": "[8,4]"},
    "tqc": ACTOR_CRITIC
    | {"alpha_lr": 1e-2, "initial_alpha": 0.1, "target_entropy": 3.0, "num_critics": 3, "num_atoms": 5}
    | {"dropped_atoms": 1, "critic_hidden_sizes": "[8,4]"},
    "sac_discrete": ACTOR_CRITIC
    | {"alpha_lr": 1e-2, "initial_alpha": 0.1, "target_entropy": 0.1, "huber": "true", "max_grad_norm": 0.01}
    | {"critic": "state", "actor_estimator": "exact", "actor_draws": 3, "actor_tau": 0.1},
}
OF_REPLAY = ["n_step", "replay", "priority_alpha", "priority_beta", "schedule_env_steps"]
MISSING = {  # of `CHANGES`
    "dqn": ["random_env_steps"],  # it has epsilon instead
    "crossq": ["tau", "network", *OF_REPLAY],
    "tqc": OF_REPLAY,
}
BASE = {
    "crossq": ["algo.critic_hidden_sizes=[8]", "algo.norm_warm_up=5"],
    "tqc": ["algo.critic_hidden_sizes=[8]"],
    "dqn": ["algo.target_update_every=5", "algo.schedule_env_steps=96", "algo.lr=0.1"],
    "sac_discrete": ["algo.critic=state_action", "algo.actor_estimator=gumbel_softmax"],
}


@pytest.mark.usefixtures("some_trees")
@pytest.mark.parametrize("algo", OWN)
def test_every_hyper_parameter_has_an_effect(algo, tmp_path):
    """The tests above check the exact effect of each; test_train.py has those of SAC."""
    overrides = [f"algo={algo}", small_env(algo), *SMALL, "eval.episodes=1", "total_env_steps=96"]
    overrides += ["algo.steps_per_iteration=16", "algo.replay_ratio=0.25", "algo.gamma=0.9", "log_every=96"]
    overrides += BASE.get(algo, [])
    changes = {**CHANGES, **OWN[algo]}
    for name in MISSING.get(algo, []):
        del changes[name]
    uniform = compose(overrides)
    assert changes.keys() == set(uniform.algo) - {"_target_", "buffer_storage", "compile"}

    def result(config: DictConfig) -> dict[str, torch.Tensor]:
        state = run_without_trainer(config)
        return {key: value for key, value in state.items() if not key.startswith(("noise.", "exploration."))}

    train(uniform, tmp_path / "run")
    assert same(saved_state(tmp_path / "run")["state_dict"], run_without_trainer(uniform))
    prioritized = with_value(uniform, "algo.replay", "prioritized") if "replay" in changes else uniform
    of_uniform, of_prioritized = result(uniform), result(prioritized)
    for name, value in changes.items():
        base, expected = uniform, of_uniform
        if name.startswith(("priority", "schedule")):
            base, expected = prioritized, of_prioritized
        assert not same(expected, result(with_value(base, f"algo.{name}", value))), name


# --- exploration


@pytest.mark.parametrize("algo", ["ddpg", "td3"])
def test_exploration_noise(algo):
    algorithm = make_algorithm(algo, "algo.exploration_noise=0.1")
    algorithm.actor.network[-1].weight.data /= 100
    observation = torch.randn(20_000, 3)
    noisy, mean = (algorithm.policy(deterministic=each).module(observation).detach() for each in (False, True))
    assert (noisy - mean).std() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(mean, algorithm.policy(deterministic=True).module(observation))
    wild = make_algorithm(algo, "algo.exploration_noise=5").policy().module(observation)
    assert wild.abs().max() == 1


def test_ornstein_uhlenbeck_noise_remembers_until_the_episode_ends():
    torch.manual_seed(0)
    noise, zero, on = (
        OrnsteinUhlenbeckNoise(0.2, [1000, 1]),
        torch.zeros(1000, 1),
        torch.zeros(1000, 1, dtype=torch.bool),
    )
    x = torch.stack([noise(zero, on).clone() for _ in range(100)])  # [T, N, 1]
    assert x[-1].std() == pytest.approx(0.2 / (0.15 * 1.85) ** 0.5, rel=0.1)
    assert (x[-1] * x[-2]).mean() / (x[-1] * x[-1]).mean() == pytest.approx(0.85, abs=0.05)
    assert x[0].std() == pytest.approx(0.2, rel=0.1)
    first = on.clone()
    first[:500] = True
    after = noise(zero, first)
    assert after[:500].std() == pytest.approx(0.2, rel=0.1)
    assert (after[500:] * x[-1, 500:]).mean() > 0.5 * x[-1].var()
    assert abs((after[:500] * x[-1, :500]).mean()) < 0.1 * x[-1].var()


def test_gaussian_noise_does_not_remember():
    torch.manual_seed(0)
    policy = NoisyPolicy(nn.Identity(), GaussianNoise(0.2))
    x, y = policy(torch.zeros(10_000, 1)), policy(torch.zeros(10_000, 1))
    assert abs((x * y).mean()) < 4 * 0.04 / 100


@pytest.mark.parametrize("name", ["vector", "torchrl"])
def test_collectors_pass_is_first_to_the_policy(name):
    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[list[bool]] = []

        def forward(self, observation: torch.Tensor, is_first: torch.Tensor) -> torch.Tensor:
            self.seen.append(is_first.flatten().tolist())
            return torch.zeros(len(observation), 1)

    env = make_env(EnvConfig(id="toy_envs:Counting-v0", num_envs=2, kwargs={"length": 3}), seed=0, copy=False)
    policy = TensorDictModule(Spy(), in_keys=["observation", "is_first"], out_keys=["action"])
    collector = make_collector(name, env, policy, steps=4)
    batches = iter(collector)
    rollouts = torch.cat([next(batches) for _ in range(2)], 1)
    seen = torch.tensor(policy.module.seen[-8:]).T
    assert torch.equal(seen, rollouts["observation"][..., 1] == 0)
    collector.shutdown()


def test_epsilon_greedy():
    torch.manual_seed(0)
    values = torch.tensor([0.0, 2.0, 1.0, -1.0]).expand(40_000, 4)
    for epsilon in (0.0, 0.4, 1.0):
        share = torch.bincount(EpsilonGreedy(epsilon)(values), minlength=4) / 40_000
        expected = epsilon / 4 + torch.tensor([0.0, 1 - epsilon, 0.0, 0.0])
        torch.testing.assert_close(share, expected, atol=0.01, rtol=0)


def test_epsilon_decays_to_its_final_value(tmp_path):
    overrides = ["algo=dqn", *SMALL, "total_env_steps=160", "algo.steps_per_iteration=10", "eval.episodes=1"]
    overrides += [
        "algo.initial_epsilon=1",
        "algo.final_epsilon=0.1",
        "algo.epsilon_fraction=0.5",
        "algo.replay_ratio=1",
    ]
    train(compose(overrides), tmp_path / "run")
    rows = [float(row["train/epsilon"]) for row in metrics(tmp_path / "run") if row["train/epsilon"]]
    assert rows[:9] == pytest.approx([1 - 0.9 / 8 * i for i in range(9)])
    assert rows[8:] == pytest.approx([0.1] * 8)


# --- pixels


@pytest.mark.parametrize(
    ("algo", "storage"), [*((algo, "memory") for algo in (*CONTINUOUS, *DISCRETE)), ("dqn", "memmap")]
)
def test_pixels(algo, storage, tmp_path):
    """Frames are stored once, all networks that read them are trained, and a resumed run is identical."""
    name = "Frame-v0" if algo in CONTINUOUS else "FrameSteps-v0"
    overrides = [f"algo={algo}", "env=gym", f"env.id=toy_envs:{name}", "env.frame_stack=4", *SMALL, "env.num_envs=2"]
    overrides += ["algo.replay_ratio=0.25", "eval.episodes=1", "algo.buffer_size=80", "algo.steps_per_iteration=4"]
    overrides += [f"algo.buffer_storage={storage}", *(["algo.schedule_env_steps=96"] if algo == "dqn" else [])]
    overrides += ["algo.critic_hidden_sizes=[8]"] if algo in ("crossq", "tqc") else []
    before, _ = build_run(compose(overrides))
    assert isinstance(before.buffer, FrameReplay)
    train(compose([*overrides, "total_env_steps=96"]), tmp_path / "straight")
    train(compose([*overrides, "total_env_steps=48"]), tmp_path / "halves")
    resume.resume(run=str(tmp_path / "halves"), total_env_steps=96)
    straight, resumed = saved_state(tmp_path / "straight"), saved_state(tmp_path / "halves")
    for key in straight:
        assert same(straight[key], resumed[key]), key
    assert straight["levin"]["updates"] == 19
    frames = straight["buffer"]["data"]["frame"]
    assert frames.shape == (80, 1, 36, 36)
    assert frames.dtype == torch.uint8
    convolutions = [key for key in straight["state_dict"] if key.endswith("layers.0.weight") and "target" not in key]
    convolutions = [key for key in convolutions if straight["state_dict"][key].ndim == 4]
    assert len(convolutions) == (1 if algo == "dqn" else 2), "actor and critic have separate encoders"
    for key in convolutions:
        assert not torch.equal(before.state_dict()[key], straight["state_dict"][key]), key


def test_frames_are_stacked_as_in_gymnasium():
    env = make_single_env(EnvConfig(id="toy_envs:Frame-v0", frame_stack=3))
    plain = make_single_env(EnvConfig(id="toy_envs:Frame-v0"))
    assert env.observation_space.shape == (3, 36, 36)
    seen = [plain.reset(seed=1)[0]] * 3
    observation, _ = env.reset(seed=1)
    for action in (0.3, -0.2, 0.1, 0.5):
        assert (observation == torch.cat([torch.from_numpy(each) for each in seen[-3:]]).numpy()).all()
        observation = env.step([action])[0]
        seen.append(plain.step([action])[0])


def test_a_pixel_batch_is_a_view_of_its_frames():
    """s and s' of a sampled batch share the memory of their frames."""
    algorithm = make_algorithm("dqn", "env=gym", "env.id=toy_envs:FrameSteps-v0", "env.frame_stack=4")
    frames = torch.randint(256, (1, 6, 4, 36, 36), dtype=torch.uint8)
    flags = torch.zeros(1, 6, 1, dtype=torch.bool)
    after = {"observation": frames.roll(-1, 1), "reward": torch.zeros(1, 6, 1), "terminated": flags, "done": flags}
    actions = torch.zeros(1, 6, dtype=torch.int64)
    algorithm.buffer.extend(TensorDict({"observation": frames, "action": actions, "next": after}, batch_size=[1, 6]))
    batch = algorithm.buffer.draw(5, torch.device("cpu"))
    assert (
        batch["observation"].untyped_storage().data_ptr() == batch["next", "observation"].untyped_storage().data_ptr()
    )
