"""Predicted next changes against what the optimizers really do."""

from __future__ import annotations

import explicit
import numpy as np
import pytest
from backends import BACKENDS, optional
from numpy.testing import assert_allclose

import ftw
from ftw import optimizers as rules

jax = optional("jax")
torch = optional("torch")

STEPS = 12
optim = torch.optim


def sgd(s, step, group, p, a):
    return rules.sgd(
        s.get("momentum_buffer"), step, param=p, **pick(group, "lr momentum dampening nesterov weight_decay")
    )


def pick(group, names):
    return {name: group[name] for name in names.split()}


def adam(s, step, group, p, a):
    rule = rules.adamw if group["decoupled_weight_decay"] else rules.adam
    if group["weight_decay"] and rule is rules.adam:
        a = a + group["weight_decay"] * p
    return rule(
        s["exp_avg"], s["exp_avg_sq"], step, param=p, anticipate=a, max_exp_avg_sq=s.get("max_exp_avg_sq"),
        **pick(group, "lr betas eps weight_decay"),
    )  # fmt: skip


def decayed(group, p, a):
    return a if group.get("decoupled_weight_decay") else a + group["weight_decay"] * p


def nadam(s, step, group, p, a):
    return rules.nadam(
        s["exp_avg"], s["exp_avg_sq"], s["mu_product"], step, param=p, anticipate=decayed(group, p, a),
        **pick(group, "lr betas eps weight_decay momentum_decay decoupled_weight_decay"),
    )  # fmt: skip


def radam(s, step, group, p, a):
    return rules.radam(
        s["exp_avg"], s["exp_avg_sq"], step, param=p, anticipate=decayed(group, p, a),
        **pick(group, "lr betas eps weight_decay decoupled_weight_decay"),
    )  # fmt: skip


def adamax(s, step, group, p, a):
    return rules.adamax(
        s["exp_avg"], s["exp_inf"], step, param=p, anticipate=decayed(group, p, a),
        **pick(group, "lr betas eps weight_decay"),
    )  # fmt: skip


def adagrad(s, step, group, p, a):
    return rules.adagrad(
        s["sum"], step, param=p, anticipate=decayed(group, p, a), **pick(group, "lr lr_decay eps weight_decay")
    )


def rmsprop(s, step, group, p, a):
    return rules.rmsprop(
        s["square_avg"], step, param=p, anticipate=decayed(group, p, a),
        grad_avg=s.get("grad_avg"), momentum_buffer=s.get("momentum_buffer"),
        **pick(group, "lr alpha eps weight_decay momentum centered"),
    )  # fmt: skip


def adafactor(s, step, group, p, a):
    return rules.adafactor(
        s.get("row_var"), s.get("col_var"), s.get("variance"), step, param=p, anticipate=a,
        **pick(group, "lr beta2_decay eps d weight_decay"),
    )  # fmt: skip


