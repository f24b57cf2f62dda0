"""Action masks: forbidden actions are never taken nor valued, and everything else stays as it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from tensordict import TensorDict

import levin
from checks import build_algorithm, compiled_and_eager_are_the_same, mixed_precision_keeps_parameters_whole
from levin.collectors.factory import make_collector
from levin.collectors.torchrl import to_torchrl
from levin.collectors.uniform import random_return
from levin.config.compose import compose
from levin.core.errors import ConfigError, RunError
from levin.core.network_input import NetworkInput
from levin.core.spaces import ACTION_MASK, VECTOR, describe_space, forbids_all, mark_mask, random_allowed_actions
from levin.envs.config import EnvConfig
from levin.envs.factory import make_env
from levin.nn.distributions import Categorical, MultiCategorical
from levin.nn.encoders import make_trunk
from levin.nn.exploration import EpsilonGreedy
from levin.runs.load import export_policy
from levin.training import video
from levin.training.session import build_run, train
from rows import ROWS, Row
from short_runs import INTERVALS, check_resumed_run_is_identical

FORBIDDING = ("env=gym", "env.id=toy_envs:Forbidding-v0", "logger=csv", "algo.gamma=0.5", "eval.episodes=5")
INFO, PART = ("env.action_mask=info",), ("env.action_mask=legal", "+env.kwargs.where=legal")
CHOICES = (*INFO, "+env.kwargs.choices=true")
ONCE = ("eval.every=100_000", "checkpoint.every=100_000")
REPLAY = ("algo.learning_starts=200", "algo.hidden_sizes=[64]", "algo.batch_size=64")
FAST = {
    "dqn": (*REPLAY, "algo.lr=3e-3", "algo.replay_ratio=0.5", "algo.schedule_env_steps=3000", "total_env_steps=3000"),
    "sac_discrete": (
        *REPLAY,
        "algo.actor_lr=3e-3",
        "algo.critic_lr=3e-3",
        "algo.alpha_lr=3e-3",
        "total_env_steps=1500",
    ),
    "ppo": ("algo.steps_per_iteration=64", "env.num_envs=4", "total_env_steps=6000"),
    "a2c": ("env.num_envs=4", "total_env_steps=12_000"),
    "a3c": ("env.num_envs=4", "total_env_steps=12_000"),
    "trpo": ("algo.steps_per_iteration=256", "total_env_steps=6000"),
    "reinforce": ("algo.transitions_per_update=256", "total_env_steps=10_000"),
    "actor_critic": ("total_env_steps=10_000",),
}
TINY = (*FORBIDDING, "algo.hidden_sizes=[8]")
TINY_REPLAY = (*TINY, "algo.learning_starts=40", "algo.batch_size=16", "env.num_envs=2")
VARIANTS = [
    *((algo, INFO, ()) for algo in FAST),
    *((algo, PART, ()) for algo in ("dqn", "sac_discrete", "ppo", "a2c")),
    ("dqn", INFO, ("algo.double_q=true",)),
    ("actor_critic", INFO, ("algo.critic=q", "algo.q_target=max")),
    ("sac_discrete", CHOICES, ("algo.critic=state_action",)),
    ("ppo", CHOICES, ()),
]


@pytest.mark.parametrize(("algo", "form", "more"), VARIANTS)
def test_the_best_allowed_action_is_learned(algo, form, more, tmp_path):
    """The env raises if a forbidden action is taken: in random steps, by the policy, or in an evaluation.

    The best return is 8, or 16 with two choices in each step; random allowed actions have about 3, or 9.
    """
    words = [f"algo={algo}", *FORBIDDING, *ONCE, *FAST[algo], *form, *more]
    assert train(compose(words), tmp_path / "run") > (14 if form == CHOICES else 7)


def batch_with_masks(algorithm, size: int = 16) -> TensorDict:
    """Return transitions `[size]` of allowed actions in states with random masks."""
    torch.manual_seed(0)
    states = []
    for _ in range(2):
        mask = (torch.rand(size, 6) < 0.5).to(torch.int8)
        mask[torch.arange(size), torch.randint(6, (size,))] = 1
        states.append(TensorDict({VECTOR: torch.randn(size, 6), ACTION_MASK: mask}, [size]))
    after = {"observation": states[1], "reward": torch.randn(size, 1), "terminated": torch.rand(size, 1) < 0.3}
    after["observation"][ACTION_MASK][after["terminated"].squeeze(-1)] = 0  # as many envs do
    action = random_allowed_actions(Discrete(6), states[0][ACTION_MASK])
    return TensorDict({"observation": states[0], "action": action, "next": after}, [size])


@torch.no_grad()
def network_outputs(network, observation) -> torch.Tensor:
    """Return the outputs of a network for all actions, as without masks."""
    return network.network(observation[VECTOR])


@pytest.mark.parametrize("double_q", [False, True])
@torch.no_grad()
def test_targets_of_dqn_are_those_of_the_allowed_actions(double_q):
    algorithm = build_algorithm("algo=dqn", *TINY, *INFO, f"algo.double_q={double_q}")
    for parameter in algorithm.target_critic.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    batch = batch_with_masks(algorithm)
    online, target = (
        network_outputs(critic[1], batch["next", "observation"])
        for critic in (algorithm.critic, algorithm.target_critic)
    )
    taken = network_outputs(algorithm.critic[1], batch["observation"])
    errors = []
    for i in range(len(batch)):
        value = 0.0
        if not batch["next", "terminated"][i]:
            allowed = batch["next", "observation", ACTION_MASK][i].nonzero().flatten().tolist()
            value = target[i, max(allowed, key=lambda a: (online if double_q else target)[i, a])]
        errors.append(taken[i, batch["action"][i]] - batch["next", "reward"][i, 0] - 0.5 * value)
    loss, q_value, _ = algorithm.critic_loss(batch)
    torch.testing.assert_close(loss, torch.stack(errors).square().mean())
    torch.testing.assert_close(q_value, taken.gather(1, batch["action"].unsqueeze(1)).mean())


@pytest.mark.parametrize("q_target", ["max", "expected"])
@torch.no_grad()
def test_targets_of_actor_critic_are_those_of_the_allowed_actions(q_target):
    algorithm = build_algorithm("algo=actor_critic", *TINY, *INFO, "algo.critic=q", f"algo.q_target={q_target}")
    batch = batch_with_masks(algorithm)
    state = batch["next", "observation"]
    q, logits = algorithm.critic.network(state[VECTOR]), network_outputs(algorithm.actor.network, state)
    expected = []
    for i in range(len(batch)):
        allowed, value = state[ACTION_MASK][i].bool(), 0.0
        if not batch["next", "terminated"][i]:
            probs = torch.ones(1) if q_target == "max" else logits[i, allowed].softmax(-1)
            value = (probs * (q[i, allowed].max() if q_target == "max" else q[i, allowed])).sum()
        expected.append(batch["next", "reward"][i, 0] + 0.5 * value)
    torch.testing.assert_close(algorithm.value_target(batch).squeeze(1), torch.stack(expected))


@torch.no_grad()
def test_losses_of_discrete_sac_are_sums_over_the_allowed_actions():
    algorithm = build_algorithm("algo=sac_discrete", *TINY, *INFO, "algo.initial_alpha=0.3", "algo.hidden_sizes=[8]")
    for parameter in algorithm.actor.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    batch = batch_with_masks(algorithm)
    critic_terms, actor_terms, entropies, alpha_terms = [], [], [], []
    for i, row in enumerate(batch):
        values = []
        for state, critic in ((row["observation"], "critic"), (row["next", "observation"], "target_critic")):
            allowed = state[ACTION_MASK].bool()
            logits = network_outputs(algorithm.actor.network, state)[allowed]
            policy = torch.distributions.Categorical(logits=logits)
            q = getattr(algorithm, critic)[1].network(state[VECTOR].unsqueeze(0)).amin(0)[0]
            values.append((policy, q[allowed] if allowed.any() else None))
        (policy, q), (_, next_q) = values
        value = torch.zeros(())
        if next_q is not None and not batch["next", "terminated"][i]:
            value = (values[1][0].probs * (next_q - 0.3 * values[1][0].logits)).sum()
        target = batch["next", "reward"][i, 0] + 0.5 * value
        taken = algorithm.critic[1].network(row["observation", VECTOR].unsqueeze(0))[:, 0, row["action"]]
        critic_terms.append((taken - target).square().sum())
        actor_terms.append(-(policy.probs * q).sum() - 0.3 * policy.entropy())
        entropies.append(policy.entropy())
        alpha_terms.append(0.3 * (policy.entropy() - 0.98 * np.log(len(q))))
    torch.testing.assert_close(algorithm.critic_loss(batch)[0], torch.stack(critic_terms).mean())
    actor_loss, entropy = algorithm.actor_loss(batch)
    torch.testing.assert_close(actor_loss, torch.stack(actor_terms).mean())
    torch.testing.assert_close(entropy.squeeze(1), torch.stack(entropies))
    alpha_loss = algorithm.alpha_loss(entropy, batch["observation", ACTION_MASK])
    torch.testing.assert_close(alpha_loss, torch.stack(alpha_terms).mean())


def test_the_temperature_of_discrete_sac_steers_to_the_entropy_of_the_allowed_actions():
    """A policy that is uniform over them is steered to less entropy, and one without a choice to nothing."""
    algorithm = build_algorithm("algo=sac_discrete", *TINY, *INFO)
    batch = batch_with_masks(algorithm)
    for parameter in algorithm.actor.parameters():
        parameter.data.zero_()
    algorithm.update(batch)
    assert algorithm.log_alpha.grad > 0
    other = build_algorithm("algo=sac_discrete", *TINY, *INFO)
    batch["observation", ACTION_MASK] = torch.eye(6, dtype=torch.int8)[batch["action"]]
    other.update(batch)
    assert other.log_alpha.grad == 0


@pytest.mark.parametrize(("form", "sizes"), [(INFO, [6]), (CHOICES, [2, 4])])
def test_distributions_equal_those_over_the_allowed_actions_alone(form, sizes):
    """Log-probability, entropy and KL, as in MaskablePPO; forbidden logits get no gradient."""
    policy, other = (build_algorithm("algo=ppo", *TINY, *form, f"seed={seed}") for seed in (0, 1))
    batch = batch_with_masks(policy, 40)
    observation, mask = batch["observation"], batch["observation", ACTION_MASK]
    mask[forbids_all(mask.numpy(), policy.env["action"])] = 1
    space = Discrete(6) if len(sizes) == 1 else MultiDiscrete(sizes)
    action = random_allowed_actions(space, mask)
    got, other_got = (each.actor(each.trunk(observation)) for each in (policy, other))
    assert isinstance(got, Categorical if len(sizes) == 1 else MultiCategorical)
    logits, other_logits = (network_outputs(each.actor.network, observation) for each in (policy, other))
    log_prob, entropy, kl = (torch.zeros(40) for _ in range(3))
    for i in range(40):
        start = 0
        for size, choice in zip(sizes, action.view(40, -1)[i], strict=True):
            allowed = mask[i, start : start + size].bool()
            p, q = (
                torch.distributions.Categorical(logits=each[i, start : start + size][allowed])
                for each in (logits, other_logits)
            )
            log_prob[i] += p.log_prob(allowed[:choice].sum())
            entropy[i] += p.entropy()
            kl[i] += torch.distributions.kl_divergence(p, q)
            start += size
    torch.testing.assert_close(got.log_prob(action).squeeze(1), log_prob)
    torch.testing.assert_close(got.entropy().squeeze(1), entropy)
    torch.testing.assert_close(got.kl(other_got).squeeze(1), kl)
    raw = logits.clone().requires_grad_()
    policy.actor.network.network.forward = lambda _: raw
    distribution = policy.actor(policy.trunk(observation))
    (distribution.log_prob(action).sum() + distribution.entropy().sum() + distribution.kl(other_got).sum()).backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    assert (raw.grad[mask == 0] == 0).all()
    assert (raw.grad[mask == 1] != 0).any()


def test_networks_do_not_read_the_mask():
    algorithm = build_algorithm("algo=ppo", *TINY, *INFO)
    one, other = batch_with_masks(algorithm)["observation"], batch_with_masks(algorithm)["observation"]
    other[ACTION_MASK] = 1 - other[ACTION_MASK]
    assert torch.equal(*(algorithm.critic(algorithm.trunk(each)) for each in (one, other)))
    for each in (one, other):
        allowed = each[ACTION_MASK] == 1
        logits = algorithm.actor(algorithm.trunk(each)).logits[allowed]
        torch.testing.assert_close(logits, network_outputs(algorithm.actor.network, each)[allowed])


def test_normalisation_leaves_the_mask_alone():
    algorithm = build_algorithm("algo=ppo", *TINY, *INFO, "env.normalize_observation=true")
    observation = batch_with_masks(algorithm)["observation"]
    normalizer = algorithm.observation_normalizer
    normalizer.update(3 + 2 * observation.unsqueeze(0).apply(lambda part: part.float()))
    normalized = normalizer(observation)
    assert torch.equal(normalized[ACTION_MASK], observation[ACTION_MASK])
    assert not torch.equal(normalized[VECTOR], observation[VECTOR])


MASKS = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0]], dtype=torch.int8)


def assert_uniform(actions: torch.Tensor, mask: torch.Tensor) -> None:
    """Check that actions `[M]` are uniform among those allowed by a mask `[A]`."""
    share = torch.bincount(actions, minlength=len(mask)) / len(actions)
    torch.testing.assert_close(share, mask / mask.sum(), atol=0.03, rtol=0)
    assert (share[mask == 0] == 0).all()


def test_random_actions_are_uniform_among_those_allowed():
    torch.manual_seed(0)
    many = MASKS.repeat_interleave(4000, 0)
    values = torch.randn(len(many), 6).masked_fill(many == 0, -1e9)
    single, greedy = random_allowed_actions(Discrete(6), many), EpsilonGreedy(1.0, action_masks=True)(values)
    for actions in (single, greedy):
        for chosen, mask in zip(actions.split(4000), MASKS, strict=True):
            assert_uniform(chosen, mask)
    several = MASKS[[0, 2]].repeat_interleave(4000, 0)
    for chosen, mask in zip(
        random_allowed_actions(MultiDiscrete([2, 4]), several).split(4000), MASKS[[0, 2]], strict=True
    ):
        assert_uniform(chosen[:, 0], mask[:2])
        assert_uniform(chosen[:, 1], mask[2:])


def test_some_actions_of_epsilon_greedy_are_the_best_allowed():
    torch.manual_seed(0)
    values = torch.tensor([[1.0, 3.0, 2.0, -1e9, -1e9, -1e9]]).expand(8000, -1)
    share = torch.bincount(EpsilonGreedy(0.3, action_masks=True)(values)) / 8000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.8, 0.1]), atol=0.02, rtol=0)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("form", [INFO, PART])
@pytest.mark.parametrize("collector", ["vector", "torchrl"])
def test_rollouts_hold_the_masks_that_the_env_gave(collector, form, vectorization):
    """With random actions and those of a policy; the masks of last states are the true ones."""
    words = ["algo=ppo", *TINY, *form, "env.num_envs=3", "algo.steps_per_iteration=40", "algo.batch_size=120"]
    algorithm, loader = build_run(compose([*words, f"env.vectorization={vectorization}"]))
    env = loader.collector.env if collector == "vector" else make_env(loader.env.config, seed=0)
    loop = make_collector(collector, env, algorithm.policy(), steps=40, random_env_steps=60)
    rollout = next(iter(loop.iterator()))
    loop.shutdown()
    mask, after = rollout["observation", ACTION_MASK], rollout["next", "observation", ACTION_MASK]
    assert mask.dtype == torch.int8
    assert mask.gather(-1, rollout["action"].unsqueeze(-1)).all()
    assert torch.equal(mask == 1, rollout["observation", VECTOR] < 2)  # forbidden actions are shown as 2
    terminated, truncated, done = (rollout["next", key].squeeze(-1) for key in ("terminated", "truncated", "done"))
    assert terminated.any()
    assert truncated.any()
    assert not after[terminated].any()
    assert torch.equal(after[~terminated] == 1, rollout["next", "observation", VECTOR][~terminated] < 2)
    goes_on = ~done[:, :-1]
    assert torch.equal(after[:, :-1][goes_on], mask[:, 1:][goes_on])


@pytest.mark.parametrize("collector", ["torchrl", "torchrl-process"])
def test_other_collectors_obey_masks(collector, tmp_path):
    """In random steps, with actions of a policy, and with several choices."""
    words = ["algo=sac_discrete", *TINY_REPLAY, *CHOICES, "algo.critic=state_action", f"collector={collector}", *ONCE]
    train(compose([*words, "total_env_steps=256"]), tmp_path / "run")


@pytest.mark.parametrize("num_envs", [1, 2, 3])
def test_masks_of_two_actions_pass_through_torchrl(num_envs):
    """TorchRL takes two masks of two actions for one mask of pairs of choices."""
    config = EnvConfig(id="toy_envs:TwoActions-v0", action_mask="info")
    env = to_torchrl(make_env(config, seed=0, num_envs=num_envs), is_first=True)
    now = env.reset()
    for _ in range(10):
        _, now = env.step_and_maybe_reset(env.rand_action(now))
        assert now["observation", ACTION_MASK].shape == (num_envs, 2)
    env.close()


@pytest.mark.parametrize("batch", ["null", "2"])
@pytest.mark.parametrize("algo", ["dqn", "a2c"])
def test_masks_of_torchrl_envs_are_obeyed(algo, batch, tmp_path):
    words = [f"algo={algo}", "env=torchrl", "env.target=toy_torchrl:line", "env.action_mask=action_mask", *ONCE]
    words += ["+env.kwargs.choices=categorical", "+env.kwargs.mask=true", f"+env.kwargs.batch={batch}"]
    words += ["env.num_envs=2", "env.time_limit=10", "algo.hidden_sizes=[8]", "logger=csv", "eval.episodes=2"]
    train(compose([*words, "total_env_steps=400"]), tmp_path / "run")


RESUMED = {
    "dqn": (*TINY_REPLAY, *INFO, "algo.schedule_env_steps=448"),
    "dqn, async": (*TINY_REPLAY, *PART, "env.vectorization=async", "algo.schedule_env_steps=448"),
    "sac_discrete": (*TINY_REPLAY, *CHOICES, "algo.critic=state_action", "env.normalize_observation=true"),
    "ppo": (*TINY, *INFO, "algo.steps_per_iteration=32", "algo.batch_size=32", "algo.schedule_env_steps=448"),
    "a2c": (*TINY, *PART),
    "a2c, uneven episodes": (*TINY, *INFO, "+env.kwargs.uneven=true", "env.num_envs=3"),
}


def masked_row(algo: str) -> Row:
    """Return the row of an algorithm, in an env with masks."""
    row = next(each for each in ROWS if each.algo == algo)
    return replace(row, env="gym", small=(*row.small, *FORBIDDING[1:], *INFO))


@pytest.mark.parametrize("algo", ["dqn", "sac_discrete", "ppo", "a2c"])
def test_compiled_losses_with_masks_are_the_same(algo, tmp_path):
    compiled_and_eager_are_the_same(masked_row(algo), tmp_path)


@pytest.mark.parametrize("algo", ["dqn", "sac_discrete", "ppo", "a2c"])
def test_masks_are_obeyed_in_mixed_precision(algo, tmp_path):
    mixed_precision_keeps_parameters_whole(masked_row(algo), tmp_path)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_with_masks_is_identical(name, tmp_path):
    check_resumed_run_is_identical(tmp_path, (f"algo={name.split(',')[0]}", *RESUMED[name], *INTERVALS), 448)


@pytest.mark.parametrize("form", [INFO, PART, CHOICES])
def test_a_loaded_policy_obeys_masks(form, tmp_path):
    train(compose(["algo=a2c", *TINY, *form, *ONCE, "total_env_steps=40"]), tmp_path / "run")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.yaml").write_text((tmp_path / "run" / "config.yaml").read_text())
    export_policy(tmp_path / "run", tmp_path / "exported")
    policies = levin.load(tmp_path / "run"), levin.load(tmp_path / "exported")
    masks = np.array([[1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 0]], np.int8)
    values = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)

    def act(policy, values, mask):
        return policy({"legal": mask, "values": values}) if form == PART else policy(values, action_mask=mask)

    actions = [act(policy, values, masks) for policy in policies]
    np.testing.assert_array_equal(*actions)
    for i, action in enumerate(actions[0]):
        chosen = [int(action[0]), 2 + int(action[1])] if form == CHOICES else [int(action)]
        assert masks[i, chosen].all()
        np.testing.assert_array_equal(act(policies[0], values[i], masks[i]), action)
    with pytest.raises(ValueError, match=r"trained with action masks: call policy\(observation, action_mask=mask\)"):
        policies[0](values[0])
    with pytest.raises(ValueError, match="the action mask allows no action"):
        act(policies[0], values[0], 0 * masks[0])


def test_videos_are_played_with_masks(tmp_path, monkeypatch):
    train(compose(["algo=dqn", *TINY_REPLAY, *INFO, *ONCE, "total_env_steps=40"]), tmp_path / "run")
    monkeypatch.setattr(video, "_render_frame", lambda env: env.env.envs[0].unwrapped.step_number)
    env = make_env(EnvConfig(id="toy_envs:Forbidding-v0", action_mask="info"), seed=0, num_envs=1)
    policy = levin.load(tmp_path / "run")
    assert list(video.play(policy, env, 0, 100, [])) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(video.play(policy, env, 0, 100, [], every=3)) == [1, 4, 7]


@pytest.mark.parametrize("choices", [False, True])
def test_the_return_of_uniform_actions_obeys_masks(choices):
    config = EnvConfig(id="toy_envs:Forbidding-v0", action_mask="info", kwargs={"choices": choices})
    assert random_return(config, 0) == random_return(config, 0)


FAULTS = {
    "missing": r"needs info\['action_mask'\] of every reset and step, and got none",
    "short": r"info\['action_mask'\] has the shape \(5,\); valid: \(6,\), one per action",
    "empty": "failed: the action mask allows no action: return a mask with a 1, or terminated=True; env 0, step 2 of ",
    "two": "failed: the action mask holds 2; valid: 1 for allowed actions, else 0; env 0, step 2 of episode 0",
    "cut": "allows no action, but a truncated episode bootstraps from its last state: return a mask with a 1, or ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_mask_is_an_error_of_one_sentence(fault):
    env = make_env(EnvConfig(id="toy_envs:Forbidding-v0", action_mask="info", kwargs={"fault": fault}), seed=0)
    observation, _ = env.reset()
    observation, *_ = env.step(random_allowed_actions(Discrete(6), torch.from_numpy(observation[ACTION_MASK])).numpy())
    action = random_allowed_actions(Discrete(6), torch.from_numpy(observation[ACTION_MASK])).numpy()
    with pytest.raises(RunError, match=FAULTS[fault]) as raised:
        env.step(action)
    assert "\n" not in str(raised.value)


def test_several_choices_need_an_allowed_value_each():
    action = {"nvec": [2, 4]}
    masks = np.array([[1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], np.int8)
    assert forbids_all(masks, action).tolist() == [False, True, True]
    assert forbids_all(masks, {}).tolist() == [False, False, False]


REFUSED = [
    (("algo=sac", "env=pendulum", *INFO), "is for Discrete and MultiDiscrete actions, but the env's are a Box"),
    (("algo=ppo", "env=pendulum", "env.action_mask=mask"), "is for Discrete and MultiDiscrete actions"),
    (("algo=dreamer_v3", *FORBIDDING, *INFO), "DreamerV3 does not obey action masks: set env.action_mask=null"),
    (
        ("algo=dqn", "env=cartpole", "env.action_mask=legal"),
        "legal names no part of the env's observation, which is not",
    ),
    (("algo=dqn", *FORBIDDING, "env.action_mask=lega", "+env.kwargs.where=legal"), "a Dict with legal, values; valid"),
    (("algo=dqn", *FORBIDDING, "env.action_mask=values", "+env.kwargs.where=legal"), None),
    (("algo=dqn", *FORBIDDING, *CHOICES), "acts in discrete action spaces"),
    (("algo=dqn", *FORBIDDING, *INFO, "env.action_repeat=2"), "does not go with env.action_repeat=2"),
    (("algo=dqn", *FORBIDDING, *INFO, "env.wrappers=[latent]"), "does not go with env.wrappers"),
    (("algo=dqn", "env=pong", *INFO), "is not for env.family=atari"),
    (
        ("algo=dqn", "env=torchrl", "env.target=toy_torchrl:line", *INFO),
        "needs infos, which TorchRL's envs do not have",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_settings_without_masks_are_refused(words, message):
    if message is None:  # any vector of the right size may be a mask; its numbers are checked when it is read
        with pytest.raises(RunError, match="the action mask holds 2"):
            next(build_run(compose(list(words)))[1])
        return
    with pytest.raises(ConfigError, match=message):
        build_run(compose(list(words)))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Dict(mask=MultiBinary(5), x=Box(0, 1, (2,))), r"has the shape \[5\], but the env has 6 actions"),
        (Dict(mask=Discrete(6), x=Box(0, 1, (2,))), r"has the shape \[\], but the env has 6 actions"),
        (Dict(mask=MultiBinary(6)), "is the only part of the env's observation"),
    ],
)
def test_a_part_that_can_not_be_a_mask_is_refused(space, message):
    with pytest.raises(ConfigError, match=message):
        mark_mask(describe_space(space), "mask", 6)


def test_a_mask_may_stand_beside_pixels():
    space = Dict(camera=Box(0, 255, (36, 36, 3), np.uint8), mask=Box(0, 1, (4,)), speed=Box(0, 1, (2,)))
    read = NetworkInput(mark_mask(describe_space(space), "mask", 4))
    assert list(read.space["spaces"]) == ["camera", VECTOR, ACTION_MASK]
    space.seed(0)
    shown = {name: part[None] for name, part in space.sample().items()} | {"mask": np.ones((1, 4))}
    batch = {name: torch.from_numpy(part) for name, part in read(shown).items()}
    action = describe_space(Discrete(4))
    trunk, num_features = make_trunk({"observation": read.space, "action": action}, "mlp")
    features = trunk(batch)
    assert features.shape == (1, num_features + 4)
    assert num_features == 512 + 2
    assert features[0, -4:].tolist() == [1, 1, 1, 1]
