"""On-policy algorithms: whole episodes, distributions, trust regions, PPO's penalty, schedules, invalid settings."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

import oracles
from checks import build_algorithm, build_row, compiled_and_eager_are_the_same, make_batch, metrics, saved_state
from levin import resume
from levin.algorithms.a2c import A2C
from levin.algorithms.a3c import A3C
from levin.algorithms.ppo import PPO
from levin.algorithms.reinforce import REINFORCE
from levin.algorithms.trpo import conjugate_gradient
from levin.bench.peers import fake_env_spec
from levin.collectors.episodes import step_count
from levin.collectors.factory import make_collector
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.core.network_input import NetworkInput
from levin.core.spaces import describe_action, describe_space
from levin.data import returns
from levin.data.rollout import WholeEpisodes
from levin.envs.config import EnvConfig
from levin.envs.factory import make_env
from levin.nn.distributions import Categorical, Normal
from levin.nn.encoders import NatureCNN, SmallCNN
from levin.runs.load import export_policy, load_algorithm
from levin.training.session import build_run, train
from rows import LATE, POINT, ROWS
from short_runs import TINY


def make_algorithm(*overrides: str):
    """Build an algorithm with its optimizers, without a Trainer."""
    return build_algorithm(*LATE, *overrides)


# --- values of next observations


SPACES = {"vector": Box(-1, 1, (5,)), "pixels": Box(0, 255, (3, 36, 36), np.uint8)}
SPACES["dict"] = Dict({"vector": SPACES["vector"], "camera": SPACES["pixels"]})


def random_rollout(kind: str, num_envs: int, steps: int) -> TensorDict:
    """Return a rollout `[N, T]` of episodes that terminate or are truncated at random."""
    terminated, truncated = torch.rand(2, num_envs, steps, 1) < 0.2
    done = terminated | truncated
    done[:, -1] = truncated[:, -1] = True  # as REINFORCE needs it

    def draw(space: Box) -> tuple[Tensor, Tensor]:
        def some(number: int) -> Tensor:
            shape = (num_envs, number, *space.shape)
            pixels = space.dtype == np.uint8
            return torch.randint(256, shape, dtype=torch.uint8) if pixels else torch.rand(shape) * 2 - 1

        observation = some(steps + 1)
        ends = done.view(num_envs, steps, *(1 for _ in space.shape))
        return observation[:, :-1].contiguous(), torch.where(ends, some(steps), observation[:, 1:])

    if kind == "dict":
        parts = {name: draw(space) for name, space in SPACES["dict"].items()}
        now, following = ({name: part[i] for name, part in parts.items()} for i in range(2))
    else:
        now, following = draw(SPACES[kind])
    after = {"observation": following, "reward": torch.rand(num_envs, steps, 1), "terminated": terminated}
    after |= {"truncated": truncated, "done": done}
    content = {"observation": now, "action": torch.randint(3, (num_envs, steps))}
    return TensorDict({**content, "next": after}, batch_size=(num_envs, steps))


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("algo", [A2C, A3C, PPO, REINFORCE])
def test_next_observations_are_evaluated_only_where_the_rollout_does_not_go_on(algo, kind):
    """Returns and the critic's gradient are the same as with V(s') from a pass over all next observations."""
    torch.manual_seed(0)
    if algo is REINFORCE and kind != "vector":
        pytest.skip("REINFORCE reads vectors")
    spec = fake_env_spec(NetworkInput(describe_space(SPACES[kind])).space, describe_action(Discrete(3)))
    options = {"gae_lambda": 0.9, "steps_per_iteration": 8} if algo is not REINFORCE else {"advantage": "baseline"}
    algorithm = algo(env=spec, **({"batch_size": 8} if algo is PPO else {}), **options)
    num_envs = 1 if algo is REINFORCE else 3
    rollout = random_rollout(kind, num_envs, 60)
    after = rollout["next"]

    def values(observation: Tensor) -> Tensor:
        return algorithm.critic(algorithm.trunk(observation.flatten(0, 1))).unflatten(0, rollout.shape)

    value = values(rollout["observation"])
    with torch.no_grad():
        next_value = values(after["observation"])
    flags = {"reward": after["reward"], "terminated": after["terminated"], "done": after["done"]}
    lambda_ = 1.0 if algo is REINFORCE else 0.9
    target = returns.lambda_return(**flags, next_value=next_value, gamma=0.99, lambda_=lambda_)
    evaluated = []
    algorithm.trunk.register_forward_hook(lambda _, inputs, __: evaluated.append(len(inputs[0])))
    if algo is PPO:
        data, _ = algorithm.evaluate(rollout)
        torch.testing.assert_close(data["value_target"], target.flatten(0, 1), rtol=1e-6, atol=1e-6)
    elif algo is REINFORCE:
        torch.testing.assert_close(algorithm.reward_to_go(rollout), target, rtol=1e-6, atol=1e-6)
    else:
        loss = algorithm.losses(rollout, algorithm.last_value(rollout))[1]
        expected = (target - value).square().mean()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        parameters = [*algorithm.trunk.parameters(), *algorithm.critic.parameters()]
        actual, reference = (torch.autograd.grad(each, parameters) for each in (loss, expected))
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-6)
    last = after["done"].sum()
    assert sum(evaluated) == (last if algo is REINFORCE else rollout.numel() + last)


def tianshous_targets(critic, observation, following, after, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Return advantages in the units of the rewards, and the critic's targets, as Tianshou computes them, `[N, T]`."""
    value, next_value = (critic(each).detach().double().squeeze(-1).numpy() * std for each in (observation, following))
    reward, terminated, done = (after[key].squeeze(-1).double().numpy() for key in ("reward", "terminated", "done"))
    advantage, running = np.zeros_like(value), np.zeros(len(value))
    for t in reversed(range(value.shape[1])):
        delta = reward[:, t] + 0.99 * (1 - terminated[:, t]) * next_value[:, t] - value[:, t]
        running = delta + 0.99 * 0.9 * (1 - done[:, t]) * running
        advantage[:, t] = running
    return advantage, advantage + value


