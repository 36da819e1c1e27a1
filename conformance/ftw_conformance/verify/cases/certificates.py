"""What an answer of solve_qp must be: feasible, as good as the reference's, certified, and unique where it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ftw_reference as ref
import numpy as np

import ftw
from ftw_conformance.verify.table import Expect, exactly, most
from ftw_conformance.verify.tolerances import EPS, RULES

__all__ = ["accounts", "sets"]

Array = Any
OK, MAX_STEPS = 0, 5
STEPS = 60  # exchanges and crossings: more than these, and something is wrong with the method


def accounts(ridge: float, steps: int = STEPS) -> Callable[..., dict[str, Expect]]:
    """Return the account of one problem or a batch of them."""

    def account(got: Mapping[str, Array], K: Array, c: Array, constraint: Any, *rest: Array) -> dict[str, Expect]:
        extra = float(rest[0]) if len(rest) == 2 else ridge
        n = c.shape[-1]
        each = [judge(mine, A, q, limits, d, extra) for mine, A, q, limits, d in split(got, K, c, constraint)]
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
    """Hold one answer to the reference: status, feasibility, objective, residual, and unique weights."""
    n, eps = c.shape[0], EPS[dtype]
    K = (K + K.T) / 2
    best = ref.solve_qp(K, c, constraint, ridge=ridge)
    box = ref.projections.bounds(constraint, n)
    expected = {OK, MAX_STEPS} if best.status in (OK, MAX_STEPS) else {int(best.status)}
    w = np.asarray(got["weights"], dtype=float)
    out = {
        "status": exactly(min(expected), got=min(expected) if int(got["status"]) == min(expected) else got["status"])
    }
    if OK not in expected:
        nan = np.asarray(np.nan)
        out |= {name: exactly(nan) for name in ("objective", "kkt", "gap")}
        same = exactly(0)._replace(got=0)
        return out | {
            "weights": exactly(0)._replace(got=int(not np.all(np.isnan(w)))),
            "feasible": same,
            "best": same,
            "residual": same,
            "value": same,
        }
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
