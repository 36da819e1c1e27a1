"""A run's record, and the page made from it. Standard library only.

The record is a file of JSON lines, only ever appended to, one line a step; a process that is killed costs at most the
line it was writing. Kinds of lines:

- ``header``: format, version, title, anything else that holds for the whole record;
- ``run``: name, method, seed, anything else about one run;
- ``step``: run, step, and any of ``loss``, ``target_loss``, ``test_loss``, ``grad_norm``, ``match``,
  ``effective_size``, ``shrinkage``, ``status``, ``seconds`` (a number, or parts by name), ``pool`` (samples by source),
  and ``picked`` and ``refused``: lists of samples, each with any of ``index``, ``weight``, ``score``, ``loss``,
  ``source``, ``length``, ``text``.

The text of samples is left out unless asked for. ``python -m ftw.report run.jsonl`` makes the page: one HTML file
without scripts or references, in which everything that comes from the data is escaped.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import os
import statistics
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Record", "Recorder", "Run", "Summary", "describe", "paired", "read", "render", "summarise", "table"]

FORMAT, VERSION = "ftw-run", 1

# ---------------------------------------------------------------------------------------------------------------------
# Writing


class Recorder:
    """Append a run's record to a file, a line at a time.

    A disk that is full, or any other failure to write, ends the record with a warning and lets the training go on.

    Parameters
    ----------
    path : path
        The record. If it exists it is continued, after a line that a killed process left unfinished.
    text : bool
        Keep the ``text`` of samples; otherwise it is left out of every line.
    fresh : bool
        Start anew where ``path`` exists.
    **header
        What holds for all runs; the page knows ``title``, ``note``, ``highlight`` (a method), ``domain`` (a source).
    """

    def __init__(self, path: str | os.PathLike[str], *, text: bool = False, fresh: bool = False, **header: Any) -> None:
        self.path = Path(path)
        self._text = text
        self._file = open(self.path, "w+b" if fresh else "a+b", buffering=0)  # noqa: SIM115
        if size := self._file.seek(0, os.SEEK_END):
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
        self._write({"kind": "header", "format": FORMAT, "version": VERSION, "text": text, **header})

    def run(self, run: str, *, method: str | None = None, seed: int | None = None, **meta: Any) -> None:
        """Announce a run; runs of one method are drawn together."""
        self._write({"kind": "run", "run": run, "method": run if method is None else method, "seed": seed, **meta})

    def step(self, run: str, step: int, **fields: Any) -> None:
        """Record what happened in a step, in arrays of any library. Of a step recorded twice the last counts."""
        self._write({"kind": "step", "run": run, "step": step, **fields})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file.closed:
            return
        data = json.dumps(_plain(line, self._text), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.close()
            warnings.warn(f"{self.path}: the record ends here ({error.strerror}); the run goes on", stacklevel=3)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def describe(indices: Iterable[int], weights: Iterable[float] | None = None, **columns: Any) -> list[dict[str, Any]]:
    """Return samples for ``picked`` or ``refused``: index, weight, and the entry of each column, (n,) over the pool."""
    chosen = [int(i) for i in indices]
    samples: list[dict[str, Any]] = [
        {"index": i, **{name: column[i] for name, column in columns.items()}} for i in chosen
    ]
    if weights is not None:
        for sample, weight in zip(samples, weights, strict=True):
            sample["weight"] = weight
    return samples


def _plain(value: Any, text: bool) -> Any:
    """Return ``value`` as what JSON has: arrays as lists, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, text) for k, v in value.items() if k != "text" or text or isinstance(v, bool)}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), text)
    if isinstance(value, Iterable):
        return [_plain(v, text) for v in value]
    return str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Run:
    """One run: its name, method, seed, and its steps by number."""

    name: str
    method: str
    seed: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)

    def values(self, name: str) -> dict[int, float]:
        """Return the finite values of a field, by step."""
        found = ((step, _number(line.get(name))) for step, line in sorted(self.steps.items()))
        return {step: value for step, value in found if value is not None}

    def samples(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        """Return (step, sample) of every sample in ``picked`` or ``refused``."""
        lines = ((step, line.get(name)) for step, line in sorted(self.steps.items()))
        return [(step, s) for step, line in lines if isinstance(line, list) for s in line if isinstance(s, dict)]


@dataclass
class Record:
    """What one or several records hold; ``damaged`` counts lines that could not be read."""

    header: dict[str, Any]
    runs: list[Run]
    damaged: int = 0

    @property
    def methods(self) -> dict[str, list[Run]]:
        """The runs by method, in order of appearance."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.method, []).append(run)
        return found


def read(*paths: str | os.PathLike[str]) -> Record:
    """Read records; lines that a killed process left unfinished are counted and passed over.

    Raises
    ------
    ValueError
        If a file is not a record, or was written by a later version.
    """
    record = Record({}, [])
    for path in map(Path, paths):
        header: dict[str, Any] = {}
        runs: dict[str, Run] = {}
        with open(path, encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if not isinstance(line, dict):
                    record.damaged += 1
                    continue
                if line.get("kind") == "header" and line.get("format") == FORMAT:
                    if not isinstance(version := line.get("version"), int) or version > VERSION:
                        raise ValueError(f"{path}: a record of version {version!r}; this ftw reads up to {VERSION}")
                    header = line | header
                elif not header:
                    break
                elif line.get("kind") in ("run", "step"):
                    name = str(line.get("run", ""))
                    run = runs.setdefault(name, Run(name, name))
                    if line["kind"] == "run":
                        seed = line.get("seed")
                        run.method, run.meta = str(line.get("method", name)), line
                        run.seed = seed if isinstance(seed, int) else None
                    elif isinstance(step := line.get("step"), int) and abs(step) < 2**53:
                        run.steps[step] = line
        if not header:
            raise ValueError(f"{path}: not a record of a run: its first line must be a header of format {FORMAT!r}")
        record.header = header | record.header
        record.runs += runs.values()
    return record


def _number(value: Any) -> float | None:
    """Return a number as a float; None for anything else, and for what is too large to reckon with."""
    return float(value) if isinstance(value, int | float) and -1e100 < value < 1e100 else None


def _numbers(values: Iterable[Any]) -> list[float]:
    return [number for value in values if (number := _number(value)) is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Summing up


@dataclass(frozen=True)
class Summary:
    """A method over its runs; means over runs unless stated, None where the record does not say.

    Attributes
    ----------
    start, mean, spread : float or None
        The loss before the first step; after the last, its mean and its standard deviation over runs.
    final : dict
        The loss after the last step, by seed (by place where there is none).
    domain, domain_weight : float or None
        Share of the picks that came from the target domain, by number and by weight.
    effective_size, seconds : float or None
        Effective number of samples a step; seconds a run.
    """

    method: str
    start: float | None
    mean: float | None
    spread: float | None
    final: dict[Any, float]
    domain: float | None
    domain_weight: float | None
    effective_size: float | None
    seconds: float | None


def metric(record: Record) -> str:
    """Return the loss that the record is judged by: on the test set, else on the target, else in training."""
    return next((n for n in ("test_loss", "target_loss") if any(r.values(n) for r in record.runs)), "loss")


def summarise(record: Record) -> list[Summary]:
    """Sum the record up, a method at a time."""
    name, domain = metric(record), record.header.get("domain")
    found = []
    for method, runs in record.methods.items():
        curves = [(place if run.seed is None else run.seed, run.values(name)) for place, run in enumerate(runs)]
        final = {seed: list(curve.values())[-1] for seed, curve in curves if curve}
        picks = [sample for run in runs for _, sample in run.samples("picked")]
        inside = [sample for sample in picks if domain is not None and sample.get("source") == domain]
        weight = sum(_numbers(sample.get("weight") for sample in picks))
        seconds = [_numbers(_seconds(line) for line in run.steps.values()) for run in runs]
        found.append(
            Summary(
                method,
                _mean([next(iter(curve.values())) for _, curve in curves if curve]),
                _mean(final.values()),
                _spread(final.values()),
                final,
                len(inside) / len(picks) if picks and domain is not None else None,
                sum(_numbers(s.get("weight") for s in inside)) / weight if weight and domain is not None else None,
                _mean([value for run in runs for value in run.values("effective_size").values()]),
                _mean([sum(values) for values in seconds if values]),
            )
        )
    return found


def paired(one: Summary, other: Summary) -> tuple[float, float | None, int, int] | None:
    """Return mean and standard deviation of ``one - other`` over shared seeds, how often it is below 0, of how many."""
    gaps = [one.final[seed] - other.final[seed] for seed in one.final if seed in other.final]
    if not gaps:
        return None
    return statistics.fmean(gaps), _spread(gaps), sum(gap < 0 for gap in gaps), len(gaps)


def table(record: Record) -> list[list[str]]:
    """Return the record's table, as text: a row of headings, then a row a method, compared with those before it."""
    summaries = summarise(record)
    against = [f"against {one.method}" for one in summaries[:-1]]
    rows = [["method", "start", "end", *against, "from domain", "by weight", "effective", "seconds"]]
    for i, one in enumerate(summaries):
        end = _text(one.mean, 3) + ("" if one.spread is None else f" ± {one.spread:.3f}")
        gaps = [_gap(paired(one, other)) if j < i else "" for j, other in enumerate(summaries[:-1])]
        shares = [_text(None if v is None else 100 * v, 0, " %") for v in (one.domain, one.domain_weight)]
        numbers = [_text(one.effective_size, 1), _text(one.seconds, 1)]
        rows.append([one.method, _text(one.start, 3), end, *gaps, *shares, *numbers])
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _gap(gap: tuple[float, float | None, int, int] | None) -> str:
    if gap is None:
        return ""
    mean, spread, below, count = gap
    return f"{mean:+.3f}" + ("" if spread is None else f" ± {spread:.3f}") + f" ({below}/{count})"


def _highlight(record: Record) -> str:
    methods = list(record.methods)
    name = record.header.get("highlight")
    return name if name in methods else methods[-1] if methods else ""


def _seconds(line: Mapping[str, Any]) -> float | None:
    value = line.get("seconds")
    return sum(_numbers(value.values())) if isinstance(value, dict) else _number(value)


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def _spread(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else None


def _text(value: float | None, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


# ---------------------------------------------------------------------------------------------------------------------
# The page

_CHARTS = {
    "test_loss": "Test loss",
    "target_loss": "Loss on the target samples",
    "loss": "Loss of the samples trained on",
    "grad_norm": "Gradient norm",
    "match": "Match of the chosen update with the target's (cosine)",
    "effective_size": "Effective number of samples",
    "shrinkage": "Shrinkage of the target",
}
_COLUMNS = 120  # points of a curve, at most; a longer one is averaged over neighbouring steps

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#5a6776;--line:#e1e6ec;--c0:#0d8a7b;
--c1:#8793a2;--c2:#d0702a;--c3:#5577d6;--c4:#a25bbf;--c5:#c9a227;--c6:#c4496b;--c7:#4f9d4a}
@media(prefers-color-scheme:dark){:root{--bg:#0f1419;--card:#182029;--ink:#e6ebf0;--soft:#98a5b3;--line:#2b3641;
--c0:#34c9b5;--c1:#8794a3;--c2:#ee9a5a;--c3:#86a3f5;--c4:#c98be3;--c5:#dcbf54;--c6:#ea7d9b;--c7:#82c67d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 56px}
h1{font-size:30px;line-height:1.2;margin:0 0 8px;letter-spacing:-.02em}
h2{font-size:19px;margin:0 0 4px;letter-spacing:-.01em}h3{font-size:14px;margin:0 0 8px}
p{margin:0 0 12px;max-width:74ch}
p.small{max-width:104ch}.scroll+p{margin-top:12px}.soft,figcaption,footer{color:var(--soft)}.small{font-size:13.5px}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:22px 24px;margin:20px 0}
.tiles,.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));margin:24px 0 0}
.grid{grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:24px 28px;margin-top:16px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:16px 18px}
.tile b{display:block;font-size:27px;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13.5px;display:block;line-height:1.4}
.scroll{overflow-x:auto;margin:12px -24px 0;padding:0 24px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14.5px}
th,td{text-align:right;padding:9px 0 9px 14px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:500;font-size:13px}th:first-child,td:first-child{text-align:left;padding-left:0}
tr:last-child td{border-bottom:0}tr.best td{font-weight:650}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13.5px;color:var(--soft);margin:6px 0 10px}
.dot{display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);margin-right:6px}
figure{margin:0}svg{display:block;width:100%;height:auto;font-size:12px}svg text{fill:var(--soft)}
svg .rule{stroke:var(--line)}svg .curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
svg .band{fill:var(--c);opacity:.15}svg text.name{fill:var(--c);font-weight:600;font-size:13px}.narrow{display:none}
.sample{border-left:4px solid var(--c);background:var(--bg);border-radius:4px 10px 10px 4px;padding:9px 13px;
margin:0 0 10px}
.sample div{display:flex;flex-wrap:wrap;gap:0 12px;font-size:13px;color:var(--soft);font-variant-numeric:tabular-nums}
.sample div b{color:var(--c)}.sample pre{margin:5px 0 0;
font:13px/1.5 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;max-height:15em;overflow-y:auto}
details{border-top:1px solid var(--line);padding:12px 0}details:last-child{padding-bottom:0}
summary{cursor:pointer;font-size:14.5px}details .grid{margin-top:14px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 20px;margin:12px 0 0;font-size:14px}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}footer{font-size:13.5px;margin-top:24px}
@media(max-width:640px){main{padding:24px 14px 40px}h1{font-size:25px}section{padding:18px 16px;border-radius:12px}
.scroll{margin:12px -16px 0;padding:0 16px}.tiles{grid-template-columns:1fr 1fr;gap:10px}.tile{padding:12px 13px}
.tile b{font-size:21px}.wide{display:none}.narrow{display:block}.grid{grid-template-columns:1fr}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:8px}}
"""


def render(record: Record) -> str:
    """Return the page of a record: one HTML file that refers to nothing."""
    title = _safe(record.header.get("title") or "A run")
    note = f'<p class="soft">{_safe(record.header["note"])}</p>' if record.header.get("note") else ""
    parts = [
        _tiles(record),
        _curves(record),
        _results(record),
        _sources(record),
        _details(record),
        _reading(record),
        _setup(record),
    ]
    damaged = f" {record.damaged} damaged line(s) were passed over." if record.damaged else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{note}"
        + "\n".join(filter(None, parts))
        + f"\n<footer>Made by ftw (Filter-then-Weight) from the record of {len(record.runs)} run(s).{damaged}</footer>"
        + "\n</main>\n</body>\n</html>\n"
    )


def _tiles(record: Record) -> str:
    """Return the figures that say most."""
    summaries = {one.method: one for one in summarise(record)}
    best = summaries.get(_highlight(record))
    if best is None or best.mean is None:
        return ""
    label = _CHARTS[metric(record)].lower()
    tiles = [(f"{best.mean:.3f}", f"{label} at the end, {_text(best.start, 3)} at the start")]
    for other in summaries.values():
        if other is not best and (gap := paired(best, other)) is not None:
            tiles.append((f"{gap[0]:+.3f}", f"against {_safe(other.method)}; lower in {gap[2]} of {gap[3]} runs"))
    if best.domain is not None:
        pool = _shares(record.runs).get(str(record.header.get("domain")))
        known = f"; {pool:.0%} of the pool" if pool else ""
        tiles.append((f"{best.domain:.0%}", f"of the picks came from the target domain{known}"))
    if best.effective_size is not None and len(tiles) < 4:
        tiles.append((f"{best.effective_size:.1f}", "effective number of samples in a step"))
    cards = "".join(f'<div class="tile"><b>{_minus(number)}</b><span>{text}</span></div>' for number, text in tiles[:4])
    return f'<div class="tiles">{cards}</div>'


def _curves(record: Record) -> str:
    """Return the chart of the loss that counts."""
    name, colours = metric(record), _colours(list(record.methods), _highlight(record))
    series = [(method, colours[method], _series(runs, name)) for method, runs in record.methods.items()]
    series = [one for one in series if one[2]]
    if not series:
        return ""
    several = any(len(runs) > 1 for runs in record.methods.values())
    band = " Lines are means over the runs, bands one standard deviation to either side." if several else ""
    return (
        f'<section><h2>{_CHARTS[name]} by step</h2><p class="soft small">Lower is better.{band}</p>'
        f'<figure class="wide">{_chart(series, 1000, 380, named=True)}</figure>'
        f'<figure class="narrow">{_key(colours)}{_chart(series, 340, 260)}</figure></section>'
    )


def _results(record: Record) -> str:
    """Return the table."""
    head, *rows = table(record)
    best = _highlight(record)
    heads = "".join(f"<th>{_safe(cell)}</th>" for cell in head)
    body = ""
    for name, *cells in rows:
        numbers = "".join(f"<td>{_minus(_safe(cell))}</td>" for cell in cells)
        body += f"<tr{' class=best' if name == best else ''}><td>{_safe(name)}</td>{numbers}</tr>"
    return (
        '<section><h2>Results</h2><div class="scroll">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="soft small">Start and end: {_CHARTS[metric(record)].lower()}, mean ± standard deviation over the '
        "runs. Against: the difference to a method in runs of the same seed, negative is better, and in how many of "
        "them it is negative. From domain: share of the picks that came from the target domain, by number and by "
        "weight. Effective: (Σw)² / Σw² of a step. Seconds: of a run, without evaluation.</p></section>"
    )


def _sources(record: Record) -> str:
    """Return where the picks came from, a panel a method, the pool beside them."""
    colours = _source_colours(record)
    if len(colours) < 2:
        return ""
    panels = "".join(
        f"<figure><h3>{_safe(method)}</h3>{_bars(runs, colours)}</figure>" for method, runs in record.methods.items()
    )
    return (
        '<section><h2>Where the picks came from</h2><p class="soft small">Share of the samples trained on, by source, '
        f"over the steps; the column on the left is the pool they were picked from.</p>{_key(colours)}"
        f'<div class="grid">{panels}</div></section>'
    )


def _details(record: Record) -> str:
    """Return small charts of whatever else was recorded."""
    colours = _colours(list(record.methods), _highlight(record))
    figures = []
    for name, label in _CHARTS.items():
        series = [(method, colours[method], _series(runs, name)) for method, runs in record.methods.items()]
        series = [one for one in series if any(point[1] for point in one[2])]
        if name != metric(record) and series:
            figures.append(f"<figure><h3>{label}</h3>{_chart(series, 340, 210)}</figure>")
    if (times := _times(record)) or figures:
        grid = f'<div class="grid">{"".join(figures)}{times}</div>'
        return f"<section><h2>Along the way</h2>{_key(colours)}{grid}</section>"
    return ""


def _times(record: Record) -> str:
    """Return how long the parts of a step took, and how often a step ended in anything but OK."""
    rows = []
    for method, runs in record.methods.items():
        lines = [line for run in runs for line in run.steps.values()]
        parts: dict[str, list[float]] = {}
        for line in lines:
            seconds = line.get("seconds")
            for part, value in seconds.items() if isinstance(seconds, dict) else [("step", seconds)]:
                parts.setdefault(part, []).extend(_numbers([value]))
        words = [f"{_safe(part)} {statistics.fmean(values):.3g} s" for part, values in parts.items() if values]
        states = Counter(str(line["status"]) for line in lines if line.get("status") not in (None, 0, "OK"))
        words += [f"{_safe(state)} in {count} steps" for state, count in states.items()]
        if words:
            rows.append(f"<dt>{_safe(method)}</dt><dd>{', '.join(words)}</dd>")
    return f"<figure><h3>Time of a step</h3><dl>{''.join(rows)}</dl></figure>" if rows else ""


def _reading(record: Record) -> str:
    """Return what was picked and what was refused, at some steps of one run."""
    runs = record.methods.get(_highlight(record), []) + record.runs
    run = next((r for r in runs if any("text" in s for _, s in r.samples("picked"))), None)
    if run is None:
        return ""
    steps = sorted({step for step, sample in run.samples("picked") if "text" in sample})
    shown = [steps[round(i * (len(steps) - 1) / 5)] for i in range(6)]
    colours = _source_colours(record)
    blocks = []
    for step in dict.fromkeys(shown):
        sides, count = [], Counter[str]()
        for kind in ("picked", "refused"):
            samples = [sample for at, sample in run.samples(kind) if at == step]
            cards = "".join(_card(sample, colours) for sample in samples) or '<p class="soft">nothing recorded</p>'
            sides.append(f"<div><h3>{kind.capitalize()}</h3>{cards}</div>")
            count.update(str(sample.get("source", "?")) for sample in samples if kind == "picked")
        words = ", ".join(f"{n} {_safe(source)}" for source, n in count.most_common())
        blocks.append(
            f"<details{' open' if step in (shown[0], shown[-1]) else ''}><summary><b>Step {step}</b> "
            f'<span class="soft">picked {words}</span></summary><div class="grid">{"".join(sides)}</div></details>'
        )
    return (
        "<section><h2>What was picked, what was refused</h2>"
        f'<p class="soft small">{_safe(run.name)}. A score says how much a sample alone would lower the loss on the '
        "target, on a scale of the step's own. Refused: the best scores that were passed over, and the worst.</p>"
        f"{''.join(blocks)}</section>"
    )


def _card(sample: Mapping[str, Any], colours: Mapping[str, int]) -> str:
    source = str(sample.get("source", "?"))
    numbers = {name: _number(sample.get(name)) for name in ("weight", "score", "loss")}
    facts = "".join(f"<span>{name} {_minus(f'{n:.3g}')}</span>" for name, n in numbers.items() if n is not None)
    return (
        f'<div class="sample" style="--c:var(--c{colours.get(source, 1)})"><div><b>{_safe(source)}</b>{facts}</div>'
        f"<pre>{_safe(sample.get('text', ''))}</pre></div>"
    )


def _setup(record: Record) -> str:
    """Return everything else that the header says."""
    known = {"kind", "format", "version", "text", "title", "note", "highlight", "domain"}
    rows = "".join(f"<dt>{_safe(k)}</dt><dd>{_safe(v)}</dd>" for k, v in record.header.items() if k not in known)
    return f"<section><h2>Setup</h2><dl>{rows}</dl></section>" if rows else ""


def _minus(number: str) -> str:
    """Return a number with the sign that typographers use."""
    return number.replace("-", "\N{MINUS SIGN}")


def _safe(value: Any) -> str:
    """Return untrusted text for the page: escaped, with control and direction characters made visible."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = (
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"\\u{ord(c):04x}" for c in text
    )
    return html.escape("".join(shown))


