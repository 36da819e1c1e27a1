"""The choice itself, from inner products alone: which candidates to keep, and how much each counts.

It never sees a gradient. ``selection.py`` answers its questions from records; an adapter may answer from sums
that it took while it captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from . import _array, _kinds, _loops, _named_filters, _shown, _units, quotas
from . import guard as guard_
from ._array import Array
from ._named_filters import Shortlist, needs_gram
from ._options import check_options
from .constraints import Constraint, Simplex, SourceShares, share_bounds
from .filters import Filter, FilterName
from .qp import solve_qp
from .quotas import Places, Quota
from .reasons import Chosen, reasons
from .status import Status
from .weighing import at, weigh

__all__ = ["Products", "Selection", "check_options", "choose", "shortlist_order", "strata"]


if TYPE_CHECKING:
    from typing_extensions import TypeVar

    A = TypeVar("A", default=Any)  # arrays of one library, as in Selection[torch.Tensor]
else:
    from typing import TypeVar

    A = TypeVar("A")


class Selection(NamedTuple, Generic[A]):
    """What was chosen, and what is expected of it; in a notebook it shows a table of the picks.

    Attributes
    ----------
    indices : integer array (keep,)
        Distinct candidates in the order they were picked.
    weights : array (keep,)
        Their weights; one may be zero. NaN if the status says that there is no answer.
    scores : array (n,)
        ``<g_i, P g_T>`` of all candidates, for the target as it was given.
    match : array ()
        Cosine, in the P metric, between the chosen update and the target's.
    predicted_decrease : array ()
        Second-order decrease of the target loss by the chosen update, ``b'w - 1/2 w'Kw``.
    effective_size : array ()
        Effective number of samples, ``(sum w)^2 / sum w^2``.
    shrinkage : array ()
        How far the guard moved the target toward the pool's mean, in [0, cap].
    count : integer array ()
        How many of the indices the filter let pass; the rest have weight zero.
    status : int32 array ()
        A `Status`.
    signal : array ()
        The guard's F, infinite if it had nothing to judge by.
    losses : array (n,) or None
        Losses of all candidates, where an adapter computed them.
    target_loss : array () or None
        Mean loss of the target samples, likewise.
    relaxed : int32 array () or None
        With a quota or bounds on sources: how many sources the choice does not give what their bounds ask for.
    reasons : Reasons or None
        Why each candidate was picked or refused, where ``explain`` asks for it.
    """

    indices: A
    weights: A
    scores: A
    match: A
    predicted_decrease: A
    effective_size: A
    shrinkage: A
    count: Any  # tuples have a method of the name
    status: A
    signal: A
    losses: Any = None
    target_loss: Any = None
    relaxed: Any = None
    reasons: Any = None

    def __repr__(self) -> str:
        """Return one line: how many of how many, the figures, and the status by its name."""
        return _shown.line(self)

    def _repr_html_(self) -> str:
        """Return the line and a table of the picks, for notebooks."""
        return _shown.table(self)


class Linear(NamedTuple):
    """The linear term of the problem, and what the guard did to it."""

    values: Any  # (s,) b' of the shortlist
    shrinkage: Any  # ()
    signal: Any  # ()


class Products(NamedTuple):
    """The inner products in the P metric that a choice requires.

    Attributes
    ----------
    gram : callable
        ``gram(indices (s,)) -> (s, s)``, ``<g_i, P g_j>`` of those candidates; of all n, in their order, for None.
    length : callable
        ``length(indices (k,), weights (k,)) -> ()``, ``|sum_i w_i g_i|^2``, called where there is no Gram matrix.
    target : array ()
        ``|g_T|^2``.
    samples : array () or None
        ``mean_j |g_Tj|^2`` over the target samples; None where the guard is off.
    pool : callable or None
        ``pool(order (n,), short (s,)) -> (|g_T - g_P|^2 (), <g_i, P g_P> (s,))`` with the candidates by falling score,
        and the shortlist (None: all n); called while the guard's gate is open. See `strata`.
    """

    gram: Callable[[Any], Any]
    length: Callable[[Any, Any], Any]
    target: Any
    samples: Any = None
    pool: Callable[[Any, Any], tuple[Any, Any]] | None = None


@_array.quiet
def choose(
    scores: Array,
    products: Products,
    *,
    keep: int,
    filter: FilterName | Filter = "matching",
    weight: str = "qp",
    constraint: Constraint = Simplex(1.0),  # noqa: B008
    ridge: Any = 0.05,
    shortlist: int | float | None = None,
    solver: Callable[..., Any] | None = None,
    targets: int = 0,
    guard: float = 0.3,
    quota: Quota | None = None,
    fill: str = "raise",
    explain: bool = False,
) -> Selection:
    """Choose and weigh by inner products alone: `filter_then_weight` without gradients.

    Parameters
    ----------
    scores : array (n,)
        ``<g_i, P g_T>``.
    products : Products
        The other inner products; arrays of the namespace, dtype and device of the scores.
    keep, filter, weight, constraint, ridge, shortlist, solver, guard, quota, fill, explain
        As in `filter_then_weight`.
    targets : int
        Number m of target samples behind ``products.samples``.
    """
    _kinds.require(scores, "choose: scores")
    bounds = quota, constraint if isinstance(constraint, SourceShares) else None
    xp, n = _array.namespace(scores, *_array.leaves(bounds), what="choose"), scores.shape[0]
    go_on = check_options(n, keep, filter, weight, constraint, ridge, shortlist, guard, quota, fill)
    solver = solver or solve_qp
    wanted = _places(xp, scores, keep, quota, bounds[1])
    within = None if wanted is None else quotas.attainable(xp, wanted)
    order, passed_over = _order(xp, scores, keep, go_on, within)
    short = xp.sort(order[:go_on])  # (s,): in the order of the candidates, so that ties go by index
    b = xp.take(scores, short)  # (s,)
    listed = short if go_on < n else None
    every = None
    if needs_gram(filter):
        every = products.gram(listed)  # (s, s)
    linear = _guarded(xp, b, order, listed, every, products, targets, guard)

    safe = _finite(xp, linear.values)
    intact = xp.all(xp.isfinite(scores)) & xp.all(xp.isfinite(linear.values)) & ~xp.isnan(linear.signal)
    intact = intact & xp.isfinite(products.target)  # a NaN where no candidate looks
    sound = xp.isfinite(b)  # (s,)
    if every is not None:
        sound = xp.isfinite(xp.linalg.diagonal(every))
        intact = intact & xp.all(xp.isfinite(every))
        every = _finite(xp, every)
    inside = None if within is None else quotas.some(xp, within, short)
    picked = _named_filters.run(xp, filter, Shortlist(safe, every, keep, ridge, solver, inside))
    filtered, K = picked.filtered, None
    indices = xp.take(short, filtered.indices)  # (k,)
    if every is not None:
        K = xp.take(xp.take(every, filtered.indices, axis=0), filtered.indices, axis=1)  # (k, k)
    elif weight == "qp":
        K = products.gram(indices)  # (k, k)
        intact = intact & xp.all(xp.isfinite(K))
        K = _finite(xp, K)
    intact = intact & ~_vanishes(xp, products.target)
    if K is not None:
        intact = intact & ~_vanishes(xp, xp.max(xp.linalg.diagonal(K)))

    passed = xp.arange(keep, device=_array.device(b)) < filtered.count  # (k,)
    c = xp.take(safe, filtered.indices)  # (k,)
    constraint = at(xp, constraint, indices)
    weighed = weigh(xp, K, c, passed, weight, constraint, ridge, solver, picked.refit, relax=fill == "relax")
    weights, status = weighed.weights, weighed.status
    obeyed = picked.distinct
    if wanted is not None and fill == "raise":
        obeyed = obeyed & quotas.fills(xp, wanted, keep)
    if obeyed is not True:
        status = xp.where(obeyed, status, xp.full_like(status, int(Status.INFEASIBLE)))
    status = xp.where(intact, status, xp.full_like(status, int(Status.NOT_FINITE)))
    unusable = (status == int(Status.NOT_FINITE)) | (status == int(Status.INFEASIBLE)) | (status == int(Status.NOT_PSD))
    weights = xp.where(unusable, xp.full_like(weights, xp.nan), weights)

    gained = xp.sum(weights * xp.take(_finite(xp, b), filtered.indices))  # b'w, for the target as it was given
    length = products.length(indices, weights) if K is None else xp.sum(weights * (K @ weights))  # w'Kw
    square = products.target
    usable = (length > 0) & (square > 0)
    lengths = [xp.sqrt(xp.where(usable, x, 1.0)) for x in (length, square)]  # two roots: the product could overflow
    match = xp.where(usable, gained, 0.0) / lengths[0] / lengths[1]
    match = xp.where(match > 1, xp.ones_like(match), xp.where(match < -1, -xp.ones_like(match), match))  # of rounding
    why = None
    if explain:
        fitted = None if weighed.fitted is None else xp.where(unusable, xp.nan, weighed.fitted)
        seen = Chosen(short, filtered.indices, passed, safe, every, K, fitted, sound, picked.over, passed_over)
        why = reasons(xp, scores, seen)
    return Selection(
        indices=indices,
        weights=weights,
        scores=scores,
        match=xp.where(unusable, xp.full_like(match, xp.nan), match),
        predicted_decrease=gained - length / 2,
        effective_size=_effective_size(xp, weights),
        shrinkage=linear.shrinkage,
        count=filtered.count,
        status=status,
        signal=linear.signal,
        relaxed=_relaxed(xp, wanted, indices, weighed.relaxed),
        reasons=why,
    )


def shortlist_order(scores: Array, keep: int, size: int, quota: Quota | None, constraint: Any) -> Any:
    """Return all candidates (n,) in the order in which `choose` takes ``size`` of them to its shortlist."""
    xp = _array.namespace(scores, what="shortlist_order")
    shares = constraint if isinstance(constraint, SourceShares) else None
    wanted = _places(xp, scores, keep, quota, shares)
    return _order(xp, scores, keep, size, None if wanted is None else quotas.attainable(xp, wanted))[0]


def _order(xp: Any, scores: Any, keep: int, size: int, within: Places | None) -> tuple[Any, Any]:
    """Return the candidates (n,), the shortlist in front, and which are off it by the quota alone (n,)."""
    order = _array.argsort_descending(xp, scores)  # (n,)
    if within is None:
        return order, None
    order, _, over = quotas.front(xp, quotas.scaled(within, keep, size), order, size)
    return order, over


def _places(xp: Any, scores: Any, keep: int, quota: Quota | None, shares: SourceShares | None) -> Places | None:
    """Return how many places each source has among the kept, None for any.

    Bounds on weights ask for places too, so that the kept samples can obey them. A quota over the same array of
    sources joins them; over other sources the quota alone decides.
    """
    what = "filter_then_weight"
    wanted = None if quota is None else quotas.places(xp, quota, scores.shape[0], keep, what=what)
    if shares is None or not (quota is None or quota.sources is shares.sources):
        return wanted
    m = quotas.length("lower", "upper", shares.lower, shares.upper, what="SourceShares")
    sources, known = quotas.numbered(xp, shares.sources, m, what=f"{what}: SourceShares.sources")
    zero = xp.zeros_like(scores[:1])
    low = xp.concat([share_bounds(xp, "SourceShares.lower", shares.lower, 0.0, m, scores), zero])  # (m + 1,)
    high = xp.concat([share_bounds(xp, "SourceShares.upper", shares.upper, float("inf"), m, scores), zero + xp.inf])
    total = _array.scalar_like(shares.total, scores) * xp.ones_like(zero[0])
    floors = quotas.served(xp, sources, low, high, total, _finite(xp, scores), keep)  # (m + 1,)
    if wanted is None:
        return Places(sources, floors, xp.zeros_like(floors) + keep, known)
    if wanted.floors.shape != floors.shape:
        raise ValueError(f"{what}: the quota has {wanted.floors.shape[0] - 1} sources, the constraint on the same {m}")
    return wanted._replace(floors=xp.maximum(wanted.floors, floors))


def _relaxed(xp: Any, wanted: Places | None, indices: Any, shares: Any) -> Any:
    """Return how many sources do not get what their bounds ask for, () int32; None where there are none."""
    if wanted is None:
        return shares
    missed = xp.astype(xp.count_nonzero(quotas.unmet(xp, wanted, indices)), xp.int32)
    return missed if shares is None else xp.maximum(missed, shares)


def strata(n: int, go_on: int) -> tuple[list[int], list[float]]:
    """Return places in the score order, and weights, by which the pool's mean is estimated.

    Two strata: the shortlist itself, and from the rest a systematic sample of an eighth as many as the pool.
    """
    if go_on >= n:
        return list(range(n)), [1 / n] * n
    rest = n - go_on
    q = min(rest, max(1, n // 8))
    places = [go_on + int((i + 0.5) * rest / q) for i in range(q)]
    return [*range(go_on), *places], [1 / n] * go_on + [rest / q / n] * q


def _vanishes(xp: Any, square: Any) -> Any:
    """Return whether a squared length is so small that the products it adds up have lost their digits."""
    return (square > 0) & (square < _units.smallest_square(xp, square.dtype))


def _guarded(xp: Any, b: Any, order: Any, short: Any, K: Any, products: Products, targets: int, cap: float) -> Linear:
    """Return b' of the shortlist; the pool's mean is formed only if the gate is open, D only given K (s, s)."""
    zero = xp.zeros_like(b[0])
    pool = products.pool
    if products.samples is None or pool is None or cap == 0:
        return Linear(b, zero, xp.full_like(zero, xp.inf))
    ratio, _ = guard_.signal(products.target, products.samples, targets)
    ratio = xp.where(xp.isfinite(products.samples), ratio, xp.nan)  # an infinite spread must show too

    def closed() -> tuple[Any, Any]:
        return b, zero

    def opened() -> tuple[Any, Any]:
        distance, means = pool(order, short)
        lengths = products.target, products.samples
        evidence = {}
        if K is not None:
            evidence = {"doubt": guard_.doubt(_finite(xp, b), _finite(xp, K), *lengths), "slope": guard_.SLOPE}
        a, _ = guard_.shrinkage(*lengths, distance, targets, cap=cap, **evidence)
        return (1 - a) * b + a * means, a

    values, a = _loops.cond(ratio < 1, opened, closed)
    return Linear(values, a, ratio)


def _effective_size(xp: Any, weights: Any) -> Any:
    largest = xp.max(xp.abs(weights))
    w = weights / xp.where(largest > 0, largest, xp.ones_like(largest))  # squares of tiny weights would vanish
    squares = xp.sum(w * w)
    return xp.sum(w) ** 2 / xp.where(squares == 0, xp.ones_like(squares), squares)


def _finite(xp: Any, x: Any) -> Any:
    return xp.where(xp.isfinite(x), x, 0.0)
