"""DreamerV3: its numbers, what its model computes, where gradients go, and what replay keeps."""

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.modules import RSSMPosteriorV3, RSSMPriorV3
from torchrl.objectives import categorical_kl_terms, two_hot_cross_entropy, two_hot_decode, two_hot_encode
from torchrl.trainers.algorithms import DreamerV3Optimizer

from levin.algorithms.dreamer import Dreamer
from levin.algorithms.dreamer_v3 import DreamerV3
from levin.algorithms.dreamer_v3_networks import SIZES, TwoHot, chosen, kl, linear, symexp, symlog
from levin.config.compose import compose
from levin.core import files
from levin.core.errors import ConfigError
from levin.core.spaces import EMPTY
from levin.data.sequences import LATENT, SequenceReplay
from levin.estimators.pathwise import largest
from levin.model_based import open_loop
from levin.model_based.recurrent import State
from levin.nn.optimizers import LaProp
from levin.runs import checkpoint
from levin.runs.checkpoint import FolderCheckpointIO
from levin.training.session import build
from test_dreamer import Says, records, rollouts, spec

SMALL = (
    *("algo=dreamer_v3", "env=pendulum", "env.num_envs=1", "algo.size=micro", "algo.learning_starts=40"),
    *("algo.batch_size=4", "algo.batch_length=6", "algo.horizon=4", "algo.warm_up=0", "algo.lr=1e-3"),
)


def make(*words: str) -> DreamerV3:
    algorithm, _ = build(compose([*SMALL, *words]))
    algorithm.configure_optimizers()
    algorithm.manual_backward = lambda loss: loss.backward()
    return algorithm


def drawn(algorithm: DreamerV3, **how: Any) -> TensorDict:
    """Random records with states that a policy had: `[3, 1 + 6]`."""
    size = algorithm.env["observation"]["shape"][0]
    data = records(observation=size, action=algorithm.model.actions, **how)
    generator = torch.Generator().manual_seed(1)
    deter = torch.randn(3, 7, algorithm.model.deter, generator=generator).tanh()
    classes = torch.rand(3, 7, *algorithm.model.choices, generator=generator).argmax(-1)
    latent = torch.cat([deter.bfloat16(), classes.bfloat16()], -1)
    row = torch.arange(7).expand(3, 7)
    data |= {LATENT: latent, "row": row, "env": torch.zeros_like(row)}
    return TensorDict(data, batch_size=(3, 7))


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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
    assert kl(peak, flat).item() == pytest.approx(0.458838, abs=1e-6)
    assert kl(flat, peak).item() == pytest.approx(0.444200, abs=1e-6)
    one, other = (model.log_probs(torch.tensor([numbers])) for numbers in ([99.0, 0, 0, 0], [0.0, 99, 0, 0]))
    assert one.exp().flatten().tolist() == pytest.approx([0.9925, 0.0025, 0.0025, 0.0025])
    assert kl(one, other).item() == pytest.approx(5.924097, abs=1e-5)
    numbers = torch.randn(2, 3, 8 * 5)
    model.choices = (8, 5)
    mixed = [model.log_probs(each) for each in numbers]
    theirs = categorical_kl_terms(*(each.unflatten(-1, (8, 5)) for each in numbers), unimix=0.01)
    found = kl(*mixed).squeeze(-1)
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
    found = kl(ours, theirs)
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
    draws = chosen(logits.expand(100_000, 2, 4))
    assert (draws.sum(-1) == 1).all()
    wanted = 0.99 * logits.softmax(-1) + 0.01 / 4
    error = (wanted * (1 - wanted) / len(draws)).sqrt()
    assert ((draws.mean(0) - wanted).abs() < 5 * error).all()
    assert torch.equal(chosen(torch.tensor([[0.0, 1e9]] * 3)).sum(-1), torch.ones(3))


# --- the world model


def with_noise(seed: int) -> None:
    torch.manual_seed(seed)


def test_observing_a_sequence_is_observing_step_by_step():
    model, data = make().model, drawn(make(), first=(3,))
    first = model.unpacked(data[LATENT][:, 0])
    with torch.no_grad():
        with_noise(0)
        states, posterior = model.observe(
            model.observe_step, first, data["observation"][:, 1:], data["action"][:, :-1], data["is_first"][:, 1:]
        )
        with_noise(0)
        state = first
        for t in range(1, 7):
            goes_on = ~data["is_first"][:, t]
            before = data["action"][:, t - 1] * goes_on
            state = model.step(State(*(part * goes_on for part in state)), before, data["observation"][:, t])
            torch.testing.assert_close(state.deter, states.deter[:, t - 1], rtol=1e-5, atol=1e-5)
            assert torch.equal(state.stoch, states.stoch[:, t - 1])
    assert states.deter.shape == (3, 6, model.deter)
    assert posterior.shape == (3, 6, *model.choices)


