"""The response of a smooth transform whose program cannot be read: its own derivative, if that is diagonal.

``J 1`` is the diagonal of the derivative J of an update that acts on each entry by itself. Whether it does is seen at
run time: for vectors r of random signs, over all parameters together, ``J r`` must then be ``(J 1) * r``. A derivative
that mixes entries or parameters fails that, symmetric or not, and no operator could carry it; the response is then -1
everywhere, which is not positive semi-definite and is reported as such. So is a derivative that climbs.

Nothing is held here: a second moment inside the transform is differentiated through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ftw import Diagonal, LinearUpdate

__all__ = ["linearised"]

PROBES = 2
TOLERANCE = {2: 0.03, 4: 3e-4, 8: 1e-8}  # by bytes of the dtype, of the largest entry of a parameter's diagonal


def linearised(update: Callable[[list[Any]], list[Any]], at: list[Any], leaves: list[int]) -> dict[int, LinearUpdate]:
    """Return the affine functions, at the gradients ``at``, of the parameters of these numbers.

    Notes
    -----
    Three forward derivatives of the update.
    """

    def along(direction: list[Any]) -> tuple[list[Any], list[Any]]:
        values, slopes = jax.jvp(update, (at,), (direction,))
        return values, slopes

    values, diagonal = along([jnp.ones_like(a) for a in at])
    alone = {leaf: jnp.asarray(True) for leaf in leaves}
    for probe in range(PROBES):
        keys = jax.random.split(jax.random.key(probe), len(at))
        signs = [jax.random.rademacher(key, a.shape, a.dtype) for key, a in zip(keys, at, strict=True)]
        _, slopes = along(signs)
        for leaf in leaves:
            d = diagonal[leaf]  # (*shape)
            tolerance = TOLERANCE[d.dtype.itemsize] * jnp.max(jnp.abs(d), initial=0)
            alone[leaf] &= jnp.all(jnp.abs(slopes[leaf] - d * signs[leaf]) <= tolerance)
    out = {}
    for leaf in leaves:
        operator = Diagonal(jnp.where(alone[leaf], -diagonal[leaf], -1))
        out[leaf] = LinearUpdate(-values[leaf] - operator.apply(at[leaf]), operator)
    return out
