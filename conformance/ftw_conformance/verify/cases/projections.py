"""Projections onto the constraint sets, against the reference, and by bisection where the metric is another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ftw_reference as ref
import numpy as np

import ftw
from ftw.constraints import project
from ftw_conformance.verify.table import Case, Expect

from .certificates import sets

Array = Any


def projected(v: Any, constraint: Any) -> dict[str, Any]:
    """Return the nearest point."""
    return {"point": project(constraint, v)}


def projected_scaled(v: Any, constraint: Any, metric: Any) -> dict[str, Any]:
    """Return the nearest point in another metric."""
    return {"point": project(constraint, v, metric=metric)}


def account_projected(got: Mapping[str, Array], v: Array, constraint: Any, *metric: Array) -> dict[str, Expect]:
    """Return the reference's projection; in another metric, by bisection on the multiplier."""
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


def cases() -> list[Case]:
    """Return the table's part."""
    rng = np.random.default_rng(7)
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
    points["far and close together"] = 1e6 + points["random"]  # several free weights, all of them differences
    every = sets(n, rng) | {
        "tight caps": ftw.CappedSimplex(1.0 / n, 1.0),
        "empty caps": ftw.CappedSimplex(0.5 / n, 1.0),
        "barely empty caps": ftw.CappedSimplex((1 - 1e-4) / n, 1.0),
        "box empty in one place": ftw.Box(-1.0, np.where(np.arange(n) == 1, -2.0, 1.0)),
        "no caps": ftw.CappedSimplex(np.inf, 2.0),
        "empty box": ftw.Box(1.0, 0.0),
        "total 0": ftw.Simplex(0.0),
        "negative total": ftw.Simplex(-1.0),
        "some caps": ftw.CappedSimplex(np.where(np.arange(n) < 4, 0.05, np.inf), 1.0),
    }
    for name, constraint in every.items():
        for what, v in points.items():
            wide = ("float64",) if what.startswith("far") else ("float64", "float32")
            heavy = what not in ("random", "a stack")
            out.append(Case(f"project/{name}/{what}", projected, (v, constraint), account_projected, wide, heavy=heavy))
        if not ("empty" in name or name == "negative total"):
            inputs = (points["random"], constraint, rng.uniform(0.3, 3, size=n))
            out.append(Case(f"project/{name}/metric", projected_scaled, inputs, account_projected, heavy=True))
        if not ("cap" in name or name in ("boxes", "half box", "box empty in one place")) or name == "no caps":
            one = (np.asarray([0.7]), constraint)
            out.append(Case(f"project/{name}/one sample", projected, one, account_projected, heavy=True))
    return out
