"""The results as tables of text, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .baselines import LESS, METHOD, NO_GUARD, RANDOM, WHOLE
from .rivals import RAND_T
from .statistics import Cell, Paired

__all__ = ["LEGEND", "budgeted", "default", "equal_compute", "markdown", "overview"]

HEADINGS = (
    "method",
    "seeds",
    "final loss",
    "- random",
    "- {base}, 95 % interval",
    "p",
    "area",
    "speed-up",
    "of gap",
    "effective",
    "good",
    "a",
    "work",
    "CPU s",
)
LEGEND = (
    "Final loss: on the test set, after the last step. - random, - top-k, - default: paired differences over seeds to "
    "random, to the LESS-like top-k, to Filter-then-Weight with its defaults; below zero is better. Area: mean of the "
    "loss over the curve. Speed-up: steps of random over the steps to random's final loss. Of gap: share of the gap "
    "from random to the oracle. Effective: effective number of samples. Good: share of the picks with true labels, or "
    "of the target's kind. Steps, lr: of runs that have a budget, with the rate tuned for each method. "
    "a: the guard's mean shrinkage. Work: arithmetic of a step in whole-pool steps. CPU s: of a "
    "run, without evaluation."
)


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """Return a number, or a dash where there is none."""
    if value is None or value != value:
        return "-"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def gap(pair: Paired | None) -> str:
    """Return a difference with its interval."""
    if pair is None or pair.count == 0:
        return "-"
    if pair.low != pair.low:
        return number(pair.mean, 3, True)
    return f"{pair.mean:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}]"


def chance(p: float) -> str:
    """Return a p-value."""
    return "-" if p != p else "<.0001" if p < 1e-4 else f"{p:.4f}".lstrip("0") if p < 1 else "1"


def rows(cells: Iterable[Cell], base: str = LESS) -> list[list[str]]:
    """Return one scenario's table, with paired differences to the method ``base``."""
    name = {LESS: "top-k", METHOD: "default"}.get(base, base)
    out = [[heading.format(base=name) for heading in HEADINGS]]
    for c in cells:
        pair = c.against.get(base) if c.method != base else None
        random = c.against.get(RANDOM) if c.method != RANDOM else None
        out.append(
            [
                c.method,
                str(c.seeds),
                number(c.final),
                number(random.mean if random else None, 3, True),
                gap(pair),
                chance(pair.p) if pair else "-",
                number(c.area),
                number(c.speedup, 1),
                "-" if c.share is None else f"{100 * c.share:.0f} %",
                number(c.effective_size, 1),
                "-" if c.good is None else f"{100 * c.good:.0f} %",
                number(c.shrinkage, 2) if c.shrinkage else "-",
                number(c.flops, 2),
                number(c.seconds, 1),
            ]
        )
    return out


def budgeted(cells: Iterable[Cell]) -> list[list[str]]:
    """Return the table of a scenario whose runs have a budget, with paired differences to three rivals."""
    others = {"random": RANDOM, "rand+T": RAND_T, "top-k": LESS}
    out = [["method", "seeds", "steps", "lr", "loss", "accuracy", *(w for o in others for w in (f"- {o}", "p"))]]
    out[0] += ["good", "target loss"]
    for c in cells:
        line = [c.method, str(c.seeds), number(c.steps, 0), f"{c.lr:g}", number(c.final), number(c.accuracy)]
        for name in others.values():
            pair = c.against.get(name) if c.method != name else None
            line += [gap(pair), chance(pair.p) if pair else "-"]
        out.append([*line, "-" if c.good is None else f"{100 * c.good:.0f} %", number(c.target_loss)])
    return out


def equal_compute(cells: Sequence[Cell], words: Mapping[str, str]) -> list[list[str]]:
    """Return the default method beside random and whole pool that may do as much arithmetic, a row a scenario."""
    out = [
        ["scenario", METHOD, "random", "- random, 95 % interval", "p", "whole pool", "- whole pool, 95 % interval", "p"]
    ]
    by = {(c.scenario, c.method): c for c in cells}
    for scenario in dict.fromkeys(c.scenario for c in cells):
        mine = by.get((scenario, METHOD))
        if mine is None:
            continue
        line = [words.get(scenario, scenario), number(mine.final)]
        for name in (RANDOM, WHOLE):
            pair, other = mine.against.get(f"{name}, equal compute"), by.get((scenario, name))
            line += [number(other.equal_compute if other else None), gap(pair), chance(pair.p) if pair else "-"]
        out.append(line)
    return out


def default(cells: Sequence[Cell], words: Mapping[str, str]) -> list[list[str]]:
    """Return the default method beside random, top-k and itself without the guard, a row a scenario."""
    others = {"random": RANDOM, "top-k": LESS, "without guard": NO_GUARD}
    out = [["scenario", "seeds", METHOD, *(word for name in others for word in (f"- {name}, 95 % interval", "p"))]]
    for c in cells:
        if c.method == METHOD:
            pairs = [c.against.get(name) for name in others.values()]
            gaps = [word for pair in pairs for word in (gap(pair), chance(pair.p) if pair else "-")]
            out.append([words.get(c.scenario, c.scenario), str(c.seeds), number(c.final), *gaps])
    return out


def overview(cells: Sequence[Cell], words: Mapping[str, str], methods: Sequence[str]) -> list[list[str]]:
    """Return final losses, scenarios down and methods across."""
    by = {(c.scenario, c.method): c for c in cells}
    scenarios = dict.fromkeys(c.scenario for c in cells)
    methods = [m for m in methods if any((s, m) in by for s in scenarios)]
    return [
        ["scenario", *methods],
        *([words.get(s, s), *(number(by[s, m].final) if (s, m) in by else "-" for m in methods)] for s in scenarios),
    ]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the bars of a cell are escaped."""

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"

    head, *body = table
    return "\n".join([line(head), "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|", *map(line, body)])
