"""What does not fit raises, with the name, the shapes and the remedy; and random input never gives a plausible lie."""

from __future__ import annotations

from functools import partial

import explicit
import models
import numpy as np
import pytest
from backends import BACKENDS, optional
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

import ftw
from ftw import filters

ref = optional("ftw_reference")
jax = optional("jax")
torch = optional("torch")

ERRORS = (ValueError, TypeError)


def model(rng=None):
    rng = rng or np.random.default_rng(0)
    x = models.records(rng, 5, names=("linear", "table", "bias"))
    return x, models.target(rng, x), models.geometry(rng, x)


def swap(tree, **changes):
    return {**tree, **changes}


BAD_MODELS = {  # (gradients, target, geometry) -> what is wrong with them, and how the error begins
    "no gradients": (lambda x, g, p: ({}, g, p), "non-empty mapping"),
    "a list": (lambda x, g, p: ([x["bias"]], g, p), "non-empty mapping"),
    "a bare array": (lambda x, g, p: (swap(x, bias=x["bias"].grads), g, p), "expected OuterProduct, Rows, Packed"),
    "an operator is missing": (lambda x, g, p: (x, g, {"bias": p["bias"]}), "geometry lacks \\['linear', 'table'\\]"),
    "an operator too many": (lambda x, g, p: (x, g, swap(p, more=p["bias"])), "has besides \\['more'\\]"),
    "a number for an operator": (lambda x, g, p: (x, g, swap(p, bias=1.0)), "'bias' is a float; expected Scale"),
    "no mapping": (lambda x, g, p: (x, g, 1.0), "geometry must be a mapping"),
    "tokens disagree": (
        lambda x, g, p: (swap(x, linear=ftw.OuterProduct(np.ones((5, 3, 5)), np.ones((5, 2, 4)))), g, p),
        "\\(5, 3, 5\\) and output_grads \\(5, 2, 4\\)",
    ),
    "no token axis": (
        lambda x, g, p: (swap(x, linear=ftw.OuterProduct(np.ones((5, 5)), np.ones((5, 4)))), g, p),
        "give samples without tokens an axis of length 1",
    ),
    "samples disagree": (
        lambda x, g, p: (swap(x, bias=ftw.Dense(np.ones((4, 4)))), g, p), "number of samples: .*'bias': 4"
    ),
    "integers": (lambda x, g, p: (swap(x, bias=ftw.Dense(np.ones((5, 4), dtype=int))), g, p), "'bias' holds int64"),
    "complex": (lambda x, g, p: (swap(x, bias=ftw.Dense(np.ones((5, 4), dtype=complex))), g, p), "real floating"),
    "float rows": (
        lambda x, g, p: (swap(x, table=ftw.Rows(np.ones((5, 3)), np.ones((5, 3, 2)), 60)), g, p),
        "'table': indices are float64",
    ),
    "a size that is no int": (
        lambda x, g, p: (swap(x, table=ftw.Rows(np.ones((5, 3), dtype=int), np.ones((5, 3, 2)), 60.0)), g, p),
        "size must be a Python int",
    ),
    "an empty sum": (lambda x, g, p: (swap(x, bias=ftw.Sum(())), g, p), "needs at least one part"),
    "parts disagree": (
        lambda x, g, p: (swap(x, bias=ftw.Sum((x["bias"], ftw.Dense(np.ones((5, 3)))))), g, p), "parts disagree"
    ),
    "an operator's shape": (lambda x, g, p: (x, g, swap(p, bias=ftw.Diagonal(np.ones(3)))), "'bias' is \\(3,\\)"),
    "integers in an operator": (
        lambda x, g, p: (x, g, swap(p, bias=ftw.Diagonal(np.ones(4, dtype=int)))), "holds int64"
    ),
    "a negative scale": (
        lambda x, g, p: (x, g, swap(p, bias=ftw.Scale(-1.0))), "'bias': value -1.0 must not be negative"
    ),
    "a scale with axes": (lambda x, g, p: (x, g, swap(p, bias=ftw.Scale(np.ones(4)))), "0-d array, got \\(4,\\)"),
    "a side that is not square": (
        lambda x, g, p: (x, g, swap(p, linear=ftw.Kronecker(np.ones((4, 3)), np.ones(5)))), "left \\(4, 3\\) must be"
    ),
    "bases that do not fit": (
        lambda x, g, p: (x, g, swap(p, linear=ftw.Rotated(np.eye(4), np.ones((3, 5)), np.eye(5)))),
        "'linear': left \\(4, 4\\)",
    ),
    "no thin SVD": (
        lambda x, g, p: (x, g, swap(p, linear=ftw.Polar(np.eye(4), np.ones(4), np.ones((3, 5))))), "must be .d_out, r."
    ),
}  # fmt: skip
BAD_TARGETS = {
    "a target is missing": (lambda x, g, p: (x, {"bias": g["bias"]}, p), "target lacks \\['linear', 'table'\\]"),
    "a target's shape": (lambda x, g, p: (x, swap(g, bias=np.ones(3)), p), "target of 'bias' is \\(3,\\), .* \\(4,\\)"),
    "a target of integers": (lambda x, g, p: (x, swap(g, bias=np.ones(4, dtype=int)), p), "target of 'bias' is int64"),
    "a target of numbers": (lambda x, g, p: (x, swap(g, bias=1.0), p), "target of 'bias' is a float"),
}


