"""Sphinx: ``make docs`` builds the pages into docs/_build/html, warnings as errors."""

from typing import Any

import ftw

project = "ftw"
author = "The ftw authors"
copyright = author
version = release = ftw.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]
nitpicky = False

exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"ftw {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]

autosummary_ignore_module_all = False
autodoc_typehints = "none"  # the docstrings state types, with shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_validation_checks = {"PR02"}  # a parameter in a docstring is one of the signature
numpydoc_xref_param_type = False
default_role = "py:obj"  # a name in backquotes is a link where there is such a name
autodoc_preserve_defaults = True
add_module_names = False


# What the core asks of records and operators, and users do not.
PRIVATE = {
    "block", "check", "combine", "dot", "matrix", "negated", "samples", "split", "take", "transform", "transposed",
}  # fmt: skip


def skip_members(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which the class's own docstring describes, and private protocols."""
    return True if type(obj).__name__ == "_tuplegetter" or name in PRIVATE else None


def setup(app: Any) -> None:
    """Connect the hook."""
    app.connect("autodoc-skip-member", skip_members)
