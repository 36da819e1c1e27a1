"""The results as one page of HTML that refers to nothing; everything that comes from data or options is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ftw.report.page import STYLE
from ftw.report.svg import chart as curves
from ftw.report.svg import key, safe

from .baselines import LESS, METHOD, ORACLE, RANDOM, WHOLE
from .statistics import Cell
from .table import LEGEND, default, equal_compute, overview, rows

__all__ = ["render", "write"]

DRAWN = {METHOD: 0, RANDOM: 1, LESS: 2, WHOLE: 3, ORACLE: 4}  # curves and their colours; the others are in the table


def render(
    cells: Sequence[Cell], words: Mapping[str, str], methods: Sequence[str], ablations: Sequence[Cell], command: str
) -> str:
    """Return the page.

    Parameters
    ----------
    cells, ablations : sequence of Cell
        Methods side by side; parts exchanged.
    words : mapping of str to str
        What a scenario is.
    methods : sequence of str
        Columns of the overview.
    command : str
        What was typed.
    """
    parts = [
        section("Final test loss", table(overview(cells, words, methods)), "Means over paired seeds."),
        section("Filter-then-Weight against the others", table(default(cells, words)), "Paired differences."),
        section(
            "At equal compute",
            table(equal_compute(cells, words)),
            "Random and the whole pool may go on until they have done as much arithmetic as Filter-then-Weight.",
        ),
    ]
    for scenario in dict.fromkeys(c.scenario for c in cells):
        mine = [c for c in cells if c.scenario == scenario]
        parts.append(section(words.get(scenario, scenario), chart(mine) + table(rows(mine))))
    for scenario in dict.fromkeys(c.scenario for c in ablations):
        mine = [c for c in ablations if c.scenario == scenario]
        parts.append(section(f"One part exchanged: {words.get(scenario, scenario)}", table(rows(mine, METHOD))))
    seeds = max((c.seeds for c in [*cells, *ablations]), default=0)
    body = "".join(parts)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>Does it select well?</title>'
        f"<style>{STYLE}</style><main><h1>Does it select well?</h1>"
        f'<p class="soft small">{safe(LEGEND)}</p>{body}'
        f"<footer>{seeds} paired seeds. <code>{safe(command)}</code></footer></main></html>"
    )


def section(title: str, body: str, note: str = "") -> str:
    """Return a part of the page; ``body`` is HTML, the rest text."""
    note = f'<p class="soft small">{safe(note)}</p>' if note else ""
    return f"<section><h2>{safe(title)}</h2>{note}{body}</section>"


def table(content: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML; the default method's row stands out."""
    head, *body = content
    lines = ["<tr>" + "".join(f"<th>{safe(cell)}</th>" for cell in head) + "</tr>"]
    for row in body:
        kind = ' class="best"' if row[0] == METHOD else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def chart(cells: Sequence[Cell]) -> str:
    """Return the curves of one scenario as SVG, with a standard error to either side."""
    series = [
        (c.method, DRAWN[c.method], [(float(i), mean, mean - error, mean + error) for i, mean, error in c.curve])
        for c in cells
        if c.method in DRAWN
    ]
    if not series:
        return ""
    return (
        f'<figure class="wide">{curves(series, 900, 320, named=True)}</figure>'
        f'<figure class="narrow">{key({name: colour for name, colour, _ in series})}{curves(series, 340, 260)}</figure>'
    )


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="replace")
    part.replace(path)
