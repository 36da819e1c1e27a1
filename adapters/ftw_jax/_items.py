"""What an intermediate value of an optimizer's program is, as a function of the gradient (``_program.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from . import _jaxprs

__all__ = ["REDUCTIONS", "Held", "Item", "Known", "Live", "Unreadable", "bind", "known"]

REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"}


@dataclass(frozen=True)
class Known:
    """Does not depend on the gradient; ``uniform`` is the 0-d array whose broadcast it is, if it is one."""

    value: Any
    uniform: Any = None


@dataclass(frozen=True)
class Held:
    """Held at its value at a. ``own``: one entry for each of a parameter; ``touched`` (): it is not all zero."""

    value: Any
    own: bool
    touched: Any
    damped: bool = False
    uniform: Any = None


@dataclass(frozen=True)
class Live:
    """Affine in the gradient of parameter ``leaf``.

    The slope is ``scale * values`` (values None: ones), zero where ``zero``: factors of exactly zero are kept aside, so
    that a learning rate of zero can be looked through. With ``polar`` it is ``scale`` times the derivative of a polar
    factor there.
    """

    value: Any  # (*shape)
    leaf: int
    scale: Any  # ()
    zero: Any  # ()
    values: Any = None  # (*shape)
    polar: Any = None  # (d_out, d_in)
    swapped: bool = False  # an odd number of matrix transposes

    def slope(self) -> Any:
        """Return the slope, materialized."""
        scale = jnp.where(self.zero, 0, self.scale)
        return scale * (jnp.ones_like(self.value) if self.values is None else self.values)


@dataclass(frozen=True)
class Unreadable:
    """Depends on the gradient in a way that is not understood."""

    value: Any
    reason: str


Item = Known | Held | Live | Unreadable


def bind(eqn: Any, items: list[Any]) -> list[Any]:
    """Return the results of an equation on the items' values."""
    return _jaxprs.bind(eqn, [x.value for x in items])


def known(value: Any) -> Known:
    """Return a value that does not depend on the gradient."""
    return Known(value, value if jnp.ndim(value) == 0 else None)
