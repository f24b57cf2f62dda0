"""Show the project's docstrings in Sphinx: plain text with code in single backticks and formulas as indented blocks."""

import re
from typing import Any

from sphinx.application import Sphinx

SECTION = re.compile(r"(Args|Attributes|Metrics|Raises|Returns|Yields):$")
CODE = re.compile(r"`[^`]+`")


def convert(lines: list[str]) -> list[str]:
    """Return a docstring as reStructuredText.

    `code` becomes ``code``. An indented block of the running text, which is a formula or pseudocode, becomes a literal
    block. Lists, and sections that napoleon knows, such as `Args:`, keep their indentation.
    """
    result: list[str] = []
    in_section = in_literal = in_list = False
    for line in CODE.sub(lambda code: re.sub(r"\n *", " ", code[0]), "\n".join(lines)).split("\n"):
        indent = len(line) - len(line.lstrip())
        if line and not indent:
            in_section, in_literal = bool(SECTION.match(line)), False
        in_list = line.lstrip().startswith("- ") or (in_list and bool(indent))
        if line and indent and not in_section and not in_literal and not in_list:
            result += ["", "::", ""] if not result or not result[-1] else ["", "..", "", "::", ""]
            in_literal = True
        result.append(line if in_literal else _escape(line))
    return result


def _escape(line: str) -> str:
    """Return a line with its backticks doubled and the characters escaped that reStructuredText reads as markup."""
    markup = re.compile(r"([*|]|(?<=\w)_(?=\W|$))")
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(f"`{part}`" if part.startswith("`") else markup.sub(r"\\\1", part) for part in parts)


def process(*event: Any) -> None:
    """Convert a docstring in place: the list of its lines is the last argument of Sphinx's event."""
    event[-1][:] = convert(event[-1])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the converter to run before napoleon."""
    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True}
