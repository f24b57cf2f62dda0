"""DreamerV3's world model: latent states of sequences, resets, and TorchRL's RSSM as the reference."""

import torch
from torchrl.modules import RSSMPosteriorV3, RSSMPriorV3

from dreamer_v3_data import fix_noise, make_dreamer_v3, observe, random_batch
from levin.algorithms.dreamer_v3_networks import SIZES
from levin.data.sequences import LATENT
from levin.estimators.pathwise import one_hot_argmax
from levin.model_based.recurrent import State


def test_observing_a_sequence_equals_observing_step_by_step():
    model, data = make_dreamer_v3().model, random_batch(make_dreamer_v3(), first=(3,))
    first = model.unpack(data[LATENT][:, 0])
    with torch.no_grad():
        fix_noise(0)
        states, posterior = model.observe_sequence(
            model.observe_step, first, data["observation"][:, 1:], data["action"][:, :-1], data["is_first"][:, 1:]
        )
        fix_noise(0)
        state = first
        for t in range(1, 7):
            continues = ~data["is_first"][:, t]
            before = data["action"][:, t - 1] * continues
            state = model.step(State(*(part * continues for part in state)), before, data["observation"][:, t])
            torch.testing.assert_close(state.deter, states.deter[:, t - 1], rtol=1e-5, atol=1e-5)
            assert torch.equal(state.stoch, states.stoch[:, t - 1])
    assert states.deter.shape == (3, 6, model.deter)
    assert posterior.shape == (3, 6, *model.choices)


def test_the_policy_infers_the_states_that_the_world_model_infers():
    """The latents that the policy infers in an env equal those that the model infers from its records."""
    algorithm = make_dreamer_v3()
    algorithm.model.sample_stoch = lambda log_probs: one_hot_argmax(log_probs).flatten(-2)
    policy, data = algorithm.policy().module, random_batch(algorithm, first=(4,))
    kept, chosen = [], []
    with torch.no_grad():
        for t in range(7):
            action, latent = policy(data["observation"][:, t], data["is_first"][:, t])
            kept.append(latent)
            chosen.append(action)
        data["action"], data[LATENT] = torch.stack(chosen, 1), torch.stack(kept, 1)
        states, _ = algorithm.observe(data)
    packed = algorithm.model.pack(states)
    torch.testing.assert_close(packed, data[LATENT][:, 1:], rtol=0, atol=1e-2)
    assert torch.equal(packed[..., algorithm.model.deter :], data[LATENT][:, 1:, algorithm.model.deter :])


def test_states_are_reset_at_the_start_of_an_episode():
    algorithm = make_dreamer_v3()
    data = random_batch(algorithm, first=(4,))
    base = observe(algorithm, data)
    for key in ("observation", "action", LATENT):
        changed = data.clone()
        changed[key][0, :4] = 3.0
        other = observe(algorithm, changed)
        assert torch.equal(base.deter[:, 3:], other.deter[:, 3:])
        assert torch.equal(base.stoch[:, 3:], other.stoch[:, 3:])
        assert torch.equal(base.deter[1:], other.deter[1:])  # other sequences
        assert not torch.equal(base.deter[0, :3], other.deter[0, :3])


def test_only_latent_and_action_of_the_first_record_are_used():
    algorithm = make_dreamer_v3()
    data = random_batch(algorithm)
    data["is_first"][:, 0] = False
    base = observe(algorithm, data)
    for key, matters in (("observation", False), ("action", True), (LATENT, True)):
        changed = data.clone()
        changed[key][:, 0] = 3.0
        assert torch.equal(observe(algorithm, changed).deter, base.deter) != matters


def test_actions_are_clipped_to_their_bounds():
    algorithm = make_dreamer_v3()
    data = random_batch(algorithm)
    data["action"][:] = 1.0
    base = observe(algorithm, data)
    data["action"][:] = 50.0
    torch.testing.assert_close(observe(algorithm, data).deter, base.deter)


def test_the_world_model_equals_torchrls():
    """One step of TorchRL's prior and posterior with the same parameters."""
    model = make_dreamer_v3().model
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
        modules = [gru.from_deter, gru.from_stoch, gru.from_action]
        reference_modules = [prior.rnn.belief_projection, prior.rnn.state_projection, prior.rnn.action_projection]
        modules.append(model.prior_head)
        reference_modules.append(prior.rnn_to_prior_projector)
        for module, reference_module in zip(modules, reference_modules, strict=True):
            for a, b in zip(module.parameters(), reference_module.parameters(), strict=True):
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
        data = random_batch(make_dreamer_v3())
        state = model.unpack(data[LATENT][:, 0])
        action, embedding = 2 * torch.randn(3, 1), torch.randn(3, size.units)
        logits, belief = prior._belief_and_logits(state.stoch, state.deter, action)
        deter = gru(state, gru.action_part(action))
        torch.testing.assert_close(deter, belief, rtol=1e-5, atol=1e-5)
        mixed = (0.99 * logits.softmax(-1) + 0.01 / size.classes).log()
        torch.testing.assert_close(model.prior(deter), mixed, rtol=1e-4, atol=1e-4)
        mixed = (0.99 * posterior._logits(belief, embedding).softmax(-1) + 0.01 / size.classes).log()
        log_probs = model.posterior(deter, model.from_embedding(embedding))
        torch.testing.assert_close(log_probs, mixed, rtol=1e-4, atol=1e-4)


def test_packing_a_latent_state_is_lossless():
    model = make_dreamer_v3().model
    data = random_batch(make_dreamer_v3())
    state = model.unpack(data[LATENT])
    assert torch.equal(model.pack(state), data[LATENT])
    assert (state.stoch.unflatten(-1, model.choices).sum(-1) == 1).all()
