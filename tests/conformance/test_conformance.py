"""The conformance suite itself: it passes, it can be extended, it notices planted errors, and its gaps expire."""

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ftw_conformance import Gap
from ftw_conformance.golden import command as golden
from ftw_conformance.mutate import command as mutate
from ftw_conformance.mutate.mutations import MUTATIONS
from ftw_conformance.verify import adapters, backends, runner
from ftw_conformance.verify.cases import every_case
from ftw_conformance.verify.command import main, verify
from ftw_conformance.verify.table import Case, Expect, exactly
from ftw_conformance.verify.tolerances import EPS, RULES, tolerance


def failed(results):
    return [(r.case, r.dtype, r.error, r.tolerance, r.detail) for r in results if r.verdict == runner.FAIL]


def test_numpy_passes_the_whole_table():
    results = verify(backends.load("numpy"), ("float64",))
    assert not failed(results)
    assert len(results) > 1000
    assert not any(r.verdict == runner.SKIP for r in results)


@pytest.mark.parametrize("name", ["strict", "torch"])
@pytest.mark.parametrize(
    "only", ["products/model/[05]", "qp/capped/[aw]*", "selection/[df]*", "filters/*/random/*", "sketch/*"]
)
def test_a_part_of_the_table_elsewhere(name, only):
    results = verify(backends.load(name), ("float64",), only=only)
    assert len(results) > 1
    assert not failed(results)


@pytest.mark.parametrize("only", ["products/model/0", "refuses/*", "guard/fresh/*", "optimizers/adam/arrays*"])
def test_a_part_of_the_table_under_jit(only):
    assert not failed(verify(backends.load("jit"), ("float64",), only=only))


