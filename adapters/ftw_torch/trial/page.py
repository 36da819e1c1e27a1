"""The page of a trial: the sentence, the curves over time, the table. No scripts, no references, all text escaped."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from ftw.report.page import STYLE
from ftw.report.svg import chart, key, safe

from .result import Result

__all__ = ["render"]


def render(result: Result, setup: Mapping[str, Any]) -> str:
    """Return the page: one HTML file that refers to nothing."""
    head, *rows = result.table()
    colours = {row.arm: (1, 2, 3, 5, 0)[i] if i < 5 else 1 + i % 7 for i, row in enumerate(result.rows)}
    series = [(arm, colours[arm], points) for arm in colours if (points := _curve(result, arm))]
    figure = ""
    if series:
        figure = (
            "<section><h2>Validation loss by seconds of training</h2>"
            '<p class="soft small">Lower is better. Lines are means over the seeds, bands one standard deviation to '
            "either side.</p>"
            f'<figure class="wide">{chart(series, 1000, 380, named=True, unit="s")}</figure>'
            f'<figure class="narrow">{key(colours)}{chart(series, 340, 260, unit="s")}</figure></section>'
        )
    heads = "".join(f"<th>{safe(cell)}</th>" for cell in head)
    body = ""
    for cells in rows:
        numbers = "".join(f"<td>{safe(cell)}</td>" for cell in cells)
        body += f"<tr{' class=best' if cells[0] == result.arm else ''}>{numbers}</tr>"
    notes = "".join(f"<p>{safe(note)}</p>" for note in result.notes)
    details = "".join(f"<dt>{safe(name)}</dt><dd>{safe(value)}</dd>" for name, value in setup.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Does selection pay here?</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>Does selection pay here?</h1>\n<p>{safe(result.sentence)}</p>\n{figure}\n"
        f'<section><h2>Results</h2><div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>'
        f'</table></div><p class="soft small">{safe(READING)}</p></section>\n'
        + (f"<section><h2>Notes</h2>{notes}</section>\n" if notes else "")
        + f"<section><h2>Setup</h2><dl>{details}</dl></section>\n"
        "<footer>Made by ftw (Filter-then-Weight).</footer>\n</main>\n</body>\n</html>\n"
    )


READING = (
    "Validation: loss on target samples kept apart, mean ± standard deviation over the seeds; it decides the learning "
    "rates and the verdict. Against random: the mean difference in runs of the same seed; the intervals hold "
    "for all arms together. Test: only reported."
)


def _curve(result: Result, arm: str) -> list[tuple[float, float, float, float]]:
    """Return (seconds, mean, low, high) over the seeds that did not fail."""
    curves = [o.curve for o in result.outcomes if o.arm == arm and o.seed > 0 and not o.failure]
    points = []
    for part in sorted(set[float]().union(*curves)):
        values = [curve[part] for curve in curves if part in curve]
        mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        points.append((part * result.seconds, mean, mean - spread, mean + spread))
    return points
