"""World Models: vision V, memory M, controller C, training stages, and dream envs."""

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from lightning import Callback
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs import GymWrapper, check_env_specs

import toy_envs  # noqa: F401
from checks import build_algorithm, metrics, run_without_trainer, same, saved_state, with_value
from levin import resume
from levin.algorithms.world_models import WorldModels
from levin.algorithms.world_models_evolution import Evolution
from levin.algorithms.world_models_networks import Controllers, LatentState, Memory, Mixture, Vision
from levin.config.compose import compose
from levin.core.errors import ConfigError
from levin.core.spaces import EMPTY
from levin.data.sequences import LATENT
from levin.deploy.package import package
from levin.envs import dodge
from levin.envs.config import EVALUATION, EnvConfig
from levin.envs.factory import load_env, make_env
from levin.envs.single import make_single_env
from levin.evaluate import evaluate_run
from levin.model_based.dream_env import DreamEnv, LatentEnv
from levin.training.session import build_run, train
from levin.training.video import record_video

SMALL = (
    *("algo=world_models", "env=dodge", "env.num_envs=2", "logger=csv", "log_every=20", "trainer.threads=1"),
    *("algo.latent_size=4", "algo.memory_size=8", "algo.memory_batch_length=6", "algo.memory_batch_size=4"),
    *("algo.vision_updates=10", "algo.vision_batch_size=8", "algo.memory_updates=10", "algo.population=4"),
    *("algo.rollouts=2", "algo.generations=3", "algo.dream_length=12", "algo.steps_per_iteration=10"),
    *("algo.rounds=2", "total_env_steps=120", "eval.every=1000", "eval.episodes=2", "checkpoint.every=1000"),
)
IN_THE_ENV = (
    *("algo.controller_training=real", "algo.rounds=1", "algo.collect_env_steps=100", "total_env_steps=400"),
    *("algo.population=2", "algo.rollouts=1", "algo.generations=50"),
)
MIXTURE = Mixture(
    *(torch.tensor([each]).double() for each in ([math.log(0.3), math.log(0.7)], [0, 1.0], [0, -0.6931472]))
)


def make_world_models(*overrides: str) -> WorldModels:
    """Build a small WorldModels with its optimizers, without a Trainer."""
    return build_algorithm(*SMALL, *overrides)


