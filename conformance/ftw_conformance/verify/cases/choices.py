"""Filters, resampling and the guard, against the reference's loops."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import ftw_reference as ref
import numpy as np

import ftw
from ftw import spi
from ftw.guard import signal
from ftw_conformance.verify.table import Case, Expect, exactly, rounded

Array = Any
WIDE = ("float64", "float32")


@cache
def choose(name: str, k: int, **options: Any) -> Callable[..., dict[str, Any]]:
    """Return a call of a filter."""
    function = getattr(ftw.filters, name)

    def call(*inputs: Any) -> dict[str, Any]:
        return dict(function(*inputs, k, **options)._asdict())

    return call


def account_choice(name: str, k: int, **options: Any) -> Callable[..., dict[str, Expect]]:
    """Return the account of a filter: the reference's own, up to candidates whose scores and rows are identical."""

    def account(got: Mapping[str, Array], b: Array, *rest: Array) -> dict[str, Expect]:
        clean = np.where(np.isnan(b), -np.inf, b)
        expected = getattr(ref.filters, name)(clean, *rest, k, **options)
        count = expected.count
        if name == "top_k":
            count = int(np.sum(~np.isnan(b[expected.indices])))
        alike = twins(b, *rest)
        distinct = len(set(got["indices"].tolist())) == k
        return {
            "indices": exactly(alike[expected.indices], got=alike[got["indices"]]),
            "count": exactly(count),
            "distinct": exactly(True, got=distinct),
        }

    return account


def twins(b: Array, *rest: Array) -> Array:
    """Return for each candidate the first one of the same row in K; without K all differ, for ties go by index."""
    if not rest or rest[0].ndim != 2:
        return np.arange(len(b))
    rows = np.concatenate([b[:, None], rest[0]], axis=1)
    return np.array([int(np.flatnonzero((rows == row).all(axis=1))[0]) for row in rows])


@cache
def cut(k: int, quantile: float | None) -> Callable[..., dict[str, Any]]:
    """Return a call of the threshold, by an array or by a quantile."""

    def call(b: Any, *value: Any) -> dict[str, Any]:
        limit: dict[str, Any] = {"quantile": quantile} if quantile is not None else {"value": value[0]}
        return dict(ftw.filters.threshold(b, k, **limit)._asdict())

    return call


def account_cut(k: int, quantile: float | None) -> Callable[..., dict[str, Expect]]:
    """Return the account: NumPy's own quantile."""

    def account(got: Mapping[str, Array], b: Array, *value: Array) -> dict[str, Expect]:
        level = float(np.quantile(b, quantile)) if quantile is not None else float(value[0])
        order = np.argsort(-b, kind="stable")[:k]
        slack = 1e-6 * np.max(np.abs(b))  # a quantile is interpolated: two scores meet it only in exact arithmetic
        sure = int(np.sum(b[order] >= level + slack)), int(np.sum(b[order] >= level - slack))
        count = int(got["count"])
        return {"indices": exactly(order), "count": exactly(min(max(count, sure[0]), sure[1]))}

    return account


@cache
def draw(k: int, temperature: float) -> Callable[..., dict[str, Any]]:
    """Return a call of boltzmann."""

    def call(b: Any, u: Any) -> dict[str, Any]:
        return dict(ftw.filters.boltzmann(b, k, temperature=temperature, uniforms=u)._asdict())

    return call


def account_draw(k: int, temperature: float) -> Callable[..., dict[str, Expect]]:
    """Return the account: draw one after the other, each from what is left, by the exponential race."""

    def account(got: Mapping[str, Array], b: Array, u: Array) -> dict[str, Expect]:
        spread = float(np.std(b)) or 1.0
        rate = (b - np.max(b)) / spread / temperature
        u = np.clip(u, np.finfo(np.float32).tiny, 1 - np.finfo(np.float32).eps)
        arrival = np.log(-np.log(u)) - rate  # log of an exponential of this rate: the first to arrive is drawn
        return {"indices": exactly(np.argsort(arrival, kind="stable")[:k]), "count": exactly(k)}

    return account


@cache
def redraw(size: int) -> Callable[..., dict[str, Any]]:
    """Return a call of resample."""

    def call(w: Any, u: Any) -> dict[str, Any]:
        return {"indices": ftw.resample(w, size, u)}

    return call


