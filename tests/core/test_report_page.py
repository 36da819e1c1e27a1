"""The charts and times of a run's page: ticks, bands, what the pointer finds, narrow screens."""

import re

import pytest

from ftw.report import Recorder, read, render
from ftw.report.page import STYLE
from ftw.report.svg import chart, curve_of


def made(tmp_path, steps=6, runs=3):
    path = tmp_path / "run.jsonl"
    with Recorder(path, highlight="a") as recorder:
        for seed in range(runs):
            name = f"a, seed {seed}"
            recorder.run(name, method="a", seed=seed)
            for step in range(steps):
                shrinkage = 0.3 if seed == 0 and step == 3 else 0.0
                seconds = {"select": 0.0123, "update": 1.5}
                fields = {"test_loss": 3 - 0.1 * step + 0.01 * seed, "shrinkage": shrinkage, "seconds": seconds}
                recorder.step(name, step, **fields)
    return read(path)


def test_the_band_of_what_is_never_negative_ends_at_zero(tmp_path):
    points = curve_of(made(tmp_path).runs, "shrinkage")
    means = [point[1] for point in points]
    assert means[3] == pytest.approx(0.1)  # of 0.3, 0 and 0: a standard deviation of .17
    assert min(point[2] for point in points) == 0.0
    assert points[3][3] == pytest.approx(0.1 + 0.3 / 3**0.5)
    signed = [(0, -1.0, -1.5, -0.5), (1, 1.0, 0.5, 1.5)]
    assert "\N{MINUS SIGN}" in chart([("a", 0, signed)], 340, 210) or "-1" in chart([("a", 0, signed)], 340, 210)


@pytest.mark.parametrize("low_high", [(0.0, 1.0), (0.0, 0.0123), (2.84, 3.06), (0.999, 1.001), (1e6, 3e6), (0, 7.7e-7)])
@pytest.mark.parametrize("last", [2, 3, 5, 7, 19, 60, 1000])
def test_axes_have_more_than_two_ticks_and_whole_steps(low_high, last):
    low, high = low_high
    svg = chart([("a", 0, [(0, low, low, low), (last, high, high, high)])], 340, 210)
    labels = re.findall(r'<text x="[-\d.]+" y="[-\d.]+" text-anchor="(end|middle)">([^<]+)</text>', svg)
    across = [label.removeprefix("step ") for anchor, label in labels if anchor == "middle"]
    upward = [label for anchor, label in labels if anchor == "end"]
    assert len(across) >= 3
    assert len(upward) >= 3
    assert len(set(upward)) == len(upward)
    assert all(float(label) == int(float(label)) for label in across)


def test_times_are_in_milliseconds(tmp_path):
    page = render(made(tmp_path))
    assert "select 12.3 ms, update 1.5 s" in page


def test_the_pointer_finds_values(tmp_path):
    page = render(made(tmp_path))
    assert "<title>a, step 2: 2.81 ± 0.01</title>" in page
    assert page.count('class="hit"') == 6


def test_a_table_shows_that_it_scrolls():
    scroll = re.search(r"\.scroll\{([^}]*)\}", STYLE)[1]
    assert "overflow-x:auto" in scroll
    assert scroll.count("local") == scroll.count("no-repeat scroll") == 2
