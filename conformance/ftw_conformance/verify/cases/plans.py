"""The planner: its formulas, that blocks tile, and that the memory it promises is the memory that is used."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import ftw_reference as ref
import numpy as np

import ftw
from ftw import planner, spi
from ftw_conformance.verify.table import Case, Expect, exactly, most

from . import models

Array = Any


@cache
def planned(name: str, *arguments: Any, **options: Any) -> Callable[[], dict[str, Any]]:
    """Return a call of the planner; routes are numbered."""

    def call() -> dict[str, Any]:
        p = getattr(planner, name)(*arguments, **options)
        routes = ("inputs", "outputs", "product", "factors", "tokens", "blocks")
        return {"plan": np.asarray([routes.index(p.route), p.flops, p.bytes, p.rows, p.columns])}

    return call


def given(*numbers: int) -> Callable[..., dict[str, Expect]]:
    """Return the account: numbers worked out by hand."""
    return lambda got: {"plan": exactly(np.asarray(numbers))}


@cache
def tiled(shape: tuple[int, int], rows: int, columns: int) -> Callable[[], dict[str, Any]]:
    """Return a call that counts how often each element is visited."""

    def call() -> dict[str, Any]:
        seen = np.zeros(shape, dtype=int)
        for r, c in planner.blocks(shape, planner.Plan("blocks", 0, 0, rows, columns)):
            seen[r, c] += 1
        return {"seen": seen}

    return call


def peak(call: Callable[[], Any]) -> int:
    """Return the most memory, in bytes, that Python's allocator held during a call."""
    tracemalloc.start()
    call()
    most_held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most_held


def remembered(x: Any, y: Any, p: Any) -> dict[str, Any]:
    """Return the most memory that a Gram matrix takes beyond its inputs, with a bound and without.

    Nothing is returned where the namespace has an allocator of its own, which does not tell Python.
    """
    xp = spi.namespace(x["w"].inputs)
    if peak(lambda: xp.zeros(100_000, dtype=xp.float64)) < 800_000:
        return {}

    def both(size: int) -> None:
        ftw.gram(x, p, max_bytes=size)
        ftw.cross_gram(x, y, p, max_bytes=size)

    both(40_000)  # what is imported and kept is so by now
    return {name: np.asarray(peak(lambda: both(size))) for name, size in (("bounded", 40_000), ("free", 2**28))}  # noqa: B023


def account_remembered(got: Mapping[str, Array], *inputs: Any) -> dict[str, Expect]:
    """Return the bound, and something for the interpreter; without it the gradients of all samples stand in memory."""
    if not got:
        return {}
    return {
        "bounded": exactly(got["bounded"]),
        "free": exactly(got["free"]),
        "within the bound": most(40_000 + 60_000, got["bounded"]),
        "more without": most(-300_000, -float(got["free"])),
    }


def spoken() -> dict[str, Any]:
    """Return the numbers of the statuses, and whether each has a sentence of its own."""
    texts = {status.message for status in ftw.Status}
    return {"numbers": np.asarray([int(s) for s in ftw.Status]), "sentences": np.asarray(len(texts))}


def account_spoken(got: Mapping[str, Array]) -> dict[str, Expect]:
    """Expect the numbers that the reference has too."""
    return {"numbers": exactly([int(s) for s in ref.Status]), "sentences": exactly(len(ref.Status))}


