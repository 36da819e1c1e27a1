"""One training step's selection as a pure function of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ftw
import jax
import jax.numpy as jnp
from ftw import Selection, Simplex, Status
from ftw.constraints import Constraint
from ftw.filters import Filter
from ftw.geometry import Operator

from . import _dense, _names
from .geometry import geometry as optimizer_geometry
from .geometry import is_psd

__all__ = ["filter_then_weight"]

Loss = Callable[[Any, Any], Any]
Geometry = Callable[[Any, Any, Any], Mapping[str, Operator]]
Select = Callable[..., tuple[Any, Selection]]
_WHAT = "filter_then_weight"


def filter_then_weight(
    loss: Loss,
    tx: Any,
    *,
    keep: int,
    filter: str | Filter = "matching",  # noqa: A002
    weight: str = "qp",
    constraint: Constraint = Simplex(1.0),  # noqa: B008
    ridge: Any = 0.05,
    shortlist: int | float | None = 0.5,
    solver: Callable[..., Any] | None = None,
    guard: float = 0.3,
    damping: float = 0.1,
    geometry: Geometry | None = None,
) -> Select:
    """Return a function that chooses ``keep`` samples of a pool, and weights for them, and composes their gradient.

    Parameters
    ----------
    loss : callable
        ``loss(params, example) -> scalar``, the loss of one example: a pool's pytree without its leading axis.
    tx : GradientTransformation
        The optimizer that the gradient is for. `ftw_jax.geometry` says what of it is read.
    keep, filter, weight, constraint, ridge, shortlist, solver, guard
        Those of `ftw.filter_then_weight`; by default half of the pool goes on to the Gram matrix.
    damping : float
        Added to second-moment denominators as a multiple of their root mean square over the parameter, not negative.
    geometry : callable, optional
        ``(params, opt_state, gradient) -> {keystr path: operator}`` in place of the optimizer's own response, for optimizers
        that cannot be read; ``gradient`` is the target's, a tree like params.

    Returns
    -------
    callable
        ``select(params, opt_state, pool, target=None, **extra_args) -> (grads, selection)``, to be called under `jax.jit`.
        ``pool`` and ``target`` are pytrees with the samples on axis 0, of the same structure; None takes the pool's own mean as
        the target. ``grads`` is a tree like ``params``, ready for ``tx.update``. ``selection`` is an `ftw.Selection` with
        ``losses`` (n,) of the pool and ``target_loss``. ``extra_args`` are further arguments of ``tx.update``.

    Raises
    ------
    TypeError, ValueError
        At once for options; when ``select`` is traced for structures, shapes and dtypes, with the argument's name, and for an
        optimizer that cannot be read. Values (NaN, no useful candidate) come back in ``selection.status``, and with weights of
        NaN the gradient is NaN too.
    """
    _check_options(loss, tx, keep, damping, geometry)

    def select(params: Any, opt_state: Any, pool: Any, target: Any = None, **extra_args: Any) -> tuple[Any, Selection]:
        _, treedef = _names.flatten(params, what="params")
        n = _samples(pool, what="pool")
        if keep > n:
            raise ValueError(f"{_WHAT}: keep={keep} must lie in 1 .. {n}, the number of samples in the pool")
        _check_loss(loss, params, pool)
        records, losses = _dense.per_sample(loss, params, pool)
        if target is None:
            samples, target_losses = None, losses
            g_T = ftw.combine(records, jnp.full((n,), 1 / n, losses.dtype))
        else:
            m = _samples(target, what="target")
            _check_alike(pool, target)
            samples, target_losses = _dense.per_sample(loss, params, target)
            g_T = ftw.combine(samples, jnp.full((m,), 1 / m, losses.dtype))
        at = jax.tree.unflatten(treedef, list(g_T.values()))
        if geometry is None:
            operators = optimizer_geometry(
                tx, params, opt_state, anticipate=at, damping=damping, extra_args=extra_args
            )
        else:
            operators = dict(geometry(params, opt_state, at))
        selection = ftw.filter_then_weight(
            records,
            g_T,
            operators,
            keep=keep,
            filter=filter,
            weight=weight,
            constraint=constraint,
            ridge=ridge,
            shortlist=shortlist,
            solver=solver,
            target_samples=samples,
            guard=guard,
        )
        selection = _refuse_indefinite(selection, is_psd(operators))
        members = ftw.take(records, selection.indices)
        grads = ftw.combine(members, selection.weights)
        selection = selection._replace(losses=losses, target_loss=jnp.mean(target_losses))
        leaves = [g.astype(p.dtype) for g, p in zip(grads.values(), jax.tree.leaves(params), strict=True)]
        return jax.tree.unflatten(treedef, leaves), selection

    return select


def _refuse_indefinite(selection: Selection, psd: Any) -> Selection:
    """Return a selection without an answer if the optimizer climbs in some direction."""
    return selection._replace(
        weights=jnp.where(psd, selection.weights, jnp.nan),
        status=jnp.where(psd, selection.status, jnp.int32(Status.NOT_PSD)),
    )


def _check_options(loss: Any, tx: Any, keep: Any, damping: Any, geometry: Any) -> None:
    if not callable(loss):
        raise TypeError(f"{_WHAT}: loss must be a function (params, example) -> scalar, got {type(loss).__name__}")
    if not callable(getattr(tx, "update", None)):
        raise TypeError(f"{_WHAT}: tx must be an optax GradientTransformation, got {type(tx).__name__}")
    if not isinstance(keep, int) or isinstance(keep, bool):
        raise TypeError(f"{_WHAT}: keep must be an int, got {type(keep).__name__}")
    if keep < 1:
        raise ValueError(f"{_WHAT}: keep={keep} must be at least 1")
    if isinstance(damping, (int, float)) and not damping >= 0:
        raise ValueError(f"{_WHAT}: damping={damping} must not be negative")
    if geometry is not None and not callable(geometry):
        raise TypeError(f"{_WHAT}: geometry must be a function (params, opt_state, gradient) -> {{name: operator}}")


def _samples(batch: Any, *, what: str) -> int:
    """Return the length of the leading axis that all leaves share."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    sizes = {jax.tree_util.keystr(path): jnp.shape(leaf)[:1] for path, leaf in leaves}
    if not sizes or len(set(sizes.values())) > 1 or () in sizes.values():
        raise ValueError(f"{_WHAT}: every array of {what} must have the samples on axis 0; leading axes are {sizes}")
    n = next(iter(sizes.values()))[0]
    if n == 0:
        raise ValueError(f"{_WHAT}: {what} holds no samples")
    return int(n)


def _check_alike(pool: Any, target: Any) -> None:
    """Raise if a target's examples are not of the pool's structure; lengths may differ."""
    if jax.tree.structure(pool) != jax.tree.structure(target):
        raise ValueError(
            f"{_WHAT}: target is {jax.tree.structure(target)}, the pool {jax.tree.structure(pool)}; loss takes examples of both"
        )


def _check_loss(loss: Loss, params: Any, pool: Any) -> None:
    """Raise if the loss of one example is not a real floating scalar."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), pool)
    out = jax.eval_shape(loss, params, example)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        kind = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", out)
        raise TypeError(f"{_WHAT}: loss(params, example) must return one floating scalar for one example, got {kind}")
