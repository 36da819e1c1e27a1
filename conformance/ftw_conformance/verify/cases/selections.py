"""The composed selection with all its options, against the reference's step on explicit gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ftw_reference as ref
import numpy as np

import ftw
from ftw_conformance.verify.table import Case, Expect, exactly, rounded, summed

from . import explicit, models
from .operators import negatives
from .products import scaled
from .selection_options import COMPILED, OPTIONS
from .sizes import lengths, terms

Array = Any
OK, NOTHING_USEFUL, NOT_FINITE, INFEASIBLE, NOT_PSD = range(5)


class Pool(NamedTuple):
    """The arrays of one selection."""

    candidates: dict[str, Any]
    target: Any
    geometry: dict[str, Any]
    samples: Any
    bounds: tuple[Any, ...]  # arrays of a constraint, one a candidate


def call_with(options: dict[str, Any], kind: Any = None, *, given: bool = False) -> Callable[..., dict[str, Any]]:
    """Return a call of filter_then_weight; ``kind`` makes a constraint of the pool's arrays."""

    def call(p: Pool) -> dict[str, Any]:
        more = dict(options)
        if kind is not None:
            more["constraint"] = kind(*p.bounds)
        if given:
            more["scores"] = 0.5 * ftw.scores(p.candidates, p.target, p.geometry)
        s = ftw.filter_then_weight(p.candidates, p.target, p.geometry, target_samples=p.samples, **more)
        return {name: value for name, value in s._asdict().items() if value is not None}

    return call


def account_with(options: dict[str, Any], kind: Any = None, *, given: bool = False) -> Callable[..., dict[str, Expect]]:
    """Return the account of a selection, stage by stage from explicit gradients."""

    def account(got: Mapping[str, Array], p: Pool) -> dict[str, Expect]:
        G, P = explicit.flat(p.candidates), explicit.metric(p.candidates, p.geometry)
        t = np.mean(G, axis=0) if p.target is None else explicit.flat_target(p.target)
        T = None if p.samples is None else explicit.flat(p.samples)
        more = dict(options)
        more.pop("solver", None)
        if kind is not None:
            more["constraint"] = kind(*p.bounds)
        s = select(G, t, P, T, given=given, got=got, **more)
        size = lengths(p.candidates) * np.linalg.norm(P, 2) * np.linalg.norm(t)
        many = 64 * terms(p.candidates) * G.shape[1]
        alike = same(G)
        out = {
            "indices": exactly(alike[s["indices"]], got=alike[got["indices"]]),
            "distinct": exactly(len(s["indices"]), got=len(set(got["indices"].tolist()))),
            "count": exactly(s["count"]),
            "status": exactly(s["status"]),
            "scores": summed(s["scores"], np.where(np.isfinite(size), size, 1.0) * (0.5 if given else 1), many),
            "shrinkage": rounded(s["shrinkage"], 1.0, 1e4),
            "signal": rounded(s["signal"], None, 1e4),
        }
        if s["status"] in (NOT_FINITE, INFEASIBLE, NOT_PSD):
            out["weights"] = exactly(np.full(len(s["indices"]), np.nan))
            out |= {name: exactly(np.nan) for name in ("match", "predicted_decrease", "effective_size")}
            if s["status"] == NOT_FINITE:
                for name in ("indices", "count", "shrinkage", "signal"):
                    out[name] = exactly(0)._replace(got=0)  # of no meaning
            return out
        w, condition = s["weights"], s["condition"]
        out["weights"] = Expect(w, "solved", max(float(np.max(np.abs(w))), 1e-300), condition)
        out["match"] = Expect(np.clip(s["match"], -1.0, 1.0), "solved", 1.0, condition)
        out["effective_size"] = Expect(s["effective_size"], "solved", None, condition)
        out["predicted_decrease"] = Expect(s["predicted_decrease"], "solved", s["size"], condition)
        return out

    return account


def same(G: Array) -> Array:
    """Return for each candidate the first one of the same gradient."""
    return np.array([int(np.flatnonzero((np.nan_to_num(G) == np.nan_to_num(row)).all(axis=1))[0]) for row in G])


