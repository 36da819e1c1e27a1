"""The record survives what happens to it; the page escapes what is in it and refers to nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftw import report
from ftw.report import Recorder, describe, paired, read, render, summarise, table

EVIL = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>\"'&\u202e\x1b[31m"


class Page(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = set(), [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(page):
    """A page refers to nothing, runs nothing, and is well formed."""
    parsed = Page(page)
    assert not parsed.tags & {"script", "img", "link", "iframe", "object", "embed", "a", "form", "image", "use"}
    assert not {name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href", "xlink:href")}
    assert not re.search(r"https?:|//\w|url\(|@import", page)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)
    assert "nan" not in " ".join(value or "" for name, value in parsed.attributes if name in ("d", "x", "y", "height"))
    return parsed


def write_record(path, *, text=True, methods=("plain", "better"), seeds=3, steps=10, evil="", **header):
    with Recorder(path, text=text, title="A run" + evil, domain="good", highlight=methods[-1], **header) as recorder:
        for place, method in enumerate(methods):
            for seed in range(seeds):
                run = f"{method} {seed}{evil}"
                recorder.run(run, method=method + evil, seed=seed)
                for step in range(steps + 1):
                    columns = {
                        "source": ["good", "bad" + evil] * 4,
                        "score": np.arange(8.0),
                        "text": ["some text" + evil] * 8,
                    }
                    recorder.step(
                        run,
                        step,
                        test_loss=np.float32(3 - (0.1 + 0.1 * place) * step / steps + 0.01 * seed),
                        effective_size=2.0,
                        status="OK" + evil,
                        seconds={"choosing" + evil: 0.5, "update": 0.25},
                        pool={"good": 4, "bad" + evil: 4},
                        picked=describe(np.array([0, 1]), np.array([0.75, 0.25]), **columns),
                        refused=describe([2, 7], **columns),
                    )


def test_round_trip(tmp_path):
    write_record(tmp_path / "run.jsonl", note="what it is", model={"width": 48})
    record = read(tmp_path / "run.jsonl")
    assert record.damaged == 0
    assert record.header["model"] == {"width": 48}
    assert {method: [run.seed for run in runs] for method, runs in record.methods.items()} == {
        "plain": [0, 1, 2],
        "better": [0, 1, 2],
    }
    step = record.runs[-1].steps[10]
    assert step["picked"][1] == {"index": 1, "source": "bad", "score": 1.0, "text": "some text", "weight": 0.25}
    assert [sample["index"] for sample in step["refused"]] == [2, 7]

    plain, better = summarise(record)
    assert better.start == pytest.approx(3.01)
    assert better.mean == pytest.approx(2.81)
    assert better.spread == pytest.approx(0.01, rel=1e-4)
    assert (better.domain, better.domain_weight, better.effective_size) == (0.5, 0.75, 2.0)
    assert better.seconds == pytest.approx(0.75 * 11)
    mean, spread, below, count = paired(better, plain)
    assert (mean, spread) == (pytest.approx(-0.1, rel=1e-4), pytest.approx(0, abs=1e-6))
    assert (below, count) == (3, 3)
    rows = table(record)
    assert rows[0] == ["method", "start", "end", "against plain", "from domain", "by weight", "effective", "seconds"]
    assert rows[2][:6] == ["better", "3.010", "2.810 ± 0.010", "-0.100 ± 0.000 (3/3)", "50 %", "75 %"]


def test_a_record_is_judged_by_what_was_not_selected_for(tmp_path):
    with Recorder(tmp_path / "run.jsonl") as recorder:
        for step in range(3):
            recorder.step("run", step, loss=9.0, target_loss=5.0 - step, watch_loss=7.0 + step)
    record = read(tmp_path / "run.jsonl")
    assert (summarise(record)[0].start, summarise(record)[0].mean) == (7.0, 9.0)
    page = render(record)
    assert "Loss on the second target split by step" in page
    assert "Loss on the target samples" in page


def test_page(tmp_path):
    write_record(tmp_path / "run.jsonl", note="what it is", model="the model")
    page = render(read(tmp_path / "run.jsonl"))
    parsed = check(page)
    for words in ("A run", "what it is", "Test loss by step", "Results", "Where the picks came from", "some text"):
        assert words in parsed.text
    assert "prefers-color-scheme:dark" in page
    assert 'name="viewport"' in page
    assert "default-src 'none'" in page


def write_offers(path, evil=""):
    """A pool of four at each of six steps; a is picked in all, b in the last three, c and d never."""
    with Recorder(path, text=True) as recorder:
        for step in range(1, 7):
            picked = ["a", "b"] if step > 3 else ["a"]
            samples = [
                {"id": i, "length": n, "text": f"text of {i}{evil}"} for i, n in zip("abcd", (4, 4, 9, 30), strict=True)
            ]
            recorder.step(
                "run",
                step,
                loss=1.0 / step,
                picked=[{**s, "weight": 1 / len(picked)} for s in samples if s["id"] in picked],
                refused=[s for s in samples if s["id"] == "d"],
                offered={"id": list("abcd" if step > 1 else "abd"), "length": [s["length"] for s in samples]},
            )


def test_the_page_follows_samples_through_the_steps(tmp_path):
    write_offers(tmp_path / "run.jsonl", evil=EVIL)
    page = render(read(tmp_path / "run.jsonl"))
    words = " ".join(check(page).text.split())
    most, least = words.split("The most and the least chosen samples")[1].split("Least")
    assert most.index("sample apicked 6 of 6 timesmean weight 0.75") < most.index("sample bpicked 3 of 6 times")
    assert least.index("sample dpicked 0 of 6 timeslength 30text of d") < least.index("sample cpicked 0 of 5 times")
    assert words.count("Picks by length") == 1
    assert re.findall(r"<title>(4|5 to 9|10 to 30): (\d+%)</title>", page)[:3] == [
        ("4", "50%"),
        ("5 to 9", "25%"),
        ("10 to 30", "25%"),
    ]


def test_a_page_without_lengths_or_names_leaves_these_parts_out(tmp_path):
    write_record(tmp_path / "run.jsonl")
    text = check(render(read(tmp_path / "run.jsonl"))).text
    assert "Picks by length" not in text
    assert "chosen samples" not in text


def test_everything_that_comes_from_the_data_is_escaped(tmp_path):
    write_record(tmp_path / "run.jsonl", evil=EVIL, note=EVIL, **{f"file {EVIL}": EVIL, "nested": [{"a": EVIL}]})
    parsed = check(render(read(tmp_path / "run.jsonl")))
    assert "<script>alert('x')</script>" in parsed.text
    assert "\\u202e" in parsed.text


def test_no_text_unless_asked(tmp_path):
    write_record(tmp_path / "run.jsonl", text=False, note="n")
    assert "some text" not in (tmp_path / "run.jsonl").read_text()
    page = render(read(tmp_path / "run.jsonl"))
    check(page)
    assert "What was picked" not in page


def test_a_truncated_line_is_passed_over_and_the_record_goes_on(tmp_path):
    path = tmp_path / "run.jsonl"
    write_record(path, seeds=1)
    data = path.read_bytes()
    path.write_bytes(data[:-25])
    cut = read(path)
    assert cut.damaged == 1
    assert sorted(cut.runs[-1].steps) == list(range(10))
    with Recorder(path, title="again") as recorder:  # resumed two steps back
        for step in (8, 9, 10):
            recorder.step("better 0", step, test_loss=1.0)
    record = read(path)
    assert record.damaged == 1
    assert record.header["title"] == "A run"
    assert [record.runs[-1].steps[step]["test_loss"] for step in (8, 9, 10)] == [1.0] * 3
    assert "1 damaged line" in render(record)


def test_a_fresh_record_forgets_the_old_one(tmp_path):
    write_record(tmp_path / "run.jsonl", seeds=1)
    Recorder(tmp_path / "run.jsonl", fresh=True).close()
    assert read(tmp_path / "run.jsonl").runs == []


WRITER = """
import sys
from ftw.report import Recorder
recorder = Recorder(sys.argv[1])
step = 0
while True:
    recorder.step("run", step, test_loss=1.0)
    step += 1
