"""Quotas, shares and reasons, against the reference and the definitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import ftw_reference as ref
import numpy as np

import ftw
from ftw.constraints import project
from ftw_conformance import problems
from ftw_conformance.verify.table import Case, Expect, exactly, most, rounded

from . import explicit, models

Array = Any
N, M = 10, 3
SOURCES = np.array([0, 0, 1, 2, 1, 0, -1, 2, 0, 1])
QUOTAS: dict[str, tuple[Any, Any]] = {
    "floors": ((2, 1, 1), None),
    "caps": (None, (1, 2, 1)),
    "both": ((0, 2, 1), (1, 3, None)),
    "fractions": ((0.2, 0.4, 0.0), (0.4, 1.0, 0.2)),
    "no room": ((2, 2, 2), None),
    "too few": ((0, 0, 3), None),
    "contradicting": ((2, 0, 0), (1, 5, 5)),
    "caps too small": (None, (1, 1, 1)),
}
SHARES: dict[str, tuple[Any, Any, float]] = {
    "floors": ((0.2, 0.1, 0.3), None, 1.0),
    "caps": (None, (0.3, 0.4, 0.2), 1.0),
    "both": ((0.1, 0.0, 0.3), (0.5, 0.2, None), 1.0),
    "one point for each sum": ((0.3, 0.5, 0.2), (0.3, 0.5, 0.2), 1.0),
    "floors that are the total": ((0.3, 0.5, 0.2), None, 1.0),
    "another total": ((10.0, 0.0, 30.0), (50.0, 20.0, None), 100.0),
    "a source without weight": (None, (0.0, None, 0.4), 1.0),
    "total 0": ((0.0, 0.0, 0.0), None, 0.0),
    "floors above the total": ((0.5, 0.4, 0.2), None, 1.0),
    "contradicting": ((0.3, 0.0, 0.0), (0.2, 1.0, 1.0), 1.0),
    "not a number": ((np.nan, 0.0, 0.0), None, 1.0),
}


@cache
def filtered(name: str, k: int, what: str) -> Callable[..., dict[str, Any]]:
    """Return a call of a filter under a quota."""
    options = {"quantile": 0.4} if name == "threshold" else {}

    def call(sources: Any, *inputs: Any) -> dict[str, Any]:
        quota = ftw.Quota(sources, *QUOTAS[what])
        return dict(getattr(ftw.filters, name)(*inputs, k, quota=quota, **options)._asdict())

    return call


def account_filtered(name: str, k: int, what: str) -> Callable[..., dict[str, Expect]]:
    """Return the reference's choice, which picks one at a time."""
    options = {"quantile": 0.4} if name == "threshold" else {}

    def account(got: Mapping[str, Array], sources: Array, *inputs: Array) -> dict[str, Expect]:
        best = getattr(ref.filters, name)(*inputs, k, quota=ref.Quota(sources, *QUOTAS[what]), **options)
        return {"indices": exactly(best.indices), "count": exactly(best.count)}

    return account


@cache
def solved_by(what: str) -> Callable[..., dict[str, Any]]:
    """Return a call of the QP over shares."""

    def call(K: Any, c: Any, sources: Any) -> dict[str, Any]:
        low, high, total = SHARES[what]
        return dict(ftw.solve_qp(K, c, ftw.SourceShares(sources, low, high, total))._asdict())

    return call


def account_solved(what: str) -> Callable[..., dict[str, Expect]]:
    """Return the reference's objective, and what makes a point feasible and certified."""
    low, high, total = SHARES[what]

    def account(got: Mapping[str, Array], K: Array, c: Array, sources: Array) -> dict[str, Expect]:
        best = ref.solve_qp(K, c, ref.SourceShares(sources, low, high, total))
        w = np.asarray(got["weights"], dtype=float)
        out = {"status": exactly(best.status), "steps": most(60, got["steps"])}
        if best.status != ref.Status.OK:
            nan = np.asarray(np.nan)
            return out | {name: exactly(nan) for name in ("objective", "kkt", "gap")} | {"weights": exactly(w * np.nan)}
        size = float(np.abs(w) @ np.abs(K) @ np.abs(w) + np.abs(c) @ np.abs(w)) + 1e-300
        value = 0.5 * w @ K @ w - c @ w
        box, reach = ref.shares.read_shares(ref.SourceShares(sources, low, high, total), len(c)), max(total, 1e-300)
        sums = np.array([np.sum(w[box.sources == s]) for s in range(M + 1)])
        outside = max(np.max(box.lower - sums), np.max(sums - box.upper), np.max(-w), 0.0) / reach
        zero, many = np.zeros(()), 100.0 * len(c)
        return out | {
            "weights": exactly(0)._replace(got=0),
            "sum": rounded(total, reach, len(c))._replace(got=np.sum(w)),
            "outside": Expect(zero, "rounded", 1.0, len(c), np.asarray(outside)),
            "objective": Expect(np.asarray(best.objective), "certified", size),
            "value": Expect(zero, "rounded", 1.0, 8 * len(c), np.asarray(abs(float(got["objective"]) - value) / size)),
            "kkt": Expect(zero, "certified", 1.0, many),
            "gap": Expect(zero, "certified", 1.0, many),
        }

    return account


