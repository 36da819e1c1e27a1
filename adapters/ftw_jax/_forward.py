"""A step with scores from one forward derivative of the pool: no per-sample gradient is formed for them.

`jax.jvp` along ``P g_T`` gives losses and scores together, exact to first order. The shortlist alone is captured,
where the filter or the weights need a Gram matrix; the selected samples are trained by an ordinary backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import ftw
from ftw import Selection, Status
from ftw.geometry import Operator
from ftw.spi import Products, choose

from . import _capture
from ._layout import operators_of

__all__ = ["forward_step"]

Loss = Callable[[Any, Any], Any]


def forward_step(
    loss: Loss,
    params: Any,
    names: Iterable[str],
    pool: Any,
    target: Any,
    *,
    geometry: Callable[[Any], Mapping[str, Operator]],
    trace: Callable[[], _capture.Traced],
    micro_batch: int | None,
    options: Mapping[str, Any],
) -> tuple[Any, Selection, Any]:
    """Return the update, the selection and g_T.

    Parameters
    ----------
    loss, params, pool, target
        As in `ftw_jax.filter_then_weight`.
    names : iterable of str
        Of the parameters, in the order of the leaves.
    geometry : callable
        P by name, given g_T as a tree.
    trace : callable
        What of the pool is kept as factors, asked for if there is to be a Gram matrix.
    options : mapping
        Those of `ftw.spi.choose`.
    """

    def mean_loss(p: Any) -> Any:
        return jnp.mean(_over(lambda example: loss(p, example), target, micro_batch))

    target_loss, g_T = jax.value_and_grad(mean_loss)(params)
    operators = geometry(g_T)
    leaves, treedef = jax.tree.flatten(g_T)
    moved = {name: operators[name].apply(g) for name, g in zip(names, leaves, strict=True)}
    direction = jax.tree.unflatten(
        treedef, [moved[name].astype(g.dtype) for name, g in zip(names, leaves, strict=True)]
    )
    square = sum(jnp.vdot(g, moved[name].astype(g.dtype)) for name, g in zip(names, leaves, strict=True))

    def one(example: Any) -> Any:
        return jax.jvp(lambda p: loss(p, example), (params,), (direction,))

    losses, scores = _over(one, pool, micro_batch)  # (n,), (n,)
    found: dict[str, Any] = {}

    def update(indices: Any, weights: Any) -> Any:
        """Return sum_i w_i g_i; in place of a sample of zero weight stands the one of the largest."""
        indices = jnp.where(weights != 0, indices, indices[jnp.argmax(weights)])
        chosen = jax.tree.map(lambda x: x[indices], pool)
        return jax.grad(lambda p: jnp.sum(weights * _over(lambda example: loss(p, example), chosen, micro_batch)))(
            params
        )

    def length(indices: Any, weights: Any) -> Any:
        found["update"] = update(indices, weights)
        parts = zip(names, jax.tree.leaves(found["update"]), strict=True)
        return sum(operators[name].inner(g, g) for name, g in parts)

    def gram(indices: Any) -> Any:
        traced = trace()
        some = pool if indices is None else jax.tree.map(lambda x: x[indices], pool)
        records = _capture.per_sample(traced, params, some, micro_batch).records
        return ftw.gram(records, operators_of(traced.views, operators)).astype(scores.dtype)

    products = Products(gram, lambda i, w: jnp.asarray(length(i, w), scores.dtype), jnp.asarray(square, scores.dtype))
    selection = choose(scores, products, **options)
    psd = jnp.all(jnp.stack([jnp.asarray(operator.is_psd()) for operator in operators.values()]))
    selection = selection._replace(
        weights=jnp.where(psd, selection.weights, jnp.nan),
        status=jnp.where(psd, selection.status, jnp.int32(Status.NOT_PSD)),
        losses=losses,
        target_loss=target_loss,
    )
    grads = found["update"] if "update" in found else update(selection.indices, selection.weights)
    broken = jnp.where(jnp.any(jnp.isnan(selection.weights)), jnp.nan, 0.0)
    return jax.tree.map(lambda g: g + broken.astype(g.dtype), grads), selection, g_T


def _over(one: Callable[[Any], Any], batch: Any, micro_batch: int | None) -> Any:
    """Return ``one(example)`` of all examples, stacked; ``micro_batch`` at a time."""
    n = jax.tree.leaves(batch)[0].shape[0]
    if micro_batch is None or micro_batch >= n:
        return jax.vmap(one)(batch)
    return jax.lax.map(one, batch, batch_size=None if micro_batch == 1 else micro_batch)
