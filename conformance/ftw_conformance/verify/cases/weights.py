"""The QP over the constraint sets, against the reference's active-set method, its certificates recomputed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import ftw_reference as ref
import numpy as np

import ftw
from ftw import spi
from ftw.constraints import as_limits
from ftw.qp.gradient import accelerated
from ftw.qp.problem import balance, certificate, scaled_problem
from ftw_conformance import problems
from ftw_conformance.verify.table import Case, Expect, exactly, most, rounded

from .certificates import accounts, scaled_residual, sets

Array = Any
OK, NOT_FINITE, INFEASIBLE, NOT_PSD, MAX_STEPS = 0, 2, 3, 4, 5


@cache
def solve(ridge: float = 0.0, warm: bool = False, max_steps: int = 10000) -> Callable[..., dict[str, Any]]:
    """Return a call that solves a QP."""

    def call(K: Any, c: Any, constraint: Any, *start: Any) -> dict[str, Any]:
        options = {"start": start[0]} if warm else {}
        return dict(ftw.solve_qp(K, c, constraint, ridge=ridge, max_steps=max_steps, **options)._asdict())

    return call


@cache
def solve_traced(what: str) -> Callable[..., dict[str, Any]]:
    """Return a call whose ridge and tolerance are arrays."""

    def call(K: Any, c: Any, constraint: Any, ridge: Any, tol: Any) -> dict[str, Any]:
        return dict(ftw.solve_qp(K, c, constraint, ridge=ridge, tol=tol)._asdict())

    return call


def cases() -> list[Case]:
    """Return the table's part."""
    rng = np.random.default_rng(2)
    out: list[Case] = []
    n = 9
    kinds = [kind for kind in problems.KINDS if kind not in ("heavy",)]
    for name, constraint in sets(n, rng).items():
        stack = []
        for kind in kinds:
            K, c = problems.make(kind, n, 3)
            if name == "half box":  # unbounded below along flat directions otherwise
                K = K + 1e-2 * np.max(np.diag(K)) * np.eye(n)
            stack.append((K, c))
            tight = ("float64",) if kind in ("conditioned", "heavy", "near_twins", "adam") else ("float64", "float32")
            out.append(
                Case(f"qp/{name}/{kind}", solve(), (K, c, constraint), accounts(0.0), tight, loops=True, heavy=True)
            )
        K, c = (np.stack(x) for x in zip(*stack, strict=True))
        rest = name in ("simplex 3", "caps", "boxes", "half box")
        case = Case(
            f"qp/{name}/all kinds, a batch", solve(), (K, c, constraint), accounts(0.0), ("float64",), True, rest
        )
        out.append(case)
        K, c = problems.make("twins", n, 5)
        r = 0.05 * float(np.mean(np.diag(K)))
        out.append(
            Case(
                f"qp/{name}/ridge",
                solve(r),
                (K, c, constraint),
                accounts(r),
                loops=True,
                heavy=name != "capped",
                narrow=True,
            )
        )
        start = ref.solve_qp(K + r * np.eye(n), c * 1.1, constraint).weights
        call = solve(r, warm=True)
        out.append(Case(f"qp/{name}/warm", call, (K, c, constraint, start), warmly(r), loops=True, heavy=True))
        for what, bad in (("a NaN", np.nan), ("an infinity", np.inf)):
            spoilt = np.where(np.arange(n) == 2, bad, c)
            out.append(
                Case(
                    f"qp/{name}/{what} in linear",
                    solve(),
                    (K, spoilt, constraint),
                    accounts(0.0),
                    loops=True,
                    heavy=True,
                )
            )
            out.append(
                Case(
                    f"qp/{name}/{what} in gram",
                    solve(),
                    (np.where(np.eye(n) == 1, bad, K), c, constraint),
                    accounts(0.0),
                    loops=True,
                    heavy=True,
                )
            )
        out.append(
            Case(
                f"qp/{name}/indefinite",
                solve(),
                (K - 2 * np.max(K) * np.eye(n), c, constraint),
                accounts(0.0),
                loops=True,
                heavy=True,
            )
        )
        out.append(
            Case(f"qp/{name}/zero gram", solve(1.0), (0 * K, c, constraint), accounts(1.0), loops=True, heavy=True)
        )
        one = type(constraint)(*(np.asarray(x)[..., :1] if np.ndim(x) else x for x in constraint))
        if name not in ("capped", "caps"):
            out.append(
                Case(f"qp/{name}/one sample", solve(), (K[:1, :1], c[:1], one), accounts(0.0), loops=True, heavy=True)
            )
    out += special(rng, n)
    return out


def warmly(ridge: float) -> Callable[..., dict[str, Expect]]:
    """Return the account of a warm start: the same answer."""
    account = accounts(ridge)

    def check(got: Mapping[str, Array], K: Array, c: Array, constraint: Any, start: Array) -> dict[str, Expect]:
        return account(got, K, c, constraint)

    return check


