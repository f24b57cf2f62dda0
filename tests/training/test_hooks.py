"""Every hook of Lightning either is called, as docs/callbacks.md says, or is refused before the run begins."""

import re
import sys
from collections import Counter

import pytest
import torch
from lightning import Callback, LightningModule
from torch import nn

from checks import metrics, saved_state
from levin.algorithms.ppo import PPO
from levin.config.compose import compose
from levin.core import paths
from levin.core.errors import ConfigError
from levin.runs.load import algorithm_class
from levin.training import hooks
from levin.training.session import train

DOC = (paths.ROOT / "docs/callbacks.md").read_text()
WORDS = (
    *("algo=ppo", "env=cartpole", "env.num_envs=2", "logger=csv", "eval.episodes=2", "eval.every=64"),
    *("algo.steps_per_iteration=16", "algo.batch_size=16", "algo.epochs=2", "algo.hidden_sizes=[16]"),
    *("checkpoint.every=64", "total_env_steps=128"),
)
calls: Counter[str] = Counter()
order: list[str] = []


class Counts(Callback):
    """Callback that counts the calls of every hook that can be called."""


class CountingPPO(PPO):
    """PPO that counts the calls of every hook that can be called."""


def _count(kind, name, parent):
    def hook(self, *arguments, **keywords):
        calls[f"{kind}.{name}"] += 1
        order.append(f"{kind}.{name}")
        return getattr(parent, name)(self, *arguments, **keywords)

    return hook


for _name in (*hooks.FIRES, *hooks.OF_CALLBACKS):
    setattr(Counts, _name, _count("callback", _name, Callback))
Counts.state_dict = lambda self: calls.update(["callback.state_dict"]) or {"kept": 1}  # an empty one is not loaded
for _name in {*hooks.FIRES, *hooks.OF_ALGORITHMS} - {"on_train_batch_end"}:
    setattr(CountingPPO, _name, _count("algorithm", _name, PPO))


def hooks_of(kind: type) -> set[str]:
    inherited = set(dir(nn.Module)) if issubclass(kind, nn.Module) else set(dir(object))
    names = {name for name in set(dir(kind)) - inherited if callable(getattr(kind, name)) and name[0] != "_"}
    return {name for name in names if not isinstance(vars(kind).get(name), property)}


def test_every_hook_of_lightning_is_known():
    known = {*hooks.FIRES, *hooks.OF_CALLBACKS, *hooks.NEVER}
    assert hooks_of(Callback) <= known
    pattern = re.compile(
        r"(on_|configure_|.*_step$|.*_dataloader$|optimizer_|prepare_|setup$|teardown$|transfer_|backward$)"
    )
    of_module = {name for name in hooks_of(LightningModule) if pattern.match(name)}
    assert of_module <= {*known, *hooks.OF_ALGORITHMS}
    assert not set(hooks.FIRES) & set(hooks.NEVER)


def test_the_documentation_lists_the_hooks_that_are_called():
    table = re.findall(r"^\| `(\w+)` \|", DOC, re.MULTILINE)
    assert set(table) == {*hooks.FIRES, *hooks.OF_CALLBACKS}
    assert len(table) == len(set(table))
    assert table[-3:] == list(hooks.OF_CALLBACKS)
    assert all(f"`{name}`" in DOC for name in hooks.OF_ALGORITHMS)


