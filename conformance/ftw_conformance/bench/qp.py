"""``python -m ftw_conformance bench qp``: the weights' solver beside its peers, by CPU time, on fresh random problems.

Every round draws one problem of each kind and lets all solvers at it in turn, so that whatever else the machine is
doing falls on all alike. Times are CPU time of the process; run with one thread (``OMP_NUM_THREADS=1``, set here if
numpy has not been loaded). A ratio is the median over the rounds of a solver's time over daqp's; the table gives the
median over the kinds and the worst kind. Peers that are not installed are named.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import importlib  # noqa: E402
import secrets  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

import ftw.qp  # noqa: E402
from ftw.command_line import Parser  # noqa: E402
from ftw.constraints import Box, CappedSimplex, NonNegative, Simplex  # noqa: E402
from ftw_conformance.problems import KINDS, make  # noqa: E402

from .qp_solvers import Solver, daqp, installed, reference  # noqa: E402

FIGURES = (  # route, size, asked: median over kinds, worst kind
    ("reference, numba", 64, 0.7, 1.5),
    ("reference, numba", 256, 0.45, None),
    ("reference, numba", 1024, 0.5, None),
    ("core on numpy", 16, 12.0, None),
    ("core on numpy", 32, 10.0, None),
    ("core on numpy", 64, 3.0, 20.0),
    ("core on numpy", 256, 0.8, 20.0),
    ("core on torch", 64, 8.0, None),
    ("core on torch", 256, 1.0, None),
    ("core under jax.jit", 64, 4.0, None),
)


def main(argv: list[str] | None = None) -> int:
    """Print the tables; the exit code is 1 if a problem was not solved."""
    parser = Parser(prog="python -m ftw_conformance bench qp", description=__doc__)
    parser.add_argument("--seed", type=int, help="repeat a run; drawn anew if absent")
    parser.add_argument("--rounds", type=int, default=5, help="problems of each kind and size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 256])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--skip", nargs="*", default=[], help="solvers to leave out")
    options = parser.parse_args(argv)
    if "daqp" in options.skip:
        parser.error("--skip daqp: every ratio is to its time")
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    print(f"seed {seed}, {options.rounds} rounds, {len(options.kinds)} kinds, simplex, float64, CPU time, one thread\n")
    solvers = installed(options.skip)
    failures = accuracy(seed, options)
    for n in options.sizes:
        times(solvers, n, seed, options)
    batch(seed, options)
    gradient_only(seed, options)
    drift(seed, options)
    return 1 if failures else 0


def accuracy(seed: int, options: Any) -> int:
    """Solve every kind on every set in both precisions; print the worst residual and error; return the failures."""
    print("all kinds, four sets, n = 16 and 64 | worst kkt | worst objective error | not OK")
    failures = 0
    for dtype, kkt_asked, error_asked in ((np.float64, 1e-8, 1e-8), (np.float32, 1e-4, 1e-3)):
        worst_kkt = worst_error = 0.0
        refused = 0
        for n in (16, 64):
            for kind in options.kinds:
                K, c = make(kind, n, seed)
                for constraint in (NonNegative(), Simplex(), CappedSimplex(4 / n), Box(-1 / n, 4 / n)):
                    exact = _exact(K, c, constraint)
                    r = ftw.qp.solve_qp(K.astype(dtype), c.astype(dtype), constraint)
                    w = r.weights.astype(float)
                    # the objective against its own terms: it may itself be next to nothing
                    size = max(abs(exact), np.abs(w) @ np.abs(c), 0.5 * w @ K @ w, 1e-300)
                    error = max(0.5 * w @ K @ w - c @ w - exact, 0.0) / size
                    worst_kkt, worst_error = max(worst_kkt, float(r.kkt)), max(worst_error, error)
                    refused += int(r.status) != 0
        good = refused == 0 and worst_kkt <= kkt_asked and worst_error <= error_asked
        failures += not good
        print(f"{np.dtype(dtype).name:36}| {worst_kkt:9.1e} | {worst_error:21.1e} | {refused}")
    print()
    return failures


def _exact(K: np.ndarray, c: np.ndarray, constraint: Any) -> float:
    """Return the least objective known: the reference's where it is installed, else our own."""
    w = ftw.qp.solve_qp(K, c, constraint).weights
    best = 0.5 * w @ K @ w - c @ w
    try:
        theirs = importlib.import_module("ftw_reference.qp").solve_qp(K, c, constraint)
    except ImportError:
        return float(best)
    w = np.asarray(theirs.weights)
    return float(min(best, 0.5 * w @ K @ w - c @ w)) if int(theirs.status) == 0 else float(best)


