"""The page of a record: one HTML file that refers to nothing; everything from the data is escaped.

A record with decisions adds the one script of the page, which draws their table.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .page_decisions import DECISIONS_STYLE, candidates, policy
from .page_samples import chosen, counted, lengths
from .record import Record, Run, number_in, numbers_in
from .summary import highlighted, metric, paired, pool_shares, summarise, table, written
from .svg import chart, columns, curve_of, key, safe

__all__ = ["STYLE", "render", "write"]

CHARTS = {
    "test_loss": "Test loss",
    "watch_loss": "Loss on the second target split",
    "target_loss": "Loss on the target samples",
    "loss": "Loss of the samples trained on",
    "grad_norm": "Gradient norm",
    "match": "Match of the chosen update with the target's (cosine)",
    "effective_size": "Effective number of samples",
    "shrinkage": "Shrinkage of the target",
}

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#16202c;--soft:#5a6776;--line:#e1e6ec;
--shade:#16202c33;--c0:#0d8a7b;--c1:#8793a2;--c2:#d0702a;--c3:#5577d6;--c4:#a25bbf;--c5:#c9a227;--c6:#c4496b;--c7:#4f9d4a}
@media(prefers-color-scheme:dark){:root{--bg:#0f1419;--card:#182029;--ink:#e6ebf0;--soft:#98a5b3;--line:#2b3641;
--shade:#00000099;--c0:#34c9b5;--c1:#8794a3;--c2:#ee9a5a;--c3:#86a3f5;--c4:#c98be3;--c5:#dcbf54;--c6:#ea7d9b;--c7:#82c67d}}
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
.scroll{overflow-x:auto;margin:12px -24px 0;padding:0 24px;background:
linear-gradient(to right,var(--card) 50%,transparent) 0 0/48px 100% no-repeat local,
linear-gradient(to left,var(--card) 50%,transparent) 100% 0/48px 100% no-repeat local,
linear-gradient(to right,var(--shade),transparent) 0 0/16px 100% no-repeat scroll,
linear-gradient(to left,var(--shade),transparent) 100% 0/16px 100% no-repeat scroll}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14.5px}
th,td{text-align:right;padding:9px 0 9px 14px;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:500;font-size:13px}th:first-child,td:first-child{text-align:left;padding-left:0}
tr:last-child td{border-bottom:0}tr.best td{font-weight:650}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13.5px;color:var(--soft);margin:6px 0 10px}
.dot{display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);margin-right:6px}
figure{margin:0}svg{display:block;width:100%;height:auto;font-size:12px}svg text{fill:var(--soft)}
svg .rule{stroke:var(--line)}svg .curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
svg .hit{fill:transparent}
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
    title = safe(record.header.get("title") or "A run")
    note = f'<p class="soft">{safe(record.header["note"])}</p>' if record.header.get("note") else ""
    every = candidates(record)
    style = STYLE + DECISIONS_STYLE if every else STYLE
    parts = [
        _tiles(record),
        _curves(record),
        _results(record),
        _sources(record),
        lengths(record),
        _details(record),
        _reading(record),
        chosen(record, _source_colours(record)),
        every,
        _setup(record),
    ]
    damaged = f" Passed over: {counted(record.damaged, 'damaged line')}." if record.damaged else ""
    made = f"Made by ftw (Filter-then-Weight) from the record of {counted(len(record.runs), 'run')}.{damaged}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(scripted=bool(every))}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{note}"
        + "\n".join(filter(None, parts))
        + f"\n<footer>{made}</footer>\n</main>\n</body>\n</html>\n"
    )


def _tiles(record: Record) -> str:
    """Return the figures that say most."""
    summaries = {one.method: one for one in summarise(record)}
    best = summaries.get(highlighted(record))
    if best is None or best.mean is None:
        return ""
    label = CHARTS[metric(record)].lower()
    tiles = [(f"{best.mean:.3f}", f"{label} at the end, {written(best.start, 3)} at the start")]
    for other in summaries.values():
        if other is not best and (gap := paired(best, other)) is not None:
            tiles.append((f"{gap[0]:+.3f}", f"against {safe(other.method)}; lower in {gap[2]} of {gap[3]} runs"))
    if best.domain is not None:
        pool = pool_shares(record.runs).get(str(record.header.get("domain")))
        known = f"; {pool:.0%} of the pool" if pool else ""
        tiles.append((f"{best.domain:.0%}", f"of the picks came from the target domain{known}"))
    if best.effective_size is not None and len(tiles) < 4:
        tiles.append((f"{best.effective_size:.1f}", "effective number of samples in a step"))
    cards = "".join(f'<div class="tile"><b>{_minus(number)}</b><span>{text}</span></div>' for number, text in tiles[:4])
    return f'<div class="tiles">{cards}</div>'


def _curves(record: Record) -> str:
    """Return the chart of the loss that counts."""
    name, colours = metric(record), _colours(list(record.methods), highlighted(record))
    series = [(method, colours[method], curve_of(runs, name)) for method, runs in record.methods.items()]
    series = [one for one in series if one[2]]
    if not series:
        return ""
    several = any(len(runs) > 1 for runs in record.methods.values())
    band = " Lines are means over the runs, bands one standard deviation to either side." if several else ""
    return (
        f'<section><h2>{CHARTS[name]} by step</h2><p class="soft small">Lower is better.{band}</p>'
        f'<figure class="wide">{chart(series, 1000, 380, named=True)}</figure>'
        f'<figure class="narrow">{key(colours)}{chart(series, 340, 260)}</figure></section>'
    )


def _results(record: Record) -> str:
    """Return the table."""
    head, *rows = table(record)
    best = highlighted(record)
    heads = "".join(f"<th>{safe(cell)}</th>" for cell in head)
    body = ""
    for name, *cells in rows:
        numbers = "".join(f"<td>{_minus(safe(cell))}</td>" for cell in cells)
        body += f"<tr{' class=best' if name == best else ''}><td>{safe(name)}</td>{numbers}</tr>"
    several = any(len(runs) > 1 for runs in record.methods.values())
    spread = ", mean ± standard deviation over the runs" if several else ""
    words = {
        "start": f"Start and end: {CHARTS[metric(record)].lower()}{spread}.",
        "against": "Against: the difference to a method in runs of the same seed, negative is better, and in how many "
        "of them it is negative.",
        "from": "From domain: share of the picks that came from the target domain, by number and by weight.",
        "effective": "Effective: (Σw)² / Σw² of a step.",
        "seconds": "Seconds: of a run, without evaluation.",
    }
    said = [text for word, text in words.items() if any(cell.startswith(word) for cell in head)]
    return (
        '<section><h2>Results</h2><div class="scroll">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="soft small">{" ".join(said)}</p></section>'
    )


def _sources(record: Record) -> str:
    """Return where the picks came from, a panel a method, the pool beside them."""
    colours = _source_colours(record)
    if len(colours) < 2:
        return ""
    panels = {method: (_picked(runs), pool_shares(runs)) for method, runs in record.methods.items()}
    return (
        '<section><h2>Where the picks came from</h2><p class="soft small">Share of the samples trained on, by source, '
        f"over the steps; the column on the left is the pool they were picked from.</p>{key(colours)}"
        f"{columns(panels, colours)}</section>"
    )


def _picked(runs: Sequence[Run]) -> list[tuple[int, str]]:
    return [(step, str(sample.get("source", "?"))) for run in runs for step, sample in run.samples("picked")]


def _details(record: Record) -> str:
    """Return small charts of whatever else was recorded."""
    colours = _colours(list(record.methods), highlighted(record))
    figures = []
    for name, label in CHARTS.items():
        series = [(method, colours[method], curve_of(runs, name)) for method, runs in record.methods.items()]
        series = [one for one in series if any(point[1] for point in one[2])]
        if name != metric(record) and series:
            figures.append(f"<figure><h3>{label}</h3>{chart(series, 340, 210)}</figure>")
    if (times := _times(record)) or figures:
        grid = f'<div class="grid">{"".join(figures)}{times}</div>'
        return f"<section><h2>Along the way</h2>{key(colours)}{grid}</section>"
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
                parts.setdefault(part, []).extend(numbers_in([value]))
        words = [f"{safe(part)} {_duration(statistics.fmean(values))}" for part, values in parts.items() if values]
        states = Counter(str(line["status"]) for line in lines if line.get("status") not in (None, 0, "OK"))
        words += [f"{safe(state)} in {counted(count, 'step')}" for state, count in states.items()]
        if words:
            rows.append(f"<dt>{safe(method)}</dt><dd>{', '.join(words)}</dd>")
    return f"<figure><h3>Time of a step</h3><dl>{''.join(rows)}</dl></figure>" if rows else ""


def _reading(record: Record) -> str:
    """Return what was picked and what was refused, at some steps of one run."""
    runs = record.methods.get(highlighted(record), []) + record.runs
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
        words = ", ".join(f"{n} {safe(source)}" for source, n in count.most_common())
        blocks.append(
            f"<details{' open' if step in (shown[0], shown[-1]) else ''}><summary><b>Step {step}</b> "
            f'<span class="soft">picked {words}</span></summary><div class="grid">{"".join(sides)}</div></details>'
        )
    return (
        "<section><h2>What was picked, what was refused</h2>"
        f'<p class="soft small">Of the run “{safe(run.name)}”. A score says how much a sample alone would lower the '
        "loss on the target, on a scale of the step's own. Refused: the best scores that were passed over, and the "
        "worst. A pick answers to the mean gradient of a few target samples: where that is mostly noise, a pick that "
        "looks odd may be no more than that, above all the first of a step.</p>"
        f"{''.join(blocks)}</section>"
    )


def _card(sample: Mapping[str, Any], colours: Mapping[str, int]) -> str:
    source = str(sample.get("source", "?"))
    numbers = {name: number_in(sample.get(name)) for name in ("weight", "score", "loss")}
    facts = "".join(f"<span>{name} {_minus(f'{n:.3g}')}</span>" for name, n in numbers.items() if n is not None)
    return (
        f'<div class="sample" style="--c:var(--c{colours.get(source, 1)})"><div><b>{safe(source)}</b>{facts}</div>'
        f"<pre>{safe(str(sample.get('text', '')).rstrip())}</pre></div>"
    )


def _setup(record: Record) -> str:
    """Return everything else that the header says."""
    known = {"kind", "format", "version", "text", "title", "note", "highlight", "domain", "config"}
    rows = "".join(f"<dt>{safe(k)}</dt><dd>{safe(_flat(v))}</dd>" for k, v in record.header.items() if k not in known)
    return f"<section><h2>Setup</h2><dl>{rows}</dl></section>" if rows else ""


def _flat(value: Any) -> Any:
    """Return a mapping of words as one line of them."""
    if isinstance(value, dict) and not any(isinstance(v, dict | list) for v in value.values()):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return value


def _duration(seconds: float) -> str:
    """Return a time in milliseconds, from a second on in seconds."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _minus(number: str) -> str:
    """Return a number with the sign that typographers use."""
    return number.replace("-", "\N{MINUS SIGN}")


def _source_colours(record: Record) -> dict[str, int]:
    """Return a colour number by source: the domain first, then the largest shares of the pool."""
    shares = pool_shares(record.runs)
    picked = (str(sample.get("source", "?")) for run in record.runs for _, sample in run.samples("picked"))
    names = sorted(dict.fromkeys([*shares, *picked]), key=lambda name: -shares.get(name, 0.0))
    domain = record.header.get("domain")
    return _colours(names, domain if domain in names else None)


def _colours(names: Sequence[str], first: str | None) -> dict[str, int]:
    """Return a colour number by name: 0 is kept for ``first``."""
    others = [name for name in names if name != first]
    numbers = {name: 1 + i % 7 for i, name in enumerate(others)}
    return numbers if first is None else {first: 0} | numbers


def write(record: Record, path: str | os.PathLike[str]) -> None:
    """Write the page of a record, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(render(record), encoding="utf-8", errors="replace")
    part.replace(path)