CASES = [
    (optim.SGD, sgd, {}),
    (optim.SGD, sgd, {"momentum": 0.9}),
    (optim.SGD, sgd, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (optim.SGD, sgd, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.SGD, sgd, {"weight_decay": 0.1}),
    (optim.Adam, adam, {}),
    (optim.Adam, adam, {"amsgrad": True}),
    (optim.Adam, adam, {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}),
    (optim.Adam, adam, {"betas": (0.0, 0.9)}),
    (optim.AdamW, adam, {"weight_decay": 0.1}),
    (optim.AdamW, adam, {"amsgrad": True}),
    (optim.NAdam, nadam, {}),
    (optim.NAdam, nadam, {"weight_decay": 0.1}),
    (optim.NAdam, nadam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.RAdam, radam, {}),
    (optim.RAdam, radam, {"betas": (0.9, 0.9), "weight_decay": 0.1, "eps": 1e-3}),
    (optim.RAdam, radam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (optim.Adagrad, adagrad, {}),
    (optim.Adagrad, adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1}),
    (optim.RMSprop, rmsprop, {}),
    (optim.RMSprop, rmsprop, {"centered": True, "alpha": 0.9}),
    (optim.RMSprop, rmsprop, {"momentum": 0.8, "weight_decay": 0.1}),
    (optim.RMSprop, rmsprop, {"momentum": 0.8, "centered": True, "eps": 1e-3}),
    (optim.Adamax, adamax, {}),
    (optim.Adamax, adamax, {"weight_decay": 0.1, "betas": (0.8, 0.9)}),
    (optim.Adafactor, adafactor, {}),
    (optim.Adafactor, adafactor, {"lr": 1.0, "weight_decay": 0.1, "d": 2.0}),
    (optim.Adafactor, adafactor, {"eps": (1e-4, 0.5), "beta2_decay": -0.5}),
]


def before(optimizer, parameter):
    """The state that the first step would make, where there is none yet."""
    state = optimizer.state.get(parameter, {})
    if state:
        return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    zero = torch.zeros_like(parameter.detach())
    zeros = ("exp_avg", "exp_avg_sq", "exp_inf", "square_avg", "grad_avg")
    made = dict.fromkeys(zeros, zero) | {"step": 0, "mu_product": 1.0}
    if zero.ndim > 1:
        made |= {"row_var": zero[..., :1], "col_var": zero[..., :1, :]}
    return made | {"variance": zero}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "rule", "options"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_predicts_the_next_change(kind, rule, options, dtype):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((4, 6), (5,), (3, 2, 4))]
    optimizer = kind(parameters, **{"lr": 1e-2, **options})
    for _ in range(STEPS):
        expected, predicted = [], []
        for p in parameters:
            g = torch.randn_like(p) * torch.logspace(-2, 1, p.shape[-1], dtype=dtype)
            p.grad = g
            state = before(optimizer, p)
            update = rule(state, state.get("step", 0), optimizer.param_groups[0], p.detach(), g)
            predicted.append(-(update.offset + update.operator.apply(g)))
            expected.append(p.detach().clone())
        optimizer.step()
        for p, old, change in zip(parameters, expected, predicted, strict=True):
            real = p.detach() - old
            assert change.dtype == dtype
            # float32: the parameter's own rounding limits how well its change can be seen
            rtol = 2e-4 if dtype == torch.float32 else 1e-6  # NAdam keeps one factor in float32
            atol = rtol * real.abs().max() + 4 * torch.finfo(dtype).eps * old.abs().max()
            assert_allclose(change, real, rtol=rtol, atol=float(atol))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [1, 2])
@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (64, 128)])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_muon_against_the_derivative_of_newton_schulz(shape, decay, nesterov):
    """On spectra 1/k and 1/k^2: cosine with the exact derivative of five Newton-Schulz steps."""
    rng = np.random.default_rng(1)
    r = min(shape)
    u, v = (np.linalg.qr(rng.normal(size=(d, d)))[0][:, :r] for d in shape)
    buffer = torch.from_numpy(u * np.arange(1, r + 1.0) ** -decay @ v.T)
    a = torch.from_numpy(0.01 * rng.normal(size=shape))
    update = rules.muon(buffer, lr=0.1, momentum=0.9, nesterov=nesterov, anticipate=a)
    cg, cb = (1 - 0.81, 0.81) if nesterov else (0.1, 0.9)

    def real(g):
        return -0.1 * max(1, shape[0] / shape[1]) ** 0.5 * newton_schulz(cb * buffer + cg * g)

    cosines = []
    for _ in range(6):
        e = torch.from_numpy(rng.normal(size=shape))
        _, exact = torch.func.jvp(real, (a,), (e,))
        cosines.append(cosine(-update.operator.apply(e), exact))
    assert np.mean(cosines) >= 0.85
    whole = -(update.offset + update.operator.apply(a))
    assert_allclose(whole, real(a), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)])