def test_acting_is_observing():
    """What the policy believed in an env is what the model makes of the records of it, from the first state on."""
    algorithm = make()
    algorithm.model.drawn = lambda log_probs: largest(log_probs).flatten(-2)
    policy, data = algorithm.policy().module, drawn(algorithm, first=(4,))
    kept, chosen = [], []
    with torch.no_grad():
        for t in range(7):
            action, latent = policy(data["observation"][:, t], data["is_first"][:, t])
            kept.append(latent)
            chosen.append(action)
        data["action"], data[LATENT] = torch.stack(chosen, 1), torch.stack(kept, 1)
        states, _ = algorithm.observe(data)
    packed = algorithm.model.packed(states)
    torch.testing.assert_close(packed, data[LATENT][:, 1:], rtol=0, atol=1e-2)
    assert torch.equal(packed[..., algorithm.model.deter :], data[LATENT][:, 1:, algorithm.model.deter :])


def observed(algorithm: DreamerV3, data: TensorDict) -> State:
    with_noise(0)
    with torch.no_grad():
        return algorithm.observe(data)[0]


def test_nothing_survives_the_beginning_of_an_episode():
    algorithm = make()
    data = drawn(algorithm, first=(4,))
    base = observed(algorithm, data)
    for key in ("observation", "action", LATENT):
        changed = data.clone()
        changed[key][0, :4] = 3.0
        other = observed(algorithm, changed)
        assert torch.equal(base.deter[:, 3:], other.deter[:, 3:])
        assert torch.equal(base.stoch[:, 3:], other.stoch[:, 3:])
        assert torch.equal(base.deter[1:], other.deter[1:])  # other rows
        assert not torch.equal(base.deter[0, :3], other.deter[0, :3])


def test_the_first_record_is_there_for_its_state_and_its_action():
    algorithm = make()
    data = drawn(algorithm)
    data["is_first"][:, 0] = False
    base = observed(algorithm, data)
    for key, matters in (("observation", False), ("action", True), (LATENT, True)):
        changed = data.clone()
        changed[key][:, 0] = 3.0
        assert torch.equal(observed(algorithm, changed).deter, base.deter) != matters


def test_actions_beyond_the_bounds_count_as_the_bounds():
    algorithm = make()
    data = drawn(algorithm)
    data["action"][:] = 1.0
    base = observed(algorithm, data)
    data["action"][:] = 50.0
    torch.testing.assert_close(observed(algorithm, data).deter, base.deter)


