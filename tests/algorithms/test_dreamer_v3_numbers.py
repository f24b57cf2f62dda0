"""DreamerV3: sizes, symlog and two-hot numbers, KL terms, and the optimiser."""

import math

import pytest
import torch
from torchrl.objectives import categorical_kl_terms, two_hot_cross_entropy, two_hot_decode, two_hot_encode
from torchrl.trainers.algorithms import DreamerV3Optimizer

from dreamer_v3_data import count_parameters, make_dreamer_v3, random_batch
from levin.algorithms.dreamer_v3 import DreamerV3
from levin.algorithms.dreamer_v3_networks import SIZES, TwoHot, categorical_kl, sample_one_hot, symexp, symlog
from levin.model_based.recurrent import State
from levin.nn.optimizers import LaProp
from world_model_data import env_description

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
    described = env_description(**env)
    if not env.get("pixels"):
        described["observation"]["shape"] = [observation]
    with torch.device("meta"):
        algorithm = DreamerV3(env=described, size=size)
    assert (
        count_parameters(algorithm.model) + count_parameters(algorithm.actor) + count_parameters(algorithm.critic)
        == total
    )
    if total == 640_867:
        assert (count_parameters(algorithm.actor), count_parameters(algorithm.critic)) == (50_316, 66_111)
        assert count_parameters(algorithm.model.gru) == 273_664


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_built(size):
    with torch.device("meta"):
        algorithm = DreamerV3(env=env_description(), size=size)
    expected = {"micro": (0.1e6, 0.3e6)}.get(size)
    if expected is None:
        million = float(size[:-1]) * 1e6
        expected = (0.6 * million, 1.1 * million)
    assert (
        expected[0]
        < count_parameters(algorithm.model) + count_parameters(algorithm.actor) + count_parameters(algorithm.critic)
        < expected[1]
    )


def test_symlog_and_its_inverse():
    x = torch.tensor([-1000, -1, 0, 0.5, 10, 1e6], dtype=torch.float64)
    expected = [-6.908755, -0.693147, 0, 0.405465, 2.397895, 13.815512]
    assert symlog(x).tolist() == pytest.approx(expected, abs=1e-6)
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
def test_two_hot_encoding_and_decoding(value, lower, weights):
    two_hot, number = TwoHot(), torch.tensor([[value]])
    below, above, weight = two_hot.encode(number)
    assert (below.item(), above.item()) == (lower, lower + 1)
    assert (1 - weight.item(), weight.item()) == pytest.approx(weights, abs=1e-6)
    dense = torch.zeros(1, 255)
    dense[0, below], dense[0, above] = 1 - weight, weight
    torch.testing.assert_close(dense, two_hot_encode(number, two_hot.bins).view(1, 255), rtol=1e-5, atol=1e-6)
    assert two_hot.mean((dense + 1e-38).log()).item() == pytest.approx(value, rel=1e-5)
    logits = torch.randn(1, 255)
    reference = two_hot_cross_entropy(logits, number, two_hot.bins)
    torch.testing.assert_close(two_hot.loss(logits.log_softmax(-1), number).flatten(), reference.flatten())
    torch.testing.assert_close(
        two_hot.mean(logits / 10).flatten(), two_hot_decode(logits / 10, two_hot.bins).flatten(), rtol=1e-4, atol=1
    )


def test_two_hot_bins_and_values_beyond_them():
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


def test_kl_of_uniform_mixtures():
    model = make_dreamer_v3().model
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
    reference = categorical_kl_terms(*(each.unflatten(-1, (8, 5)) for each in numbers), unimix=0.01)
    kl = categorical_kl(*mixed).squeeze(-1)
    assert any(torch.allclose(kl, each.reshape(kl.shape), atol=1e-5) for each in reference if each.numel() == 3) or (
        reference[0].ndim == 0 and torch.allclose(kl.clamp(min=1).mean(), reference[0], atol=1e-5)
    )


def test_free_nats_apply_to_a_state_and_not_to_each_categorical():
    """With 32 categoricals of KL 0.02 each, the sum is below 1 nat, so the loss is 1 and has no gradient."""
    algorithm = make_dreamer_v3("algo.dynamics_scale=1", "algo.representation_scale=0")
    numbers = torch.zeros(1, 32, 2)
    numbers[..., 0] = 0.4041  # has a KL of 0.02 to a uniform distribution
    numbers.requires_grad_()
    posterior, prior = numbers.log_softmax(-1), torch.zeros(1, 32, 2).log_softmax(-1)
    kl = categorical_kl(posterior, prior)
    assert kl.item() == pytest.approx(0.64, abs=2e-3)
    free = kl.clamp(min=algorithm.free_nats).mean()
    free.backward()
    assert free.item() == 1.0
    assert not numbers.grad.any()