def special(rng: Any, n: int) -> list[Case]:
    """Return what is special to one set, or to none."""
    K, c = problems.make("wide", n, 7)
    out = []

    def add(name: str, constraint: Any, K: Any = K, c: Any = c, call: Any = None, **options: Any) -> None:
        options = {"loops": True, "heavy": True} | options
        out.append(Case(f"qp/{name}", call or solve(), (K, c, constraint), accounts(0.0), **options))

    add("capped/tight", ftw.CappedSimplex(1.0 / n, 1.0))
    add("capped/infeasible", ftw.CappedSimplex(0.9 / n, 1.0))
    add("capped/barely infeasible", ftw.CappedSimplex((1 - 1e-4) / n, 1.0))
    add("capped/negative total", ftw.CappedSimplex(1.0, -1.0))
    add("capped/no limit", ftw.CappedSimplex(np.inf, 1.0))
    add("capped/total 0", ftw.CappedSimplex(1.0, 0.0))
    add("capped/NaN", ftw.CappedSimplex(np.asarray(np.nan), 1.0))
    add("simplex/negative total", ftw.Simplex(np.asarray(-1.0)))
    add("simplex/NaN total", ftw.Simplex(np.asarray(np.nan)))
    add("simplex/infinite total", ftw.Simplex(np.asarray(np.inf)))
    add("simplex/total 0", ftw.Simplex(0.0))
    add("simplex/huge total", ftw.Simplex(1e9))
    add("box/empty", ftw.Box(1.0, -1.0))
    second = np.arange(n) == 1
    add("box/empty in one place", ftw.Box(-1.0, np.where(second, -2.0, 1.0)))
    add("box/nowhere above in one place", ftw.Box(np.where(second, np.inf, -1.0), np.inf))
    add("box/nowhere below in one place", ftw.Box(-np.inf, np.where(second, -np.inf, 1.0)))
    add("box/NaN below", ftw.Box(np.where(np.arange(n) == 1, np.nan, -1.0), 1.0))
    add("box/NaN above", ftw.Box(-1.0, np.where(np.arange(n) == 1, np.nan, 1.0)))
    add("box/one point", ftw.Box(0.25, 0.25))
    add("box/away from zero", ftw.Box(0.5, 2.0))
    add("box/below zero", ftw.Box(-2.0, -0.5))
    add("box/no bounds", ftw.Box(-np.inf, np.inf))
    add("box/nowhere above", ftw.Box(np.inf, np.inf))
    add("not symmetric", ftw.NonNegative(), K=K + np.triu(rng.normal(size=(n, n)), 1) * 1e-3)
    first = (np.arange(n)[:, None] + np.arange(n) == 1) & (np.arange(n) < 2)  # the two elements beside the diagonal
    add("simplex/barely indefinite", ftw.Simplex(1.0), K=np.eye(n) + (1 + 1.2e-5) * first, dtypes=("float64",))
    add("nonnegative/nothing asked", ftw.NonNegative(), c=0 * c)
    add("simplex/nothing asked", ftw.Simplex(1.0), c=0 * c)
    add("simplex/zero gram, no ridge", ftw.Simplex(1.0), K=0 * K)
    for kind in ("conditioned", "clusters", "near_twins", "adam"):
        for name, constraint in sets(40, rng).items():
            if name in ("simplex 3", "half box", "boxes"):
                continue
            A, q = problems.make(kind, 40, 11)
            out.append(
                Case(
                    f"qp/{name}/{kind}, n=40",
                    solve(),
                    (A, q, constraint),
                    accounts(0.0),
                    ("float64",),
                    loops=True,
                    heavy=True,
                )
            )
    pair = np.stack([K, np.full_like(K, np.nan)]), np.stack([c, c])
    add("a batch with one bad problem", ftw.Simplex(1.0), *pair, heavy=False)
    mixed = np.stack([K, K - 3 * np.max(K) * np.eye(n), K, K])[:, None], np.stack([c, c, 2 * c, -c])[:, None]
    caps = ftw.CappedSimplex(
        np.stack([np.full(n, x) for x in (0.3, 0.3, 0.01, 0.5)])[:, None], np.asarray([1.0, 1, 1, 2])[:, None]
    )
    add("a batch of two axes", caps, *mixed)
    add("batched boxes", ftw.Box(np.full((4, 1, n), -0.2), np.full((4, 1, n), 0.2)), *mixed)
    ridge, tol = np.asarray(0.3), np.asarray(1e-6)
    for name, constraint in (("nonnegative", ftw.NonNegative()), ("simplex", ftw.Simplex(1.0))):
        inputs = (K, c, constraint, ridge, tol)
        call = solve_traced("both")
        out.append(
            Case(f"qp/{name}/ridge and tolerance are arrays", call, inputs, accounts(0.0), loops=True, heavy=True)
        )
    inputs = (K, c, ftw.Simplex(1.0), np.asarray(np.nan), tol)
    out.append(
        Case("qp/simplex/ridge is not a number", solve_traced("both"), inputs, refused_ridge, loops=True, heavy=True)
    )
    A, q = problems.make("conditioned", 40, 11)
    for name, constraint in sets(40, rng).items():
        for steps in (1, 2, 3):
            heavy = (name, steps) != ("simplex", 1)
            what = f"qp/out of steps/{name}/{steps}"
            call = solve(max_steps=steps)
            case = Case(what, call, (A, q, constraint), out_of_steps, ("float64",), loops=True, heavy=heavy)
            out.append(case)
    for kind in ("wide", "clusters"):
        A, q = problems.make(kind, n, 13)
        for name, constraint in sets(n, rng).items():
            call = gradient_method(10 if name == "simplex" else 1)
            case = Case(
                f"projected gradient/{name}/{kind}",
                call,
                (A, q, constraint),
                first_order,
                ("float64",),
                loops=True,
                heavy=True,
            )
            out.append(case)
    return out


