"""Packed records against every document's gradient written out, one token at a time, in float64."""

import array_api_compat
import explicit
import models
import numpy as np
import pytest
from backends import BACKENDS, optional
from numpy.testing import assert_allclose

import ftw
from ftw import planner
from ftw.inner_products import plan_piece, squared_norms
from ftw.sketch import count_sketch, low_rank, low_rank_scores

jax = optional("jax")
jnp = optional("jax.numpy")
torch = optional("torch")

NUMBERS = {  # of the tokens' samples, of four documents
    "unequal": [0, 1, 1, 1, 1, 1, 2, 2, 3],
    "padded": [-1, 0, 0, -1, 1, 1, 1, 2, 3, 3, -1, -1],
    "an empty one": [0, 0, 2, 2, 2, 2, 3],
    "one has all": [2] * 11,
    "interleaved": [3, 0, -1, 1, 3, 3, 0, 2, 1, 3, 3],
    "all padding": [-1, -1, -1],
    "no token": [],
}
ROUTES = {"tokens": 2**28, "blocks": 600}


def packed(rng, numbers, dtype=np.int64, n=4):
    """One parameter of each kind; the last two are used twice, one of them tied to an embedding."""
    samples = np.array(numbers, dtype=dtype)
    t = len(samples)

    def outer(d_out, d_in):
        return ftw.Packed(rng.normal(size=(t, d_in)), rng.normal(size=(t, d_out)), samples, n)

    def rows(height, d):
        return ftw.PackedRows(rng.integers(0, height, size=t), rng.normal(size=(t, d)), samples, n, height)

    return {
        "wide": outer(4, 6),
        "tall": outer(6, 3),
        "large": outer(13, 12),  # pairs of tokens are cheaper
        "embedding": rows(7, 4),
        "table": rows(60, 2),
        "bias": ftw.Dense(rng.normal(size=(n, 4))),
        "twice": ftw.Sum((outer(4, 5), outer(4, 5))),
        "tied": ftw.Sum((outer(7, 3), rows(7, 3))),
    }


def close(value, expected, tol=1e-11):
    assert_allclose(value, expected, rtol=tol, atol=tol * 10)


def products(x, y, g, p, w):
    return {
        "scores": ftw.scores(x, g, p),
        "gram": ftw.gram(x, p),
        "cross": ftw.cross_gram(x, y, p),
        "norms": squared_norms(x, p),
        "combined": ftw.combine(x, w),
    }


def expected(x, y, g, p, w):
    X, Y, P = explicit.flat(x), explicit.flat(y), explicit.metric(x, p)
    return {
        "scores": X @ P @ np.concatenate([v.reshape(-1) for v in g.values()]),
        "gram": X @ P @ X.T,
        "cross": X @ P @ Y.T,
        "norms": np.diag(X @ P @ X.T),
        "combined": {name: np.tensordot(w, explicit.dense(r), axes=1) for name, r in x.items()},
    }


@pytest.mark.parametrize("lie", NUMBERS)
@pytest.mark.parametrize(
    ("name", "kind"), [("numpy", k) for k in models.KINDS] + [(b, k) for b in ("strict", "torch") for k in (0, 3)]
)
def test_every_product(name, kind, lie, rng):
    xp = BACKENDS[name]
    x, y = packed(rng, NUMBERS[lie]), packed(rng, NUMBERS["padded"])
    g, p, w = models.target(rng, x), models.geometry(rng, x, kind), rng.normal(size=4)
    got, wanted = xp.call(products, x, y, g, p, w), expected(x, y, g, p, w)
    for what in ("scores", "gram", "cross", "norms"):
        close(xp.numpy(got[what]), wanted[what])
    for parameter, value in wanted["combined"].items():
        close(xp.numpy(got["combined"][parameter]), value)
    little = xp.call(lambda x, y, p: ftw.cross_gram(x, y, p, max_bytes=700), x, y, p)
    close(xp.numpy(little), wanted["cross"])


