"""DreamerV3: losses by hand, who learns from what, and its dreams."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.objectives import two_hot_decode, two_hot_encode

from dreams import Says
from dreams_v3 import drawn, make, with_noise
from levin.algorithms.dreamer_v3 import DreamerV3
from levin.algorithms.dreamer_v3_networks import categorical_kl, linear
from levin.data.sequences import LATENT
from levin.model_based.recurrent import State

# --- behaviour


def test_lambda_returns_by_hand():
    """r = 1, 2, 3 and v = 20, 30, 40 after the first state, discount 0.9, lambda 0.5."""
    algorithm = make("algo.return_lambda=0.5")
    values = iter([torch.tensor([10.0, 20, 30, 40]).view(1, 4, 1), torch.tensor([1.0, 2, 3]).view(1, 3, 1)])
    algorithm.two_hot.mean = lambda _: next(values)
    algorithm.model.continue_model = Says(torch.full((1, 4, 1), math.log(9.0)))
    target, value, weight = algorithm.lambda_return(torch.zeros(1, 4, algorithm.model.features), torch.zeros(1, 4, 255))
    assert target.flatten().tolist() == pytest.approx([24.8725, 33.05, 39.0])
    assert value.flatten().tolist() == [10.0, 20.0, 30.0]
    assert weight.flatten().tolist() == pytest.approx([0.9, 0.81, 0.729])


class Entry(torch.nn.Module):
    """One number of the feature."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, feature: Tensor) -> Tensor:
        return feature[..., self.place : self.place + 1]


def test_rewards_and_continues_are_those_of_the_state_that_follows():
    algorithm = make("algo.return_lambda=0.7")
    algorithm.two_hot.mean = lambda numbers: numbers
    algorithm.model.reward_model, algorithm.model.continue_model = Entry(0), Entry(1)
    feature, value = torch.randn(1, 5, algorithm.model.features), torch.randn(1, 5, 1)
    target, found, weight = algorithm.lambda_return(feature, value)
    r, c, v = feature[0, :, 0].tolist(), feature[0, :, 1].sigmoid().tolist(), value.flatten().tolist()
    wanted = [v[4]]
    for t in reversed(range(4)):
        wanted.insert(0, r[t + 1] + c[t + 1] * (0.3 * v[t + 1] + 0.7 * wanted[0]))
    assert target.flatten().tolist() == pytest.approx(wanted[:-1], rel=1e-4)
    assert found.flatten().tolist() == pytest.approx(v[:-1])
    assert weight.flatten().tolist() == pytest.approx([math.prod(c[: t + 1]) for t in range(4)], rel=1e-4)


def test_an_update_scales_returns_for_the_actor_alone():
    algorithm = make()
    with torch.no_grad():
        for head in (algorithm.critic, algorithm.model.reward_model):
            head[-1].weight.normal_()
    algorithm.return_range.copy_(torch.tensor([0.0, 50.0]))
    calls: dict[str, list] = {}

    def spied(name: str) -> None:
        real = getattr(algorithm, name)

        def spy(*given: Any) -> Any:
            result = real(*given)
            calls.setdefault(name, []).append((given, result))
            return result

        setattr(algorithm, name, spy)

    for name in ("lambda_return", "actor_loss", "value_loss", "replay_value_loss"):
        spied(name)
    algorithm.update(drawn(algorithm))
    ((_, (target, value, _)),) = calls["lambda_return"]
    scale = algorithm.return_range[1] - algorithm.return_range[0]
    assert scale > 10
    ((given, _),) = calls["actor_loss"]
    torch.testing.assert_close(given[2], target / scale)
    torch.testing.assert_close(given[3], value / scale)
    assert any(torch.equal(given[2], target) for given, _ in calls["value_loss"] if given[2].shape == target.shape)
    ((given, _),) = calls["replay_value_loss"]
    assert torch.equal(given[2], target[:, 0])


def test_an_update_gives_the_states_it_computed():
    algorithm = make()
    batch = drawn(algorithm)
    with_noise(0)
    with torch.no_grad():
        wanted = algorithm.model.pack(algorithm.observe(batch)[0])
    with_noise(0)
    assert torch.equal(algorithm.update(batch), wanted)


