"""Configuration of the documentation site: `make docs` builds it into docs/_build/html."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project, author, copyright = "Levin", "the Levin developers", "the Levin developers"  # noqa: A001
version = release = version_of("levin")
html_title = f"Levin {version}"

extensions = [
    "myst_nb",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "docstrings",
    "repository_links",
    "algorithm_pages",
]
exclude_patterns = ["_build", "_ext", "api/modules.rst"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
nb_execution_mode = "off"  # notebooks hold their outputs; a test executes them

apidoc_modules = [
    {
        "path": "../src/levin",
        "destination": "api",
        "exclude_patterns": ["**/__main__.py", "**/bench/peer_*.py", "**/dodge.py", "**/racing.py"],
        "separate_modules": True,
        "module_first": True,
        "max_depth": 2,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of torch and Lightning are not ours
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Metrics", "params_style")]
python_use_unqualified_type_names = True
suppress_warnings = ["config.cache", "ref.python"]  # three classes are called Policy
viewcode_follow_imported_members = False