def test_the_two_kl_terms_train_prior_and_posterior():
    """`dynamics_scale` trains the prior alone, `representation_scale` the posterior alone."""
    for scale, learns, stays in (
        ("dynamics_scale", "prior_head", "posterior_head"),
        ("representation_scale", "posterior_head", "prior_head"),
    ):
        zero = [f"algo.{each}=0" for each in ("dynamics_scale", "representation_scale") if each != scale]
        algorithm = make_dreamer_v3(f"algo.{scale}=1", "algo.free_nats=0", *zero)
        for head in (algorithm.model.reward_model, algorithm.model.continue_model):
            head.requires_grad_(False)
        state, posterior = algorithm.observe(random_batch(algorithm))
        state = State(*(part.detach() for part in state))
        loss, _ = algorithm.model_loss(random_batch(algorithm), state, posterior)
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


def test_samples_are_one_hot_with_the_gradient_of_the_mixture():
    model = make_dreamer_v3().model
    model.choices = (1, 3)
    numbers, weight = torch.randn(1, 3, requires_grad=True), torch.randn(3)
    draw = model.sample_stoch(model.log_probs(numbers))
    assert sorted(draw[0].tolist()) == [0, 0, 1]
    (gradient,) = torch.autograd.grad((draw * weight).sum(), numbers)
    (expected,) = torch.autograd.grad(((0.99 * numbers.softmax(-1) + 0.01 / 3) * weight).sum(), numbers)
    torch.testing.assert_close(gradient, expected)


def test_samples_without_a_gradient_have_the_same_distribution():
    logits = torch.tensor([[2.0, 0.0, -1.0, -50.0], [0.0, 0.0, 0.0, 3.0]])
    draws = sample_one_hot(logits.expand(100_000, 2, 4))
    assert (draws.sum(-1) == 1).all()
    expected = 0.99 * logits.softmax(-1) + 0.01 / 4
    error = (expected * (1 - expected) / len(draws)).sqrt()
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    assert torch.equal(sample_one_hot(torch.tensor([[0.0, 1e9]] * 3)).sum(-1), torch.ones(3))


# --- the optimiser


def test_laprop_by_hand():
    """Steps for the gradients 1, 2, -1 with learning rate 0.1; with a warm-up, the first step is zero."""
    for warm_up, expected in ((0, [-0.1, -0.213933, -0.259731]), (2, [0.0])):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = LaProp([parameter], lr=0.1, clip=1e9, warm_up=warm_up)
        for gradient, value in zip((1.0, 2.0, -1.0), expected, strict=False):
            parameter.grad.fill_(gradient)
            optimizer.step()
            assert parameter.item() == pytest.approx(value, abs=1e-6)


def test_adaptive_gradient_clipping_is_per_parameter():
    parameters = [torch.nn.Parameter(torch.tensor(each)) for each in ([3.0, 4.0], [0.0, 0.0], [100.0, 0.0])]
    optimizer = LaProp(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad.copy_(torch.tensor([0.0, 10.0]))
    optimizer.clip(0.3, 1e-3)
    expected = torch.tensor([[0.0, 1.5], [0.0, 3e-4], [0.0, 10.0]])
    torch.testing.assert_close(torch.stack([each.grad for each in parameters]), expected)
    assert optimizer.clipped.item() == pytest.approx(2 / 3)


def test_laprop_equals_torchrls():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((4, 3), (3,), (2, 2, 2))]
    reference_parameters = [torch.nn.Parameter(each.detach().clone()) for each in parameters]
    optimizer, reference_optimizer = (
        LaProp(parameters, lr=1e-2, warm_up=5),
        DreamerV3Optimizer(reference_parameters, lr=1e-2, warmup_steps=5),
    )
    for step in range(12):
        for a, b in zip(parameters, reference_parameters, strict=True):
            gradient = torch.randn_like(a) * 10 ** (step % 3 - 1)
            a.grad.copy_(gradient)
            b.grad = gradient
        optimizer.step()
        reference_optimizer.step()
        for a, b in zip(parameters, reference_parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
