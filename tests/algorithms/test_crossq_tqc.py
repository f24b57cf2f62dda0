"""CrossQ's batch renormalisation and joint batch, and TQC's quantiles."""

import pytest
import torch
from torch import nn

import oracles
from checks import build_algorithm, make_batch
from levin.algorithms.crossq_networks import BatchRenorm
from rows import LATE


def make_algorithm(algo: str, *overrides: str):
    """Build an algorithm with small networks and its optimizers, without a Trainer."""
    small = ("algo.hidden_sizes=[8]", "algo.critic_hidden_sizes=[8]", "algo.batch_size=8")
    return build_algorithm(f"algo={algo}", "env=pendulum", *LATE, *small, *overrides)


def norms(network: nn.Module) -> list[BatchRenorm]:
    """Return the norms of a network."""
    return [layer for layer in network.modules() if isinstance(layer, BatchRenorm)]


# --- batch renormalisation


def test_in_its_warm_up_it_is_batch_normalisation():
    """The running variance of PyTorch's norm is the unbiased one, and Flax's and ours the other."""
    ours, theirs = BatchRenorm(1, 4, 0.9, warm_up=3), nn.BatchNorm1d(4, eps=1e-3, momentum=0.1)
    var = torch.ones(4)
    for step in range(3):
        batch = 2 * torch.randn(6, 4) + step
        torch.testing.assert_close(ours(batch.unsqueeze(0), training=True)[0], theirs(batch), rtol=1e-5, atol=1e-5)
        var = 0.9 * var + 0.1 * batch.var(0, correction=0)
    torch.testing.assert_close(ours.mean.flatten(), theirs.running_mean)
    torch.testing.assert_close(ours.var.flatten(), var)
    theirs.running_var.copy_(var)
    torch.testing.assert_close(ours(batch.unsqueeze(0), training=False)[0], theirs.eval()(batch), rtol=1e-5, atol=1e-5)
    assert int(ours.count) == 3


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])  # r is clipped from below, not at all, from above
@pytest.mark.parametrize("training", [True, False])
def test_batch_renorm_is_that_of_a_loop(spread, training):
    layer = BatchRenorm(2, 3, 0.9, warm_up=0)
    layer.mean += torch.randn(2, 1, 3)
    layer.scale.data += torch.rand(2, 1, 3)
    layer.bias.data += torch.randn(2, 1, 3)
    inputs = (spread * torch.randn(2, 7, 3) + torch.tensor([0.0, 2.0, 20.0])).requires_grad_()
    expected = torch.stack([oracles.batch_renorm(layer, i, inputs[i], training=training) for i in range(2)])
    weight = torch.randn(2, 7, 3)
    variables = [inputs, layer.scale, layer.bias]
    gradients = torch.autograd.grad((weight * expected).sum(), variables)
    actual = layer(inputs, training=training)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for each, other in zip(torch.autograd.grad((weight * actual).sum(), variables), gradients, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-3, atol=1e-4)


def test_after_its_warm_up_it_normalises_by_the_running_statistics():
    """While r and d are within their bounds, (x - m) / s r + d is (x - M) / S."""
    layer, inputs = BatchRenorm(1, 3, 0.99, warm_up=0), torch.randn(1, 50, 3)
    layer.mean.fill_(0.5), layer.var.fill_(1.5)
    expected = layer(inputs, training=False)
    torch.testing.assert_close(layer(inputs, training=True), expected)


# --- CrossQ


def test_the_statistics_of_the_critics_are_those_of_both_halves_of_the_batch():
    algorithm = make_algorithm("crossq", "algo.norm_momentum=0")
    batch = make_batch(algorithm, 16)
    batch["next", "observation"] += 5
    before = [layer.mean.clone() for layer in norms(algorithm.actor)]
    algorithm.critic_loss(batch)
    both = torch.cat([batch["observation"], batch["next", "observation"]])
    for mean in norms(algorithm.critic)[0].mean[:, 0]:
        torch.testing.assert_close(mean[:3], both.mean(0))
    assert all(int(layer.count) == 1 for layer in norms(algorithm.critic))
    assert all(map(torch.equal, before, (layer.mean for layer in norms(algorithm.actor)))), "actions are sampled"


