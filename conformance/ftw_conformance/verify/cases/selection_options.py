"""The options under which the composed selection is tried, with filters and a solver of a user's own."""

from __future__ import annotations

import math
from typing import Any

import ftw
from ftw import spi

__all__ = ["COMPILED", "OPTIONS"]

Array = Any


def few(scores: Any, gram: Any, k: int) -> Any:
    """Keep k by score, of which the first two passed."""
    chosen = ftw.filters.top_k(scores, k)
    xp = spi.namespace(scores)
    return ftw.Filtered(chosen.indices, xp.asarray(2, dtype=xp.int32, device=spi.device(scores)))


def none(scores: Any, gram: Any, k: int) -> Any:
    """Let nobody pass."""
    chosen = few(scores, gram, k)
    return ftw.Filtered(chosen.indices, 0 * chosen.count)


def backwards(scores: Any, gram: Any, k: int) -> Any:
    """Let the two worst pass, and keep the best besides."""
    xp = spi.namespace(scores)
    order = xp.argsort(scores, stable=True)
    indices = xp.concat([order[:2], order[2 - k :]])
    return ftw.Filtered(indices, xp.asarray(2, dtype=xp.int32, device=spi.device(scores)))


def stubborn(gram: Any, linear: Any, constraint: Any, **options: Any) -> Any:
    """Return a solver of one's own: the house's, by another name."""
    return ftw.solve_qp(gram, linear, constraint, **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"keep": 4},
    "keep 1": {"keep": 1},
    "keep all": {"keep": 10, "ridge": 0.5},
    "top_k": {"keep": 4, "filter": "top_k"},
    "greedy": {"keep": 4, "filter": "greedy_utility"},
    "few": {"keep": 4, "filter": few},
    "none": {"keep": 4, "filter": none},
    "backwards": {"keep": 4, "filter": backwards},
    "backwards, NonNegative": {"keep": 4, "filter": backwards, "constraint": ftw.NonNegative()},
    "backwards, uniform": {"keep": 4, "filter": backwards, "weight": "uniform"},
    "few, NonNegative": {"keep": 4, "filter": few, "constraint": ftw.NonNegative()},
    "few, Box": {"keep": 4, "filter": few, "constraint": ftw.Box(0.01, 0.2)},
    "few, capped": {"keep": 4, "filter": few, "constraint": ftw.CappedSimplex(0.7, 1.0)},
    "few, caps too small": {"keep": 4, "filter": few, "constraint": ftw.CappedSimplex(0.3, 1.0)},
    "none, capped": {"keep": 4, "filter": none, "constraint": ftw.CappedSimplex(0.3, 1.0)},
    "few, uniform": {"keep": 4, "filter": few, "weight": "uniform"},
    "uniform": {"keep": 4, "weight": "uniform"},
    "uniform, top_k": {"keep": 4, "weight": "uniform", "filter": "top_k"},
    "uniform, capped": {"keep": 4, "weight": "uniform", "constraint": ftw.CappedSimplex(0.5, 1.5)},
    "uniform, Box": {"keep": 4, "weight": "uniform", "constraint": ftw.Box(-1.0, 0.1)},
    "uniform, Simplex(3)": {"keep": 4, "weight": "uniform", "constraint": ftw.Simplex(3.0)},
    "uniform, NonNegative": {"keep": 4, "weight": "uniform", "constraint": ftw.NonNegative()},
    "NonNegative": {"keep": 4, "constraint": ftw.NonNegative()},
    "Box": {"keep": 4, "constraint": ftw.Box(0.0, 0.1)},
    "Box, empty": {"keep": 4, "constraint": ftw.Box(0.2, 0.1)},
    "Simplex(3)": {"keep": 4, "constraint": ftw.Simplex(3.0)},
    "Simplex(-1)": {"keep": 4, "constraint": ftw.Simplex(-1.0)},
    "capped": {"keep": 4, "constraint": ftw.CappedSimplex(0.3, 1.0)},
    "capped, empty": {"keep": 4, "constraint": ftw.CappedSimplex(0.1, 1.0)},
    "capped, NaN": {"keep": 4, "constraint": ftw.CappedSimplex(math.nan, 1.0)},
    "ridge 0": {"keep": 3, "ridge": 0.0},
    "ridge 2": {"keep": 4, "ridge": 2.0},
    "shortlist 6": {"keep": 3, "shortlist": 6},
    "shortlist 0.5": {"keep": 3, "shortlist": 0.5},
    "shortlist 0.41": {"keep": 3, "shortlist": 0.41},
    "shortlist 1": {"keep": 3, "shortlist": 1},
    "shortlist 99": {"keep": 3, "shortlist": 99},
    "shortlist 0.5, top_k": {"keep": 3, "shortlist": 0.5, "filter": "top_k"},
    "guard off": {"keep": 4, "guard": 0},
    "guard 1": {"keep": 4, "guard": 1.0},
    "solver": {"keep": 4, "constraint": ftw.CappedSimplex(0.3, 1.0), "solver": stubborn},
}
COMPILED = ("default", "few, capped", "shortlist 0.5", "uniform, top_k")