def test_muon_is_the_nearest_psd_operator(shape):
    """To the derivative, with the norm held, of Newton-Schulz: its eigenvalues below zero are left out."""
    M = torch.from_numpy(np.random.default_rng(2).normal(size=shape))
    update = rules.muon(M, lr=1.0, momentum=0.5, nesterov=False, adjust_lr_fn="none")
    D = torch.func.jacrev(lambda x: newton_schulz(x, norm=(M / 2).norm()))(M / 2).reshape(M.numel(), -1) / 2
    assert_allclose(D, D.T, rtol=0, atol=1e-12)
    values, vectors = torch.linalg.eigh(D)
    assert float(values.min()) < -0.01
    nearest = vectors * values.clamp_min(0) @ vectors.T
    ours = [update.operator.apply(e.reshape(shape)).reshape(-1) for e in torch.eye(M.numel(), dtype=M.dtype)]
    assert_allclose(torch.stack(ours), nearest, rtol=0, atol=1e-11 * float(values.max()))


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)])
def test_muon_damped_at_a_momentum_of_any_rank(shape, rank):
    """The derivative of ``M q(M M' + d^2)``, where Newton-Schulz is ``M q(M M')``: no null vectors in it."""
    rng, damping = np.random.default_rng(3), 0.3
    M = torch.from_numpy(rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1])))
    update = rules.muon(M, lr=1.0, momentum=0.5, nesterov=False, adjust_lr_fn="none", damping=damping)
    small = min(shape)
    raised = damping**2 * (M / 2).square().sum() / small
    norm = ((M / 2).square().sum() + small * raised).sqrt()

    def h(x):
        return newton_schulz(x, norm=norm, raised=raised / norm**2)

    D = torch.func.jacrev(h)(M / 2).reshape(M.numel(), -1) / 2
    values, vectors = torch.linalg.eigh((D + D.T) / 2)
    nearest = vectors * values.clamp_min(0) @ vectors.T
    ours = [update.operator.apply(e.reshape(shape)).reshape(-1) for e in torch.eye(M.numel(), dtype=M.dtype)]
    assert_allclose(torch.stack(ours), nearest, rtol=0, atol=1e-9 * float(values.max()))


def newton_schulz(x, steps=5, norm=None, raised=0.0):
    a, b, c = 3.4445, -4.7750, 2.0315
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / (x.norm() if norm is None else norm)
    k = x @ x.T + raised * torch.eye(len(x), dtype=x.dtype)
    for _ in range(steps):
        factor = a * torch.eye(len(x), dtype=x.dtype) + b * k + c * k @ k
        x, k = factor @ x, factor @ k @ factor
    return x.T if flip else x


def cosine(x, y):
    return float((x * y).sum() / x.norm() / y.norm())


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_muon_points_where_torch_goes(adjust):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 5))
    optimizer = optim.Muon([p], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    for i in range(STEPS):
        p.grad = g = torch.randn_like(p)
        buffer = optimizer.state[p]["momentum_buffer"].clone() if i else None
        update = rules.muon(buffer, i, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust, param=p.detach(), anticipate=g)
        old = p.detach().clone()
        optimizer.step()
        change, real = -(update.offset + update.operator.apply(g)), p.detach() - old
        assert float((change - real).norm() / real.norm()) < 0.05  # torch takes its steps in bfloat16


def test_lion_against_a_step_by_hand(xp, rng):
    m, p = np.zeros((3, 4)), rng.normal(size=(3, 4))
    jitted = compiled(xp, lambda m, t, p, g: rules.lion(m, t, lr=0.01, weight_decay=0.1, param=p, anticipate=g))
    for t in range(STEPS if not xp.jit else 4):
        g = rng.normal(size=(3, 4))
        update = jitted(m, np.asarray(t), p, g)
        change = -(xp.numpy(update.offset) + xp.numpy(update.operator.apply(xp.array(g))))
        real = -0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p)
        assert_allclose(change, real, rtol=1e-9, atol=1e-12)
        m, p = 0.99 * m + 0.01 * g, p + real


