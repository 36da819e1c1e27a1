"""ftw for JAX: data selection as a pure function, for any loss and any optax optimizer.

select = ftw_jax.filter_then_weight(loss, tx, keep=16)                       # loss(params, example) -> scalar
grads, selection = jax.jit(select)(params, opt_state, pool, target)          # grads feed tx.update
"""

from ftw.command_line import require as _require

_require("ftw_jax", "jax", "optax", extra="jax")

from .geometry import geometry, linear_updates
from .step import capture_plan, filter_then_weight

__all__ = ["capture_plan", "filter_then_weight", "geometry", "linear_updates"]
