"""Deliberate errors in constraints and the QP."""

from __future__ import annotations

from .mutation import Mutation, errors_in

WEIGHTS: list[Mutation] = [
    *errors_in(
        "constraints.py",
        ("    z = xp.maximum(z, limits.lower)\n    return z if", "    return z if", "the lower bound is ignored"),
        (
            "return 4 * like.shape[-1]",
            "return 1e12 * like.shape[-1]",
            "caps that nearly reach the total are accepted",
        ),
        (
            "good = xp.all((lower <= upper) &",
            "good = xp.any((lower <= upper) &",
            "one coordinate that is not empty suffices",
        ),
        (
            "fori_loop(2, lambda _, z: _cut",
            "fori_loop(1, lambda _, z: _cut",
            "a projection from afar is not taken again from nearby",
        ),
        ("return z if limits.upper is None else xp.minimum(z, limits.upper)", "return z", "the cap is ignored"),
        (
            "return good & (total >= 0) & (total <= xp.sum(upper, axis=-1) + _slack(xp, upper, total))",
            "return good & (total >= 0)",
            "caps too small for the total are accepted",
        ),
        (
            "normal = xp.ones_like(v) if metric is None else 1 / xp.sqrt(",
            "normal = xp.ones_like(v) if metric is None else xp.sqrt(",
            "the projection's metric inverted",
        ),
    ),
    *errors_in(
        "qp/problem.py",
        (
            "return read(f), read(kkt), _array.pick(xp, loss > 0, loss, 0.0) / scale",
            "return read(f), read(kkt), 0.0 * loss",
            "the gap is always zero",
        ),
        ("M = M + xp.matrix_transpose(M)", "M = 2 * M", "the matrix is not symmetrised"),
        (
            "M = M + unit * (r * (column(ridge) * r))[..., None]",
            "M = M + unit * (r * column(ridge))[..., None]",
            "the ridge is scaled once",
        ),
        (
            "kkt = xp.max(abs(z - clip(xp, z - slope, p.limits)), axis=-1) / size",
            "kkt = 0.0 * xp.max(abs(z), axis=-1) / size",
            "the residual is always zero",
        ),
        ("f = dot(xp, z, 0.5 * (slope - p.q))", "f = dot(xp, z, slope - p.q)", "the objective without its half"),
    ),
    *errors_in(
        "qp/solve.py",
        (
            "float(xp.finfo(M.dtype).eps) ** 0.5 * unit",
            "1e3 * float(xp.finfo(M.dtype).eps) ** 0.5 * unit",
            "an indefinite matrix passes for rounding",
        ),
        (
            "return w, *keep(xp, certified, proof, _proof(xp, p, z))",
            "return w, *proof",
            "out of steps, the certificate of another point",
        ),
        ("status = pick(xp, is_psd, status, ok + int(Status.NOT_PSD))", "", "indefinite matrices are accepted"),
        ("status = pick(xp, is_finite, status, ok + int(Status.NOT_FINITE))", "", "NaN has no status"),
    ),
    *errors_in(
        "weighing.py",
        ("useful = xp.any(passed & (c > 0))", "useful = xp.any(c > 0)", "usefulness of those that did not pass"),
        (
            "fitted, weights = weights, weights * scale",
            "fitted, weights = weights, weights * 1.0",
            "weights are not normalised",
        ),
        (
            "mean = xp.sum(diagonal) / divisor",
            "mean = xp.sum(diagonal) / c.shape[0]",
            "the ridge divided by all places",
        ),
    ),
]