def count_parameters(*modules: torch.nn.Module) -> int:
    """Return the number of parameters of modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def env_description(**action: Any) -> Any:
    """Return the description of an env with pixels and the given action space."""
    observation = {**EMPTY, "shape": [3, 64, 64], "dtype": "uint8"}
    return {"id": "a toy", "num_envs": 1, "observation": observation, "action": {**EMPTY, **action}}


# --- V, M and C


def test_parameter_counts_are_the_published_ones():
    assert count_parameters(Vision([3, 64, 64], 32)) == 4_348_547
    assert count_parameters(Vision([3, 64, 64], 64)) == 4_446_915
    car = Memory(32, 3, 256, 5)
    assert count_parameters(car.from_input, car.from_hidden, car.mixture_head) == 422_368
    doom = Memory(64, 2, 512, 5)  # reads `is_first` beside one action
    assert count_parameters(doom.from_input, doom.from_hidden, doom.mixture_head, doom.end_head) == 1_678_785
    assert Controllers(32 + 256, env_description(shape=[3])).size == 867


@pytest.mark.parametrize("shape", [[1, 16, 16], [3, 64, 64], [3, 40, 60]])
def test_the_vision_model_encodes_and_decodes_images(shape):
    vision = Vision(shape, 5)
    pixels = torch.randint(256, (2, *shape), dtype=torch.uint8)
    mean, log_variance = vision.encode(pixels)
    assert mean.shape == log_variance.shape == (2, 5)
    decoded = vision.decode(mean)
    assert decoded.shape == (2, *shape)
    assert 0 < decoded.min() < decoded.max() < 1


def test_negative_log_likelihood_of_a_mixture():
    assert MIXTURE.nll(torch.tensor([0.5]).double()).item() == pytest.approx(0.811078, abs=1e-6)
    two = Mixture(*(each.repeat(2, 1) for each in MIXTURE))  # the mean over two entries
    assert two.nll(torch.tensor([0.5, 0.5]).double()).item() == pytest.approx(0.811078, abs=1e-6)
    for far in (-1e3, 1e3):
        assert MIXTURE.nll(torch.tensor([far]).double()).isfinite().all()


@pytest.mark.parametrize(
    ("temperature", "share"), [(0.1, 0.9998), (0.5, 0.8448), (1.0, 0.7), (1.15, 0.6763), (1.3, 0.6574)]
)
def test_samples_of_a_mixture(temperature, share):
    """A temperature tau takes weights to the power of 1 / tau and multiplies standard deviations by sqrt(tau)."""
    torch.manual_seed(0)
    num = 200_000
    noise = torch.randn(num, 2).double()
    drawn = Mixture(*(each.expand(num, 1, 2) for each in MIXTURE)).sample(noise, temperature).flatten()
    mean = share
    variance = share * (0.25 * temperature + 1) + (1 - share) * temperature - mean**2
    assert drawn.mean().item() == pytest.approx(mean, abs=4 * (variance / num) ** 0.5 + 1e-4)
    assert drawn.var().item() == pytest.approx(variance, rel=0.03)
    apart = Mixture(MIXTURE.log_share, torch.tensor([[0.0, 100.0]]), MIXTURE.log_std)
    second = Mixture(*(each.expand(num, 1, 2) for each in apart)).sample(noise, temperature) > 50
    assert second.double().mean().item() == pytest.approx(share, abs=4e-3)


def test_kl_of_an_image_and_its_tolerance():
    """The KL of two latent entries, above and below the tolerance."""
    losses = {}
    for tolerance in (0.0, 0.5):
        algorithm = make_world_models("algo.latent_size=2", f"algo.kl_tolerance={tolerance}")
        numbers = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -1.0]])
        algorithm.model.vision.encode = lambda _, numbers=numbers: numbers
        algorithm.model.vision.decode = lambda z: torch.zeros(1, 1, 16, 16)
        loss, terms = algorithm.vision_loss(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))
        assert terms["kl"].item() == pytest.approx(0.683940, abs=1e-5)
        losses[tolerance] = loss.item()
    assert losses == pytest.approx({0.0: 0.683940, 0.5: 1.0}, abs=1e-5)


def test_reconstruction_is_summed_over_the_pixels():
    algorithm = make_world_models()
    algorithm.model.vision.decode = lambda z: torch.full((2, 1, 16, 16), 0.5)
    _, terms = algorithm.vision_loss(torch.full((2, 1, 16, 16), 255, dtype=torch.uint8))
    assert terms["reconstruction"].item() == pytest.approx(0.25 * 256)


def test_the_memory_equals_pytorchs_lstm():
    actual, reference = Memory(4, 2, 8, 3), torch.nn.LSTM(6, 8, batch_first=True)
    with torch.no_grad():
        reference.weight_ih_l0.copy_(actual.from_input.weight)
        reference.weight_hh_l0.copy_(actual.from_hidden.weight)
        reference.bias_ih_l0.copy_(actual.from_input.bias)
        reference.bias_hh_l0.zero_()
    z, action = torch.randn(3, 7, 4), torch.randn(3, 7, 2)
    first = torch.zeros(3, 7, 1, dtype=torch.bool)
    torch.testing.assert_close(
        actual.unroll(z, action, first), reference(torch.cat([z, action], -1))[0], rtol=1e-5, atol=1e-6
    )


def test_the_memory_is_reset_at_the_start_of_an_episode():
    memory, z, action = Memory(4, 2, 8, 3), torch.randn(3, 7, 4), torch.randn(3, 7, 2)
    first = torch.zeros(3, 7, 1, dtype=torch.bool)
    first[1, 3] = True
    before = memory.unroll(z, action, first)
    z, action = z.clone(), action.clone()
    z[1, :3], action[1, :3] = 9.0, -9.0
    after = memory.unroll(z, action, first)
    assert torch.equal(before[1, 3:], after[1, 3:])
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1, :3], after[1, :3])


def random_windows(algorithm: WorldModels) -> dict[str, Tensor]:
    """Return random windows `[3, 7]` of records.

    An episode terminates at record 3 of the first window, and is abandoned after record 3 of the second.
    """
    generator = torch.Generator().manual_seed(0)
    flags = {key: torch.zeros(3, 7, 1, dtype=torch.bool) for key in ("is_first", "is_terminal", "is_last")}
    flags["is_terminal"][0, 3] = flags["is_last"][0, 3] = flags["is_first"][:2, 4] = True
    latent = torch.randn(3, 7, 2 * algorithm.latent_size, generator=generator)
    latent[..., algorithm.latent_size :] = -50  # log-variance: practically no noise
    action = torch.nn.functional.one_hot(torch.randint(3, (3, 7), generator=generator), 3).float()
    return {**flags, LATENT: latent, "action": action, "reward": torch.randn(3, 7, 1, generator=generator)}


def test_memory_loss_by_hand():
    algorithm = make_world_models("algo.end_weight=10")
    batch = random_windows(algorithm)
    _, terms = algorithm.memory_loss(batch)
    z = batch[LATENT][..., : algorithm.latent_size]
    nll, reward_loss, end_loss, num = 0.0, 0.0, 0.0, 0
    for row in range(3):
        hidden = cell = torch.zeros(1, 8)
        for t in range(6):
            if batch["is_first"][row, t]:
                hidden = cell = torch.zeros(1, 8)
            inputs = algorithm.model.memory.from_input(torch.cat([z[row, t], batch["action"][row, t]])[None])
            hidden, cell = algorithm.model.memory(inputs, hidden, cell)
            if batch["is_first"][row, t + 1] or batch["is_last"][row, t]:
                continue
            mixture, reward, end = algorithm.model.memory.predict(hidden)
            nll += mixture.nll(z[row, t + 1][None]).item()
            reward_loss += (reward - batch["reward"][row, t + 1]).square().item()
            log = torch.nn.functional.logsigmoid
            end_loss -= (10 * log(end) if batch["is_terminal"][row, t + 1] else log(-end)).item()
            num += 1
    assert num == 16
    actual = {name: value.item() for name, value in terms.items()}
    assert actual == pytest.approx(
        {"nll": nll / num, "reward_loss": reward_loss / num, "end_loss": end_loss / num}, rel=1e-4
    )


def test_each_candidate_is_a_linear_controller():
    algorithm = make_world_models()
    controllers, features = algorithm.controllers, algorithm.model.features
    numbers = torch.randn(5, controllers.size)
    feature = torch.randn(5, 2, features)
    chosen = controllers(numbers, feature)
    for each in range(5):
        weight, bias = numbers[each, : features * 3].view(features, 3), numbers[each, features * 3 :]
        assert torch.equal(chosen[each], (feature[each] @ weight + bias).argmax(-1))
    z_controllers = Controllers(4, algorithm.env)
    other = torch.cat([feature[..., :4], torch.randn(5, 2, features - 4)], -1)
    numbers = torch.randn(5, z_controllers.size)
    assert torch.equal(z_controllers(numbers, feature), z_controllers(numbers, other)), "reads z alone"


def test_continuous_actions_are_within_their_bounds():
    controllers = Controllers(6, env_description(shape=[2]))
    chosen = controllers(torch.randn(4, controllers.size), 9 * torch.randn(4, 3, 6))
    assert chosen.shape == (4, 3, 2)
    assert 0.9 < chosen.abs().max() <= 1


# --- evolution of the controller


def test_cma_es_finds_the_minimum_of_a_sphere():
    algorithm = make_world_models("algo.population=12", "algo.initial_std=0.5", "algo.generations=1000")
    algorithm.evolution.begin(1, torch.full((20,), 0.5))
    for _ in range(300):
        asked = algorithm.evolution.ask()
        mean = algorithm.evolution.tell(asked, -torch.tensor([float(each @ each) for each in asked]).double())
    assert float(mean.square().sum()) < 1e-8


def test_cma_es_is_restored_from_its_saved_state():
    algorithm = make_world_models("algo.generations=1000")
    algorithm.evolution.begin(3, torch.zeros(algorithm.controllers.size))
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    for _ in range(5):
        asked = algorithm.evolution.ask()
        algorithm.tell(asked, torch.tensor([float(each.sum()) for each in asked]).double())
    assert (np.random.get_state()[1] == before).all(), "the run's random stream must not change"
    mean = algorithm.evolution.strategy.result.xfavorite
    assert (algorithm.controllers.best.numpy() == mean.astype(np.float32)).all()
    again = Evolution(algorithm.population, algorithm.evolution.initial_std)
    again.load_state_dict(algorithm.evolution.state_dict())
    again.restore()
    for actual, reference in zip(algorithm.evolution.ask(), again.ask(), strict=True):
        assert np.array_equal(actual, reference)


def test_the_same_controller_has_the_same_return_in_the_same_dreams():
    algorithm = make_world_models()
    algorithm.model.starts.random_(256)
    numbers = torch.randn(1, algorithm.controllers.size).expand(4, -1)
    returns, length = algorithm.evaluate_in_dreams(numbers, [5, 6, 7])
    assert returns.shape == length.shape == (4, 3)
    assert torch.equal(returns, returns[:1].expand(4, -1))
    assert not torch.equal(returns, algorithm.evaluate_in_dreams(numbers, [8, 9, 10])[0])


def test_finished_dreams_earn_no_further_reward():
    algorithm = make_world_models("algo.end_weight=1", "algo.dream_length=9", "algo.temperature=1")
    algorithm.model.starts.random_(256)
    memory = algorithm.model.memory
    with torch.no_grad():
        for head, bias in ((memory.reward_head, 2.0), (memory.end_head, -50.0)):
            head.weight.zero_()
            head.bias.fill_(bias)
    numbers = torch.randn(2, algorithm.controllers.size)
    assert algorithm.evaluate_in_dreams(numbers, [1])[0].flatten().tolist() == [18.0, 18.0]
    with torch.no_grad():
        memory.end_head.bias.fill_(50.0)
    returns, length = algorithm.evaluate_in_dreams(numbers, [1])
    assert returns.flatten().tolist() == [2.0, 2.0]
    assert length.flatten().tolist() == [1, 1]
    with torch.no_grad():
        memory.end_head.bias.fill_(math.log(0.25))  # an end probability of 1/5
    algorithm.dream_length = 1000
    lengths = algorithm.evaluate_in_dreams(numbers[:1], list(range(2000)))[1]
    assert lengths.mean().item() == pytest.approx(5, abs=0.4)
    algorithm.model.end_weight, algorithm.end_weight = 10.0, 10.0  # dreams correct for the weight of ends
    with torch.no_grad():
        memory.end_head.bias.add_(math.log(10))
    assert algorithm.evaluate_in_dreams(numbers[:1], list(range(2000)))[1].mean().item() == pytest.approx(5, abs=0.4)


# --- stages


class StopAt(Callback):
    """Callback that stops a run when its clock reaches a value."""

    def __init__(self, clock: int) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.clock >= self.clock:
            trainer.should_stop = True


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Train without interruption, with the controller evolved in dreams; return the run folder."""
    run = tmp_path_factory.mktemp("straight")
    train(compose([*SMALL, "algo.controller_training=dream"]), run)
    return run


