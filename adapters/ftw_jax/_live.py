"""Operations on values that are affine in the gradient, entry by entry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from ._held import damp
from ._items import REDUCTIONS, Held, Item, Known, Live, Unreadable, bind

__all__ = ["follow", "select"]

_NONLINEAR = {
    "abs", "square", "integer_pow", "pow", "sqrt", "rsqrt", "cbrt", "exp", "exp2", "expm1", "log", "log1p", "logistic",
    "erf", "max", "min", "mul", "div", "rem", "atan2", "eq", "ne", "lt", "le", "gt", "ge", "is_finite", "floor", "ceil",
    "round",
}  # fmt: skip
_ORDER_KEPT = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "copy_p", "optimization_barrier"}


def follow(eqn: Any, items: list[Any], damping: float, orthogonal: frozenset[int]) -> list[Item]:
    """Return the results of an operation on at least one live value."""
    name = eqn.primitive.name
    live = [x for x in items if isinstance(x, Live)]
    x = live[0]
    leaves = {i.leaf for i in live}
    if name == "scan" and len(leaves) == 1 and x.leaf in orthogonal:
        return _orthogonalise(eqn, items, x)
    if name in ("sign", "mul", "div") and len(live) == 1:
        return [_scaled(name, items, x, damping)]
    outs = bind(eqn, items)
    y = outs[0]
    if len(outs) > 1:
        return [Unreadable(o, name) for o in outs]
    if name == "neg":
        return [replace(x, value=y, scale=-x.scale)]
    if name == "stop_gradient" or (name == "integer_pow" and eqn.params["y"] == 1):
        return [replace(x, value=y)]
    if name == "convert_element_type" and jnp.issubdtype(y.dtype, jnp.floating):
        return [replace(x, value=y)]
    if name in ("add", "sub", "add_any"):
        return [_sum(name, y, items, live, leaves)]
    if name == "select_n":
        if isinstance(items[0], Live):
            return [Unreadable(y, name)]
        return [select(y, items[0].value, items[1:])]
    if name in ("clamp", "max", "min", "tanh") and len(live) == 1:
        if name in ("max", "min") and any(isinstance(i, Held) for i in items):
            return [Held(y, True, jnp.any(y != 0))]
        ratio = jnp.where(x.value != 0, y / jnp.where(x.value != 0, x.value, 1), 1)
        return [replace(x, value=y, values=ratio if x.values is None else x.values * ratio)]
    if name in REDUCTIONS or (name == "dot_general" and y.ndim == 0):
        return [Held(y, False, jnp.any(y != 0), uniform=jnp.reshape(y, ()) if y.size == 1 else None)]
    if name in _ORDER_KEPT and y.size == x.value.size:
        return [replace(x, value=y, values=None if x.values is None else jnp.reshape(x.values, y.shape))]
    if name == "transpose" and _swaps(eqn.params["permutation"], y.shape):
        values = None if x.values is None else jnp.transpose(x.values, eqn.params["permutation"])
        return [replace(x, value=y, values=values, swapped=not x.swapped)]
    if name in _NONLINEAR and y.shape == x.value.shape:
        return [Held(y, True, jnp.any(y != 0))]
    return [Unreadable(y, name)]


def _scaled(name: str, items: list[Any], x: Live, damping: float) -> Item:
    """Return a live value times, or divided by, one that is not; a sign is ``x / |x|``."""
    if name == "sign":
        size = damp(Held(jnp.abs(x.value), True, jnp.any(x.value != 0)), damping).value  # (*shape)
        factor = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
        return replace(x, value=x.value * factor, values=factor if x.values is None else x.values * factor)
    if name == "div" and not isinstance(items[0], Live):
        y = items[0].value / x.value
        return Held(y, True, jnp.any(y != 0))
    other = items[1] if isinstance(items[0], Live) else items[0]
    if name == "div" and isinstance(other, Held):
        other = damp(other, damping)
    if other.uniform is not None:
        factor = 1 / other.uniform if name == "div" else other.uniform
        value = x.value / other.value if name == "div" else x.value * other.value
        none = factor == 0
        scale = x.scale * jnp.where(none, jnp.copysign(1, factor), factor).astype(x.scale.dtype)
        return replace(x, value=value, scale=scale, zero=x.zero | none)
    if x.polar is not None:
        return Unreadable(x.value * other.value, f"{name} after an orthogonalisation")
    factor = 1 / other.value if name == "div" else other.value
    value = x.value / other.value if name == "div" else x.value * factor
    values = jnp.broadcast_to(factor, value.shape) if x.values is None else x.values * factor
    return replace(x, value=value, values=values)


def _sum(name: str, y: Any, items: list[Any], live: list[Live], leaves: set[int]) -> Item:
    if any(isinstance(i, Held) for i in items):
        return Unreadable(y, f"{name} of a nonlinear function of the gradient")
    sign = -1 if name == "sub" else 1
    if len(live) == 1:
        x = live[0]
        return replace(x, value=y, scale=x.scale * (sign if items[1] is x and items[0] is not x else 1))
    x, z = live
    if len(leaves) > 1 or x.swapped != z.swapped or x.polar is not None or z.polar is not None:
        return Unreadable(y, f"{name} of the gradients of several parameters")
    zero = x.zero & z.zero
    if x.values is None and z.values is None:
        scale = jnp.where(x.zero, 0, x.scale) + sign * jnp.where(z.zero, 0, z.scale)
        return replace(x, value=y, scale=jnp.where(zero, 1, scale).astype(x.scale.dtype), zero=zero)
    return replace(x, value=y, scale=jnp.ones_like(x.scale), zero=zero, values=x.slope() + sign * z.slope())


def select(y: Any, which: Any, cases: list[Any]) -> Item:
    """Return ``cases[which]``, the choice itself held."""
    live = [x for x in cases if isinstance(x, Live)]
    blamed = next((x for x in cases if isinstance(x, Unreadable)), None)
    if blamed is not None:
        return Unreadable(y, blamed.reason)
    if not live:
        return Held(y, any(isinstance(x, Held) and x.own for x in cases) or jnp.ndim(which) > 0, jnp.any(y != 0))
    if any(isinstance(x, Held) for x in cases) or len({x.leaf for x in live}) > 1:
        return Unreadable(y, "select_n")
    x = live[0]
    if len(live) == len(cases) and jnp.ndim(which) == 0 and all(_same(z, x) for z in live):
        scale, zero = x.scale, x.zero
        for number, z in enumerate(live[1:], start=1):
            scale, zero = jnp.where(which >= number, z.scale, scale), jnp.where(which >= number, z.zero, zero)
        return replace(x, value=y, scale=scale, zero=zero)
    if any(z.swapped != x.swapped or z.polar is not None for z in live):
        return Unreadable(y, "select_n")
    slopes = [z.slope() if isinstance(z, Live) else jnp.zeros_like(z.value) for z in cases]
    values = slopes[0]
    for number, slope in enumerate(slopes[1:], start=1):
        values = jnp.where(which >= number, slope, values)
    return replace(x, value=y, scale=jnp.ones_like(x.scale), zero=jnp.zeros_like(x.zero), values=values)


def _same(z: Live, x: Live) -> bool:
    return z.values is x.values and z.polar is x.polar and z.swapped == x.swapped


def _swaps(permutation: Any, shape: tuple[int, ...]) -> bool:
    """Return whether a transpose only exchanges the last two axes, all others being of length 1 and in place."""
    r = len(shape)
    return r >= 2 and tuple(permutation) == (*range(r - 2), r - 1, r - 2) and all(s == 1 for s in shape[:-2])


def _orthogonalise(eqn: Any, items: list[Any], x: Live) -> list[Item]:
    """Return the results of the loop that orthogonalises a live matrix."""
    outs: list[Item] = []
    for y in bind(eqn, items):
        if y.shape != x.value.shape:
            outs.append(Known(y))
        elif x.values is not None or y.size != y.shape[-1] * y.shape[-2]:
            outs.append(Unreadable(y, "an orthogonalisation of something other than one matrix"))
        else:
            matrix = jnp.reshape(x.value, x.value.shape[-2:])  # (rows, columns)
            outs.append(replace(x, value=y, polar=matrix.T if x.swapped else matrix))
    return outs
