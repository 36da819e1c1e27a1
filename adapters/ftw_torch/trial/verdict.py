"""Which arm to use: paired differences to random, with intervals; the test split has no way in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LEAST_SEEDS", "Difference", "Verdict", "decide", "difference", "t_quantile"]

LEAST_SEEDS = 3
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """One arm's loss less another's over shared seeds: mean and ends of the interval, NaN with fewer than 2 seeds."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Verdict:
    """The arm to use, None if none can be told from the baseline; the same in a sentence; differences to it by arm."""

    arm: str | None
    sentence: str
    differences: dict[str, Difference]


def t_quantile(p: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution, for ``p`` above one half.

    By bisection of the distribution function, which is a finite series for a whole number of degrees of freedom
    (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _t_central(high, freedom) < 2 * p - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_central(middle, freedom) < 2 * p - 1 else (low, middle)
    return high


def _t_central(t: float, freedom: int) -> float:
    """Return the probability of ``|T| < t``."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))


def difference(one: Mapping[int, float], other: Mapping[int, float], comparisons: int = 1) -> Difference:
    """Return ``one - other`` over shared seeds; the intervals hold in all ``comparisons`` together (Bonferroni)."""
    gaps = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    gaps = [gap for gap in gaps if math.isfinite(gap)]
    n = len(gaps)
    if n < 2:
        return Difference(gaps[0] if gaps else math.nan, math.nan, math.nan, n)
    mean = statistics.fmean(gaps)
    half = t_quantile(1 - (1 - CONFIDENCE) / (2 * comparisons), n - 1) * statistics.stdev(gaps) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def decide(
    losses: Mapping[str, Mapping[int, float]], baseline: str, meaning: Mapping[str, str] | None = None
) -> Verdict:
    """Choose an arm by its validation losses.

    Parameters
    ----------
    losses : mapping of arm to mapping of seed to validation loss
        From the simplest arm to the most complicated. An arm with a loss that is not finite, or lacks a seed of the
        baseline's, is not chosen.
    baseline : str
        The arm that the others are compared with.
    meaning : mapping of str to str, optional
        What to call an arm beside its name.

    Returns
    -------
    Verdict
        Of the arms whose interval lies below zero the one with the lowest mean, or the simplest one that cannot be told
        from it. The intervals hold together at 95 %.
    """
    base = losses[baseline]
    others = [arm for arm in losses if arm != baseline]
    seeds = {seed for seed, value in base.items() if math.isfinite(value)}
    found = {arm: difference(losses[arm], base, len(others)) for arm in others}
    if len(seeds) < LEAST_SEEDS:
        few = f"{len(seeds)} paired seed{'' if len(seeds) == 1 else 's'}"
        return Verdict(None, f"It cannot be told with {few}: at least {LEAST_SEEDS} are needed; do not select.", found)
    sound = [arm for arm in others if found[arm].seeds == len(seeds)]
    better = [arm for arm in sound if found[arm].high < 0]
    if not better:
        words = f"None can be told from {baseline}: do not select"
        if sound:
            closest = min(sound, key=lambda arm: found[arm].mean)
            words += f" (the lowest, {closest}: {_interval(found[closest])})"
        return Verdict(None, words + ".", found)
    best = min(better, key=lambda arm: found[arm].mean)
    chosen, tie = best, ""
    for arm in better[: better.index(best)]:
        gap = difference(losses[best], losses[arm], len(others))
        if gap.high >= 0:
            chosen = arm
            tie = f"; {best} is {abs(gap.mean):.3g} lower, which cannot be told from no difference"
            break
    name = f"{chosen} ({meaning[chosen]})" if meaning and chosen in meaning else chosen
    return Verdict(chosen, f"Use {name}: against {baseline} {_interval(found[chosen])}{tie}.", found)


def _interval(gap: Difference) -> str:
    return (
        f"{gap.mean:+.3f} in validation loss at equal time, 95 % interval {gap.low:+.3f} to {gap.high:+.3f}, "
        f"{gap.seeds} paired seeds"
    )
