"""The demo, from the command line to the page, in a configuration of seconds."""

import errno
import hashlib
import importlib.metadata
import re
import sysconfig

import pytest

pytest.importorskip("torch")

import torch
from ftw_torch.demo import __main__ as demo
from ftw_torch.demo import model as _demo_model

from ftw import report
from ftw.demo import harness


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Pretrain for 30 steps, measure on 16 samples."""
    pretrain = demo.Framework.pretrain
    monkeypatch.setattr(demo.Framework, "pretrain", lambda self, corpus, steps: pretrain(self, corpus, 30))
    monkeypatch.setattr(harness, "TESTS", 16)


def run(tmp_path, *more):
    page, record = tmp_path / "page.html", tmp_path / "run.jsonl"
    options = ["--steps", "4", "--seeds", "2", "--keep", "2", "--pool-size", "20", "--output", page, "--record", record]
    return demo.main([*map(str, options), *map(str, more)]), page, record


def words(count, salt):
    return " ".join(hashlib.sha256(f"{salt}{i}".encode()).hexdigest()[: 3 + i % 7] for i in range(count))


def test_from_the_command_line_to_the_page(tmp_path, capsys):
    code, page, path = run(tmp_path)
    printed = capsys.readouterr()
    assert code == 0
    for name in ("random", "top-k", "Filter-then-Weight", "against random", "against top-k", "effective", "seconds"):
        assert name in printed.out
    assert re.search(r"4 steps; before the first step \d\.\d{3}\n", printed.out)
    assert re.search(r"Filter-then-Weight +\d\.\d{3} ± \d\.\d{3} +[-+]\d", printed.out)
    assert max(len(line) for line in printed.out.splitlines() if str(tmp_path) not in line) <= 80
    assert "pretraining" not in printed.err  # no terminal, no bars

    record = report.read(path)
    config = record.header["config"]
    assert config["command"].startswith("python -m ftw_torch.demo --steps 4 --seeds 2")
    assert config["options"]["pool_size"] == 20
    assert config["packages"]["torch"] == importlib.metadata.version("torch")
    assert {method: [r.seed for r in runs] for method, runs in record.methods.items()} == {
        name: [0, 1] for name in ("random", "top-k", "Filter-then-Weight")
    }
    for runs in zip(*record.methods.values(), strict=True):  # paired: same start, same pools
        assert len({run.steps[0]["test_loss"] for run in runs}) == 1
        assert [run.steps[1]["pool"] for run in runs] == [runs[0].steps[1]["pool"]] * 3
    for each in record.runs:
        assert sorted(each.steps) == list(range(5))
        for step in range(1, 5):
            picked = each.steps[step]["picked"]
            assert len({sample["index"] for sample in picked}) == 2
            assert sum(sample["weight"] for sample in picked) == pytest.approx(1, abs=1e-5)
            assert ("text" in picked[0]) == (each.seed == 0)

    text = page.read_text(encoding="utf-8")
    for part in ("English prose", "What was picked, what was refused", "Filter-then-Weight", "</html>"):
        assert part in text
    assert not re.search(r"https?://|<script|src=", text)
    assert sysconfig.get_path("stdlib") not in text
    assert str(tmp_path) not in text


def test_runs_are_repeatable(tmp_path):
    finals = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _, _, path = run(tmp_path / name, "--seeds", "1", "--steps", "2")
        finals.append([summary.final for summary in report.summarise(report.read(path))])
    assert finals[0] == finals[1]


def test_a_users_own_text(tmp_path, capsys):
    folder = tmp_path / "<b>pool"
    folder.mkdir()
    (folder / "one.txt").write_text(words(6000, "one"))
    (folder / "two.txt").write_text(words(6000, "two"))
    (folder / "nothing.txt").touch()
    (tmp_path / "wanted.txt").write_text(words(6000, "wanted").upper() + "<script>alert(1)</script>")
    code, page, _ = run(tmp_path, "--seeds", "1", "--pool", folder, "--target", tmp_path / "wanted.txt")
    assert code == 0
    assert "nothing.txt: empty" in capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    assert "Learning wanted.txt from a polluted stream" in text
    assert "<b>pool" not in text
    assert "<script" not in text

    code, page, path = run(tmp_path, "--seeds", "1", "--pool", folder, "--target", tmp_path / "wanted.txt", "--as-is")
    assert code == 0
    pools = {source for line in report.read(path).runs[0].steps.values() for source in line.get("pool", {})}
    assert pools == {"<b>pool"}
    assert "from domain" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "none.txt"], "none.txt: no text to read"),
        (["--target", "short.txt"], "too little target text"),
        (["--pool", "/dev/zero"], "not a regular file"),
    ],
)
def test_text_that_will_not_do(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    code, page, record = run(tmp_path, *options)
    assert code == 1
    assert message in capsys.readouterr().err
    assert not page.exists()
    assert not record.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--keep", "21"],
        ["--keep", "0"],
        ["--seeds", "0"],
        ["--output", "no/such/folder/page.html"],
        ["--output", "."],
        ["--record", "no/such/folder/run.jsonl"],
    ],
)
def test_options_that_will_not_do(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *options)
    assert stop.value.code == 2
    assert f"{options[0]}" in capsys.readouterr().err


def test_the_page_and_the_record_are_two_files_and_no_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wanted.html").write_text("kept")
    for options in (["--output", "run.jsonl"], ["--output", "wanted.html", "--target", "wanted.html"]):
        with pytest.raises(SystemExit) as stop:
            demo.main(options)
        assert stop.value.code == 2
        assert options[1] in capsys.readouterr().err
    assert (tmp_path / "wanted.html").read_text() == "kept"


def test_an_interrupt_names_the_record_and_how_to_make_its_page(tmp_path, monkeypatch, capsys):
    choose, calls = demo.Learner.choose, []

    def interrupted(self, pool, target):
        calls.append(0)
        if len(calls) == 3 + 6:  # the three of the warm-up, then five steps
            raise KeyboardInterrupt
        return choose(self, pool, target)

    monkeypatch.setattr(demo.Learner, "choose", interrupted)
    code, page, record = run(tmp_path)
    printed = capsys.readouterr()
    assert code == 130
    assert f"the record {record} has the steps so far; its page: python -m ftw.report {record}" in printed.err
    assert "Traceback" not in printed.err
    assert not page.exists()
    assert [len(one.steps) for one in report.read(record).runs] == [5, 2]
    assert report.main([str(record)]) == 0
    assert "</html>" in record.with_suffix(".html").read_text(encoding="utf-8")

    def at_once(self, corpus, steps):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Framework, "pretrain", at_once)
    code, _, again = run(tmp_path)
    assert code == 130
    assert f"no step was taken yet, and the record {again} not begun" in capsys.readouterr().err
    assert [len(one.steps) for one in report.read(record).runs] == [5, 2]  # what was there is kept


def test_results_are_printed_before_a_page_that_fails(tmp_path, monkeypatch, capsys):
    def full(record, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write", full)
    code, _, record = run(tmp_path, "--seeds", "1")
    printed = capsys.readouterr()
    assert code == 1
    assert "Filter-then-Weight" in printed.out
    assert f"No space left on device; the record is whole, and makes one elsewhere: python -m ftw.report {record}" in (
        printed.err
    )


def test_the_model_is_causal_and_small():
    model = _demo_model.GPT(64)
    assert 30_000 < sum(p.numel() for p in model.parameters()) < 100_000
    tokens = torch.randint(0, 256, (2, 64))
    changed = tokens.clone()
    changed[:, 40:] = 0
    torch.testing.assert_close(model(tokens)[:, :40], model(changed)[:, :40])
    assert _demo_model.per_sample_loss(model, (tokens[:, :-1], tokens[:, 1:])).shape == (2,)