def _pool(line: Mapping[str, Any]) -> dict[str, float]:
    pool = line.get("pool")
    return {str(k): n for k, v in pool.items() if (n := _number(v)) is not None} if isinstance(pool, dict) else {}


def _shares(runs: Iterable[Run]) -> dict[str, float]:
    """Return the share of each source in the pools of some runs."""
    counts: dict[str, float] = {}
    for run in runs:
        for line in run.steps.values():
            for source, count in _pool(line).items():
                counts[source] = counts.get(source, 0.0) + count
    total = sum(counts.values())
    return {source: count / total for source, count in counts.items()} if total else {}


def _source_colours(record: Record) -> dict[str, int]:
    """Return a colour number by source: the domain first, then the largest shares of the pool."""
    shares = _shares(record.runs)
    picked = (str(sample.get("source", "?")) for run in record.runs for _, sample in run.samples("picked"))
    names = sorted(dict.fromkeys([*shares, *picked]), key=lambda name: -shares.get(name, 0.0))
    domain = record.header.get("domain")
    return _colours(names, domain if domain in names else None)


def _colours(names: Sequence[str], first: str | None) -> dict[str, int]:
    """Return a colour number by name: 0 is kept for ``first``."""
    others = [name for name in names if name != first]
    numbers = {name: 1 + i % 7 for i, name in enumerate(others)}
    return numbers if first is None else {first: 0} | numbers