@pytest.mark.parametrize("algo", [A2C, PPO])
def test_normalized_value_targets_equal_a_computation_by_hand(algo, monkeypatch):
    """The critic's targets are divided by the std of all returns before this rollout; advantages are not."""
    torch.manual_seed(0)
    spec = fake_env_spec(NetworkInput(describe_space(SPACES["vector"])).space, describe_action(Discrete(3)))
    options = {"batch_size": 8} if algo is PPO else {}
    algorithm = algo(env=spec, gae_lambda=0.9, steps_per_iteration=8, normalize_value_target=True, **options)
    seen, std = [], 1.0
    for scale in (5.0, 50.0, 0.5):
        rollout = random_rollout("vector", 3, 60)
        rollout["next", "reward"] *= scale
        following = rollout["next", "observation"]
        advantage, target = tianshous_targets(algorithm.critic, rollout["observation"], following, rollout["next"], std)
        if algo is PPO:
            data, _ = algorithm.evaluate(rollout)
            wanted = {"advantage": advantage, "value_target": target / std, "value": (target - advantage) / std}
            for key, values in wanted.items():
                expected = torch.tensor(values).view(-1, 1).float()
                torch.testing.assert_close(data[key], expected, rtol=1e-4, atol=1e-4)
        else:
            last_value = algorithm.last_value(rollout)
            actor_loss, critic_loss, _, _ = algorithm.losses(rollout, last_value)
            error = algorithm.critic(rollout["observation"]).squeeze(-1) - torch.tensor(target / std)
            torch.testing.assert_close(critic_loss, error.square().mean().float(), rtol=1e-5, atol=1e-6)
            log_prob = algorithm.actor(rollout["observation"].flatten(0, 1)).log_prob(rollout["action"].flatten())
            weighted = torch.tensor(advantage).view(-1, 1).float() * log_prob
            torch.testing.assert_close(actor_loss, -weighted.mean(), rtol=1e-4, atol=1e-4)
            algorithm.optimizer = None
            monkeypatch.setattr(algorithm, "step", lambda *_: None)
            algorithm.update(rollout, last_value)
        seen.append(target.flatten())
        std = np.sqrt(np.concatenate(seen).var() + 1e-8)
        assert float(algorithm.return_normalizer.inverse(torch.ones(()))) == pytest.approx(std, rel=1e-5)


# --- collection


class Zero(nn.Module):
    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(observation), 1)


