"""One training step's selection as a pure function of arrays."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import ftw
from ftw import Selection, Simplex
from ftw.constraints import Constraint
from ftw.filters import Filter, FilterName
from ftw.geometry import Operator
from ftw.spi import GuardWatch

from . import _capture, _names
from ._forward import forward_step
from ._layout import operators_of, tree_of
from .geometry import geometry as optimizer_geometry
from .geometry import orthogonalised
from .options import CaptureName, Fill, Geometry, Options, Score, Weight

__all__ = ["capture_plan", "filter_then_weight"]

Loss = Callable[[Any, Any], Any]
Select = Callable[..., tuple[Any, Selection[jax.Array]]]
_WHAT = "filter_then_weight"
log = logging.getLogger("ftw_jax")
_warn_once = functools.cache(log.warning)  # the same words once a process, however often it is traced


def filter_then_weight(
    loss: Loss,
    tx: Any,
    *,
    keep: int,
    filter: FilterName | Filter = "matching",
    weight: Weight = "qp",
    constraint: Constraint = Simplex(1.0),  # noqa: B008
    ridge: Any = 0.05,
    shortlist: int | float | None = 0.5,
    solver: Callable[..., Any] | None = None,
    guard: float = 0.3,
    damping: float = 0.1,
    capture: CaptureName = "auto",
    micro_batch: int | None = None,
    geometry: Geometry | None = None,
    linearise: bool = False,
    quota: ftw.Quota | None = None,
    fill: Fill = "raise",
    explain: bool = False,
    score: Score = "exact",
    train_on_target: float = 0.0,
) -> Select:
    """Return a function that chooses ``keep`` samples of a pool, and weights for them, and composes their gradient.

    Parameters
    ----------
    loss : callable
        ``loss(params, example) -> scalar``, the loss of one example: a pool's pytree without its leading axis.
    tx : GradientTransformation
        The optimizer that the gradient is for. `ftw_jax.geometry` says what of it is read.
    keep, filter, weight, constraint, ridge, shortlist, solver, guard
        As in `ftw.filter_then_weight`; by default half of the pool goes on to the Gram matrix.
    damping : float
        Added to second-moment denominators as a multiple of their root mean square over the parameter, not negative.
    capture : {"auto", "dense", "factors"}
        How per-sample gradients are kept: materialized, which is ``vmap(grad)``; as the factors of products and
        look-ups wherever the loss has them; or, parameter by parameter, as what takes less memory
        (`ftw_jax.capture_plan` states it).
    micro_batch : int, optional
        Take the samples so many at a time: the same gradients, less memory, and faster on a CPU, whose cache a few
        samples fill. None takes them all at once, as a pool that several devices share needs it. With 1 nothing is
        vmapped, for a loss that has no batched form (`jax.lax.ragged_dot`).
    geometry : callable, optional
        ``(params, opt_state, gradient) -> {keystr path: operator}`` in place of the optimizer's own response, for
        optimizers that cannot be read; ``gradient`` is the target's, a tree like params.
    linearise : bool
        Take the derivative of what cannot be read of the optimizer, if it acts on each entry by itself: that of
        `ftw_jax.geometry`.
    score : {"exact", "forward"}
        "forward" takes the scores from `jax.jvp` of the losses along ``P g_T``, exact to first order: no per-sample
        gradient but those of the shortlist, and none at all for top-k with uniform weights. The loss must have a
        forward derivative (a `jax.custom_vjp` has none). The guard is off.
    train_on_target : float
        The share a of the target's own gradient in the update, ``(1 - a) sum_i w_i g_i + a g_T``.
    quota : ftw.Quota, optional
        How many of the kept samples come from each source. Its sources, and those of a `ftw.SourceShares`, are the name
        of a column of the pool (a mapping) that holds integers, or an array (n,).
    fill, explain
        As in `ftw.filter_then_weight`; bounds that a pool cannot fill come back in ``selection.status``.

    Returns
    -------
    callable
        ``select(params, opt_state, pool, target=None, **extra_args) -> (grads, selection)``, to call under `jax.jit`.
        ``pool`` and ``target`` are pytrees with the samples on axis 0, of the same structure; None takes the pool's own
        mean as the target. ``grads`` is a tree like ``params``, ready for ``tx.update``. ``selection`` is an
        `ftw.Selection` with ``losses`` (n,) of the pool and ``target_loss``. ``extra_args`` are further arguments of
        ``tx.update``. Fewer than 40 target samples are logged once, when it is traced; that their gradient stays
        shorter than its own error only ``selection.signal`` can tell (below 1), as `ftw.guard` says.

    Raises
    ------
    TypeError, ValueError
        At once for options; when ``select`` is traced for structures, shapes and dtypes, with the argument's name, and
        for an optimizer that cannot be read. Values (NaN, no useful candidate) come back in ``selection.status``, and
        with weights of NaN the gradient is NaN too.
    """
    if not callable(loss):
        raise TypeError(f"{_WHAT}: loss must be a function (params, example) -> scalar, got {type(loss).__name__}")
    if not callable(getattr(tx, "update", None)):
        raise TypeError(f"{_WHAT}: tx must be an optax GradientTransformation, got {type(tx).__name__}")
    options = Options(
        keep=keep,
        filter=filter,
        weight=weight,
        constraint=constraint,
        ridge=ridge,
        shortlist=shortlist,
        solver=solver,
        guard=guard,
        damping=damping,
        capture=capture,
        micro_batch=micro_batch,
        geometry=geometry,
        linearise=linearise,
        quota=quota,
        fill=fill,
        explain=explain,
        score=score,
        train_on_target=train_on_target,
    )

    def select(
        params: Any, opt_state: Any, pool: Any, target: Any = None, **extra_args: Any
    ) -> tuple[Any, Selection[jax.Array]]:
        names, treedef = _names.flatten(params, what="params")
        n = _samples(pool, what="pool")
        _check_axes(params=params, opt_state=opt_state, pool=pool, target=target)
        if keep > n:
            raise ValueError(f"{_WHAT}: keep={keep} must lie in 1 .. {n}, the number of samples in the pool")
        _check_loss(loss, params, pool, what="pool")
        m = n if target is None else _samples(target, what="target")
        if target is not None:
            _check_alike(pool, target)
            _check_loss(loss, params, target, what="target")
            for words in GuardWatch().note(math.inf, m) if guard and score == "exact" else []:
                _warn_once(words)
        apart = frozenset(names if geometry else orthogonalised(opt_state))
        more: Any = {"damping": damping, "extra_args": extra_args, "linearise": linearise}

        def responses(at: Any) -> dict[str, Operator]:
            if geometry is None:
                return optimizer_geometry(tx, params, opt_state, anticipate=at, **more)
            return dict(geometry(params, opt_state, at))

        if score == "forward":
            grads, selection, at = forward_step(
                loss,
                params,
                list(names),
                pool,
                pool if target is None else target,
                geometry=responses,
                trace=lambda: _plan(loss, params, pool, None, capture, apart)[0],
                micro_batch=micro_batch,
                options=_with_columns(options.choice, pool),
            )
            return _blended(grads, at, train_on_target, params), selection
        traces = _plan(loss, params, pool, target, capture, apart)
        views = traces[0].views
        records, losses = _capture.per_sample(traces[0], params, pool, micro_batch)
        samples, target_losses = None, losses
        if target is not None:
            samples, target_losses = _capture.per_sample(traces[1], params, target, micro_batch)
        g_T = ftw.combine(records if samples is None else samples, jnp.full((m,), 1 / m, losses.dtype))
        at = tree_of(treedef, views, g_T)
        operators = operators_of(views, responses(at))
        selection = ftw.filter_then_weight(
            records, g_T, operators, target_samples=samples, guard=guard, **_with_columns(options.choice, pool)
        )
        members = ftw.take(records, selection.indices)
        grads = ftw.combine(members, selection.weights)
        selection = selection._replace(losses=losses, target_loss=jnp.mean(target_losses))
        return _blended(tree_of(treedef, views, grads), at, train_on_target, params), selection

    return select


def capture_plan(
    loss: Loss, params: Any, pool: Any, target: Any = None, *, capture: str = "auto"
) -> dict[str, tuple[str, int]]:
    """Return how the per-sample gradients of each parameter would be kept, and the bytes of one sample.

    Parameters
    ----------
    loss, params, pool, target, capture
        Those of `filter_then_weight` and of the function it returns; shapes are enough (`jax.ShapeDtypeStruct`).

    Returns
    -------
    dict of str to (str, int)
        By keystr path: "dense", the parameter's own size; or "factors", the inputs and output gradients of its
        products.
    """
    traced = [_capture.trace(loss, params, batch) for batch in ([pool] if target is None else [pool, target])]
    return _capture.routes(traced, params, capture)[1]


def _plan(
    loss: Loss, params: Any, pool: Any, target: Any, capture: str, apart: frozenset[str]
) -> list[_capture.Traced]:
    """Trace the loss of the pool and of the target, and choose what is kept as factors in both."""
    batches = [pool] if target is None else [pool, target]
    traced = [_capture.trace(loss, params, batch) for batch in batches]
    chosen, _ = _capture.routes(traced, params, capture)
    traced = [
        _capture.trace(loss, params, batch, only=chosen, program=t.program)
        for batch, t in zip(batches, traced, strict=True)
    ]
    return [_capture.sharing(t, params, apart=apart) for t in traced]


def _with_columns(choice: dict[str, Any], pool: Any) -> dict[str, Any]:
    """Return the options of a choice with the pool's columns where they are named."""
    return choice | {name: _with_sources(choice[name], pool) for name in ("constraint", "quota")}


