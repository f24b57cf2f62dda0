"""Networks that a config chooses by `algo.network`."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm, linear

import levin
from checks import build_algorithm, build_row, make_batch, metrics, saved_state
from levin import resume
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.nn.encoders import ImpalaCNN, NatureCNN, SmallCNN
from levin.nn.layers import EnsembleLayerNorm, EnsembleLinear, make_layers
from levin.training.session import train
from rows import ROWS
from short_runs import assert_identical_runs

NETWORKS = ("mlp", "layer_norm", "simba", "resnet")
# The others have no `network`; the losses of the row of TRPO are those of a changed copy of its actor.
WITHOUT = ("dreamer", "dreamer_v3", "world_models", "crossq", "trpo")
MODEL_FREE = [row for row in ROWS if row.algo not in WITHOUT]
OWN = "algo.network={_target_:own_networks.Features,width:8}"
TINY = ("algo.hidden_sizes=[16,16]", "eval.episodes=1", "logger=csv")


def reference(network: str, layers: nn.Sequential, inputs: torch.Tensor) -> torch.Tensor:
    """Return the output of a network with two hidden layers of 6 units and ReLUs, written out by hand."""
    weights = layers.parameters()

    def dense(x: torch.Tensor) -> torch.Tensor:
        return linear(x, next(weights), next(weights))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, (6,), next(weights), next(weights))

    if network == "mlp":
        return dense(dense(dense(inputs).relu()).relu())
    if network == "layer_norm":
        return dense(norm(dense(norm(dense(inputs)).relu())).relu())
    if network == "simba":
        x = dense(inputs)
        for _ in range(2):
            x = x + dense(dense(norm(x)).relu())
        return dense(norm(x))
    x = norm(dense(inputs)).relu()
    for _ in range(2):
        x = x + norm(dense(norm(dense(x)).relu()))
    return dense(x)


def randomize(module: nn.Module) -> None:
    """Give all parameters random values, also those that begin as 0 or 1."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_are_what_they_say(network):
    torch.manual_seed(0)
    layers = make_layers(network, [3, 6, 6, 2], "relu")
    randomize(layers)
    inputs = torch.randn(5, 3)
    torch.testing.assert_close(layers(inputs), reference(network, layers, inputs))


def test_a_block_of_simba_is_four_times_as_wide():
    shapes = [
        tuple(layer.weight.shape) for layer in make_layers("simba", [3, 6, 2], "relu").modules() if is_dense(layer)
    ]
    assert shapes == [(6, 3), (24, 6), (6, 24), (2, 6)]


def is_dense(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | EnsembleLinear)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_ensemble_is_as_many_single_networks(network):
    torch.manual_seed(0)
    ensemble = build_algorithm("algo=sac", "env=pendulum", f"algo.network={network}", *TINY).critic.ensemble
    randomize(ensemble)
    inputs = torch.randn(5, 4)
    outputs = ensemble(inputs)
    torch.testing.assert_close(ensemble.first(inputs), outputs[0])
    members = [each for each in ensemble.modules() if isinstance(each, EnsembleLinear | EnsembleLayerNorm)]
    for i in range(2):
        single = make_layers(network, [4, 16, 16, 1], "relu")
        places = [each for each in single.modules() if isinstance(each, nn.Linear | nn.LayerNorm)]
        for member, place in zip(members, places, strict=True):
            weight = member.weight[i].T if is_dense(member) else member.weight[i, 0]
            place.load_state_dict({"weight": weight, "bias": member.bias[i, 0]})
        torch.testing.assert_close(single(inputs), outputs[i])


@pytest.mark.parametrize("network", NETWORKS[1:])
@pytest.mark.parametrize("row", MODEL_FREE, ids=lambda row: row.algo)
def test_every_parameter_of_every_network_gets_a_gradient(row, network):
    algorithm = build_row(row, f"algo.network={network}", "algo.hidden_sizes=[16,16]")
    assert {type(each) for each in algorithm.modules()} & {nn.LayerNorm, EnsembleLayerNorm}
    trained = [name for name, each in algorithm.named_parameters() if each.requires_grad and "log_alpha" not in name]
    losses = row.losses(algorithm, make_batch(algorithm))
    torch.stack([each for each in losses if each.requires_grad]).sum().backward()
    assert [name for name in trained if algorithm.get_parameter(name).grad is None] == []


@pytest.mark.parametrize("network", [OWN, "algo.network=simba"])
@pytest.mark.parametrize(
    "overrides",
    [
        ("algo=sac", "env=pendulum", "algo.learning_starts=40", "algo.batch_size=8"),
        (
            "algo=ppo",
            "env=cartpole",
            "algo.steps_per_iteration=32",
            "algo.batch_size=16",
            *("algo.lr_schedule=constant", "algo.clip_schedule=constant"),
        ),
    ],
    ids=["sac", "ppo"],
)
def test_a_run_learns_resumes_and_loads(network, overrides, tmp_path):
    words = [*overrides, network, *TINY, "env.num_envs=1", "checkpoint.every=64"]
    train(compose([*words, "total_env_steps=128"]), tmp_path / "straight")
    train(compose([*words, "total_env_steps=64"]), tmp_path / "resumed")
    resume.resume(run=str(tmp_path / "resumed"), total_env_steps=128)
    assert_identical_runs(tmp_path / "straight", tmp_path / "resumed")
    fresh = build_algorithm(*words).state_dict()
    trained = saved_state(tmp_path / "straight")["state_dict"]
    assert all(not torch.equal(fresh[name], trained[name]) for name in fresh if name.endswith("weight"))
    policy = levin.load(str(tmp_path / "straight"))
    assert policy.algorithm.hparams["network"] == compose(words).algo.network