def _key(colours: Mapping[str, int]) -> str:
    names = (f'<span style="--c:var(--c{c})"><i class="dot"></i>{_safe(name)}</span>' for name, c in colours.items())
    return f'<div class="key">{"".join(names)}</div>'


# ---------------------------------------------------------------------------------------------------------------------
# Charts

_Point = tuple[float, float, float, float]  # step, mean, low, high


def _series(runs: Sequence[Run], name: str) -> list[_Point]:
    """Return mean and one standard deviation to either side over runs, by step; long curves are averaged in pieces."""
    curves = [curve for run in runs if (curve := run.values(name))]
    steps = sorted({step for curve in curves for step in curve})
    size = -(-len(steps) // _COLUMNS) or 1
    points = []
    for i in range(0, len(steps), size):
        piece = steps[i : i + size]
        means = _numbers(_mean([curve[s] for s in piece if s in curve]) for curve in curves)
        mean, spread = statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0
        points.append((statistics.fmean(piece), mean, mean - spread, mean + spread))
    return points


def _chart(series: Sequence[tuple[str, int, list[_Point]]], width: int, height: int, *, named: bool = False) -> str:
    """Return curves with bands as SVG; ``named`` writes each method's name at the end of its curve."""
    points = [point for _, _, line in series for point in line]
    left, right, top, bottom = 44.0, width - (170.0 if named else 12.0), 10.0, height - 26.0
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[2] for p in points), max(p[3] for p in points)
    margin = 0.06 * (y1 - y0) or 0.05 * abs(y1) or 1.0
    y0, y1 = y0 - margin, y1 + margin
    x = _scale(x0, x1 if x1 > x0 else x0 + 1, left, right)
    y = _scale(y0, y1, bottom, top)
    out = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for value, label in _ticks(y0, y1, 5):
        out.append(f'<path class="rule" d="M{left} {y(value):.1f}H{right}"/>')
        out.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{label}</text>')
    across = _ticks(x0, x1, 6 if width > 500 else 4)
    for value, label in across:
        word = f"step {label}" if value == across[0][0] else label
        out.append(f'<text x="{x(value):.1f}" y="{height - 6}" text-anchor="middle">{word}</text>')
    for method, colour, line in series:
        upper = [f"{x(p[0]):.1f} {y(p[3]):.1f}" for p in line]
        lower = [f"{x(p[0]):.1f} {y(p[2]):.1f}" for p in reversed(line)]
        middle = [f"{x(p[0]):.1f} {y(p[1]):.1f}" for p in line]
        ends = f"{_safe(method)}: {line[0][1]:.4g} to {line[-1][1]:.4g}"
        out.append(
            f'<g style="--c:var(--c{colour})"><title>{ends}</title><path class="band" d="M{"L".join(upper + lower)}Z"/>'
        )
        out.append(f'<path class="curve" d="M{"L".join(middle)}"/></g>')
    if named:
        previous = -math.inf
        for method, colour, line in sorted(series, key=lambda one: -one[2][-1][1]):
            previous = max(y(line[-1][1]) + 4, previous + 18)
            name = f'<text class="name" x="{right + 10}" y="{previous:.1f}">{_safe(method)}</text>'
            out.append(f'<g style="--c:var(--c{colour})">{name}</g>')
    return "".join(out) + "</svg>"


