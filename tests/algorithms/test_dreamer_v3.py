"""DreamerV3: losses by hand, paths of gradients, initialization."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.objectives import two_hot_decode, two_hot_encode

from dreamer_v3_data import fix_noise, make_dreamer_v3, random_batch
from levin.algorithms.dreamer_v3 import DreamerV3
from levin.algorithms.dreamer_v3_networks import categorical_kl, linear
from levin.data.sequences import LATENT
from levin.model_based.recurrent import State
from world_model_data import Constant

# --- behaviour


def test_lambda_returns_by_hand():
    """r = 1, 2, 3 and v = 20, 30, 40 in the three states after the first, discount 0.9, lambda 0.5."""
    algorithm = make_dreamer_v3("algo.return_lambda=0.5")
    values = iter([torch.tensor([10.0, 20, 30, 40]).view(1, 4, 1), torch.tensor([1.0, 2, 3]).view(1, 3, 1)])
    algorithm.two_hot.mean = lambda _: next(values)
    algorithm.model.continue_model = Constant(torch.full((1, 4, 1), math.log(9.0)))
    target, value, weight = algorithm.lambda_return(torch.zeros(1, 4, algorithm.model.features), torch.zeros(1, 4, 255))
    assert target.flatten().tolist() == pytest.approx([24.8725, 33.05, 39.0])
    assert value.flatten().tolist() == [10.0, 20.0, 30.0]
    assert weight.flatten().tolist() == pytest.approx([0.9, 0.81, 0.729])


class Entry(torch.nn.Module):
    """Network that returns one entry of its input."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, feature: Tensor) -> Tensor:
        return feature[..., self.place : self.place + 1]


def test_lambda_returns_use_rewards_and_continues_of_the_next_state():
    algorithm = make_dreamer_v3("algo.return_lambda=0.7")
    algorithm.two_hot.mean = lambda numbers: numbers
    algorithm.model.reward_model, algorithm.model.continue_model = Entry(0), Entry(1)
    feature, value = torch.randn(1, 5, algorithm.model.features), torch.randn(1, 5, 1)
    target, actual_value, weight = algorithm.lambda_return(feature, value)
    r, c, v = feature[0, :, 0].tolist(), feature[0, :, 1].sigmoid().tolist(), value.flatten().tolist()
    expected = [v[4]]
    for t in reversed(range(4)):
        expected.insert(0, r[t + 1] + c[t + 1] * (0.3 * v[t + 1] + 0.7 * expected[0]))
    assert target.flatten().tolist() == pytest.approx(expected[:-1], rel=1e-4)
    assert actual_value.flatten().tolist() == pytest.approx(v[:-1])
    assert weight.flatten().tolist() == pytest.approx([math.prod(c[: t + 1]) for t in range(4)], rel=1e-4)


def test_an_update_scales_returns_for_the_actor_alone():
    algorithm = make_dreamer_v3()
    with torch.no_grad():
        for head in (algorithm.critic, algorithm.model.reward_model):
            head[-1].weight.normal_()
    algorithm.return_range.copy_(torch.tensor([0.0, 50.0]))
    calls: dict[str, list] = {}

    def record_calls(name: str) -> None:
        real = getattr(algorithm, name)

        def spy(*arguments: Any) -> Any:
            result = real(*arguments)
            calls.setdefault(name, []).append((arguments, result))
            return result

        setattr(algorithm, name, spy)

    for name in ("lambda_return", "actor_loss", "value_loss", "replay_value_loss"):
        record_calls(name)
    algorithm.update(random_batch(algorithm))
    ((_, (target, value, _)),) = calls["lambda_return"]
    scale = algorithm.return_range[1] - algorithm.return_range[0]
    assert scale > 10
    ((arguments, _),) = calls["actor_loss"]
    torch.testing.assert_close(arguments[2], target / scale)
    torch.testing.assert_close(arguments[3], value / scale)
    assert any(
        torch.equal(arguments[2], target) for arguments, _ in calls["value_loss"] if arguments[2].shape == target.shape
    )
    ((arguments, _),) = calls["replay_value_loss"]
    assert torch.equal(arguments[2], target[:, 0])


