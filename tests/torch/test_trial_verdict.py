"""The verdict of a trial: intervals against tables, and what it says."""

import math
import statistics

import pytest

pytest.importorskip("torch")

from ftw_torch.trial.verdict import decide, difference, t_quantile


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),  # from printed tables of Student's t
    [
        (0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 3, 3.18245), (0.975, 4, 2.77645), (0.975, 7, 2.36462),
        (0.975, 30, 2.04227), (0.995, 2, 9.92484), (0.995, 5, 4.03214), (0.9, 6, 1.43976), (0.95, 10, 1.81246),
    ],
)  # fmt: skip
def test_quantiles(p, freedom, expected):
    assert t_quantile(p, freedom) == pytest.approx(expected, rel=1e-5)


def test_the_interval_of_a_difference():
    one, other = {1: 0.5, 2: 0.7, 3: 0.6, 9: 1.0}, {1: 1.0, 2: 1.0, 3: 1.2}
    gaps = [-0.5, -0.3, -0.6]
    found = difference(one, other)
    half = 4.30265 * statistics.stdev(gaps) / math.sqrt(3)
    assert (found.mean, found.seeds) == (pytest.approx(statistics.fmean(gaps)), 3)
    assert (found.low, found.high) == (
        pytest.approx(found.mean - half, rel=1e-4), pytest.approx(found.mean + half, rel=1e-4),
    )  # fmt: skip
    assert difference(one, other, 5).high == pytest.approx(found.mean + half * 9.92484 / 4.30265, rel=1e-4)
    assert math.isnan(difference({1: 0.0}, other).high)


def seeds(*values):
    return dict(enumerate(values, 1))


BASE = seeds(1.0, 1.1, 0.9, 1.05)


def shifted(by, *noise):
    return {seed: value + by + noise[i % len(noise)] for i, (seed, value) in enumerate(BASE.items())}


def test_the_lowest_arm_is_chosen():
    verdict = decide({"random": BASE, "a": shifted(-0.1, 0.01, -0.01), "b": shifted(-0.4, 0.01, -0.01)}, "random")
    assert verdict.arm == "b"
    assert verdict.sentence.startswith("Use b: against random -0.400 in validation loss at equal time")


def test_of_arms_that_cannot_be_told_apart_the_simplest_is_chosen():
    verdict = decide({"random": BASE, "a": shifted(-0.30, 0.03, -0.03), "b": shifted(-0.31, -0.03, 0.03)}, "random")
    assert verdict.arm == "a"
    assert "b is 0.01 lower, which cannot be told from no difference" in verdict.sentence


def test_a_worse_arm_or_a_noisy_one_is_not():
    for other in (shifted(0.3, 0.01, -0.01), shifted(-0.05, 0.3, -0.3)):
        verdict = decide({"random": BASE, "a": other}, "random")
        assert verdict.arm is None
        assert verdict.sentence.startswith("None can be told from random: do not select")


def test_paired_differences_tell_what_means_cannot():
    base = seeds(1.0, 5.0, 9.0)
    other = seeds(0.90, 4.91, 8.89)
    assert decide({"random": base, "a": other}, "random").arm == "a"
    assert decide({"random": base, "a": seeds(4.91, 8.89, 0.90)}, "random").arm is None


def test_an_arm_with_a_failed_run_is_not_chosen():
    other = shifted(-0.5, 0.01, -0.01) | {4: math.inf}
    assert decide({"random": BASE, "a": other}, "random").arm is None
    assert decide({"random": BASE, "a": other, "b": shifted(-0.1, 0.01, -0.01)}, "random").arm == "b"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_seeds_cannot_tell(count):
    base = dict(list(BASE.items())[:count])
    other = {seed: value - 0.5 for seed, value in base.items()}
    verdict = decide({"random": base, "a": other}, "random")
    assert verdict.arm is None
    assert f"cannot be told with {count} paired seed" in verdict.sentence


def test_false_alarms_are_as_rare_as_promised():
    import random

    rng = random.Random(0)
    draws = 400
    told = 0
    for _ in range(draws):
        arms = {name: {seed: rng.gauss(0, 1) for seed in range(5)} for name in ("random", "a", "b", "c", "d")}
        told += decide(arms, "random").arm is not None
    assert told / draws < 0.05  # half of the 5 % are on the other side
