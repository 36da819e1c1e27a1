"""Deliberate errors, as data: where, what stands there, what is put in its place, and what that would mean.

Each must be caught by ``verify`` on the NumPy backend. The text on the left must occur in the file exactly once. An
error whose text is gone, or no longer says which place it means, is reported as stale, which is a failure too.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["MUTATIONS", "Mutation"]


class Mutation(NamedTuple):
    """One deliberate error."""

    file: str
    old: str
    new: str
    what: str


def _all(file: str, *errors: tuple[str, str, str]) -> list[Mutation]:
    return [Mutation(file, *error) for error in errors]


MUTATIONS: list[Mutation] = [
    *_all(
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
    *_all(
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
    *_all(
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
    *_all(
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
    *_all(
        "geometry.py",
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
    *_all(
        "inner_products.py",
        (
            "for x, y in walk(xp, piece, plan):\n                total = total + _weighted(x @ y.T, piece)",
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
    *_all(
        "planner.py",
        (
            "for r in range(0, height, plan.rows):",
            "for r in range(0, height - height % plan.rows or height, plan.rows):",
            "the last block of rows is skipped",
        ),
        ("columns = max(1, min(width, max_bytes // per_element))", "columns = width", "max_bytes is ignored"),
        ("if by_tokens and in_tokens < in_blocks:", "if False:", "the route by tokens is never taken"),
    ),
    *_all(
        "optimizers/_update.py",
        (
            "xp.sqrt(total / max(math.prod(v.shape), 1))",
            "xp.sum(xp.sqrt(v)) / max(math.prod(v.shape), 1)",
            "the damping by the mean, not the rms",
        ),
        (
            "return -xp.expm1(t * math.log(beta))",
            "return -xp.expm1((t + 1) * math.log(beta))",
            "a correction a step late, for arrays",
        ),
        ("(xp.sqrt(v + eps_root) if eps_root else xp.sqrt(v)) + shift", "xp.sqrt(v + shift)", "eps inside the root"),
        (
            "shift = eps + damping *",
            "shift = eps + 0.0 * damping *",
            "the damping is missing",
        ),
        (
            "return offset + scalar_like(lr, param) * weight_decay * param",
            "return offset - scalar_like(lr, param) * weight_decay * param",
            "decay with the wrong sign",
        ),
        ("return Scale(0.0)", "return Scale(at_start)", "an untouched parameter moves"),
    ),
    *_all(
        "optimizers/_adam.py",
        ("early = rho_t <= 5", "early = rho_t <= 4", "RAdam rectifies a step early"),
        ("xp.maximum(b2 * u, xp.abs(a) + eps)", "xp.maximum(u, xp.abs(a) + eps)", "Adamax does not decay its maximum"),
        (
            "own = pick(xp, start, 1.0, correction(b2, step), v)\n    if v_max",
            "own = pick(xp, start, 1.0, correction(b2, step + 1), v)\n    if v_max",
            "the raw moment's correction is a step late",
        ),
        (
            "own = correction(b2, step + 1)\n        a = widen",
            "own = correction(b2, step)\n        a = widen",
            "step in place of step + 1",
        ),
        ("return v / own, start", "return v, start", "an undivided bias correction"),
        (
            "now = 1 / correction(b1, step + 1)",
            "now = 1 / correction(b1, step + 2)",
            "the numerator's correction is a step late",
        ),
        ("v = xp.maximum(v, widen(xp, v_max))", "v = widen(xp, v_max)", "AMSGrad forgets to take the maximum"),
        ("rectified = ((safe - 4) * (safe - 2)", "rectified = ((safe - 2) * (safe - 2)", "RAdam's rectification"),
        ("mu_next / (1 - product * mu * mu_next)", "mu_next / (1 - product * mu_next)", "NAdam's product of momenta"),
    ),
    *_all(
        "optimizers/_adagrad.py",
        ("v = alpha * v + (1 - alpha) * a**2", "v = alpha * v + a**2", "RMSprop adds the whole square"),
        (
            "rate = lr / (1 + step * lr_decay)",
            "rate = lr / (1 + (step + 1) * lr_decay)",
            "Adagrad's decay is a step early",
        ),
        ("v = v - mean**2", "v = v - mean", "the centred second moment"),
    ),
    *_all(
        "optimizers/_factored.py",
        (
            "xp.mean(a * a, axis=-1, keepdims=True)",
            "xp.sum(a * a, axis=-1, keepdims=True)",
            "Adafactor's rows are sums",
        ),
        (
            "mean = xp.mean(r, axis=-2, keepdims=True)",
            "mean = xp.mean(c, axis=-1, keepdims=True)",
            "Adafactor divides by the mean of the columns",
        ),
        ("(step + 1) ** -0.5, p)", "(step + 2) ** -0.5, p)", "Adafactor's relative step is a step late"),
        ("clip = xp.where(size > 1, size, 1.0)", "clip = size", "Adafactor stretches what it should clip"),
    ),
    *_all(
        "optimizers/_sign.py",
        ("b1 * m + (1 - b1) * _array", "b1 * m - (1 - b1) * _array", "Lion's anticipated gradient with the wrong sign"),
        (
            "share = 1.0 if momentum_buffer is None or not momentum else 1.0 - dampening",
            "share = 1.0 - dampening",
            "dampening in the first step",
        ),
    ),
    *_all(
        "optimizers/_matrix.py",
        (
            "a = a if left is None else left.T @ a",
            "a = a if left is None else left @ a",
            "SOAP rotates the anticipated gradient the wrong way",
        ),
        (
            "offset = offset if right is None else offset @ right.T",
            "offset = offset if right is None else offset @ right",
            "SOAP's momentum comes back transposed",
        ),
        (
            "return math.sqrt(max(1.0, height / width))",
            "return math.sqrt(max(1.0, width / height))",
            "Muon's scale of wide matrices",
        ),
        (
            "operator = Rotated(left, inner.values, right)",
            "operator = Rotated(left, inner.values[:, ::-1], right)",
            "SOAP's values in the wrong order",
        ),
        (
            "of_gradient = 1 - momentum**2 if nesterov",
            "of_gradient = 1 - momentum if nesterov",
            "Muon's Nesterov coefficient",
        ),
        ("xp.where(slope < 0, 0.0, slope)", "xp.abs(slope)", "Muon keeps its negative part, turned over"),
        ("_slope(steps, x, -y)", "_slope(steps, x, y)", "Muon: one slope for both parts"),
    ),
    *_all(
        "filters.py",
        (
            "        best = xp.argmax(values)\n",
            "        best = values.shape[0] - 1 - xp.argmax(xp.flip(values))\n",
            "matching and greedy utility: ties by the last index",
        ),
        (
            "beaten = ~allowed & (values >",
            "beaten = ~allowed & (values <",
            "who is refused by the quota alone",
        ),
        ("low = int(place)", "low = int(place + 0.5)", "the quantile between the wrong scores"),
        (
            "xp.where(spread > 0, spread, xp.ones_like(spread)) / temperature",
            "xp.where(spread > 0, spread, xp.ones_like(spread)) * temperature",
            "the temperature upside down",
        ),
        ("uniforms * upper[-1]", "uniforms", "resample: weights taken to sum to one"),
        (
            "residual = scores - xp.take(gram, picks, axis=1) @ weights",
            "residual = (scores - xp.take(gram, picks, axis=1) @ weights) / xp.sqrt(xp.linalg.diagonal(gram))",
            "the residual divided by sqrt(K_ii)",
        ),
        (
            "ridge=ridge * mean, start=start)",
            "ridge=ridge, start=start)",
            "an absolute ridge in matching",
        ),
        (
            "mean = xp.sum(diagonal) / xp.sum(xp.astype(filled, start.dtype))",
            "mean = xp.mean(xp.linalg.diagonal(gram))",
            "the ridge by all candidates, not by the kept",
        ),
        (
            "place = quantile * (scores.shape[0] - 1)",
            "place = (1 - quantile) * (scores.shape[0] - 1)",
            "the quantile from the other end",
        ),
        (
            "xp.take(scores, best.indices) >= _array.scalar_like(value, scores)",
            "xp.take(scores, best.indices) > _array.scalar_like(value, scores)",
            "a score equal to the value fails",
        ),
        ('side="right")', 'side="left")', "resample: off by one at the borders"),
        (
            "start = scores - eta * xp.linalg.diagonal(gram) / 2",
            "start = scores - eta * xp.linalg.diagonal(gram)",
            "greedy utility without its half",
        ),
        ("noise = -xp.log(-xp.log(", "noise = xp.log(-xp.log(", "Gumbel noise with the wrong sign"),
    ),
    *_all(
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
    *_all(
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
    *_all(
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
    *_all(
        "guard.py",
        ("* (1.0 if m > 1 else 0.0)", "", "one target sample has a variance"),
        (
            "xp.clip(slope * (1 - f), 0.0, cap), f",
            "xp.clip(slope * (1 - f), 0.0, 1.0), f",
            "the guard knows no cap, for arrays",
        ),
        ("slope * (1 - f), 0.0, cap", "slope * (f - 1), 0.0, cap", "the gate opens the wrong way, for arrays"),
        (
            "gate = min(max(slope * (1 - f), 0.0), cap)",
            "gate = min(max(slope * (f - 1), 0.0), cap)",
            "the same, for numbers",
        ),
        ("max(m - 1, 1)", "max(m, 1)", "m in place of m - 1, for arrays"),
        ("/ (m - 1) if m > 1", "/ m if m > 1", "m in place of m - 1, for numbers"),
        ("far = pool_distance > v", "far = pool_distance > 0", "the minimum is missing in James and Stein's factor"),
        ("EXPLAINED * s**0.5", "EXPLAINED * s", "the reach in proportion to the number of candidates"),
        ("+ RIDGE * xp.eye", "+ 2 * RIDGE * xp.eye", "twice the ridge in the reach"),
        ("return xp.maximum(*doubts)", "return xp.minimum(*doubts)", "doubt only where both judges doubt"),
        ("xp.where(there, squares, 0.0) / s)", "xp.where(there, squares, 0.0))", "the candidates' squares summed"),
    ),
    *_all(
        "_options.py",
        (
            "shortlist = -int(-n * shortlist // 1)",
            "shortlist = int(n * shortlist)",
            "a fraction of the pool rounded down",
        ),
        ("return min(n, max(keep, shortlist))", "return min(n, shortlist)", "a shortlist shorter than keep"),
    ),
    *_all(
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
    *_all(
        "choice.py",
        ("< filtered.count", "<= filtered.count", "one more passes than the filter says"),
        (
            "predicted_decrease=gained - length / 2",
            "predicted_decrease=length / 2 - gained",
            "the predicted decrease with the wrong sign",
        ),
        (
            "places = [go_on + int((i + 0.5) * rest / q) for i in range(q)]",
            "places = [go_on + int(i * rest / q) for i in range(q)]",
            "the strata's places at their edges",
        ),
        (
            "predicted_decrease=gained - length / 2",
            "predicted_decrease=gained - length",
            "the predicted decrease without its half",
        ),
        (
            "return xp.sum(w) ** 2 / xp.where(squares == 0,",
            "return xp.sum(w) / xp.where(squares == 0,",
            "the effective size",
        ),
        (
            "gained = xp.sum(weights * xp.take(_finite(xp, b), filtered.indices))",
            "gained = xp.sum(weights * c)",
            "the match of the shrunk target",
        ),
        ("values, a = _loops.cond(ratio < 1, opened, closed)", "values, a = closed()", "the guard never acts"),
        ("return (1 - a) * b + a * means, a", "return b + a * means, a", "the shrunk target keeps its own length"),
        ("short = xp.sort(order[:go_on])", "short = order[:go_on]", "the shortlist in the order of the scores"),
        ("[rest / q / n] * q", "[1 / n] * q", "the second stratum counts too little"),
        ("return xp.where(xp.isfinite(x), x, 0.0)", "return x", "NaN goes on to the filter"),
        ("intact = xp.all(xp.isfinite(scores)) &", "intact =", "a NaN outside the shortlist goes unnoticed"),
    ),
    *_all(
        "sketch.py",
        ("enumerate(sorted(gradients))", "enumerate(gradients)", "a sketch by the order of insertion"),
        ("else weights**0.5", "else weights", "a sketch of P in place of its root"),
        ("sign = 1 - 2 * (low & 1)", "sign = 1 + 0 * (low & 1)", "a sketch without signs"),
        ("for _ in range(iterations):", "for _ in range(0):", "no subspace iteration"),
    ),
    *_all(
        "selection.py",
        ("xp.full((n,), 1 / n, dtype=dtype", "xp.full((n,), 1.0, dtype=dtype", "the pool's sum for its mean"),
        (
            "{name: goal[name] - mean[name] for name in mean}",
            "{name: target[name] + mean[name] for name in mean}",
            "the guard's distance is a sum",
        ),
    ),
    *_all(
        "forward_scores.py",
        ("(before - after) /", "(after - before) /", "scores of the wrong sign"),
        ("/ _array.scalar_like(step, before)", "* 1.0", "scores not divided by the step"),
        ("eps**0.5", "eps", "a step of eps in place of its root"),
        ("xp.mean(xp.abs(", "xp.mean((", "losses of both signs cancel in the step"),
        ("usable = (slope > 0)", "usable = (slope != 0)", "a step upward"),
    ),
    *_all(
        "optimizers/_schedule_free.py",
        (
            "gamma * (1 - beta * (1 - share))",
            "gamma * (1 - beta * share)",
            "the share of z taken for that of the average",
        ),
        (
            "weight / pick(xp, some, both, 1.0, like)",
            "weight / pick(xp, some, before, 1.0, like)",
            "weights less the last",
        ),
        ("1.0, (step + 1) / warmup_steps", "1.0, step / warmup_steps", "a warm-up that begins at zero"),
    ),
    *_all(
        "optimizers/_factored.py",
        ("square = a * a + eps[0]", "square = a * a", "the floor of transformers' Adafactor left out"),
        (
            "offset + beta1 * widen(xp, exp_avg)",
            "offset + alpha * beta1 * widen(xp, exp_avg)",
            "a rate on past updates",
        ),
    ),
    *_all(
        "optimizers/_adagrad.py",
        ("xp.sqrt(u + eps)", "xp.sqrt(u)", "Adadelta's floor of the updates left out"),
    ),
]