def select(
    G: Array,
    t: Array,
    P: Array,
    T: Array | None,
    *,
    got: Mapping[str, Array],
    keep: int,
    filter: Any = "matching",
    weight: str = "qp",
    constraint: Any = None,
    ridge: float = 0.05,
    shortlist: Any = None,
    guard: float = 0.3,
    given: bool = False,
) -> dict[str, Any]:
    """Compose the stages as the contract has them, by the reference's parts."""
    n = len(G)
    b = ref.scores(G, t, P) * (0.5 if given else 1)
    order = np.argsort(-np.where(np.isnan(b), -np.inf, b), kind="stable")
    go_on = ref.step.shortlist_length(shortlist, keep, n)
    short = np.sort(order[:go_on])
    a, ratio, pull = 0.0, math.inf, b
    if T is not None and guard:
        pool = np.mean(G, axis=0)
        if go_on < n:  # two strata: the shortlist, and every so many of the rest in the order of the scores
            rest, some = n - go_on, min(n - go_on, max(1, n // 8))
            places = [go_on + math.floor((i + 0.5) * rest / some) for i in range(some)]
            pool = (np.sum(G[short], axis=0) + rest * np.mean(G[order[places]], axis=0)) / n
        square = t @ P @ t
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            norms = float(np.mean([x @ P @ x for x in T]))
            asked: dict[str, float] = {}
            if ref.filters.needs_gram(filter) and np.isfinite(b).all() and np.isfinite(G[short]).all():
                asked = {"doubt": ref.guard.doubt(b[short], ref.gram(G[short], P), square, norms), "slope": 4.0}
            a, ratio = (
                (0.0, math.nan)
                if not math.isfinite(norms)
                else ref.shrinkage(square, norms, (t - pool) @ P @ (t - pool), len(T), cap=guard, **asked)
            )
        ratio = math.inf if len(T) == 1 else ratio
        pull = (1 - a) * b + a * (G @ P @ pool)
    K = ref.gram(G, P)
    gram_seen = K[np.ix_(short, short)] if ref.filters.needs_gram(filter) else np.zeros(1)
    status = OK
    if not (np.isfinite(b).all() and np.isfinite(gram_seen).all() and not math.isnan(ratio)):
        status = NOT_FINITE
    base = {"scores": b, "shrinkage": a, "signal": ratio}
    if status == NOT_FINITE:
        return base | {"status": status, "indices": order[:keep], "count": keep}
    chosen = ref.step.run_filter(filter, pull[short], K[np.ix_(short, short)], keep, ridge)
    picks = short[chosen.indices]
    constraint = ref.Simplex(1.0) if constraint is None else constraint
    part = K[np.ix_(picks, picks)]
    fields = [x[picks] if np.ndim(x) else x for x in constraint]
    limits = type(constraint)(*fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights, found = ref.step.weigh(
            pull[picks], part, chosen.count, weight, limits, ref.projections.bounds(limits, keep), ridge
        )
    base |= {"status": int(found), "indices": picks, "count": chosen.count}
    if np.isnan(weights).any():
        return base
    r = ridge * float(np.mean(np.diag(part)[: max(chosen.count, 1)]))
    spread = np.linalg.eigvalsh(part + r * np.eye(keep))
    condition = 100.0 * keep * float(spread[-1] / max(spread[0], 1e-15 * spread[-1])) if spread[-1] > 0 else 1.0
    gained, length = float(weights @ b[picks]), float(weights @ part @ weights)
    square = float(t @ P @ t)
    return base | {
        "weights": weights,
        "condition": condition,
        "match": gained / math.sqrt(length) / math.sqrt(square) if length > 0 and square > 0 else 0.0,
        "predicted_decrease": gained - length / 2,
        "size": abs(gained) + length + 1e-300,
        "effective_size": np.sum(weights) ** 2 / np.sum(weights**2) if np.any(weights) else 0.0,
    }


def pool(
    rng: Any, n: int = 10, m: int = 3, start: Any = 1, names: tuple[str, ...] = models.SMALL, *, fresh: bool = True
) -> Pool:
    """Return a pool whose candidates share something with the target, and target samples."""
    x = models.records(rng, n, 3, names)
    s = models.records(rng, m, 3, names)
    g = models.target(rng, x)
    for record_set, amount in ((x, 0.3), (s, 0.5 if fresh else 0.0)):
        for name in record_set:
            record_set[name] = leaning(record_set[name], g[name], amount, rng)
    mean = {name: np.mean(explicit.dense(r), axis=0) for name, r in s.items()}
    return Pool(x, mean, models.geometry(rng, x, start), s, ())


def memorised(p: Pool, amount: float) -> Pool:
    """Return the pool with a target of which only ``amount`` is left, and samples whose gradients are short."""
    P = explicit.metric(p.candidates, p.geometry)
    own, theirs = (np.mean(np.sum(G @ P * G, axis=1)) for G in map(explicit.flat, (p.samples, p.candidates)))
    short = math.sqrt(0.014 * theirs / own)  # the guard's doubt is then about a half
    samples = scaled(p.samples, factors=[short] * next(iter(p.samples.values())).n)
    return p._replace(target={k: short * amount * g for k, g in p.target.items()}, samples=samples)


def leaning(record: Any, g: Array, amount: float, rng: Any) -> Any:
    """Return a record of explicit gradients that lean toward g, where it is dense; others stay as they are."""
    if isinstance(record, ftw.Dense):
        lean = rng.uniform(0, 2 * amount, size=(record.n, *[1] * g.ndim))
        return ftw.Dense(record.grads + lean * g * 3)
    return record


def cases() -> list[Case]:
    """Return the table's part."""
    rng = np.random.default_rng(5)
    out: list[Case] = []

    def add(name: str, p: Pool, options: dict[str, Any], kind: Any = None, *, given: bool = False, **more: Any) -> None:
        more = {"loops": True, "heavy": True} | more
        call, account = call_with(options, kind, given=given), account_with(options, kind, given=given)
        out.append(Case(f"selection/{name}", call, (p,), account, **more))

    wide = ("float64", "float32")
    for name, options in OPTIONS.items():
        for fresh in (True, False):
            p = pool(rng, fresh=fresh)
            p = p if fresh else memorised(p, 0.05)
            what = name if fresh else f"{name}, memorised"
            add(
                what,
                p,
                options,
                dtypes=wide,
                heavy=name not in COMPILED or fresh == (name == "shortlist 0.5"),
                narrow=name == "uniform, top_k",
            )
    for seed in range(6):
        p = pool(np.random.default_rng(50 + seed), n=24, m=4, start=seed, fresh=seed % 2 == 0)
        for shortlist in (None, 9):
            add(f"random {seed}, shortlist {shortlist}", p, {"keep": 6, "shortlist": shortlist})
            what = f"random {seed}, shortlist {shortlist}, memorised"
            add(what, memorised(p, 0.1), {"keep": 6, "shortlist": shortlist})
    p = pool(rng)
    add("no target samples", p._replace(samples=None), OPTIONS["default"], dtypes=wide)
    add(
        "the pool is its own target",
        p._replace(target=None, samples=None),
        OPTIONS["default"],
        dtypes=("float64", "float32", "bfloat16"),
    )
    add("scores are there already", p, {"keep": 4, "guard": 0}, given=True)
    caps = rng.uniform(0.2, 0.6, size=10)
    add("a cap for each", p._replace(bounds=(caps, np.asarray(1.0))), {"keep": 4}, ftw.CappedSimplex)
    add("bounds for each", p._replace(bounds=(-caps, caps)), {"keep": 4}, ftw.Box)
    add("a lower bound for each", p._replace(bounds=(-caps,)), {"keep": 4}, lambda low: ftw.Box(low, 0.3))
    add("totals are arrays", p._replace(bounds=(np.asarray(2.0),)), {"keep": 4}, ftw.Simplex)
    out += situations(rng, add, p)
    out += climbing(rng)
    return out


def situations(rng: Any, add: Any, p: Pool) -> list[Case]:
    """Add the degenerate ones."""
    base = {"keep": 4}
    for fact in (np.nan, np.inf):
        factors = [1.0] * 10
        factors[3] = fact
        for name in ("default", "top_k", "uniform", "uniform, top_k", "shortlist 6"):
            bad = p._replace(candidates=scaled(p.candidates, factors=factors))
            add(f"a candidate holds {fact}, {name}", bad, OPTIONS[name])
    spoilt = p._replace(target={k: g * np.nan for k, g in p.target.items()})
    add("the target is not a number", spoilt, base)
    add("a target sample is not a number", p._replace(samples=scaled(p.samples, factors=[1, np.nan, 1])), base)
    plain = {k: ftw.Scale(np.asarray(1.0)) for k in p.geometry}
    vast = p._replace(samples=scaled(p.samples, factors=[1, 1e307, 1]), geometry=plain)
    add("a target sample overflows", vast, base, dtypes=("float64",))
    for name in ("default", "NonNegative", "capped", "Box", "top_k", "uniform", "greedy"):
        zero = p._replace(candidates=scaled(p.candidates, factors=[0.0] * 10))
        add(f"all gradients are zero, {name}", zero, OPTIONS[name] | {"ridge": 0.05})
        against = p._replace(
            target={k: np.abs(g) for k, g in p.target.items()},
            geometry=plain,
        )
        against = against._replace(candidates=opposed(against.candidates, against.target), samples=None)
        add(f"no candidate helps, {name}", against, OPTIONS[name])
    add("a zero target", p._replace(target={k: 0 * g for k, g in p.target.items()}, samples=None), base)
    twins = p._replace(candidates=scaled(p.candidates, take=[0, 1, 1, 2, 2, 2, 3, 4, 5, 5]))
    add("duplicates", twins, {"keep": 3})
    add("duplicates, top_k", twins, {"keep": 5, "filter": "top_k", "ridge": 0.1})
    add("one candidate", pool(rng, n=1)._replace(samples=None), {"keep": 1})
    add("one target sample", pool(rng, m=1), base)
    for factor in (1e8, 1e-8):
        small = p._replace(candidates=scaled(p.candidates, factors=[factor] * 10))
        add(f"candidates of size {factor}", small, base, dtypes=("float64",))
        far = p._replace(target={k: g * factor for k, g in p.target.items()}, samples=None)
        add(f"a target of size {factor}", far, base, dtypes=("float64",))
    for power in (-70, 60):  # in float32 the squares of these leave the range
        x, g, t = p.candidates, p.target, p.samples
        apart = Pool(
            scaled(x, factors=[2.0**power] * 10), {k: v * 2.0**power for k, v in g.items()}, p.geometry, None, ()
        )
        add(f"units of 2^{power}", apart, {"keep": 4}, dtypes=("float32",))
        add(f"units of 2^{power}, top_k", apart, OPTIONS["uniform, top_k"], dtypes=("float32",))
        watched = apart._replace(samples=scaled(t, factors=[2.0**power] * 3))
        add(f"units of 2^{power}, guarded", watched, base, dtypes=("float32",))
    add(
        "one token",
        Pool(models.records(rng, 8, 1), None, models.geometry(rng, models.records(rng, 8, 1), 4), None, ()),
        base,
    )
    every = tuple(models.RECORDS)
    add("every record", pool(rng, names=every, start=0), {"keep": 5})
    wide = {"wide": p.candidates["wide"]}
    indefinite = {"wide": ftw.Kronecker(-np.eye(4), np.eye(6))}
    negative = Pool(wide, {"wide": p.target["wide"]}, indefinite, None, ())
    add("not PSD", negative, {"keep": 4, "filter": "top_k"})
    add("not PSD, matching", negative, {"keep": 4})
    add("not PSD, NonNegative", negative, {"keep": 4, "filter": "top_k", "constraint": ftw.NonNegative()})
    return []


def climbing(rng: Any) -> list[Case]:
    """Return selections under an operator with a negative part: every kind ends as NOT_PSD, whatever the filter."""
    out = []
    wide = models.records(rng, 6, 2, ("wide",))
    target = models.target(rng, wide)
    for i, (name, operator) in enumerate(negatives(rng, (4, 6)).items()):
        for j, filter in enumerate(("matching", "top_k")):
            pool = Pool(wide, target, {"wide": operator}, None, ())
            call = call_with({"keep": 3, "filter": filter})
            heavy = (i, j) not in ((1, 0), (8, 1))
            out.append(Case(f"selection/climbs/{name}/{filter}", call, (pool,), account_climbing, heavy=heavy))
    return out


def account_climbing(got: Mapping[str, Array], p: Pool) -> dict[str, Expect]:
    """Expect a status and no numbers; scores are what they are, the rest has no meaning."""
    b = ref.scores(
        explicit.flat(p.candidates), explicit.flat_target(p.target), explicit.metric(p.candidates, p.geometry)
    )
    size = np.max(lengths(p.candidates)) * np.linalg.norm(explicit.flat_target(p.target)) * 1e2
    numbers = ("weights", "match", "predicted_decrease", "effective_size")
    out = {name: exactly(np.full(np.shape(got[name]), np.nan)) for name in numbers}
    out |= {name: exactly(0)._replace(got=0) for name in ("indices", "count", "shrinkage", "signal")}
    return out | {"status": exactly(NOT_PSD), "scores": summed(b, size, 1e4)}


def opposed(x: Any, target: Any) -> Any:
    """Return candidates that all point away from the target."""
    out = {}
    for name, record in x.items():
        G = explicit.dense(record)
        out[name] = ftw.Dense(-np.abs(G) * (np.asarray(target[name]) > 0) - 0.1)
    return out
