"""DreamerV3: sizes, symlog and two-hot numbers, KL terms, and the optimiser."""

import math

import pytest
import torch
from torchrl.objectives import categorical_kl_terms, two_hot_cross_entropy, two_hot_decode, two_hot_encode
from torchrl.trainers.algorithms import DreamerV3Optimizer

from dreams import spec
from dreams_v3 import count, drawn, make
from levin.algorithms.dreamer_v3 import DreamerV3
from levin.algorithms.dreamer_v3_networks import SIZES, TwoHot, categorical_kl, sample_one_hot, symexp, symlog
from levin.model_based.recurrent import State
from levin.nn.optimizers import LaProp

# --- sizes and numbers


@pytest.mark.parametrize(
    ("size", "env", "total"),
    [
        ("1m", {"actions": 6, "observation": 24}, 640_867),
        ("1m", {"discrete": 2, "observation": 4}, 637_381),
        ("1m", {"actions": 6, "pixels": True}, 686_846),
        ("12m", {"actions": 6, "observation": 24}, 9_738_019),
        ("12m", {"actions": 6, "pixels": True}, 10_494_158),
        ("200m", {"actions": 6, "pixels": True}, 165_948_686),
    ],
)
def test_parameter_counts_are_the_published_ones(size, env, total):
    observation = env.pop("observation", 3)
    described = spec(**env)
    if not env.get("pixels"):
        described["observation"]["shape"] = [observation]
    with torch.device("meta"):
        algorithm = DreamerV3(env=described, size=size)
    assert count(algorithm.model) + count(algorithm.actor) + count(algorithm.critic) == total
    if total == 640_867:
        assert (count(algorithm.actor), count(algorithm.critic)) == (50_316, 66_111)
        assert count(algorithm.model.gru) == 273_664


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_built(size):
    with torch.device("meta"):
        algorithm = DreamerV3(env=spec(), size=size)
    wanted = {"micro": (0.1e6, 0.3e6)}.get(size)
    if wanted is None:
        million = float(size[:-1]) * 1e6
        wanted = (0.6 * million, 1.1 * million)
    assert wanted[0] < count(algorithm.model) + count(algorithm.actor) + count(algorithm.critic) < wanted[1]


def test_symlog_and_its_inverse():
    x = torch.tensor([-1000, -1, 0, 0.5, 10, 1e6], dtype=torch.float64)
    wanted = [-6.908755, -0.693147, 0, 0.405465, 2.397895, 13.815512]
    assert symlog(x).tolist() == pytest.approx(wanted, abs=1e-6)
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("value", "lower", "weights"),
    [
        (0.1, 127, (0.413688, 0.586312)),
        (1.0, 131, (0.617329, 0.382671)),
        (-3.5, 117, (0.531368, 0.468632)),
        (500.0, 166, (0.544153, 0.455847)),
    ],
)
def test_a_number_is_two_bins(value, lower, weights):
    two_hot, number = TwoHot(), torch.tensor([[value]])
    below, above, weight = two_hot.encode(number)
    assert (below.item(), above.item()) == (lower, lower + 1)
    assert (1 - weight.item(), weight.item()) == pytest.approx(weights, abs=1e-6)
    dense = torch.zeros(1, 255)
    dense[0, below], dense[0, above] = 1 - weight, weight
    torch.testing.assert_close(dense, two_hot_encode(number, two_hot.bins).view(1, 255), rtol=1e-5, atol=1e-6)
    assert two_hot.mean((dense + 1e-38).log()).item() == pytest.approx(value, rel=1e-5)
    logits = torch.randn(1, 255)
    theirs = two_hot_cross_entropy(logits, number, two_hot.bins)
    torch.testing.assert_close(two_hot.loss(logits.log_softmax(-1), number).flatten(), theirs.flatten())
    torch.testing.assert_close(
        two_hot.mean(logits / 10).flatten(), two_hot_decode(logits / 10, two_hot.bins).flatten(), rtol=1e-4, atol=1
    )


def test_bins_and_what_lies_beyond_them():
    two_hot = TwoHot()
    assert two_hot.bins[127] == 0
    assert two_hot.bins[128].item() == pytest.approx(0.170558, abs=1e-6)
    assert two_hot.bins[-1].item() == pytest.approx(4.851652e8, rel=1e-6)
    assert torch.equal(two_hot.bins, -two_hot.bins.flip(0))
    zeros = torch.zeros(3, 255)
    assert (two_hot.mean(zeros) == 0).all()
    assert two_hot.loss(
        zeros.log_softmax(-1), torch.tensor([[0.0], [-7.0], [1e12]])
    ).flatten().tolist() == pytest.approx([math.log(255)] * 3)
    for value, place in ((1e12, 254), (-1e12, 0)):
        lower, upper, weight = two_hot.encode(torch.tensor([[value]]))
        assert (upper if value > 0 else lower).item() == place
        assert weight.item() == float(value > 0)


def test_kl_with_a_share_of_a_uniform_distribution():
    model = make().model
    model.choices = (1, 4)
    peak, flat = (model.log_probs(torch.tensor([numbers])) for numbers in ([2.0, 0, 0, 0], [0.0] * 4))
    assert categorical_kl(peak, flat).item() == pytest.approx(0.458838, abs=1e-6)
    assert categorical_kl(flat, peak).item() == pytest.approx(0.444200, abs=1e-6)
    one, other = (model.log_probs(torch.tensor([numbers])) for numbers in ([99.0, 0, 0, 0], [0.0, 99, 0, 0]))
    assert one.exp().flatten().tolist() == pytest.approx([0.9925, 0.0025, 0.0025, 0.0025])
    assert categorical_kl(one, other).item() == pytest.approx(5.924097, abs=1e-5)
    numbers = torch.randn(2, 3, 8 * 5)
    model.choices = (8, 5)
    mixed = [model.log_probs(each) for each in numbers]
    theirs = categorical_kl_terms(*(each.unflatten(-1, (8, 5)) for each in numbers), unimix=0.01)
    found = categorical_kl(*mixed).squeeze(-1)
    assert any(torch.allclose(found, each.reshape(found.shape), atol=1e-5) for each in theirs if each.numel() == 3) or (
        theirs[0].ndim == 0 and torch.allclose(found.clamp(min=1).mean(), theirs[0], atol=1e-5)
    )


