"""The ridge of a target that comes back, against one regression a candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import ftw_reference as ref
import numpy as np

from ftw import wear
from ftw_conformance.verify.table import Case, Expect, rounded

Array = Any
WIDE = ("float64", "float32")


@cache
def ask(base: float) -> Callable[..., dict[str, Any]]:
    """Return a call of both functions."""

    def call(gram: Any, uses: Any) -> dict[str, Any]:
        return {"R": wear.shared(gram), "ridge": wear.ridge(base, uses, gram)}

    return call


def account(base: float) -> Callable[..., dict[str, Expect]]:
    """Return the account by the reference."""

    def check(got: Mapping[str, Array], gram: Array, uses: Array) -> dict[str, Expect]:
        u = float(uses)
        return {
            "R": rounded(ref.wear.shared(gram), 1.0, 1e3),
            "ridge": rounded(ref.wear.ridge(base, u, gram), base * (1 + 4 * u), 1e3),
        }

    return check


def cases() -> list[Case]:
    """Return the table's part."""
    rng = np.random.default_rng(12)
    out = []
    common = rng.normal(size=200)
    for size in (1, 2, 8, 9):
        for lean in (0.0, 0.5, 0.8, 1.2, 4.0):
            G = rng.normal(size=(size, 200)) + lean * common * rng.lognormal(size=(size, 1))
            for uses in (0.0, 0.5, 30.0):
                heavy = (size, lean, uses) != (8, 0.8, 30.0)
                name = f"wear/{size} candidates, lean {lean}, uses {uses}"
                out.append(Case(name, ask(0.05), (G @ G.T, np.asarray(uses)), account(0.05), WIDE, heavy=heavy))
    G = rng.normal(size=(9, 200))
    G[3], G[5], G[6] = 0.0, G[4], 1e-4 * G[4]
    out.append(Case("wear/copies and nothing", ask(0.2), (G @ G.T, np.asarray(3.0)), account(0.2), WIDE, heavy=True))
    none = np.zeros((4, 4))
    out.append(Case("wear/all zero", ask(0.2), (none, np.asarray(3.0)), account(0.2), WIDE, heavy=True))
    return out
