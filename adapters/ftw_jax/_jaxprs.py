"""The little that is needed of jaxprs: what an equation's body is, and how to run one equation."""

from __future__ import annotations

from typing import Any

__all__ = ["bind", "body"]


def bind(eqn: Any, values: list[Any]) -> list[Any]:
    """Return the results of an equation on ``values``, as a list."""
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)  # a tuple in older versions
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def body(eqn: Any) -> tuple[Any, Any]:
    """Return the jaxpr that an equation calls, and its constants."""
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)
    return (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, [])