def test_hooks_are_called_when_the_documentation_says(tmp_path):
    calls.clear()
    order.clear()
    target = ["algo._target_=test_hooks.CountingPPO", "+callbacks.counts._target_=test_hooks.Counts"]
    train(compose([*WORDS, *target]), tmp_path / "run")
    train(
        compose([*WORDS, *target, "total_env_steps=192"]),
        tmp_path / "run",
        tmp_path / "run/checkpoints/last/state.ckpt",
    )
    iterations, steps, evaluations, processes = 6, 6 * 4, 3, 2
    expected = {
        **dict.fromkeys(hooks.FIRES, processes),
        **dict.fromkeys(hooks.UPDATE_HOOKS, steps),
        **dict.fromkeys(hooks.EVALUATION_HOOKS, evaluations),
        "on_train_epoch_start": 1,
        "on_train_batch_start": iterations,
        "on_train_batch_end": iterations,
        "on_save_checkpoint": 3,
        "on_load_checkpoint": 1,
    }
    for name, count in expected.items():
        assert calls[f"callback.{name}"] == count, name
        assert calls[f"algorithm.{name}"] == (0 if name == "on_train_batch_end" else count), name
    assert calls["callback.load_state_dict"] == 1
    assert calls["callback.on_exception"] == 0
    assert all(calls[f"algorithm.{name}"] for name in hooks.OF_ALGORITHMS)
    update = [name for name in order if name.removeprefix("callback.") in hooks.UPDATE_HOOKS][:4]
    assert update == [f"callback.{name}" for name in hooks.UPDATE_HOOKS]
    documented = re.findall(r"^\| `(\w+)` \|", DOC, re.MULTILINE)
    of_callback = [name.removeprefix("callback.") for name in order if name.startswith("callback.")]
    evaluation = of_callback[(start := of_callback.index("on_validation_start")) : start + 5]
    assert evaluation == [*(name for name in documented if name in hooks.EVALUATION_HOOKS), "on_train_batch_end"]
    first = list(dict.fromkeys(of_callback))
    called = [name for name in first if name in hooks.FIRES and not name.startswith(("on_save", "on_load"))]
    in_doc = [name for name in documented if name in called]
    # In the order of the table, but that an evaluation is due before the first `on_train_batch_end` of the callbacks.
    assert [name for name in called if name not in (*hooks.EVALUATION_HOOKS, "on_train_batch_end")] == [
        name for name in in_doc if name not in (*hooks.EVALUATION_HOOKS, "on_train_batch_end")
    ]


@pytest.mark.parametrize("name", sorted(hooks.NEVER))
def test_a_hook_that_can_not_be_called_is_refused_by_name(name):
    def hook(*_):
        pass

    if name in dir(Callback):
        mine = type("Mine", (Callback,), {name: hook})()
        with pytest.raises(ConfigError, match=rf"Mine.{name} would never be called here: .+"):
            hooks.check_hooks(_algorithm(), [mine])
    if name in dir(LightningModule):
        algorithm = _algorithm()
        algorithm.__class__ = type("Idea", (PPO,), {name: hook})
        with pytest.raises(ConfigError, match=rf"Idea.{name} would never be called here: .+"):
            hooks.check_hooks(algorithm, [])


def _algorithm():
    from checks import build_algorithm

    return build_algorithm(*WORDS)


class Refused(Callback):
    """Callback with a hook that can't be called."""

    def on_validation_batch_end(self, *_):
        pass


class Misspelt(Callback):
    """Callback with a misspelt hook, and a method of its own."""

    def on_train_batch_ends(self, *_):
        pass

    def gradient_norm(self):
        pass


def test_a_misspelt_hook_is_named(capsys):
    algorithm = _algorithm()
    algorithm.__class__ = type("Idea", (PPO,), {"training_steps": lambda *_: None})
    hooks.check_hooks(algorithm, [Misspelt(), Counts()])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "Idea.training_steps is no hook, so a run does not call it; hooks: training_step"
    assert second.startswith(
        "Misspelt.on_train_batch_ends is no hook, so a run does not call it; hooks: on_train_batch_end, "
    )


@pytest.mark.parametrize("name", sorted(file.stem for file in (paths.CONFIGS / "algo").glob("*.yaml")))
def test_no_method_that_a_fork_copies_looks_like_a_misspelt_hook(name):
    methods = {key for key, value in vars(algorithm_class(compose([f"algo={name}"]))).items() if callable(value)}
    assert not hooks.misspelt_hooks(methods, (*hooks.FIRES, *hooks.OF_ALGORITHMS))


