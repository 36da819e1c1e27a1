"""Deliberate errors in records, operators, scores, Gram matrices, sketches."""

from __future__ import annotations

from .mutation import Mutation, errors_in

PRODUCTS: list[Mutation] = [
    *errors_in(
        "_factors.py",
        ("(n * t, d_out)).T @ xp.reshape(a,", "(n * t, d_out)).T @ -xp.reshape(a,", "a sign in combine"),
        (
            "return xp.matrix_transpose(b) @ a",
            "return xp.matrix_transpose(b) @ xp.flip(a, axis=1)",
            "tokens paired wrongly",
        ),
        (
            "product = a * (b @ m) if inward else b * (a @ m.T)",
            "product = a * (b @ m) if inward else b * (a @ m.T) ** 1 * 0.5",
            "half of the outward route",
        ),
        ("b = w * xp.where(w != 0, b, 0.0)", "b = w * b", "NaN of a zero-weight sample enters, in Rows"),
        ("a, b = xp.where(w != 0, a, 0.0), ", "a, b = a, ", "NaN of a zero-weight sample enters, in OuterProduct"),
        (
            "local = self.indices - rows.start",
            "local = self.indices",
            "a block of rows starts at the wrong row",
        ),
        (
            "inside = (local >= 0) & (local < height)",
            "inside = (local >= 0) & (local <= height)",
            "a row too many in a block",
        ),
        (
            "OuterProduct(times(xp, self.inputs, right), times(xp, self.output_grads, left))",
            "OuterProduct(times(xp, self.inputs, right), times(xp, self.output_grads, getattr(left, 'T', None)))",
            "a dense side enters transposed",
        ),
        (
            "return Rows(xp.take(self.indices, indices, axis=0), xp.take(self.output_grads",
            "return Rows(self.indices[: indices.shape[0], :], xp.take(self.output_grads",
            "take leaves the row numbers where they are",
        ),
    ),
    *errors_in(
        "gradients.py",
        (
            "total = term if total is None else total + term",
            "total = term",
            "Sum keeps its last part only: no cross terms",
        ),
        ("return Dense(-self.grads)", "return Dense(self.grads)", "a part of Polar with the wrong sign"),
        (
            "xp.result_type(*(xp.float32 if xp.finfo(d).bits < 32 else d for d in floats))",
            "xp.float32",
            "float32 accumulation",
        ),
    ),
    *errors_in(
        "_packed.py",
        (
            "xp.where((s < 0) | (s >= n), n, s)",
            "xp.where((s < 0) | (s >= n), 0, s)",
            "padding enters the first document",
        ),
        (
            "a, b = xp.where(w != 0, a, 0.0), w * xp.where(w != 0, b, 0.0)",
            "a, b = a, w * xp.where(w != 0, b, 0.0)",
            "NaN of a document without weight enters",
        ),
        ("(line - xp.take(first, owners)) * length", "0", "a long document's first chunk only, again and again"),
        ("inside = places < xp.take(starts, owners + 1)[:, None]", "inside = places < t", "chunks overlap"),
        ("inside = (local >= 0) & (local < r) & (samples < n)", "inside = (local >= 0) & (samples < n)", "rows spill"),
        ("here = hit & (rank == copy)[:, None]", "here = hit", "documents taken twice are mixed"),
        (
            "place = xp.sum(xp.where(here, line[:, None] + 1, 0)",
            "place = xp.sum(xp.where(here, line[:, None], 0)",
            "off by one",
        ),
        (
            "return self.over_tokens(xp, xp.sum(rows * b, axis=1))",
            "return self.over_tokens(xp, xp.sum(b, axis=1))",
            "rows",
        ),
    ),
    *errors_in(
        "_array.py",
        ("return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x", "return x", "16-bit sums"),
        (
            "out[ordered[first]] = xp.add.reduceat(values[order], first, axis=0)",
            "out[segments] = values",
            "repeated rows keep one",
        ),
        (
            "return xp.argsort(-x, stable=True)",
            "return xp.flip(xp.argsort(x, stable=True))",
            "ties broken the wrong way",
        ),
    ),
    *errors_in(
        "geometry.py",
        (
            "halves = self.left**0.5, self.right**0.5",
            "halves = self.left, self.right",
            "Kronecker diagonal applied twice",
        ),
        (
            "g = _array.over(left[:, None], g) * g if left.ndim == 1 else left @ g",
            "g = left[:, None] * g if left.ndim == 1 else g",
            "a missing side",
        ),
        (
            "return g * _array.over(self.values, g) ** 0.5",
            "return g * _array.cast(self.values, g)",
            "a root that is none",
        ),
    ),
    *errors_in(
        "_polar.py",
        (
            "return None, 2 / (s[:, None] + s[None, :])",
            "return None, 2 / (s[:, None] * s[None, :])",
            "Polar divides by a product",
        ),
        (
            "k.transposed(xp) if sign > 0 else",
            "k.transposed(xp) if sign < 0 else",
            "Polar: symmetric in place of antisymmetric part",
        ),
        ("right, sign), gain / 4", "right, sign), gain / 2", "Polar: a factor of two"),
        ("weights = beyond[:, None] if", "weights = beyond[:, None] ** 2 if", "Polar: what lies outside, squared"),
        ("transpose(k)) / 2 * _array.over(both, k)", "transpose(k)) / 2 * skew", "Polar: one gain for both parts of K"),
    ),
    *errors_in(
        "inner_products.py",
        (
            "for x, y in gradient_blocks(xp, piece, plan):\n                total = total + _weighted(x @ y.T, piece)",
            "for x, y in list(walk(xp, piece, plan))[:1]:\n                total = total + _weighted(x @ y.T, piece)",
            "all blocks but the first are skipped",
        ),
        (
            "stop = min(n, i + plan.rows)",
            "stop = min(n, i + plan.rows) - (1 if i + plan.rows < n else 0)",
            "a sample is lost between chunks",
        ),
        (
            "left = left * _array.over(weights[rows, columns], left) ** 0.5",
            "left = left * _array.cast(weights[rows, columns], left)",
            "the weights of a block enter twice",
        ),
        (
            "weights = xp.take(weights, distinct, axis=0)",
            "weights = weights[:size, :]",
            "rows renumbered, their weights not",
        ),
        (
            "product = (a @ flat_a.T) * (b @ flat_b.T)",
            "product = (a @ flat_a.T) + (b @ flat_b.T)",
            "pairs of tokens added, not multiplied",
        ),
        (
            "beside = sum_by_sample(xp, product.T, y.samples, y.n)",
            "beside = sum_by_sample(xp, product.T, x.samples[: y.samples.shape[0]], y.n)",
            "pairs of tokens added to the wrong documents",
        ),
        ("return (total + total.T) / 2", "return total", "the Gram matrix is not symmetrised"),
    ),
    *errors_in(
        "planner.py",
        (
            "for r in range(0, height, plan.rows):",
            "for r in range(0, height - height % plan.rows or height, plan.rows):",
            "the last block of rows is skipped",
        ),
        ("columns = max(1, min(width, max_bytes // per_element))", "columns = width", "max_bytes is ignored"),
        ("if by_tokens and in_tokens < in_blocks:", "if False:", "the route by tokens is never taken"),
    ),
    *errors_in(
        "sketch.py",
        ("enumerate(sorted(gradients))", "enumerate(gradients)", "a sketch by the order of insertion"),
        ("else weights**0.5", "else weights", "a sketch of P in place of its root"),
        ("sign = 1 - 2 * (low & 1)", "sign = 1 + 0 * (low & 1)", "a sketch without signs"),
        ("for _ in range(iterations):", "for _ in range(0):", "no subspace iteration"),
    ),
    *errors_in(
        "forward_scores.py",
        ("(before - after) /", "(after - before) /", "scores of the wrong sign"),
        ("/ _array.scalar_like(step, before)", "* 1.0", "scores not divided by the step"),
        ("eps**0.5", "eps", "a step of eps in place of its root"),
        ("xp.mean(xp.abs(", "xp.mean((", "losses of both signs cancel in the step"),
        ("usable = (slope > 0)", "usable = (slope != 0)", "a step upward"),
    ),
]
