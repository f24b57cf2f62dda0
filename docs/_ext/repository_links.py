"""Resolve the links of pages to files outside docs/, so that the same Markdown works on the site and in a checkout."""

import re
from pathlib import Path, PurePosixPath

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]*)(#[^)\s]*)?\)")
# Pages of the site that show files of the repository.
PAGES = {
    "SECURITY.md": "security",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "README.md": "index",
    "experiments/README.md": "results/index",
    "src/levin/algorithms/README.md": "contributing_an_algorithm",
    "src/levin/estimators/README.md": "estimators",
}


def site_page(target: str) -> str | None:
    """Return the site's page for a path of the repository, without its extension, or None if there is none."""
    if target in PAGES:
        return PAGES[target]
    parts = PurePosixPath(target).parts
    if parts[:1] == ("experiments",) and len(parts) >= 2:
        for folder in ("results", "studies"):
            if folder == "results" and (ROOT / "experiments" / parts[1] / "reference.yaml").exists():
                return f"results/{parts[1]}"
            if (ROOT / "docs" / folder / f"{parts[1]}.md").exists():
                return f"{folder}/{parts[1]}"
    if parts[:2] == ("src", "levin"):
        module = ".".join(parts[1:]).removesuffix(".py").removesuffix(".__init__")
        return f"_modules/{module.replace('.', '/')}" if target.endswith(".py") else f"api/{module}"
    return None


def rewrite(text: str, page: str, source: str) -> str:
    """Return Markdown with links to files outside docs/ turned into links to pages of the site.

    Args:
        text: Markdown.
        page: Page that shows it, such as `lecture/18_ppo`.
        source: The file that it comes from, relative to the repository; its links are relative to it.
    """
    up = "../" * page.count("/")

    def replace(match: re.Match[str]) -> str:
        label, path, anchor = match[1], match[2], match[3] or ""
        absolute = (ROOT / source).parent.joinpath(path).resolve()
        if not absolute.is_relative_to(ROOT) or (absolute.is_relative_to(ROOT / "docs") and source.startswith("docs/")):
            return match[0]
        target = absolute.relative_to(ROOT).as_posix()
        if target.startswith("docs/") and target.endswith(".md"):
            return f"[{label}](/{target.removeprefix('docs/')}{anchor})"
        found = site_page(target)
        if found is None:
            return label
        if found.startswith("_modules/"):  # written after all pages, so it is no target that Sphinx knows
            code = re.sub("`([^`]*)`", r'<code class="literal">\1</code>', label)
            return f'<a href="{up}{found}.html">{code}</a>'
        return f"[{label}](/{found}{anchor})"

    return LINK.sub(replace, text)


def _source_read(app: Sphinx, page: str, content: list[str]) -> None:
    if app.env.doc2path(page).suffix == ".md":
        content[0] = rewrite(content[0], page, f"docs/{page}.md")


def _include_read(app: Sphinx, path: Path, _: str, content: list[str]) -> None:
    """Rewrite an included file. MyST passes only the last part of the page's name, so Sphinx is asked for it."""
    absolute = (Path(app.srcdir) / path).resolve()
    if absolute.suffix == ".md":
        content[0] = rewrite(content[0], app.env.docname, absolute.relative_to(ROOT).as_posix())


def setup(app: Sphinx) -> dict[str, bool]:
    """Rewrite pages when they are read."""
    app.connect("source-read", _source_read)
    app.connect("include-read", _include_read)
    return {"parallel_read_safe": True}