def raises(match, function, *arrays):
    """The same error eager and under jit."""
    with pytest.raises(ERRORS, match=match):
        function(*arrays)


def traced(function, x, g, p):
    """Run under a trace: arrays are closed over, so that any tree will do."""
    trees = jax.tree.map(lambda a: jax.numpy.asarray(a) if isinstance(a, np.ndarray) else a, (x, g, p))

    def inner(one):
        return function(*jax.tree.map(lambda a: a * one if floats(a) else a, trees))

    return jax.jit(inner)(1.0)


UNIT = ftw.Scale(1.0)


def floats(a):
    return hasattr(a, "dtype") and "float" in str(a.dtype)


@pytest.mark.parametrize("case", BAD_MODELS | BAD_TARGETS)
def test_models_that_do_not_fit(case):
    break_it, match = (BAD_MODELS | BAD_TARGETS)[case]
    x, g, p = break_it(*model())
    raises(match, ftw.scores, x, g, p)
    raises(match, lambda *a: ftw.filter_then_weight(*a, keep=2), x, g, p)
    if case in ("a list", "a bare array", "no gradients", "no mapping", "a number for an operator"):
        return
    if case not in ("a size that is no int",):
        raises(match.replace("int64", "int(64|32)"), lambda *a: traced(ftw.scores, *a), x, g, p)
    if case in BAD_MODELS:
        raises(match, lambda x, g, p: ftw.gram(x, p), x, g, p)
        raises(match, lambda x, g, p: ftw.cross_gram(x, x, p), x, g, p)
        raises(match, lambda x, g, p: ftw.cross_gram(model()[0], x, p), x, g, p)
        raises(match, lambda x, g, p: ftw.sketch.count_sketch(x, p, 8), x, g, p)


