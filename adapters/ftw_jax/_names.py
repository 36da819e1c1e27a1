"""Trees of parameters as mappings by keystr path."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["example", "flatten", "like", "struct"]


def flatten(tree: Any, *, what: str) -> tuple[dict[str, Any], Any]:
    """Return ``{keystr path: leaf}`` and the tree's structure.

    Raises
    ------
    TypeError
        If a leaf is not an array of a real floating dtype.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
    if not pairs:
        raise TypeError(f"{what}: there are no arrays in it")
    leaves = {}
    for path, leaf in pairs:
        name = jax.tree_util.keystr(path)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"{what}: {name} is {kind}; every leaf must be an array of a real floating dtype: split off what is "
                "not trained first (nnx.split, equinox.partition) and let loss put it back"
            )
        leaves[name] = leaf
    return leaves, treedef


def like(tree: Any, params: Any, *, what: str) -> dict[str, Any]:
    """Return the leaves of a tree of the structure and shapes of ``params``, by name."""
    expected, treedef = flatten(params, what="params")
    found = jax.tree.structure(tree)
    if found != treedef:
        raise ValueError(f"{what}: its structure {found} is not that of params, {treedef}")
    leaves, _ = flatten(tree, what=what)
    for name, leaf in leaves.items():
        if leaf.shape != expected[name].shape:
            raise ValueError(f"{what}: {name} is {leaf.shape}, the parameter {expected[name].shape}")
    return leaves


def struct(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return a shape and a dtype in place of an array."""
    make: Any = jax.ShapeDtypeStruct
    return make(shape, dtype)


def example(batch: Any) -> Any:
    """Return the shapes and dtypes of one example of a batch."""
    return jax.tree.map(lambda x: struct(jnp.shape(x)[1:], jnp.result_type(x)), batch)