def _bars(runs: Sequence[Run], colours: Mapping[str, int], width: int = 340, height: int = 190) -> str:
    """Return stacked columns as SVG: shares of the sources in the pool, then in the picks of successive steps."""
    picks = [(step, str(sample.get("source", "?"))) for run in runs for step, sample in run.samples("picked")]
    steps = sorted({step for step, _ in picks})
    if not steps:
        return ""
    count = min(15, len(steps))
    place = {step: i * count // len(steps) for i, step in enumerate(steps)}
    columns: list[dict[str, float]] = [{} for _ in range(count)]
    for step, source in picks:
        column = columns[place[step]]
        column[source] = column.get(source, 0.0) + 1
    top, bottom, start = 4.0, height - 24.0, 56.0
    pitch = (width - start) / count
    out = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for column, x, w in [
        (_shares(runs), 0.0, 34.0),
        *((c, start + i * pitch, pitch - 2) for i, c in enumerate(columns)),
    ]:
        total, y = sum(column.values()), bottom
        for name in colours:
            share = column.get(name, 0.0) / total if total else 0.0
            tall = share * (bottom - top)
            y -= tall
            if tall > 0:
                box = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{max(tall - 1, 0.5):.1f}"'
                out.append(
                    f'<rect {box} style="fill:var(--c{colours[name]})"><title>{_safe(name)}: {share:.0%}</title></rect>'
                )
    for at, anchor, label in [
        (17, "middle", "pool"),
        (start, "start", f"step {steps[0]}"),
        (width - 2, "end", str(steps[-1])),
    ]:
        out.append(f'<text x="{at}" y="{height - 7}" text-anchor="{anchor}">{label}</text>')
    return "".join(out) + "</svg>"


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """Return about ``count`` round values between low and high, with their labels."""
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if max(abs(low), abs(high)) >= 1e5 or digits > 4:
        return [(i * step, f"{i * step:.3g}") for i in range(first, last + 1)]
    return [(i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the page of one or several records."""
    parser = argparse.ArgumentParser(prog="python -m ftw.report", description="Make a page from the record of a run.")
    parser.add_argument("records", nargs="+", metavar="run.jsonl", help="records, shown together")
    parser.add_argument("-o", "--output", metavar="page.html", help="the page (default: beside the first record)")
    options = parser.parse_args(arguments)
    output = Path(options.output or Path(options.records[0]).with_suffix(".html"))
    try:
        if any(output.resolve() == Path(path).resolve() for path in options.records):
            raise ValueError(f"{output}: is a record itself; give another name with -o")
        write(read(*options.records), output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


def write(record: Record, path: str | os.PathLike[str]) -> None:
    """Write the page of a record, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(render(record), encoding="utf-8", errors="replace")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