def test_namespaces_and_devices_are_not_mixed():
    x, g, p = model()
    for tree in (swap(g, bias=torch.ones(4)), jax.tree.map(torch.from_numpy, g)):
        raises("one namespace, got .*(numpy|torch)", ftw.scores, x, tree, p)
    raises("one namespace", ftw.scores, swap(x, bias=ftw.Dense(torch.ones(5, 4))), g, p)
    raises("one namespace", ftw.gram, x, swap(p, bias=ftw.Diagonal(torch.ones(4))))
    raises("one namespace", ftw.combine, x, torch.ones(5))
    raises("one namespace", ftw.take, x, torch.ones(2, dtype=torch.int64))
    raises("one namespace", lambda: ftw.cross_gram(x, BACKENDS["torch"].tree(x), p))
    raises("one namespace", lambda: filters.matching(np.ones(3), torch.ones(3, 3), 2))
    strict = BACKENDS["strict"]
    here, there = strict.xp.asarray(np.ones(4)), strict.array(np.ones(4))
    x, p = strict.tree({"bias": x["bias"]}), {"bias": ftw.Diagonal(there)}
    raises("several devices .*; move them", ftw.scores, x, {"bias": here}, p)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0}, "keep=0 must lie in 1 .. 5"),
        ({"keep": 6}, "keep=6 must lie in 1 .. 5"),
        ({"keep": 2.0}, "keep must be an int, got float"),
        ({"keep": True}, "keep must be an int, got bool"),
        ({"filter": "best"}, "filter='best' is not one of"),
        ({"filter": "boltzmann"}, "options of their own"),
        ({"filter": lambda b, K, k: np.arange(k)}, "must return Filtered"),
        ({"filter": lambda b, K, k: filters.top_k(b, 3)}, "must return Filtered"),
        ({"weight": "equal"}, "weight='equal' must be 'qp' or 'uniform'"),
        ({"constraint": "simplex"}, "constraint is a str"),
        ({"constraint": ftw.Simplex}, "constraint is a type"),
        ({"constraint": ftw.CappedSimplex(np.ones(3))}, "cap \\(3,\\) must be a number or \\(5,\\)"),
        ({"ridge": -0.1}, "ridge=-0.1"),
        ({"ridge": float("nan")}, "ridge=nan"),
        ({"guard": 1.5}, "guard=1.5"),
        ({"shortlist": 0}, "shortlist=0"),
        ({"shortlist": 1.5}, "shortlist=1.5"),
        ({"shortlist": True}, "shortlist=True"),
        ({"shortlist": "half"}, "shortlist='half'"),
        ({"scores": np.ones(4)}, "scores \\(4,\\) must be \\(5,\\)"),
        ({"target_samples": {}}, "non-empty mapping"),
        ({"target_samples": {"bias": ftw.Dense(np.ones((2, 4)))}}, "target_samples: geometry and gradients differ"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
)
def test_options_of_filter_then_weight(options, match):
    x, g, p = model()
    options = {"keep": 2} | options
    raises(match, lambda: ftw.filter_then_weight(x, g, p, **options))
    if "filter" not in options or isinstance(options["filter"], str):
        options = {k: jax.numpy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        raises(match, lambda: traced(lambda *a: ftw.filter_then_weight(*a, **options), x, g, p))


B, K = np.arange(4.0), np.eye(4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: filters.top_k(B, 0), "top_k: k=0 must lie in 1 .. 4"),
        (lambda: filters.top_k(B, 5), "k=5 must lie in 1 .. 4"),
        (lambda: filters.top_k(B, 2.0), "k must be an int"),
        (lambda: filters.top_k(K, 2), "vector of floats, got float64 \\(4, 4\\)"),
        (lambda: filters.top_k(np.arange(4), 2), "vector of floats, got int64"),
        (lambda: filters.top_k([1.0, 2.0], 1), "scores is a list; convert it"),
        (lambda: filters.threshold(B, 2), "exactly one of value= and quantile="),
        (lambda: filters.threshold(B, 2, value=1.0, quantile=0.5), "exactly one"),
        (lambda: filters.threshold(B, 2, quantile=1.5), "quantile 1.5 must lie in"),
        (lambda: filters.matching(B, K[:3], 2), "gram \\(3, 4\\) must be \\(4, 4\\)"),
        (lambda: filters.matching(B, K.astype(int), 2), "gram .*int64"),
        (lambda: filters.matching(B, K, 2, ridge=-1.0), "ridge=-1.0 must not be negative"),
        (lambda: filters.greedy_utility(B, K[0], 2), "gram \\(4,\\) must be"),
        (lambda: filters.greedy_utility(B, K, 2, redundancy=-1.0), "redundancy -1.0"),
        (lambda: filters.boltzmann(B, 2, temperature=0.0, uniforms=B / 4), "temperature 0.0 must be positive"),
        (lambda: filters.boltzmann(B, 2, temperature=1.0, uniforms=B[:3]), "uniforms \\(3,\\) must be \\(4,\\)"),
        (lambda: filters.boltzmann(B, 2, temperature=1.0, uniforms=torch.rand(4)), "one namespace"),
        (lambda: filters.boltzmann(B, 2, temperature=1.0, uniforms=np.arange(4)), "uniforms .*int64"),
        (lambda: ftw.resample(B, 3, B), "uniforms \\(4,\\) must be \\(3,\\)"),
        (lambda: ftw.resample(B, 0, B[:0]), "size=0 must be an int >= 1"),
        (lambda: ftw.resample(K, 4, B), "vector of floats"),
        (lambda: ftw.resample(B, 4, torch.rand(4)), "one namespace"),
        (lambda: ftw.combine(model()[0], np.ones(4)), "weights \\(4,\\) must be \\(5,\\)"),
        (lambda: ftw.combine(model()[0], np.ones((5, 1))), "weights \\(5, 1\\)"),
        (lambda: ftw.combine(model()[0], np.ones(5, dtype=int)), "weights are int64"),
        (lambda: ftw.combine({}, np.ones(5)), "non-empty mapping"),
        (lambda: ftw.take(model()[0], np.ones(2)), "vector of integers, got float64"),
        (lambda: ftw.take(model()[0], np.ones((2, 1), dtype=int)), "vector of integers"),
        (lambda: ftw.gram(model()[0], model()[2], max_bytes=0), "max_bytes=0 must be a positive int"),
        (lambda: ftw.gram(model()[0], model()[2], max_bytes=1e9), "must be a positive int"),
        (lambda: ftw.gram(model()[0], model()[2], max_bytes=8), "max_bytes=8 is too small"),
    ],
)  # fmt: skip
def test_other_functions(call, match):
    raises(match, call)