def test_an_update_returns_the_latent_states_it_computed():
    algorithm = make_dreamer_v3()
    batch = random_batch(algorithm)
    fix_noise(0)
    with torch.no_grad():
        expected = algorithm.model.pack(algorithm.observe(batch)[0])
    fix_noise(0)
    assert torch.equal(algorithm.update(batch), expected)


def test_free_nats_clamp_the_kl_of_each_state():
    """With one large KL among 17 zeros, the clamped mean is (17 * 1 + KL) / 18."""
    algorithm = make_dreamer_v3("algo.representation_scale=0.5")
    batch = random_batch(algorithm)
    state, posterior = algorithm.observe(batch)
    flat = torch.zeros_like(posterior).log_softmax(-1)
    posterior = flat.detach().clone()
    posterior[0, 0] = torch.tensor([5.0] + [0.0] * (posterior.shape[-1] - 1)).log_softmax(-1)
    algorithm.model.prior = lambda deter: flat.flatten(0, 1)
    large = categorical_kl(posterior, flat)[0, 0].item()
    assert large > 5
    losses = [algorithm.model_loss(batch, state, posterior)[0].item()]
    algorithm.dynamics_scale = algorithm.representation_scale = 0.0
    losses.append(algorithm.model_loss(batch, state, posterior)[0].item())
    assert losses[0] - losses[1] == pytest.approx(1.5 * (17 + large) / 18, rel=1e-3)


