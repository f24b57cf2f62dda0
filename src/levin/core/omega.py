"""Convert OmegaConf sections to plain Python values."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf


def to_plain(section: DictConfig) -> dict[str, Any]:
    """Return a section as a plain dict, with its interpolations resolved."""
    return OmegaConf.to_container(section, resolve=True)  # type: ignore[return-value]


def flat_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all leaves: `{"a": {"b": 1}} -> "a.b"`."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