def test_names_of_arguments():
    x, g, p = model()
    assert_allclose(ftw.scores(gradients=x, target=g, geometry=p), ftw.scores(x, g, p))
    assert_allclose(ftw.gram(gradients=x, geometry=p), ftw.cross_gram(gradients=x, others=x, geometry=p))
    some = ftw.take(gradients=ftw.take(x, [4, 0]), indices=[1])
    assert_allclose(ftw.combine(gradients=some, weights=np.ones(1))["bias"], x["bias"].grads[0])
    K, c = np.eye(2), np.array([1.0, -1.0])
    assert_allclose(ref.solve_qp(K=K, c=c, constraint=ftw.NonNegative(), ridge=0.0).weights, [1.0, 0.0])


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jax"])
@pytest.mark.parametrize("wrong", [-1, 60])
def test_numbers_out_of_range(name, wrong, rng):
    b, x = BACKENDS[name], models.records(rng, 3, names=("table",))["table"]
    for dtype in (np.int8, np.int64):  # 300 rows do not fit into the first
        rows = np.array(x.indices, dtype=dtype)
        rows[1, 0] = wrong
        record = ftw.Rows(rows, x.output_grads, 60)
        raises(
            "'table': indices must lie in \\[0, 60\\)", lambda r=record: ftw.gram(b.tree({"table": r}), {"table": UNIT})
        )
    good = b.tree({"table": ftw.Rows(np.array(x.indices, dtype=np.int8), x.output_grads, 300)})
    assert ftw.gram(good, {"table": UNIT}).shape == (3, 3)
    raises("take: indices must lie in \\[0, 3\\)", lambda: ftw.take(good, b.array([0, min(wrong, 3)])))


@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
def test_torch_keeps_no_history_of_a_choice(wanted, rng):
    g = torch.tensor(rng.normal(size=(6, 4)), dtype=wanted, requires_grad=True)
    x, target = {"w": ftw.Dense(g)}, {"w": g.mean(0)}
    scale = torch.tensor(0.5, dtype=wanted, requires_grad=True)
    b, K = g @ g.mean(0), g @ g.T
    found = [
        ftw.filter_then_weight(x, target, {"w": ftw.Scale(scale)}, keep=3),
        ftw.solve_qp(K, b, ftw.Simplex(scale)),
        filters.matching(b, K, 2),
    ]
    assert not any(torch.is_tensor(a) and a.requires_grad for result in found for a in result)
    plain = ftw.filter_then_weight({"w": ftw.Dense(g.detach())}, {"w": g.detach().mean(0)}, {"w": UNIT}, keep=3)
    assert_allclose(found[0].weights, plain.weights, rtol=1e-5)
    assert ftw.scores(x, target, {"w": ftw.Scale(scale)}).requires_grad  # plain arithmetic keeps its derivative


