"""The step in JAX against brute force: gradients one by one, P by its formula, the reference's selection."""

import os
import re
import subprocess
import sys

import ftw_jax
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import optax
import pytest
from ftw_jax import _capture, step
from jax.sharding import Mesh, PartitionSpec
from numpy.testing import assert_allclose

import ftw


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-9), (jnp.float32, 1e-5)])
def test_adam_equals_brute_force(dtype, rtol):
    loss, params, pool, target = jax_models.mlp(dtype)
    tx = optax.adam(0.01)
    state = jax_models.warmed_up(tx, params)
    options = {} if dtype == jnp.float64 else {"solver": jax_models.light_solver}
    select = jax_models.jit(ftw_jax.filter_then_weight(loss, tx, keep=4, shortlist=None, **options))
    grads, selection = select(params, state, pool, target)

    def metric(g_T):
        return jax_models.adam_metric(state[0], params, g_T, lr=0.01)

    expected, update = jax_models.brute_force(loss, params, metric, pool, target, keep=4)
    assert selection.indices.tolist() == expected.indices.tolist()
    scale = np.max(np.abs(expected.scores))
    assert_allclose(selection.scores, expected.scores, rtol=rtol, atol=rtol * scale)
    assert_allclose(selection.weights, expected.weights, rtol=10 * rtol, atol=rtol)
    assert_allclose(jax_models.flat(grads), update, rtol=rtol, atol=10 * rtol * np.max(np.abs(update)))
    assert_allclose(selection.match, expected.match, rtol=10 * rtol)
    assert_allclose(selection.shrinkage, expected.shrinkage, rtol=100 * rtol)
    assert int(selection.status) == ftw.Status.OK
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(g.dtype == dtype for g in jax.tree.leaves(grads))
    losses = [float(loss(params, jax.tree.map(lambda x, i=i: x[i], pool))) for i in range(12)]
    assert_allclose(selection.losses, losses, rtol=1e-6)


def language_model(dtype=jnp.float64):
    """A tied embedding, layers in a scan, a norm: (loss, params, pool, target)."""
    rng = np.random.default_rng(3)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.4, dtype)

    def loss(p, tokens):
        x = p["emb"][tokens[:-1]]
        layer = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w["up"] + w["bias"]) @ w["down"], None))
        x, _ = jax.lax.scan(layer, x, p["layers"])
        logits = (x * p["scale"]) @ p["emb"].T
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=1))

    layers = {"up": draw(2, 6, 8), "bias": draw(2, 8), "down": draw(2, 8, 6)}
    params = {"emb": draw(9, 6), "layers": layers, "scale": 1 + draw(6)}
    return loss, params, jnp.asarray(rng.integers(0, 9, (16, 5))), jnp.asarray(rng.integers(0, 9, (4, 7)))


@pytest.mark.parametrize("capture", ["dense", "factors"])
def test_gram_matrix_and_scores_of_both_routes_equal_brute_force(capture):
    loss, params, pool, target = language_model()
    state = jax_models.warmed_up(optax.adam(0.01), params)
    P, operators = jax_models.adam_metric(state[0], params, 0.1 * np.ones(268), lr=0.01), {}
    traced = step._plan(loss, params, pool, target, capture, frozenset())
    for view, values in zip(traced[0].views, _unflat(P, params), strict=True):
        operators[view.name] = ftw.Diagonal(values)
    operators = step.operators_of(traced[0].views, operators)

    def products(params, *batches):
        captured = [_capture.per_sample(t, params, b) for t, b in zip(traced, batches, strict=True)]
        records, others = (c.records for c in captured)
        g_T = ftw.combine(others, jnp.full(4, 0.25))
        return (
            ftw.gram(records, operators),
            ftw.cross_gram(records, others, operators),
            ftw.scores(records, g_T, operators),
        )

    g, h = jax_models.explicit(loss, params, pool), jax_models.explicit(loss, params, target)
    truth = (g * P) @ g.T, (g * P) @ h.T, (g * P) @ h.mean(axis=0)
    for ours, expected in zip(jax_models.jit(products)(params, pool, target), truth, strict=True):
        assert_allclose(ours, expected, rtol=1e-9, atol=1e-9 * np.max(np.abs(expected)))


