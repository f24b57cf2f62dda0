"""Lightning's hooks in a run: those that fire, and those that can't, which are refused before the run begins."""

import difflib
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

from lightning import Callback, Trainer
from torch.optim import Optimizer

from levin.algorithms.base import Algorithm
from levin.core.errors import ConfigError, RunError
from levin.core.process import print_line

EVALUATION_HOOKS = ("on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end", "on_validation_end")
UPDATE_HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
# Hooks that a class may override, and that fire. docs/callbacks.md says when.
FIRES = (
    *("setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", *UPDATE_HOOKS),
    *("on_train_batch_end", *EVALUATION_HOOKS, "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"),
    *("on_save_checkpoint", "on_load_checkpoint"),
)
OF_CALLBACKS = ("state_dict", "load_state_dict", "on_exception")
OF_ALGORITHMS = (
    *("configure_optimizers", "configure_model", "prepare_data", "training_step", "backward"),
    *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
)
# Hooks of the algorithm that do work of Levin's, which an override must not leave out.
NEEDS_SUPER = ("on_train_start", "on_train_batch_start", "on_save_checkpoint", "on_load_checkpoint")
EVALUATES = "an evaluation plays episodes and has no batches: use on_validation_start or on_validation_end"
STEPS = "write the optimiser step in the algorithm's update, around self.step"
LOOPS = "a run has no such loop: make evaluate evaluates a policy"
LOADER = "rollouts come from a collector: set collector=, or change training_step"
# Hooks that can't fire -> what to do instead.
NEVER = {
    **dict.fromkeys(("on_sanity_check_start", "on_sanity_check_end"), "there is no sanity check: use on_fit_start"),
    **dict.fromkeys(("on_validation_batch_start", "on_validation_batch_end", "validation_step"), EVALUATES),
    **dict.fromkeys(
        ("on_validation_model_eval", "on_validation_model_train", "on_validation_model_zero_grad"), EVALUATES
    ),
    **{f"on_{loop}_{when}": LOOPS for loop in ("test", "predict") for when in ("start", "end", "model_eval")},
    **{
        f"on_{loop}_{part}_{when}": LOOPS
        for loop in ("test", "predict")
        for part in ("epoch", "batch")
        for when in ("start", "end")
    },
    **dict.fromkeys(("on_test_model_train", "test_step", "predict_step"), LOOPS),
    **dict.fromkeys(("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader"), LOADER),
    **dict.fromkeys(("optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"), STEPS),
    **dict.fromkeys(("configure_gradient_clipping", "clip_gradients"), "pass max_grad_norm to self.step"),
    "configure_callbacks": "name callbacks in the config, as in callbacks.mine._target_=my_module.MyCallback",
    "configure_sharded_model": "use configure_model",
}


def check_hooks(algorithm: Algorithm, callbacks: list[Callback]) -> None:
    """Check that every hook that the user has written can fire, and name methods that look like a misspelt hook.

    Raises:
        ConfigError: It can't.
    """
    for name in NEEDS_SUPER:
        hook = vars(_defining_class(algorithm, name)).get(name)
        overridden = _is_overridden(algorithm, name) and isinstance(hook, FunctionType) and hook.__name__ == name
        if overridden and not _calls(hook, ("super", "__class__", name)):
            raise ConfigError(
                f"{type(algorithm).__name__}.{name} must call super().{name}(...), which counts steps and keeps the "
                "replay buffer"
            )
    if _is_overridden(algorithm, "on_train_batch_end"):
        raise ConfigError(
            f"{type(algorithm).__name__}.on_train_batch_end would be called after the checkpoint of an iteration, so a "
            "resumed run would miss it: write it at the end of training_step"
        )
    for each in (algorithm, *callbacks):
        hooks = (*FIRES, *(OF_CALLBACKS if isinstance(each, Callback) else OF_ALGORITHMS))
        for name, nearest in misspelt_hooks(_own_methods(each), hooks).items():
            print_line(f"{type(each).__name__}.{name} is no hook, so a run does not call it; hooks: {nearest}")
        for name, instead in NEVER.items():
            if _is_overridden(each, name) and not _defining_class(each, name).__module__.startswith("lightning."):
                raise ConfigError(f"{type(each).__name__}.{name} would never be called here: {instead}")
        for name in ("on_before_zero_grad", "on_before_optimizer_step"):
            if algorithm.lock_free and _is_overridden(each, name):
                raise ConfigError(
                    f"{type(each).__name__}.{name} would never be called: {type(algorithm).__name__} updates the "
                    "parameters of all workers without an optimiser; use on_after_backward"
                )


