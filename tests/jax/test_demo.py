"""The demo in JAX, from the command line to the page, in a configuration of seconds of training."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import numpy as np
from ftw_jax import _demo_model, demo
from numpy.testing import assert_allclose

from ftw import report
from ftw.demo import harness


def test_the_model_is_causal_and_small():
    params = _demo_model.initial(16, width=16)
    text = jnp.asarray(np.random.default_rng(0).integers(0, 256, 17), jnp.int32)

    def gradient(text):
        return jax.grad(_demo_model.loss)(params, text)["positions"]

    assert_allclose(_demo_model.loss(params, text), np.log(256), rtol=0.05)
    short = jax.grad(lambda p: _demo_model.loss(p, text[:9]))(params)["positions"]
    assert not np.any(np.asarray(short[8:]))  # nothing beyond a text's end
    assert np.all(np.any(np.asarray(gradient(text)) != 0, axis=1))
    assert 60_000 < sum(p.size for p in jax.tree.leaves(_demo_model.initial(64))) < 90_000


@pytest.mark.slow
def test_from_the_command_line_to_the_page(tmp_path, monkeypatch, capsys):
    pretrain = demo.Framework.pretrain
    monkeypatch.setattr(demo.Framework, "pretrain", lambda self, corpus, steps: pretrain(self, corpus, 30))
    monkeypatch.setattr(harness, "TESTS", 16)
    page, record = tmp_path / "page.html", tmp_path / "run.jsonl"
    options = ["--steps", "3", "--seeds", "2", "--keep", "2", "--pool-size", "20", "--output", page, "--record", record]
    assert demo.main(list(map(str, options))) == 0
    printed = capsys.readouterr().out
    for name in ("random", "top-k", "Filter-then-Weight", "against random", "effective", "seconds"):
        assert name in printed
    assert "</html>" in page.read_text(encoding="utf-8")
    for runs in zip(*report.read(record).methods.values(), strict=True):  # paired: same start, same pools
        assert len({run.steps[0]["test_loss"] for run in runs}) == 1
        assert [run.steps[1]["pool"] for run in runs] == [runs[0].steps[1]["pool"]] * 3


@pytest.mark.parametrize("options", [["--keep", "99"], ["--steps", "0"], ["--output", "no/such/folder/page.html"]])
def test_options_that_will_not_do(options, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(options)
    assert stop.value.code == 2
    assert options[0] in capsys.readouterr().err