@pytest.mark.parametrize(("name", "lie"), [("jax", "padded"), ("jit", "interleaved"), ("jit", "an empty one")])
def test_every_product_in_jax(name, lie, rng):
    xp = BACKENDS[name]
    names = ("wide", "large", "table", "tied")
    x, y = ({k: packed(rng, NUMBERS[numbers])[k] for k in names} for numbers in (lie, "padded"))
    g, p, w = models.target(rng, x), models.geometry(rng, x, 1), rng.normal(size=4)
    got, wanted = xp.call(products, x, y, g, p, w), expected(x, y, g, p, w)
    for what in ("scores", "gram", "cross", "norms"):
        close(xp.numpy(got[what]), wanted[what])
    for parameter, value in wanted["combined"].items():
        close(xp.numpy(got["combined"][parameter]), value)


@pytest.mark.parametrize("kind", ["scale", "diagonal", "polar"])
def test_documents_beside_samples_of_equal_length(xp, kind, rng):
    """The target may be an ordinary batch: cross products of the two kinds of records, either way round."""
    x = {"w": packed(rng, NUMBERS["padded"])["large"], "e": packed(rng, NUMBERS["padded"])["table"]}
    y = {
        "w": ftw.OuterProduct(rng.normal(size=(3, 2, 12)), rng.normal(size=(3, 2, 13))),
        "e": ftw.Rows(rng.integers(0, 60, size=(3, 2)), rng.normal(size=(3, 2, 2)), 60),
    }
    p = {"w": models.operator(rng, kind, (13, 12)), "e": models.operator(rng, kind, (60, 2))}
    K, L = xp.call(lambda x, y, p: (ftw.cross_gram(x, y, p), ftw.cross_gram(y, x, p)), x, y, p)
    wanted = explicit.flat(x) @ explicit.metric(x, p) @ explicit.flat(y).T
    close(xp.numpy(K), wanted)
    close(xp.numpy(L), wanted.T)


@pytest.mark.parametrize("picks", [[2, 0], [3, 1, 0, 2], [1]])
def test_take_gives_new_numbers(xp, picks, rng):
    x = packed(rng, NUMBERS["interleaved"])
    taken = xp.call(ftw.take, x, np.array(picks))
    for name, record in x.items():
        got = jax.tree.map(xp.numpy, taken[name])
        assert got.n == len(picks)
        assert_allclose(explicit.dense(got), explicit.dense(record)[picks], rtol=1e-14)
    again = xp.call(lambda x: ftw.take(ftw.take(x, xp.array([3, 1, 0])), xp.array([2, 0])), x)
    assert_allclose(explicit.dense(jax.tree.map(xp.numpy, again["wide"])), explicit.dense(x["wide"])[[0, 3]])


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jax"])
def test_a_document_may_be_taken_several_times(name, rng):
    xp = BACKENDS[name]
    x = packed(rng, NUMBERS["padded"])
    taken = xp.call(ftw.take, x, np.array([1, 3, 1, 1]))
    for parameter, record in x.items():
        got = jax.tree.map(xp.numpy, taken[parameter])
        assert_allclose(explicit.dense(got), explicit.dense(record)[[1, 3, 1, 1]], rtol=1e-14)


def test_one_taken_several_times_in_a_trace_is_not_a_number(rng):
    x = {"wide": packed(rng, NUMBERS["padded"])["wide"]}
    w = jnp.ones(2)
    norms = jax.jit(lambda x, i: ftw.combine(ftw.take(x, i), w)["wide"])
    x = jax.tree.map(jnp.asarray, x)
    assert np.isfinite(norms(x, jnp.array([2, 1]))).all()
    assert np.isnan(norms(x, jnp.array([1, 1]))).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jax"])
