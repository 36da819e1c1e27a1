"""Per-sample gradients written out: ``vmap(grad)`` of the loss, for any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from ftw import Dense

from . import _names

__all__ = ["per_sample"]

Loss = Callable[[Any, Any], Any]


def per_sample(loss: Loss, params: Any, batch: Any) -> tuple[dict[str, Dense], Any]:
    """Return the gradients of n samples, one `Dense` (n, *shape) a parameter, and their losses (n,).

    Notes
    -----
    n times the memory of the parameters.
    """
    losses, grads = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(params, batch)
    return {name: Dense(g) for name, g in _names.flatten(grads, what="gradients")[0].items()}, losses
