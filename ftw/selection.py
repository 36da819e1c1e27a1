"""Filter-then-Weight, the stages composed (Wang et al. 2026).

    scores       b_i  = <g_i, P g_T>                       all n candidates
    shortlist    the best of them by score                 so that the Gram matrix stays small
    Gram         K_ij = <g_i, P g_j>                       of the shortlist
    guard        b' = (1 - a) b + a mean_j K_ij            if the target looks memorised
    filter       ``keep`` of the shortlist
    weights      min 1/2 w'Kw - s b'w  over a constraint set, s such that the non-negative solution has the set's total

The target's length has no say in the weights of a set with a fixed total: matching it with one fixed step length would
make the filter pick tiny gradients, whose own noise K_ii costs least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import _array, _units, gradients
from ._array import Array
from ._check import check_alike, check_model
from .choice import Products, Selection, check_options, choose, strata
from .constraints import Constraint, Simplex
from .filters import Filter, FilterName
from .geometry import Operator
from .gradients import Record, combine, take
from .inner_products import gram, squared_norms
from .inner_products import scores as all_scores
from .quotas import Quota
from .status import Status

__all__ = ["Selection", "filter_then_weight"]


@_array.untracked
@_array.quiet
def filter_then_weight(
    candidates: Mapping[str, Record],
    target: Mapping[str, Array] | None,
    geometry: Mapping[str, Operator],
    *,
    keep: int,
    filter: FilterName | Filter = "matching",
    weight: str = "qp",
    constraint: Constraint = Simplex(1.0),  # noqa: B008
    ridge: Any = 0.05,
    shortlist: int | float | None = None,
    solver: Callable[..., Any] | None = None,
    target_samples: Mapping[str, Record] | None = None,
    guard: float = 0.3,
    scores: Array | None = None,
    quota: Quota | None = None,
    fill: str = "raise",
    explain: bool = False,
) -> Selection:
    """Choose ``keep`` of n candidates, and weights for them, so that their update matches the target's.

    Parameters
    ----------
    candidates : mapping of str to record
        Gradients of n candidates, one record a parameter.
    target : mapping of str to array, or None
        Mean gradient g_T of the target samples; None takes the pool's own mean.
    geometry : mapping of str to operator
        The optimizer's linearised response P, one operator a parameter.
    keep : int
        How many to choose, 1 <= keep <= n.
    filter : str or callable
        Which of the shortlist are kept: a name of `ftw.filters.FilterName`, or ``(scores, gram, k) -> Filtered`` that
        returns k distinct positions in the shortlist.
    weight : {"qp", "uniform"}
        The QP, or equal weights; with "uniform" after "top_k" no Gram matrix is formed for the choice.
    constraint : NonNegative, Simplex, CappedSimplex, Box or SourceShares
        Where the weights live; bounds are numbers, or arrays (n,) with one a candidate. For sets with a fixed total the
        target is first scaled so that the non-negative solution has that total. The filter keeps a sample of every
        source that bounds on shares need.
    ridge : float
        Added to the diagonal of K, as a multiple of the mean diagonal of the samples kept.
    shortlist : int, float or None
        How many go on to the Gram matrix by score: a count, a fraction of n, or all. Never fewer than ``keep``.
    solver : callable, optional
        Like `ftw.solve_qp`, which is the default.
    target_samples : mapping of str to record, optional
        Gradients of the m target samples; with them the guard may act.
    guard : float
        Largest shrinkage of the target toward the pool's mean, in [0, 1]; 0 turns the guard off.
    scores : array (n,), optional
        `ftw.scores` of the same arguments, if they are there already (an adapter sums them up while it captures).
    quota : Quota, optional
        How many of the kept samples come from each source, obeyed by every filter. The shortlist keeps the same
        proportions as far as the pool allows.
    fill : {"raise", "relax"}
        What happens where the bounds of the quota or of `SourceShares` contradict each other, or ask for more than this
        pool holds: the status INFEASIBLE, or the nearest choice (floors before caps), with the sources that do not get
        what they ask for counted in ``relaxed``.
    explain : bool
        Whether the selection has ``reasons``.

    Returns
    -------
    Selection

    Raises
    ------
    ValueError, TypeError
        If names, shapes, dtypes, namespaces, devices or ranges are wrong. Values (NaN, an empty set, an indefinite
        matrix) give a status and NaN weights instead, since a trace cannot raise.

    Notes
    -----
    Scores cost 2 n t d_out d_in FLOPs a matrix parameter, the Gram matrix of a shortlist of s 2 (s t + s^2) d_out d_in.
    """
    xp, n = check_model(candidates, geometry, target, what="filter_then_weight")
    go_on = check_options(n, keep, filter, weight, constraint, ridge, shortlist, guard, quota, fill)
    dtype = xp.result_type(*(gradients.dtype(xp, record) for record in candidates.values()))
    if target is None:
        first = _array.leaves(candidates)[0]
        target = combine(candidates, xp.full((n,), 1 / n, dtype=dtype, device=_array.device(first)))
    if scores is not None and tuple(scores.shape) != (n,):
        raise ValueError(f"filter_then_weight: scores {tuple(scores.shape)} must be ({n},), one a candidate")
    m = 0
    if target_samples is not None and guard:
        _, m = check_model(target_samples, geometry, what="filter_then_weight: target_samples")
        check_alike(candidates, target_samples, what="filter_then_weight: target_samples")

    known = [candidates] if not m or target_samples is None else [candidates, target_samples]
    unit = _units.common_factor(xp, known, list(target.values()), dtype)
    scaled = {name: _units.times(xp, g, unit) for name, g in target.items()}  # c g_T: from here on in these units
    b = all_scores(candidates, scaled, geometry) if scores is None else _units.times(xp, scores, unit)
    b = _units.times(xp, b, unit)  # (n,)

    def some(indices: Any) -> Mapping[str, Record]:
        return candidates if indices is None else take(candidates, indices)

    def in_units(records: Mapping[str, Record]) -> Mapping[str, Record]:
        return {name: _units.scaled(xp, record, unit) for name, record in records.items()}

    def length(indices: Any, weights: Any) -> Any:
        return _inner(combine(some(indices), _units.times(xp, weights, unit)), geometry)

    def pool(order: Any, short: Any) -> tuple[Any, Any]:
        places, shares = strata(n, go_on)
        sampled = None if short is None else xp.take(order, xp.asarray(places, dtype=order.dtype, device=device))
        each = _units.times(xp, xp.asarray(shares, dtype=b.dtype, device=device), unit)
        mean = combine(some(sampled), each)  # c g_P
        distance = _inner({name: scaled[name] - mean[name] for name in mean}, geometry)  # c^2 |g_T - g_P|^2
        return distance, _units.times(xp, all_scores(some(short), mean, geometry), unit)

    device = _array.device(b)
    products = Products(
        gram=lambda indices: gram(in_units(some(indices)), geometry),
        length=length,
        target=_inner(scaled, geometry),
        samples=(
            xp.mean(squared_norms(in_units(target_samples), geometry)) if m and target_samples is not None else None
        ),
        pool=pool,
    )
    selection = choose(
        b,
        products,
        keep=keep,
        filter=filter,
        weight=weight,
        constraint=constraint,
        ridge=ridge,
        shortlist=shortlist,
        solver=solver,
        targets=m,
        guard=guard,
        quota=quota,
        fill=fill,
        explain=explain,
    )
    if not _units.is_one(unit):
        back = [_units.times(xp, _units.times(xp, x, 1 / unit), 1 / unit) for x in (b, selection.predicted_decrease)]
        selection = selection._replace(scores=back[0] if scores is None else scores, predicted_decrease=back[1])
        if selection.reasons is not None:
            residual = _units.times(xp, _units.times(xp, selection.reasons.residual, 1 / unit), 1 / unit)
            selection = selection._replace(reasons=selection.reasons._replace(residual=residual))
    psd = xp.asarray(True, device=device)
    for operator in geometry.values():
        psd = psd & operator.is_psd()
    return _refused(xp, selection, psd)


def _refused(xp: Any, selection: Selection, psd: Any) -> Selection:
    """Return the selection, without an answer where the geometry is indefinite: a root of it has no meaning."""

    def answer(x: Any) -> Any:
        return xp.where(psd, x, xp.full_like(x, xp.nan))

    status = selection.status
    return selection._replace(
        weights=answer(selection.weights),
        match=answer(selection.match),
        predicted_decrease=answer(selection.predicted_decrease),
        effective_size=answer(selection.effective_size),
        status=xp.where(psd, status, xp.full_like(status, int(Status.NOT_PSD))),
    )


def _inner(target: Mapping[str, Array], geometry: Mapping[str, Operator]) -> Any:
    """Return ``<g, P g>`` over all parameters."""
    return sum(operator.inner(target[name], target[name]) for name, operator in geometry.items())