def _with_sources(bounded: Any, pool: Any) -> Any:
    """Return a quota or shares with the column of the pool that they name; anything else as it is."""
    if not isinstance(bounded, (ftw.Quota, ftw.SourceShares)) or not isinstance(bounded.sources, str):
        return bounded
    if not isinstance(pool, Mapping) or bounded.sources not in pool:
        there = sorted(pool) if isinstance(pool, Mapping) else f"a {type(pool).__name__}"
        raise ValueError(
            f"{_WHAT}: the pool has no column {bounded.sources!r} to read sources from; it is or has {there}"
        )
    return bounded._replace(sources=jnp.asarray(pool[bounded.sources]))


def _blended(update: Any, target: Any, share: float, params: Any) -> Any:
    """Return ``(1 - share) update + share g_T`` in the dtypes of the parameters."""
    if share:
        update = jax.tree.map(lambda g, t: (1 - share) * g + share * t.astype(g.dtype), update, target)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), update, params)


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


def _check_axes(**trees: Any) -> None:
    """Raise for arrays that `jax.shard_map` checks for what varies over its axes: a traced program does not say it."""
    for what, tree in trees.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            aval = getattr(leaf, "aval", None)
            axes = getattr(
                getattr(aval, "manual_axis_type", None), "varying", getattr(aval, "vma", ())
            )  # JAX 0.10 or older
            if axes:
                raise ValueError(
                    f"{_WHAT}: {what}{jax.tree_util.keystr(path)} {jnp.shape(leaf)} varies over {sorted(axes)} of a "
                    "shard_map: pass it check_vma=False, and each device selects from its own samples; for one choice "
                    "of all, shard the pool and call under jax.jit without shard_map"
                )


def _check_alike(pool: Any, target: Any) -> None:
    """Raise if a target's examples are not of the pool's structure; lengths may differ."""
    ours: Any = jax.tree.structure(pool)
    theirs: Any = jax.tree.structure(target)
    if ours != theirs:
        raise ValueError(f"{_WHAT}: target is {theirs}, the pool {ours}; loss takes examples of both")


def _check_loss(loss: Loss, params: Any, batch: Any, *, what: str) -> None:
    """Raise if the loss of one example is not a real floating scalar."""
    try:
        out = jax.eval_shape(loss, params, _names.example(batch))
    except Exception as error:
        shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", _names.example(batch))
        error.add_note(f"{_WHAT}: raised by loss(params, example) for an example of {what}, {shapes}")
        raise
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        kind = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", out)
        raise TypeError(f"{_WHAT}: loss(params, example) must return one floating scalar for one example, got {kind}")