def test_the_torch_adapter_takes_the_same_step():
    assert not failed(adapters.verify("ftw_torch", only="adapter/*"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.optimistic_adam. is deprecated:DeprecationWarning")  # a row while optax has it
def test_the_jax_adapter_takes_the_same_step():
    assert not failed(adapters.verify("ftw_jax", full=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jax", "jit"])
def test_every_backend_passes(name):
    assert not failed(verify(backends.load(name)))


# ---------------------------------------------------------------------------------------------------------------------
# Extending it: the examples of docs/conformance.md

DOCS = Path(__file__).parents[2] / "docs"


def examples(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


NAMESPACE, ADAPTER = examples("conformance.md")


def command(*words, cwd=None, **environment):
    line = [sys.executable, "-m", "ftw_conformance", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, check=False)


@pytest.mark.parametrize(("text", "only"), [(NAMESPACE, "filters/top_k/*"), (ADAPTER, "adapter/default")])
def test_a_third_party_joins_in_ten_lines(tmp_path, text, only):
    (tmp_path / "my_plugin.py").write_text(text)
    done = command("verify", "--plugin", "my_plugin", "--backend", "mine", "--only", only, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["results"]
    assert rows
    assert {r["backend"] for r in rows} == {"mine"}


def test_registration_wants_its_arguments():
    with pytest.raises(ValueError, match="from_numpy"):
        backends.register_backend("nothing")


def test_what_is_not_installed_is_named_and_does_not_fail(capsys, monkeypatch):
    def factory(device):
        raise ImportError("no such thing", name="somewhere")

    monkeypatch.setitem(backends._factories, "elsewhere", factory)
    words = ["--backend", "elsewhere", "--backend", "numpy", "--only", "resample/*", "--jobs", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "elsewhere absent: not installed (somewhere)" in " ".join(out.split())
    assert main(["--backend", "numpy", "--device", "cuda", "--jobs", "1"]) == 2
    assert "numpy has no device 'cuda'" in capsys.readouterr().out
    assert main(["--backend", "unheard", "--jobs", "1"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The machinery


def sample(call, value=1.0):
    return Case("sample", call, (np.asarray([1.0, 2.0]),), lambda got, x: {"y": Expect(np.asarray(value))})


def outcome(call, value=1.0, dtype="float64", gaps=()):
    return runner.run(sample(call, value), backends.load("numpy"), dtype, list(gaps))


def test_a_case_fails_for_the_right_reasons():
    def overwrite(x):
        x[...] = 0
        return {"y": x[0]}

    assert outcome(lambda x: {"y": x[0]}).verdict == runner.PASS
    assert outcome(lambda x: {"y": x[1]}).verdict == runner.FAIL
    assert outcome(lambda x: {"y": x}).verdict == runner.FAIL  # a shape
    assert "float64, not float32" in outcome(lambda x: {"y": x[0].astype(float)}, dtype="float32").detail
    assert outcome(lambda x: {"y": x[0] * np.nan}).verdict == runner.FAIL
    assert outcome(lambda x: {"y": x[0], "z": x[1]}).detail == "no account of ['z']"
    assert "ZeroDivisionError" in outcome(lambda x: {"y": 1 / 0}).detail
    assert "read-only" in outcome(overwrite).detail


def test_gaps_are_data_and_expire():
    bad = lambda x: {"y": x[1]}  # noqa: E731
    ahead = datetime.date.today() + datetime.timedelta(days=1)
    behind = datetime.date.today() - datetime.timedelta(days=1)
    assert outcome(bad, gaps=[Gap("sam*", "numpy", "float64", "why", ahead)]).verdict == runner.GAP
    assert outcome(bad, gaps=[Gap("sample", "*", "*", "why", behind)]).verdict == runner.FAIL
    assert outcome(bad, gaps=[Gap("other", "*", "*", "why", ahead)]).verdict == runner.FAIL
    good = outcome(lambda x: {"y": x[0]}, gaps=[Gap("sample", "*", "*", "why", ahead)])
    assert good.verdict == runner.PASS
    assert "off the list" in good.detail
    closed = outcome(lambda x: {"y": x[0]}, gaps=[Gap("sample", "*", "*", "why", behind)])
    assert closed.verdict == runner.FAIL


def test_tolerances_come_from_one_place():
    assert all(rule.why for rule in RULES.values())
    assert tolerance("exact", "float32") == 0
    assert tolerance("rounded", "bfloat16") == tolerance("rounded", "float32") == 32 * EPS["float32"]
    assert tolerance("solved", "float64", 100.0) == pytest.approx(100 * tolerance("solved", "float64"))


def test_names_are_unique_and_every_public_function_has_cases():
    names = [case.name for case in every_case()]
    assert len(set(names)) == len(names)
    heads = {name.split("/")[0] for name in names}
    assert heads >= {"products", "combine", "take", "operators", "qp", "project", "filters", "resample", "guard"}
    assert heads >= {"optimizers", "selection", "sketch", "refuses", "plan"}
    assert exactly([1, 2]).value.tolist() == [1, 2]


def test_the_example_of_the_golden_vectors_runs():
    for text in examples("golden-vectors.md"):
        exec(text, {})


def test_golden_vectors(tmp_path):
    assert golden.PATH.stat().st_size < 300_000
    assert golden.main(["check"]) == 0
    path = tmp_path / "vectors.npz"
    assert golden.main(["write", "--path", str(path)]) == 0
    stored = golden.load(path)
    stored["scores/diagonal"] = stored["scores/diagonal"] + 1e-6
    np.savez(path, **stored)
    assert golden.main(["check", "--path", str(path)]) == 1
    np.savez(path, bad=np.asarray([object()]))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        golden.load(path)


# ---------------------------------------------------------------------------------------------------------------------
# Planted errors


def test_there_are_many_errors_and_none_is_stale(tmp_path):
    assert len(MUTATIONS) >= 40
    stale = [m.what for i, m in enumerate(MUTATIONS) if not mutate.plant(m, tmp_path / str(i))]
    assert not stale


@pytest.mark.parametrize(
    "what", ["a sign in combine", pytest.param("the quantile from the other end", marks=pytest.mark.slow)]
)
def test_an_error_is_caught(what):
    (mutation,) = (m for m in MUTATIONS if m.what == what)
    assert mutate.try_one(mutation).verdict == "caught"


@pytest.mark.slow
def test_every_error_is_caught():
    assert mutate.main([]) == 0


def test_the_command_without_words_lists_the_commands():
    done = command("--help")
    assert done.returncode == 0
    assert "verify" in done.stdout
    assert command("nothing").returncode == 2
