"""The response read off an optimizer's program, against its true next update and against the formulas of the core."""

import ftw_jax
import jax
import jax.numpy as jnp
import jax_models
import numpy as np
import optax
import optax.contrib
import pytest
from numpy.testing import assert_allclose

import ftw

NAMES = ("['b']", "['t']", "['w']")
WARMUP = optax.linear_schedule(0.0, 1e-2, 10)
TWO_GROUPS = {"w": "adam", "b": "sgd", "t": "none"}


def params():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in (("w", (6, 4)), ("b", (4,)), ("t", (3, 5)))}


def gradient(seed):
    rng = np.random.default_rng(100 + seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.3), params())


def flipped(g, seed=7):
    """The same magnitudes under other signs: every second moment and norm of the gradient stays what it is."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x * rng.choice([-1.0, 1.0], size=x.shape), g)


def relative(change, other):
    a, b = jax_models.flat(change), jax_models.flat(other)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def predict(tx, p, state, anticipate, g):
    """The next change at g, by the affine function at ``anticipate``."""
    updates = ftw_jax.linear_updates(tx, p, state, anticipate=anticipate)
    assert tuple(sorted(updates)) == NAMES
    changes = {
        name: -(u.offset + u.operator.apply(x))
        for (name, u), x in zip(updates.items(), jax.tree.leaves(g), strict=True)
    }
    return [jnp.broadcast_to(changes[name], x.shape) for name, x in zip(NAMES, jax.tree.leaves(g), strict=True)]


EVEN = {  # what only scales the gradient depends on its magnitudes alone, in every state
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(WARMUP, momentum=0.9, nesterov=True),
    "adam": optax.adam(WARMUP),
    "adamw": optax.adamw(1e-3, weight_decay=0.1),
    "nadam": optax.nadam(1e-3),
    "nadamw": optax.nadamw(1e-3),
    "radam": optax.radam(1e-3),
    "amsgrad": optax.amsgrad(1e-3),
    "adagrad": optax.adagrad(1e-2),
    "rmsprop": optax.rmsprop(1e-3, momentum=0.9),
    "rmsprop, bias-corrected": optax.chain(
        optax.scale_by_rms(eps_in_sqrt=False, bias_correction=True), optax.scale(-1e-3)
    ),
    "adamax": optax.adamax(1e-3),
    "adamaxw": optax.adamaxw(1e-3),
    "yogi": optax.yogi(1e-3),
    "novograd": optax.novograd(1e-3),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "adafactor, momentum": optax.adafactor(1e-2, momentum=0.9, weight_decay_rate=1e-3),
    "ademamix": optax.contrib.ademamix(1e-3),
    "clip by norm": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(WARMUP)),
    "clip": optax.chain(optax.clip(0.1), optax.sgd(0.1, momentum=0.9)),
    "clip by block": optax.chain(optax.clip_by_block_rms(0.1), optax.adam(1e-2)),
    "injected": optax.inject_hyperparams(optax.adamw)(WARMUP, b1=0.8),
    "partition": optax.partition(
        {"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-2), "none": optax.set_to_zero()}, TWO_GROUPS
    ),
    "masked": optax.chain(
        optax.scale_by_adam(),
        optax.masked(optax.add_decayed_weights(0.1), lambda p: {**dict.fromkeys(p, True), "b": False}),
        optax.scale(-0.1),
    ),
    "if finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    "named": optax.named_chain(("adam", optax.scale_by_adam(mu_dtype=jnp.float32)), ("lr", optax.scale(-0.1))),
    "every third step": optax.MultiSteps(optax.sgd(1e-3, momentum=0.9), 3),
}  # fmt: skip
AT_THE_START = {  # the same while the first moment is zero
    "centred": optax.rmsprop(1e-3, centered=True),
    "adabelief": optax.adabelief(1e-3),
    "lamb": optax.lamb(1e-3),
    "lars": optax.lars(1e-3, weight_decay=0.0),
    "lion": optax.lion(1e-3),
    "sign": optax.sign_sgd(1e-3),
    "adan": optax.adan(1e-3),
}


@pytest.mark.parametrize(
    ("name", "steps"),
    [(n, 3) for n in EVEN] + [(n, 0) for n in ("sgd", "adam", "adafactor")] + [(n, 0) for n in AT_THE_START],
)
def test_predicts_the_true_update(name, steps):
    tx = {**EVEN, **AT_THE_START}[name]
    p, a = params(), gradient(0)
    state = jax_models.warmed_up(tx, p, steps)
    other = flipped(a)
    truth = tx.update(other, state, p)[0]
    predicted = predict(tx, p, state, a, other)
    if all(float(jnp.max(jnp.abs(x))) == 0 for x in jax.tree.leaves(truth)):
        assert all(float(jnp.max(jnp.abs(x))) == 0 for x in predicted)
    else:
        assert relative(predicted, truth) < 1e-6


def test_lion_is_linear_with_its_magnitude_held():
    tx, p, a = optax.lion(1e-3, weight_decay=0.0), params(), gradient(0)
    state = jax_models.warmed_up(tx, p)
    for name, update in ftw_jax.linear_updates(tx, p, state, anticipate=a).items():
        key = name[2]
        size = jnp.abs(0.1 * a[key] + 0.9 * state[0].mu[key])
        assert_allclose(update.operator.values, 1e-3 * 0.1 / size, rtol=1e-9)
        assert_allclose(-(update.offset + update.operator.apply(a[key])), tx.update(a, state, p)[0][key], rtol=1e-9)


def test_muon_is_the_derivative_of_the_polar_factor():
    """With so many steps that its orthogonalisation is exact, Muon's own derivative is the operator's."""
    tx = optax.contrib.muon(1e-2, ns_coeffs=((1.5, -0.5, 0.0),) * 30, ns_steps=30, weight_decay=0.1)
    p, a, direction = params(), jax.tree.map(np.asarray, gradient(0)), gradient(5)  # NumPy's arrays will do
    state = tx.init(p)
    state = jax_models.jit(tx.update)(gradient(1), state, p)[1]
    operators = jax_models.jit(lambda state: ftw_jax.geometry(tx, p, state, anticipate=a, damping=0.0))(state)
    _, change = jax_models.jit(lambda g, d: jax.jvp(lambda g: tx.update(g, state, p)[0], (g,), (d,)))(a, direction)
    for key in ("w", "t"):  # tall and wide
        assert isinstance(operators[f"['{key}']"], ftw.Polar)
        assert_allclose(operators[f"['{key}']"].apply(direction[key]), -change[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_equals_the_formulas_of_the_core(damping):
    p, a = params(), gradient(0)
    tx = optax.adamw(1e-3, b1=0.8, b2=0.99, eps=1e-4, weight_decay=0.1)
    state = jax_models.warmed_up(tx, p)
    updates = ftw_jax.linear_updates(tx, p, state, anticipate=a, damping=damping)
    for name, key in zip(NAMES, "btw", strict=True):
        adam = state[0]
        expected = ftw.optimizers.adamw(
            adam.mu[key], adam.nu[key], adam.count, lr=1e-3, betas=(0.8, 0.99), eps=1e-4, weight_decay=0.1,
            param=p[key], anticipate=a[key], damping=damping,
        )  # fmt: skip
        assert_allclose(updates[name].operator.values, expected.operator.values, rtol=1e-9)
        assert_allclose(updates[name].offset, expected.offset, rtol=1e-7)
    state = jax_models.warmed_up(optax.sgd(0.1, momentum=0.9, nesterov=True), p)
    updates = ftw_jax.linear_updates(optax.sgd(0.1, momentum=0.9, nesterov=True), p, state, anticipate=a)
    expected = ftw.optimizers.sgd(state[0].trace["w"], lr=0.1, momentum=0.9, nesterov=True)
    assert_allclose(updates["['w']"].operator.value, expected.operator.value, rtol=1e-12)
    assert_allclose(updates["['w']"].offset, expected.offset, rtol=1e-7, atol=1e-12)


def test_a_parameter_that_was_never_touched_has_no_response():
    tx, p = optax.adam(1e-3), params()
    a = {**gradient(0), "t": jnp.zeros((3, 5))}
    for options in (tx, optax.rmsprop(1e-3)):
        operators = ftw_jax.geometry(options, p, options.init(p), anticipate=a)
        assert not np.any(np.asarray(operators["['t']"].values))
        assert np.all(np.asarray(operators["['w']"].values) > 0)


def test_a_learning_rate_of_zero_is_looked_through():
    p, a = params(), gradient(0)
    tx = optax.partition(
        {"adam": optax.adamw(WARMUP), "sgd": optax.sgd(WARMUP), "none": optax.set_to_zero()}, TWO_GROUPS
    )
    state = tx.init(p)
    for update in ftw_jax.linear_updates(tx, p, state, anticipate=a).values():
        assert not np.any(np.asarray(update.operator.apply(jnp.ones(()))))
    operators = ftw_jax.geometry(tx, p, state, anticipate=a, damping=0.0)
    without = optax.partition(
        {"adam": optax.adamw(1.0), "sgd": optax.sgd(1.0), "none": optax.set_to_zero()}, TWO_GROUPS
    )
    expected = ftw_jax.geometry(without, p, without.init(p), anticipate=a, damping=0.0)
    assert_allclose(operators["['w']"].values, expected["['w']"].values, rtol=1e-9)
    assert_allclose(operators["['b']"].value, 1.0)
    assert float(operators["['t']"].value) == 0

    one = optax.partition({"adam": optax.adamw(WARMUP), "sgd": optax.sgd(0.1), "none": optax.set_to_zero()}, TWO_GROUPS)
    operators = ftw_jax.geometry(one, p, one.init(p), anticipate=a)  # not all are zero: the ratio is
    assert not np.any(np.asarray(operators["['w']"].values))
    assert float(operators["['b']"].value) == 0.1


def test_accumulation_is_looked_through():
    tx, p, a = optax.MultiSteps(optax.sgd(0.1), 3), params(), gradient(0)
    state = tx.init(p)
    for steps, own in ((0, 0.1), (1, 0.05), (2, 0.1 / 3)):  # the running mean of optax: 1, 1/2, 1/3
        operators = ftw_jax.geometry(tx, p, state, anticipate=a)
        assert_allclose([operators[n].value for n in NAMES], own)
        now = ftw_jax.linear_updates(tx, p, state, anticipate=a)
        assert_allclose([now[n].operator.value for n in NAMES], own if steps == 2 else 0.0)
        state = jax_models.jit(tx.update)(a, state, p)[1]


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.centralize(), r"update of \['t'\] goes through 'sub of a nonlinear function"),
        (optax.flatten(optax.adam(1e-3)), r"update of \['b'\] goes through 'concatenate'.*ScaleByAdamState"),
        (optax.rprop(1e-3), r"\['b'\] is a nonlinear function of its gradient.*ScaleByRpropState"),
        (optax.stateless(lambda g, p: jax.tree.map(lambda x: x**3, g)), r"\['b'\] is a nonlinear function"),
        (optax.stateless(lambda g, p: jax.tree.map(lambda x: x + x**2, g)), r"goes through 'add of a nonlinear"),
        (optax.stateless(lambda g, p: jax.tree.map(lambda x: x[::-1], g)), r"\['b'\] goes through 'rev'"),
        (optax.stateless(lambda g, p: {**g, "w": g["w"] + jnp.ones((6, 3)) @ g["t"][:, :4]}), r"\['w'\] .* 'slice'"),
        (optax.stateless(lambda g, p: {**g, "w": g["w"] @ jnp.eye(4)}), r"\['w'\] goes through 'dot_general'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tx, message):
    p = params()
    with pytest.raises(TypeError, match=message):
        ftw_jax.geometry(tx, p, tx.init(p), anticipate=gradient(0))


SMOOTH = {  # acts on each entry by itself, the second part of the chain on what the first gives
    "arctan": optax.chain(optax.stateless(lambda g, p: jax.tree.map(jnp.arctan, g)), optax.sgd(0.1)),
    "cubic": optax.chain(optax.trace(0.9), optax.stateless(lambda g, p: jax.tree.map(lambda x: -x - x**3, g))),
    "one leaf": optax.chain(optax.stateless(lambda g, p: {**g, "w": jnp.sinh(g["w"])}), optax.sgd(0.1, momentum=0.9)),
}  # fmt: skip
MIXED = {  # symmetric; over the parameters; climbing; a second moment, which is differentiated through
    "centred": optax.chain(optax.centralize(), optax.sgd(0.1)),
    "crossed": optax.stateless(lambda g, p: {**g, "b": -g["b"] * (1 + g["t"][0, 0])}),
    "after adam": optax.chain(optax.stateless(lambda g, p: jax.tree.map(jnp.sinh, g)), optax.adam(1e-3)),
    "climbs": optax.stateless(lambda g, p: jax.tree.map(lambda x: x + x**3, g)),
}


@pytest.mark.parametrize("name", [*SMOOTH, *MIXED])
def test_a_smooth_transform_is_linearised_on_request(name):
    tx, p, a = {**SMOOTH, **MIXED}[name], params(), gradient(0)
    state = jax_models.warmed_up(tx, p)
    with pytest.raises(TypeError, match="linearise=True"):
        ftw_jax.geometry(tx, p, state, anticipate=a)
    read = jax_models.jit(lambda a: ftw_jax.linear_updates(tx, p, state, anticipate=a, linearise=True))
    updates = read(a)
    assert all(bool(u.operator.is_psd()) for u in updates.values()) is (name in SMOOTH)
    if name not in SMOOTH:
        return
    truth = tx.update(a, state, p)[0]
    for key, leaf in truth.items():
        update = updates[f"['{key}']"]
        assert_allclose(-(update.offset + update.operator.apply(a[key])), leaf, rtol=1e-9)
        if name != "one leaf" or key == "w":
            jacobian = jax.jacobian(lambda x, k=key: tx.update({**a, k: x}, state, p)[0][k])(a[key])
            dense = -np.asarray(jacobian).reshape(leaf.size, leaf.size)
            assert_allclose(np.diag(np.ravel(update.operator.values)), dense, rtol=1e-9, atol=1e-12)


def test_an_optimizer_that_climbs_is_noticed():
    p = params()
    for tx, psd in ((optax.scale_by_adam(), False), (optax.adam(1e-3), True), (optax.scale(-1.0), True)):
        operators = ftw_jax.geometry(tx, p, tx.init(p), anticipate=gradient(0))
        assert all(bool(x.is_psd()) for x in operators.values()) is psd


def test_arguments_are_named():
    p, tx = params(), optax.adam(1e-3)
    with pytest.raises(ValueError, match="anticipate: its structure"):
        ftw_jax.geometry(tx, p, tx.init(p), anticipate={"w": p["w"]})
    with pytest.raises(ValueError, match=r"anticipate: \['b'\] is \(3,\), the parameter \(4,\)"):
        ftw_jax.geometry(tx, p, tx.init(p), anticipate={**p, "b": jnp.zeros(3)})
    with pytest.raises(TypeError, match=r"params: \['b'\] is int"):
        ftw_jax.geometry(tx, {**p, "b": jnp.zeros(4, int)}, tx.init(p), anticipate=p)
