"""Mistakes that a fork can make easily: each is answered with a sentence, or has no effect."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import SGD, Adam

from checks import build_algorithm, metrics
from levin.algorithms.ppo import PPO
from levin.algorithms.sac import SAC
from levin.config import schema
from levin.config.compose import compose
from levin.core.errors import ConfigError, RunError
from levin.core.omega import to_plain
from levin.evaluate import evaluate_run
from levin.nn.parameters import flatten_parameters
from levin.resume import resume
from levin.scheduler import plan
from levin.training import hooks
from levin.training.evaluation import Evaluation
from levin.training.session import train
from short_runs import SMALL

PPO_WORDS = (
    *("algo=ppo", "env=cartpole", "env.num_envs=2", "logger=csv", "eval.episodes=1", "total_env_steps=64"),
    *("algo.steps_per_iteration=16", "algo.batch_size=16", "algo.hidden_sizes=[8]"),
)
HERE = "test_mistakes_of_forks"


def of(name: str) -> str:
    return f"algo._target_={HERE}.{name}"


def test_the_gradients_of_every_group_are_zeroed():
    algorithm = build_algorithm(*PPO_WORDS)
    networks = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    flat = [flatten_parameters(network.parameters()) for network in networks[:2]]
    groups = [{"params": [flat[0]]}, {"params": [flat[1]]}, {"params": networks[2].parameters()}]
    optimizer = SGD(groups, lr=0.0)
    for _ in range(3):
        algorithm.step(optimizer, sum((network(torch.ones(1, 1)).sum() for network in networks), torch.zeros(())))
    assert [each.grad.tolist() for each in (*flat, networks[2].weight)] == [[1.0], [1.0], [[1.0]]]


class AddedFirst(PPO):
    """PPO with an added network that has its own optimiser, and is among `self.parameters()`, too."""

    def configure_optimizers(self):
        self.predictor = nn.Linear(4, 1)
        return [self.make_optimizer("adam", self.predictor.parameters(), 1e-3), super().configure_optimizers()]


class AddedLast(PPO):
    """PPO with an auxiliary loss on its actor that has its own optimiser."""

    def configure_optimizers(self):
        return [super().configure_optimizers(), Adam(self.actor.parameters())]


class Overlapping(PPO):
    """PPO with two optimisers that share one network of several."""

    def configure_optimizers(self):
        shared = list(self.actor.parameters())
        first = self.make_optimizer("adam", [*shared, *self.critic.parameters()], 1e-3)
        self.optimizer = self.make_optimizer("adam", [*self.trunk.parameters(), *shared], 1e-3)
        return [first, self.optimizer]


class Unregistered(PPO):
    """PPO with a multiplier that is no parameter of a module, which is not refused."""

    def configure_optimizers(self):
        self.multiplier = torch.zeros(1, requires_grad=True)
        return [super().configure_optimizers(), self.make_optimizer("adam", [self.multiplier], 1e-3)]


def test_a_parameter_outside_of_modules_may_have_an_optimiser(tmp_path):
    train(compose([*PPO_WORDS, of("Unregistered")]), tmp_path / "run")


@pytest.mark.parametrize("name", ["AddedFirst", "AddedLast", "Overlapping"])
def test_parameters_of_two_optimisers_are_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="two optimisers have the same parameters"):
        train(compose([*PPO_WORDS, of(name)]), tmp_path / "run")


class OwnMemory(PPO):
    """PPO whose policy keeps a state that is not part of the algorithm."""

    def policy(self, *, deterministic=False):
        policy = super().policy(deterministic=deterministic)
        policy.register_buffer("window", torch.zeros(2, 4))
        return policy


@pytest.mark.parametrize("collector", ["vector", "torchrl", "torchrl-process"])
def test_a_buffer_of_the_policy_that_is_not_saved_is_refused(collector, tmp_path):
    with pytest.raises(
        ConfigError, match="the policy of OwnMemory has a buffer window that checkpoints would not save"
    ):
        train(compose([*PPO_WORDS, of("OwnMemory"), f"collector={collector}"]), tmp_path / "run")


class HookAfterTheCheckpoint(PPO):
    """PPO with a hook that a resumed run would miss."""

    def on_train_batch_end(self, *_) -> None:
        self.lr *= 0.9


def test_a_hook_after_the_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="would be called after the checkpoint of an iteration"):
        train(compose([*PPO_WORDS, of("HookAfterTheCheckpoint")]), tmp_path / "run")


class LearningRateOfNumPy(PPO):
    """PPO with a learning rate that a checkpoint can hold, but that is not loaded again."""

    def training_step(self, rollout, _) -> None:
        super().training_step(rollout, _)
        if self.iterations > 2:  # not yet in the first checkpoint
            self.optimizer.param_groups[0]["lr"] = 1e-3 * (1 + np.cos(1.0))


def test_a_checkpoint_that_could_not_be_loaded_ends_the_run(tmp_path):
    with pytest.raises(RunError, match=r"optimizer_states of this run's checkpoints could not .* float\(\.\.\.\)"):
        train(
            compose([*PPO_WORDS, of("LearningRateOfNumPy"), "checkpoint.every=32", "total_env_steps=128"]),
            tmp_path / "run",
        )


class ScaledByAnArray(PPO):
    """PPO whose policy reads an array that changes in training, and is an attribute."""

    def training_step(self, rollout, _) -> None:
        super().training_step(rollout, _)
        self.scale = getattr(self, "scale", np.zeros(1)) + 1.0

    def on_evaluation(self, _) -> dict[str, float]:
        return {"eval/scale": float(self.scale[0])}


def test_a_run_killed_in_its_last_evaluation_has_its_attributes(tmp_path, monkeypatch):
    words = [*PPO_WORDS, of("ScaledByAnArray")]
    train(compose(words), tmp_path / "straight")

    def be_killed(*_) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "evaluate", be_killed)
        with pytest.raises(MemoryError):
            train(compose(words), tmp_path / "run")
    resume(run=str(tmp_path / "run"))
    rows = [metrics(tmp_path / run)[-1]["eval/scale"] for run in ("straight", "run")]
    assert rows[0] == rows[1] == "2.0"


class OwnStep(PPO):
    """PPO with the optimiser step of Lightning's documentation."""

    def step(self, optimizer, loss, max_grad_norm=None) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def test_a_gradient_vector_that_is_cut_off_ends_the_run(tmp_path):
    with pytest.raises(RunError, match=r"zero_grad\(\) has removed the gradient vector.*use self\.step"):
        train(compose([*PPO_WORDS, of("OwnStep")]), tmp_path / "run")


