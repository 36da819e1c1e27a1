"""A second split: the warning comes when its loss turns up for good while the first keeps falling, and only then."""

import math
import random

import pytest

from ftw.split_watch import SplitWatch


def told(first, second, **options):
    """Return the measurements at which the warning came."""
    watch = SplitWatch(**options)
    return [i for i, pair in enumerate(zip(first, second, strict=True)) if watch.add(*pair)]


FALLING = [3 - 0.1 * i for i in range(12)]
VALLEY = [3, 2.6, 2.3, 2.1, 2.0, 2.05, 2.2, 2.4, 2.5, 2.6, 2.7, 2.8]  # fell by 1; a tenth is given back from place 6 on


def test_it_comes_once_after_the_turn():
    assert told(FALLING, VALLEY) == [8]  # 6, 7 and 8 lie above 2.1
    assert told(FALLING, VALLEY, patience=1) == [6]
    assert told(FALLING, VALLEY, share=0.45) == [10]  # 8, 9 and 10 above 2.45


def test_moving_or_scaling_the_losses_changes_nothing():
    assert told([7 * x - 90 for x in FALLING], [0.01 * x - 4 for x in VALLEY]) == [8]


def test_not_while_both_fall_or_both_rise():
    assert told(FALLING, FALLING) == []
    assert told([*FALLING[:5], *[2.7 + 0.1 * i for i in range(7)]], VALLEY) == []  # the first rises too


def test_not_for_a_dent():
    assert told(FALLING, [3, 2.5, 2, 2.3, 2.3, 1.9, 2.2, 2.2, 1.8, 1.8, 1.8, 1.8]) == []


@pytest.mark.parametrize("seed", range(20))
def test_not_for_noise_about_a_fall(seed):
    rng = random.Random(seed)
    curve = [2 + math.exp(-i / 20) for i in range(80)]
    first, second = ([x + rng.gauss(0, 0.02) for x in curve] for _ in range(2))
    assert told(first, second) == []


def test_what_is_not_finite_is_passed_over():
    first = [x for f in FALLING for x in (f, math.nan)]
    second = [x for f in VALLEY for x in (f, 9.0)]
    assert told(first, second) == [16]
    assert told([1.0], [math.inf]) == []