# ---------------------------------------------------------------------------------------------------------------------
# Edges: 16 bits, nothing at all, one token, one sample, no gradient


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jax"])
@pytest.mark.parametrize("kind", [0, 3])
def test_empty_dimensions(name, kind, rng):
    xp = BACKENDS[name]
    x = {
        "no tokens": ftw.OuterProduct(np.ones((3, 0, 4)), np.ones((3, 0, 5))),
        "no width": ftw.OuterProduct(np.ones((3, 2, 0)), np.ones((3, 2, 5))),
        "no rows": ftw.Rows(np.zeros((3, 0), dtype=int), np.ones((3, 0, 5)), 9),
        "nothing": ftw.Dense(np.ones((3, 0))),
        "bias": ftw.Dense(rng.normal(size=(3, 2))),
    }
    g = {key: np.ones(r.shape) for key, r in x.items()}
    p = {key: ftw.Diagonal(np.ones(r.shape)) if kind else ftw.Scale(1.0) for key, r in x.items()}
    expected = x["bias"].grads @ x["bias"].grads.T

    def everything(x, g, p):
        one = ftw.take(x, [0])
        return ftw.scores(x, g, p), ftw.gram(x, p), ftw.cross_gram(x, one, p), ftw.combine(x, x["bias"].grads[:, 0])

    b, K, L, w = xp.call(everything, x, g, p)
    assert_allclose(xp.numpy(b), x["bias"].grads.sum(axis=1), rtol=1e-12)
    assert_allclose(xp.numpy(K), expected, rtol=1e-12)
    assert_allclose(xp.numpy(L), expected[:, :1], rtol=1e-12)
    assert all(w[key].shape == v.shape for key, v in g.items())
    none = ftw.take(xp.tree(x), xp.array(np.zeros(0, dtype=int)))
    assert ftw.gram(none, xp.tree(p)).shape == (0, 0)
    assert ftw.scores(none, xp.tree(g), xp.tree(p)).shape == (0,)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_16_bits_end_to_end(name, dtype, rng):
    x = models.records(rng, 6, names=models.SMALL if name == "torch" else ("linear", "table"))
    g, p = models.target(rng, x), models.geometry(rng, x, 1)

    def cast(tree, to):
        def one(a):
            if not isinstance(a, np.ndarray) or a.dtype.kind != "f":
                return BACKENDS[name].array(a) if isinstance(a, np.ndarray) else a
            return torch.from_numpy(a).to(getattr(torch, to)) if name == "torch" else jax.numpy.asarray(a, dtype=to)

        return jax.tree.map(one, tree)

    half = [cast(tree, dtype) for tree in (x, g, p)]
    # the same numbers, kept in float32
    widen = (lambda a: a.float()) if name == "torch" else (lambda a: a.astype("float32"))
    wide = jax.tree.map(lambda a: widen(a) if floats(a) else a, half)
    # XLA takes long over the solver, and 16 bits do not reach it
    options = {"filter": "greedy_utility", "weight": "uniform"} if name == "jax" else {}
    choose = partial(ftw.filter_then_weight, keep=3, shortlist=5, **options)
    out, expected = ((jax.jit(choose) if name == "jax" else choose)(*trees) for trees in (half, wide))
    assert out.indices.tolist() == expected.indices.tolist()
    assert str(out.weights.dtype).endswith("float32")
    assert_allclose(out.weights, expected.weights, rtol=2e-3, atol=1e-4)
    update = ftw.combine(ftw.take(half[0], out.indices), out.weights)
    assert all(str(v.dtype).endswith("float32") for v in update.values())


# ---------------------------------------------------------------------------------------------------------------------
# Anything at all