class Reset(PPO):
    """PPO that replaces its actor in training."""

    def training_step(self, rollout, batch) -> None:
        super().training_step(rollout, batch)
        self.actor = type(self.actor).__new__(type(self.actor))


def test_a_module_is_not_replaced_in_training(tmp_path):
    with pytest.raises(RuntimeError, match=r"self\.actor is replaced in training.*load_state_dict"):
        train(compose([*PPO_WORDS, of("Reset")]), tmp_path / "run")


class Scheduled(SAC):
    """SAC with a scheduler that nothing steps."""

    def configure_optimizers(self):
        optimizers = super().configure_optimizers()
        return optimizers, [torch.optim.lr_scheduler.StepLR(each, 1) for each in optimizers]


class Stepped(Scheduled):
    """SAC that steps its scheduler."""

    def training_step(self, rollout, batch) -> None:
        super().training_step(rollout, batch)
        for each in self.lr_schedulers():
            each.step()


def test_a_scheduler_that_nothing_steps_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="returns a scheduler that nothing steps"):
        train(compose([*SMALL, "total_env_steps=64", of("Scheduled")]), tmp_path / "run")
    scheduled = SimpleNamespace(lr_scheduler_configs=[1])
    hooks.check_schedulers(scheduled, build_algorithm(*SMALL, of("Stepped")))


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_callbacks_that_count_lightnings_steps_are_refused(name, tmp_path):
    values = "swa_lrs:0.1" if name.startswith("Stoch") else "decay:0.9"
    words = f"+callbacks.mean={{_target_:lightning.pytorch.callbacks.{name},{values}}}"
    with pytest.raises(ConfigError, match=f"{name} counts Lightning's steps"):
        train(compose([*PPO_WORDS, words]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_has_no_dropout_and_leaves_the_modes_alone(tmp_path, monkeypatch):
    seen, real = [], Evaluation._play

    def play(self, trainer, algorithm):
        row = real(self, trainer, algorithm)
        seen.append(all(each.training for each in algorithm.actor.modules()))
        return row

    def forward(self, inputs):
        modes.append(self.training)
        return inputs

    modes: list[bool] = []
    monkeypatch.setattr(Evaluation, "_play", play)
    monkeypatch.setattr(nn.Dropout, "forward", forward)
    algorithm = build_algorithm(*PPO_WORDS)
    algorithm.actor.network = nn.Sequential(nn.Dropout(0.5), algorithm.actor.network)
    monkeypatch.setattr("levin.training.session.algorithm_class", lambda _: lambda **_: algorithm)
    train(compose(list(PPO_WORDS)), tmp_path / "run")
    assert seen == [True]
    assert True in modes[:32], "training"
    assert not any(modes[-9:]), "the evaluation at the end"
    modes.clear()
    monkeypatch.setattr("levin.evaluate.load_algorithm", lambda _: algorithm.train())
    evaluate_run(run=str(tmp_path / "run"), episodes=1)
    assert modes, "make evaluate"
    assert not any(modes)


class Unhinted(SAC):
    def __init__(self, *, env, bonus=0.5, **others) -> None:
        super().__init__(env=env, **others)


class Pair(SAC):
    def __init__(self, *, env, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(env=env)


class Odd(SAC):
    def __init__(self, *, env, kind: type = Adam) -> None:
        super().__init__(env=env)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("Unhinted", ("+algo.bonus=0.5",), "algo.bonus has no type hint in Unhinted: write bonus: <type>"),
        ("Pair", (), r"algo.betas=\[0.9, 0.999\]: input should be a valid tuple \(YAML has no tuples"),
        ("Odd", (), "algo.kind has the default <class .*Adam'>, which config.yaml can't hold"),
    ],
)
def test_a_hyper_parameter_that_no_config_can_hold_is_refused_before_training(name, more, message, monkeypatch):
    values = to_plain(compose(list(SMALL)))
    monkeypatch.setattr(schema, "algorithm_class", lambda _: globals()[name])
    values["algo"] = {"_target_": f"{HERE}.{name}", **({"bonus": 0.5} if more else {})}
    with pytest.raises(ConfigError, match=message):
        check_and_add_defaults(OmegaConf.create(values))


def check_and_add_defaults(config) -> None:
    """Do what is done with every config that is composed."""
    schema.check(config)
    schema.add_defaults(config)


def test_a_sweep_of_changed_code_is_not_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = {"s0": compose(list(SMALL))}
    for folder in (None, Path("mine")):
        with plan.open_sweep(configs, folder) as first:
            pass
        with plan.open_sweep(configs, folder) as again:
            assert again == first
    monkeypatch.setattr("levin.runs.code.checksum_of", lambda _: "other")
    with plan.open_sweep(configs, None) as new:
        assert new != first
    with pytest.raises(ConfigError, match="holds a sweep with other code"), plan.open_sweep(configs, Path("mine")):
        pass
