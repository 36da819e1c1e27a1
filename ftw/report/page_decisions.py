"""The part of a page that says what became of every candidate: a table to search and to sort in the browser.

The rows are data, compressed in one block that no browser runs; a script of a few lines unfolds them and draws those in
view. It writes text, never markup, and the page's policy admits it by its hash and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

from ftw.reasons import Reason

from .decisions import columns_of
from .record import Record

__all__ = ["DECISIONS_STYLE", "candidates", "policy"]

LARGEST = 1_000_000  # rows of a page; --why finds the others
COLUMNS = ("step", "id", "source", "decision", "score", "residual", "weight", "rival", "cosine", "run")

DECISIONS_STYLE = """
.find{display:flex;flex-wrap:wrap;gap:8px 14px;margin:12px 0}.find input,.find select{font:inherit;font-size:14px;
padding:6px 10px;border:1px solid var(--line);border-radius:8px;background:var(--bg);color:var(--ink);min-width:0}
.find input{flex:1 1 190px}.rows{height:460px;overflow:auto;position:relative;border:1px solid var(--line);
border-radius:10px;font-size:13.5px;font-variant-numeric:tabular-nums}.rows .row{display:grid;position:absolute;
height:30px;line-height:30px;min-width:100%;
grid-template-columns:70px 170px 120px 210px 90px 90px 90px 170px 80px 150px}
.rows .head{position:sticky;top:0;background:var(--card);border-bottom:1px solid var(--line);z-index:1}
.rows .head button{all:unset;cursor:pointer;color:var(--soft)}
.rows .head button:focus-visible{outline:2px solid var(--c0)}
.rows span,.rows button{padding:0 10px!important;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;
unicode-bidi:isolate}
"""

SCRIPT = """
"use strict";
(async () => {
const box = document.getElementById("rows"), note = document.getElementById("found");
const packed = document.getElementById("decisions").textContent;
const bytes = Uint8Array.from(atob(packed), c => c.charCodeAt(0));
const unfolded = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
const data = await new Response(unfolded).json();
const names = data.names, columns = data.columns, n = columns[0].length, HEIGHT = 30;
const words = data.words.map((w, k) => w ? columns[k].map(i => i < 0 ? "" : w[i]) : null);
const lower = [1, 2, 7].map(k => data.words[k].map(w => w.toLowerCase()));
let order = Array.from({length: n}, (_, i) => i), by = -1, up = true;
const head = document.createElement("div"), body = document.createElement("div");
head.className = "row head";
names.forEach((name, k) => {
  const button = document.createElement("button");
  button.textContent = name;
  button.onclick = () => { up = by === k ? !up : true; by = k; show(); };
  head.append(button);
});
box.append(head, body);
const text = (k, i) => {
  if (words[k]) return words[k][i];
  const x = columns[k][i];
  return x === null ? "" : k === 0 ? String(x) : String(Number(x.toPrecision(4)));
};
const draw = () => {
  const first = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - 5), drawn = [];
  for (let at = first; at < Math.min(order.length, first + 40); at++) {
    const row = document.createElement("div");
    row.className = "row";
    row.style.top = (at + 1) * HEIGHT + "px";
    for (let k = 0; k < names.length; k++) {
      const cell = document.createElement("span");
      cell.title = cell.textContent = text(k, order[at]);
      row.append(cell);
    }
    drawn.push(row);
  }
  body.style.height = order.length * HEIGHT + "px";
  body.replaceChildren(...drawn);
};
const show = () => {
  const wanted = document.getElementById("wanted").value.toLowerCase();
  const kind = document.getElementById("kind").value;
  const hits = lower.map(list => list.map(w => w.includes(wanted)));
  const hit = i => !wanted || [1, 2, 7].some((k, j) => columns[k][i] >= 0 && hits[j][columns[k][i]])
    || String(columns[0][i]) === wanted;
  order = [];
  for (let i = 0; i < n; i++) if ((kind === "" || columns[3][i] === Number(kind)) && hit(i)) order.push(i);
  if (by >= 0) {
    const key = words[by] || columns[by], sign = up ? 1 : -1;
    order.sort((a, b) => {
      const x = key[a], y = key[b];
      if (x === null || x === "") return y === null || y === "" ? a - b : 1;
      if (y === null || y === "") return -1;
      return x < y ? -sign : x > y ? sign : a - b;
    });
  }
  note.textContent = order.length.toLocaleString("en") + " of " + n.toLocaleString("en") + " decisions";
  box.scrollTop = 0;
  draw();
};
data.words[3].forEach((w, k) => {
  const option = document.createElement("option");
  option.value = k;
  option.textContent = w;
  document.getElementById("kind").append(option);
});
document.getElementById("wanted").oninput = document.getElementById("kind").onchange = show;
box.onscroll = draw;
show();
})();
"""


def policy(*, scripted: bool) -> str:
    """Return the content security policy of a page: nothing but its own style, and with a table its one script."""
    base = "default-src 'none'; style-src 'unsafe-inline'"
    if not scripted:
        return base
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"{base}; script-src 'sha256-{digest}'"


def candidates(record: Record) -> str:
    """Return the table of all decisions, nothing where the record has none."""
    packed, left_out = _packed(record)
    if packed is None:
        return ""
    rest = f" {left_out:,} more, of the last steps, are in the record alone: --why finds them." if left_out else ""
    return (
        '<section><h2>Every candidate, every step</h2><p class="soft small">Why it was picked or refused. Search for a '
        f"sample, a source, a rival or a step; a heading sorts.{rest}</p>"
        '<div class="find"><input id="wanted" type="search" placeholder="sample, source or step" '
        'aria-label="Search"><select id="kind" aria-label="Decision"><option value="">every decision</option></select>'
        '</div><p class="soft small" id="found">This table needs a browser with JavaScript; without, '
        "<code>python -m ftw.report run.jsonl --why ID --step N</code> says the same.</p>"
        '<div class="rows" id="rows" tabindex="0"></div>'
        f'<script type="text/plain" id="decisions">{packed}</script><script>{SCRIPT}</script></section>'
    )


def _packed(record: Record) -> tuple[str | None, int]:
    """Return the rows of all steps as base64 of zlib of JSON columns, words numbered, and how many found no room."""
    numbers: list[dict[str, int]] = [{} for _ in COLUMNS]
    columns: list[list[Any]] = [[] for _ in COLUMNS]

    def word(k: int, x: Any) -> int:
        return -1 if x is None else numbers[k].setdefault(str(x), len(numbers[k]))

    for reason in Reason:
        word(3, reason.message)
    left_out = 0
    for run in record.runs:
        for step, line in sorted(run.steps.items()):
            found = columns_of(line.get("decisions"))
            if not found:
                continue
            if len(columns[0]) >= LARGEST:
                left_out += len(found["id"])
                continue
            _append(columns, word, found, run.name, step)
    if not columns[0]:
        return None, 0
    words = [list(one) or None for one in numbers]
    for k in (1, 2, 7, 9):
        words[k] = words[k] or []
    data = {"names": COLUMNS, "columns": columns, "words": words}
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).encode()
    return base64.b64encode(zlib.compress(text, 6)).decode(), left_out


def _append(columns: list[list[Any]], word: Any, found: Mapping[str, list[Any]], run: str, step: int) -> None:
    """Append a step's rows."""
    ids, n = found["id"], len(found["id"])
    empty = [None] * n
    rivals = [r if isinstance(r, int) and 0 <= r < n else None for r in found.get("rival", empty)]
    known = [code if code in tuple(Reason) else -1 for code in found["code"]]
    columns[0] += [step] * n
    columns[1] += [word(1, x) for x in ids]
    columns[2] += [word(2, x) for x in found.get("source", empty)]
    columns[3] += known
    for k, name in ((4, "score"), (5, "residual"), (6, "weight"), (8, "similarity")):
        column = found.get(name, empty)
        columns[k] += [float(x) if type(x) in (int, float) and abs(x) < 1e300 else None for x in column]
    columns[7] += [word(7, None if r is None else ids[r]) for r in rivals]
    columns[9] += [word(9, run)] * n