def cases() -> list[Case]:
    """Return the table's part."""
    out = []

    def add(name: str, call: Any, account: Any) -> None:
        out.append(Case(f"plan/{name}", call, (), account, ("float64",), heavy=True, eager=True))

    add(
        "scores, wide",
        planned("plan_scores", 5, 3, (2, 7), itemsize=8),
        given(1, 2 * 5 * 3 * 14, 2 * 5 * 3 * 2 * 8, 0, 0),
    )
    add(
        "scores, tall",
        planned("plan_scores", 5, 3, (7, 2), itemsize=8),
        given(0, 2 * 5 * 3 * 14, 2 * 5 * 3 * 2 * 8, 0, 0),
    )
    add("scores, square", planned("plan_scores", 5, 3, (4, 4), itemsize=4), given(0, 2 * 15 * 16, 2 * 15 * 4 * 4, 0, 0))
    add("combine", planned("plan_combine", 5, 3, (2, 7), itemsize=8), given(2, 420, 5 * 3 * (7 + 4) * 8, 0, 0))
    for left, right in ((3, None), (None, 4), (3, 4)):
        flops, size = 2 * 15 * (2 * (left or 0) + 7 * (right or 0)), 15 * ((left or 0) + (right or 0)) * 8
        call = planned("plan_transform", 5, 3, (2, 7), left=left, right=right, itemsize=8)
        add(f"transform {left} {right}", call, given(3, flops, size, 0, 0))
    x, y = planner.Side(4, 2), planner.Side(3, 5)
    common = {"elementwise": False, "itemsize": 8, "max_bytes": 10**6}
    pairs = 2 * 12 * 2 * 5 * (50 + 40)
    call = planned("plan_gram", x, y, (50, 40), by_tokens=True, **common)
    add("gram, tokens", call, given(4, pairs, 4 * 3 * 2 * 3 * 5 * 8, 4, 0))
    small = {**common, "max_bytes": 2 * 3 * 2 * 3 * 5 * 8 + 7}
    call = planned("plan_gram", x, y, (50, 40), by_tokens=True, **small)
    add("gram, tokens in chunks", call, given(4, pairs, 2 * 3 * 2 * 3 * 5 * 8, 2, 0))
    formed = 2 * (4 * 2 + 3 * 5) * 2000 + 2 * 12 * 2000
    call = planned("plan_gram", x, y, (50, 40), by_tokens=False, **common)
    add("gram, blocks", call, given(5, formed, 50 * 40 * 7 * 8, 50, 40))
    call = planned("plan_gram", x, y, (50, 40), by_tokens=False, **{**common, "max_bytes": 56 * 40 * 3 + 5})
    add("gram, rows", call, given(5, formed, 3 * 40 * 56, 3, 40))
    call = planned("plan_gram", x, y, (50, 40), by_tokens=False, **{**common, "max_bytes": 56 * 7})
    add("gram, pieces of rows", call, given(5, formed, 7 * 56, 1, 7))
    alone = 2 * 4 * 2 * 2000 + 2 * 16 * 2000
    call = planned("plan_gram", x, None, (50, 40), by_tokens=False, **common)
    add("gram, one record", call, given(5, alone, 2000 * 4 * 8, 50, 40))
    call = planned("plan_gram", planner.Side(4, 9), None, (5, 4), by_tokens=True, **common)
    add("gram, many tokens", call, given(5, 2 * 36 * 20 + 2 * 16 * 20, 20 * 4 * 8, 5, 4))
    tight = {**common, "max_bytes": 3 * 2 * 3 * 5 * 8 - 1}
    call = planned("plan_gram", x, y, (50, 40), by_tokens=True, **tight)
    add("gram, pairs of one sample too large", call, given(5, formed, 12 * 56, 1, 12))
    for shape, rows, columns in (((5, 7), 2, 3), ((5, 7), 5, 7), ((6, 4), 3, 2), ((1, 9), 1, 4), ((4, 1), 3, 1)):
        account = lambda got, shape=shape: {"seen": exactly(np.ones(shape, dtype=int))}  # noqa: E731
        add(f"blocks of {rows} x {columns} in {shape}", tiled(shape, rows, columns), account)
    out.append(Case("status/messages", spoken, (), account_spoken, ("float64",), heavy=True, eager=True))
    rng = np.random.default_rng(8)
    big = {"w": ftw.OuterProduct(rng.normal(size=(8, 5, 90)), rng.normal(size=(8, 5, 100)))}
    other = {"w": ftw.OuterProduct(rng.normal(size=(4, 5, 90)), rng.normal(size=(4, 5, 100)))}
    p = {"w": models.operator(rng, "diagonal", (100, 90))}
    out.append(
        Case("plan/memory", remembered, (big, other, p), account_remembered, ("float64",), heavy=True, eager=True)
    )
    return out