def test_a_refused_hook_leaves_nothing_behind(tmp_path):
    words = [*WORDS, "+callbacks.mine._target_=test_hooks.Refused"]
    with pytest.raises(ConfigError, match=r"Refused.on_validation_batch_end .* on_validation_end"):
        train(compose(words), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Steps(Callback):
    """Callback with a hook around the optimiser step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass


def test_algorithms_without_an_optimiser_refuse_hooks_around_its_step(tmp_path):
    words = [*("algo=a3c", "env=cartpole", "logger=csv"), "+callbacks.mine._target_=test_hooks.Steps"]
    with pytest.raises(ConfigError, match="A3C updates the parameters of all workers without an optimiser"):
        train(compose(words), tmp_path / "run")


def write_module(folder, monkeypatch, name):
    """Write the block of Python that the page about callbacks saves under this name."""
    (code,) = re.findall(rf"Save it as `{name}\.py`[^`]*```python\n(.*?)```", DOC, re.DOTALL)
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_documented_callback_begins_with_the_weights_of_another_run(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "start_from")
    earlier, later = tmp_path / "earlier", tmp_path / "later"
    train(compose([*WORDS]), earlier)
    start = f"+callbacks.start={{_target_:start_from.StartFrom,run:'{earlier}'}}"
    train(compose([*WORDS, "seed=1", "algo.lr=1e-12", start]), later)
    before, after = (saved_state(run)["state_dict"] for run in (earlier, later))
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)


def test_the_documented_callback_records_the_gradient_norm(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "gradient_norm")
    (command,) = re.findall(r'ARGS="(callbacks\.grad\._target_=gradient_norm\.GradientNorm)"', DOC)
    norms = []
    original = nn.utils.clip_grad_norm_

    def clip(parameters, max_grad_norm, **keywords):
        parameters = list(parameters)
        norms.append(float(torch.stack([each.grad.norm() for each in parameters]).norm()))
        return original(parameters, max_grad_norm, **keywords)

    monkeypatch.setattr("levin.algorithms.base.clip_grad_norm", clip)
    train(compose([*WORDS, command, "log_every=32"]), tmp_path / "run")
    recorded = [float(row["train/gradient_norm"]) for row in metrics(tmp_path / "run")]
    assert recorded == pytest.approx([sum(norms[i : i + 4]) / 4 for i in range(0, 16, 4)])


def test_hooks_in_updates_leave_the_numbers_alone(tmp_path):
    train(compose([*WORDS]), tmp_path / "without")
    train(compose([*WORDS, "+callbacks.mine._target_=test_hooks.Steps"]), tmp_path / "with")
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")


def test_an_algorithm_with_hooks_in_its_updates_has_no_cuda_graphs(tmp_path):
    algorithm = _algorithm()
    algorithm.captured = ("update",)
    trainer = type("Trainer", (), {"strategy": type("Strategy", (), {"root_device": torch.device("cpu")})})
    hooks.connect_update_hooks(trainer, algorithm, [])
    assert algorithm.captured == ("update",)
    hooks.connect_update_hooks(trainer, algorithm, [Steps()])
    assert algorithm.captured == ()


class Forgets(PPO):
    """PPO whose hook leaves out what Levin does there."""

    def on_train_start(self):
        self.mine = 1


class Remembers(PPO):
    """PPO whose hook calls that of its base class."""

    def on_train_start(self):
        super().on_train_start()
        self.mine = 1


def test_an_override_that_leaves_out_levins_own_work_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"Forgets.on_train_start must call super\(\).on_train_start"):
        train(compose([*WORDS, "algo._target_=test_hooks.Forgets"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(compose([*WORDS, "algo._target_=test_hooks.Remembers"]), tmp_path / "run")


class Swaps(Callback):
    """Callback that swaps the weights for an evaluation, as those that average weights do."""

    inside = False

    def on_validation_start(self, *_):
        self.inside = True

    def on_validation_end(self, *_):
        self.inside = False

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        assert not self.inside


def test_a_hook_at_the_start_of_an_evaluation_is_noticed():
    assert hooks.observes_start([Swaps()], _algorithm())
    assert not hooks.observes_start([Steps()], _algorithm())