"""


def test_a_killed_process_leaves_a_record(tmp_path):
    path = tmp_path / "run.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        while not (path.exists() and path.stat().st_size > 50_000):
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (run,) = read(path).runs
    assert sorted(run.steps) == list(range(len(run.steps)))
    assert len(run.steps) > 500


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_the_record_not_the_run():
    with pytest.warns(report.RecordWarning, match="the record ends here"):
        recorder = Recorder("/dev/full")
    recorder.step("run", 1, loss=1.0)


def test_what_is_not_finite_and_arrays_of_any_library(tmp_path):
    path = tmp_path / "run.jsonl"
    with Recorder(path) as recorder:
        recorder.step("run", np.int64(1), loss=float("nan"), losses=np.array([1.0, np.inf]), path=path, raw=b"\xff")
    line = json.loads(path.read_text().splitlines()[1])
    assert (line["step"], line["loss"], line["losses"], line["path"]) == (1, None, [1.0, None], str(path))
    check(render(read(path)))


@pytest.mark.parametrize(
    "content", ["", "hello\n", '{"kind":"step","step":1}\n', '{"kind":"header","format":"other"}\n', "\0" * 99]
)
def test_what_is_not_a_record(tmp_path, content):
    (tmp_path / "x").write_text(content)
    with pytest.raises(ValueError, match="not a record"):
        read(tmp_path / "x")


def test_a_record_of_a_later_version(tmp_path):
    (tmp_path / "x").write_text('{"kind":"header","format":"ftw-run","version":99}\n')
    with pytest.raises(ValueError, match="version 99"):
        read(tmp_path / "x")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
samples = st.lists(
    values
    | st.dictionaries(st.sampled_from(["text", "source", "weight", "score", "index"]), values)
    | st.fixed_dictionaries(
        {"id": st.sampled_from("abc") | values, "length": st.integers(0, 9) | values, "text": values}
    ),
    max_size=3,
)
steps = st.fixed_dictionaries(
    {"step": st.integers(0, 3) | values},
    optional={
        **{
            name: st.floats() | values for name in ("test_loss", "loss", "match", "effective_size", "status", "seconds")
        },
        "picked": samples | values,
        "refused": samples | values,
        "pool": st.dictionaries(st.text(max_size=3), st.integers(0, 5) | values) | values,
        "offered": st.fixed_dictionaries(
            {},
            optional={"id": st.lists(st.sampled_from("abc") | values), "length": st.lists(st.integers(0, 9) | values)},
        )
        | values,
    },
)


@settings(max_examples=60, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["title", "note", "domain", "highlight", "x"]), values),
    lines=st.lists(steps),
)
def test_a_record_of_nonsense_makes_a_page(tmp_path_factory, header, lines):
    path = tmp_path_factory.mktemp("nonsense") / "run.jsonl"
    whole = [{"kind": "header", "format": "ftw-run", "version": 1, **header}]
    whole += [{"kind": "run", "run": i % 2, "method": header.get("x"), "seed": header.get("x")} for i in range(2)]
    whole += [{"kind": "step", "run": i % 2, **line} for i, line in enumerate(lines)]
    path.write_text("\n".join(map(json.dumps, whole)))
    check(render(read(path)))


def test_a_long_run_makes_a_small_page(tmp_path):
    with Recorder(tmp_path / "run.jsonl") as recorder:
        for step in range(5_000):
            recorder.step("run", step, loss=1 / (1 + step), grad_norm=1.0)
    page = render(read(tmp_path / "run.jsonl"))
    check(page)
    assert len(page) < 50_000


def test_command_line(tmp_path, capsys):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_record(one, methods=("plain",))
    write_record(two, methods=("better",))
    assert report.main([str(one), str(two), "-o", str(tmp_path / "page.html")]) == 0
    parsed = check((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "plain" in parsed.text
    assert "better" in parsed.text
    assert sorted(os.listdir(tmp_path)) == ["one.jsonl", "page.html", "two.jsonl"]
    before = one.read_bytes()
    assert report.main([str(one), "-o", str(one)]) == 1
    assert report.main([str(tmp_path / "none.jsonl")]) == 1
    assert one.read_bytes() == before
    assert "error:" in capsys.readouterr().err
    subprocess.run([sys.executable, "-m", "ftw.report", str(one)], check=True, capture_output=True)
    assert (tmp_path / "one.html").exists()