def check_schedulers(trainer: Trainer, algorithm: Algorithm) -> None:
    """Check that the algorithm steps the schedulers that its `configure_optimizers` returns: Lightning does not.

    Raises:
        ConfigError: Nothing steps them.
    """
    methods = [getattr(type(algorithm), name) for name in _own_methods(algorithm)]
    if trainer.lr_scheduler_configs and not any(_calls(each, ("lr_schedulers",)) for each in methods):
        raise ConfigError(
            f"{type(algorithm).__name__}.configure_optimizers returns a scheduler that nothing steps: return the "
            "optimisers alone and set the learning rate in training_step, or call self.lr_schedulers().step() there"
        )


def connect_update_hooks(trainer: Trainer, algorithm: Algorithm, callbacks: list[Callback]) -> None:
    """Let `Algorithm.step` call the hooks around an update that Lightning calls only in automatic optimisation.

    An update that runs as a CUDA graph runs no Python, so an algorithm with hooks in its updates has no graphs.
    """
    used = [(each, name) for each in (*callbacks, algorithm) for name in UPDATE_HOOKS if _is_overridden(each, name)]
    calls: dict[str, list[Callable[[Optimizer], None]]] = {name: [] for name in UPDATE_HOOKS}
    for each, name in used:
        hook = getattr(each, name)
        calls[name].append(partial(hook, trainer, algorithm) if isinstance(each, Callback) else hook)
    algorithm.before_zero_grad = tuple(calls["on_before_zero_grad"])
    algorithm.before_optimizer_step = tuple(calls["on_before_optimizer_step"])
    if algorithm.captured and used:
        if trainer.strategy.root_device.type == "cuda":
            each, name = used[0]
            print_line(f"{type(each).__name__}.{name} is called in every update, so no update runs as a CUDA graph")
        algorithm.captured = ()


def call_evaluation_hook(trainer: Trainer, algorithm: Algorithm, callbacks: list[Callback], name: str) -> None:
    """Call a hook of an evaluation, which takes the place of a validation.

    Raises:
        RunError: The hook raised an error.
    """
    for each in (*callbacks, algorithm):
        try:
            getattr(each, name)(*((trainer, algorithm) if isinstance(each, Callback) else ()))
        except Exception as error:  # of any type: it is the user's code
            raise RunError(f"{type(each).__name__}.{name} raised {type(error).__name__}: {error}") from error


def observes_start(callbacks: list[Callback], algorithm: Algorithm) -> bool:
    """Return whether a hook at the start of an evaluation is overridden: then a signal does not end the evaluation."""
    names = ("on_validation_start", "on_validation_epoch_start")
    return any(_is_overridden(each, name) for each in (*callbacks, algorithm) for name in names)


def _own_methods(each: Callback | Algorithm) -> set[str]:
    """Return the names of the methods that are neither Levin's nor Lightning's."""
    kinds = [kind for kind in type(each).__mro__ if not kind.__module__.startswith(("levin.", "lightning.", "torch."))]
    return {name for kind in kinds for name, value in vars(kind).items() if isinstance(value, FunctionType)}


def misspelt_hooks(methods: set[str], hooks: tuple[str, ...]) -> dict[str, str]:
    """Return the methods whose names are almost those of hooks, and the nearest hooks."""
    others = sorted(methods - {*hooks, *NEVER})
    nearest = {name: difflib.get_close_matches(name, hooks, cutoff=0.8) for name in others}
    return {name: ", ".join(names) for name, names in nearest.items() if names}


def _is_overridden(each: Callback | Algorithm, name: str) -> bool:
    """Return whether a hook of Lightning is overridden, in a class or in the object itself."""
    base = Callback if isinstance(each, Callback) else Algorithm
    return name in vars(each) or getattr(type(each), name, None) is not getattr(base, name, None)


def _calls(function: Any, names: tuple[str, ...]) -> bool:
    """Return whether the code of a function mentions one of the names."""
    return bool(set(names) & {*function.__code__.co_names, *function.__code__.co_freevars})


def _defining_class(each: Callback | Algorithm, name: str) -> type:
    return next((kind for kind in type(each).__mro__ if name in vars(kind)), type(each))