def test_env_steps_do_not_increase_while_dreaming(straight):
    rows = metrics(straight)
    dreaming = [row for row in rows if row.get("train/fitness")]
    assert {row["env_steps"] for row in dreaming} == {"60", "120"}
    dreamt = [int(float(row["dream_steps"])) for row in dreaming]
    assert dreamt == sorted(set(dreamt))
    assert saved_state(straight)["levin"]["env_steps"] == 120
    assert saved_state(straight)["levin"]["updates"] == 40
    assert saved_state(straight)["stages"]["round"] == 2


# Each of the two rounds has 60 env steps, 10 updates of V, 10 of M, and 3 generations of 8 dreams.
@pytest.mark.parametrize("clock", [20, 60, 70, 80, 88, 96, 104, 130, 164, 174, 184, 192, 200])
def test_a_run_resumed_in_any_stage_is_identical(clock, straight, tmp_path):
    """The clock values lie in every stage of both rounds."""
    overrides = [*SMALL, "algo.controller_training=dream"]
    overrides.append(f"+callbacks.stop={{_target_:test_world_models.StopAt,clock:{clock}}}")
    cfg = compose(overrides)
    train(cfg, tmp_path / "run")
    stopped = saved_state(tmp_path / "run")
    assert stopped["stages"]["round"] < 2
    torch.manual_seed(9), np.random.seed(9)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace(f"clock: {clock}", "clock: 1000000"))
    resume.resume(run=str(tmp_path / "run"), trust=True)  # the callback's entry has changed
    one, other = saved_state(straight), saved_state(tmp_path / "run")
    assert one.keys() == other.keys()
    for key in one:
        assert same(one[key], other[key]), key
    assert metrics(straight) == metrics(tmp_path / "run")