def account_redraw(got: Mapping[str, Array], w: Array, u: Array) -> dict[str, Expect]:
    """Walk along the weights laid end to end until a draw is passed; zero weights have no length."""
    out = []
    for x in u:
        place, passed = x * np.sum(w), 0.0
        chosen = int(np.flatnonzero(w)[-1])
        for i, weight in enumerate(w):
            passed += weight
            if place < passed:
                chosen = i
                break
        out.append(chosen)
    return {"indices": exactly(np.array(out))}


# ---------------------------------------------------------------------------------------------------------------------
# The guard


@cache
def shrink(m: int, cap: float, slope: float) -> Callable[..., dict[str, Any]]:
    """Return a call of the guard on 0-d arrays."""

    def call(target: Any, samples: Any, distance: Any) -> dict[str, Any]:
        a, f = ftw.guard.shrinkage(target, samples, distance, m, cap=cap, slope=slope)
        ratio, v = signal(target, samples, m)
        return {"a": a, "F": f, "signal": ratio, "v": v}

    return call


def ask(scores: Any, gram: Any, target: Any, samples: Any) -> dict[str, Any]:
    """Call the guard's doubt."""
    return {"D": ftw.guard.doubt(scores, gram, target, samples)}


def account_ask(
    got: Mapping[str, Array], scores: Array, gram: Array, target: Array, samples: Array
) -> dict[str, Expect]:
    """Return the account of the doubt by the reference."""
    return {"D": rounded(ref.guard.doubt(scores, gram, float(target), float(samples)), 1.0, 1e2)}


@cache
def shrink_numbers(m: int, cap: float, slope: float) -> Callable[..., dict[str, Any]]:
    """Return a call of the guard on Python numbers, which come back as such."""

    def call(*values: Any) -> dict[str, Any]:
        numbers = [float(x) for x in values]
        t, s, d = numbers
        a, f = ftw.guard.shrinkage(t, s, d, m, cap=cap, slope=slope)
        ratio, v = signal(numbers[0], numbers[1], m)
        xp = spi.namespace(values[0])
        every = {"a": a, "F": f, "signal": ratio, "v": v}
        plain = all(type(x) is float for x in every.values())
        out = {k: xp.asarray(x, dtype=values[0].dtype, device=spi.device(values[0])) for k, x in every.items()}
        return out | {"plain": xp.asarray(plain, device=spi.device(values[0]))}

    return call


def account_shrink(m: int, cap: float, slope: float) -> Callable[..., dict[str, Expect]]:
    """Return the account of the guard by the reference."""

    def account(got: Mapping[str, Array], target: Array, samples: Array, distance: Array) -> dict[str, Expect]:
        t, s, d = float(target), float(samples), float(distance)
        bad = np.isnan([t, s, d]).any()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            a, f = (np.nan, np.nan) if bad else ref.shrinkage(t, s, d, m, cap=cap, slope=slope)
        v = max(s - t, 0.0) / (m - 1) if m > 1 else 0.0
        f = np.inf if m == 1 and not bad else f
        condition = 1.0 if v == 0 or bad else (abs(s) + abs(t)) / ((m - 1) * v) * (1 + abs(f))
        every = {
            "a": rounded(a, 1.0, condition),
            "F": rounded(f, None, condition),
            "signal": rounded(f, None, condition),
            "v": rounded(v, None, condition),
            "plain": exactly(True),
        }
        return {name: every[name] for name in got}

    return account


