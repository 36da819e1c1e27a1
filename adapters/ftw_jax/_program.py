"""Reading an optimizer's own program: its update at a gradient a, and how each entry of it answers to that gradient.

``tx.update`` is traced once into a jaxpr, which is then evaluated at g = a. Beside its value, every intermediate carries what
it is as a function of the gradient:

========== ==========================================================================================================
Known      does not depend on it: parameters, state, schedules
Live       affine in it, entry by entry: ``value + scale * values * (g - a)``; or the polar factor of such a matrix
Held       a nonlinear function of it that only scales what is live: held at its value at a, with no derivative.
           Squares and the second moments made of them, and every reduction: a clipping norm, a trust ratio, row means
Unreadable anything else, with the name of the operation to blame
========== ==========================================================================================================

So an optimizer needs no entry in a table of names, and its hyper-parameters are never guessed: the response is what its own
program does when the second moment is fixed. At g = a the affine function equals the true update by construction.

Damping enters where the root of a held moment is taken, ``sqrt(v) + damping * rms(sqrt v)``, or, without a root, where a
held moment divides (Adamax). A sign is ``x / |x|`` and a clip ``x * (clip(x) / x)`` with the factor held: that is the
surrogate for Lion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from . import _jaxprs

__all__ = ["Held", "Item", "Known", "Live", "Unreadable", "run"]


@dataclass(frozen=True)
class Known:
    """Does not depend on the gradient; ``uniform`` is the 0-d array whose broadcast it is, if it is one."""

    value: Any
    uniform: Any = None


@dataclass(frozen=True)
class Held:
    """Held at its value at a. ``own``: one entry for each of a parameter; ``touched`` (): a moment that is not all zero."""

    value: Any
    own: bool
    touched: Any
    damped: bool = False
    uniform: Any = None


@dataclass(frozen=True)
class Live:
    """Affine in the gradient of parameter ``leaf``.

    The slope is ``scale * values`` (values None: ones), zero where ``zero``: factors of exactly zero are kept aside, so that a
    learning rate of zero can be looked through. With ``polar`` it is ``scale`` times the derivative of a polar factor there.
    """

    value: Any  # (*shape)
    leaf: int
    scale: Any  # ()
    zero: Any  # ()
    values: Any = None  # (*shape)
    polar: Any = None  # (d_out, d_in)
    swapped: bool = False  # an odd number of matrix transposes

    def slope(self) -> Any:
        """Return the slope, written out."""
        scale = jnp.where(self.zero, 0, self.scale)
        return scale * (jnp.ones_like(self.value) if self.values is None else self.values)


@dataclass(frozen=True)
class Unreadable:
    """Depends on the gradient in a way that is not understood."""

    value: Any
    reason: str


Item = Known | Held | Live | Unreadable

_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat", "remat2"}
_NONLINEAR = {
    "abs", "square", "integer_pow", "pow", "sqrt", "rsqrt", "cbrt", "exp", "exp2", "expm1", "log", "log1p", "logistic", "erf",
    "max", "min", "mul", "div", "rem", "atan2", "eq", "ne", "lt", "le", "gt", "ge", "is_finite", "floor", "ceil", "round",
}  # fmt: skip
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"}
_ORDER_KEPT = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "copy_p", "optimization_barrier"}


def run(program: ClosedJaxpr, inputs: list[Item], damping: float, *, orthogonal: frozenset[int] = frozenset()) -> list[Item]:
    """Evaluate a traced update at g = a.

    Parameters
    ----------
    program : ClosedJaxpr
    inputs : list of Item
        One for each input: Live for the gradient, Known for the rest.
    damping : float
        See the module's docstring.
    orthogonal : frozenset of int
        The parameters whose loops of matrix products are an orthogonalisation (Muon).

    Returns
    -------
    list of Item
        One for each output.
    """
    return _evaluate(program.jaxpr, program.consts, inputs, damping, orthogonal)


def _evaluate(jaxpr: Any, consts: Any, inputs: list[Item], damping: float, orthogonal: frozenset[int]) -> list[Item]:
    env: dict[Any, Item] = {}

    def read(atom: Any) -> Item:
        return _known(atom.val) if isinstance(atom, Literal) else env[atom]

    env.update(zip(jaxpr.constvars, map(_known, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        items = [read(v) for v in eqn.invars]
        name = eqn.primitive.name
        if name in _CALLS:
            inner, closed = _jaxprs.body(eqn)
            outs = _evaluate(inner, closed, items, damping, orthogonal)
        elif all(isinstance(x, Known) for x in items):
            outs = _constant(eqn, items)
        elif name == "cond":
            outs = _branches(eqn, items, damping, orthogonal)
        elif (blamed := next((x for x in items if isinstance(x, Unreadable)), None)) is not None:
            outs = [Unreadable(y, blamed.reason) for y in _bind(eqn, items)]
        elif any(isinstance(x, Live) for x in items):
            outs = _live(eqn, items, damping, orthogonal)
        else:
            outs = [_held(eqn, items, damping)] if len(eqn.outvars) == 1 else _moments(eqn, items)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _bind(eqn: Any, items: list[Any]) -> list[Any]:
    return _jaxprs.bind(eqn, [x.value for x in items])


def _known(value: Any) -> Known:
    return Known(value, value if jnp.ndim(value) == 0 else None)


def _constant(eqn: Any, items: list[Any]) -> list[Item]:
    outs: list[Item] = [_known(y) for y in _bind(eqn, items)]
    if eqn.primitive.name in ("broadcast_in_dim", "convert_element_type", "copy", "reshape"):
        uniform = items[0].uniform
        if uniform is not None:
            return [Known(outs[0].value, jnp.asarray(uniform, outs[0].value.dtype))]
    return outs


def _branches(eqn: Any, items: list[Any], damping: float, orthogonal: frozenset[int]) -> list[Item]:
    """Evaluate every branch of a conditional and choose between their results."""
    index, operands = items[0], items[1:]
    results = [_evaluate(b.jaxpr, b.consts, operands, damping, orthogonal) for b in eqn.params["branches"]]
    chosen = index.value
    if not isinstance(chosen, jax.core.Tracer):
        return results[int(chosen)]
    outs = []
    for cases in zip(*results, strict=True):
        total: Item = cases[0]
        for number, case in enumerate(cases[1:], start=1):
            total = _choose(chosen >= number, total, case)
        outs.append(total)
    return outs


def _choose(yes: Any, otherwise: Item, then: Item) -> Item:
    """Return ``then`` where the 0-d ``yes`` holds."""
    value = jnp.where(yes, then.value, otherwise.value)
    pair = (otherwise, then)
    blamed = next((x for x in pair if isinstance(x, Unreadable)), None)
    if blamed is not None:
        return Unreadable(value, blamed.reason)
    if all(isinstance(x, Known) for x in pair):
        return Known(value)
    return _select(value, yes, list(pair))


# ---------------------------------------------------------------------------------------------------------------------
# Held values


def _held(eqn: Any, items: list[Any], damping: float) -> Held:
    """Return the one result of an operation on known and held values."""
    name = eqn.primitive.name
    held = [x for x in items if isinstance(x, Held)]
    touched = held[0].touched
    for x in held[1:]:
        touched = touched | x.touched
    if name == "div" and isinstance(items[1], Held):
        items = [items[0], _damp(items[1], damping)]
    power = _power(name, eqn, items)
    if power is not None:
        root = _damp(replace(held[0], value=jnp.sqrt(held[0].value)), damping)
        y = root.value if power > 0 else 1 / root.value
        damped = True
    else:
        y = _bind(eqn, items)[0]
        damped = any(x.damped for x in items if isinstance(x, Held))
    if name in ("add", "max") and any(isinstance(x, Known) and x.uniform is None for x in items):
        touched = jnp.any(y != 0)  # the moment of the steps before, or the running maximum
    own = any(x.own for x in held) and name not in _REDUCTIONS
    uniform = jnp.reshape(y, ()) if jnp.size(y) == 1 and not own else None
    if uniform is None and not own and name in ("broadcast_in_dim", "convert_element_type", "reshape"):
        uniform = held[0].uniform
    return Held(y, own, touched, damped, uniform)


def _moments(eqn: Any, items: list[Any]) -> list[Item]:
    held = next(x for x in items if isinstance(x, Held))
    return [Held(y, False, held.touched, held.damped, y if jnp.ndim(y) == 0 else None) for y in _bind(eqn, items)]


def _power(name: str, eqn: Any, items: list[Any]) -> float | None:
    """Return 0.5 or -0.5 if the operation takes a root of a held value or divides by it."""
    if name in ("sqrt", "rsqrt"):
        return 0.5 if name == "sqrt" else -0.5
    if name == "pow" and isinstance(items[1], Known) and not isinstance(items[1].value, jax.core.Tracer):
        power = float(items[1].value) if jnp.ndim(items[1].value) == 0 else 0.0
        return power if abs(power) == 0.5 else None
    return None


def _damp(x: Held, damping: float) -> Held:
    """Return a denominator with its share of its own root mean square; infinite if the moment is zero everywhere."""
    if x.damped or not (x.own or x.uniform is None):
        return x
    y = x.value
    if damping:
        y = y + damping * jnp.sqrt(jnp.mean(jnp.square(y)))
    return replace(x, value=jnp.where(x.touched, y, jnp.inf), damped=True)


# ---------------------------------------------------------------------------------------------------------------------
# Live values


def _live(eqn: Any, items: list[Any], damping: float, orthogonal: frozenset[int]) -> list[Item]:
    """Return the results of an operation on at least one live value."""
    name = eqn.primitive.name
    live = [x for x in items if isinstance(x, Live)]
    x = live[0]
    leaves = {i.leaf for i in live}
    if name == "scan" and len(leaves) == 1 and x.leaf in orthogonal:
        return _orthogonalise(eqn, items, x)
    if name in ("sign", "mul", "div") and len(live) == 1:
        return [_scaled(name, items, x, damping)]
    outs = _bind(eqn, items)
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
        return [_select(y, items[0].value, items[1:])]
    if name in ("clamp", "max", "min", "tanh") and len(live) == 1:
        if name in ("max", "min") and any(isinstance(i, Held) for i in items):
            return [Held(y, True, jnp.any(y != 0))]
        ratio = jnp.where(x.value != 0, y / jnp.where(x.value != 0, x.value, 1), 1)
        return [replace(x, value=y, values=ratio if x.values is None else x.values * ratio)]
    if name in _REDUCTIONS or (name == "dot_general" and y.ndim == 0):
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
        size = _damp(Held(jnp.abs(x.value), True, jnp.any(x.value != 0)), damping).value  # (*shape)
        factor = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
        return replace(x, value=x.value * factor, values=factor if x.values is None else x.values * factor)
    if name == "div" and not isinstance(items[0], Live):
        y = items[0].value / x.value
        return Held(y, True, jnp.any(y != 0))
    other = items[1] if isinstance(items[0], Live) else items[0]
    if name == "div" and isinstance(other, Held):
        other = _damp(other, damping)
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


def _select(y: Any, which: Any, cases: list[Any]) -> Item:
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
    """Tell whether a transpose only exchanges the last two axes, all others being of length 1 and in place."""
    r = len(shape)
    return r >= 2 and tuple(permutation) == (*range(r - 2), r - 1, r - 2) and all(s == 1 for s in shape[:-2])


def _orthogonalise(eqn: Any, items: list[Any], x: Live) -> list[Item]:
    """Return the results of the loop that orthogonalises a live matrix."""
    outs: list[Item] = []
    for y in _bind(eqn, items):
        if y.shape != x.value.shape:
            outs.append(Known(y))
        elif x.values is not None or y.size != y.shape[-1] * y.shape[-2]:
            outs.append(Unreadable(y, "an orthogonalisation of something other than one matrix"))
        else:
            matrix = jnp.reshape(x.value, x.value.shape[-2:])  # (rows, columns)
            outs.append(replace(x, value=y, polar=matrix.T if x.swapped else matrix))
    return outs