@st.composite
def anything(draw):
    """A model of random shapes and values, sizes from nothing to some, values from denormal to infinite."""
    n, t = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-8, 8))
    names = draw(
        st.lists(st.sampled_from(["linear", "wide", "table", "tied", "bias", "gain"]), min_size=1, unique=True)
    )
    x = jax.tree.map(
        lambda a: a * scale if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a,
        models.records(rng, n, t, names=names),
    )
    if draw(st.booleans()):  # copies, and samples without a gradient
        x = ftw.take(x, rng.integers(0, n, size=n))
        x = jax.tree.map(lambda a: np.where((np.arange(n) > 0).reshape(-1, *[1] * (a.ndim - 1)), a, 0), x)
    g, p = models.target(rng, x), models.geometry(rng, x, draw(st.integers(0, 6)))
    bad = draw(st.sampled_from([None, None, None, np.nan, np.inf, -np.inf]))
    if bad is not None:
        name = names[0]
        g[name] = np.where(np.arange(g[name].size).reshape(g[name].shape) == 0, bad, g[name])
    return x, g, p, draw(st.integers(1, n)), bad


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    anything(),
    st.sampled_from(["matching", "top_k", "greedy_utility"]),
    st.sampled_from([ftw.Simplex(1.0), ftw.NonNegative(), ftw.CappedSimplex(0.7), ftw.Box(0.0, 2.0)]),
    st.sampled_from([None, 1, 0.5]),
)
def test_whatever_comes_in_what_comes_out_is_consistent(case, name, constraint, shortlist):
    x, g, p, keep, bad = case
    out = ftw.filter_then_weight(x, g, p, keep=keep, filter=name, constraint=constraint, shortlist=shortlist)
    n = next(iter(x.values())).n
    assert len(set(out.indices.tolist())) == keep
    assert set(out.indices.tolist()) <= set(range(n))
    status = ftw.Status(int(out.status))
    if bad is not None:
        assert status == ftw.Status.NOT_FINITE
    if status in (ftw.Status.NOT_FINITE, ftw.Status.INFEASIBLE, ftw.Status.NOT_PSD):
        assert np.all(np.isnan(out.weights))
        assert bad is not None or (status == ftw.Status.INFEASIBLE and keep == 1)  # one weight of at most 0.7
        return
    w = out.weights
    assert np.all(w >= 0)
    if isinstance(constraint, (ftw.Simplex, ftw.CappedSimplex)):
        assert_allclose(w.sum(), 1, rtol=1e-9)
    assert w.max() <= {ftw.CappedSimplex: 0.7, ftw.Box: 2.0}.get(type(constraint), np.inf) + 1e-12
    assert -1 - 1e-9 <= out.match <= 1 + 1e-9
    G, P = explicit.flat(x), explicit.metric(x, p)
    d = np.concatenate([g[key].reshape(-1) for key in x])
    b, chosen = G @ P @ d, w @ G[out.indices]
    assert_allclose(out.scores, b, rtol=1e-9, atol=1e-9 * (np.abs(b).max() + 1e-300))
    decrease = w @ b[out.indices] - chosen @ P @ chosen / 2
    size = np.abs(w @ b[out.indices]) + chosen @ P @ chosen
    assert_allclose(out.predicted_decrease, decrease, atol=1e-7 * size + 1e-300)
    update = ftw.combine(ftw.take(x, out.indices), w)
    flat = np.concatenate([update[key].reshape(-1) for key in x])
    assert_allclose(flat, chosen, rtol=1e-9, atol=1e-9 * (np.abs(chosen).max() + 1e-300))
    if status == ftw.Status.NOTHING_USEFUL:
        assert not np.any(b[out.indices] > 1e-12 * np.abs(b).max())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(anything(), st.integers(600, 5000))
def test_gram_of_anything(case, max_bytes):
    x, _, p, _, _ = case
    K = ftw.gram(x, p, max_bytes=max_bytes)
    G = explicit.flat(x)
    expected = G @ explicit.metric(x, p) @ G.T
    assert_allclose(K, expected, rtol=1e-9, atol=1e-9 * (np.abs(expected).max() + 1e-300))
    assert np.linalg.eigvalsh(K).min() >= -1e-9 * np.abs(K).max()
    assert_allclose(ftw.cross_gram(x, x, p), K, rtol=1e-9, atol=1e-9 * (np.abs(expected).max() + 1e-300))
