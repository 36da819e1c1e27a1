"""Decisions survive the record; what is not trusted is not believed."""

from __future__ import annotations

import base64
import json
import zlib

import numpy as np
import pytest

import ftw
from ftw import report
from ftw.report import Recorder, decisions, history, read, why


@pytest.fixture
def selection(rng):
    x = {"w": ftw.OuterProduct(rng.normal(size=(12, 3, 4)), rng.normal(size=(12, 3, 5)))}
    x = ftw.take(x, np.array([*range(11), 2]))
    g = ftw.combine(x, np.where(np.arange(12) == 2, 3.0, 0.2))
    return ftw.filter_then_weight(x, g, {"w": ftw.Scale(1.0)}, keep=4, explain=True, guard=0)


IDS = [f"doc-{i}" for i in range(12)]


@pytest.fixture
def path(tmp_path, selection):
    path = tmp_path / "run.jsonl"
    with Recorder(path) as recorder:
        recorder.run("a", method="ours")
        recorder.step("a", 3, loss=1.0, decisions=decisions(selection, IDS, sources=["x"] * 6 + ["y"] * 6))
        recorder.step("a", 4, loss=1.0)
    return path


def test_every_decision_comes_back(path, selection):
    record = read(path)
    places = selection.indices.tolist()
    for i, name in enumerate(IDS):
        (one,) = history(record, name)
        assert (one.run, one.step, one.id, one.source) == ("a", 3, name, "x" if i < 6 else "y")
        assert one.code == selection.reasons.code[i]
        np.testing.assert_allclose(one.score, selection.scores[i], rtol=1e-5)
        np.testing.assert_allclose(one.residual, selection.reasons.residual[i], rtol=1e-5)
        if i in places:
            assert one.rank == places.index(i)
            np.testing.assert_allclose(one.weight, selection.weights[one.rank], rtol=1e-5)
        else:
            assert one.rank is one.weight is None
        rival = selection.reasons.rival[i]
        assert one.rival == (IDS[rival] if rival >= 0 else None)


def test_why_in_a_terminal(path, capsys):
    assert report.main([str(path), "--why", "doc-11", "--step", "3"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("step 3: doc-11, of source y: refused: doc-2 was kept, and explains most of it (cosine 1);")
    assert report.main([str(path), "--why", "doc-2"]) == 0
    assert "doc-2, of source x: picked, place 1, weight 0." in capsys.readouterr().out
    assert not path.with_suffix(".html").exists()
    assert report.main([str(path), "--why", "doc-2", "--step", "4"]) == 1
    assert "no sample 'doc-2' in step 4: decisions are there of steps 3 .. 3" in capsys.readouterr().err
    assert report.main([str(path), "--why", "nobody", "--run", "b"]) == 1
    assert "no sample 'nobody' in any step" in capsys.readouterr().err


def test_names_do_not_steer_the_terminal(tmp_path, selection, capsys):
    path, evil = tmp_path / "run.jsonl", "\x1b[31mred\x07"
    with Recorder(path) as recorder:
        recorder.step("a", 0, decisions=decisions(selection, [evil, *IDS[1:]]))
    assert report.main([str(path), "--why", evil]) == 0
    assert "\x1b" not in (out := capsys.readouterr().out)
    assert "\\x1b[31mred\\x07" in out


@pytest.mark.parametrize(
    "packed",
    [
        None,
        7,
        {"version": 1, "data": "%%%"},
        {"version": 1, "data": base64.b64encode(b"no zlib").decode()},
        {"version": 2, "data": base64.b64encode(zlib.compress(b"{}")).decode()},
        {"version": 1, "data": base64.b64encode(zlib.compress(b"[1]")).decode()},
        {"version": 1, "data": base64.b64encode(zlib.compress(b'{"id":["a"],"code":["x"]}')).decode()},
        {"version": 1, "data": base64.b64encode(zlib.compress(b'{"id":["a"],"code":[1,2]}')).decode()},
    ],
)
def test_what_is_damaged_says_nothing(tmp_path, packed):
    path = tmp_path / "run.jsonl"
    header = {"kind": "header", "format": "ftw-run", "version": 1}
    step = {"kind": "step", "run": "a", "step": 0, "decisions": packed}
    path.write_text(json.dumps(header) + "\n" + json.dumps(step) + "\n")
    assert history(read(path), "a") == []
    with pytest.raises(ValueError, match="has no decisions: select with explain=True"):
        why(read(path), "a")


def test_what_does_not_fit_is_refused(selection):
    with pytest.raises(ValueError, match=r"other lengths than the 12 candidates: \{'id': 3\}"):
        decisions(selection, ["a", "b", "c"])
    with pytest.raises(ValueError, match="explain=True"):
        decisions(selection._replace(reasons=None), IDS)


def test_a_large_pool_is_small_and_quick(rng):
    n = 20_000
    reasons = ftw.Reasons(
        rng.integers(1, 4, size=n), rng.normal(size=n), rng.integers(-1, n, size=n), rng.uniform(size=n)
    )
    selection = ftw.Selection(np.arange(8), np.full(8, 0.125), rng.normal(size=n), *[0.0] * 7, reasons=reasons)
    packed = decisions(selection, range(n))
    assert len(packed["data"]) < 40 * n