def test_the_model_is_torchrls():
    """Their prior and posterior with our parameters, one step."""
    model = make().model
    size = SIZES["micro"]
    prior = RSSMPriorV3(
        action_shape=torch.Size([1]),
        action_dim=1,
        hidden_dim=size.hidden,
        rnn_hidden_dim=size.deter,
        num_categoricals=size.stoch,
        num_classes=size.classes,
        recurrent_model="block_gru",
        unimix=0.01,
    )
    posterior = RSSMPosteriorV3(
        hidden_dim=size.hidden,
        num_categoricals=size.stoch,
        num_classes=size.classes,
        rnn_hidden_dim=size.deter,
        obs_embed_dim=size.units,
        use_rms_norm=True,
        unimix=0.01,
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    gru = model.gru
    with torch.no_grad():
        ours = [gru.from_deter, gru.from_stoch, gru.from_action]
        theirs = [prior.rnn.belief_projection, prior.rnn.state_projection, prior.rnn.action_projection]
        ours.append(model.prior_head)
        theirs.append(prior.rnn_to_prior_projector)
        for our, their in zip(ours, theirs, strict=True):
            for a, b in zip(our.parameters(), their.parameters(), strict=True):
                b.copy_(a)
        mix, norm, _ = prior.rnn.hidden_layers
        inputs = torch.cat([gru.mix_state.weight, gru.mix_action.weight], 1).unflatten(0, (8, -1)).transpose(1, 2)
        mix.weight.copy_(torch.cat([gru.mix_deter.weight, inputs], 1))
        mix.bias.copy_(gru.mix_state.bias)
        next(norm.parameters()).copy_(gru.norm.scale)
        prior.rnn.gates.weight.copy_(gru.gates.weight)
        prior.rnn.gates.bias.copy_(gru.gates.bias.flatten())
        first, norm, _, last = posterior.obs_rnn_to_post_projector
        first.weight.copy_(torch.cat([model.from_deter.weight, model.from_embedding.weight], 1))
        first.bias.copy_(model.from_embedding.bias)
        next(norm.parameters()).copy_(model.posterior_norm.scale)
        last.weight.copy_(model.posterior_head.weight)
        last.bias.copy_(model.posterior_head.bias)
        data = drawn(make())
        state = model.unpacked(data[LATENT][:, 0])
        action, embedding = 2 * torch.randn(3, 1), torch.randn(3, size.units)
        logits, belief = prior._belief_and_logits(state.stoch, state.deter, action)
        deter = gru(state, gru.action_part(action))
        torch.testing.assert_close(deter, belief, rtol=1e-5, atol=1e-5)
        mixed = (0.99 * logits.softmax(-1) + 0.01 / size.classes).log()
        torch.testing.assert_close(model.prior(deter), mixed, rtol=1e-4, atol=1e-4)
        mixed = (0.99 * posterior._logits(belief, embedding).softmax(-1) + 0.01 / size.classes).log()
        found = model.posterior(deter, model.from_embedding(embedding))
        torch.testing.assert_close(found, mixed, rtol=1e-4, atol=1e-4)


def test_states_are_kept_whole():
    model = make().model
    data = drawn(make())
    state = model.unpacked(data[LATENT])
    assert torch.equal(model.packed(state), data[LATENT])
    assert (state.stoch.unflatten(-1, model.choices).sum(-1) == 1).all()


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
        wanted = algorithm.model.packed(algorithm.observe(batch)[0])
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
    large = kl(posterior, flat)[0, 0].item()
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
        start = algorithm.model.unpacked(drawn(algorithm)[LATENT][:, 0])
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
    start = State(*(part.requires_grad_() for part in algorithm.model.unpacked(drawn(algorithm)[LATENT][:, 0])))
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


# --- what replay keeps


def filled(storage: str = "memory") -> SequenceReplay:
    buffer = SequenceReplay(spec(num_envs=2), 60, storage, 5, keeps_latents=True)
    parts, _ = rollouts([[3], [7, 4]], 20, 5)
    for number, part in enumerate(parts):
        latent = torch.arange(10).view(2, 5, 1) + 10.0 * number
        buffer.extend(part.set(LATENT, latent.bfloat16()))
    return buffer


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_states_are_written_where_they_belong(storage):
    buffer = filled(storage)
    ends = buffer.data["is_last"]
    assert (buffer.data[LATENT][ends] == 0).all()
    before = buffer.data.clone()
    batch = buffer.sample(1, 3, torch.device("cpu"))[0]
    new = 200 + torch.arange(12).view(3, 4, 1).float()
    buffer.rewrite(batch, new)
    after = buffer.data
    written: dict[tuple[int, int], list[float]] = {}  # a record that was drawn twice has one of its states
    places = (each.flatten().tolist() for each in (batch["row"][:, 1:], batch["env"][:, 1:], new))
    for row, env, value in zip(*places, strict=True):
        written.setdefault((row, env), []).append(value)
    for (row, env), values in written.items():
        assert after[LATENT][row, env].item() in values
    untouched = torch.ones(len(buffer), 2, dtype=torch.bool)
    for row, env in written:
        untouched[row, env] = False
    assert torch.equal(after[LATENT][untouched], before[LATENT][untouched])
    for key in ("observation", "action", "reward", "is_first"):
        assert torch.equal(after[key], before[key])


@pytest.mark.parametrize("storage", ["memory", "memmap"])
def test_kept_states_go_on_where_they_were(storage, tmp_path):
    """They are beside the rows, whose files are written once, and not in the file that evaluations read."""
    buffer = filled(storage)
    writer = FolderCheckpointIO()
    for step in (1, 2):
        batch = buffer.sample(1, 8, torch.device("cpu"))[0]
        buffer.rewrite(batch, torch.full((8, 4, 1), 7.0 * step))
        state = {"algorithm": "Toy", "levin": {"env_steps": step}, "buffer": buffer.state_dict()}
        writer.save_checkpoint(state, tmp_path / str(step) / checkpoint.STATE)
    checkpoint.discard(tmp_path / "1")
    checkpoint.verify(tmp_path / "2", buffer=True)
    assert not {"rewritten", LATENT} & set(files.load(tmp_path / "2" / checkpoint.STATE)["buffer"])
    state = FolderCheckpointIO().load_checkpoint(tmp_path / "2" / checkpoint.STATE)["buffer"]
    resumed = SequenceReplay(spec(num_envs=2), 60, storage, 5, keeps_latents=True)
    resumed.load_state_dict(state, torch.device("cpu"))
    for key in (*buffer.keys,):
        assert torch.equal(resumed.data[key], buffer.data[key]), key


def test_updates_move_the_states_in_replay():
    algorithm = make()
    generator = torch.Generator().manual_seed(0)
    done = (torch.arange(60) % 20 == 19).view(1, 60, 1)
    after = {"observation": torch.randn(1, 60, 3, generator=generator), "reward": torch.ones(1, 60, 1)}
    after |= {"done": done, "terminated": done}
    latent = torch.zeros(1, 60, algorithm.model.deter + algorithm.model.choices[0], dtype=torch.bfloat16)
    steps = {"observation": torch.randn(1, 60, 3, generator=generator), "action": torch.zeros(1, 60, 1)}
    algorithm.env_steps = 45
    algorithm.training_step(TensorDict({**steps, LATENT: latent, "next": after}, batch_size=(1, 60)), 0)
    assert algorithm.updates == 5
    assert algorithm.buffer.data[LATENT].any()


def test_updates_per_env_step_carry_their_remainder():
    """Train ratio 512 of batches of 16 x 64: half an update for each step."""
    algorithm = make("algo.replay_ratio=0.5", "algo.learning_starts=40")
    algorithm.update = lambda batch: None
    algorithm.buffer.sample = lambda num, *_: TensorDict({"x": torch.zeros(num, 1)}, batch_size=(num, 1))
    algorithm.buffer.at_once = lambda _: 10_000
    for env_steps in range(0, 10_001, 3):
        algorithm.env_steps = env_steps
        for _ in algorithm.replay():
            pass
    assert algorithm.updates == (9_999 - 40) // 2


# --- learning what there is


def echo(shifted: bool) -> tuple[float, float]:
    """An env that shows the last action and rewards what it shows: errors of what is imagined next, and of rewards."""
    torch.manual_seed(0)
    steps = 400
    action = torch.rand(1, steps, 1) * 2 - 1
    shown = torch.cat([torch.zeros(1, 1, 1), action], 1).expand(1, steps + 1, 3)
    done = (torch.arange(steps) % 20 == 19).view(1, -1, 1)
    after = {"observation": shown[:, 1:], "reward": 2 * shown[:, 1:, :1], "done": done, "terminated": done}
    first = torch.cat([torch.ones(1, 1, 1, dtype=torch.bool), done[:, :-1]], 1)
    seen = torch.where(first, 0.0, shown[:, :-1])
    algorithm = make("algo.lr=2e-3", "algo.batch_length=9")
    latent = torch.zeros(1, steps, algorithm.model.deter + algorithm.model.choices[0], dtype=torch.bfloat16)
    rollout = {"observation": seen, "action": action, LATENT: latent, "next": after}
    algorithm.buffer.extend(TensorDict(rollout, batch_size=(1, steps)))
    if shifted:
        algorithm.buffer.data["action"][:] = algorithm.buffer.data["action"].roll(1, 0)
    for _ in range(300):
        batch = algorithm.buffer.sample(1, 16, torch.device("cpu"))[0]
        state, posterior = algorithm.observe(batch)
        loss, _ = algorithm.model_loss(batch, state, posterior)
        algorithm.step(algorithm.optimizer, loss)
        algorithm.buffer.rewrite(batch, algorithm.model.packed(state))
    batch = algorithm.buffer.sample(1, 64, torch.device("cpu"))[0]
    with torch.no_grad():
        state, _ = algorithm.observe(batch)
        before = State(*(part[:, 4] for part in state))
        imagined = State(*algorithm.model.imagine_step(*before, batch["action"][:, 5]))
        follows = ~batch["is_first"][:, 6, 0]
        decoded = symexp(algorithm.model.decode(imagined)[""])
        error = (decoded - batch["observation"][:, 6])[follows].square().mean()
        reward = algorithm.two_hot.mean(algorithm.model.reward_model(state.feature)) - batch["reward"][:, 1:]
    return float(error), float(reward.square().mean())


def test_actions_rewards_and_observations_are_aligned():
    """The next observation is what the action says, whose variance is 1/3; and not what the one before it said."""
    imagined, reward = echo(shifted=False)
    assert imagined < 0.1
    assert reward < 0.1
    wrong, _ = echo(shifted=True)
    assert wrong > 0.2


@pytest.mark.parametrize("algo", [Dreamer, DreamerV3])
@pytest.mark.parametrize("kind", ["vector", "pixels", "both"])
def test_what_is_seen_is_foreseen(kind, algo, tmp_path):
    """Vectors, pixels, and both side by side: one update, and an evaluation's pictures."""
    env = spec(pixels=kind == "pixels")
    parts = {"vector": torch.randn(1, 61, 5), "camera": torch.randint(256, (1, 61, 3, 64, 64), dtype=torch.uint8)}
    if kind == "both":
        vector = {**EMPTY, "shape": [5], "dtype": "float32"}
        camera = {**EMPTY, "shape": [3, 64, 64], "dtype": "uint8"}
        env["observation"] = {**EMPTY, "type": "dict", "spaces": {"vector": vector, "camera": camera}}
        seen: Any = parts
    else:
        seen = {"": parts["camera"] if kind == "pixels" else parts["vector"][..., :3]}
    algorithm = algo(env=env, size="micro", batch_length=6, batch_size=2, horizon=3, buffer_size=400)
    algorithm.configure_optimizers()
    algorithm.manual_backward = lambda loss: loss.backward()

    def at(places: slice) -> Any:
        found = {name: part[:, places] for name, part in seen.items()}
        return found if kind == "both" else found[""]

    done = torch.zeros(1, 60, 1, dtype=torch.bool)
    after = {"observation": at(slice(1, 61)), "reward": torch.randn(1, 60, 1), "done": done, "terminated": done}
    steps = {"observation": at(slice(0, 60)), "action": torch.randn(1, 60, 1), "next": after}
    if algo is DreamerV3:
        size = algorithm.model.deter + algorithm.model.choices[0]
        steps[LATENT] = torch.zeros(1, 60, size, dtype=torch.bfloat16)
    algorithm.buffer.extend(TensorDict(steps, batch_size=(1, 60)))
    algorithm.update(algorithm.buffer.sample(1, 2, torch.device("cpu"))[0])
    found = algorithm.on_evaluation(tmp_path)
    names = ["_vector", "_camera"] if kind == "both" else [""]
    wanted = [
        (what, ahead, name) for what in ("open_loop", "repeat_last") for ahead in (1, 5, 15, 45) for name in names
    ]
    assert found.keys() == {f"eval/{what}_{ahead}{name}" for what, ahead, name in wanted}
    assert all((tmp_path / f"0{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_what_it_can_not_do_is_said():
    for words, sentence in (
        (("algo.buffer_size=6",), "less than a sequence of each env"),
        (("algo.batch_length=1",), "nothing to learn values from"),
        (("algo.learning_starts=6",), "less than a sequence of each env: 7"),
        (("env.normalize_observation=true",), "squeezes numbers by itself"),
        (("env=gym", "env.id=toy_envs:Robot-v0"), "reads vectors, and pixels of 64 x 64"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make(*words)


@pytest.mark.parametrize("estimator", ["straight_through", "reinmax", "gumbel_softmax"])
def test_every_estimator_of_the_state(estimator):
    algorithm = make(f"algo.latent_estimator={estimator}")
    torch.manual_seed(0)
    algorithm.update(drawn(algorithm))
    assert algorithm.model.encoders["_"][0].weight.grad.any()


def test_open_loop_begins_where_the_policy_was():
    """The first state of a window is the one that was kept, not one that knows nothing."""
    algorithm = make()
    data = drawn(algorithm)
    window = torch.cat([data, data], 1)[:, : open_loop.CONTEXT + 1]
    with_noise(0)
    with torch.no_grad():
        base, _ = algorithm.foresee(window)
        with_noise(0)
        window[LATENT][:, 0] = 0
        other, _ = algorithm.foresee(window)
    assert base[""].shape == (3, open_loop.CONTEXT + 1, 3)
    assert not torch.equal(base[""][:, 0], other[""][:, 0])