@pytest.fixture(scope="module")
def straight_in_the_env(tmp_path_factory) -> Path:
    """Train without interruption, with the controller evolved in the env; return the run folder."""
    run = tmp_path_factory.mktemp("in_the_env")
    train(compose([*SMALL, *IN_THE_ENV]), run)
    return run


@pytest.mark.parametrize("clock", [130, 200, 300])
def test_a_run_resumed_while_evolving_in_the_env_is_identical(clock, straight_in_the_env, tmp_path):
    train(compose([*SMALL, *IN_THE_ENV, f"total_env_steps={clock}"]), tmp_path)
    assert saved_state(tmp_path)["stages"]["stage"] == "controller"
    resume.resume(run=str(tmp_path), total_env_steps=400)
    one, other = saved_state(straight_in_the_env), saved_state(tmp_path)
    assert len(one["stages"]["fitness"]) >= 2
    for key in one:
        assert same(one[key], other[key]), key


def test_collecting_after_an_evolution_in_the_env_starts_new_episodes():
    algorithm = make_world_models("algo.controller_training=real", "algo.generations=1", "total_env_steps=1000")
    algorithm.evolution.begin(1, torch.zeros(algorithm.controllers.size))
    algorithm.stage = "controller"
    algorithm.buffer.begins, algorithm.buffer.reward = torch.zeros(2, 1, dtype=torch.bool), torch.ones(2, 1)
    algorithm.tell(algorithm.evolution.ask(), torch.arange(4.0).double())
    assert algorithm.stage == "collect"
    assert algorithm.buffer.begins.all()
    assert not algorithm.buffer.reward.any()


