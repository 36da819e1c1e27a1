"""The reference against closed forms, finite differences, real optimizers, and plain against compiled."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import ftw_reference as ref
import numpy as np
import pytest
from ftw_reference import Box, CappedSimplex, NonNegative, Simplex, Status, preconditioning


def pool(n=12, p=20, seed=0):
    """Return gradients (n, p), a target (p,) and a metric (p, p)."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=p)
    grads = rng.normal(size=(n, p)) + rng.uniform(-0.5, 1.0, size=(n, 1)) * target
    root = rng.normal(size=(p, p))
    return grads, target, root @ root.T / p


def test_it_imports_nothing_of_ftw():
    for file in Path(ref.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [n for n in names if n.split(".")[0] in ("ftw", "ftw_torch", "ftw_jax", "ftw_conformance")], file


def test_compiled_code_calls_only_its_own_file():
    """What keeps numba's cache truthful (see _jit.py)."""
    for file in Path(ref.__file__).parents[1].glob("*/*.py"):
        tree = ast.parse(file.read_text())
        imported = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
        for node in tree.body:
            decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
            if isinstance(node, ast.FunctionDef) and {"jit", "jit_fast"} & set(decorators):
                body = ast.Module(node.body, [])
                used = {n.func.id for n in ast.walk(body) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
                assert not used & imported, (file.name, node.name, used & imported)


def test_scores_and_gram_are_what_they_say():
    grads, target, metric = pool()
    np.testing.assert_allclose(ref.scores(grads, target, metric), grads @ metric @ target, rtol=1e-12)
    np.testing.assert_allclose(ref.gram(grads, metric), grads @ metric @ grads.T, rtol=1e-10, atol=1e-12)
    diagonal = np.abs(target)
    np.testing.assert_allclose(ref.scores(grads, target, diagonal), ref.scores(grads, target, np.diag(diagonal)))
    np.testing.assert_allclose(ref.cross_gram(grads, grads[:3], diagonal), ref.gram(grads, diagonal)[:, :3], atol=1e-12)
    with pytest.raises(ValueError, match=r"metric has shape \(3,\)"):
        ref.gram(grads, np.ones(3))
    with pytest.raises(ValueError, match=r"target has shape \(3,\)"):
        ref.scores(grads, np.ones(3), metric)


@pytest.mark.parametrize("constraint", [NonNegative(), Simplex(2.0), CappedSimplex(0.3), Box(-0.1, 0.4)])
def test_projection_is_nearest(constraint):
    rng = np.random.default_rng(1)
    for scale in (1e-3, 1.0, 1e3):
        v = scale * rng.normal(size=8)
        w = ref.project(v, constraint)
        # Nearest: 1/2 |w - v|^2 is the quadratic program with H = I.
        np.testing.assert_allclose(w, ref.solve_qp(np.eye(8), v, constraint).weights, atol=1e-11 * max(scale, 1.0))
        np.testing.assert_allclose(ref.project(w, constraint), w, atol=1e-15)
    assert np.isnan(ref.project(v, CappedSimplex(0.1))).all()


def test_adam_predicts_the_real_step():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for amsgrad in (False, True):
        p = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
        optimizer = torch.optim.Adam([p], lr=0.1, betas=(0.8, 0.95), amsgrad=amsgrad)
        for _ in range(3):
            g = torch.randn_like(p)
            state = {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}
            before, p.grad = p.detach().clone(), g
            optimizer.step()
            if not state:
                continue
            P = preconditioning.adam(
                state["exp_avg_sq"].numpy(), int(state["step"]), lr=0.1, betas=(0.8, 0.95), anticipate=g.numpy(),
                max_exp_avg_sq=state["max_exp_avg_sq"].numpy() if amsgrad else None,
            )  # fmt: skip
            momentum = state["exp_avg"].numpy() * 0.8 / (1 - 0.8)
            np.testing.assert_allclose(p.detach() - before, -P * (momentum + g.numpy()), rtol=1e-10)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adagrad", "rmsprop", "adamax"])
def test_others_predict_the_real_response(name):
    """With the state after a step as the second moment, the response to the gradient is the change over it."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    make = {
        "sgd": lambda: torch.optim.SGD([p], lr=0.1),
        "nesterov": lambda: torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True),
        "adagrad": lambda: torch.optim.Adagrad([p], lr=0.1, lr_decay=0.1),
        "rmsprop": lambda: torch.optim.RMSprop([p], lr=0.1, eps=1e-8),
        "adamax": lambda: torch.optim.Adamax([p], lr=0.1, betas=(0.0, 0.9), eps=0.0),
    }
    optimizer = make[name]()
    for step in range(3):
        g, before = torch.randn_like(p), p.detach().clone()
        buffer = optimizer.state.get(p, {}).get("momentum_buffer")
        momentum = 0.0 if buffer is None else buffer.numpy() * 0.9
        p.grad = g
        optimizer.step()
        state = {k: v.numpy() if hasattr(v, "numpy") else v for k, v in optimizer.state[p].items()}
        P, offset = {
            "sgd": lambda: (preconditioning.sgd((5,), lr=0.1), 0.0),
            "nesterov": lambda m=momentum: (preconditioning.sgd((5,), lr=0.1, momentum=0.9, nesterov=True), 0.09 * m),
            "adagrad": lambda s=state, t=step: (preconditioning.adagrad(s["sum"], t, lr=0.1, lr_decay=0.1), 0.0),
            "rmsprop": lambda s=state: (preconditioning.rmsprop(s["square_avg"], lr=0.1), 0.0),
            "adamax": lambda s=state, t=step: (
                preconditioning.adamax(s["exp_inf"], t, lr=0.1, betas=(0.0, 0.9)),
                0.0,
            ),
        }[name]()
        np.testing.assert_allclose(p.detach() - before, -(P * g.numpy() + offset), rtol=1e-9)


def test_adam_corners():
    assert (preconditioning.adam(np.zeros(3), 4, lr=0.1, anticipate=np.zeros(3)) == 0).all()
    assert (preconditioning.adam(np.zeros(3), 0, lr=0.1) == 0.1).all()
    v, a = np.array([0.0, 1.0, 4.0]), np.array([1.0, 0.0, 0.0])
    vhat = (0.9 * v + 0.1 * a**2) / (1 - 0.9**3)
    expected = 0.5 * 0.5 / (1 - 0.5**3) / (np.sqrt(vhat) + 1e-8 + 0.1 * np.sqrt(vhat.mean()))
    found = preconditioning.adam(v, 2, lr=0.5, betas=(0.5, 0.9), anticipate=a, damping=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (3, 3)])
def test_polar_is_the_derivative_of_the_polar_factor(shape):
    rng = np.random.default_rng(2)
    M, E = rng.normal(size=shape), rng.normal(size=shape)

    def factor(X):
        u, _, vt = np.linalg.svd(X, full_matrices=False)
        return u @ vt

    P = preconditioning.polar(*np.linalg.svd(M, full_matrices=False))
    slope = (factor(M + 1e-6 * E) - factor(M - 1e-6 * E)) / 2e-6
    np.testing.assert_allclose((P @ E.reshape(-1)).reshape(shape), slope, atol=1e-7)
    np.testing.assert_allclose(P, P.T, atol=1e-12)
    assert np.linalg.eigvalsh(P)[0] > -1e-12


def test_kronecker_and_rotated():
    rng = np.random.default_rng(3)
    L, R, G = rng.normal(size=(3, 3)), rng.normal(size=(2, 2)), rng.normal(size=(3, 2))
    L, R = L @ L.T, R @ R.T
    np.testing.assert_allclose(preconditioning.kronecker(L, R), np.kron(L, R), atol=1e-12)
    np.testing.assert_allclose(preconditioning.kronecker(np.diag(L), R), np.kron(np.diag(np.diag(L)), R), atol=1e-12)
    (U, V), values = (np.linalg.qr(x)[0] for x in (L, R)), rng.uniform(size=(3, 2))
    P = preconditioning.rotated(U, values, V)
    np.testing.assert_allclose(P @ G.reshape(-1), (U @ (values * (U.T @ G @ V)) @ V.T).reshape(-1), atol=1e-12)


def test_filters_pick_what_they_say():
    b = np.array([1.0, 5.0, 5.0, -1.0, 3.0])
    assert ref.top_k(b, 3).indices.tolist() == [1, 2, 4]
    assert ref.threshold(b, 4, value=2.0)[1] == 3
    assert ref.threshold(b, 4, quantile=0.5).count == 3
    assert ref.boltzmann(b, 2, temperature=1e-9, uniforms=np.full(5, 0.5)).indices.tolist() == [1, 2]
    uniforms = np.random.default_rng(0).uniform(size=(4000, 5))
    first = np.array([ref.boltzmann(b, 1, temperature=1.0, uniforms=u).indices[0] for u in uniforms])
    expected = np.exp(b / b.std()) / np.exp(b / b.std()).sum()
    np.testing.assert_allclose(np.bincount(first, minlength=5) / 4000, expected, atol=0.03)
    for mistake in (lambda: ref.top_k(b, 6), lambda: ref.top_k(b, 0), lambda: ref.threshold(b, 1)):
        with pytest.raises(ValueError):
            mistake()


@pytest.mark.parametrize("ridge", [0.0, 0.05, 0.5])
def test_matching_by_the_definition(ridge):
    grads, target, metric = pool(seed=4)
    b, K = ref.scores(grads, target, metric), ref.gram(grads, metric)
    kept, w = [], np.zeros(12)
    for _ in range(6):
        residual = b - K @ w
        residual[kept] = -np.inf
        kept.append(int(np.argmax(residual)))
        part = K[np.ix_(kept, kept)]
        w = np.zeros(12)
        w[kept] = ref.solve_qp(part, b[kept], NonNegative(), ridge=ridge * np.trace(part) / len(kept)).weights
    assert ref.matching(b, K, 6, ridge=ridge).indices.tolist() == kept


def test_matching_lets_copies_wait():
    grads, target, metric = pool(n=6, seed=5)
    copies = np.concatenate([grads, grads, grads])
    b, K = ref.scores(copies, target, metric), ref.gram(copies, metric)
    picks = ref.matching(b, K, 3, ridge=0.0).indices
    assert len(set(picks % 6)) == 3
    assert (picks < 6).all()  # ties by index


def test_greedy_utility_by_brute_force():
    grads, target, metric = pool(seed=6)
    b, K = ref.scores(grads, target, metric), ref.gram(grads, metric)
    top = ref.top_k(b, 4).indices
    eta = b[top].sum() / K[np.ix_(top, top)].sum()

    def utility(S):
        return eta * b[S].sum() - eta**2 / 2 * K[np.ix_(S, S)].sum()

    kept = []
    for _ in range(4):
        kept.append(max((i for i in range(12) if i not in kept), key=lambda i: utility([*kept, i])))
    assert ref.greedy_utility(b, K, 4).indices.tolist() == kept
    assert ref.greedy_utility(b, K, 4, redundancy=0.0).indices.tolist() == top.tolist()


def test_guard_formula():
    # m = 5, |g_T|^2 = 1, mean norm 9: v = 2, F = .5; J = 2 / 8; the gate 2 (1 - .5) = 1 is capped.
    assert ref.shrinkage(1.0, 9.0, 8.0, 5) == (0.25 * 0.3, 0.5)
    assert ref.shrinkage(1.0, 9.0, 8.0, 5, cap=1.0) == (0.25, 0.5)
    assert ref.shrinkage(1.9, 9.9, 1.0, 5, cap=1.0)[0] == pytest.approx(2 * (1 - 0.95))
    assert ref.shrinkage(3.0, 9.0, 8.0, 5)[0] == 0.0
    assert ref.shrinkage(1.0, 1.0, 8.0, 5) == (0.0, math.inf)
    assert ref.shrinkage(1.0, 9.0, 8.0, 5, cap=0.0)[0] == 0.0
    with pytest.warns(UserWarning, match="one target sample"):
        assert ref.shrinkage(1.0, 9.0, 8.0, 1)[0] == 0.0


def test_step_on_the_simplex_is_the_normalised_non_negative_solution():
    grads, target, metric = pool(seed=7)
    s = ref.filter_then_weight(grads, target, metric, keep=5)
    b, K = ref.scores(grads, target, metric), ref.gram(grads, metric)
    np.testing.assert_array_equal(s.indices, ref.matching(b, K, 5).indices)
    part, ridge = K[np.ix_(s.indices, s.indices)], 0.05 * np.trace(K[np.ix_(s.indices, s.indices)]) / 5
    free = ref.solve_qp(part, b[s.indices], NonNegative(), ridge=ridge).weights
    np.testing.assert_allclose(s.weights, free / free.sum(), rtol=1e-12)
    scaled = ref.solve_qp(part, b[s.indices] / free.sum(), Simplex(1.0), ridge=ridge).weights
    np.testing.assert_allclose(s.weights, scaled, atol=1e-10)
    update = s.weights @ grads[s.indices]
    cosine = update @ metric @ target / np.sqrt((update @ metric @ update) * (target @ metric @ target))
    np.testing.assert_allclose(s.match, cosine, rtol=1e-10)
    decrease = update @ metric @ target - 0.5 * update @ metric @ update
    np.testing.assert_allclose(s.predicted_decrease, decrease, rtol=1e-10)
    np.testing.assert_allclose(s.effective_size, 1 / (s.weights**2).sum(), rtol=1e-12)
    assert (s.status, s.shrinkage, s.count) == (Status.OK, 0.0, 5)
    np.testing.assert_array_equal(s.scores, b)


def test_step_is_free_of_scale():
    grads, target, metric = pool(seed=8)
    one = ref.filter_then_weight(grads, target, metric, keep=4)
    for x, y, z in ((1e-6, 1.0, 1.0), (1.0, 1e6, 1.0), (1.0, 1.0, 1e-9)):
        other = ref.filter_then_weight(x * grads, y * target, z * metric, keep=4)
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_allclose(one.weights, other.weights, rtol=1e-9)
        assert one.match == pytest.approx(other.match)


def test_step_sets_and_options():
    grads, target, metric = pool(seed=9)
    capped = ref.filter_then_weight(grads, target, metric, keep=5, constraint=CappedSimplex(0.25, 1.0))
    assert capped.weights.max() <= 0.25
    assert capped.weights.sum() == pytest.approx(1.0, rel=1e-12)
    loose = ref.filter_then_weight(grads, target, metric, keep=5, constraint=CappedSimplex(1.0, 1.0))
    plain = ref.filter_then_weight(grads, target, metric, keep=5)
    np.testing.assert_allclose(loose.weights, plain.weights, atol=1e-9)
    raw = ref.filter_then_weight(grads, target, metric, keep=5, constraint=NonNegative())
    np.testing.assert_allclose(raw.weights / raw.weights.sum(), plain.weights, atol=1e-9)
    twice = ref.filter_then_weight(grads, target, metric, keep=5, constraint=Simplex(2.0))
    np.testing.assert_allclose(twice.weights, 2 * plain.weights, rtol=1e-12)
    boxed = ref.filter_then_weight(grads, target, metric, keep=5, constraint=Box(0.01, 0.02))
    assert 0.01 <= boxed.weights.min() <= boxed.weights.max() <= 0.02
    uniform = ref.filter_then_weight(grads, target, metric, keep=5, weight="uniform", filter="top_k")
    np.testing.assert_allclose(uniform.weights, np.full(5, 0.2))
    np.testing.assert_array_equal(uniform.indices, ref.top_k(uniform.scores, 5).indices)
    short = ref.filter_then_weight(grads, target, metric, keep=3, shortlist=0.5)
    best = set(ref.top_k(short.scores, 6).indices.tolist())
    assert set(short.indices.tolist()) <= best
    same = ref.filter_then_weight(grads, target, metric, keep=3, shortlist=1)
    assert set(same.indices.tolist()) == set(ref.top_k(short.scores, 3).indices.tolist())

    def two_pass(b, K, k):
        return ref.threshold(b, k, value=np.sort(b)[-2])

    passed = ref.filter_then_weight(grads, target, metric, keep=5, filter=two_pass)
    assert passed.count == 2
    assert (passed.weights[2:] == 0).all()
    assert passed.weights.sum() == pytest.approx(1.0)
    mean = ref.filter_then_weight(grads, None, metric, keep=5)
    np.testing.assert_allclose(mean.scores, ref.scores(grads, grads.mean(0), metric), rtol=1e-12)


def test_step_with_the_guard():
    grads, _, metric = pool(seed=10)
    rng = np.random.default_rng(10)
    samples = rng.normal(size=(8, 20))
    samples -= 0.9 * samples.mean(axis=0)  # a mean that is mostly noise

    def square(g):
        return np.mean(np.einsum("ip,pq,iq->i", g, metric, g))

    samples *= np.sqrt(0.015 * square(grads) / square(samples))  # and half learned by heart
    target = samples.mean(axis=0)
    s = ref.filter_then_weight(grads, target, metric, keep=4, target_samples=samples)
    apart = target - grads.mean(axis=0)
    a, ratio = ref.shrinkage(target @ metric @ target, square(samples), apart @ metric @ apart, 8, slope=4, doubt=0.5)
    assert (s.shrinkage, s.f_ratio) == (pytest.approx(a), pytest.approx(ratio))
    assert a > 0
    moved = (1 - a) * target + a * grads.mean(axis=0)
    again = ref.filter_then_weight(grads, moved, metric, keep=4)
    np.testing.assert_array_equal(s.indices, again.indices)
    np.testing.assert_allclose(s.weights, again.weights, rtol=1e-9)
    np.testing.assert_allclose(s.scores, ref.scores(grads, target, metric), rtol=1e-12)
    off = ref.filter_then_weight(grads, target, metric, keep=4, target_samples=samples, guard=0.0)
    assert off.shrinkage == 0.0


@pytest.mark.parametrize("constraint", [Simplex(2.0), CappedSimplex(0.9, 2.0)])
def test_step_when_nothing_helps(constraint):
    grads, _, metric = pool(seed=11)
    target = -grads.sum(axis=0)
    grads = grads[ref.scores(grads, target, metric) < 0]
    s = ref.filter_then_weight(grads, target, metric, keep=3, constraint=constraint)
    assert s.status == Status.NOTHING_USEFUL
    np.testing.assert_allclose(s.weights, np.full(3, 2 / 3))
    np.testing.assert_array_equal(s.indices, ref.top_k(s.scores, 3).indices)


def test_step_with_values_that_have_no_answer():
    grads, target, metric = pool(seed=12)
    for bad in (np.nan, np.inf):
        broken = grads.copy()
        broken[3, 2] = bad
        s = ref.filter_then_weight(broken, target, metric, keep=3)
        assert s.status == Status.NOT_FINITE
        assert np.isnan(s.weights).all()
        assert len(set(s.indices.tolist())) == 3
    s = ref.filter_then_weight(grads, target, metric, keep=3, constraint=CappedSimplex(0.1, 1.0))
    assert s.status == Status.INFEASIBLE
    assert np.isnan(s.weights).all()
    for mistake in ({"keep": 0}, {"keep": 13}, {"ridge": -1}, {"guard": 2}, {"shortlist": 2.0}, {"filter": "best"}):
        with pytest.raises(ValueError, match=next(iter(mistake))):
            ref.filter_then_weight(grads, target, metric, **{"keep": 3, **mistake})


CASES = """
import json, numpy as np, ftw_reference as ref
from ftw_reference import *
from ftw_reference import preconditioning
import ftw_compiled
rng = np.random.default_rng(0)
out = {"compiled": ref.COMPILED}
for seed in range(3):
    n, p = 10, 16
    target = rng.normal(size=p)
    grads = rng.normal(size=(n, p)) + rng.uniform(-0.3, 1, size=(n, 1)) * target
    grads[4] = grads[2] * (seed == 1) + grads[4] * (seed != 1)
    metric = preconditioning.adam(rng.uniform(size=p), 3, lr=0.1, anticipate=target, damping=0.1)
    b, K = ref.scores(grads, target, metric), ref.gram(grads, np.diag(metric))
    samples = target + 4 * rng.normal(size=(6, p))
    for i, c in enumerate((NonNegative(), Simplex(2.0), CappedSimplex(0.2), Box(-0.1, 0.1))):
        for solver in (ref.solve_qp, ftw_compiled.solve_qp):
            q = solver(K, b, c, ridge=0.01)
            out[f"{seed} {i} {solver.__module__}"] = [*q.weights, q.objective, int(q.status)]
        out[f"{seed} {i} project"] = list(ref.project(rng.normal(size=n), c))
        s = ref.filter_then_weight(grads, target, metric, keep=5, constraint=c, target_samples=samples)
        out[f"{seed} {i} step"] = [*map(float, s.indices), *s.weights, *s.scores, s.match, s.predicted_decrease,
                                   s.effective_size, s.shrinkage, int(s.status), s.f_ratio]
    out[f"{seed} greedy"] = ref.greedy_utility(b, K, 5).indices.tolist()
print(json.dumps(out))
"""


def test_plain_and_compiled_give_the_same():
    pytest.importorskip("numba")
    found = {}
    for jit in ("0", "1"):
        environment = {**os.environ, "FTW_REFERENCE_JIT": jit, "NUMBA_DISABLE_JIT": "0"}
        run = subprocess.run(
            [sys.executable, "-c", CASES], env=environment, capture_output=True, text=True, check=True, timeout=300
        )
        found[jit] = json.loads(run.stdout)
    assert (found["0"].pop("compiled"), found["1"].pop("compiled")) == (False, True)
    assert found["0"].keys() == found["1"].keys()
    for name, plain in found["0"].items():
        np.testing.assert_allclose(plain, found["1"][name], rtol=1e-12, atol=1e-12, err_msg=name)
