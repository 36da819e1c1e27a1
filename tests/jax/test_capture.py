"""Factors found in a loss's program against vmap(grad): plain, linen, nnx, equinox, scans, rematerialisation."""

import math

import equinox as eqx
import explicit
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import pytest
from flax import linen, nnx
from ftw_jax import _capture, _layout
from numpy.testing import assert_allclose

import ftw

N, T, D, VOCAB = 3, 4, 6, 11
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape) * 0.5)


def pool():
    return {"x": normal(N, T, D), "ids": jnp.asarray(RNG.integers(0, VOCAB, (N, T))), "y": normal(N, T, D)}


def squares(out, example):
    return jnp.mean((out - example["y"]) ** 2)


def plain():
    """Both orientations, a bias, a parameter used twice, an unused one, a vector in, a three-way kernel."""
    params = {
        "a": normal(D, 5), "b": normal(D, 5), "bias": normal(5), "twice": normal(D, D), "unused": normal(2, 3),
        "heads": normal(D, 2, 3), "back": normal(2, 3, D),
    }  # fmt: skip

    def loss(p, e):
        x = e["x"] @ p["twice"]
        x = jnp.tanh(x @ p["twice"])
        h = jax.nn.gelu(x @ p["a"] + p["bias"])
        h = h @ p["b"].T + 0.1 * jnp.sum(p["a"] ** 2)  # a: a site, and another use
        q = jnp.einsum("td,dhk->thk", h, p["heads"])
        return squares(jnp.einsum("thk,hkd->td", q, p["back"]), e) + jnp.sum(p["twice"] @ e["x"][0]) ** 2

    return (
        loss,
        params,
        {"['a']": "Sum", "['b']": "OuterProduct", "['bias']": "Dense", "['twice']": "Sum", "['heads']": "OuterProduct"},
    )


def tied():
    """An embedding that is the head too, positions, indices from the end and out of range."""

    def loss(p, e):
        x = p["emb"][e["ids"]] + jnp.take(p["emb"], e["ids"] - VOCAB, axis=0) + p["pos"][:T]
        x = x + jnp.take(p["emb"], e["ids"] + 5, axis=0, mode="clip")
        x = x + jnp.nan_to_num(jnp.take(p["emb"], e["ids"] * 2, axis=0, mode="fill", fill_value=0.0))
        logits = x @ p["emb"].T
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), e["ids"][:, None], axis=1))

    return loss, {"emb": normal(VOCAB, D), "pos": normal(T + 2, D)}, {"['emb']": "Sum", "['pos']": "Dense"}


def scanned():
    """A stack of layers walked over by a scan, rematerialised; a recurrent matrix inside; a nested scan."""
    params = {
        "stack": normal(3, D, D),
        "bias": normal(3, D),
        "rnn": normal(D, D),
        "nest": normal(2, 3, D, D),
        "out": normal(D, D),
    }

    @jax.checkpoint
    def layer(x, p):
        return x + jnp.tanh(x @ p["w"] + p["b"]), None

    def loss(p, e):
        x, _ = jax.lax.scan(layer, e["x"], {"w": p["stack"], "b": p["bias"]})

        def cell(h, x):
            h = jnp.tanh(h @ p["rnn"] + x)
            return h, h

        _, x = jax.lax.scan(cell, jnp.zeros(D), x, reverse=True)

        def outer(x, w):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ (w @ w.T) + p["rnn"][0] + x @ w), None), x, w)[0], None

        x, _ = jax.lax.scan(outer, x, p["nest"])
        return squares(jax.jit(lambda x, w: jnp.sin(x @ w))(x, p["out"]), e)

    return (
        loss,
        params,
        {
            "['stack']": "OuterProduct",
            "['rnn']": "Sum",
            "['nest']": "Sum",
            "['out']": "OuterProduct",
            "['bias']": "Dense",
        },
    )


