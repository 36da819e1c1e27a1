"""The table of every candidate: its rows are the record's decisions, and the page runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser

import pytest

from ftw.report import Recorder, history, page_decisions, read, render

EVIL = "</script><script>alert(1)</script>\u202e<img src=x onerror=alert(2)>"
IDS = [f"doc-{i}" for i in range(7)] + [EVIL]

NODE = """
const page = require("fs").readFileSync(process.argv[2], "utf8"), at = page.indexOf('id="decisions">');
class Element {
  constructor() { Object.assign(this, {children: [], style: {}, value: "", scrollTop: 0, textContent: ""}); }
  append(...x) { this.children.push(...x); }
  replaceChildren(...x) { this.children = x; }
}
const ids = Object.fromEntries(["rows", "found", "decisions", "wanted", "kind"].map(i => [i, new Element()]));
ids.decisions.textContent = page.slice(at).match(/>([^<]*)</)[1];
globalThis.document = {getElementById: i => ids[i], createElement: () => new Element()};
eval(page.slice(at).match(/<script>([^]*?)<\\/script>/)[1]);
const rows = () => ids.rows.children[1].children.map(row => row.children.map(cell => cell.textContent));
const wait = () => ids.found.textContent ? go() : setTimeout(wait, 5);
const go = () => {
  const out = {all: rows()};
  ids.wanted.value = "DOC-3"; ids.wanted.oninput(); out.search = rows();
  ids.wanted.value = ""; ids.kind.value = "0"; ids.kind.onchange(); out.picked = rows();
  ids.kind.value = ""; ids.rows.children[0].children[4].onclick(); out.rising = rows();
  ids.rows.children[0].children[4].onclick(); out.falling = rows();
  process.stdout.write(JSON.stringify(out));
};
wait();
"""


def packed(step, **more):
    n = len(IDS)
    columns = {
        "id": IDS,
        "code": [0, 1, 2, 3, 0, 4, 5, 99],
        "score": [0.5 * i - step for i in range(n - 1)] + [None],
        "residual": [None] * n,
        "rival": [-1, -1, 0, -1, -1, -1, -1, 10**6],
        "similarity": [None, None, 0.9, None, None, None, None, None],
        "rank": [0, None, None, None, 1, None, None, None],
        "weight": [0.75, None, None, None, 0.25, None, None, None],
        "source": ["web", "code"] * (n // 2),
        **more,
    }
    data = zlib.compress(json.dumps(columns).encode())
    return {"version": 1, "n": n, "data": base64.b64encode(data).decode()}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.jsonl"
    with Recorder(path, title="A run" + EVIL) as recorder:
        recorder.run("a")
        recorder.step("a", 0, loss=2.0, decisions=packed(0))
        recorder.step("a", 1, loss=1.0, decisions={"version": 1, "n": 3, "data": "no"})
        recorder.step("a", 2, loss=1.0, decisions=packed(2))
    return path


class Scripts(HTMLParser):
    """Collects scripts and everything that could run one."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.attributes, self.inside, self.tags = [], [], None, set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [name for name, _ in attrs]
        self.inside = dict(attrs) if tag == "script" else None
        if tag == "script":
            self.scripts.append((self.inside, ""))

    def handle_data(self, data):
        if self.inside is not None and self.scripts:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)

    def handle_endtag(self, tag):
        self.inside = None


def test_the_rows_are_the_decisions(path):
    record = read(path)
    (_, block), _ = Scripts(render(record)).scripts
    data = json.loads(zlib.decompress(base64.b64decode(block)))
    rows = list(zip(*data["columns"], strict=True))
    assert len(rows) == 2 * len(IDS)

    def word(k, i):
        return None if i < 0 else data["words"][k][i]

    for step, name, source, decision, score, residual, weight, rival, cosine, run in rows:
        (one,) = history(record, str(word(1, name)), step=step)
        assert (one.source, one.score, one.residual, one.weight) == (word(2, source), score, residual, weight)
        assert (one.rival, one.similarity, one.run) == (word(7, rival), cosine, word(9, run))
        assert decision == (one.code if one.code < 6 else -1)


def test_the_page_runs_its_own_script_and_nothing_else(path):
    page = render(read(path))
    found = Scripts(page)
    (data, _), (plain, script) = found.scripts
    assert data == {"type": "text/plain", "id": "decisions"}
    assert plain == {}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in page
    assert not {name for name in found.attributes if name.startswith("on") or name in ("src", "href")}
    assert not found.tags & {"img", "iframe", "object", "embed", "link", "a", "form"}
    assert "innerHTML" not in script
    assert "\u202e" not in page
    assert not re.search(r"https?:|url\(|@import", page)


def test_without_decisions_there_is_no_script(tmp_path):
    with Recorder(tmp_path / "run.jsonl") as recorder:
        recorder.run("a")
        recorder.step("a", 0, loss=2.0, decisions={"version": 1, "data": "no"})
    page = render(read(tmp_path / "run.jsonl"))
    assert "<script" not in page
    assert "script-src" not in page


@pytest.mark.parametrize("score", [[float("nan")] * 8, [10**400] * 8, ["x"] * 8, [True] * 8])
def test_numbers_that_are_none(tmp_path, score):
    with Recorder(tmp_path / "run.jsonl") as recorder:
        recorder.run("a")
        recorder.step("a", 0, decisions=packed(0, score=score))
    (_, block), _ = Scripts(render(read(tmp_path / "run.jsonl"))).scripts
    assert json.loads(zlib.decompress(base64.b64decode(block)))["columns"][4] == [None] * 8


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_search_and_sort(path, tmp_path):
    page, program = tmp_path / "page.html", tmp_path / "run.js"
    page.write_text(render(read(path)), encoding="utf-8")
    program.write_text(NODE, encoding="utf-8")
    done = subprocess.run(["node", program, page], capture_output=True, text=True, timeout=60)
    assert not done.stderr
    got = json.loads(done.stdout)
    assert [row[1] for row in got["all"]] == IDS * 2
    assert got["all"][2][3:] == ["refused: a kept sample explains most of it", "1", "", "", "doc-0", "0.9", "a"]
    assert [(row[0], row[1]) for row in got["search"]] == [("0", "doc-3"), ("2", "doc-3")]
    assert {row[1] for row in got["picked"]} == {"doc-0", "doc-4"}
    scores = sorted(0.5 * i - step for step in (0, 2) for i in range(7))
    assert [float(row[4]) for row in got["rising"][:14]] == scores
    assert [float(row[4]) for row in got["falling"][:14]] == scores[::-1]
    assert [row[4] for row in got["rising"][14:]] == ["", ""]


def test_a_table_that_is_full_says_how_many_rows_it_leaves_out(path, monkeypatch):
    monkeypatch.setattr(page_decisions, "LARGEST", len(IDS))
    assert f" {len(IDS)} more, of the last steps, are in the record alone" in render(read(path))
    monkeypatch.setattr(page_decisions, "LARGEST", len(IDS) + 1)
    assert "in the record alone" not in render(read(path))
