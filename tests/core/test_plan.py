"""The planner, held to what is really multiplied and really allocated."""

from __future__ import annotations

import tracemalloc

import array_api_compat
import numpy as np
import pytest
from backends import optional

import ftw
from ftw import planner
from ftw.inner_products import plan_piece
from ftw.planner import Side

torch = optional("torch")
flop_counter = optional("torch.utils.flop_counter")

SHAPES = [(6, 4, 32, 24), (6, 4, 24, 32), (3, 1, 200, 100), (8, 16, 12, 20), (2, 2, 300, 300), (5, 3, 1, 7)]


def layer(n, t, d_out, d_in):
    torch.manual_seed(0)
    return {"w": ftw.OuterProduct(torch.randn(n, t, d_in), torch.randn(n, t, d_out))}


def flops(call):
    with flop_counter.FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("n", "t", "d_out", "d_in"), SHAPES)
def test_scores_and_combine_multiply_what_is_planned(n, t, d_out, d_in):
    x = layer(n, t, d_out, d_in)
    plan = planner.plan_scores(n, t, (d_out, d_in), itemsize=4)
    assert flops(lambda: ftw.scores(x, {"w": torch.randn(d_out, d_in)}, {"w": ftw.Scale(1.0)})) == plan.flops
    assert plan.bytes == 2 * n * t * min(d_in, d_out) * 4
    plan = planner.plan_combine(n, t, (d_out, d_in), itemsize=4)
    assert flops(lambda: ftw.combine(x, torch.rand(n))) == plan.flops


@pytest.mark.parametrize(("n", "t", "d_out", "d_in"), SHAPES)
@pytest.mark.parametrize("kind", ["scale", "diagonal", "kronecker"])
def test_gram_multiplies_what_is_planned(n, t, d_out, d_in, kind):
    x = layer(n, t, d_out, d_in)
    sides = torch.eye(d_out), torch.eye(d_in)
    operator = {
        "scale": ftw.Scale(2.0),
        "diagonal": ftw.Diagonal(torch.rand(d_out, d_in)),
        "kronecker": ftw.Kronecker(*sides),
    }[kind]
    xp = array_api_compat.array_namespace(torch.zeros(1))
    (piece,) = operator.split(xp, x["w"], x["w"])
    for max_bytes in (2**12, 2**28):
        if max_bytes < 3 * n * 4:
            continue
        plan = plan_piece(xp, piece, max_bytes)
        extra = 0
        if kind == "kronecker":
            extra = planner.plan_transform(n, t, (d_out, d_in), left=d_out, right=d_in, itemsize=4).flops
        assert flops(lambda m=max_bytes: ftw.gram(x, {"w": operator}, max_bytes=m)) == plan.flops + extra
        assert plan.bytes <= max_bytes


def test_the_cheaper_route_is_taken():
    def plan(n, t, shape, **options):
        options = {"by_tokens": True, "elementwise": False, "itemsize": 4, "max_bytes": 2**28} | options
        return planner.plan_gram(Side(n, t), None, shape, **options)

    assert plan(8, 4, (1024, 1024)).route == "tokens"
    assert plan(8, 256, (64, 64)).route == "blocks"
    assert plan(8, 4, (1024, 1024), by_tokens=False).route == "blocks"
    assert plan(8, 4, (1024, 1024), max_bytes=1000).route == "blocks"  # not even one sample's pairs fit
    # at the border the routes cost the same: n t (d_out + d_in) = (t + n) d_out d_in, per sample and n
    n, d = 4, 64
    for t in range(1, 40):
        tokens, blocks = 2 * n * t * n * t * 2 * d, 2 * (n * t + n * n) * d * d
        assert plan(n, t, (d, d)).route == ("tokens" if tokens < blocks else "blocks")
        assert plan(n, t, (d, d)).flops == min(tokens, blocks)


