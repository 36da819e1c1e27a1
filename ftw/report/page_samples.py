"""The parts of a page that follow samples through the steps: picks by length, and who was chosen most and least."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .record import Record, Run, number_in, numbers_in
from .summary import highlighted
from .svg import columns, key, safe

__all__ = ["chosen", "counted", "lengths"]

BINS = 5
SHOWN = 5


def lengths(record: Record) -> str:
    """Return which lengths were picked, a panel a method, those of the pool beside them."""
    found = {method: both for method, runs in record.methods.items() if (both := _lengths(runs))[0]}
    every = [n for picks, pool in found.values() for n in (pool or [n for _, n in picks])]
    if len(set(every)) < 2:
        return ""
    edges = sorted({_quantile(every, (i + 1) / BINS) for i in range(BINS)})  # upper ends, each within its bin
    names = [
        f"{low + 1:.0f} to {high:.0f}" if low + 1 < high else f"{high:.0f}"
        for low, high in zip([min(every) - 1, *edges], edges, strict=False)
    ]

    def kind(n: float) -> str:
        return names[next(i for i, edge in enumerate(edges) if n <= edge or edge == edges[-1])]

    colours = dict(zip(names, (3, 0, 5, 2, 6), strict=False))
    panels = {
        method: ([(step, kind(n)) for step, n in picks], Counter(map(kind, pool)))
        for method, (picks, pool) in found.items()
    }
    return (
        '<section><h2>Picks by length</h2><p class="soft small">Share of the samples trained on, by their length, over '
        f"the steps; the column on the left is the pool.</p>{key(colours)}"
        f"{columns(panels, colours)}</section>"
    )


def _lengths(runs: Sequence[Run]) -> tuple[list[tuple[int, float]], list[float]]:
    """Return (step, length) of the picks, and the lengths of what they were picked from."""
    picks = [
        (step, n)
        for run in runs
        for step, sample in run.samples("picked")
        if (n := number_in(sample.get("length"))) is not None
    ]
    return picks, [n for run in runs for line in run.steps.values() for n in numbers_in(_offered(line, "length"))]


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, max(0, round(share * len(values)) - 1))]


def _offered(line: Mapping[str, Any], name: str) -> list[Any]:
    """Return a column of a step's pool."""
    offered = line.get("offered")
    column = offered.get(name) if isinstance(offered, dict) else None
    return column if isinstance(column, list) else []


def counted(n: int, what: str) -> str:
    """Return a number of things."""
    return f"{n} {what}" + ("" if n == 1 else "s")


@dataclass
class History:
    """What became of a sample: how often it was offered and picked, with which weights, and what is known of it."""

    offered: int = 0
    weights: list[float] = field(default_factory=list)
    picked: int = 0
    known: dict[str, Any] = field(default_factory=dict)


def chosen(record: Record, colours: Mapping[str, int]) -> str:
    """Return the samples that the highlighted method's runs chose most, and those that they chose least."""
    best = highlighted(record)
    runs = record.methods.get(str(best), record.runs)
    found: dict[str, History] = {}
    for run in runs:
        for line in run.steps.values():
            for name in map(str, _offered(line, "id")):
                found.setdefault(name, History()).offered += 1
        for what in ("picked", "refused"):
            for _, sample in run.samples(what):
                if "id" not in sample:
                    continue
                history = found.setdefault(str(sample["id"]), History())
                history.known |= sample
                if what == "picked":
                    history.picked += 1
                    history.weights += numbers_in([sample.get("weight")])
    picked = [name for name, history in found.items() if history.picked]
    if not picked:
        return ""
    most = sorted(picked, key=lambda name: (-found[name].picked, -sum(found[name].weights)))[:SHOWN]
    offered = [name for name in found if found[name].offered and name not in most]
    least = sorted(offered, key=lambda name: (found[name].picked / found[name].offered, -found[name].offered))[:SHOWN]
    sides = f"<div><h3>Most</h3>{''.join(_row(name, found[name], colours) for name in most)}</div>"
    if least:
        sides += f"<div><h3>Least</h3>{''.join(_row(name, found[name], colours) for name in least)}</div>"
    return (
        f"<section><h2>The most {'and the least ' if least else ''}chosen samples</h2>"
        '<p class="soft small">Over all steps'
        f"{f' of {safe(best)}' if len(record.methods) > 1 else ''}, by how often a sample was picked.</p>"
        f'<div class="grid">{sides}</div></section>'
    )


def _row(name: str, history: History, colours: Mapping[str, int]) -> str:
    known = history.known
    of = f"picked {history.picked} of {counted(history.offered, 'time')}"
    facts = [of if history.offered else f"picked {counted(history.picked, 'time')}"]
    if history.weights:
        facts.append(f"mean weight {statistics.fmean(history.weights):.3g}")
    if (length := number_in(known.get("length"))) is not None:
        facts.append(f"length {length:.0f}")
    source = known.get("source")
    label = f"sample {name[:12]}" if source is None else source
    text = f"<pre>{safe(str(known['text']).rstrip())}</pre>" if "text" in known else ""
    words = "".join(f"<span>{fact}</span>" for fact in facts)
    colour = colours.get(str(source), 1)
    head = f"<div><b>{safe(label)}</b>{words}</div>"
    return f'<div class="sample" style="--c:var(--c{colour})">{head}{text}</div>'