def cases() -> list[Case]:
    """Return the table's part."""
    rng = np.random.default_rng(3)
    out: list[Case] = []
    n = 12
    G = rng.normal(size=(n, 20)) + 0.5
    G[7] = G[2]
    G[9] = 0.0
    t = rng.normal(size=20) + 0.5
    K, b = G @ G.T, G @ t
    alone = np.eye(n)  # nothing shared: the picks are the scores'
    ties = np.array([2.0, 1, 3, 3, 0, -1, 3, 2, 0, 1, 2, -1])
    situations: dict[str, tuple[Array, Array]] = {
        "random": (b, K),
        "small": (1e-7 * b, 1e-7 * K),
        "gradients of size 1e-5": (1e-10 * b, 1e-10 * K),
        "gradients of size 1e4": (1e8 * b, 1e8 * K),
        "ties": (ties, alone),
        "no positive score": (-np.abs(b) - 0.1, K),
        "zero gradients": (0 * b, 0 * K),
        "rank one": (b[0] * G[:, 0] / G[0, 0], np.outer(G[:, 0], G[:, 0])),
    }
    for what, (scores, gram) in situations.items():
        for k in (1, 5, n):
            heavy = k != 5 or what not in ("random", "ties")
            wide = WIDE if what in ("random", "small", "ties") else ("float64",)
            for name, rule in ref.filters.NAMED.items():
                if rule.refits and what in ("rank one", "zero gradients") and k > 1:
                    continue  # the refit has more than one solution
                account, call = account_choice(name, k), choose(name, k)
                inputs = (scores, gram) if rule.needs_gram else (scores,)
                loops = rule.needs_gram
                out.append(
                    Case(f"filters/{name}/{what}/k={k}", call, inputs, account, wide, loops, heavy, narrow=not loops)
                )
        for redundancy in (0.0, 0.3, 4.0):
            account = account_choice("greedy_utility", 5, redundancy=redundancy)
            call = choose("greedy_utility", 5, redundancy=redundancy)
            name = f"filters/greedy_utility/{what}/redundancy {redundancy}"
            out.append(Case(name, call, (scores, gram), account, ("float64",), loops=True, heavy=True))
    for ridge in (0.0, 0.5, 3.0):
        for seed in range(4):
            shaky = np.random.default_rng(100 + seed)
            H = shaky.normal(size=(n, 6)) * shaky.uniform(0.2, 4, size=(n, 1)) + 0.4
            scores, gram = H @ shaky.normal(size=6), H @ H.T + 1e-3 * np.eye(n)
            account = account_choice("matching", 6, ridge=ridge)
            call = choose("matching", 6, ridge=ridge)
            out.append(
                Case(
                    f"filters/matching/ridge {ridge}/{seed}",
                    call,
                    (scores, gram),
                    account,
                    ("float64",),
                    loops=True,
                    heavy=True,
                )
            )
    spoilt = np.where(np.isin(np.arange(n), (0, 5)), np.nan, ties)
    for k in (4, n):
        out.append(
            Case(f"filters/top_k/not numbers/k={k}", choose("top_k", k), (spoilt,), account_choice("top_k", k), WIDE)
        )
    for quantile in (0.0, 0.25, 0.5, 0.7, 1.0):
        case = Case(
            f"filters/threshold/quantile {quantile}",
            cut(8, quantile),
            (b,),
            account_cut(8, quantile),
            WIDE,
            narrow=True,
        )
        out.append(case)
        out.append(
            Case(
                f"filters/threshold/ties, quantile {quantile}",
                cut(8, quantile),
                (ties,),
                account_choice("threshold", 8, quantile=quantile),
                WIDE,
                heavy=True,
            )
        )
    steep = 4.0 ** rng.permutation(n)  # a level taken from the wrong pair of scores lies beyond the next one
    for quantile in (0.5, 0.6, 0.7):
        call, account = cut(n, quantile), account_cut(n, quantile)
        out.append(Case(f"filters/threshold/steep, quantile {quantile}", call, (steep,), account, WIDE, heavy=True))
    out.append(Case("filters/threshold/one score", cut(1, 0.5), (b[:1],), account_cut(1, 0.5), WIDE, heavy=True))
    for value in (-100.0, float(np.median(ties)), 3.0, 100.0):
        case = Case(f"filters/threshold/value {value}", cut(8, None), (ties, np.asarray(value)), tied_cut, WIDE)
        out.append(case)
    out.append(
        Case(
            "filters/threshold/a number",
            choose("threshold", 8, value=2.0),
            (ties,),
            account_choice("threshold", 8, value=2.0),
            WIDE,
        )
    )
    u = rng.uniform(size=n)
    for temperature in (0.05, 1.0, 50.0):
        for k in (1, 6, n):
            call, account = draw(k, temperature), account_draw(k, temperature)
            for what, scores in (("random", b), ("huge", 1e6 * b), ("equal", np.ones(n))):
                heavy = what != "random" or k != 6
                name = f"filters/boltzmann/{temperature}/{what}/k={k}"
                out.append(Case(name, call, (scores, u), account, WIDE, heavy=heavy))
    edge = np.where(np.arange(n) == 4, 0.0, np.where(np.arange(n) == 6, 1.0, u))
    out.append(Case("filters/boltzmann/draws of 0 and 1", draw(6, 1.0), (b, edge), account_draw(6, 1.0), WIDE))
    w = np.array([0.0, 0.25, 0.0, 0.5, 0.125, 0.125, 0.0])
    draws = np.array([0.0, 0.1, 0.2499, 0.25, 0.5, 0.75, 0.8, 0.875, 0.99, 0.999999])
    for what, weights in (
        ("binary", w),
        ("not normalised", 8 * w),
        ("one", np.eye(5)[2]),
        ("thirds", np.full(3, 1 / 3)),
    ):
        out.append(Case(f"resample/{what}", redraw(10), (weights, draws), account_redraw, WIDE, heavy=what == "one"))
    out.append(Case("resample/draws of 1", redraw(10), (w, np.ones(10)), account_redraw, WIDE))
    out += guard_cases()
    return out


