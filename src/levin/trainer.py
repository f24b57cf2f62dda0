"""Lightning's Trainer, as a run needs it."""

from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from levin import checkpoint, schema
from levin.errors import ConfigError


def build(cfg: DictConfig, ours: list[Callback]) -> Trainer:
    """Lightning's Trainer with our callbacks and the user's; its loggers come when the run folder is there.

    Raises:
        ConfigError: The Trainer refuses an argument, or a callback can't be made.
    """
    options = {key: value for key, value in schema.plain(cfg.trainer).items() if key != "threads"}
    fixed = {"max_epochs": -1, "enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
    quiet = {"enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    plugins = checkpoint.FolderCheckpointIO()
    try:
        theirs = [instantiate(each) for each in cfg.callbacks.values()]
        trainer = Trainer(**{**fixed, **quiet, **options}, plugins=plugins, callbacks=[*ours, *theirs])
    except (HydraException, MisconfigurationException, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"the Trainer can't be made: {' '.join(str(error).split())}") from error
    if cfg.collector == "torchrl" and trainer.strategy.root_device.type != "cpu":
        raise ConfigError("collector=torchrl runs on the CPU: add trainer.accelerator=cpu, or take collector=vector")
    return trainer