def test_the_terms_of_the_model_loss_by_hand():
    algorithm = make_dreamer_v3("algo.gamma=0.9")
    batch = random_batch(algorithm)
    batch["is_terminal"][0, 3] = True  # one of 18 records
    state, posterior = algorithm.observe(batch)
    logits = torch.randn(18, 255)
    algorithm.model.prior = lambda deter: posterior.detach().flatten(0, 1)
    algorithm.model.reward_model = Constant(logits)
    algorithm.model.continue_model = Constant(torch.ones(18, 1))
    _, terms = algorithm.model_loss(batch, state, posterior)
    assert terms["kl"].item() == pytest.approx(0, abs=1e-6)
    continues = 17 / 18 * 0.9
    assert terms["continue_loss"].item() == pytest.approx(math.log1p(math.e) - continues, rel=1e-5)
    two_hot = two_hot_encode(batch["reward"][:, 1:].reshape(18, 1), algorithm.two_hot.bins).view(18, 255)
    expected = -(two_hot * logits.log_softmax(-1)).sum(-1).mean()
    assert terms["reward_loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_observation_loss_by_hand():
    algorithm = make_dreamer_v3()
    numbers = torch.tensor([[math.e - 1, 0, 0], [0, 0, 1 - math.e**2]])  # 1 and -2 after symlog
    loss = algorithm.observation_loss({"": torch.zeros(2, 3)}, {"": numbers})
    assert loss.item() == pytest.approx((1 + 4) / 2)
    pixels = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    loss = algorithm.observation_loss({"": torch.full((2, 3, 64, 64), 0.5)}, {"": pixels})
    assert loss.item() == pytest.approx(0.25 * 3 * 64 * 64)
    both = algorithm.observation_loss({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, {"a": numbers, "b": numbers})
    assert both.item() == pytest.approx(5)


def test_the_encoder_reads_symlog_observations():
    algorithm, read = make_dreamer_v3(), []
    algorithm.model.encoders["_"].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    algorithm.model.embed(torch.tensor([[math.e - 1, 0, 1 - math.e**2]]))
    assert read[0].flatten().tolist() == pytest.approx([1, 0, -2])


@pytest.mark.parametrize(
    ("terminal", "last", "first", "expected"),
    [
        ((), (), (), [24.8725, 33.05, 39.0]),
        ((2,), (2,), (3,), [10.9, 2.0, 39.0]),
        ((), (2,), (3,), [23.05, 29.0, 39.0]),
        ((), (), (3,), [23.05, 29.0, 39.0]),
    ],
)
def test_returns_of_replayed_rewards_by_hand(terminal, last, first, expected):
    """With imagined values 20, 30, 40; the episode goes on, or ends at the third record in one of three ways.

    It terminates; it is truncated; or it is abandoned by a resume, which leaves no record of the end.
    """
    algorithm = make_dreamer_v3("algo.return_lambda=0.5", "algo.gamma=0.9")
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
    assert asked["target"].flatten().tolist() == pytest.approx(expected)
    assert asked["weight"].flatten().tolist() == [0.0 if i + 1 in first else 1.0 for i in range(3)]


def test_the_scale_of_returns():
    """The moving average of a constant percentile range of 10 starts at 0."""
    algorithm = make_dreamer_v3()
    returns = torch.linspace(-0.5, 1.0 + 0.5, 1001) * 10 / 0.9 / 2  # 5th to 95th percentile: 10
    scales = {}
    for update in range(1, 501):
        scales[update] = algorithm.return_scale(returns).item()
    for update, expected in ((1, 1.0), (10, 1.0), (100, 6.339677), (500, 9.934295)):
        assert scales[update] == pytest.approx(expected, rel=1e-4)


def test_actor_loss_by_hand():
    algorithm = make_dreamer_v3("algo.entropy_coef=0.1")
    numbers = {"log_prob": -2.0, "entropy": 3.0, "target": 5.0, "value": 4.0, "weight": 0.5}
    arguments = {name: torch.tensor([[[value]]], requires_grad=True) for name, value in numbers.items()}
    loss = algorithm.actor_loss(**arguments)
    assert loss.item() == pytest.approx(-0.5 * (-2.0 * (5.0 - 4.0) + 0.1 * 3.0))
    loss.backward()
    assert arguments["target"].grad is None
    algorithm.actor_gradient = "dynamics"
    assert algorithm.actor_loss(**arguments).item() == pytest.approx(-0.5 * (5.0 + 0.1 * 3.0))


def test_value_loss_by_hand():
    """Sum of the cross-entropies with the two-hot return and with the two-hot value of the slow critic."""
    algorithm = make_dreamer_v3()
    logits, slow = torch.randn(2, 255), torch.randn(2, 255)
    algorithm.slow_critic = Constant(slow)
    target, weight = torch.tensor([[3.0], [-1.0]]), torch.tensor([[1.0], [0.25]])
    loss = algorithm.value_loss(logits, torch.zeros(2, 1), target, weight)
    bins, log_probs = algorithm.two_hot.bins, logits.log_softmax(-1)
    slow_value = two_hot_decode(slow, bins).view(2, 1)
    expected = [
        -(two_hot_encode(each, bins).view(2, 255) * log_probs).sum(-1, keepdim=True) for each in (target, slow_value)
    ]
    torch.testing.assert_close(loss, (weight * (expected[0] + expected[1])).mean(), rtol=1e-4, atol=1e-4)


def moved_by(algorithm: DreamerV3, loss: Tensor) -> set[str]:
    """Return the modules for which a loss has a gradient."""
    algorithm.optimizer.zero_grad()
    for parameter in algorithm.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    loss.backward(retain_graph=True)
    named = ((name, each.grad) for name, each in algorithm.named_parameters() if each.grad is not None)
    return {".".join(name.split(".")[:2]) for name, grad in named if grad.any()}


@pytest.mark.parametrize("actor_gradient", ["reinforce", "dynamics"])
@pytest.mark.parametrize("env", ["pendulum", "cartpole"])
def test_each_loss_trains_its_own_networks(env, actor_gradient):
    algorithm = make_dreamer_v3(f"env={env}", f"algo.actor_gradient={actor_gradient}", "env.num_envs=1")
    with torch.no_grad():  # zero-initialized heads would give zero gradients
        for head in (algorithm.critic, algorithm.model.reward_model, algorithm.slow_critic):
            head[-1].weight.normal_()
    batch = random_batch(algorithm)
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
    moved = moved_by(algorithm, replayed)
    assert {"model.encoders", "model.gru", "critic.0", "critic.6"} <= moved
    assert not {"model.reward_model", "model.prior_head", "actor.network"} & moved


def test_dynamics_gradients_pass_through_the_recurrent_model():
    """Without the path of actions into the recurrent model, the actor gets no gradient."""
    gradients = []
    for cut in (False, True):
        algorithm = make_dreamer_v3("algo.actor_gradient=dynamics", "algo.entropy_coef=0")
        with torch.no_grad():
            for head in (algorithm.critic, algorithm.model.reward_model):
                head[-1].weight.normal_()
            if cut:
                algorithm.model.gru.mix_action.weight.zero_()
        start = algorithm.model.unpack(random_batch(algorithm)[LATENT][:, 0])
        fix_noise(0)
        feature, log_prob, entropy = algorithm.imagine(start)
        target, value, weight = algorithm.lambda_return(feature, algorithm.critic(feature.detach()))
        loss = algorithm.actor_loss(log_prob, entropy, target, value, weight)
        (gradient,) = torch.autograd.grad(loss, algorithm.actor.network[-1].weight, allow_unused=True)
        gradients.append(gradient)
    assert gradients[0].abs().sum() > 0
    assert not gradients[1].any()


def test_policy_gradients_do_not_pass_through_the_policy_input():
    algorithm = make_dreamer_v3("algo.actor_gradient=dynamics")
    start = State(*(part.requires_grad_() for part in algorithm.model.unpack(random_batch(algorithm)[LATENT][:, 0])))
    feature, log_prob, entropy = algorithm.imagine(start)
    for seen in (log_prob[:, 0], entropy[:, 0]):
        assert torch.autograd.grad(seen.sum(), list(start), allow_unused=True, retain_graph=True) == (None, None)
    assert torch.autograd.grad(feature[:, 1].sum(), start.deter)[0].any()


def test_initial_weights_of_layers():
    """Truncated normal with variance 1 / fan-in; a part of a larger layer has the fan-in of that layer."""
    torch.manual_seed(0)
    for layer, inputs in ((linear(400, 500), 400), (linear(400, 500, fan_in=1600), 1600)):
        assert layer.weight.std().item() == pytest.approx(inputs**-0.5, rel=0.01)
        assert layer.weight.abs().max().item() == pytest.approx(2 / 0.8796 * inputs**-0.5, rel=0.01)
        assert not layer.bias.any()


def test_initial_policy_critic_and_reward_model():
    algorithm = make_dreamer_v3()
    feature = torch.randn(5, algorithm.model.features)
    assert algorithm.actor(feature).log_std.exp().mean().item() == pytest.approx(0.892717, abs=3e-3)
    assert (algorithm.two_hot.mean(algorithm.critic(feature)) == 0).all()
    assert (algorithm.two_hot.mean(algorithm.model.reward_model(feature)) == 0).all()
    discrete = make_dreamer_v3("env=cartpole", "env.num_envs=1")
    entropy = discrete.actor(torch.randn(5, discrete.model.features)).entropy()
    assert entropy.mean().item() == pytest.approx(math.log(2), abs=1e-3)
    huge = discrete.actor.network
    with torch.no_grad():
        huge[-1].bias.copy_(torch.tensor([1000.0, 0.0]))
    probs = discrete.actor(torch.randn(1, discrete.model.features)).log_probs.exp()
    assert probs.flatten().tolist() == pytest.approx([0.995, 0.005])
