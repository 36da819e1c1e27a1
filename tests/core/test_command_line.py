"""What the commands share: paths, suggestions, tables, and what is said where a package is missing."""

import argparse
import errno
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from ftw import command_line

ROOT = Path(__file__).parents[2]


def test_a_path_that_cannot_be_written_is_found_before_the_run(tmp_path, monkeypatch):
    command_line.check_output(tmp_path / "page.html", "--output")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"--output .*: is a folder; give the name of a file in it"):
        command_line.check_output(tmp_path, "--output")
    with pytest.raises(OSError, match=r"--output .*: there is no folder .*nowhere"):
        command_line.check_output(tmp_path / "nowhere" / "page.html", "--output")
    kept = tmp_path / "kept.html"
    kept.write_text("kept")
    command_line.check_output(kept, "--output")
    assert kept.read_text() == "kept"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match=r"--output .*: cannot be written: it, or its folder, is read-only"):
        command_line.check_output(kept, "--output")


def test_a_full_disk_is_found_before_the_run(tmp_path, monkeypatch):
    def full(**options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    with pytest.raises(OSError, match=r"--json .*: cannot be written \(No space left on device\)"):
        command_line.check_output(tmp_path / "a.json", "--json")


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--sedes=3", "--sedes=3: did you mean --seeds?"),
        ("--ouput", "--ouput: did you mean --output?"),
        ("--zzz", None),
    ],
)
def test_a_mistyped_option_is_named_with_the_nearest(capsys, given, hint):
    parser = command_line.Parser(prog="x")
    parser.add_argument("--seeds")
    parser.add_argument("--output")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([given])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"unrecognized arguments: {given}" in err
    assert (hint in err) if hint else ("did you mean" not in err)


def test_a_wide_table_goes_on_below(capsys, monkeypatch):
    rows = [["method", *(f"column {i}" for i in range(9))], ["random", *("1.234" for _ in range(9))]]
    monkeypatch.setenv("COLUMNS", "80")
    command_line.print_table(rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    blocks = [block.splitlines() for block in out.strip().split("\n\n")]
    assert len(blocks) == 2
    for head, row in blocks:
        assert head.startswith("method")
        assert row.startswith("random")
    assert sum(out.count(f"column {i}") for i in range(9)) == 9
    monkeypatch.setenv("COLUMNS", "300")
    command_line.print_table(rows)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_column_wider_than_the_terminal_still_comes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    command_line.print_table([["a", "b" * 30, "c"], ["1", "2", "3"]])
    assert "b" * 30 in capsys.readouterr().out


def test_warnings_go_through_the_bar():
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with command_line.warnings_through(lines.append):
            warnings.warn("a target of two samples", UserWarning, stacklevel=1)
    assert lines == ["UserWarning: a target of two samples"]


def test_a_run_can_be_repeated_from_its_config():
    options = argparse.Namespace(seeds=2, output=Path("a b.html"), pool=None)
    config = json.loads(json.dumps(command_line.replay("python -m x", ["--output", "a b.html"], options)))
    assert config["command"] == "python -m x --output 'a b.html'"
    assert config["options"] == {"seeds": 2, "output": "a b.html", "pool": None}
    assert "numpy" in config["packages"]
    assert config["python"].count(".") == 2


BLOCKED = """
import importlib.util, runpy, sys
blocked, module, *argv = sys.argv[1:]
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked.split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in blocked.split(",") else real(name, package)
sys.argv = [module, *argv]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("blocked", "module", "arguments", "message"),
    [
        ("torch", "ftw_torch.demo", ["--help"], "ftw_torch needs torch, not installed here: pip install"),
        ("jax,optax", "ftw_jax.demo", ["--help"], "'filter-then-weight[jax]'"),
        ("daqp", "ftw_conformance", ["bench", "qp"], "'filter-then-weight[bench]'"),
        ("torch", "ftw_conformance", ["bench", "torch", "--help"], "'filter-then-weight[torch]'"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(blocked, module, arguments, message):
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"needs {module}")
    command = [sys.executable, "-c", BLOCKED, blocked, module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert message in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("blocked", ["torch", "jax"])
def test_an_adapter_without_its_framework_names_the_extra(blocked):
    code = (
        BLOCKED.split("sys.argv = ")[0] + "try:\n    __import__(module)\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, blocked, f"ftw_{blocked}"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    extra = f"pip install 'filter-then-weight[{blocked}]'"
    assert done.stdout.strip() == f"ftw_{blocked} needs {blocked}, not installed here: {extra}"


@pytest.mark.skipif(importlib.util.find_spec("ftw_conformance") is None, reason="needs ftw_conformance")
@pytest.mark.parametrize(
    ("words", "near"), [(["eficacy"], "efficacy"), (["bench", "troch"], "bench torch"), (["verfy", "--list"], "verify")]
)
def test_a_mistyped_command_is_named_with_the_nearest(capsys, words, near):
    from ftw_conformance import __main__ as commands

    assert commands.main(words) == 2
    assert f"did you mean {near}?" in capsys.readouterr().err
