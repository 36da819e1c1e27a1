"""Reading an optimizer's own program: its update at a gradient a, and how each entry of it answers to that gradient.

``tx.update`` is traced once into a jaxpr, which is then evaluated at g = a. Beside its value, every intermediate
carries what it is as a function of the gradient:

========== ==========================================================================================================
Known      does not depend on it: parameters, state, schedules
Live       affine in it, entry by entry: ``value + scale * values * (g - a)``; or the polar factor of such a matrix
Held       a nonlinear function of it that only scales what is live: held at its value at a, with no derivative.
           Squares and the second moments made of them, and every reduction: a clipping norm, a trust ratio, row means
Unreadable anything else, with the name of the operation to blame
========== ==========================================================================================================

So an optimizer needs no entry in a table of names, and its hyper-parameters are never guessed: the response is what its
own program does when the second moment is fixed. At g = a the affine function equals the true update by construction.

Damping enters where the root of a held moment is taken, ``sqrt(v) + damping * rms(sqrt v)``, or, without a root, where
a held moment divides (Adamax). A sign is ``x / |x|`` and a clip ``x * (clip(x) / x)`` with the factor held: that is the
surrogate for Lion.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from . import _jaxprs
from ._held import hold, hold_all
from ._items import Item, Known, Live, Unreadable, bind, known
from ._live import follow, select

__all__ = ["run"]

_CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "checkpoint",
    "remat",
    "remat2",
}


def run(
    program: ClosedJaxpr, inputs: list[Item], damping: float, *, orthogonal: frozenset[int] = frozenset()
) -> list[Item]:
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
        return known(atom.val) if isinstance(atom, Literal) else env[atom]

    env.update(zip(jaxpr.constvars, map(known, consts), strict=True))
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
            outs = [Unreadable(y, blamed.reason) for y in bind(eqn, items)]
        elif any(isinstance(x, Live) for x in items):
            outs = follow(eqn, items, damping, orthogonal)
        else:
            outs = [hold(eqn, items, damping)] if len(eqn.outvars) == 1 else hold_all(eqn, items)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _constant(eqn: Any, items: list[Any]) -> list[Item]:
    outs: list[Item] = [known(y) for y in bind(eqn, items)]
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
    return select(value, yes, list(pair))