def _unflat(vector, params):
    """The leaves of a tree like params, from their entries one after the other."""
    ends = np.cumsum([p.size for p in jax.tree.leaves(params)])
    parts = np.split(np.asarray(vector), ends[:-1])
    return [jnp.asarray(v.reshape(p.shape)) for v, p in zip(parts, jax.tree.leaves(params), strict=True)]


def test_both_routes_give_the_same_selection():
    loss, params, pool, target = language_model()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01))
    state = jax_models.warmed_up(tx, params)
    results = [
        jax_models.jit(ftw_jax.filter_then_weight(loss, tx, keep=4, solver=jax_models.light_solver, **options))(
            params, state, pool, target
        )
        for options in ({"capture": "dense"}, {"capture": "factors", "micro_batch": 5})  # 16 is not a multiple of 5
    ]
    assert ftw_jax.capture_plan(loss, params, pool, target, capture="factors")["['emb']"][0] == "factors"
    (grads, dense), (same, factors) = results
    assert dense.indices.tolist() == factors.indices.tolist()
    assert float(dense.shrinkage) == pytest.approx(float(factors.shrinkage))
    for name in ("scores", "weights", "match", "losses", "target_loss", "predicted_decrease"):
        assert_allclose(getattr(factors, name), getattr(dense, name), rtol=1e-9, atol=1e-12, err_msg=name)
    assert_allclose(jax_models.flat(same), jax_models.flat(grads), rtol=1e-9, atol=1e-13)
    weighted = jax_models.jit(
        jax.grad(lambda p: dense.weights @ jax.vmap(loss, in_axes=(None, 0))(p, pool[dense.indices]))
    )  # the gradient is that of the weighted losses
    assert_allclose(jax_models.flat(grads), jax_models.flat(weighted(params)), rtol=1e-9, atol=1e-13)


def test_a_training_loop_traces_once_and_calls_nothing_on_the_host():
    loss, params, pool, target = jax_models.mlp(jnp.float32)
    traces = []

    def counted(p, e):
        traces.append(None)
        return loss(p, e)

    tx = optax.MultiSteps(optax.adamw(optax.linear_schedule(0.0, 0.02, 4)), 2)
    select = ftw_jax.filter_then_weight(counted, tx, keep=3)

    def step(params, state, pool):
        grads, selection = select(params, state, pool, target)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, selection

    compiled = jax_models.jit(step, donate_argnums=(0, 1))
    state = tx.init(params)
    assert "callback" not in compiled.lower(params, state, pool).as_text()
    losses, once = [], None
    for number in range(12):
        params, state, selection = compiled(
            params, state, jax.tree.map(lambda x, i=number: jnp.roll(x, i, axis=0), pool)
        )
        once = len(traces) if number == 0 else once
        losses.append(float(selection.target_loss))
        assert int(selection.status) == ftw.Status.OK
    assert len(traces) == once
    assert losses[-1] < losses[0]


def test_vmap_is_one_selection_after_the_other():
    loss, params, pool, target = jax_models.mlp()
    tx = optax.sgd(0.1)
    select = ftw_jax.filter_then_weight(loss, tx, keep=3, solver=jax_models.light_solver)
    pools = jax.tree.map(lambda x: jnp.stack([x, x[::-1] * 0.7]), pool)
    grads, several = jax_models.jit(jax.vmap(select, in_axes=(None, None, 0, None)))(
        params, tx.init(params), pools, target
    )
    single = jax_models.jit(select)
    for i in range(2):
        g, one = single(params, tx.init(params), jax.tree.map(lambda x, i=i: x[i], pools), target)
        assert several.indices[i].tolist() == one.indices.tolist()
        assert_allclose(several.weights[i], one.weights, rtol=1e-9)
        assert_allclose(grads["out"]["kernel"][i], g["out"]["kernel"], rtol=1e-9)


CHEAP = {"filter": "top_k", "weight": "uniform", "guard": 0.0}  # no QP: seconds less to compile


def test_the_pools_own_mean_is_the_target_by_default():
    loss, params, pool, _ = jax_models.mlp()
    tx = optax.sgd(0.1)
    select = jax_models.jit(ftw_jax.filter_then_weight(loss, tx, keep=12, shortlist=None, **CHEAP))
    grads, selection = select(params, tx.init(params), pool)
    assert float(selection.match) == pytest.approx(1)
    assert float(selection.target_loss) == pytest.approx(float(jnp.mean(selection.losses)))
    assert_allclose(jax_models.flat(grads), jax_models.explicit(loss, params, pool).mean(axis=0), rtol=1e-9)


