"""The adapter's arithmetic on packed records, padding of any value among them, against gradients written out."""

from types import SimpleNamespace

import explicit
import numpy as np
import pytest
import torch
from ftw_torch.capture.batch_axis import Scattered, group
from ftw_torch.capture.derived import written_out
from ftw_torch.capture.rules.common import outer, summed
from ftw_torch.records.blocks import add_gram, add_sketches, lengths
from ftw_torch.records.join import bytes_of, join, join_same, some
from ftw_torch.records.weighted_sum import Picks, weighted_sum
from ftw_torch.step.stream import score_by

import ftw

KINDS = ("matrix", "rows", "table", "tied")


def record(kind, n=4, seed=0):
    rng = np.random.default_rng(seed)
    samples = torch.from_numpy(np.concatenate([[-1], np.sort(rng.integers(-1, n, size=14)), [-1]]))
    t = len(samples)

    def normal(*shape):
        return torch.from_numpy(rng.normal(size=shape))

    def rows(height, d):
        return ftw.PackedRows(torch.from_numpy(rng.integers(0, height, t)), normal(t, d), samples, n, height)

    return {
        "matrix": lambda: ftw.Packed(normal(t, 5), normal(t, 4), samples, n),
        "rows": lambda: rows(6, 3),
        "table": lambda: rows(80, 3),
        "tied": lambda: ftw.Sum((ftw.Packed(normal(t, 3), normal(t, 6), samples, n), rows(6, 3))),
    }[kind]()


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", ["scale", "diagonal", "kronecker"])
def test_products(kind, operator):
    x, y = record(kind), record(kind, 3, seed=1)
    rng = np.random.default_rng(2)
    height, width = x.shape
    values = torch.from_numpy(rng.uniform(size=(height, width)))
    p = {
        "scale": ftw.Scale(2.0),
        "diagonal": ftw.Diagonal(values),
        "kronecker": ftw.Kronecker(values[:, 0], values[0]),
    }[operator]
    G = explicit.flat({"": x})
    H = np.concatenate([G, explicit.flat({"": y})])
    P = explicit.matrix(
        ftw.Scale(2.0) if operator == "scale" else type(p)(*(np.asarray(v) for v in vars(p).values())), x.shape
    )
    M = torch.from_numpy(rng.normal(size=x.shape))
    close(score_by(x, M), G @ M.numpy().reshape(-1))
    close(add_gram([x], p), G @ P @ G.T)
    close(add_gram([x, y], p), H @ P @ H.T)
    close(lengths([x, y], p), np.diag(H @ P @ H.T))
    written = ftw.Dense(torch.from_numpy(explicit.dense(x)))
    close(add_sketches("name", [x], p, 40), add_sketches("name", [written], p, 40))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_sums(kind):
    x, y = record(kind), record(kind, 3, seed=1)
    G, H = explicit.dense(x), explicit.dense(y)
    close(explicit.dense(some(x, torch.tensor([2, 0]))), G[[2, 0]])
    close(explicit.dense(join_same([x, y])), np.concatenate([G, H]))
    close(weighted_sum(x, Picks([(1, 0.5), (3, -2.0)], 4)), 0.5 * G[1] - 2 * G[3])
    for i in range(4):
        close(written_out(x, torch.Size(x.shape), i), G[i])
    plain = ftw.Dense(torch.from_numpy(np.random.default_rng(3).normal(size=(2, *x.shape))))
    joined = join([{"w": x}, {}, {"w": plain}], [4, 1, 2], {"w": torch.zeros(x.shape)})["w"]
    close(explicit.dense(joined), np.concatenate([G, np.zeros((1, *x.shape)), plain.grads.numpy()]))
    assert bytes_of(x) >= 8 * sum(part.output_grads.numel() for part in getattr(x, "parts", (x,)))


def test_tokens_of_no_document_enter_nothing():
    rng = np.random.default_rng(0)
    rows = torch.tensor([[1, -1, 0], [-1, 1, 1]])
    place, capture = Scattered(rows, 2), SimpleNamespace(grid=True, samples=2)
    x, g = (torch.from_numpy(rng.normal(size=(2, 3, 4, d))) for d in (5, 2))
    made = explicit.dense(outer(capture, x, place, g, place))
    shifts = summed(capture, g, place, 1).grads
    padded = group(x, place, 2, 1), group(g, place, 2, 1)  # (n, most tokens, d)
    plain = explicit.dense(ftw.OuterProduct(*padded))
    for i in range(2):
        A, B = (v[rows == i].reshape(-1, v.shape[-1]).numpy() for v in (x, g))
        close(made[i], B.T @ A)
        close(plain[i], B.T @ A)
        close(shifts[i], B.sum(0))
    half = summed(capture, g.to(torch.bfloat16), place, 1).grads
    assert half.dtype == torch.float32