def test_the_actor_loss_leaves_the_statistics_of_the_critics():
    algorithm = make_algorithm("crossq")
    batch, before = make_batch(algorithm, 16), [layer.mean.clone() for layer in norms(algorithm.critic)]
    algorithm.actor_loss(batch)
    assert all(map(torch.equal, before, (layer.mean for layer in norms(algorithm.critic))))
    assert all(int(layer.count) == 1 for layer in norms(algorithm.actor))


def test_acting_does_not_change_the_statistics():
    algorithm = make_algorithm("crossq")
    policy, observation = algorithm.policy(deterministic=True).module, torch.randn(5, 3)
    one, many = policy(observation[:1]), policy(observation)
    torch.testing.assert_close(one, many[:1])
    assert not any(int(layer.count) for layer in norms(algorithm.actor))


def test_no_gradient_flows_into_the_target():
    """With a constant critic, a reward of 1 and no discount, y = q + 1."""
    algorithm = make_algorithm("crossq", "algo.gamma=1", "algo.initial_alpha=1e-8")
    last = algorithm.critic.network.layers[-1]
    last.weight.data.zero_(), last.bias.data.fill_(3.0)
    batch = make_batch(algorithm, 16)
    batch["next", "reward"].fill_(1.0)
    loss, _ = algorithm.critic_loss(batch)
    (gradient,) = torch.autograd.grad(loss, last.bias)
    torch.testing.assert_close(gradient.flatten(), torch.full((2,), -1.0))  # q - y


def test_adam_beta1_is_not_that_of_the_temperature():
    algorithm = make_algorithm("crossq", "algo.adam_beta1=0.7")
    assert algorithm.critic_optimizer.param_groups[0]["betas"] == (0.7, 0.999)
    assert [group["betas"][0] for group in algorithm.actor_optimizer.param_groups] == [0.7, 0.9]


# --- TQC


def test_the_quantile_loss_is_smallest_at_the_quantiles():
    """The quantiles of a wide uniform distribution, for which the rounding of Huber's loss is narrow."""
    algorithm = make_algorithm("tqc", "algo.num_atoms=5")
    target = torch.linspace(0, 1000, 2001).unsqueeze(0)
    atoms = torch.tensor([[[100.0, 300, 500, 700, 900]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(algorithm.quantile_loss(atoms, target), atoms)
    (shifted,) = torch.autograd.grad(algorithm.quantile_loss(atoms + 50, target), atoms)
    assert gradient.abs().max() < 1e-3
    assert shifted.min() > 5e-3


@pytest.mark.parametrize("dropped", [0, 2, 4])
def test_targets_leave_out_the_largest_atoms_of_the_mixture(dropped):
    """The two critics of the target differ so much that the dropped atoms are all of the second."""
    algorithm = make_algorithm("tqc", "algo.num_atoms=5", f"algo.dropped_atoms={dropped}", "algo.gamma=1")
    algorithm.log_alpha.data.fill_(-100.0)
    for critic in (algorithm.critic, algorithm.target_critic):
        critic.ensemble.layers[-1].weight.data.zero_()
    values = torch.tensor([[0.0, 10, 20, 30, 40], [100.0, 110, 120, 130, 140]])
    algorithm.target_critic.ensemble.layers[-1].bias.data.copy_(values.unsqueeze(1))
    seen = []
    algorithm.quantile_loss = lambda atoms, target: seen.append(target) or atoms.mean()
    batch = make_batch(algorithm, 4)
    algorithm.critic_loss(batch)
    expected = batch["next", "reward"] + values.flatten()[: 10 - 2 * dropped]
    torch.testing.assert_close(seen[0], expected)


def test_the_actor_climbs_the_mean_of_all_atoms():
    algorithm = make_algorithm("tqc", "algo.num_atoms=5", "algo.dropped_atoms=4")
    algorithm.log_alpha.data.fill_(-100.0)
    last = algorithm.critic.ensemble.layers[-1]
    last.weight.data.zero_(), last.bias.data.copy_(torch.arange(10.0).view(2, 1, 5))
    loss, _ = algorithm.actor_loss(make_batch(algorithm, 4))
    assert loss.item() == pytest.approx(-4.5)