def test_free_nats_are_of_a_state_and_not_of_each_choice():
    """32 choices whose KL is 0.02 each: their sum is below 1, so the loss is 1 and has no gradient."""
    algorithm = make("algo.dynamics_scale=1", "algo.representation_scale=0")
    numbers = torch.zeros(1, 32, 2)
    numbers[..., 0] = 0.4041  # whose KL to a uniform one is 0.02
    numbers.requires_grad_()
    ours, theirs = numbers.log_softmax(-1), torch.zeros(1, 32, 2).log_softmax(-1)
    found = categorical_kl(ours, theirs)
    assert found.item() == pytest.approx(0.64, abs=2e-3)
    free = found.clamp(min=algorithm.free_nats).mean()
    free.backward()
    assert free.item() == 1.0
    assert not numbers.grad.any()


def test_the_kl_teaches_both_sides():
    """With the one weight the transition model alone, with the other the state encoder alone."""
    for scale, learns, stays in (
        ("dynamics_scale", "prior_head", "posterior_head"),
        ("representation_scale", "posterior_head", "prior_head"),
    ):
        zero = [f"algo.{each}=0" for each in ("dynamics_scale", "representation_scale") if each != scale]
        algorithm = make(f"algo.{scale}=1", "algo.free_nats=0", *zero)
        for head in (algorithm.model.reward_model, algorithm.model.continue_model):
            head.requires_grad_(False)
        state, posterior = algorithm.observe(drawn(algorithm))
        state = State(*(part.detach() for part in state))
        loss, _ = algorithm.model_loss(drawn(algorithm), state, posterior)
        loss.backward()
        assert (
            getattr(algorithm.model, learns)[-1].weight.grad.any()
            if learns == "prior_head"
            else (algorithm.model.posterior_head.weight.grad.any())
        )
        other = (
            algorithm.model.prior_head[-1].weight if stays == "prior_head" else algorithm.model.posterior_head.weight
        )
        assert not other.grad.any()


def test_draws_are_one_hot_and_their_gradient_is_that_of_the_mixture():
    model = make().model
    model.choices = (1, 3)
    numbers, weight = torch.randn(1, 3, requires_grad=True), torch.randn(3)
    draw = model.drawn(model.log_probs(numbers))
    assert sorted(draw[0].tolist()) == [0, 0, 1]
    (found,) = torch.autograd.grad((draw * weight).sum(), numbers)
    (wanted,) = torch.autograd.grad(((0.99 * numbers.softmax(-1) + 0.01 / 3) * weight).sum(), numbers)
    torch.testing.assert_close(found, wanted)


def test_draws_without_a_gradient_have_the_same_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0, -50.0], [0.0, 0.0, 0.0, 3.0]])
    draws = sample_one_hot(logits.expand(100_000, 2, 4))
    assert (draws.sum(-1) == 1).all()
    wanted = 0.99 * logits.softmax(-1) + 0.01 / 4
    error = (wanted * (1 - wanted) / len(draws)).sqrt()
    assert ((draws.mean(0) - wanted).abs() < 5 * error).all()
    assert torch.equal(sample_one_hot(torch.tensor([[0.0, 1e9]] * 3)).sum(-1), torch.ones(3))


# --- the optimiser


def test_laprop_by_hand():
    """Steps of gradients 1, 2, -1 at the rate 0.1; and with a warm-up, whose first step is none."""
    for warm_up, wanted in ((0, [-0.1, -0.213933, -0.259731]), (2, [0.0])):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = LaProp([parameter], lr=0.1, clip=1e9, warm_up=warm_up)
        for gradient, value in zip((1.0, 2.0, -1.0), wanted, strict=False):
            parameter.grad.fill_(gradient)
            optimizer.step()
            assert parameter.item() == pytest.approx(value, abs=1e-6)


def test_gradients_are_clipped_by_their_own_parameter():
    parameters = [torch.nn.Parameter(torch.tensor(each)) for each in ([3.0, 4.0], [0.0, 0.0], [100.0, 0.0])]
    optimizer = LaProp(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad.copy_(torch.tensor([0.0, 10.0]))
    optimizer.clip(0.3, 1e-3)
    wanted = torch.tensor([[0.0, 1.5], [0.0, 3e-4], [0.0, 10.0]])
    torch.testing.assert_close(torch.stack([each.grad for each in parameters]), wanted)
    assert optimizer.clipped.item() == pytest.approx(2 / 3)


def test_laprop_is_torchrls():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((4, 3), (3,), (2, 2, 2))]
    theirs = [torch.nn.Parameter(each.detach().clone()) for each in ours]
    one, other = LaProp(ours, lr=1e-2, warm_up=5), DreamerV3Optimizer(theirs, lr=1e-2, warmup_steps=5)
    for step in range(12):
        for a, b in zip(ours, theirs, strict=True):
            gradient = torch.randn_like(a) * 10 ** (step % 3 - 1)
            a.grad.copy_(gradient)
            b.grad = gradient
        one.step()
        other.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