def test_values_come_back_in_the_status():
    loss, params, pool, target = jax_models.mlp()

    def run(tx, pool=pool, **options):
        select = jax_models.jit(ftw_jax.filter_then_weight(loss, tx, keep=3, **CHEAP, **options))
        return select(params, tx.init(params), pool, target)

    broken = {**pool, "x": pool["x"].at[4, 0, 0].set(jnp.nan)}
    grads, selection = run(optax.adam(0.1), broken)
    assert int(selection.status) == ftw.Status.NOT_FINITE
    assert np.all(np.isnan(selection.weights))
    assert np.all(np.isnan(jax_models.flat(grads)))
    assert np.argwhere(np.isnan(selection.losses)).tolist() == [[4]]
    assert int(run(optax.set_to_zero())[1].status) == ftw.Status.NOTHING_USEFUL
    assert int(run(optax.scale_by_adam())[1].status) == ftw.Status.NOT_PSD
    assert int(run(optax.adam(lambda count: 0.0 * count))[1].status) == ftw.Status.OK


def test_a_response_stated_by_hand():
    loss, params, pool, target = jax_models.mlp()
    tx = optax.rprop(0.1)
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"ScaleByRpropState.*geometry="):
        jax.eval_shape(ftw_jax.filter_then_weight(loss, tx, keep=3), params, state, pool, target)

    def plain(p, s, gradient):
        assert jax.tree.structure(gradient) == jax.tree.structure(p)
        assert s is state
        return {jax.tree_util.keystr(path): ftw.Scale(2.0) for path, _ in jax.tree_util.tree_flatten_with_path(p)[0]}

    g = jax_models.explicit(loss, params, pool)
    g_T = jax_models.explicit(loss, params, target).mean(axis=0)
    select = ftw_jax.filter_then_weight(loss, tx, keep=3, geometry=plain, **CHEAP)
    _, selection = jax_models.jit(lambda pool: select(params, state, pool, target))(pool)
    assert_allclose(selection.scores, 2 * g @ g_T, rtol=1e-9)
    more = lambda p, s, g: {**plain(p, state, g), "['on']": ftw.Scale(2.0)}  # noqa: E731
    with pytest.raises(ValueError, match=r"geometry has an operator for \['on'\], which is no parameter"):
        jax.eval_shape(ftw_jax.filter_then_weight(loss, tx, keep=3, geometry=more), params, state, pool, target)
    with pytest.raises(ValueError, match=r"geometry has no operator for \['in'\]\['bias'\]"):
        jax.eval_shape(
            ftw_jax.filter_then_weight(loss, tx, keep=3, geometry=lambda p, s, g: {}), params, state, pool, target
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep=0 must be at least 1"),
        ({"keep": 2.0}, TypeError, "keep must be an int, got float"),
        ({"keep": 99}, ValueError, "keep=99 must lie in 1 .. 12"),
        ({"tx": 3}, TypeError, "tx must be an optax"),
        ({"loss": 3}, TypeError, "loss must be a function"),
        ({"loss": lambda p, e: e["x"]}, TypeError, r"loss\(params, example\) must .* scalar.*float64\[3, 5\]"),
        ({"micro_batch": 0}, ValueError, "micro_batch=0 must be an int of at least 1"),
        ({"capture": "all"}, ValueError, "capture='all' is not one of auto, dense, factors"),
        ({"damping": -1}, ValueError, "damping=-1"),
        ({"damping": float("inf")}, ValueError, "damping=inf"),
        ({"filter": "best"}, ValueError, "filter='best'"),
        ({"guard": 2}, ValueError, "guard=2"),
        ({"geometry": {}}, TypeError, "geometry must be a function"),
        ({"pool": {"x": jnp.zeros((4, 3)), "y": jnp.zeros(3)}}, ValueError, r"array of pool must have .*'y'.*: \(3,\)"),
        ({"target": {"x": jnp.zeros((0, 3, 5)), "y": jnp.zeros((0, 3, 2))}}, ValueError, "target holds no samples"),
        ({"target": jnp.zeros((3, 5))}, ValueError, "target is PyTreeDef.*the pool PyTreeDef"),
        ({"linearise": "yes"}, TypeError, "linearise must be a bool, got str"),
        ({"params": {"w": jnp.zeros(3, int)}}, TypeError, r"params: \['w'\] is int64"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(options, error, message):
    loss, params, pool, target = jax_models.mlp()
    given = {"loss": loss, "tx": optax.sgd(0.1), "keep": 3, "params": params, "pool": pool, "target": target, **options}
    arrays = [given.pop(name) for name in ("params", "pool", "target")]

    def run():
        select = ftw_jax.filter_then_weight(given.pop("loss"), given.pop("tx"), **given)
        jax.eval_shape(select, arrays[0], (optax.EmptyState(),) * 2, *arrays[1:])

    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "matchin"}, "filter='matchin' is not one of top_k, matching, greedy_utility"),
        ({"weight": "equal"}, "weight='equal'"),
        ({"guard": 7}, "guard=7"),
        ({"guard": -0.1}, "guard=-0.1"),
        ({"ridge": -1.0}, "ridge=-1.0"),
        ({"shortlist": 0.0}, "shortlist=0.0"),
        ({"shortlist": "half"}, "shortlist='half'"),
        ({"constraint": "simplex"}, "constraint is a str"),
        ({"quota": (1, 2)}, "quota must be ftw.Quota"),
        ({"fill": "best"}, "fill='best' is not one of raise, relax"),
        ({"explain": 1}, "explain must be a bool"),
        ({"solver": 3}, "solver is a int"),
        ({"score": "fast"}, "score='fast' is not one of exact, forward"),
        ({"train_on_target": True}, "train_on_target=True"),
        ({"keep": 3, "constraint": ftw.Box(np.zeros(2), np.ones(2))}, "keep=3 must lie in 1 .. 2"),
    ],
    ids=str,
)
def test_options_are_checked_before_a_pool_is_there(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ftw_jax.filter_then_weight(lambda p, x: 0.0, optax.sgd(0.1), **{"keep": 3, **options})


def test_errors_of_others_say_where_they_come_from():
    loss, params, pool, target = jax_models.mlp()
    tx = optax.adam(0.1)
    select = ftw_jax.filter_then_weight(loss, tx, keep=3, **CHEAP)
    wide = {**target, "x": jnp.zeros((4, 3, 6))}
    cases = (
        ((params, tx.init(params), pool, wide), "for an example of target, .*'x': 'float64\\[3, 6\\]'"),
        ((params, optax.sgd(0.1).init(params), pool, target), "opt_state must be what tx.init"),
    )
    for arguments, note in cases:
        with pytest.raises((TypeError, AttributeError)) as caught:
            jax.eval_shape(select, *arguments)
        assert re.search(note, "\n".join(caught.value.__notes__))
    other = tx.init({**params, "out": {"kernel": jnp.zeros((1, 7, 2))}})
    with pytest.raises(TypeError, match=r"\['out'\]\['kernel'\] is \(1, 7, 2\), the parameter \(7, 2\)"):
        jax.eval_shape(select, params, other, pool, target)


def test_few_targets_are_logged_once_when_it_is_traced(caplog):
    loss, params, pool, target = jax_models.mlp(m=3)
    tx = optax.sgd(0.1)
    step._warn_once.cache_clear()
    for guard in (0.0, 0.3, 0.3):
        options = {**CHEAP, "guard": guard}
        jax.eval_shape(ftw_jax.filter_then_weight(loss, tx, keep=3, **options), params, tx.init(params), pool, target)
        assert len(caplog.records) == (guard > 0)
    assert "the target has 3 samples" in caplog.text


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ftw_jax

assert len(jax.devices()) == 4
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
loss = lambda p, e: jnp.mean((jnp.tanh(e["x"] @ p["a"]) @ p["b"] - e["y"]) ** 2)
params, pool = {"a": draw(5, 7), "b": draw(7, 2)}, {"x": draw(16, 3, 5), "y": draw(16, 3, 2)}
target = {"x": draw(4, 3, 5), "y": draw(4, 3, 2)}
tx = optax.adam(0.01)
step = jax.jit(ftw_jax.filter_then_weight(loss, tx, keep=4, capture="factors"))
grads, one = step(params, tx.init(params), pool, target)
mesh = Mesh(np.array(jax.devices()), ("data",))
spread = jax.device_put(pool, NamedSharding(mesh, PartitionSpec("data")))
everywhere = jax.device_put((params, tx.init(params), target), NamedSharding(mesh, PartitionSpec()))
assert len(spread["x"].sharding.device_set) == 4
same, many = step(*everywhere[:2], spread, everywhere[2])
assert one.indices.tolist() == many.indices.tolist()
np.testing.assert_allclose(many.weights, one.weights, rtol=1e-4, atol=1e-6)
np.testing.assert_allclose(many.scores, one.scores, rtol=1e-4, atol=1e-6)
np.testing.assert_allclose(same["a"], grads["a"], rtol=1e-4, atol=1e-5)
print("the same on", len(many.losses.sharding.device_set), "devices")
"""


def test_a_pool_spread_over_devices():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "the same on 4 devices\n", done.stderr


def test_under_shard_map_the_remedy_is_named():
    loss, params, pool, target = jax_models.mlp()
    tx = optax.sgd(0.1)
    select = ftw_jax.filter_then_weight(loss, tx, keep=3, **CHEAP)
    each = PartitionSpec("data")

    def shapes(**options):
        mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
        specs = {"in_specs": (PartitionSpec(), PartitionSpec(), each, PartitionSpec()), "out_specs": PartitionSpec()}
        step = jax.shard_map(select, mesh=mesh, **specs, **options)
        return jax.eval_shape(step, params, tx.init(params), pool, target)

    named = r"pool\['x'\] \(12, 3, 5\) varies over \['data'\] of a shard_map: .*check_vma=False"
    with pytest.raises(ValueError, match=named):
        shapes()
    assert shapes(check_vma=False)[1].indices.shape == (3,)


def test_a_loss_without_a_batched_form_is_walked_one_by_one():
    def loss(params, x):  # (5, 4)
        return jnp.sum(jax.lax.ragged_dot(x, params["experts"], jnp.array([2, 3])) ** 2)

    params, pool = {"experts": jnp.ones((2, 4, 3))}, jnp.ones((6, 5, 4))
    with pytest.raises(NotImplementedError):
        jax.eval_shape(jax.vmap(jax.grad(loss), in_axes=(None, 0)), params, pool)
    tx = optax.sgd(0.1)
    select = ftw_jax.filter_then_weight(loss, tx, keep=3, micro_batch=1, **CHEAP)
    grads, _ = jax.eval_shape(select, params, tx.init(params), pool)
    assert grads["experts"].shape == (2, 4, 3)


def test_the_same_selection_in_torch():
    torch = pytest.importorskip("torch")
    from ftw_torch import FilterThenWeight

    _, params, pool, target = jax_models.mlp(jnp.float64)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    as_torch = lambda tree: {k: torch.tensor(np.asarray(v)) for k, v in tree.items()}  # noqa: E731

    def per_sample(model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).mean((1, 2))

    for _ in range(3):
        optimizer.zero_grad()
        per_sample(model, as_torch(target)).mean().backward()
        optimizer.step()

    named = dict(model.named_parameters())
    copied = lambda f: {n: jnp.asarray(f(p).detach().numpy()) for n, p in named.items()}  # noqa: E731
    params = copied(lambda p: p)
    tx = optax.adamw(0.01, weight_decay=0.1)
    state = tx.init(params)
    moments = {
        "mu": copied(lambda p: optimizer.state[p]["exp_avg"]),
        "nu": copied(lambda p: optimizer.state[p]["exp_avg_sq"]),
    }
    state = (state[0]._replace(count=jnp.asarray(3, jnp.int32), **moments), *state[1:])

    def loss(p, e):
        hidden = jnp.tanh(e["x"] @ p["0.weight"].T + p["0.bias"])
        return jnp.mean((hidden @ p["2.weight"].T + p["2.bias"] - e["y"]) ** 2)

    ours = jax_models.jit(ftw_jax.filter_then_weight(loss, tx, keep=4))(params, state, pool, target)[1]
    theirs = FilterThenWeight(model, optimizer, per_sample, keep=4).select(as_torch(pool), as_torch(target))
    assert ours.indices.tolist() == theirs.indices.tolist()
    assert_allclose(ours.weights, theirs.weights.numpy(), atol=1e-5)
    assert_allclose(ours.scores, theirs.scores.numpy(), rtol=1e-6)
    assert_allclose(ours.shrinkage, float(theirs.shrinkage), rtol=1e-5)