@pytest.mark.parametrize(
    ("round_", "stage", "ends"), [(0, "vision", False), (0, "controller", True), (1, "collect", True)]
)
def test_a_run_in_the_env_ends_with_a_controller_that_fits_its_model(round_, stage, ends):
    """When the env steps of a later round end, V and M are not trained anew: no steps are left to evolve C for them."""
    algorithm = make_world_models("algo.controller_training=real", "algo.collect_env_steps=500", "total_env_steps=1000")
    algorithm.round, algorithm.stage, algorithm.env_steps = round_, stage, 1000
    assert algorithm.finished(1000) is ends


def test_replay_stores_the_encoding_of_each_image():
    algorithm, loader = build_run(compose([*SMALL, "algo.collect_env_steps=400", "total_env_steps=400"]))
    algorithm.configure_optimizers()
    for rollout, _ in zip(loader, range(8), strict=False):
        algorithm.collect(rollout)
    data = algorithm.buffer.data
    assert data["is_last"].any()
    assert not data["latent"].any()
    algorithm.encode_buffer()
    expected = torch.cat(algorithm.model.vision.encode(data["observation"].flatten(0, 1)), -1)
    torch.testing.assert_close(data["latent"].flatten(0, 1), expected.detach())


def test_trials_interrupted_by_a_resume_are_repeated():
    algorithm = make_world_models(
        "algo.controller_training=real", "algo.population=2", "algo.rollouts=1", "env.num_envs=1"
    )
    algorithm.evolution.begin(1, torch.zeros(algorithm.controllers.size))
    algorithm.stage = "controller"
    algorithm.next_generation()
    algorithm.next_generation = lambda: None

    def rollout(trials: list[int], end_steps: list[int]) -> TensorDict:
        done = torch.tensor([t in end_steps for t in range(len(trials))]).view(1, -1, 1)
        after = {"reward": torch.ones(1, len(trials), 1), "done": done}
        return TensorDict({"trial": torch.tensor(trials).view(1, -1, 1), "next": after}, batch_size=(1, len(trials)))

    algorithm.evolve_in_env(rollout([0, 0, 1], [1]))
    assert algorithm.returns == {0: 2.0}
    algorithm.evolve_in_env(rollout([1, 2, 2], [2]))  # a resume has dropped the unfinished episode of trial 1
    assert algorithm.trials.queue == [0, 1, 1]
    assert algorithm.spent == 1
    assert algorithm.evolution.fitness[0].tolist() == [2.0, 2.0]


def test_each_candidate_plays_its_number_of_trials():
    algorithm = make_world_models("algo.controller_training=real", "algo.population=3", "algo.rollouts=2")
    trials = algorithm.trials
    trials.begin(torch.arange(6.0).view(3, 2), [0, 1, 2, 0, 1, 2])
    trials.assign_next(torch.tensor([True, True]))
    assert trials.current_weights().tolist() == [[0, 1], [2, 3]]
    for first in ([False, True], [True, False], [True, True]):
        trials.assign_next(torch.tensor(first))
    assert trials.trial == [4, 5]
    assert trials.current_weights().tolist() == [[2, 3], [4, 5]]
    trials.assign_next(torch.tensor([True, False]))
    assert trials.trial == [-1, 5]
    assert trials.current_weights().tolist() == [[0, 1], [4, 5]]


# --- dream envs


def dream_env(run: Path, num_envs: int = 3, **options: Any) -> Any:
    """Make the dream env of a run's world model."""
    env = EnvConfig(id="dream", family="dream", run=str(run), num_envs=num_envs, action="rescale", **options)
    return make_env(env, seed=0)


def test_a_dream_env_passes_torchrls_checks(straight):
    env = dream_env(straight)
    assert isinstance(env.env, DreamEnv)
    check_env_specs(GymWrapper(env.env), seed=0)


def test_a_dream_depends_only_on_its_own_seed_and_actions(straight):
    env = dream_env(straight).env
    actions = np.random.default_rng(0).integers(3, size=(40, 3))

    def played(seeds: list[int], actions: np.ndarray) -> list[np.ndarray]:
        shown = [env.reset(seed=seeds)[0][1]]
        for t in range(40):
            observation, reward, terminated, _, _ = env.step(actions[t])
            shown.append(np.append(observation[1], [reward[1], terminated[1]]))
        return shown

    first = played([1, 2, 3], actions)
    others = actions.copy()
    others[:, [0, 2]] = 0
    again = played([7, 2, 8], others)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(first, again, strict=True))
    assert not all(np.allclose(a, b, atol=1e-6) for a, b in zip(first, played([1, 5, 3], actions), strict=True))


def test_the_temperature_changes_a_dream_of_the_same_seeds_and_actions(straight):
    played = []
    for temperature in (1.0, 0.5):
        env = dream_env(straight, temperature=temperature).env
        env.reset(seed=[1, 2, 3])
        played.append(env.step(np.zeros(3, dtype=int))[0])
    assert not np.allclose(*played)