def refused_ridge(got: Mapping[str, Array], K: Array, c: Array, *rest: Any) -> dict[str, Expect]:
    """No weights, and the status says why."""
    out = {name: exactly(np.full(np.shape(x), np.nan)) for name, x in got.items() if name not in ("status", "steps")}
    return out | {"status": exactly(NOT_FINITE)}


def out_of_steps(got: Mapping[str, Array], K: Array, c: Array, constraint: Any) -> dict[str, Expect]:
    """Expect feasible weights, with a residual and a gap that hide nothing and a status that follows from them."""
    w, kkt, gap = np.asarray(got["weights"], dtype=float), float(got["kkt"]), float(got["gap"])
    box, d, n = ref.projections.bounds(constraint, len(c)), np.sqrt(np.diag(K)), len(c)
    value = 0.5 * w @ K @ w - c @ w
    terms = np.abs(w) @ (np.abs(K) @ np.abs(w) + np.abs(c))
    above = value - ref.solve_qp(K, c, constraint).objective
    length, slopes = np.max(np.abs(d * w)), np.max(np.abs(c / d))
    residual = scaled_residual(K, c, w, box, d) * (length / max(length, slopes) if box.has_total else 1.0)
    outside = max(float(np.max(box.lower - w)), float(np.max(w - box.upper)), 0.0)
    return {
        "status": exactly(OK if max(kkt, gap) <= 1e-8 else MAX_STEPS),
        "weights": exactly(w),
        "sum": rounded(box.total if box.has_total else np.sum(w), np.max(np.abs(w)), n)._replace(got=np.sum(w)),
        "bounds": most(0.0, outside),
        "objective": rounded(value, terms, 64),
        "kkt": exactly(kkt),
        "gap": exactly(gap),
        "residual": most(kkt, residual, "certified"),
        "bound": most(gap, above / (np.abs(w) @ (np.abs(K @ w) + np.abs(c))), "rounded", 1.0, n),
        "steps": most(3, got["steps"]),
    }


@cache
def gradient_method(check_every: int) -> Callable[..., dict[str, Any]]:
    """Return a call of the first-order engine on its own."""

    def call(K: Any, c: Any, constraint: Any) -> dict[str, Any]:
        xp = spi.namespace(K, c)
        limits = as_limits(xp, constraint, c)
        p = scaled_problem(xp, K, c, limits, 0.0)
        z, steps = accelerated(xp, p, xp.zeros_like(c), 1e-9, 20000, check_every=check_every)
        _, kkt, gap = certificate(xp, p, z, balance(xp, p, z))
        numbers = {"kkt": kkt, "gap": gap}
        return {"weights": z * p.scale, "steps": steps} | {k: xp.sum(c) * 0 + x for k, x in numbers.items()}

    return call


def first_order(got: Mapping[str, Array], K: Array, c: Array, constraint: Any) -> dict[str, Expect]:
    """Return the reference's objective to the square of the residual, in a number of steps that momentum explains."""
    w, best = np.asarray(got["weights"], dtype=float), ref.solve_qp(K, c, constraint)
    size = np.abs(w) @ np.abs(K) @ np.abs(w) + np.abs(c) @ np.abs(w)
    value = 0.5 * w @ K @ w - c @ w
    return {
        "weights": exactly(got["weights"]),
        "kkt": most(1e-7, got["kkt"]),
        "gap": most(1e-7, got["gap"]),
        "objective": Expect(np.asarray(best.objective), "certified", size, 100.0, np.asarray(value)),
        "steps": most(1500, got["steps"]),
    }
