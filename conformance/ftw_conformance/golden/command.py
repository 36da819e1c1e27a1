"""``python -m ftw_conformance golden write | check``: vectors for ports in other languages, written by the reference.

The file is a plain .npz, loaded without pickle; docs/golden-vectors.md names every array in it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ftw_reference as ref
import numpy as np

import ftw
from ftw.command_line import Parser
from ftw_conformance import problems
from ftw_conformance.verify.cases import explicit, models, sketches

__all__ = ["PATH", "check", "core", "load", "main", "reference"]

PATH = Path(__file__).with_name("golden.npz")
FORMAT = 1
TOLERANCE = 1e-9
KINDS = ("wide", "twins", "zeros", "clusters", "negative", "adam")
Arrays = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run the command: write the file, or hold the reference and the core to it."""
    parser = Parser(prog="python -m ftw_conformance golden", description=__doc__)
    parser.add_argument("what", choices=("write", "check"))
    parser.add_argument("--path", type=Path, default=PATH, help="the .npz file; the one in the package by default")
    options = parser.parse_args(argv)
    if options.what == "write":
        np.savez_compressed(options.path, **reference())
        print(f"{options.path.name}: {len(load(options.path))} arrays, {options.path.stat().st_size:,} bytes")
        return 0
    stored = load(options.path)
    code = 0
    for name, computed in (("reference", reference()), ("core", core(stored))):
        wrong = check(stored, computed, whole=name == "reference")
        print(f"{name:10} {len(computed)} arrays, {len(wrong)} wrong")
        for line in wrong:
            print("  " + line, file=sys.stderr)
        code = code or int(bool(wrong))
    return code