def test_only_the_dreams_in_the_reset_mask_are_reset(straight):
    env = dream_env(straight).env
    env.reset(seed=[1, 2, 3])
    before, *_ = env.step(np.array([0, 1, 2]))
    after, _ = env.reset(seed=[None, 9, None], options={"reset_mask": np.array([False, True, False])})
    assert np.array_equal(before[[0, 2]], after[[0, 2]])
    assert not np.array_equal(before[1], after[1])
    assert env.length.tolist() == [1, 0, 1]


def test_a_dream_is_truncated_at_the_time_limit(straight):
    env = dream_env(straight, time_limit=4).env
    env.reset(seed=[1, 2, 3])
    assert [bool(env.step(np.zeros(3, dtype=int))[3].all()) for _ in range(4)] == [False, False, False, True]


def test_features_in_the_env_equal_those_of_training(straight):
    """The features of `LatentEnv`, of the policy, and of M on the records of the episode are equal."""
    cfg = EnvConfig(id="levin.dodge:Dodge-v0", run=str(straight), wrappers=["latent"])
    latent, plain = make_env(cfg, seed=0), make_env(load_env(straight), seed=0, num_envs=1)
    assert isinstance(latent.env, LatentEnv)
    model: Any = latent.env.model
    seen, shown = [latent.reset()[0]], [plain.reset()[0]]
    actions = np.random.default_rng(0).integers(3, size=(12, 1))
    for action in actions:
        seen.append(latent.step(action)[0])
        observation, _, terminated, truncated, _ = plain.step(action)
        shown.append(observation)
        if terminated[0] or truncated[0]:
            break
    num = len(seen) - 1
    assert num > 3
    pictures = torch.from_numpy(np.concatenate(shown))
    z, _ = model.vision.encode(pictures)
    action = model.encode_action(torch.from_numpy(actions[:num, 0]))
    first = torch.zeros(1, num, 1, dtype=torch.bool)
    hidden = model.memory.unroll(z[None, :-1], action[None], first)[0]
    expected = torch.cat([z[1:], hidden], -1)
    torch.testing.assert_close(torch.from_numpy(np.concatenate(seen[1:])), expected, rtol=1e-4, atol=1e-5)
    algorithm = make_world_models()
    algorithm.load_state_dict(saved_state(straight)["state_dict"])
    policy = algorithm.policy(deterministic=True).module
    with torch.inference_mode():
        for t in range(num):
            policy.carry.action = (
                policy.carry.action if t == 0 else model.encode_action(torch.from_numpy(actions[t - 1]))
            )
            policy(pictures[t : t + 1], torch.tensor([[t == 0]]))
            feature = LatentState(policy.carry.stoch, *policy.carry.deter.chunk(2, -1)).feature
            torch.testing.assert_close(feature, torch.from_numpy(seen[t]), rtol=1e-4, atol=1e-5)


def test_another_algorithm_trains_in_a_dream_and_is_evaluated_in_the_env(straight, tmp_path):
    overrides = ["algo=ppo", "env=dream", f"env.run={straight}", "env.num_envs=4", "logger=csv", "total_env_steps=256"]
    overrides += ["algo.steps_per_iteration=32", "algo.batch_size=64", "eval.every=128", "eval.episodes=3"]
    cfg = compose(overrides)
    train(cfg, tmp_path / "run")
    rows = [row for row in metrics(tmp_path / "run") if row["eval/return_mean"]]
    assert len(rows) == 2
    result = evaluate_run(run=str(tmp_path / "run"), episodes=4)
    real = make_env(load_env(tmp_path / "run"), seed=1, purpose=EVALUATION, num_envs=2)
    assert isinstance(real.env, LatentEnv)
    assert real.env.env.single_observation_space.shape == (16, 16)
    assert result["episodes"] == 4
    train(compose([*overrides, "total_env_steps=128"]), tmp_path / "halves")
    resume.resume(run=str(tmp_path / "halves"), total_env_steps=256)
    assert same(saved_state(tmp_path / "run")["state_dict"], saved_state(tmp_path / "halves")["state_dict"])
    with pytest.raises(ConfigError, match="has learned from the latent state of the world model"):
        package(tmp_path / "run", "torch", seed=0, steps=1)


@pytest.mark.parametrize("option", ["pixels=64", "frame_stack=2", "action_repeat=2", "vectorization=async"])
def test_options_that_a_dream_does_not_have_are_refused(option, straight, tmp_path):
    words = ["algo=ppo", "env=dream", f"env.run={straight}", f"env.{option}", "logger=csv"]
    with pytest.raises(ConfigError, match=f"env.{option.partition('=')[0]} can't be set for env.family=dream"):
        train(compose(words), tmp_path / "run")


