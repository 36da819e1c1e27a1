"""Whether gradients, target and geometry fit together; if not, an error that names what does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _array, _kinds, gradients
from ._array import Array
from .geometry import Diagonal, Kronecker, Operator, Polar, Rotated, Scale
from .gradients import Record

__all__ = ["check_alike", "check_model"]


def check_model(
    candidates: Mapping[str, Record],
    geometry: Mapping[str, Operator],
    target: Mapping[str, Array] | None = None,
    *,
    what: str,
) -> tuple[Any, int]:
    """Return the namespace and the number of samples, or raise where candidates, target and geometry disagree."""
    xp, n = gradients.check(candidates, what=what)
    names = set(candidates)
    for kind, mapping in (("geometry", geometry), ("target", target)):
        if mapping is None:
            continue
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{what}: {kind} must be a mapping by parameter name, got {type(mapping).__name__}")
        if set(mapping) != names:
            missing, extra = sorted(names - set(mapping)), sorted(set(mapping) - names)
            raise ValueError(
                f"{what}: {kind} and gradients differ in names: {kind} lacks {missing}, has besides {extra}"
            )
    for name, g in (target or {}).items():
        _kinds.require(g, f"{what}: target of {name!r}")
    for name, operator in geometry.items():
        _kinds.require_leaves(operator, name, what=what)
    _array.namespace(*_array.leaves([candidates, dict(geometry), dict(target or {})]), what=what)
    for name, record in candidates.items():
        shape = record.shape
        if target is not None:
            g = target[name]
            if not hasattr(g, "shape"):
                raise TypeError(f"{what}: target of {name!r} is a {type(g).__name__}; expected an array {shape}")
            if tuple(g.shape) != shape:
                raise ValueError(f"{what}: target of {name!r} is {tuple(g.shape)}, its gradients are {shape}")
            if not _array.is_floating(xp, g):
                raise TypeError(f"{what}: target of {name!r} is {g.dtype}; it must be of a real floating dtype")
        operator = geometry[name]
        if not isinstance(operator, (Scale, Diagonal, Kronecker, Rotated, Polar)):
            raise TypeError(
                f"{what}: the operator of {name!r} is a {type(operator).__name__}; expected Scale, Diagonal, "
                "Kronecker, Rotated or Polar"
            )
        operator.check(name)
        for leaf in _array.leaves(operator):
            if not _array.is_floating(xp, leaf):
                raise TypeError(
                    f"{what}: {type(operator).__name__} of {name!r} holds {leaf.dtype}; it must be floating"
                )
        if operator.shape is not None and operator.shape != shape:
            raise ValueError(
                f"{what}: {type(operator).__name__} of {name!r} is {operator.shape}, its gradients are {shape}"
            )
    return xp, n


def check_alike(candidates: Mapping[str, Record], others: Mapping[str, Record], *, what: str) -> None:
    """Raise where gradients of other samples are not of the same parameters as the candidates'."""
    _array.namespace(*_array.leaves([candidates, others]), what=what)
    for name, record in candidates.items():
        if others[name].shape != record.shape:
            raise ValueError(f"{what}: gradients of {name!r} are {others[name].shape}, the candidates' {record.shape}")
