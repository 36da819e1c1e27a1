"""Sphinx: ``make docs`` builds the pages into docs/_build/html, warnings as errors."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import ftw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "ftw"
author = "The ftw authors"
copyright = author
version = release = ftw.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "mathml",
    "numpydoc",
]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache", "ref.python"]  # a class is found under its package and its module
nitpicky = False

exclude_patterns = ["_build", "_ext"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"ftw {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]

autosummary_ignore_module_all = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
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


def check_public_names(app: Any) -> None:
    """Fail where a public name is not on the page of its package, or has no docstring."""
    for package in ("ftw", "ftw_torch", "ftw_jax", "ftw_reference", "ftw_conformance"):
        listed = (HERE / f"api/{package}.md").read_text(encoding="utf-8").split()
        module = importlib.import_module(package)
        for name in module.__all__:
            part = getattr(module, name)
            if inspect.ismodule(part):
                continue
            if name not in listed:
                raise ValueError(f"docs/api/{package}.md does not list {package}.{name}")
            if (inspect.isclass(part) or inspect.isfunction(part)) and not inspect.getdoc(part):
                raise ValueError(f"{package}.{name} has no docstring")


def setup(app: Any) -> None:
    """Connect the hooks."""
    app.connect("autodoc-skip-member", skip_members)
    app.connect("builder-inited", check_public_names)
