"""The solvers that ``bench qp`` compares, ours and others', each set up for problems on the simplex."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

import ftw.qp
from ftw.constraints import Simplex

__all__ = ["Solver", "daqp", "installed", "reference"]

Solver = Callable[[np.ndarray, np.ndarray], Callable[[], Any]]


def installed(skip: list[str]) -> dict[str, Solver]:
    """Return what is installed by name: each takes a problem on the simplex and returns a call without arguments."""
    found: dict[str, Solver] = {}
    missing = []
    for name, build in (
        ("daqp", daqp),
        ("quadprog", _quadprog),
        ("proxsuite", _proxsuite),
        ("piqp", _piqp),
        ("qpax", _qpax),
        ("scipy nnls", _nnls),
        ("reference, numba", reference),
        ("core on numpy", _numpy),
        ("core on torch", _torch),
        ("core under jax.jit", _jax),
    ):
        if name in skip:
            continue
        try:
            found[name] = build()
        except ImportError:
            missing.append(name)
    if missing:
        print("not installed:", ", ".join(missing), "\n")
    return found


def _numpy() -> Solver:
    return lambda K, c: lambda: ftw.qp.solve_qp(K, c, Simplex()).weights


def _torch() -> Solver:
    import torch

    torch.set_num_threads(1)

    def prepare(K: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
        A, b = torch.from_numpy(K), torch.from_numpy(c)
        return lambda: ftw.qp.solve_qp(A, b, Simplex()).weights

    return prepare


def _jax() -> Solver:
    jax: Any = importlib.import_module("jax")

    jax.config.update("jax_enable_x64", True)
    solve = jax.jit(lambda K, c: ftw.qp.solve_qp(K, c, Simplex()).weights)

    def prepare(K: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
        A, b = jax.device_put(K), jax.device_put(c)
        return lambda: solve(A, b).block_until_ready()

    return prepare


def reference() -> Solver:
    """Return the reference's compiled solver."""
    fast = importlib.import_module("ftw_compiled")
    return lambda K, c: lambda: fast.solve_qp(K, c, Simplex()).weights


def daqp() -> Solver:
    """Return daqp, the baseline of every ratio."""
    solver = importlib.import_module("daqp")

    def prepare(K: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
        n = len(c)
        A, high, low = np.ones((1, n)), np.r_[np.full(n, 1e30), 1.0], np.r_[np.zeros(n), 1.0]
        sense = np.zeros(n + 1, dtype=np.int32)
        sense[n] = 5
        return lambda: solver.solve(K, -c, A, high, low, sense)[0]

    return prepare


def _quadprog() -> Solver:
    quadprog = importlib.import_module("quadprog")

    def prepare(K: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
        n = len(c)
        H, A, b = K + 1e-12 * np.eye(n), np.c_[np.ones(n), np.eye(n)], np.r_[1.0, np.zeros(n)]
        return lambda: quadprog.solve_qp(H, c, A, b, 1)[0]

    return prepare


def _proxsuite() -> Solver:
    proxqp = importlib.import_module("proxsuite").proxqp

    def prepare(K: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
        n = len(c)
        ones, one, eye = np.ones((1, n)), np.ones(1), np.eye(n)
        zero, top = np.zeros(n), np.full(n, 1e20)
        return lambda: proxqp.dense.solve(K, -c, ones, one, eye, zero, top, eps_abs=1e-10).x

    return prepare


def _piqp() -> Solver:
    piqp = importlib.import_module("piqp")

    def prepare(K: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
        n = len(c)

        def call() -> Any:
            solver = piqp.DenseSolver()
            solver.settings.eps_abs = solver.settings.eps_rel = 1e-12
            solver.setup(K, -c, np.ones((1, n)), np.ones(1), x_l=np.zeros(n))
            solver.solve()
            return solver.result.x

        return call

    return prepare


def _qpax() -> Solver:
    jax: Any = importlib.import_module("jax")

    jax.config.update("jax_enable_x64", True)
    qpax = importlib.import_module("qpax")
    solve = jax.jit(lambda *a: qpax.solve_qp(*a, solver_tol=1e-9)[0])

    def prepare(K: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
        n = len(c)
        a = [jax.device_put(x) for x in (K, -c, np.ones((1, n)), np.ones(1), -np.eye(n), np.zeros(n))]
        return lambda: solve(*a).block_until_ready()

    return prepare


def _nnls() -> Solver:
    """Return nnls on a square root of K with the sum as one heavy row, as users of scipy do; rescaled."""
    optimize = importlib.import_module("scipy.optimize")

    def prepare(K: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
        values, vectors = np.linalg.eigh(K)
        root = vectors * np.sqrt(np.maximum(values, 1e-14 * values[-1]))
        A = np.r_[root.T, np.full((1, len(c)), 1e4)]
        b = np.r_[np.linalg.lstsq(root, c, rcond=None)[0], 1e4]

        def call() -> Any:
            w = optimize.nnls(A, b)[0]
            return w / w.sum()

        return call

    return prepare
