"""Operations on values that are held, and on known ones: second moments, norms, and the roots that are damped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from ._items import REDUCTIONS, Held, Item, Known, bind

__all__ = ["damp", "hold", "hold_all"]


def hold(eqn: Any, items: list[Any], damping: float) -> Held:
    """Return the one result of an operation on known and held values."""
    name = eqn.primitive.name
    held = [x for x in items if isinstance(x, Held)]
    touched = held[0].touched
    for x in held[1:]:
        touched = touched | x.touched
    if name == "div" and isinstance(items[1], Held):
        items = [items[0], damp(items[1], damping)]
    power = _power(name, eqn, items)
    if power is not None:
        root = damp(replace(held[0], value=jnp.sqrt(held[0].value)), damping)
        y = root.value if power > 0 else 1 / root.value
        damped = True
    else:
        y = bind(eqn, items)[0]
        damped = any(x.damped for x in items if isinstance(x, Held))
    if name in ("add", "max") and any(isinstance(x, Known) and x.uniform is None for x in items):
        touched = jnp.any(y != 0)  # the moment of the steps before, or the running maximum
    own = any(x.own for x in held) and name not in REDUCTIONS
    uniform = jnp.reshape(y, ()) if jnp.size(y) == 1 and not own else None
    if uniform is None and not own and name in ("broadcast_in_dim", "convert_element_type", "reshape"):
        uniform = held[0].uniform
    return Held(y, own, touched, damped, uniform)


def hold_all(eqn: Any, items: list[Any]) -> list[Item]:
    held = next(x for x in items if isinstance(x, Held))
    return [Held(y, False, held.touched, held.damped, y if jnp.ndim(y) == 0 else None) for y in bind(eqn, items)]


def _power(name: str, eqn: Any, items: list[Any]) -> float | None:
    """Return 0.5 or -0.5 if the operation takes a root of a held value or divides by it."""
    if name in ("sqrt", "rsqrt"):
        return 0.5 if name == "sqrt" else -0.5
    if name == "pow" and isinstance(items[1], Known) and not isinstance(items[1].value, jax.core.Tracer):
        power = float(items[1].value) if jnp.ndim(items[1].value) == 0 else 0.0
        return power if abs(power) == 0.5 else None
    return None


def damp(x: Held, damping: float) -> Held:
    """Return a denominator with its share of its own root mean square; infinite if the moment is zero everywhere."""
    if x.damped or not (x.own or x.uniform is None):
        return x
    y = x.value
    if damping:
        y = y + damping * jnp.sqrt(jnp.mean(jnp.square(y)))
    return replace(x, value=jnp.where(x.touched, y, jnp.inf), damped=True)