@pytest.mark.parametrize(
    ("algo", "env", "overrides"),
    [
        ("dreamer", "pendulum", ()),
        ("dreamer", "cartpole", ("algo.continue_scale=1",)),
        ("dreamer_v3", "pendulum", ()),
        ("dreamer_v3", "cartpole", ()),
    ],
)
def test_dream_envs_of_dreamer(algo, env, overrides, tmp_path):
    small = ["algo.size=micro", "algo.batch_size=4", "algo.batch_length=4", "algo.horizon=3", "algo.replay_ratio=0.1"]
    small += ["algo.learning_starts=40", "env.num_envs=1", "logger=csv", "total_env_steps=64", "eval.episodes=2"]
    train(compose([f"algo={algo}", f"env={env}", *small, *overrides]), tmp_path / "run")
    vector = dream_env(tmp_path / "run", num_envs=2)
    check_env_specs(GymWrapper(vector.env), seed=0)
    model: Any = vector.env.model
    observation, _ = vector.reset()
    for _ in range(3):
        action = np.stack([vector.single_action_space.sample() for _ in range(2)])
        observation, reward, *_ = vector.step(action)
    assert np.isfinite(observation).all()
    assert np.isfinite(reward).all()
    assert observation.shape == (2, model.features)
    latent = vector.env.latent
    with torch.inference_mode():
        encoded = model.encode_action(torch.as_tensor(action))
        drawn = [model.imagine(latent, encoded, torch.randn(2, model.noise), 1.0)[0] for _ in range(300)]
        cold = [model.imagine(latent, encoded, torch.randn(2, model.noise), 1e-6)[0] for _ in range(3)]
    assert all(torch.equal(each.deter, drawn[0].deter) for each in drawn), "deter is deterministic"
    assert all(torch.allclose(each.stoch, cold[0].stoch, atol=1e-2) for each in cold)
    mean = torch.stack([each.stoch for each in drawn]).mean(0)
    if algo == "dreamer":
        from levin.algorithms.dreamer_networks import to_gaussian

        _, seed = model.transition(latent, model.into_action(encoded))
        expected = to_gaussian(model.prior_head(seed)).mean
    else:
        expected = model.prior(drawn[0].deter).exp().flatten(-2)
    torch.testing.assert_close(mean, expected.to(mean), rtol=0, atol=0.2)
    real = make_env(vector.config, seed=1, purpose=EVALUATION, num_envs=2)
    assert real.reset()[0].shape == (2, model.features)
    if (algo, env) == ("dreamer", "pendulum"):  # the model was trained with env.action=rescale, A2C's default is clip
        config = EnvConfig(id="Pendulum-v1", action="clip", wrappers=["latent"], run=str(tmp_path / "run"))
        latent = make_env(config, seed=1, num_envs=1).env
        assert isinstance(latent, LatentEnv)
        assert latent.to_env(np.array([[0.5]], np.float32)).item() == 1.0