@pytest.mark.parametrize("sides", ["both", "left", "right", "none"])
def test_soap_against_a_step_by_hand(sides, rng):
    p = rng.normal(size=(3, 4))
    m, v = np.zeros((3, 4)), np.zeros((3, 4))
    left, right = (np.linalg.qr(rng.normal(size=(d, d)))[0] for d in (3, 4))
    left, right = left if sides in ("both", "left") else None, right if sides in ("both", "right") else None
    one, other = np.eye(3) if left is None else left, np.eye(4) if right is None else right
    for t in range(STEPS):
        g = rng.normal(size=(3, 4))
        update = rules.soap(m, v, left, right, t, lr=0.01, weight_decay=0.1, param=p, anticipate=g)
        m, v = 0.95 * m + 0.05 * (one.T @ g @ other), 0.95 * v + 0.05 * (one.T @ g @ other) ** 2
        c = 1 - 0.95 ** (t + 1)
        real = -0.01 * (one @ (m / c / (np.sqrt(v / c) + 1e-8)) @ other.T + 0.1 * p)
        assert_allclose(-(update.offset + update.operator.apply(g)), real, rtol=1e-9, atol=1e-12)
        x = {"w": ftw.OuterProduct(rng.normal(size=(5, 2, 4)), rng.normal(size=(5, 2, 3)))}
        G = explicit.dense(x["w"])
        P = np.stack([update.operator.apply(h) for h in G])
        assert_allclose(ftw.gram(x, {"w": update.operator}), np.einsum("iab,jab->ij", G, P), rtol=1e-9)
        p = p + real


# ---------------------------------------------------------------------------------------------------------------------
# One common test for all of them, on every backend

SHAPE = (4, 3)


def state(rng, name):
    m, v = rng.normal(size=SHAPE), rng.uniform(0.1, 1, size=SHAPE)
    matrices = tuple(np.linalg.qr(rng.normal(size=(d, d)))[0] for d in SHAPE)
    return {
        "sgd": (m,),
        "adagrad": (v,),
        "rmsprop": (v,),
        "nadam": (m, v, np.asarray(0.5)),
        "lion": (m,),
        "muon": (m,),
        "adafactor": (v[:, :1], v[:1, :], v),
        "soap": (m, v, *matrices),
        "adadelta": (v, 0.1 * v),
        "asgd": (),
        "hf_adafactor": (v[:, 0], v[0], v),
        "schedule_free_adamw": (m, v),
        "schedule_free_sgd": (m,),
    }.get(name, (m, v))


def call(name, arrays, step, lr, p, a, **options):
    options |= {"param": p} if name not in ("muon",) else {}
    options |= {"relative_step": False} if name == "hf_adafactor" else {}
    return getattr(rules, name)(*arrays, step, lr=lr, anticipate=a, **options)


def compiled(xp, function):
    """``function`` of NumPy arrays, compiled once where the backend compiles."""
    inner = jax.jit(function) if xp.jit else function
    return lambda *trees: inner(*(xp.tree(t) for t in trees))


NAMES = [n for n in rules.__all__ if n != "LinearUpdate"]


@pytest.mark.parametrize("name", NAMES)
def test_is_the_same_on_every_backend(xp, rng, name):
    arrays, p, a, g = state(rng, name), rng.normal(size=SHAPE), rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    expected = call(name, arrays, 7, 0.01, p, a, damping=0.1)

    def run(arrays, step, lr, p, a, g):
        update = call(name, arrays, step, lr, p, a, damping=0.1)
        return update.offset, update.operator.apply(g)

    step = np.asarray(7, dtype=np.int32) if xp.name != "numpy" else np.asarray(7.0)
    offset, applied = compiled(xp, run)(arrays, step, np.asarray(0.01), p, a, g)
    assert_allclose(xp.numpy(applied), expected.operator.apply(g), rtol=1e-9, atol=1e-15)
    assert_allclose(xp.numpy(offset), expected.offset, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("anticipated", [True, False])
def test_is_symmetric_psd_linear_in_the_rate_and_keeps_float32(rng, name, damping, anticipated):
    arrays = tuple(x.astype(np.float32) for x in state(rng, name))
    p, a, g, h = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(4))
    a = a if anticipated else None
    P = call(name, arrays, np.asarray(3), np.asarray(0.01), p, a, damping=damping).operator
    assert P.apply(g).dtype == np.float32
    assert_allclose(P.inner(g, h), P.inner(h, g), rtol=1e-3, atol=1e-6)
    assert P.inner(g, g) >= -1e-7
    assert_allclose(P.sqrt(P.sqrt(g)), P.apply(g), rtol=1e-3, atol=1e-5 * abs(P.apply(g)).max())
    double = call(name, arrays, np.asarray(3), np.asarray(0.02), p, a, damping=damping).operator
    assert_allclose(double.apply(g), 2 * P.apply(g), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("sgd", "muon")])
