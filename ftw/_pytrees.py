"""Records and operators as JAX pytrees, registered without importing JAX; and the arrays that a tree holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["fields", "leaves", "pytree", "register_pytrees"]

_T = TypeVar("_T")

fields: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {}
_registered: set[type] = set()


def pytree(*, data: Sequence[str], static: Sequence[str] = ()) -> Callable[[type[_T]], type[_T]]:
    """Class decorator: a frozen dataclass that JAX can trace, registered as soon as JAX has been imported."""

    def decorate(cls: type[_T]) -> type[_T]:
        fields[cls] = (tuple(data), tuple(static))
        register_pytrees()
        return cls

    return decorate


def register_pytrees() -> None:
    """Register every record and operator with JAX, if JAX is there; called whenever one is built."""
    jax = sys.modules.get("jax")
    if len(_registered) == len(fields) or jax is None or not hasattr(jax, "tree_util"):
        return
    for cls, (data, static) in fields.items():
        if cls not in _registered:
            jax.tree_util.register_dataclass(cls, data_fields=list(data), meta_fields=list(static))
            _registered.add(cls)


def leaves(tree: Any) -> list[Any]:
    """Return the arrays in a record, an operator, or a mapping or tuple of them."""
    if type(tree) in fields:
        return [a for name in fields[type(tree)][0] for a in leaves(getattr(tree, name))]
    if isinstance(tree, Mapping):
        return [a for value in tree.values() for a in leaves(value)]
    if isinstance(tree, (tuple, list)):
        return [a for value in tree for a in leaves(value)]
    return [] if tree is None or isinstance(tree, (bool, int, float)) else [tree]