def mixed_precision():
    """Weights cast to bfloat16 for the product."""

    def loss(p, e):
        h = e["x"].astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
        return squares(h.astype(jnp.float64), e)

    return loss, {"w": normal(D, D)}, {"['w']": "OuterProduct"}


def from_linen():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            h = linen.MultiHeadDotProductAttention(num_heads=2, param_dtype=jnp.float64)(
                linen.LayerNorm(param_dtype=jnp.float64)(x)
            )
            return x + linen.Dense(D, param_dtype=jnp.float64)(jax.nn.relu(h)), None

    class Model(linen.Module):
        @linen.compact
        def __call__(self, ids):
            x = linen.Embed(VOCAB, D, param_dtype=jnp.float64)(ids)
            x, _ = linen.scan(linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(
                x, None
            )
            return linen.Conv(D, (2,), param_dtype=jnp.float64)(x)

    model = Model()
    params = model.init(jax.random.key(0), jnp.zeros(T, int))
    return lambda p, e: squares(model.apply(p, e["ids"]), e), params, {
        "['embedding']": "Rows", "['query']['kernel']": "OuterProduct", "['Conv_0']['kernel']": "Dense",
        "['Dense_0']['kernel']": "OuterProduct",
    }  # fmt: skip


def from_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.emb = nnx.Embed(VOCAB, D, rngs=rngs, param_dtype=jnp.float64)
            self.attention = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs, param_dtype=jnp.float64)
            self.norm = nnx.LayerNorm(D, rngs=rngs, param_dtype=jnp.float64)
            self.out = nnx.Linear(D, D, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, ids):
            return self.out(self.attention(self.norm(self.emb(ids))))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    return (
        lambda p, e: squares(nnx.merge(graph, p, rest)(e["ids"]), e),
        params,
        {
            "['embedding'].value": "Rows",
            "['query']['kernel'].value": "OuterProduct",
            "['norm']['scale'].value": "Dense",
        },
    )


def from_equinox():
    keys = jax.random.split(jax.random.key(0), 3)
    with jax.enable_x64(True):
        model = (
            eqx.nn.Embedding(VOCAB, D, key=keys[0]),
            eqx.nn.Linear(D, 8, key=keys[1]),
            eqx.nn.Linear(8, D, key=keys[2]),
        )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(p, e):
        emb, up, down = eqx.combine(p, static)
        return squares(jax.vmap(down)(jax.nn.silu(jax.vmap(up)(jax.vmap(emb)(e["ids"])))), e)

    return loss, params, {"[0].weight": "Rows", "[1].weight": "OuterProduct", "[1].bias": "Dense"}


MODELS = [plain, tied, scanned, mixed_precision, from_linen, from_nnx, from_equinox]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_factors_are_the_gradients(model):
    loss, params, kinds = model()
    batch = pool()
    truth_losses, truth = jax_models.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))(params, batch)
    traced = _capture.trace(loss, params, batch)
    chosen, stated = _capture.routes([traced], params, "factors")
    captured = jax_models.jit(lambda p, b: _capture.per_sample(traced, p, b))(params, batch)
    assert_allclose(captured.losses, truth_losses, rtol=1e-12)
    rtol = 1e-2 if model is mixed_precision else 1e-10
    leaves, found = jax.tree_util.tree_flatten_with_path(truth)[0], {}
    for leaf, (view, (path, g)) in enumerate(zip(traced.views, leaves, strict=True)):
        records = [captured.records[name] for name in view.names]
        full = np.stack([explicit.dense(r) for r in records], axis=1)  # (n, layers, ...)
        assert view.name == jax.tree_util.keystr(path)
        assert_allclose(np.reshape(full, g.shape), g, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(g)) + 1e-9))
        found |= {suffix: {type(r).__name__ for r in records} for suffix in kinds if view.name.endswith(suffix)}
        assert stated[view.name][0] == ("factors" if leaf in chosen else "dense")
    assert found == {suffix: {kind} for suffix, kind in kinds.items()}