def test_invalid_settings_are_config_errors(straight, tmp_path):
    unfinished = tmp_path / "unfinished"
    overrides = [
        *SMALL,
        "algo.controller_training=dream",
        "+callbacks.stop={_target_:test_world_models.StopAt,clock:70}",
    ]
    train(compose(overrides), unfinished)
    other = tmp_path / "sac"
    train(compose(["algo=sac", "env=pendulum", "total_env_steps=64", "logger=csv", "eval.episodes=1"]), other)
    for options, sentence in (
        ({"run": str(unfinished)}, "V and M of that run are not trained yet"),
        ({"run": str(other)}, "SAC, which has no world model"),
        ({"run": None}, "env.family=dream needs the run of a world model"),
        ({"run": str(tmp_path / "nowhere")}, "is not a run folder"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make_env(EnvConfig(id="dream", family="dream", **options), seed=0)
    with pytest.raises(ConfigError, match=r"needs the observations uint8 .*, but the env has float32"):
        make_env(EnvConfig(id="CartPole-v1", wrappers=["latent"], run=str(straight)), seed=0)
    with pytest.raises(ConfigError, match=r"env\.run="):
        make_env(EnvConfig(id="levin.dodge:Dodge-v0", wrappers=["latent"]), seed=0)
    for word, sentence in (
        ("algo.temperature=0", "algo.temperature"),
        ("env.temperature=-1", "env.temperature"),
        ("algo.population=1", "needs at least 2 candidates"),
        ("algo.collect_env_steps=20", "too small for one window of each env"),
        ("algo.buffer_size=9", "too small for one window of each env"),
        ("env.normalize_reward=true", "needs unnormalized observations"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            make_world_models(word)
    with pytest.raises(ConfigError, match="leaves no env steps to evolve the controller"):
        train(compose([*SMALL, "algo.controller_training=real"]), tmp_path / "real")
    with pytest.raises(ConfigError, match="total_env_steps=10 is less than"):
        train(compose([*SMALL, "total_env_steps=10", "algo.collect_env_steps=80"]), tmp_path / "short")
    with pytest.raises(ConfigError, match="reads pixels, but the observations of CartPole-v1 contain vectors"):
        build_run(compose(["algo=world_models", "env=cartpole"]))


def test_every_hyper_parameter_has_an_effect(tmp_path):
    """The tests above check the exact effect of each."""
    changes = {
        "rounds": 1,
        "collect_env_steps": 160,
        "latent_size": 3,
        "memory_size": 6,
        "mixtures": 2,
        "vision_updates": 12,
        "vision_batch_size": 6,
        "vision_lr": 1e-2,
        "kl_tolerance": 5.0,
        "memory_updates": 12,
        "memory_batch_size": 3,
        "memory_batch_length": 5,
        "memory_lr": 1e-2,
        "max_grad_norm": 0.01,
        "end_weight": 2.0,
        "controller_training": "real",
        "controller_input": "latent",
        "temperature": 0.5,
        "dream_length": 5,
        "generations": 2,
        "population": 5,
        "rollouts": 3,
        "initial_std": 1.0,
        "buffer_size": 40,
        "steps_per_iteration": 20,
    }
    overrides = [*SMALL, "algo.controller_training=dream", "algo.kl_tolerance=0", "eval.episodes=1"]
    overrides += ["algo.collect_env_steps=120", "total_env_steps=200"]
    config = compose(overrides)
    assert changes.keys() == set(config.algo) - {"_target_", "buffer_storage", "compile"}
    base = run_without_trainer(config)
    train(config, tmp_path / "run")
    assert same(saved_state(tmp_path / "run")["state_dict"], base)
    for name, value in changes.items():
        assert not same(base, run_without_trainer(with_value(config, f"algo.{name}", value))), name


def test_dodge():
    """The view moves with the player; a hit ends the episode; the light blinks; the seed determines everything."""
    env = make_single_env(EnvConfig(id="levin.dodge:Dodge-v0", kwargs={"balls": 1}))
    game: Any = env.unwrapped
    first, _ = env.reset(seed=3)
    assert env.observation_space.contains(first)
    again = copy.deepcopy(first)
    assert np.array_equal(env.reset(seed=3)[0], again)

    def lit(action: int) -> Any:
        game.steps = dodge.BLINK - 1
        return env.step(action)

    game.place[0], game.speed[0], game.player = (8.0, 8.0), (0.0, 0.0), 8
    bright = [int(lit(action)[0][8].argmax()) for action in (1, 2, 2)]
    assert bright[0] > bright[1] > bright[2], "when the player goes right, the ball appears further to the left"
    assert [bool(env.step(1)[0].any()) for _ in range(6)] == [False, True] * 3
    game.place[0], game.speed[0], game.player = (14.5, 8.0), (1.0, 0.0), 8
    assert env.step(1)[2]
    game.place[0], game.speed[0], game.player = (14.5, 12.0), (1.0, 0.0), 8
    assert not env.step(1)[2]
    assert game.place[0, 0] == 0, "the ball starts again from far away"
    walls = [int((lit(action)[0] == dodge.WALL).any(0).sum()) for action in [0] * 8]
    assert walls[-1] == 7


def test_the_video_shows_the_dream_beside_the_env(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run", symlinks=True)
    _, beside = record_video(run=str(tmp_path / "run"))
    assert beside.name == f"{120 + 40 + 48}_0_dream.mp4"
    frames = imageio.mimread(beside)
    assert frames[0].shape == (256, 528, 3)
    left, right = frames[0][:, :256].astype(int), frames[0][:, 272:].astype(int)
    assert abs(left - right).mean() < 3, "both start with the same image"


def test_racing_renders_once_per_action():
    """Frames, rewards and end flags equal those of an env that renders every repeated step."""
    pytest.importorskip("Box2D")
    cfg = EnvConfig(id="levin.racing:Racing-v3", action_repeat=3, time_limit=10)
    lazy, eager = make_single_env(cfg), make_single_env(cfg)
    eager.lazy = False
    drawn = []
    game: Any = lazy.unwrapped
    show = game.show
    game.show = lambda: drawn.append(1) or show()
    first, _ = lazy.reset(seed=4)
    assert np.array_equal(first, eager.reset(seed=4)[0])
    assert lazy.observation_space.contains(first)
    for step in range(4):
        action = np.array([0.3, 0.5 - 0.2 * step, -1], np.float32)
        actual, reference = lazy.step(action), eager.step(action)
        assert np.array_equal(actual[0], reference[0])
        assert actual[1:4] == reference[1:4]
    assert actual[3], "the limit of ten steps ends the fourth action"
    assert len(drawn) == 1 + 4
    assert not np.array_equal(first, actual[0])