@cache
def projected_on(what: str, weighted: bool) -> Callable[..., dict[str, Any]]:
    """Return a call of the projection onto shares."""

    def call(v: Any, sources: Any, *metric: Any) -> dict[str, Any]:
        low, high, total = SHARES[what]
        options = {"metric": metric[0]} if weighted else {}
        return {"point": project(ftw.SourceShares(sources, low, high, total), v, **options)}

    return call


def account_projected(what: str) -> Callable[..., dict[str, Expect]]:
    """Return the reference's projection; in another metric, its QP with a diagonal matrix."""
    low, high, total = SHARES[what]

    def account(got: Mapping[str, Array], v: Array, sources: Array, *metric: Array) -> dict[str, Expect]:
        shares = ref.SourceShares(sources, low, high, total)

        def one(row: Array) -> Array:
            if not metric:
                return ref.project(row, shares)
            return ref.solve_qp(np.diag(metric[0]), metric[0] * row, shares).weights

        value = np.apply_along_axis(one, -1, v)
        scale = np.max(np.abs(v)) + total
        return {"point": Expect(value, "rounded", scale, (1e3 if metric else 1.0) * v.shape[-1])}

    return account


@cache
def selected(what: str, filter: Any, shortlist: Any, fill: str, shares: str | None) -> Callable[..., dict[str, Any]]:
    """Return a call of the whole choice under a quota or shares, with its reasons."""

    def call(x: Any, target: Any, geometry: Any, sources: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"quota": ftw.Quota(sources, *QUOTAS[what])} if what else {}
        if shares:
            options["constraint"] = ftw.SourceShares(sources, *SHARES[shares])
        s = ftw.filter_then_weight(
            x, target, geometry, keep=5, filter=filter, shortlist=shortlist, fill=fill, explain=True, **options
        )
        out = {name: getattr(s, name) for name in ("indices", "weights", "status", "count", "relaxed")}
        why: dict[str, Any] = s.reasons._asdict()
        return out | why

    return call


def account_selected(what: str, filter: str, shortlist: Any, fill: str, shares: str | None) -> Callable[..., Any]:
    """Return the reference's choice, and the reasons by their definitions."""

    def account(got: Mapping[str, Array], x: Any, target: Any, geometry: Any, sources: Array) -> dict[str, Expect]:
        G, P = explicit.flat(x), explicit.metric(x, geometry)
        t = explicit.flat_target(target)
        quota = ref.Quota(sources, *QUOTAS[what]) if what else None
        constraint = ref.SourceShares(sources, *SHARES[shares]) if shares else None
        s = ref.filter_then_weight(
            G, t, P, keep=5, filter=filter, shortlist=shortlist, fill=fill, quota=quota, constraint=constraint
        )
        b, K = ref.scores(G, t, P), ref.gram(G, P)
        part = K[np.ix_(s.indices, s.indices)]
        r = 0.05 * float(np.mean(np.diag(part)))
        fitted = ref.solve_qp(part, b[s.indices], ref.NonNegative(), ridge=r).weights
        spread = np.linalg.eigvalsh(part + r * np.eye(5))
        condition = 1e3 * float(spread[-1] / spread[0])
        places = ref.step.wanted_places(quota, constraint, b, 5)
        assert places is not None
        counts = np.bincount(places.sources[s.indices], minlength=M + 1)[:M]
        missed = (counts < places.floors[:M]) | (counts > places.caps[:M])
        out = {
            "indices": exactly(s.indices),
            "status": exactly(s.status),
            "count": exactly(s.count),
            "relaxed": exactly(np.sum(missed)),
            "weights": rounded(s.weights, 1.0, condition),
        }
        return out | why(s, b, K, fitted, places, filter, shortlist, condition)

    return account