def test_the_model_loss_clamps_each_state():
    """One state whose KL is large among those whose KL is none: the mean of 1, 1, ..., and the large one."""
    algorithm = make("algo.representation_scale=0.5")
    batch = drawn(algorithm)
    state, posterior = algorithm.observe(batch)
    flat = torch.zeros_like(posterior).log_softmax(-1)
    posterior = flat.detach().clone()
    posterior[0, 0] = torch.tensor([5.0] + [0.0] * (posterior.shape[-1] - 1)).log_softmax(-1)
    algorithm.model.prior = lambda deter: flat.flatten(0, 1)
    large = categorical_kl(posterior, flat)[0, 0].item()
    assert large > 5
    found = [algorithm.model_loss(batch, state, posterior)[0].item()]
    algorithm.dynamics_scale = algorithm.representation_scale = 0.0
    found.append(algorithm.model_loss(batch, state, posterior)[0].item())
    assert found[0] - found[1] == pytest.approx(1.5 * (17 + large) / 18, rel=1e-3)


def test_the_terms_of_the_model_loss_by_hand():
    algorithm = make("algo.gamma=0.9")
    batch = drawn(algorithm)
    batch["is_terminal"][0, 3] = True  # one of 18
    state, posterior = algorithm.observe(batch)
    logits = torch.randn(18, 255)
    algorithm.model.prior = lambda deter: posterior.detach().flatten(0, 1)
    algorithm.model.reward_model = Says(logits)
    algorithm.model.continue_model = Says(torch.ones(18, 1))
    _, terms = algorithm.model_loss(batch, state, posterior)
    assert terms["kl"].item() == pytest.approx(0, abs=1e-6)
    continues = 17 / 18 * 0.9
    assert terms["continue_loss"].item() == pytest.approx(math.log1p(math.e) - continues, rel=1e-5)
    two_hot = two_hot_encode(batch["reward"][:, 1:].reshape(18, 1), algorithm.two_hot.bins).view(18, 255)
    wanted = -(two_hot * logits.log_softmax(-1)).sum(-1).mean()
    assert terms["reward_loss"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_observation_loss_by_hand():
    algorithm = make()
    numbers = torch.tensor([[math.e - 1, 0, 0], [0, 0, 1 - math.e**2]])  # 1 and -2 after symlog
    loss = algorithm.observation_loss({"": torch.zeros(2, 3)}, {"": numbers})
    assert loss.item() == pytest.approx((1 + 4) / 2)
    pixels = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    loss = algorithm.observation_loss({"": torch.full((2, 3, 64, 64), 0.5)}, {"": pixels})
    assert loss.item() == pytest.approx(0.25 * 3 * 64 * 64)
    both = algorithm.observation_loss({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, {"a": numbers, "b": numbers})
    assert both.item() == pytest.approx(5)


def test_the_state_encoder_reads_squeezed_numbers():
    algorithm, read = make(), []
    algorithm.model.encoders["_"].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    algorithm.model.embed(torch.tensor([[math.e - 1, 0, 1 - math.e**2]]))
    assert read[0].flatten().tolist() == pytest.approx([1, 0, -2])


@pytest.mark.parametrize(
    ("terminal", "last", "first", "wanted"),
    [
        ((), (), (), [24.8725, 33.05, 39.0]),
        ((2,), (2,), (3,), [10.9, 2.0, 39.0]),
        ((), (2,), (3,), [23.05, 29.0, 39.0]),
        ((), (), (3,), [23.05, 29.0, 39.0]),
    ],
)
def test_returns_of_replayed_rewards_by_hand(terminal, last, first, wanted):
    """As above with values 20, 30, 40 of what was imagined; an episode ends at the third record for good, or is cut.

    By its own end, or by a resume, which leaves no record of the end.
    """
    algorithm = make("algo.return_lambda=0.5", "algo.gamma=0.9")
    flags = {key: torch.zeros(1, 5, 1, dtype=torch.bool) for key in ("is_terminal", "is_last", "is_first")}
    for key, places in (("is_terminal", terminal), ("is_last", last), ("is_first", first)):
        for place in places:
            flags[key][:, 1 + place] = True
    batch = {"reward": torch.tensor([9.0, 0, 1, 2, 3]).view(1, 5, 1), **flags}
    asked = {}

    def value_loss(logits: Tensor, feature: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        asked.update(target=target, weight=weight)
        return target.sum()

    algorithm.value_loss = value_loss
    state = State(torch.zeros(1, 4, algorithm.model.deter), torch.zeros(1, 4, algorithm.model.stoch))
    algorithm.replay_value_loss(batch, state, torch.tensor([10.0, 20, 30, 40]).view(4, 1))
    assert asked["target"].flatten().tolist() == pytest.approx(wanted)
    assert asked["weight"].flatten().tolist() == [0.0 if i + 1 in first else 1.0 for i in range(3)]


def test_the_scale_of_returns():
    """Percentiles that stay 10 apart, of which the average begins at 0."""
    algorithm = make()
    returns = torch.linspace(-0.5, 1.0 + 0.5, 1001) * 10 / 0.9 / 2  # 5th to 95th percentile: 10
    found = {}
    for update in range(1, 501):
        found[update] = algorithm.return_scale(returns).item()
    for update, wanted in ((1, 1.0), (10, 1.0), (100, 6.339677), (500, 9.934295)):
        assert found[update] == pytest.approx(wanted, rel=1e-4)


def test_actor_loss_by_hand():
    algorithm = make("algo.entropy_coef=0.1")
    numbers = {"log_prob": -2.0, "entropy": 3.0, "target": 5.0, "value": 4.0, "weight": 0.5}
    given = {name: torch.tensor([[[value]]], requires_grad=True) for name, value in numbers.items()}
    loss = algorithm.actor_loss(**given)
    assert loss.item() == pytest.approx(-0.5 * (-2.0 * (5.0 - 4.0) + 0.1 * 3.0))
    loss.backward()
    assert given["target"].grad is None
    algorithm.actor_gradient = "dynamics"
    assert algorithm.actor_loss(**given).item() == pytest.approx(-0.5 * (5.0 + 0.1 * 3.0))


def test_value_loss_by_hand():
    """Cross-entropy with the return and with what the slow critic says, both as two bins."""
    algorithm = make()
    logits, slow = torch.randn(2, 255), torch.randn(2, 255)
    algorithm.slow_critic = Says(slow)
    target, weight = torch.tensor([[3.0], [-1.0]]), torch.tensor([[1.0], [0.25]])
    found = algorithm.value_loss(logits, torch.zeros(2, 1), target, weight)
    bins, log_probs = algorithm.two_hot.bins, logits.log_softmax(-1)
    of_slow = two_hot_decode(slow, bins).view(2, 1)
    wanted = [
        -(two_hot_encode(each, bins).view(2, 255) * log_probs).sum(-1, keepdim=True) for each in (target, of_slow)
    ]
    torch.testing.assert_close(found, (weight * (wanted[0] + wanted[1])).mean(), rtol=1e-4, atol=1e-4)


def moved_by(algorithm: DreamerV3, loss: Tensor) -> set[str]:
    """The parts of the algorithm that a loss has a gradient for."""
    algorithm.optimizer.zero_grad()
    for parameter in algorithm.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    loss.backward(retain_graph=True)
    named = ((name, each.grad) for name, each in algorithm.named_parameters() if each.grad is not None)
    return {".".join(name.split(".")[:2]) for name, grad in named if grad.any()}


@pytest.mark.parametrize("actor_gradient", ["reinforce", "dynamics"])
@pytest.mark.parametrize("env", ["pendulum", "cartpole"])
def test_who_learns_from_what(env, actor_gradient):
    algorithm = make(f"env={env}", f"algo.actor_gradient={actor_gradient}", "env.num_envs=1")
    with torch.no_grad():  # what predicts 0 at first teaches nothing
        for head in (algorithm.critic, algorithm.model.reward_model, algorithm.slow_critic):
            head[-1].weight.normal_()
    batch = drawn(algorithm)
    state, posterior = algorithm.observe(batch)
    model_loss, _ = algorithm.model_loss(batch, state, posterior)
    start = State(*(part.detach().flatten(0, 1) for part in state))
    feature, log_prob, entropy = algorithm.imagine(start)
    assert feature.requires_grad == (actor_gradient == "dynamics")
    logits = algorithm.critic(feature.detach())
    target, value, weight = algorithm.lambda_return(feature, logits)
    actor_loss = algorithm.actor_loss(log_prob, entropy, target, value, weight)
    value_loss = algorithm.value_loss(logits[:, :-1], feature[:, :-1].detach(), target.detach(), weight)
    replayed = algorithm.replay_value_loss(batch, state, target[:, 0].detach())
    assert {name.split(".")[0] for name in moved_by(algorithm, actor_loss)} == {"actor"}
    assert {name.split(".")[0] for name in moved_by(algorithm, value_loss)} == {"critic"}
    assert {name.split(".")[0] for name in moved_by(algorithm, model_loss)} == {"model"}
    found = moved_by(algorithm, replayed)
    assert {"model.encoders", "model.gru", "critic.0", "critic.6"} <= found
    assert not {"model.reward_model", "model.prior_head", "actor.network"} & found


def test_the_dream_is_differentiated_through_the_memory():
    """Of a policy that sees nothing; with the way of actions into the model cut, only the first reward is left."""
    found = []
    for cut in (False, True):
        algorithm = make("algo.actor_gradient=dynamics", "algo.entropy_coef=0")
        with torch.no_grad():
            for head in (algorithm.critic, algorithm.model.reward_model):
                head[-1].weight.normal_()
            if cut:
                algorithm.model.gru.mix_action.weight.zero_()
        start = algorithm.model.unpack(drawn(algorithm)[LATENT][:, 0])
        with_noise(0)
        feature, log_prob, entropy = algorithm.imagine(start)
        target, value, weight = algorithm.lambda_return(feature, algorithm.critic(feature.detach()))
        loss = algorithm.actor_loss(log_prob, entropy, target, value, weight)
        (gradient,) = torch.autograd.grad(loss, algorithm.actor.network[-1].weight, allow_unused=True)
        found.append(gradient)
    assert found[0].abs().sum() > 0
    assert not found[1].any()


def test_the_policy_is_not_differentiated_by_what_it_sees():
    algorithm = make("algo.actor_gradient=dynamics")
    start = State(*(part.requires_grad_() for part in algorithm.model.unpack(drawn(algorithm)[LATENT][:, 0])))
    feature, log_prob, entropy = algorithm.imagine(start)
    for seen in (log_prob[:, 0], entropy[:, 0]):
        assert torch.autograd.grad(seen.sum(), list(start), allow_unused=True, retain_graph=True) == (None, None)
    assert torch.autograd.grad(feature[:, 1].sum(), start.deter)[0].any()


def test_layers_at_the_start():
    """Normal, cut off at two deviations, of variance 1 / inputs; those of the whole layer, where it is a part."""
    torch.manual_seed(0)
    for layer, inputs in ((linear(400, 500), 400), (linear(400, 500, fan_in=1600), 1600)):
        assert layer.weight.std().item() == pytest.approx(inputs**-0.5, rel=0.01)
        assert layer.weight.abs().max().item() == pytest.approx(2 / 0.8796 * inputs**-0.5, rel=0.01)
        assert not layer.bias.any()


def test_policies_at_the_start():
    algorithm = make()
    feature = torch.randn(5, algorithm.model.features)
    assert algorithm.actor(feature).log_std.exp().mean().item() == pytest.approx(0.892717, abs=3e-3)
    assert (algorithm.two_hot.mean(algorithm.critic(feature)) == 0).all()
    assert (algorithm.two_hot.mean(algorithm.model.reward_model(feature)) == 0).all()
    discrete = make("env=cartpole", "env.num_envs=1")
    entropy = discrete.actor(torch.randn(5, discrete.model.features)).entropy()
    assert entropy.mean().item() == pytest.approx(math.log(2), abs=1e-3)
    huge = discrete.actor.network
    with torch.no_grad():
        huge[-1].bias.copy_(torch.tensor([1000.0, 0.0]))
    probs = discrete.actor(torch.randn(1, discrete.model.features)).log_probs.exp()
    assert probs.flatten().tolist() == pytest.approx([0.995, 0.005])