def test_integers_of_any_width(name, dtype, rng):
    """Products of a sample and a row number do not fit into 8 or 16 bits."""
    xp = BACKENDS[name]
    n, t, height = 100, 300, 120
    samples = rng.integers(0 if dtype[0] == "u" else -1, n, size=t)
    indices = rng.integers(0, height, size=t)
    grads = rng.normal(size=(t, 2))
    x = {
        "rows": ftw.PackedRows(indices.astype(dtype), grads, samples.astype(dtype), n, height),
        "outer": ftw.Packed(rng.normal(size=(t, 3)), grads, samples.astype(dtype), n),
        "equal": ftw.Rows(indices.reshape(n, -1)[:, :2].astype(dtype), rng.normal(size=(n, 2, 2)), height),
    }
    p = {"rows": ftw.Diagonal(rng.uniform(size=(height, 2))), "outer": ftw.Scale(2.0), "equal": ftw.Scale(1.0)}
    p["equal"] = ftw.Kronecker(rng.uniform(size=height), models.psd(rng, 2))
    g, i = models.target(rng, x), np.array([7, 99, 0])
    wide = {
        "rows": ftw.PackedRows(indices, grads, samples, n, height),
        "outer": ftw.Packed(x["outer"].inputs, grads, samples, n),
        "equal": ftw.Rows(np.asarray(x["equal"].indices, int), x["equal"].output_grads, height),
    }
    X, P = explicit.flat(wide), explicit.metric(wide, p)
    b, K, taken, sums, turned = xp.call(
        lambda x, g, p, i: (
            ftw.scores(x, g, p),
            ftw.gram(x, p, max_bytes=20_000),
            ftw.gram(ftw.take(x, i), p),
            ftw.combine(x, xp.array(np.ones(n)))["rows"],
            x["rows"].transposed(xp.xp).dot(xp.xp, g["rows"].T),
        ),
        x,
        g,
        p,
        i,
    )
    close(xp.numpy(b), X @ P @ np.concatenate([v.reshape(-1) for v in g.values()]))
    close(xp.numpy(K), X @ P @ X.T)
    close(xp.numpy(taken), (X @ P @ X.T)[np.ix_(i, i)])
    close(xp.numpy(sums), explicit.dense(wide["rows"]).sum(axis=0))
    close(xp.numpy(turned), np.sum(explicit.dense(wide["rows"]) * g["rows"], axis=(1, 2)))


def test_padding_may_hold_anything(xp, rng):
    samples = NUMBERS["padded"]
    x = packed(rng, samples)
    spoilt = {
        name: jax.tree.map(
            lambda a: np.where((np.array(samples) < 0)[:, None], np.nan, a) if a.ndim == 2 and len(a) == 12 else a, r
        )
        for name, r in x.items()
    }
    assert sum(np.isnan(a).any() for a in jax.tree.leaves(spoilt)) >= 10
    names = ("wide", "large", "table", "tied")
    x, spoilt = ({k: r[k] for k in names} for r in (x, spoilt))
    g, p, w = models.target(rng, x), models.geometry(rng, x, 1), rng.normal(size=4)
    got, wanted = xp.call(products, spoilt, spoilt, g, p, w), expected(x, x, g, p, w)
    for what in ("scores", "gram", "cross", "norms"):
        close(xp.numpy(got[what]), wanted[what])
    for name in names:
        close(xp.numpy(got["combined"][name]), wanted["combined"][name])


@pytest.mark.parametrize("kind", ["scale", "diagonal"])
def test_what_is_not_finite_stays_with_its_document(xp, kind, rng):
    samples = np.array(NUMBERS["interleaved"])
    x = packed(rng, samples)
    x = {k: x[k] for k in ("wide", "large", "table")}
    spoilt = {
        name: jax.tree.map(lambda a: np.where((samples == 1)[:, None], np.inf, a) if a.ndim == 2 else a, r)
        for name, r in x.items()
    }
    g, p = models.target(rng, x), models.geometry(rng, x, kind)
    w = np.array([0.5, 0.0, -1.0, 2.0])
    got, wanted = xp.call(products, spoilt, spoilt, g, p, w), expected(x, x, g, p, w)
    others = [0, 2, 3]
    close(xp.numpy(got["scores"])[others], wanted["scores"][others])
    close(xp.numpy(got["gram"])[np.ix_(others, others)], wanted["gram"][np.ix_(others, others)])
    assert not np.isfinite(xp.numpy(got["scores"])[1])
    assert not np.isfinite(xp.numpy(got["gram"])[1]).any()
    for name in x:
        close(xp.numpy(got["combined"][name]), wanted["combined"][name])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"samples": np.array([0, 1, 4])}, ValueError, "samples must lie in \\[0, 4\\)"),
        ({"samples": np.array([0, -2, 1])}, ValueError, "or be -1"),
        ({"samples": np.array([0, 255, 1], np.uint8)}, ValueError, "samples must lie"),
        ({"samples": np.array([0.0, 1.0, 2.0])}, TypeError, "samples are float64"),
        ({"samples": np.array([0, 1])}, ValueError, "\\(t,\\)"),
        ({"samples": np.array([[0, 1, 2]])}, ValueError, "flatten"),
        ({"output_grads": np.ones((2, 5))}, ValueError, "must be"),
        ({"output_grads": np.ones((3, 5), int)}, TypeError, "real floating"),
        ({"size": 4.0}, TypeError, "size must be a Python int"),
        ({"size": -1}, ValueError, "must not be negative"),
    ],
)
@pytest.mark.parametrize("kind", ["outer", "rows"])
def test_what_does_not_fit_is_named(kind, change, error, match):
    common = {"output_grads": np.ones((3, 5)), "samples": np.array([0, 1, -1]), "size": 4}
    if kind == "outer":
        record = ftw.Packed(**({"inputs": np.ones((3, 6))} | common | change))
    else:
        record = ftw.PackedRows(**({"indices": np.arange(3), "height": 6} | common | change))
    with pytest.raises(error, match=match) as raised:
        ftw.combine({"layer": record}, np.ones(4))
    assert "'layer'" in str(raised.value)


