"""Composing of configs in tests: each YAML text and each reference in a config is parsed once per process.

The tests compose thousands of configs of the same few files, and parsing takes a third of that time. Files are still
read each time, since the keys are texts, so a test may change a file.
"""

import functools
import pickle
from types import SimpleNamespace
from typing import Any, TextIO

import omegaconf
import omegaconf._utils
import omegaconf.base
import omegaconf.grammar_parser
import omegaconf.omegaconf
import yaml


@functools.lru_cache(4096)
def _parse_yaml(text: str, loader: Any) -> bytes:
    """Return the values of a YAML text as a pickle, of which each caller gets a copy."""
    return pickle.dumps(yaml.load(text, Loader=loader))


def _load_yaml(source: str | TextIO, Loader: Any) -> Any:  # noqa: N803  # the name in yaml.load
    """Load YAML as `yaml.load` does."""
    text = source if isinstance(source, str) else source.read()
    try:
        return pickle.loads(_parse_yaml(text, Loader))
    except yaml.YAMLError:
        if isinstance(source, str):
            raise
        source.seek(0)
        return yaml.load(source, Loader=Loader)  # its error names the file


def parse_once() -> None:
    """Let OmegaConf, with which Hydra reads its files, parse each text once per process."""
    # OmegaConf builds a new loader class at each call, which would be a new key.
    omegaconf._utils.get_yaml_loader = functools.cache(omegaconf._utils.get_yaml_loader)
    omegaconf.omegaconf.yaml = SimpleNamespace(**{**vars(yaml), "load": _load_yaml})
    parse = functools.lru_cache(4096)(omegaconf.grammar_parser.parse)
    for module in (omegaconf.grammar_parser, omegaconf._utils, omegaconf.base):
        module.parse = parse