def collector(env_id: str, steps, num_envs: int = 1, name: str = "vector", **kwargs):
    """Build a collector with a policy of zero actions."""
    env = make_env(EnvConfig(id=env_id, num_envs=num_envs, kwargs=kwargs), seed=0, copy=False)
    policy = TensorDictModule(Zero(), in_keys=["observation"], out_keys=["action"])
    return make_collector(name, env, policy, steps=steps)


@pytest.mark.parametrize(
    ("transitions", "episodes", "length", "expected"), [(1, 1, 5, 5), (12, 1, 5, 15), (1, 3, 5, 15), (1, 1, 600, 600)]
)
def test_whole_episodes(transitions, episodes, length, expected):
    """A rollout holds whole episodes, at least the required number, also if they are longer than a chunk."""
    rollouts = collector(
        "toy_envs:Counting-v0", WholeEpisodes(transitions=transitions, episodes=episodes), length=length
    )
    for number in range(3):
        rollout = rollouts.rollout()
        assert rollout.shape == (1, expected)
        assert rollout["observation"][0, :, 1].tolist() == [t % length for t in range(expected)]
        assert rollout["observation"][0, 0, 0] == number * expected // length  # no episode is skipped
        assert rollout["next", "done"].sum() == expected // length
        assert bool(rollout["next", "done"][0, -1])


def test_whole_episodes_need_one_env_and_the_vector_collector():
    with pytest.raises(ConfigError, match=r"env\.num_envs=2 must be 1"):
        collector("toy_envs:Counting-v0", WholeEpisodes(), num_envs=2)
    with pytest.raises(ConfigError, match="collector=vector"):
        collector("toy_envs:Counting-v0", WholeEpisodes(), name="torchrl")


