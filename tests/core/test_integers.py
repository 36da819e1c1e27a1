"""Row numbers of every integer dtype: no product or offset of them wraps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import optional

import ftw
from ftw import _array

jax = optional("jax")
torch = optional("torch")

DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_narrow_row_numbers(xp: Any, rng: np.random.Generator, dtype: str) -> None:
    n, t, size, d = 40, 6, 300, 3  # more samples, rows, and products of the two, than the narrow ones can count
    if xp.name in ("jax", "jit") and dtype not in ("int8", "uint8", "uint16"):
        pytest.skip("each dtype compiles anew")
    ids = rng.integers(0, min(size, np.iinfo(dtype).max + 1), size=(n, t)).astype(dtype)
    picks = rng.integers(0, n, size=3).astype(dtype)
    b, g, w = rng.normal(size=(n, t, d)), rng.normal(size=(size, d)), rng.normal(size=n)
    values = rng.uniform(0.5, 2, size=(size, d))

    def calls(ids: Any, picks: Any, b: Any, g: Any, w: Any, values: Any) -> dict[str, Any]:
        x, p = {"table": ftw.Rows(ids, b, size)}, {"table": ftw.Diagonal(values)}
        space = _array.namespace(b)
        return {
            "scores": ftw.scores(x, {"table": g}, p),
            "gram": ftw.gram(x, p),
            "in blocks": ftw.gram(x, p, max_bytes=60_000),
            "cross": ftw.cross_gram(x, ftw.take(x, picks), p),
            "combine": ftw.combine(x, w)["table"],
            "transposed": x["table"].transposed(space).block(space, slice(0, d), slice(0, size)),
        }

    G = np.zeros((n, size, d))
    for i in range(n):
        for s in range(t):
            G[i, int(ids[i, s])] += b[i, s]
    flat = G.reshape(n, -1)
    K = (flat * values.reshape(-1)) @ flat.T
    expected = {
        "scores": (flat * values.reshape(-1)) @ g.reshape(-1),
        "gram": K,
        "in blocks": K,
        "cross": K[:, picks.astype(int)],
        "combine": np.tensordot(w, G, axes=1),
        "transposed": np.swapaxes(G, 1, 2),
    }
    got = xp.call(calls, ids, picks, b, g, w, values)
    for name, x in expected.items():
        np.testing.assert_allclose(xp.numpy(got[name]), x, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_numbers_out_of_range_are_still_refused(dtype: str) -> None:
    ids = np.full((2, 1), 41, dtype=dtype)
    with pytest.raises(ValueError, match=r"indices must lie in \[0, 40\)"):
        ftw.combine({"table": ftw.Rows(ids, np.ones((2, 1, 3)), 40)}, np.ones(2))


def test_records_of_placeholders() -> None:
    record = ftw.Rows(np.zeros((2, 1), dtype="uint8"), np.ones((2, 1, 3)), 40)
    leaves, tree = jax.tree.flatten(record)
    for stand_in in (0, None, jax.ShapeDtypeStruct((2, 1), "uint8"), object()):
        assert jax.tree.unflatten(tree, [stand_in] * len(leaves)).indices is stand_in


@pytest.mark.parametrize("dtype", ["uint8", "int16"])
def test_narrow_picks_of_a_filter(xp: Any, rng: np.random.Generator, dtype: str) -> None:
    n, keep = 100, 4
    x = {"w": ftw.Dense(rng.normal(size=(n, 5)))}
    g = {"w": rng.normal(size=5)}

    def last(scores: Any, gram: Any, k: int) -> Any:
        xp_ = _array.namespace(scores)
        indices = xp_.astype(xp_.arange(n - k, n, device=_array.device(scores)), getattr(xp_, dtype))
        return ftw.filters.Filtered(indices, xp_.asarray(k, device=_array.device(scores)))

    def call(x: Any, g: Any) -> Any:
        s = ftw.filter_then_weight(x, g, {"w": ftw.Scale(1.0)}, keep=keep, filter=last)
        return s.indices, s.status

    indices, status = xp.call(call, x, g)
    np.testing.assert_array_equal(xp.numpy(indices), np.arange(n - keep, n))
    assert int(xp.numpy(status)) in (ftw.Status.OK, ftw.Status.NOTHING_USEFUL)


def test_narrow_row_numbers_that_torch_calls_masks() -> None:
    ids = torch.tensor([[1, 0], [3, 3]], dtype=torch.uint8)
    record = ftw.Rows(ids, torch.ones(2, 2, 1), 4)
    assert ftw.combine({"table": record}, torch.ones(2))["table"][:, 0].tolist() == [1.0, 1.0, 0.0, 2.0]