@pytest.mark.parametrize("max_bytes", [400, 10_000, 10**9])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (1, 100), (100, 1), (0, 4), (4, 0)])
def test_blocks_tile_the_matrix(shape, max_bytes):
    plan = planner.plan_gram(
        Side(5, 2), None, shape, by_tokens=False, elementwise=True, itemsize=8, max_bytes=max_bytes
    )
    seen = np.zeros(shape, dtype=int)
    for rows, columns in planner.blocks(shape, plan):
        seen[rows, columns] += 1
        assert (rows.stop - rows.start) * (columns.stop - columns.start) * (5 * 2 + 1) * 8 <= max_bytes
    assert np.all(seen == 1)


def peak(call):
    call()  # whatever is cached is there
    tracemalloc.start()
    call()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


N, T, D_OUT, D_IN = 16, 3, 300, 200
SLACK = 60_000  # the (n, n) results, slices of factors, Python's own


def record(rng, kind):
    a, b = rng.normal(size=(N, T, D_IN)), rng.normal(size=(N, T, D_OUT))
    outer = ftw.OuterProduct(a, b)
    if kind == "outer":
        return outer
    if kind == "dense":
        return ftw.Dense(rng.normal(size=(N, D_OUT, D_IN)))
    rows = ftw.Rows(rng.integers(0, D_OUT, size=(N, T)), a, D_OUT)
    return rows if kind == "rows" else ftw.Sum((outer, rows))


@pytest.mark.parametrize("kind", ["outer", "dense", "rows", "sum"])
@pytest.mark.parametrize("weights", ["scale", "diagonal"])
def test_max_bytes_bounds_the_temporaries(rng, kind, weights):
    x, y = {"w": record(rng, kind)}, {"w": record(rng, kind)}
    shape = (D_OUT, D_IN)
    p = {"w": ftw.Scale(1.0) if weights == "scale" else ftw.Diagonal(rng.uniform(size=shape))}
    factors = 3 * N * T * D_IN * 8 if kind in ("rows", "sum") else 0  # sorted copies of one embedding's factors
    for max_bytes in (200_000, 1_000_000, 4_000_000):
        for call in (
            lambda m=max_bytes: ftw.gram(x, p, max_bytes=m),
            lambda m=max_bytes: ftw.cross_gram(x, y, p, max_bytes=m),
        ):
            assert peak(call) <= max_bytes + factors + SLACK


def test_memory_is_used_if_it_is_there(rng):
    x, p = {"w": record(rng, "outer")}, {"w": ftw.Diagonal(rng.uniform(size=(D_OUT, D_IN)))}
    whole = N * D_OUT * D_IN * 8
    assert whole < peak(lambda: ftw.gram(x, p)) < (2 + 1 / N) * whole + SLACK
    assert peak(lambda: ftw.gram(x, p, max_bytes=whole // 10)) > whole // 20


def test_no_array_of_tokens_by_tokens_in_a_long_context(rng):
    n, t, d = 2, 4096, 8
    x = {"w": ftw.OuterProduct(rng.normal(size=(n, t, d)), rng.normal(size=(n, t, d)))}
    p = {"w": ftw.Scale(1.0)}
    assert peak(lambda: ftw.gram(x, p)) < t * t * 8 / 50
    assert peak(lambda: ftw.scores(x, {"w": np.ones((d, d))}, p)) < 4 * n * t * d * 8


def test_plan_of_scores_bounds_their_temporaries(rng):
    x = {"w": record(rng, "outer")}
    plan = planner.plan_scores(N, T, (D_OUT, D_IN), itemsize=8)
    g = {"w": np.ones((D_OUT, D_IN))}
    assert peak(lambda: ftw.scores(x, g, {"w": ftw.Scale(1.0)})) <= (
        plan.bytes + D_OUT * D_IN * 8 + SLACK  # and P g_T itself
    )
    plan = planner.plan_combine(N, T, (D_OUT, D_IN), itemsize=8)
    assert peak(lambda: ftw.combine(x, np.ones(N))) <= plan.bytes + D_OUT * D_IN * 8 + SLACK
