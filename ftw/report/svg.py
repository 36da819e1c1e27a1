"""Charts of a record as SVG: curves with bands, and stacked columns."""

from __future__ import annotations

import html
import json
import math
import statistics
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .record import Run, numbers_in
from .summary import mean_of

__all__ = ["bars", "chart", "columns", "curve_of", "key", "safe"]

Point = tuple[float, float, float, float]  # step, mean, low, high
Picks = Sequence[tuple[int, str]]  # step, kind
COLUMNS = 120  # points of a curve, at most; a longer one is averaged over neighbouring steps


def safe(value: Any) -> str:
    """Return untrusted text for the page: escaped, with control and direction characters made visible."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = (
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"\\u{ord(c):04x}" for c in text
    )
    return html.escape("".join(shown))


def curve_of(runs: Sequence[Run], name: str) -> list[Point]:
    """Return mean and one standard deviation to either side over runs, by step; long curves are averaged in pieces.

    The band of what is never negative does not go below zero.
    """
    curves = [curve for run in runs if (curve := run.values(name))]
    least = 0.0 if all(value >= 0 for curve in curves for value in curve.values()) else -math.inf
    steps = sorted({step for curve in curves for step in curve})
    size = -(-len(steps) // COLUMNS) or 1
    points = []
    for i in range(0, len(steps), size):
        piece = steps[i : i + size]
        means = numbers_in(mean_of([curve[s] for s in piece if s in curve]) for curve in curves)
        mean, spread = statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0
        points.append((statistics.fmean(piece), mean, max(mean - spread, least), mean + spread))
    return points


def chart(
    series: Sequence[tuple[str, int, list[Point]]], width: int, height: int, *, named: bool = False, unit: str = ""
) -> str:
    """Return curves with bands as SVG; ``named`` writes each method's name at the end of its curve.

    The axis across counts steps, or is in ``unit``.
    """
    points = [point for _, _, line in series for point in line]
    left, right, top, bottom = 44.0, width - (170.0 if named else 12.0), 10.0, height - 26.0
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[2] for p in points), max(p[3] for p in points)
    margin = 0.06 * (y1 - y0) or 0.05 * abs(y1) or 1.0
    y0, y1 = (max(y0 - margin, 0.0) if y0 >= 0 else y0 - margin), y1 + margin
    x = _scale(x0, x1 if x1 > x0 else x0 + 1, left, right)
    y = _scale(y0, y1, bottom, top)
    out = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for value, label in _ticks(y0, y1, 5):
        out.append(f'<path class="rule" d="M{left} {y(value):.1f}H{right}"/>')
        out.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>')
    across = _ticks(x0, x1, 6 if width > 500 else 4, whole=not unit)
    for value, label in across:
        first = f"{label} {unit}" if unit else f"step {label}"
        word = first if value == across[0][0] else label
        out.append(f'<text x="{x(value):.1f}" y="{height - 6}" text-anchor="middle">{word}</text>')
    for method, colour, line in series:
        upper = [f"{x(p[0]):.1f} {y(p[3]):.1f}" for p in line]
        lower = [f"{x(p[0]):.1f} {y(p[2]):.1f}" for p in reversed(line)]
        middle = [f"{x(p[0]):.1f} {y(p[1]):.1f}" for p in line]
        ends = f"{safe(method)}: {line[0][1]:.4g} to {line[-1][1]:.4g}"
        out.append(
            f'<g style="--c:var(--c{colour})"><title>{ends}</title><path class="band" d="M{"L".join(upper + lower)}Z"/>'
        )
        out.append(f'<path class="curve" d="M{"L".join(middle)}"/>')
        if named:  # what the pointer finds
            for p in line:
                words = f"{safe(method)}, {f'{p[0]:.4g} {unit}' if unit else f'step {p[0]:.0f}'}: {p[1]:.4g}"
                words += f" ± {p[3] - p[1]:.2g}" if p[3] > p[1] else ""
                hit = f'cx="{x(p[0]):.1f}" cy="{y(p[1]):.1f}" r="7"'
                out.append(f'<circle class="hit" {hit}><title>{words}</title></circle>')
        out.append("</g>")
    if named:
        previous = -math.inf
        for method, colour, line in sorted(series, key=lambda one: -one[2][-1][1]):
            previous = max(y(line[-1][1]) + 4, previous + 18)
            name = f'<text class="name" x="{right + 10}" y="{previous:.1f}">{safe(method)}</text>'
            out.append(f'<g style="--c:var(--c{colour})">{name}</g>')
    return "".join(out) + "</svg>"


def bars(
    picks: Picks,
    pool: Mapping[str, float],
    colours: Mapping[str, int],
    width: int = 340,
    height: int = 190,
) -> str:
    """Return stacked columns as SVG: shares of the kinds in the pool, then in the picks (step, kind) by step."""
    steps = sorted({step for step, _ in picks})
    if not steps:
        return ""
    count = min(15 if width < 500 else 30, len(steps))
    place = {step: i * count // len(steps) for i, step in enumerate(steps)}
    stacks: list[dict[str, float]] = [{} for _ in range(count)]
    for step, kind in picks:
        column = stacks[place[step]]
        column[kind] = column.get(kind, 0.0) + 1
    top, bottom, start = 4.0, height - 24.0, 56.0
    pitch = (width - start) / count
    out = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for column, x, w in [
        (dict(pool), 0.0, 34.0),
        *((c, start + i * pitch, pitch - 2) for i, c in enumerate(stacks)),
    ]:
        total, y = sum(column.values()), bottom
        for name in colours:
            share = column.get(name, 0.0) / total if total else 0.0
            tall = share * (bottom - top)
            y -= tall
            if tall > 0:
                box = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{max(tall - 1, 0.5):.1f}"'
                out.append(
                    f'<rect {box} style="fill:var(--c{colours[name]})"><title>{safe(name)}: {share:.0%}</title></rect>'
                )
    for at, anchor, label in [
        (17, "middle", "pool"),
        (start, "start", f"step {steps[0]}"),
        (width - 2, "end", str(steps[-1])),
    ]:
        out.append(f'<text x="{at}" y="{height - 7}" text-anchor="{anchor}">{label}</text>')
    return "".join(out) + "</svg>"


def columns(panels: Mapping[str, tuple[Picks, Mapping[str, float]]], colours: Mapping[str, int]) -> str:
    """Return `bars` of several panels (picks, pool) side by side; one alone takes the width of the page."""
    if len(panels) > 1:
        figures = (f"<figure><h3>{safe(name)}</h3>{bars(*panel, colours)}</figure>" for name, panel in panels.items())
        return f'<div class="grid">{"".join(figures)}</div>'
    (panel,) = panels.values()
    return (
        f'<figure class="wide">{bars(*panel, colours, 1000, 240)}</figure>'
        f'<figure class="narrow">{bars(*panel, colours)}</figure>'
    )


def key(colours: Mapping[str, int]) -> str:
    """Return which colour is whose."""
    names = (f'<span style="--c:var(--c{c})"><i class="dot"></i>{safe(name)}</span>' for name, c in colours.items())
    return f'<div class="key">{"".join(names)}</div>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[tuple[float, str]]:
    """Return about ``count`` round values between low and high, at least three, with their labels.

    ``whole`` allows whole numbers alone, and as few as there are.
    """
    found = _round_values(low, high, count, whole)
    while len(found) < 3 and count < 40 and not (whole and high - low < 2):
        count += 2
        found = _round_values(low, high, count, whole)
    return found


def _round_values(low: float, high: float, count: int, whole: bool) -> list[tuple[float, str]]:
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if max(abs(low), abs(high)) >= 1e5 or digits > 4:
        return [(i * step, f"{i * step:.3g}") for i in range(first, last + 1)]
    return [(i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1)]
