"""Parse the project's docstrings, and turn their parts into Markdown."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

HEADER = re.compile(r"(Pseudocode|Deviations|Other deviations|Metrics|Args)\b.*:$")
VERBATIM = re.compile(r"(`[^`]+`|\*\*[^*]+\*\*|https?://[^\s,)]*[\w/]|(?:arXiv|doi):[\w./-]*\w)")


def sections(docstring: str) -> dict[str, str]:
    """Split a docstring at headers such as `Metrics:` into texts by header; the text before the first is `""`."""
    found, header = {"": ""}, ""
    for line in docstring.splitlines(keepends=True):
        if HEADER.match(line.rstrip()):
            header = line.rstrip()
            found[header] = ""
        else:
            found[header] += line
    return found


def entries(section: str) -> dict[str, str]:
    """Return the entries `    name: text` of a section; lines indented further go on with the text."""
    found, name = {}, ""
    for line in filter(str.strip, section.splitlines()):
        if not line.startswith("    "):
            break
        if not line.startswith("     "):
            name, _, line = line.strip().partition(": ")  # noqa: PLW2901
            found[name] = ""
        found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def markdown(text: str) -> str:
    """Return plain text of a docstring as Markdown in one line: code stays code, and references become links."""
    parts = VERBATIM.split(" ".join(text.split()))
    for i, part in enumerate(parts):
        kind = part.partition(":")[0]
        if kind in ("arXiv", "doi"):
            parts[i] = f"[{part}]({reference(part)})"
        elif not i % 2:
            parts[i] = re.sub(r"([\\*_\[\]<>|$~])", r"\\\1", part)
        elif part.startswith("http"):
            parts[i] = f"<{part}>"
        else:
            parts[i] = part.replace("|", r"\|")  # within a table
    return "".join(parts)


def reference(identifier: str) -> str:
    """Return the address of an `arXiv:` or `doi:` number."""
    kind, _, number = identifier.partition(":")
    return f"https://arxiv.org/abs/{number}" if kind == "arXiv" else f"https://doi.org/{number}"


def blocks(text: str) -> Iterator[str]:
    """Yield the blocks of a docstring as Markdown: paragraphs, lists, and indented text as literal blocks."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if block.startswith("    - "):
            yield "\n".join(f"- {markdown(item)}" for item in re.split(r"^    - ", block, flags=re.MULTILINE)[1:])
        elif block.startswith("    "):
            lines = "\n".join(line.removeprefix("    ") for line in block.splitlines())
            yield f"```text\n{lines}\n```"
        elif block:
            yield markdown(block)


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table."""
    head = list(header)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))
