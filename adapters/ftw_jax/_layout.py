"""How parameters appear among the records: as they are, as stacks of matrices, or, small ones, laid end to end.

A step does some twenty small things with each record, and XLA compiles each of them by itself. Biases, norms and other
parameters of few entries whose gradients are materialized therefore share one record, a vector: the arithmetic is the
same, and a model of many layers compiles in a fraction of the time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ftw import Diagonal, Scale
from ftw.geometry import Operator

__all__ = ["SMALL", "View", "operators_of", "share", "tree_of"]

SMALL = 2**15  # entries of a parameter that may share a record


@dataclass(frozen=True)
class View:
    """How a parameter appears among the records: as it is, as a stack of matrices, or as a part of a vector."""

    name: str
    shape: tuple[int, ...]
    stack: tuple[int, ...] = ()
    matrix: tuple[int, int] | None = None
    shared: str | None = None  # the record that it is a part of,
    start: int = 0  # and where it starts there

    @property
    def names(self) -> list[str]:
        """Names of the records."""
        if self.shared is not None:
            return [self.shared]
        return [f"{self.name}[{i}]" for i in range(math.prod(self.stack))] if self.stack else [self.name]

    def split(self, x: Any) -> list[Any]:
        """Return the parts of an array of the parameter's shape, one a record."""
        if self.matrix is None:
            return [x]
        x = jnp.reshape(x, (-1, *self.matrix))
        return [x[i] for i in range(x.shape[0])]

    def join(self, parts: list[Any]) -> Any:
        """Return the array of the parameter's shape."""
        if self.shared is not None:
            return jnp.reshape(parts[0][self.start : self.start + math.prod(self.shape)], self.shape)
        return jnp.reshape(jnp.stack(parts) if len(parts) > 1 else parts[0], self.shape)


def share(views: list[View], dtypes: list[Any], leaves: Collection[int]) -> list[View]:
    """Return the views with the small parameters among ``leaves`` laid end to end, those of a dtype each."""
    out, ends = list(views), dict[Any, int]()
    small = [i for i in sorted(leaves) if math.prod(views[i].shape) <= SMALL]
    for i in small:
        if sum(dtypes[j] == dtypes[i] for j in small) > 1:
            out[i] = replace(views[i], shared=f"(small, {dtypes[i]})", start=ends.get(dtypes[i], 0))
            ends[dtypes[i]] = out[i].start + math.prod(views[i].shape)
    return out


def tree_of(treedef: Any, views: list[View], arrays: Mapping[str, Any]) -> Any:
    """Return the tree of parameters from the arrays of the records."""
    return jax.tree.unflatten(treedef, [view.join([arrays[i] for i in view.names]) for view in views])


def operators_of(views: list[View], given: Mapping[str, Operator]) -> dict[str, Operator]:
    """Return the operators of the records from those of the parameters.

    Raises
    ------
    ValueError, TypeError
        If a parameter has none, or one that does not act on its records one by one.
    """
    out: dict[str, Operator] = {}
    shared: dict[str, list[Any]] = {}
    if unknown := sorted(set(given) - {view.name for view in views}):
        raise ValueError(
            f"filter_then_weight: geometry has an operator for {', '.join(unknown)}, which is no parameter; "
            f"they are {', '.join(view.name for view in views)}"
        )
    for view in views:
        if view.name not in given:
            raise ValueError(f"filter_then_weight: geometry has no operator for {view.name}; it has {sorted(given)}")
        operator = given[view.name]
        if view.shared is not None:
            values: Any = operator.values if isinstance(operator, Diagonal) else getattr(operator, "value", None)
            shared.setdefault(view.shared, []).append(jnp.reshape(jnp.broadcast_to(values, view.shape), (-1,)))
        elif isinstance(operator, Diagonal):
            out.update(zip(view.names, map(Diagonal, view.split(operator.values)), strict=True))
        elif not isinstance(operator, Scale) and view.matrix is not None and view.shape != view.matrix:
            raise TypeError(
                f"filter_then_weight: {type(operator).__name__} acts on {view.name} {view.shape} as a whole, and its "
                f"gradients are kept as {len(view.names)} matrices {view.matrix}; use capture='dense'"
            )
        else:
            out.update(dict.fromkeys(view.names, operator))
    return out | {name: Diagonal(jnp.concatenate(parts)) for name, parts in shared.items()}