def test_rows_that_the_table_lacks_are_named():
    record = ftw.PackedRows(np.array([0, 6]), np.ones((2, 3)), np.array([0, -1]), 1, 6)
    with pytest.raises(ValueError, match="indices must lie in \\[0, 6\\)"):
        ftw.combine({"layer": record}, np.ones(1))
    with pytest.raises(TypeError, match="height must be a Python int"):
        ftw.combine({"layer": ftw.PackedRows(np.array([0]), np.ones((1, 3)), np.array([0]), 1, "6")}, np.ones(1))


@pytest.mark.parametrize("bad", [4, -2])
def test_a_bad_number_in_a_trace_is_not_a_number(bad, rng):
    """A trace cannot read it, and no sample can be blamed."""
    x = packed(rng, NUMBERS["unequal"])
    x = jax.tree.map(jnp.asarray, {k: x[k] for k in ("wide", "large", "table")})
    g, p = jax.tree.map(jnp.asarray, (models.target(rng, x), models.geometry(rng, x, "diagonal")))
    for name, record in x.items():
        spoilt = ftw.Packed(*_changed(record, bad)) if isinstance(record, ftw.Packed) else None
        spoilt = spoilt or ftw.PackedRows(*_changed(record, bad))
        one = {name: spoilt}
        b, K, L, u = jax.jit(
            lambda x, name=name: (
                ftw.scores(x, {name: g[name]}, {name: p[name]}),
                ftw.gram(x, {name: p[name]}),
                ftw.gram(x, {name: ftw.Scale(1.0)}),
                ftw.combine(ftw.take(x, jnp.array([0, 1])), jnp.ones(2))[name],
            )
        )(one)
        assert all(np.isnan(v).all() for v in (b, K, L))
        assert np.isnan(u).any()


def _changed(record, bad):
    first = record.inputs if isinstance(record, ftw.Packed) else record.indices
    last = () if isinstance(record, ftw.Packed) else (record.height,)
    return first, record.output_grads, record.samples.at[2].set(bad), record.size, *last


def test_16_bit_factors_are_summed_in_float32():
    torch.manual_seed(0)
    a, b, samples = torch.randn(4000, 3).bfloat16(), torch.randn(4000, 2).bfloat16(), torch.arange(4000) // 1000
    i = torch.randint(0, 5, (4000,))
    for make in (lambda b: ftw.Packed(a.to(b.dtype), b, samples, 4), lambda b: ftw.PackedRows(i, b, samples, 4, 5)):
        half, wide = {"w": make(b)}, {"w": make(b.double())}
        one = torch.ones(half["w"].shape)
        for p in ({"w": ftw.Scale(1.0)}, {"w": ftw.Diagonal(one)}):
            for got, value in (
                (ftw.scores(half, {"w": one}, p), ftw.scores(wide, {"w": one.double()}, p)),
                (ftw.gram(half, p), ftw.gram(wide, p)),
                (ftw.combine(half, torch.ones(4))["w"], ftw.combine(wide, torch.ones(4).double())["w"]),
            ):
                assert got.dtype == torch.float32
                assert_allclose(got, value, rtol=2e-5, atol=2e-5 * value.abs().max())