def times(solvers: dict[str, Solver], n: int, seed: int, options: Any) -> None:
    """Print one table: every solver at one size, over all kinds."""
    taken: dict[str, dict[str, list[float]]] = {name: {k: [] for k in options.kinds} for name in solvers}
    wrong: dict[str, set[str]] = {name: set() for name in solvers}
    rounds = max(1, options.rounds if n <= 256 else options.rounds // 2)
    for i in range(rounds):
        for kind in options.kinds:
            K, c = make(kind, n, seed + i)
            mean = np.trace(K) / n  # peers stop at absolute tolerances: all get the problem at unit scale
            K, c = K / mean, c / mean
            best = ftw.qp.solve_qp(K, c, Simplex())
            size = max(abs(float(best.objective)), float(np.abs(best.weights) @ np.abs(c)))
            for name, prepare in solvers.items():
                if n > 256 and name in ("quadprog", "qpax"):
                    continue
                try:
                    call = prepare(K, c)
                    w = call()  # what is compiled is compiled now
                    repeats = 3 if n <= 64 else 1
                    least = []
                    for _ in range(repeats):
                        begin = time.process_time()
                        w = call()
                        least.append(time.process_time() - begin)
                    taken[name][kind].append(float(np.median(least)))
                    w = np.asarray(w, dtype=float)
                    off = abs(0.5 * w @ K @ w - c @ w - float(best.objective)) / size
                    if not (off <= 1e-8 and abs(w.sum() - 1) <= 1e-8 and w.min() >= -1e-8):
                        wrong[name].add(kind)
                except Exception as error:  # a peer that gives up is part of the result
                    wrong[name].add(f"{kind} ({type(error).__name__})")
    print(f"n = {n:<31} | median us | / daqp | worst kind  | asked     | not to 1e-8")
    for name in solvers:
        medians = {k: float(np.median(t)) for k, t in taken[name].items() if t}
        if not medians:
            print(f"{name:35} | {'-':>9} |")
            continue
        ratios = {}
        for k, t in taken[name].items():
            pairs = list(zip(t, taken.get("daqp", {}).get(k, []), strict=False))
            if pairs:
                ratios[k] = float(np.median([a / b for a, b in pairs]))
        line = f"{name:35} | {1e6 * np.median(list(medians.values())):9.0f} |"
        if ratios:
            worst = max(ratios, key=lambda k: ratios[k])
            line += f" {np.median(list(ratios.values())):6.2f} | {ratios[worst]:4.1f} {worst[:6]:6} |"
            asked = [(m, w) for route, size_, m, w in FIGURES if name == route and size_ == n]
            line += f" {asked[0][0]:<4} {asked[0][1] or '':<4} |" if asked else " " * 11 + "|"
        print(line, ", ".join(sorted(wrong[name])) or "none")
    print()


def batch(seed: int, options: Any) -> None:
    """Print the time of 64 problems of n = 32: vmap, leading axes, and loops of daqp and of the reference."""
    routes: dict[str, Callable[[np.ndarray, np.ndarray], Callable[[], Any]]] = {}
    one = daqp()
    routes["daqp, a loop"] = lambda K, c: lambda: [one(a, b)() for a, b in zip(K, c, strict=True)]
    if "reference, numba" not in options.skip:
        try:
            fast = reference()
            routes["reference, a loop"] = lambda K, c: lambda: [fast(a, b)() for a, b in zip(K, c, strict=True)]
        except ImportError:
            print("not installed: ftw_reference")
    routes["core on numpy, leading axis"] = lambda K, c: lambda: ftw.qp.solve_qp(K, c, Simplex())
    try:
        jax: Any = importlib.import_module("jax")

        jax.config.update("jax_enable_x64", True)
        mapped = jax.jit(jax.vmap(lambda K, c: ftw.qp.solve_qp(K, c, Simplex()).weights))

        def prepare(K: np.ndarray, c: np.ndarray) -> Callable[[], Any]:
            A, b = jax.device_put(K), jax.device_put(c)
            return lambda: mapped(A, b).block_until_ready()

        routes["core, jit of vmap"] = prepare
    except ImportError:
        print("not installed: jax")
    taken: dict[str, list[list[float]]] = {name: [] for name in routes}
    for kind in options.kinds:
        problems = [make(kind, 32, seed + 1000 * i) for i in range(64)]
        K = np.stack([k / np.trace(k) * 32 for k, _ in problems])
        c = np.stack([b / np.trace(k) * 32 for k, b in problems])
        calls = {name: prepare(K, c) for name, prepare in routes.items()}
        for call in calls.values():
            call()
        row: dict[str, list[float]] = {name: [] for name in routes}
        for _ in range(options.rounds):
            for name, call in calls.items():
                begin = time.process_time()
                call()
                row[name].append(time.process_time() - begin)
        for name in routes:
            taken[name].append([float(np.median(row[name])), float(np.median(row["daqp, a loop"]))])
    print("64 problems of n = 32             | median ms | / daqp loop | worst kind")
    for name, pairs in taken.items():
        ratios = [a / b for a, b in pairs]
        worst = int(np.argmax(ratios))
        print(
            f"{name:33} | {1e3 * np.median([a for a, _ in pairs]):9.2f} | {np.median(ratios):11.2f} |"
            f" {ratios[worst]:.1f} {options.kinds[worst]}"
        )
    print()


def gradient_only(seed: int, options: Any) -> None:
    """Print what the polish buys: steps and time of plain accelerated projected gradient, to three tolerances."""
    print("n = 64, gradient without the polish | steps: median, worst kind | median us")
    for tol in (1e-4, 1e-6, 1e-8):
        steps, seconds = [], []
        for kind in options.kinds:
            K, c = make(kind, 64, seed)
            begin = time.process_time()
            r = ftw.qp.solve_qp(K, c, Simplex(), tol=tol, max_steps=3000, _polish=False)
            seconds.append(time.process_time() - begin)
            steps.append(int(r.steps))
        worst = int(np.argmax(steps))
        many = f"{steps[worst]}{'+' if steps[worst] >= 3000 else ''} {options.kinds[worst]}"
        print(f"to {tol:<32.0e} | {np.median(steps):6.0f}, {many:17} | {1e6 * np.median(seconds):9.0f}")
    steps = [int(ftw.qp.solve_qp(*make(k, 64, seed), Simplex()).steps) for k in options.kinds]
    worst = int(np.argmax(steps))
    print(f"{'with it, to rounding':35} | {np.median(steps):6.0f}, {f'{steps[worst]} {options.kinds[worst]}':17} |\n")


def drift(seed: int, options: Any) -> None:
    """Print warm against cold over 100 steps of a slowly turning problem of n = 64."""
    rng = np.random.default_rng(seed)
    G, target = rng.normal(size=(64, 128)), rng.normal(size=128)
    start = None
    warm, cold, counts = [], [], []
    for _ in range(100):
        G, target = 0.98 * G + 0.2 * rng.normal(size=G.shape), 0.98 * target + 0.2 * rng.normal(size=128)
        K, c = G @ G.T, G @ target
        begin = time.process_time()
        a = ftw.qp.solve_qp(K, c, Simplex())
        middle = time.process_time()
        b = ftw.qp.solve_qp(K, c, Simplex(), start=a.weights if start is None else start)
        end = time.process_time()
        cold.append(middle - begin)
        warm.append(end - middle)
        counts.append((int(b.steps), int(a.steps)))
        start = b.weights
    ratio = np.median(np.array(warm) / np.array(cold))
    print(f"100-step drift, n = 64, core on numpy: warm / cold {ratio:.2f} in time, steps {np.mean(counts, axis=0)}")


if __name__ == "__main__":
    raise SystemExit(main())