def why(
    s: Any, b: Array, K: Array, fitted: Array, places: Any, filter: str, shortlist: Any, condition: float
) -> dict[str, Expect]:
    """Return the reasons of a choice: the stages in turn, one candidate after the other."""
    n, size = len(b), ref.step.shortlist_length(shortlist, 5, len(b))
    order = ref.top_k(b, n).indices
    near = ref.quotas.reachable(places)
    short = np.sort(ref.quotas.shorten(near, order, 5, size))
    where = {int(i): j for j, i in enumerate(order)}
    last = max(where[int(i)] for i in short)
    inside = near._replace(sources=near.sources[short])
    c, A = b[short], K[np.ix_(short, short)]
    rule = ref.filters.NAMED[filter]
    _, beaten = ref.quotas.pick_each(inside, rule.value(c, A, 5, 0.05), 5)
    code, residual = np.full(n, ftw.Reason.REFUSED_SCORE, dtype=np.int32), np.full(n, np.nan)
    rival, similarity = np.full(n, -1), np.full(n, np.nan)
    left = b - K[:, s.indices] @ fitted
    unusable = bool(np.isnan(s.weights).any())
    for i in range(n):
        if i in s.indices:
            code[i] = ftw.Reason.PICKED
        elif i not in short:
            code[i] = ftw.Reason.REFUSED_QUOTA if where[i] < last else ftw.Reason.REFUSED_SCORE
        elif b[i] <= 0:
            code[i] = ftw.Reason.REFUSED_HARMFUL
        elif beaten[np.searchsorted(short, i)]:
            code[i] = ftw.Reason.REFUSED_QUOTA
        elif rule.needs_gram:
            code[i] = ftw.Reason.REFUSED_REDUNDANT
            cosines = K[i, s.indices] / np.sqrt(K[i, i] * np.diag(K)[s.indices])
            rival[i], similarity[i] = s.indices[np.argmax(cosines)], np.max(cosines)
        if (i in short if rule.needs_gram else i in s.indices) and not unusable:
            residual[i] = left[i]
    return {
        "code": exactly(code),
        "residual": rounded(residual, float(np.max(np.abs(b))), condition),
        "rival": exactly(rival),
        "similarity": rounded(similarity, 1.0, 100.0),
    }


def cases() -> list[Case]:
    """Return the table's part."""
    rng = np.random.default_rng(19)
    out: list[Case] = []
    G = rng.normal(size=(N, 16))
    b, K = G @ (G[:4].sum(axis=0) + rng.normal(size=16)), G @ G.T
    for what in QUOTAS:
        for name in (*ref.filters.NAMED, "threshold"):
            rule = ref.filters.NAMED.get(name)
            inputs = (SOURCES, b, K) if rule and rule.needs_gram else (SOURCES, b)
            heavy = what != "both" or bool(rule and rule.refits)
            call, account = filtered(name, 5, what), account_filtered(name, 5, what)
            wide = ("float64", "float32") if name == "top_k" else ("float64",)
            out.append(Case(f"quotas/{name}/{what}", call, inputs, account, wide, loops=len(inputs) > 2, heavy=heavy))
    for what in SHARES:
        for kind in ("wide", "twins", "zeros", "negative", "adam", "clusters"):
            A, c = problems.make(kind, N, 4)
            call, account = solved_by(what), account_solved(what)
            wide = ("float64",) if kind == "adam" else ("float64", "float32")
            heavy = (what, kind) != ("both", "wide")
            out.append(Case(f"shares/qp/{what}/{kind}", call, (A, c, SOURCES), account, wide, loops=True, heavy=heavy))
        for name, v in {
            "random": rng.normal(size=N),
            "a stack": rng.normal(size=(2, 3, N)),
            "ties": np.ones(N),
        }.items():
            call, account = projected_on(what, False), account_projected(what)
            wide = ("float64", "float32")
            out.append(
                Case(
                    f"shares/project/{what}/{name}",
                    call,
                    (v, SOURCES),
                    account,
                    wide,
                    heavy=what != "both" or name == "ties",
                )
            )
        metric = rng.uniform(0.3, 3, size=N)
        out.append(
            Case(
                f"shares/project/{what}/metric",
                projected_on(what, True),
                (rng.normal(size=N), SOURCES, metric),
                account_projected(what),
                ("float64",),
                heavy=True,
            )
        )
    x = models.records(rng, N, 3, models.SMALL)
    target, geometry = models.target(rng, x), models.geometry(rng, x, 1)
    for what in (*QUOTAS, ""):
        for filter in (name for name, rule in ref.filters.NAMED.items() if rule.value):
            for shortlist, fill, shares in ((None, "raise", None), (6, "relax", None), (7, "raise", "both")):
                if not what and not shares:
                    continue
                options = what, filter, shortlist, fill, shares if not what else None
                name = f"sources/{what or 'shares'}/{filter}/shortlist {shortlist}, {fill}"
                call, account = selected(*options), account_selected(*options)
                out.append(
                    Case(name, call, (x, target, geometry, SOURCES), account, ("float64",), loops=True, heavy=True)
                )
    return out