def test_sketches_of_documents_are_those_of_their_gradients(rng):
    x = packed(rng, NUMBERS["padded"])
    written = {name: ftw.Dense(explicit.dense(r)) for name, r in x.items()}
    for kind in ("diagonal", "kronecker", "polar"):
        p = models.geometry(rng, x, kind)
        close(count_sketch(x, p, 50, seed=3), count_sketch(written, p, 50, seed=3))
    g = {name: rng.normal(size=r.shape) for name, r in x.items()}
    direction = low_rank(g, 2, oversample=0)
    close(low_rank_scores(x, direction), low_rank_scores(written, direction))


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jit"])
def test_a_whole_selection_over_documents(name, rng):
    xp = BACKENDS[name]
    numbers = np.sort(rng.integers(-1, 10, size=60))
    x = packed(rng, numbers, n=10)
    x = {k: x[k] for k in ("wide", "tied")}
    written = {name: ftw.Dense(explicit.dense(r)) for name, r in x.items()}
    g, p = models.target(rng, x), models.geometry(rng, x, "diagonal")
    select = lambda x, g, p: ftw.filter_then_weight(x, g, p, keep=4, shortlist=7)  # noqa: E731
    got, wanted = xp.call(select, x, g, p), xp.call(select, written, g, p)
    assert xp.numpy(got.indices).tolist() == xp.numpy(wanted.indices).tolist()
    assert_allclose(xp.numpy(got.weights), xp.numpy(wanted.weights), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("t", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("n", [0, 1, 3, 64])
def test_chunks_hold_the_tokens_however_they_lie(n, t, rng):
    count, length = planner.chunks(n, t)
    assert count <= 2 * max(n, t and 1)
    assert count * length <= 2 * t or n == 0
    for _ in range(20 if n else 0):
        lengths = rng.multinomial(t, rng.dirichlet(np.full(n, rng.choice([0.05, 1.0, 50.0]))))
        assert sum(-(-int(x) // length) for x in lengths) <= count


@pytest.mark.parametrize(
    ("n", "t", "d_out", "d_in"), [(6, 24, 32, 24), (3, 5, 200, 100), (8, 128, 12, 20), (5, 3, 9, 7)]
)
@pytest.mark.parametrize("kind", ["scale", "diagonal"])
def test_the_planner_counts_what_is_multiplied(n, t, d_out, d_in, kind):
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    x = {"w": ftw.Packed(torch.randn(t, d_in), torch.randn(t, d_out), torch.arange(t) * n // t, n)}
    operator = ftw.Scale(2.0) if kind == "scale" else ftw.Diagonal(torch.rand(d_out, d_in))
    (piece,) = operator.split(array_api_compat.array_namespace(torch.zeros(1)), x["w"], x["w"])
    for max_bytes in (2**13, 2**28):
        plan = plan_piece(array_api_compat.array_namespace(torch.zeros(1)), piece, max_bytes)
        with FlopCounterMode(display=False) as counter:
            ftw.gram(x, {"w": operator}, max_bytes=max_bytes)
        assert counter.get_total_flops() == plan.flops
        assert plan.bytes <= max_bytes
    with FlopCounterMode(display=False) as counter:
        ftw.scores(x, {"w": torch.randn(d_out, d_in)}, {"w": ftw.Scale(1.0)})
    assert counter.get_total_flops() == planner.plan_scores(1, t, (d_out, d_in), itemsize=4).flops


@pytest.mark.parametrize("kind", ["scale", "diagonal"])
def test_memory_stays_within_the_bound(kind, rng):
    import tracemalloc

    n, t, d = 32, 64, 300
    samples = np.sort(rng.integers(-1, n, size=t))
    x = {"w": ftw.Packed(rng.normal(size=(t, d)), rng.normal(size=(t, d)), samples, n)}
    p = {"w": ftw.Scale(1.0) if kind == "scale" else ftw.Diagonal(rng.uniform(size=(d, d)))}
    ftw.gram(x, p, max_bytes=2**18)
    tracemalloc.start()
    ftw.gram(x, p, max_bytes=2**18)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    factors = 3 * 2 * t * d * 8  # the columns of a block are laid out in chunks: twice the tokens, and the copy before
    assert peak < 2**18 + factors
    assert n * d * d * 8 > 2**18 + factors  # all gradients at once would not fit
