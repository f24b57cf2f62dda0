"""Directives of the page of an algorithm."""

from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    return {"parallel_read_safe": True}
