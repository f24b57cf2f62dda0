"""Plain Python values from OmegaConf sections."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf


def to_plain(section: DictConfig) -> dict[str, Any]:
    """The section as a resolved dict."""
    return OmegaConf.to_container(section, resolve=True)  # type: ignore[return-value]


def flat_keys(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """`{"a": {"b": 1}} -> "a.b"`: the keys of all leaves."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