def load(path: Path = PATH) -> Arrays:
    """Return the arrays of a file; nothing in it is executed."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def check(stored: Arrays, computed: Arrays, *, whole: bool = True) -> list[str]:
    """Return what differs, a line for each array."""
    out = [f"{name} is missing" for name in stored if whole and name not in computed]
    for name, value in computed.items():
        if name not in stored:
            out.append(f"{name} is not in the file")
            continue
        expected, value = stored[name], np.asarray(value)
        if expected.shape != value.shape:
            out.append(f"{name} has shape {value.shape}, not {expected.shape}")
        elif expected.dtype.kind in "biuU":
            if not np.array_equal(expected, value):
                out.append(f"{name} differs: {value.tolist()}, not {expected.tolist()}")
        else:
            scale = float(np.max(np.abs(expected), initial=0.0)) or 1.0  # of zeros the error is absolute
            error = float(np.max(np.abs(expected - value), initial=0.0)) / scale
            if not error <= TOLERANCE:
                out.append(f"{name} is off by {error:.1e}, more than {TOLERANCE}")
    return out


def reference() -> Arrays:
    """Return inputs and results, by the reference alone."""
    out: Arrays = {"format": np.asarray(FORMAT)}
    rng = np.random.default_rng(2024)
    G = rng.normal(size=(12, 30)) + 0.3
    G[7], G[9] = G[2], 0.0
    t, d = rng.normal(size=30) + 0.3, rng.uniform(0, 2, size=30)
    u, s, vt = np.linalg.svd(rng.normal(size=(5, 6)), full_matrices=False)
    metrics = {
        "diagonal": d,
        "kronecker": ref.preconditioning.kronecker(models.psd(rng, 5), rng.uniform(0, 2, size=6)),
        "rotated": ref.preconditioning.rotated(
            models.orthonormal(rng, 5), rng.uniform(0, 2, size=(5, 6)), models.orthonormal(rng, 6)
        ),
        "polar": ref.preconditioning.polar(u, s + 0.3, vt),
    }
    samples = 0.06 * (rng.normal(size=(4, 30)) * 2 + 0.1 * t)  # short enough for the guard to act
    out |= {"gradients": G, "target": t, "target_samples": samples, "polar/u": u, "polar/s": s + 0.3, "polar/vt": vt}
    for name, P in metrics.items():
        out[f"metric/{name}"] = P
        out[f"scores/{name}"] = ref.scores(G, t, P)
        out[f"gram/{name}"] = ref.gram(G, P)
        out |= {f"selection/{name}/{k}": v for k, v in selection(ref.filter_then_weight(G, t, P, keep=5)).items()}
    b, K = out["scores/diagonal"], out["gram/diagonal"]
    for k in (1, 5):
        out[f"filters/top_k/{k}"] = ref.top_k(b, k).indices
        out[f"filters/matching/{k}"] = ref.matching(b, K, k).indices
        out[f"filters/greedy_utility/{k}"] = ref.greedy_utility(b, K, k).indices
    mean = np.mean(samples, axis=0)
    guarded = ref.filter_then_weight(G, mean, d, keep=5, target_samples=samples)
    out |= {f"selection/guarded/{k}": v for k, v in selection(guarded).items()}
    out["selection/guarded/shrinkage"] = np.asarray(guarded.shrinkage)
    for kind in KINDS:
        A, c = problems.make(kind, 12, 1)
        A = A + 0.01 * np.mean(np.diag(A)) * np.eye(12)  # the weights are then unique
        out |= {f"qp/{kind}/gram": A, f"qp/{kind}/linear": c}
        for name, constraint in sets().items():
            solution = ref.solve_qp(A, c, constraint)
            out |= {
                f"qp/{kind}/{name}/weights": solution.weights,
                f"qp/{kind}/{name}/objective": np.asarray(solution.objective),
            }
    v = rng.normal(size=9)
    out["project/point"] = v
    out |= {f"project/{name}": ref.project(v, constraint) for name, constraint in sets().items()}
    moment, a = rng.uniform(size=(3, 4)), rng.normal(size=(3, 4))
    out |= {"adam/exp_avg_sq": moment, "adam/anticipate": a}
    out["adam/raw"] = ref.preconditioning.adam(moment, 7, lr=0.01)
    out["adam/anticipated"] = ref.preconditioning.adam(moment, 7, lr=0.01, anticipate=a, damping=0.1)
    buckets = [[sketches.hashed(r, c, 11, 7) for c in range(6)] for r in range(5)]
    out["sketch/bucket"], out["sketch/sign"] = np.moveaxis(np.asarray(buckets), 2, 0)
    return out


def core(stored: Arrays) -> Arrays:
    """Return what the core makes of the inputs in a file."""
    G, t, d = stored["gradients"], stored["target"], stored["metric/diagonal"]
    x = {"w": ftw.Dense(G.reshape(-1, 5, 6))}
    g = {"w": t.reshape(5, 6)}
    operators: dict[str, Any] = {
        "diagonal": ftw.Diagonal(d.reshape(5, 6)),
        "polar": ftw.Polar(stored["polar/u"], stored["polar/s"], stored["polar/vt"]),
    }
    out: Arrays = {}
    for name, operator in operators.items():
        p = {"w": operator}
        out[f"scores/{name}"], out[f"gram/{name}"] = ftw.scores(x, g, p), ftw.gram(x, p)
        out |= {f"selection/{name}/{k}": v for k, v in selection(ftw.filter_then_weight(x, g, p, keep=5)).items()}
    b, K = stored["scores/diagonal"], stored["gram/diagonal"]
    for k in (1, 5):
        out[f"filters/top_k/{k}"] = ftw.filters.top_k(b, k).indices
        out[f"filters/matching/{k}"] = ftw.filters.matching(b, K, k).indices
        out[f"filters/greedy_utility/{k}"] = ftw.filters.greedy_utility(b, K, k).indices
    T = {"w": ftw.Dense(stored["target_samples"].reshape(-1, 5, 6))}
    mean = {"w": np.mean(explicit.dense(T["w"]), axis=0)}
    guarded = ftw.filter_then_weight(x, mean, {"w": operators["diagonal"]}, keep=5, target_samples=T)
    out |= {f"selection/guarded/{k}": v for k, v in selection(guarded).items()}
    out["selection/guarded/shrinkage"] = guarded.shrinkage
    for kind in KINDS:
        for name, constraint in sets().items():
            solution = ftw.solve_qp(stored[f"qp/{kind}/gram"], stored[f"qp/{kind}/linear"], constraint)
            out |= {f"qp/{kind}/{name}/weights": solution.weights, f"qp/{kind}/{name}/objective": solution.objective}
    out |= {f"project/{name}": ftw.constraints.project(c, stored["project/point"]) for name, c in sets().items()}
    v, a = stored["adam/exp_avg_sq"], stored["adam/anticipate"]
    for name, options in (("raw", {}), ("anticipated", {"anticipate": a, "damping": 0.1})):
        update = ftw.optimizers.adam(0 * v, v, 7, lr=0.01, **options)
        out[f"adam/{name}"] = update.operator.apply(np.ones(v.shape))
    return out


def selection(s: Any) -> Arrays:
    """Return the fields that both have."""
    fields = ("indices", "weights", "match", "predicted_decrease", "effective_size", "status")
    return {name: np.asarray(getattr(s, name)) for name in fields}


def sets() -> dict[str, Any]:
    """Return the constraint sets of the file."""
    return {
        "nonnegative": ftw.NonNegative(),
        "simplex": ftw.Simplex(1.0),
        "capped": ftw.CappedSimplex(0.25, 1.0),
        "box": ftw.Box(-0.1, 0.2),
    }