@pytest.mark.parametrize("traced", [False, True])
def test_before_the_first_step_there_is_an_answer(rng, name, traced):
    array = jax.numpy.asarray if traced else np.asarray
    zero = tuple(array(np.zeros_like(x)) for x in state(rng, name))
    if name == "nadam":
        zero = (*zero[:2], np.asarray(1.0))
    if name == "soap":
        zero = (*zero[:2], *state(rng, name)[2:])
    zero = tuple(array(x) for x in zero)
    p, a, g = (array(rng.normal(size=SHAPE)) for _ in range(3))

    def plain(step):
        return call(name, zero, step, 0.01, p, None).operator.apply(g)

    with np.errstate(all="ignore"):
        identity = np.asarray(jax.jit(plain)(0)) if traced else plain(0)
    if name not in ("adafactor", "hf_adafactor") or not traced:
        ratio = identity / np.asarray(g)
        assert_allclose(ratio, ratio[0, 0], rtol=1e-9)
        assert ratio[0, 0] > 0
    told = call(name, zero, 0, 0.01, p, a).operator.apply(g)
    assert np.all(np.isfinite(told))
    assert np.abs(told).max() > 0


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("asgd", "schedule_free_sgd", "sgd")])
def test_an_untouched_parameter_has_no_response(rng, name):
    zero = tuple(np.zeros_like(x) for x in state(rng, name))
    if name == "soap":
        zero = (*zero[:2], *state(rng, name)[2:])
    g = rng.normal(size=SHAPE)
    options = {"eps": (0.0, 1e-3)} if name == "adafactor" else {}
    for a in (np.zeros(SHAPE), None):
        if a is None and name == "muon":
            continue
        out = call(name, zero, 500, 0.01, g, a, **options).operator.apply(g)
        if name == "muon":  # it has no memory of having been touched
            assert np.all(np.isfinite(out))
        else:
            assert_allclose(out, 0, atol=0)


def test_the_formula_of_adam(rng):
    """The contract, word for word, with damping, and without anticipation."""
    m, v, a = rng.normal(size=(3, 5)), rng.uniform(0, 1, size=(3, 5)), rng.normal(size=(3, 5))
    for anticipate in (a, None):
        for damping in (0.0, 0.1):
            vhat = v / (1 - 0.99**4) if anticipate is None else (0.99 * v + 0.01 * a**2) / (1 - 0.99**5)
            denominator = np.sqrt(vhat) + 1e-6 + damping * np.sqrt(np.mean(vhat))
            update = rules.adam(m, v, 4, lr=0.1, betas=(0.8, 0.99), eps=1e-6, anticipate=anticipate, damping=damping)
            assert isinstance(update.operator, ftw.Diagonal)
            assert_allclose(update.operator.values, 0.1 * 0.2 / (1 - 0.8**5) / denominator, rtol=1e-13)
            assert_allclose(update.offset, 0.1 * 0.8 / (1 - 0.8**5) * m / denominator, rtol=1e-13)
    assert rules.adam(0 * m, 0 * v, 0, lr=0.1).operator.value == 0.1
    assert rules.adam(0 * m, 0 * v, 3, lr=0.1).operator.value == 0.0


def test_bias_correction_keeps_its_digits_in_float32(rng):
    m, v = rng.normal(size=4).astype(np.float32), rng.uniform(1, 2, size=4).astype(np.float32)
    for step in (1, 2, 50):
        exact = rules.adam(m, v, step, lr=0.1).operator.values
        traced = jax.jit(lambda t: rules.adam(jax.numpy.asarray(m), jax.numpy.asarray(v), t, lr=0.1).operator.values)(
            step
        )
        assert_allclose(traced, exact, rtol=3e-6)


