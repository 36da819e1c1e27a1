"""Units of gradients: a choice in float32 does not depend on them, as far as float32 can hold the gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ftw
from ftw import Status, _array

OPTIONS = {
    "default": {},
    "shortlist": {"shortlist": 0.5, "guard": 1.0},
    "top_k": {"filter": "top_k"},
    "uniform": {"filter": "top_k", "weight": "uniform"},
    "greedy": {"filter": "greedy_utility"},
    "NonNegative": {"constraint": ftw.NonNegative()},
    "Box": {"constraint": ftw.Box(-0.1, 0.3)},
}


def problem(
    rng: np.random.Generator, dtype: str, size: float, target: float | None = None
) -> tuple[Any, Any, Any, Any]:
    """Return candidates, target, geometry and target samples whose gradients are ``size`` times those of size one."""
    n, t = 10, 3
    lengths = [3.0, 0.5, 2.0, 1.0, 1.5, 0.7, 2.5, 0.9, 1.2, 0.6]
    size, far = np.asarray(size, dtype), np.asarray(size if target is None else target, dtype)

    def records(m: int, by: Any) -> Any:
        a, b = rng.normal(size=(m, t, 5)).astype(dtype), rng.normal(size=(m, t, 4)).astype(dtype)
        ids, rows = rng.integers(0, 7, size=(m, t)), rng.normal(size=(m, t, 3)).astype(dtype)
        factors = np.asarray(lengths[:m], dtype)
        return {
            "w": ftw.OuterProduct(a, b * factors[:, None, None] * by),
            "e": ftw.Rows(ids, rows * by, 7),
            "b": ftw.Dense(rng.normal(size=(m, 4)).astype(dtype) * by),
            "s": ftw.Sum((ftw.Dense(rng.normal(size=(m, 4, 5)).astype(dtype) * by), ftw.OuterProduct(a * by, b))),
        }

    x, samples = records(n, size), records(4, far)
    g = {name: np.asarray(v) for name, v in ftw.combine(samples, np.full(4, 0.25, dtype)).items()}
    g = {name: v + np.asarray(0.2, dtype) * far * np.ones_like(v) for name, v in g.items()}
    p = {
        "w": ftw.Diagonal(rng.uniform(0.5, 2, size=(4, 5)).astype(dtype)),
        "e": ftw.Kronecker(rng.uniform(0.5, 2, size=7).astype(dtype), np.eye(3, dtype=dtype)),
        "b": ftw.Scale(np.asarray(0.3, dtype)),
        "s": ftw.Scale(np.asarray(1.0, dtype)),
    }
    return x, g, p, samples


def choose(xp: Any, inputs: Any, **options: Any) -> dict[str, np.ndarray]:
    def call(x: Any, g: Any, p: Any, samples: Any) -> Any:
        return ftw.filter_then_weight(x, g, p, target_samples=samples, keep=4, **options)._asdict()

    return {k: xp.numpy(v) for k, v in xp.call(call, *inputs).items() if v is not None}


@pytest.mark.parametrize("option", list(OPTIONS))
@pytest.mark.parametrize("power", [-73, -66, 60, 90])  # about 1e-22, 1e-20, 1e18, 1e27
def test_a_choice_in_any_unit(xp: Any, option: str, power: int) -> None:
    if xp.name == "jax" or (xp.name == "jit" and (option, power) not in (("shortlist", -73), ("Box", 90))):
        pytest.skip("each compiles anew")
    unit = 2.0**power
    ordinary = choose(xp, problem(np.random.default_rng(7), "float32", 1.0), **OPTIONS[option])
    other = choose(xp, problem(np.random.default_rng(7), "float32", unit), **OPTIONS[option])
    assert ordinary["status"] == other["status"] == Status.OK
    np.testing.assert_array_equal(other["indices"], ordinary["indices"])
    for name in ("weights", "match", "effective_size", "shrinkage", "signal"):
        np.testing.assert_allclose(other[name], ordinary[name], rtol=2e-5, atol=2e-6, err_msg=name)
    assert -1 <= other["match"] <= 1
    for name in ("scores", "predicted_decrease"):
        value = np.asarray(ordinary[name], float) * unit**2
        if np.all(np.abs(value) < 3e38):
            np.testing.assert_allclose(
                other[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max() + 2e-38
            )  # some flush


@pytest.mark.parametrize("powers", [(-80, 10), (20, -70), (40, -40)])
def test_candidates_and_target_in_different_units(powers: tuple[int, int]) -> None:
    candidates, target = (2.0**p for p in powers)
    x, g, p, samples = problem(np.random.default_rng(7), "float32", candidates, target)
    got = ftw.filter_then_weight(x, g, p, target_samples=samples, keep=4, guard=0.0)
    x, g, p, samples = problem(np.random.default_rng(7), "float64", 1.0, 1.0)
    expected = ftw.filter_then_weight(x, g, p, target_samples=samples, keep=4, guard=0.0)
    assert got.status == Status.OK
    np.testing.assert_array_equal(got.indices, expected.indices)
    np.testing.assert_allclose(got.weights, expected.weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.match, expected.match, rtol=1e-4)


@pytest.mark.parametrize("power", [-60, 0, 55])
def test_factors_of_opposite_sizes(power: int) -> None:
    """The gradients are ordinary, their factors are not."""
    rng, unit = np.random.default_rng(3), np.float32(2.0**power)
    a, b = rng.normal(size=(9, 1, 40)).astype("float32"), rng.normal(size=(9, 1, 50)).astype("float32")
    g = {"w": rng.normal(size=(50, 40)).astype("float32")}
    choices = [
        ftw.filter_then_weight({"w": ftw.OuterProduct(a * u, b / u)}, g, {"w": ftw.Scale(1.0)}, keep=4)
        for u in (unit, np.float32(1))
    ]
    np.testing.assert_array_equal(choices[0].indices, choices[1].indices)
    np.testing.assert_allclose(choices[0].weights, choices[1].weights, rtol=1e-5)


@pytest.mark.parametrize("power", [-60, -64, -70])
def test_products_that_vanished_have_a_status(power: int) -> None:
    """`choose` sees products only: it cannot bring back digits that are gone."""
    rng = np.random.default_rng(0)
    G, t = rng.normal(size=(8, 30)), rng.normal(size=30)
    with np.errstate(all="ignore"):
        G, t = (x.astype("float32") * np.float32(2.0**power) for x in (G, t))
        K, b, square = G @ G.T, G @ t, t @ t
    products = ftw.choice.Products(gram=lambda i: K, length=lambda i, w: w @ K @ w, target=np.asarray(square))
    s = ftw.choice.choose(b, products, keep=3)
    assert s.status in (Status.NOT_FINITE, Status.NOTHING_USEFUL)
    assert not abs(s.match) > 1


def test_matches_are_cosines_in_every_unit() -> None:
    for power in range(-140, 120, 4):
        rng = np.random.default_rng(power + 200)
        with np.errstate(all="ignore"):
            x = {"w": ftw.Dense(rng.normal(size=(6, 9)).astype("float32") * np.float32(2.0**power))}
            g = {"w": np.mean(x["w"].grads, axis=0)}
        s = ftw.filter_then_weight(x, g, {"w": ftw.Scale(1.0)}, keep=3)
        assert s.status != Status.OK or 0.3 < s.match <= 1, (power, s.match)
        assert s.status == Status.OK or not -124 < power < 116, power


def test_a_power_of_two_is_exact() -> None:
    jnp = pytest.importorskip("jax.numpy")
    for e in (-126, -100, -37, -1, 0, 1, 2, 63, 64, 127):
        assert float(_array.power_of_two(jnp.asarray(float(e), jnp.float32))) == 2.0**e
    for e in (-300, -7, 0, 9, 301):
        assert _array.power_of_two(np.asarray(float(e))) == 2.0**e