# --- CNNs


@pytest.mark.parametrize(
    ("network", "kind", "convolutions", "parameters"),
    [("nature", NatureCNN, 3, 1_684_128), ("small", SmallCNN, 3, 7_249_328), ("impala", ImpalaCNN, 15, 1_089_232)],
)
def test_cnns(network, kind, convolutions, parameters):
    """The parameters of Nature and IMPALA are those of the papers' networks for four frames of 84 x 84 pixels."""
    algorithm = build_algorithm("algo=ppo", "env=pong", f"algo.network={network}")
    assert type(algorithm.trunk) is kind
    assert sum(isinstance(each, nn.Conv2d) for each in algorithm.trunk.modules()) == convolutions
    assert sum(math.prod(each.shape) for each in algorithm.trunk.parameters()) == parameters
    features = algorithm.trunk(torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8))
    assert features.shape == (2, kind.num_features)


def test_a_residual_block_of_the_cnn_keeps_its_input():
    torch.manual_seed(0)
    block = next(each for each in ImpalaCNN([3, 8, 8]).layers if type(each).__name__ == "Residual")
    inputs = torch.randn(2, 16, 8, 8)
    before = inputs.clone()
    _, first, _, second = block.layers
    torch.testing.assert_close(block(inputs), before + second(first(before.relu()).relu()))
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("algo", ["dqn", "a2c", "sac_discrete"])
def test_the_cnn_of_every_network_of_an_algorithm_is_chosen(algo):
    algorithm = build_algorithm(f"algo={algo}", "env=gym", "env.id=toy_envs:FrameSteps-v0", "algo.network=impala")
    cnns = {type(each) for each in algorithm.modules()} & {NatureCNN, SmallCNN, ImpalaCNN}
    assert cnns == {ImpalaCNN}


def test_the_head_after_a_cnn_is_chosen():
    algorithm = build_algorithm("algo=ppo", "env=pong", "algo.network=layer_norm", "algo.hidden_sizes=[16]")
    assert isinstance(algorithm.trunk, NatureCNN)
    assert any(isinstance(each, nn.LayerNorm) for each in algorithm.actor.modules())


# --- one's own


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.algo not in WITHOUT or row.algo == "trpo"], ids=lambda r: r.algo
)
def test_every_trunk_of_a_user_is_trained_but_for_what_is_frozen(row, tmp_path):
    words = [f"algo={row.algo}", f"env={row.env}", *row.small, "eval.episodes=1", "logger=csv"]
    words += [f"total_env_steps={row.env_steps}", "algo.network={_target_:own_networks.Pretrained}"]
    fresh = build_algorithm(*words).state_dict()
    train(compose(words), tmp_path / "run")
    trained = saved_state(tmp_path / "run")["state_dict"]
    for name in [name for name in fresh if name.endswith(("frozen.weight", "trained.weight"))]:
        expected = torch.linspace(-1, 1, fresh[name].numel()).view_as(fresh[name])
        assert torch.equal(fresh[name], expected), f"{name} was initialised anew"
        assert torch.equal(trained[name], expected) == name.endswith("frozen.weight"), name


def test_the_trunk_of_a_user_reads_a_dict():
    words = ("algo=ppo", "env=gym", "env.id=toy_envs:Robot-v0", "env.normalize_observation=false")
    algorithm = build_algorithm(*words, "algo.network={_target_:own_networks.Parts}")
    assert type(algorithm.trunk).__name__ == "Parts"
    assert algorithm.actor.network[0].in_features == algorithm.trunk.num_features


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algo.network=swish"], "algo.network=swish: input should be 'mlp', 'layer_norm', 'simba', 'resnet'"),
        (["algo.network=impala"], "algo.network=impala reads pixels, but Pendulum-v1 has none; valid: mlp"),
        (["algo.network=simba", "algo.hidden_sizes=[16,8]"], r"so all algo.hidden_sizes must be equal, got \[16, 8\]"),
        (["env=gym", "env.id=toy_envs:Image-v0", "algo.network=nature"], "needs images of 36 pixels or more"),
        (["algo.network={_target_:nope.Nope}"], "algo.network._target_=nope.Nope can't be built: .*nope"),
        (["algo.network={width:8}"], "algo.network._target_=None can't be built"),
        (["algo.network={_target_:own_networks.Features,depth:8}"], "can't be built: .*depth"),
        (["algo.network={_target_:own_networks.NoSize}"], "with num_features, the size of its output"),
        (["algo.network={_target_:own_networks.not_a_module}"], "must be a torch.nn.Module"),
    ],
)
def test_a_wrong_network_is_refused_with_a_sentence(words, message):
    with pytest.raises(ConfigError, match=message):
        build_algorithm("algo=sac", "env=pendulum", *words)


def test_the_networks_differ(tmp_path):
    """Runs with different networks differ in what they log."""
    rows = {}
    for network in NETWORKS:
        words = ["algo=ppo", "env=cartpole", "algo.steps_per_iteration=32", "algo.batch_size=16", *TINY]
        words += ["env.num_envs=1"]
        train(compose([*words, f"algo.network={network}", "total_env_steps=64"]), tmp_path / network)
        rows[network] = metrics(tmp_path / network)[-1]["train/actor_loss"]
    assert len(set(rows.values())) == len(NETWORKS)