def test_nan_in_the_state_shows(rng):
    m, v = rng.normal(size=(3, 4)), rng.uniform(1, 2, size=(3, 4))
    v[0, 0] = np.nan
    for a in (None, np.ones((3, 4))):
        assert np.isnan(rules.adam(m, v, 3, lr=0.1, anticipate=a).operator.values[0, 0])
        assert np.isnan(rules.rmsprop(v, 3, lr=0.1, anticipate=a).operator.values[0, 0])
        assert np.all(np.isnan(rules.muon(v, lr=0.1, anticipate=a).operator.apply(m)))
        assert np.isnan(
            rules.adafactor(v[:, :1], v[:1], None, 3, lr=0.1, param=m, anticipate=a).operator.apply(m)[0, 0]
        )


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jax"])
def test_half_precision_state_is_widened(rng, name):
    if name in ("numpy", "strict", "jax"):
        half = np.float16 if name != "strict" else np.float32  # the standard has no 16-bit floats
        m, v = (BACKENDS[name].array(x.astype(half)) for x in state(rng, "adam"))
    else:
        m, v = (torch.from_numpy(x).bfloat16() for x in state(rng, "adam"))
    operator = rules.adamw(m, v, 3, lr=0.1, anticipate=m, damping=0.1).operator
    assert "float32" in str(operator.values.dtype)


@pytest.mark.parametrize(
    ("call_it", "match"),
    [
        (lambda x: rules.sgd(x, lr=0.1, weight_decay=0.1), "sgd: .* needs param="),
        (lambda x: rules.adam(x, x, 1, lr=0.1, weight_decay=0.1), "adam: .* needs param="),
        (lambda x: rules.rmsprop(x, 1, lr=0.1, centered=True), "needs grad_avg="),
        (lambda x: rules.adafactor(None, None, None, 1, lr=0.1, param=x), "needs row_var and col_var"),
        (lambda x: rules.adafactor(None, None, None, 1, lr=0.1, param=x[0]), "needs variance="),
        (lambda x: rules.hf_adafactor(None, None, None, 1, param=x), "needs exp_avg_sq_row and exp_avg_sq_col"),
        (lambda x: rules.hf_adafactor(None, None, None, 1, param=x[0]), "needs variance="),
        (lambda x: rules.hf_adafactor(None, None, x, 1, param=x, relative_step=False), "lr= is needed"),
        (lambda x: rules.asgd(lr=0.1, weight_decay=0.1), "asgd: .* needs param="),
        (lambda x: rules.adadelta(x, x[0], 1, lr=0.1), "adadelta: .* disagree"),
        (lambda x: rules.schedule_free_sgd(x, 1, lr=-0.1, param=x), "schedule_free_sgd: lr=-0.1"),
        (lambda x: rules.muon(None, lr=0.1), "give anticipate="),
        (lambda x: rules.muon(x[0], lr=0.1), "must be a matrix"),
        (lambda x: rules.soap(x[0], x[0], None, None, 1, lr=0.1), "must be of a matrix"),
        (lambda x: rules.adam(x, torch.ones(3, 4), 1, lr=0.1), "one namespace"),
    ],
)
def test_what_is_missing_is_named(rng, call_it, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call_it(rng.uniform(size=(3, 4)))


@pytest.mark.parametrize("name", ["adam", "nadam", "radam", "adamax", "adagrad", "rmsprop", "lion"])
@pytest.mark.parametrize("xp", ["numpy", "strict", "torch"])
def test_a_parameter_that_is_one_number(xp, name):
    # NumPy's 0-d arrays become scalars in arithmetic, and its float64 passes for a Python number
    xp = BACKENDS[xp]

    def moved(shape):
        m, v, g = (xp.array(np.full(shape, x)) for x in (0.3, 0.5, -0.7))
        arrays = {"nadam": (m, v, 0.8), "adagrad": (v,), "rmsprop": (v,), "lion": (m,)}.get(name, (m, v))
        change = getattr(rules, name)(*arrays, 3, lr=0.1, anticipate=g, damping=0.1)
        score = ftw.scores({"w": ftw.Dense(xp.array(np.ones((1, *shape))))}, {"w": g}, {"w": change.operator})
        return np.ravel(xp.numpy(xp.xp.asarray(change.offset + change.operator.apply(g)))), xp.numpy(score)

    for number, vector in zip(moved(()), moved((1,)), strict=True):
        assert_allclose(number, vector, rtol=1e-14)
