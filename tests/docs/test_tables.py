"""What stands in one place: names of filters, which everything else reads from the table; private parts of torch."""

from __future__ import annotations

import ast
from pathlib import Path

from ftw.spi import NAMED

ROOT = Path(__file__).parents[2]
PACKAGES = ("ftw", "adapters/ftw_torch", "adapters/ftw_jax", "reference/ftw_reference")


def names_in(node):
    """Yield the names of filters among the constants directly under a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Constant) and child.value in NAMED:
            yield child.value


def lists(path):
    """Yield where a file lists several filters, or compares with the name of one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = set(names_in(node))
        if (isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)) and len(found) > 1) or (
            isinstance(node, ast.Compare) and found
        ):
            yield node.lineno, sorted(found)


def exported(path):
    """Return the line of ``__all__``, which lists what a module defines, and of the type of the names."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("__all__", "FilterName"):
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def test_filters_are_listed_in_the_table_alone():
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            allowed = set(exported(path))
            found += [(str(path.relative_to(ROOT)), *hit) for hit in lists(path) if hit[0] not in allowed]
    assert not found


def private_parts(path):
    """Yield the dotted names with a private part that a file reaches from ``torch``, or imports from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch."):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        yield from (
            x for x in names if x.startswith(("torch.", "aten.")) and any(p[0] == "_" != p[1] for p in x.split("."))
        )


def test_private_parts_of_torch_are_used_in_one_file():
    used = {
        str(path.relative_to(ROOT)): names
        for path in sorted((ROOT / "adapters/ftw_torch").rglob("*.py"))
        if (names := sorted({x for x in private_parts(path) if "(" not in x}))
    }
    assert set(used) == {"adapters/ftw_torch/capture/internals.py"}, used