def tied_cut(got: Mapping[str, Array], b: Array, value: Array) -> dict[str, Expect]:
    """Return a score equal to the value passes."""
    order = np.argsort(-b, kind="stable")[:8]
    return {"indices": exactly(order), "count": exactly(int(np.sum(b[order] >= value)))}


def guard_cases() -> list[Case]:
    """Return the guard's cases."""
    out = []
    statistics = {
        "fresh": (4.0, 9.0, 3.0, 5),
        "memorised": (0.1, 9.0, 30.0, 5),
        "near the pool": (0.1, 9.0, 0.5, 5),
        "half open": (1.9, 9.0, 2.0, 5),
        "at the threshold": (1.0, 5.0, 2.0, 5),
        "one target": (1.0, 1.0, 2.0, 1),
        "one target, its length rounded": (1.0, 1.5, 2.0, 1),
        "two targets": (0.2, 2.0, 5.0, 2),
        "identical targets": (2.0, 2.0, 5.0, 3),
        "rounded below": (2.0, 2.0 - 1e-3, 5.0, 3),
        "the pool's mean itself": (0.1, 9.0, 0.0, 5),
        "zero": (0.0, 0.0, 0.0, 4),
        "zero target": (0.0, 1.0, 1.0, 4),
        "not a number": (np.nan, 1.0, 1.0, 4),
        "huge": (1e15, 1e17, 3e17, 7),
    }
    for what, (*values, m) in statistics.items():
        inputs = tuple(np.asarray(x) for x in values)
        for cap, slope in ((0.3, 2.0), (1.0, 0.5), (0.0, 2.0), (0.05, 9.0)):
            call, account = shrink(m, cap, slope), account_shrink(m, cap, slope)
            name = f"guard/{what}/cap {cap}, slope {slope}"
            bad = what == "not a number" and cap == 0.0
            if not bad:
                out.append(Case(name, call, inputs, account, WIDE, heavy=(cap, slope) != (0.3, 2.0)))
            if what != "not a number":
                numbers = shrink_numbers(m, cap, slope)
                out.append(Case(f"{name}, numbers", numbers, inputs, account, ("float64",), heavy=True, eager=True))
    rng = np.random.default_rng(6)
    G = rng.normal(size=(9, 60)) * rng.lognormal(size=(9, 1))
    G[3], G[5] = 0.0, G[4]
    apart = rng.normal(size=60)
    apart -= np.linalg.pinv(G) @ (G @ apart)  # out of reach
    apart /= np.linalg.norm(apart)
    for lean in (0.0, 0.1, 0.14, 0.16, 0.18, 0.25, 1.0):
        t = apart + lean * G[0] / np.linalg.norm(G[0])
        for left in (1.0, 0.015, 0.005):
            inputs = G @ t, G @ G.T, t @ t, np.asarray(left * np.mean(np.sum(G * G, axis=1)))
            heavy = (lean, left) != (0.16, 1.0)
            out.append(Case(f"guard/doubt/lean {lean}, left {left}", ask, inputs, account_ask, WIDE, heavy=heavy))
    return out
