"""The constraint sets and the QP over them, against the reference's active-set method, and the certificates recomputed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import ftw
import ftw_reference as ref
import numpy as np
from ftw._qp_gradient import accelerated
from ftw._qp_problem import certificate, scaled_problem
from ftw.constraints import as_limits, project

from .. import problems
from ..table import Case, Expect, exactly, most, rounded, solved
from ..tolerances import EPS, RULES

Array = Any
OK, NOT_FINITE, INFEASIBLE, NOT_PSD, MAX_STEPS = 0, 2, 3, 4, 5
STEPS = 60  # exchanges and crossings: more than these, and something is wrong with the method


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


def accounts(ridge: float, steps: int = STEPS) -> Callable[..., dict[str, Expect]]:
    """Return the account of one problem or a batch of them."""

    def account(got: Mapping[str, Array], K: Array, c: Array, constraint: Any, *rest: Array) -> dict[str, Expect]:
        extra = float(rest[0]) if len(rest) == 2 else ridge
        n = c.shape[-1]
        each = [judge(*one, extra) for one in split(got, K, c, constraint)]
        shape = c.shape[:-1]
        out = {name: gather([e[name] for e in each], shape, n) for name in each[0]}
        out["steps"] = most(steps, got["steps"])
        return out

    return account


def split(got: Mapping[str, Array], K: Array, c: Array, constraint: Any) -> list[tuple[Any, ...]]:
    """Return the problems of a batch one by one."""
    n, dtype = c.shape[-1], got["weights"].dtype
    count = int(np.prod(c.shape[:-1]))
    out = []
    for b in range(count):
        one = {name: np.reshape(x, (count, *x.shape[c.ndim - 1 :]))[b] for name, x in got.items()}
        fields = []
        for name, value in zip(constraint._fields, constraint, strict=True):
            core = 0 if name == "total" else 1
            value = np.asarray(value, dtype=float)
            if value.ndim > core:
                value = value.reshape(count, *value.shape[value.ndim - core :])[b] if core else value.reshape(-1)[b]
            fields.append(value)
        out.append((one, K.reshape(count, n, n)[b], c.reshape(count, n)[b], type(constraint)(*fields), str(dtype)))
    return out


def gather(parts: list[Expect], shape: tuple[int, ...], n: int) -> Expect:
    """Return what is expected of a batch from what is expected of its problems."""

    def stack(values: list[Any]) -> Any:
        x = np.stack([np.asarray(v) for v in values])
        return np.reshape(x, (*shape, *x.shape[1:]))

    got = None if parts[0].got is None else stack([p.got for p in parts])
    value = stack([p.value for p in parts])
    scale = stack([np.max(np.abs(p.value)) if p.scale is None else p.scale for p in parts])
    scale = np.reshape(scale, (*scale.shape, *[1] * (value.ndim - scale.ndim)))
    scale = np.where(np.isfinite(scale), scale, 1.0)
    rule = max((p.rule for p in parts), key=lambda name: RULES[name].factor)
    return Expect(value, rule, scale, max(p.condition for p in parts), got)


def judge(got: Mapping[str, Array], K: Array, c: Array, constraint: Any, dtype: str, ridge: float) -> dict[str, Expect]:
    """Hold one answer to the reference: the status, feasibility, the objective, the residual, and the weights if unique."""
    n, eps = c.shape[0], EPS[dtype]
    K = (K + K.T) / 2
    best = ref.solve_qp(K, c, constraint, ridge=ridge)
    box = ref.projections.bounds(constraint, n)
    expected = {OK, MAX_STEPS} if best.status in (OK, MAX_STEPS) else {int(best.status)}
    w = np.asarray(got["weights"], dtype=float)
    out = {"status": exactly(min(expected), got=min(expected) if int(got["status"]) == min(expected) else got["status"])}
    if OK not in expected:
        nan = np.asarray(np.nan)
        out |= {name: exactly(nan) for name in ("objective", "kkt", "gap")}
        same = exactly(0)._replace(got=0)
        return out | {"weights": exactly(0)._replace(got=int(not np.all(np.isnan(w)))), "feasible": same, "best": same, "residual": same, "value": same}
    H = K + ridge * np.eye(n)
    value = 0.5 * w @ H @ w - c @ w
    size = float(np.abs(w) @ np.abs(H) @ np.abs(w) + np.abs(c) @ np.abs(w)) + 1e-300
    size = max(size, float(np.abs(best.weights) @ np.abs(c)))
    size = 1.0 if box.has_total and box.total == 0 else size
    total = box.total if box.has_total else 0.0
    low, high = (np.where(np.isfinite(b), eps * np.abs(b), 0.0) for b in (box.lower, box.upper))  # bounds round as well
    outside = max(float(np.max(box.lower - low - w)), float(np.max(w - box.upper - high)), 0.0)
    off = abs(float(np.sum(w)) - total) if box.has_total else 0.0
    reach = max(float(np.max(np.abs(w))), total, 1e-300)
    # the natural residual, in the variables that give H a unit diagonal
    d = np.sqrt(np.maximum(np.diag(H), 1e-20 * np.max(np.diag(H)))) if np.max(np.diag(H)) > 0 else np.ones(n)
    found = scaled_residual(H, c, w, box, d)
    out["weights"] = weights_expected(H, w, best.weights, box, d, dtype)
    out["feasible"] = Expect(np.zeros(()), "rounded", 1.0, n, np.asarray(0.0 if outside == 0 else 1.0) + off / reach)
    out["best"] = Expect(np.zeros(()), "certified", 1.0, 1.0, np.asarray(max(value - best.objective, 0.0) / size))
    out["value"] = Expect(np.zeros(()), "rounded", 1.0, 8 * n, np.asarray(abs(float(got["objective"]) - value) / size))
    out["residual"] = Expect(np.zeros(()), "certified", 1.0, 100 * n, np.asarray(found))
    out["objective"] = Expect(np.asarray(best.objective), "certified", size)
    out["kkt"] = Expect(np.zeros(()), "certified", 1.0, 100 * n)
    out["gap"] = Expect(np.zeros(()), "certified", 1.0, 100 * n)
    return out


def scaled_residual(H: Array, c: Array, w: Array, box: Any, d: Array) -> float:
    """Return ``max |z - Proj(z - slope)|`` over the size of z, for z = d w; the multiplier is the best one."""
    z, slope = d * w, (H @ w - c) / d
    lower, upper, a = d * box.lower, d * box.upper, 1 / d
    size = max(float(np.max(np.abs(z))), float(np.max(np.abs(c / d))) if not box.has_total else 0.0)
    if box.has_total and box.total == 0:
        return size  # zero is the only point
    size = max(size, 1e-300)
    if not box.has_total:
        return float(np.max(np.abs(z - np.clip(z - slope, lower, upper)))) / size

    def off(m: float) -> float:
        return float(np.max(np.abs(z - np.clip(z - slope + m * a, lower, upper))))

    inside = (z - lower > 1e-9 * size) & (upper - z > 1e-9 * size)
    mean = float(np.sum((slope * a)[inside]) / np.sum((a * a)[inside])) if inside.any() else 0.0
    return min(off(mean), *(off(float(m)) for m in slope / a)) / size


def weights_expected(H: Array, w: Array, best: Array, box: Any, d: Array, dtype: str) -> Expect:
    """Expect the reference's weights where they are unique and known to be: by the free block's condition."""
    free = ((best > box.lower) & (best < box.upper)) | ((w > box.lower) & (w < box.upper))
    M = (H / d[:, None] / d)[np.ix_(free, free)]
    least = float(np.linalg.eigvalsh(M)[0]) if free.any() else 1.0
    if least < 1e4 * EPS[dtype] * len(w):
        return exactly(0)._replace(got=0)  # twins share a weight as they like: the objective is what counts
    condition = len(w) / least
    spread = float(np.max(d) / np.min(d)) if box.has_total else 1.0
    z, y = d * w, d * best
    size = max(float(np.max(np.abs(y), initial=0.0)), 1e-300)
    return Expect(np.zeros(()), "solved", 1.0, condition**1.5 * spread, np.asarray(np.max(np.abs(z - y)) / size))


def sets(n: int, rng: Any) -> dict[str, Any]:
    """Return the constraint sets."""
    return {
        "nonnegative": ftw.NonNegative(),
        "simplex": ftw.Simplex(1.0),
        "simplex 3": ftw.Simplex(np.asarray(3.0)),
        "capped": ftw.CappedSimplex(2.0 / n, 1.0),
        "caps": ftw.CappedSimplex(rng.uniform(1.2, 3, size=n) / n, np.asarray(1.0)),
        "box": ftw.Box(-0.5, 0.1),
        "boxes": ftw.Box(rng.uniform(-1, 0, size=n), rng.uniform(0, 0.2, size=n)),
        "half box": ftw.Box(np.where(np.arange(n) % 2, -np.inf, -0.1), np.where(np.arange(n) % 3, 0.3, np.inf)),
    }


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
            out.append(Case(f"qp/{name}/{kind}", solve(), (K, c, constraint), accounts(0.0), tight, loops=True, heavy=True))
        K, c = (np.stack(x) for x in zip(*stack, strict=True))
        out.append(Case(f"qp/{name}/all kinds, a batch", solve(), (K, c, constraint), accounts(0.0), ("float64",), loops=True))
        K, c = problems.make("twins", n, 5)
        r = 0.05 * float(np.mean(np.diag(K)))
        out.append(Case(f"qp/{name}/ridge", solve(r), (K, c, constraint), accounts(r), loops=True, heavy=name != "capped", narrow=True))
        start = ref.solve_qp(K + r * np.eye(n), c * 1.1, constraint).weights
        call = solve(r, warm=True)
        out.append(Case(f"qp/{name}/warm", call, (K, c, constraint, start), warmly(r), loops=True, heavy=True))
        for what, bad in (("a NaN", np.nan), ("an infinity", np.inf)):
            spoilt = np.where(np.arange(n) == 2, bad, c)
            out.append(Case(f"qp/{name}/{what} in linear", solve(), (K, spoilt, constraint), accounts(0.0), loops=True, heavy=True))
            out.append(Case(f"qp/{name}/{what} in gram", solve(), (np.where(np.eye(n) == 1, bad, K), c, constraint), accounts(0.0), loops=True, heavy=True))  # fmt: skip
        out.append(Case(f"qp/{name}/indefinite", solve(), (K - 2 * np.max(K) * np.eye(n), c, constraint), accounts(0.0), loops=True, heavy=True))  # fmt: skip
        out.append(Case(f"qp/{name}/zero gram", solve(1.0), (0 * K, c, constraint), accounts(1.0), loops=True, heavy=True))
        one = type(constraint)(*(np.asarray(x)[..., :1] if np.ndim(x) else x for x in constraint))
        if name not in ("capped", "caps"):
            out.append(Case(f"qp/{name}/one sample", solve(), (K[:1, :1], c[:1], one), accounts(0.0), loops=True, heavy=True))
    out += special(rng, n)
    out += projections(rng)
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
    add("box/NaN below", ftw.Box(np.where(np.arange(n) == 1, np.nan, -1.0), 1.0))
    add("box/NaN above", ftw.Box(-1.0, np.where(np.arange(n) == 1, np.nan, 1.0)))
    add("box/one point", ftw.Box(0.25, 0.25))
    add("box/away from zero", ftw.Box(0.5, 2.0))
    add("box/below zero", ftw.Box(-2.0, -0.5))
    add("box/no bounds", ftw.Box(-np.inf, np.inf))
    add("box/nowhere above", ftw.Box(np.inf, np.inf))
    add("not symmetric", ftw.NonNegative(), K=K + np.triu(rng.normal(size=(n, n)), 1) * 1e-3)
    add("nonnegative/nothing asked", ftw.NonNegative(), c=0 * c)
    add("simplex/nothing asked", ftw.Simplex(1.0), c=0 * c)
    add("simplex/zero gram, no ridge", ftw.Simplex(1.0), K=0 * K)
    for kind in ("conditioned", "clusters", "near_twins", "adam"):
        for name, constraint in sets(40, rng).items():
            if name in ("simplex 3", "half box", "boxes"):
                continue
            A, q = problems.make(kind, 40, 11)
            out.append(Case(f"qp/{name}/{kind}, n=40", solve(), (A, q, constraint), accounts(0.0), ("float64",), loops=True, heavy=True))  # fmt: skip
    pair = np.stack([K, np.full_like(K, np.nan)]), np.stack([c, c])
    add("a batch with one bad problem", ftw.Simplex(1.0), *pair, heavy=False)
    mixed = np.stack([K, K - 3 * np.max(K) * np.eye(n), K, K])[:, None], np.stack([c, c, 2 * c, -c])[:, None]
    caps = ftw.CappedSimplex(np.stack([np.full(n, x) for x in (0.3, 0.3, 0.01, 0.5)])[:, None], np.asarray([1.0, 1, 1, 2])[:, None])
    add("a batch of two axes", caps, *mixed)
    add("batched boxes", ftw.Box(np.full((4, 1, n), -0.2), np.full((4, 1, n), 0.2)), *mixed)
    ridge, tol = np.asarray(0.3), np.asarray(1e-6)
    for name, constraint in (("nonnegative", ftw.NonNegative()), ("simplex", ftw.Simplex(1.0))):
        inputs = (K, c, constraint, ridge, tol)
        call = solve_traced("both")
        out.append(Case(f"qp/{name}/ridge and tolerance are arrays", call, inputs, accounts(0.0), loops=True, heavy=True))
    inputs = (K, c, ftw.Simplex(1.0), np.asarray(np.nan), tol)
    out.append(Case("qp/simplex/ridge is not a number", solve_traced("both"), inputs, refused_ridge, loops=True, heavy=True))
    A, q = problems.make("conditioned", 40, 11)
    out.append(Case("qp/out of steps", solve(max_steps=1), (A, q, ftw.Simplex(1.0)), out_of_steps, ("float64",), loops=True))
    for kind in ("wide", "clusters"):
        A, q = problems.make(kind, n, 13)
        for name, constraint in sets(n, rng).items():
            call = gradient_method(10 if name == "simplex" else 1)
            case = Case(f"projected gradient/{name}/{kind}", call, (A, q, constraint), first_order, ("float64",), loops=True, heavy=True)
            out.append(case)
    return out


def refused_ridge(got: Mapping[str, Array], K: Array, c: Array, *rest: Any) -> dict[str, Expect]:
    """No weights, and the status says why."""
    out = {name: exactly(np.full(np.shape(x), np.nan)) for name, x in got.items() if name not in ("status", "steps")}
    return out | {"status": exactly(NOT_FINITE)}


def out_of_steps(got: Mapping[str, Array], K: Array, c: Array, constraint: Any) -> dict[str, Expect]:
    """The best feasible weights, and the status says that the tolerance was not met."""
    w = np.asarray(got["weights"], dtype=float)
    H_w = K @ w
    out = {name: Expect(x, "exact") for name, x in got.items()}
    out["status"] = exactly(MAX_STEPS)
    out["weights"] = exactly(w)
    out["sum"] = Expect(np.asarray(1.0), "rounded", 1.0, len(c), got=np.sum(w))
    out["signs"] = most(0.0, -np.min(w))
    out["objective"] = rounded(0.5 * w @ H_w - c @ w, np.abs(w) @ np.abs(K) @ np.abs(w) + np.abs(c) @ np.abs(w), 64)
    out["steps"] = most(3, got["steps"])
    return out


@cache
def gradient_method(check_every: int) -> Callable[..., dict[str, Any]]:
    """Return a call of the first-order engine on its own."""

    def call(K: Any, c: Any, constraint: Any) -> dict[str, Any]:
        xp = ftw._array.namespace(K, c)
        limits = as_limits(xp, constraint, c)
        p = scaled_problem(xp, K, c, limits, 0.0)
        z, multiplier, steps = accelerated(xp, p, xp.zeros_like(c), 1e-9, 20000, check_every=check_every)
        _, kkt, gap = certificate(xp, p, z, multiplier)
        numbers = {"kkt": kkt, "gap": gap}
        return {"weights": z * p.scale, "steps": steps} | {k: xp.sum(c) * 0 + x for k, x in numbers.items()}

    return call


def first_order(got: Mapping[str, Array], K: Array, c: Array, constraint: Any) -> dict[str, Expect]:
    """The reference's objective to the square of the residual, in a number of steps that momentum explains."""
    w, best = np.asarray(got["weights"], dtype=float), ref.solve_qp(K, c, constraint)
    size = np.abs(w) @ np.abs(K) @ np.abs(w) + np.abs(c) @ np.abs(w)
    value = 0.5 * w @ K @ w - c @ w
    box = ref.projections.bounds(constraint, len(c))
    return {
        "weights": exactly(got["weights"]),
        "kkt": most(np.inf if box.has_total else 1e-7, got["kkt"]),
        "gap": most(np.inf if box.has_total else 1e-7, got["gap"]),
        "objective": Expect(np.asarray(best.objective), "certified", size, 100.0, np.asarray(value)),
        "steps": most(1500, got["steps"]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Projections


def projected(v: Any, constraint: Any) -> dict[str, Any]:
    """The nearest point."""
    return {"point": project(constraint, v)}


def projected_scaled(v: Any, constraint: Any, metric: Any) -> dict[str, Any]:
    """The nearest point in another metric."""
    return {"point": project(constraint, v, metric=metric)}


def account_projected(got: Mapping[str, Array], v: Array, constraint: Any, *metric: Array) -> dict[str, Expect]:
    """The reference's projection; in another metric, by bisection on the multiplier."""
    out = []
    for i in range(int(np.prod(v.shape[:-1]))):
        row = v.reshape(-1, v.shape[-1])[i]
        if metric:
            out.append(bisect(row, constraint, metric[0]))
            continue
        try:
            out.append(ref.project(row, constraint))
        except ValueError:
            out.append(np.full(row.shape, np.nan))
    value = np.stack(out).reshape(v.shape)
    finite = v[np.isfinite(v)]
    scale = np.max(np.abs(finite), initial=0.0) + np.max(np.abs(np.nan_to_num(value, posinf=0, neginf=0)), initial=0.0)
    box = ref.projections.bounds(constraint, v.shape[-1])
    out_of = {}
    if box.has_total and np.isfinite(value).all():
        reach = max(box.total, 1e-300)
        sums = np.sum(np.asarray(got["point"], dtype=float), axis=-1)
        out_of["sum"] = Expect(np.full(sums.shape, box.total), "rounded", reach, v.shape[-1], got=sums)
    return {"point": Expect(value, "rounded", scale, v.shape[-1]), **out_of}


def bisect(v: Array, constraint: Any, metric: Array) -> Array:
    """Return ``clip(v - t / metric)`` with the t that gives the total."""
    box = ref.projections.bounds(constraint, len(v))
    if not box.has_total:
        return np.clip(v, box.lower, box.upper)
    low, high = -1e6, 1e6
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if np.sum(np.clip(v - t / metric, box.lower, box.upper)) > box.total else (low, t)
    return np.clip(v - (low + high) / 2 / metric, box.lower, box.upper)


def projections(rng: Any) -> list[Case]:
    """Return the projections' cases."""
    out = []
    n = 9
    points = {
        "random": rng.normal(size=n),
        "far": 1e4 * rng.normal(size=n),
        "equal": np.full(n, 0.3),
        "inside": np.full(n, 1.0 / n),
        "a stack": rng.normal(size=(2, 3, n)),
        "ties": np.array([1.0, 1, 1, -1, -1, 0, 0, 2, 2]),
        "a NaN": np.where(np.arange(n) == 3, np.nan, 0.5),
        "an infinity": np.where(np.arange(n) == 3, np.inf, 0.5),
    }
    every = sets(n, rng) | {
        "tight caps": ftw.CappedSimplex(1.0 / n, 1.0),
        "empty caps": ftw.CappedSimplex(0.5 / n, 1.0),
        "no caps": ftw.CappedSimplex(np.inf, 2.0),
        "empty box": ftw.Box(1.0, 0.0),
        "total 0": ftw.Simplex(0.0),
        "negative total": ftw.Simplex(-1.0),
        "some caps": ftw.CappedSimplex(np.where(np.arange(n) < 4, 0.05, np.inf), 1.0),
    }
    for name, constraint in every.items():
        for what, v in points.items():
            wide = ("float64",) if what == "far" else ("float64", "float32")
            heavy = what not in ("random", "a stack")
            out.append(Case(f"project/{name}/{what}", projected, (v, constraint), account_projected, wide, heavy=heavy))
        if name not in ("empty caps", "empty box", "negative total"):
            inputs = (points["random"], constraint, rng.uniform(0.3, 3, size=n))
            out.append(Case(f"project/{name}/metric", projected_scaled, inputs, account_projected, heavy=True))
        if name not in ("tight caps", "some caps", "caps", "boxes", "half box", "empty caps", "capped"):
            one = (np.asarray([0.7]), constraint)
            out.append(Case(f"project/{name}/one sample", projected, one, account_projected, heavy=True))
    return out
