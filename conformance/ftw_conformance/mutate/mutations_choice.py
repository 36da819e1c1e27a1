"""Deliberate errors in filters, the guard, options, the choice."""

from __future__ import annotations

from .mutation import Mutation, errors_in

CHOICE: list[Mutation] = [
    *errors_in(
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
        ("low = int(position)", "low = int(position + 0.5)", "the quantile between the wrong scores"),
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
            "position = quantile * (scores.shape[0] - 1)",
            "position = (1 - quantile) * (scores.shape[0] - 1)",
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
    *errors_in(
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
    *errors_in(
        "_options.py",
        (
            "shortlist = -int(-n * shortlist // 1)",
            "shortlist = int(n * shortlist)",
            "a fraction of the pool rounded down",
        ),
        ("return min(n, max(keep, shortlist))", "return min(n, shortlist)", "a shortlist shorter than keep"),
    ),
    *errors_in(
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
    *errors_in(
        "selection.py",
        ("xp.full((n,), 1 / n, dtype=dtype", "xp.full((n,), 1.0, dtype=dtype", "the pool's sum for its mean"),
        (
            "{name: scaled[name] - mean[name] for name in mean}",
            "{name: target[name] + mean[name] for name in mean}",
            "the guard's distance is a sum",
        ),
    ),
]