def test_no_gradient_of_a_captured_matrix_is_formed():
    """The backward pass goes to activations only: XLA counts two products a matrix, not three."""
    width = 256

    def loss(p, e):
        x = e
        for w in p:
            x = jnp.tanh(x @ w)
        return jnp.mean(x)

    params = [jnp.zeros((width, width)) for _ in range(3)]
    batch = jnp.zeros((4, 32, width))
    traced = _capture.trace(loss, params, batch)
    cost = jax.jit(lambda p, b: _capture.per_sample(traced, p, b)).lower(params, batch).compile().cost_analysis()
    one = 2 * 4 * 32 * width**2
    assert 5 * one < cost["flops"] < 5.3 * one  # three forward, two backward: the first layer's input needs none


def test_routes_by_stated_memory():
    loss, params, _ = plain()
    batch = pool()
    traced = _capture.trace(loss, params, batch)
    assert _capture.routes([traced], params, "dense")[0] == frozenset()
    _, stated = _capture.routes([traced], params, "factors")
    assert {name for name, (route, _) in stated.items() if route == "factors"} == {
        f"['{n}']" for n in ("a", "b", "twice", "heads", "back")
    }
    assert stated["['b']"] == ("factors", 8 * T * (D + 5))
    assert stated["['a']"] == ("factors", 8 * T * (D + 5) + 8 * D * 5)
    assert stated["['bias']"] == ("dense", 8 * 5)
    wide = {"w": normal(64, 64)}
    traced = _capture.trace(lambda p, e: jnp.sum(e @ p["w"]), wide, normal(2, 3, 64))
    assert _capture.routes([traced], wide, "auto")[1] == {"['w']": ("factors", 8 * 3 * 128)}
    traced = _capture.trace(lambda p, e: jnp.sum(e @ p["w"]), wide, normal(2, 40, 64))
    assert _capture.routes([traced], wide, "auto")[1] == {"['w']": ("dense", 8 * 64 * 64)}


def test_a_matrix_seen_in_two_ways_is_written_out():
    params = {"w": normal(2, 3, D)}

    def loss(p, e):
        return jnp.sum(jnp.einsum("td,abd->tab", e["x"], p["w"])) + jnp.sum(
            jnp.einsum("ta,abd->tbd", e["x"][:, :2], p["w"]) ** 2
        )

    traced = _capture.trace(loss, params, pool())
    assert not traced.plan.sites
    assert traced.plan.rest == {0}
    assert math.prod(traced.views[0].shape) == 6 * D


def test_the_same_gradient_either_way():
    loss, params, _ = scanned()
    batch = pool()
    traced = _capture.trace(loss, params, batch)
    weights = jnp.asarray([0.2, 0.0, 0.8])

    @jax_models.jit
    def update(params):
        parts = ftw.combine(_capture.per_sample(traced, params, batch).records, weights)
        return [v.join([parts[i] for i in v.names]) for v in traced.views]

    joined = update(params)
    expected = jax_models.jit(jax.grad(lambda p: weights @ jax.vmap(loss, in_axes=(None, 0))(p, batch)))(params)
    assert_allclose(jax_models.flat(joined), jax_models.flat(expected), rtol=1e-9, atol=1e-12)


def test_small_parameters_share_a_record_and_are_told_apart():
    loss, params, _ = plain()
    batch = pool()
    traced = _capture.trace(loss, params, batch, only=frozenset())
    shared = _capture.sharing(traced, params, apart=frozenset({"['a']"}))
    assert [v.name for v in shared.views if v.shared is None] == ["['a']"]
    weights = jnp.asarray([0.5, 0.0, 2.0])
    trees = []
    for t, count in ((traced, 7), (shared, 2)):
        records = jax_models.jit(lambda p, b, t=t: _capture.per_sample(t, p, b, 2))(params, batch).records
        assert len(records) == count
        trees.append(_layout.tree_of(jax.tree.structure(params), t.views, ftw.combine(records, weights)))
    for one, other in zip(*map(jax.tree.leaves, trees), strict=True):
        assert_allclose(other, one, rtol=1e-12)