def test_step_count_continues_across_rollouts():
    done = np.array([[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], dtype=bool)
    assert step_count(done, np.array([4, 0])).tolist() == [[4, 5, 6, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


def test_rollouts_have_step_counts_only_when_needed():
    overrides = ["algo=a2c", *POINT, "env.num_envs=3", "algo.steps_per_iteration=7"]
    _, loader = build_run(compose([*LATE, *overrides, "algo.discount_state_weighting=true"]))
    counts = torch.cat([next(loader)["step_count"] for _ in range(7)], 1)  # episodes have twenty steps
    assert counts.squeeze(-1).tolist() == [[t % 20 for t in range(49)]] * 3
    _, loader = build_run(compose([*LATE, *overrides]))
    assert "step_count" not in next(loader)


# --- distributions


@pytest.mark.parametrize("kind", ["categorical", "normal", "normal with a deviation of its own"])
def test_distributions_equal_those_of_torch(kind):
    torch.manual_seed(0)
    if kind == "categorical":
        (actual, reference), (other, their_other) = (
            (Categorical(logits), torch.distributions.Categorical(logits=logits)) for logits in torch.randn(2, 7, 4)
        )
    else:
        shape = (7, 3) if "own" in kind else (3,)
        pairs = []
        for _ in range(2):
            loc, log_std = torch.randn(7, 3), 0.3 * torch.randn(shape)
            normal = torch.distributions.Normal(loc, log_std.exp().expand(7, 3))
            pairs.append((Normal(loc, log_std), torch.distributions.Independent(normal, 1)))
        (actual, reference), (other, their_other) = pairs
    action = reference.sample()
    for a, b in (
        (actual.log_prob(action), reference.log_prob(action)),
        (actual.entropy(), reference.entropy()),
        (actual.kl(other), torch.distributions.kl_divergence(reference, their_other)),
    ):
        assert a.shape == (7, 1)
        torch.testing.assert_close(a.squeeze(-1), b, rtol=1e-5, atol=1e-6)
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(actual[rows].log_prob(action[rows]), actual.log_prob(action)[rows])


def test_sample_frequencies_match_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(40_000, 3)
    counts = Categorical(logits).sample().bincount(minlength=3) / 40_000
    torch.testing.assert_close(counts, logits[0].softmax(-1), rtol=0, atol=0.01)
    draws = Normal(torch.full((40_000, 2), 3.0), torch.tensor([0.0, -1.0])).sample()
    torch.testing.assert_close(draws.mean(0), torch.tensor([3.0, 3.0]), rtol=0, atol=0.03)
    torch.testing.assert_close(draws.std(0), torch.tensor([1.0, 0.3679]), rtol=0.03, atol=0)


# --- A2C and the online actor-critic


def test_with_one_env_a2c_is_the_online_actor_critic(tmp_path):
    """With `debug=lecture`, both have the same parameters over 100 steps, up to rounding."""
    common = [*LATE, "env=cartpole", "env.num_envs=1", "total_env_steps=100", "debug=lecture", "algo.hidden_sizes=[16]"]
    train(compose(["algo=a2c", *common, "algo.lr=0.01"]), tmp_path / "a2c")
    online = ["algo.online=true", "algo.episodes_per_update=0", "algo.average_over=transitions"]
    overrides = ["algo=actor_critic", *common, *online, "algo.actor_lr=0.01", "algo.critic_lr=0.01"]
    train(compose(overrides), tmp_path / "online")
    a2c, actor_critic = (saved_state(tmp_path / name)["state_dict"] for name in ("a2c", "online"))
    before = make_algorithm("algo=a2c", *common[len(LATE) :]).state_dict()
    assert a2c.keys() == actor_critic.keys()
    for name, value in a2c.items():
        torch.testing.assert_close(value, actor_critic[name], rtol=0, atol=1e-6)
        assert float((value - before[name]).abs().max()) > 1e-4


def test_debug_lecture_uses_one_trajectory_per_update(tmp_path):
    for algo in ("reinforce", "actor_critic"):
        overrides = [f"algo={algo}", "debug=lecture", *LATE, "env=cartpole", "total_env_steps=200", "log_every=1"]
        train(compose(overrides), tmp_path / algo)
        rows = [row for row in metrics(tmp_path / algo) if row["episode/count"]]  # not the row of the final evaluation
        assert len(rows) > 5
        assert all(float(row["episode/count"]) == 1 for row in rows)
        lengths = np.diff([0, *(int(row["env_steps"]) for row in rows)])
        assert [float(row["episode/length"]) for row in rows] == lengths.tolist()


# --- TRPO


def trpo_batch(algorithm, size: int = 64) -> TensorDict:
    """Return random transitions with random advantages."""
    batch = make_batch(algorithm, size)
    batch["advantage"] = torch.randn(size, 1, generator=torch.Generator().manual_seed(2))
    return batch


@pytest.mark.parametrize("env", ["pendulum", "cartpole"])
def test_fisher_vector_product_is_that_of_the_fisher_matrix(env):
    """F = E_s E_a[grad log pi(a|s) grad log pi(a|s)'], with an exact inner expectation (by sum or quadrature)."""
    damping = 0.1
    algorithm = make_algorithm(
        "algo=trpo", f"env={env}", "algo.hidden_sizes=[5]", f"algo.cg_damping={damping}"
    ).double()
    algorithm.actor.network[-1].weight.data.normal_()  # the initial policy is nearly constant
    observation = make_batch(algorithm, 12)["observation"].double()
    policy = algorithm.actor(observation)
    product = algorithm.fisher_vector_product(policy.detach().kl(policy).mean())
    size = sum(each.numel() for each in algorithm.actor_parameters)
    matrix = torch.stack([product(row) for row in torch.eye(size, dtype=torch.float64)]) - damping * torch.eye(
        size, dtype=torch.float64
    )

    def scores(index: int, action: torch.Tensor) -> torch.Tensor:
        one = algorithm.actor(observation[index : index + 1])
        return algorithm.flat_gradient(one.log_prob(action).sum())

    fisher = torch.zeros(size, size, dtype=torch.float64)
    for i in range(len(observation)):
        if env == "cartpole":
            for a, probability in enumerate(policy.log_probs[i].exp()):
                score = scores(i, torch.tensor([a]))
                fisher += float(probability) * torch.outer(score, score) / len(observation)
        else:  # five points of Gauss-Hermite quadrature integrate the polynomial of degree 4 exactly
            points, weights = np.polynomial.hermite_e.hermegauss(5)
            for x, weight in zip(points, weights / weights.sum(), strict=True):
                score = scores(i, (policy.loc[i] + x * policy.log_std.exp()).detach().unsqueeze(0))
                fisher += float(weight) * torch.outer(score, score) / len(observation)
    assert float(fisher.abs().max()) > 0.01
    torch.testing.assert_close(matrix, fisher, rtol=1e-8, atol=1e-10)


def test_conjugate_gradient_solves():
    torch.manual_seed(0)
    root = torch.randn(30, 30, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(30), torch.randn(30, dtype=torch.float64)
    x, residual = conjugate_gradient(lambda v: matrix @ v, b, iterations=60)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(residual, (matrix @ x - b).norm(), rtol=0, atol=1e-6)
    early, much = conjugate_gradient(lambda v: matrix @ v, b, iterations=3)
    torch.testing.assert_close(much, (matrix @ early - b).norm())
    assert much > residual
    zero, none = conjugate_gradient(lambda v: matrix @ v, torch.zeros(30, dtype=torch.float64), iterations=3)
    assert not zero.any()
    assert none == 0


@pytest.mark.parametrize("env", ["pendulum", "cartpole"])
@pytest.mark.parametrize("target_kl", [0.001, 0.05])
def test_the_step_stays_within_the_trust_region(env, target_kl):
    algorithm = make_algorithm("algo=trpo", f"env={env}", f"algo.target_kl={target_kl}")
    batch = trpo_batch(algorithm)
    old = algorithm.actor(batch["observation"]).detach()
    for _ in range(3):
        before = algorithm.actor(batch["observation"]).detach()
        algorithm.recorded.clear()
        algorithm.update(batch)
        kl = before.kl(algorithm.actor(batch["observation"])).mean()
        assert 0.2 * target_kl < kl <= target_kl
        torch.testing.assert_close(algorithm.recorded["kl"][0], kl.detach())
        assert algorithm.recorded["surrogate"][0] > 0
    assert old.kl(algorithm.actor(batch["observation"])).mean() > target_kl


def test_a_step_that_does_not_improve_is_not_taken():
    algorithm = make_algorithm("algo=trpo", "env=pendulum")
    batch = trpo_batch(algorithm)
    before = copy.deepcopy(algorithm.actor.state_dict())
    features, old = batch["observation"], algorithm.actor(batch["observation"]).detach()
    gradient = algorithm.flat_gradient(algorithm.surrogate(batch, algorithm.actor(features), old))
    _, _, tried = algorithm.line_search(batch, old, -gradient)
    assert tried == algorithm.line_search_steps + 1
    assert all(torch.equal(value, before[name]) for name, value in algorithm.actor.state_dict().items())


# --- PPO


def test_penalty_is_that_of_torchrl():
    algorithm = make_algorithm(
        "algo=ppo", "env=pendulum", "algo.penalty=kl", "algo.target_kl=0.01", "algo.initial_beta=0.7"
    )
    batch = make_batch(algorithm)
    actual, reference = (losses(algorithm, batch.clone()) for losses in (oracles.ppo_losses, oracles.ppo_oracle))
    # The critic losses differ: this loss of TorchRL does not clip values.
    for i in (0, 2):
        torch.testing.assert_close(actual[i], reference[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kl", "factor"), [(0.005, 0.5), (0.01, 1.0), (0.016, 2.0)])
def test_the_penalty_adapts(kl, factor):
    algorithm = make_algorithm("algo=ppo", "env=pendulum", "algo.penalty=kl", "algo.target_kl=0.01")
    algorithm.update_beta(torch.tensor(kl))
    assert algorithm.beta == factor


def test_the_penalty_stays_finite_and_positive():
    algorithm = make_algorithm("algo=ppo", "env=pendulum", "algo.penalty=kl", "algo.target_kl=0.01")
    for kl, bound in ((0.0, 1e-6), (1.0, 1e6)):
        for _ in range(200):
            algorithm.update_beta(torch.tensor(kl))
        torch.testing.assert_close(algorithm.beta, torch.tensor(bound))


def test_the_penalty_keeps_the_policy_close(tmp_path):
    overrides = ["algo=ppo", *POINT, *LATE, "total_env_steps=2000", "algo.steps_per_iteration=200", "algo.lr=3e-3"]
    overrides += ["algo.batch_size=50", "algo.penalty=kl", "algo.target_kl=0.003", "algo.initial_beta=0.1"]
    train(compose([*overrides, "log_every=200"]), tmp_path / "run")
    rows = [row for row in metrics(tmp_path / "run") if row["train/kl"]]
    assert float(rows[-1]["train/beta"]) > 0.1
    assert np.mean([float(row["train/kl"]) for row in rows[5:]]) < 0.03


def test_target_kl_ends_the_epochs(tmp_path):
    overrides = ["algo=ppo", *POINT, *LATE, "total_env_steps=200", "algo.steps_per_iteration=200", "algo.batch_size=50"]
    updates = {}
    for target in ("null", "1e-9", "1e9"):
        train(compose([*overrides, f"algo.target_kl={target}"]), tmp_path / target)
        updates[target] = saved_state(tmp_path / target)["levin"]["updates"]
    assert updates == {"null": 40, "1e-9": 4, "1e9": 40}


KL = ("algo.penalty=kl", "algo.target_kl=0.01")
EPISODES = ("env.num_envs=1", "algo.episodes_per_update=1", "algo.discount_state_weighting=true")


@pytest.mark.parametrize(
    ("algo", "overrides"),
    [
        ("ppo", ("algo.clip_schedule=linear", "env=cartpole")),
        ("ppo", ("algo.clip_schedule=linear", *KL)),
        ("actor_critic", ("algo.critic=q",)),  # samples an action in its loss
        ("actor_critic", EPISODES),
        ("a2c", ("env=gym", "env.id=toy_envs:Buttons-v0")),
        ("a2c", ("env=gym", "env.id=toy_envs:Robot-v0")),
    ],
)
def test_variants_are_compiled_once_as_well(algo, overrides, tmp_path):
    """With changing hyper-parameters, episodes of different lengths, and other spaces."""
    (row,) = (row for row in ROWS if row.algo == algo)
    compiled_and_eager_are_the_same(replace(row, small=(*row.small, *overrides)), tmp_path)


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler was not found"):
        make_algorithm("algo=ppo", "env=pendulum", "algo.compile=true")


def test_compiling_needs_the_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(ConfigError, match=r"Python\.h was not found: install them \(python3-dev"):
        make_algorithm("algo=ppo", "env=pendulum", "algo.compile=true")


def test_a_policy_that_was_trained_compiled_acts_without_a_compiler(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("levin.algorithms.base.compile_loss", lambda loss, *, dynamic: loss)
        train(compose([*TINY, "algo.compile=true", "total_env_steps=128"]), tmp_path / "run")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load_algorithm(tmp_path / "run").env_steps == 128
    (tmp_path / "result").mkdir()
    export_policy(tmp_path / "run", tmp_path / "result")
    shutil.copy(tmp_path / "run/config.yaml", tmp_path / "result")
    assert load_algorithm(tmp_path / "result").env_steps == 128


@pytest.mark.parametrize("algo", ["ppo", "a2c", "a3c"])
def test_pixels(algo, tmp_path):
    """The Nature CNN is trained, or the small one if the images are too small for it."""
    overrides = [f"algo={algo}", "env=gym", "env.id=toy_envs:Frames-v0", *LATE, "total_env_steps=16", "eval.episodes=1"]
    overrides += ["algo.steps_per_iteration=8", "env.num_envs=1", "env.normalize_observation=false"]
    overrides += ["trainer.workers=1"] if algo == "a3c" else ["env.normalize_reward=false"]
    overrides += ["algo.batch_size=8", "algo.epochs=1"] if algo == "ppo" else []
    train(compose(overrides), tmp_path / "run")
    before = make_algorithm(*overrides).state_dict()
    after = saved_state(tmp_path / "run")["state_dict"]
    assert not torch.equal(before["trunk.layers.0.weight"], after["trunk.layers.0.weight"])
    small = make_algorithm(f"algo={algo}", "env=gym", "env.id=toy_envs:Image-v0", *overrides[3:])
    assert (type(small.trunk), type(make_algorithm(*overrides).trunk)) == (SmallCNN, NatureCNN)


@pytest.mark.parametrize("algo", ["actor_critic", "a2c"])
def test_training_with_one_transition_per_update(algo, tmp_path):
    """Advantages of one transition have no standard deviation to be normalized by."""
    overrides = [
        f"algo={algo}",
        *LATE,
        "env=cartpole",
        "env.num_envs=1",
        "total_env_steps=5",
        "algo.steps_per_iteration=1",
    ]
    train(compose([*overrides, "algo.normalize_advantage=true", "eval.episodes=1"]), tmp_path / "run")


# --- schedules


def test_schedules_reach_zero(tmp_path):
    """The first iteration has the full learning rate; the rate after the last update is that of the last iteration."""
    overrides = ["algo=ppo", *POINT, *LATE, "algo.steps_per_iteration=50", "algo.batch_size=50", "algo.epochs=1"]
    algorithm = make_algorithm(*overrides, "total_env_steps=200")
    fractions = []
    for env_steps in (0, 50, 150, 200, 400):
        algorithm.iteration_begun = env_steps
        fractions.append(algorithm.remaining)
    assert fractions == [1.0, 0.75, 0.25, 0.0, 0.0]
    rates = {}
    for schedule in ("constant", "linear"):
        train(compose([*overrides, "total_env_steps=200", f"algo.lr_schedule={schedule}"]), tmp_path / schedule)
        (optimizer,) = saved_state(tmp_path / schedule)["optimizer_states"]
        rates[schedule] = optimizer["param_groups"][0]["lr"]
    assert rates == pytest.approx({"constant": 3e-4, "linear": 3e-4 * 0.25})


def test_resuming_with_a_larger_total_stretches_the_schedule(tmp_path, capsys):
    overrides = ["algo=ppo", *POINT, *LATE, "algo.steps_per_iteration=50", "algo.batch_size=50", "algo.epochs=1"]
    train(compose([*overrides, "total_env_steps=100"]), tmp_path / "run")
    resume.resume(run=str(tmp_path / "run"), total_env_steps=400)
    assert "algo.schedule_env_steps: 100 -> 400; annealed schedules change" in capsys.readouterr().out
    (optimizer,) = saved_state(tmp_path / "run")["optimizer_states"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(3e-4 * 50 / 400)


# --- invalid settings

WRONG = {
    "algo=actor_critic env=pendulum algo.critic=q algo.q_target=max": "algo.q_target=max needs discrete actions",
    "algo=actor_critic algo.average_over=episodes": "algo.average_over=episodes needs whole episodes",
    "algo=actor_critic algo.online=true": "algo.online=true learns from one step of one env",
    "algo=ppo env=pendulum algo.batch_size=60": "algo.batch_size=60 does not divide",
    "algo=trpo env=pendulum algo.batch_size=60": "algo.batch_size=60 does not divide",
    "algo=ppo env=pendulum algo.penalty=kl": "algo.penalty=kl needs a KL divergence to steer to",
    "algo=a3c algo.steps_per_iteration=0": "algo.steps_per_iteration=0: input should be greater than 0",
    "algo=a3c algo.t_max=0": "algo.t_max is unknown",
    "algo=reinforce env.num_envs=2": "env.num_envs=2 must be 1",
    "algo=reinforce algo.advantage=none": "algo.advantage=none",
    "algo=a2c trainer.workers=2": "trainer.workers=2 needs trainer.strategy=hogwild",
    "algo=a2c trainer.strategy=hogwild trainer.workers=2 trainer.threads=1": "several workers is for A3C",
    "algo=a3c trainer.threads=2": "trainer.threads=1",
    "algo=a3c env.normalize_observation=true": "running statistics can't be shared",
    "algo=a3c trainer.accelerator=gpu": "trainer.strategy=hogwild runs on the CPU",
    "algo=trpo debug=lecture": "debug=lecture is not for trpo; valid algorithms: a2c, actor_critic, reinforce",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_invalid_settings_are_config_errors(overrides):
    with pytest.raises(ConfigError) as error:
        build_run(compose(overrides.split()))
    assert WRONG[overrides] in str(error.value)
    assert "\n" not in str(error.value)


def test_log_probabilities_of_rollouts_are_in_full_precision():
    """Rollouts are collected in full precision, so the log-probabilities of their actions must be as well."""
    algorithm = build_row(next(row for row in ROWS if row.algo == "ppo"))
    seen = []
    algorithm.epoch = lambda data, *_: seen.append(data["log_prob"])
    batch = make_batch(algorithm).unsqueeze(1)
    algorithm.training_step(batch, 0)
    with torch.autocast("cpu", torch.bfloat16):
        algorithm.training_step(batch, 0)
        rounded = algorithm.evaluate(batch)[0]["log_prob"]
    exact = seen[0]
    assert all(torch.equal(each, exact) for each in seen)
    assert not torch.equal(rounded, exact)
