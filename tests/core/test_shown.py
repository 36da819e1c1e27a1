"""How a selection shows itself, and a record as tables, scalars and pictures."""

import importlib.util
import json
import typing

import numpy as np
import pytest

import ftw
from ftw import report


@pytest.fixture
def selection():
    rng = np.random.default_rng(0)
    problem = {"w": ftw.Dense(rng.normal(size=(12, 5)))}, {"w": rng.normal(size=5)}, {"w": ftw.Scale(1.0)}
    return ftw.filter_then_weight(*problem, keep=3)


def test_the_line_is_short_and_names_the_status(selection):
    line = repr(selection)
    assert line.startswith("Selection(3 of 12, match=")
    assert line.endswith("status=OK)")
    assert f"{float(selection.match):.4g}" in line
    assert len(line) < 120
    assert "status=NOTHING_USEFUL" in repr(selection._replace(status=np.int32(1)))
    assert "status=99" in repr(selection._replace(status=np.int32(99)))


def test_the_table_has_a_row_a_pick(selection):
    table = selection._repr_html_()
    assert table.count("<tr>") == 1 + 3
    for i, w in zip(selection.indices, selection.weights, strict=True):
        assert f"<td>{i}</td><td>{w:.4g}</td><td>{selection.scores[i]:.4g}</td>" in table
    assert "<th>loss</th>" in selection._replace(losses=np.arange(12.0))._repr_html_()


def test_a_selection_under_a_trace_can_be_shown(selection):
    jax = pytest.importorskip("jax")
    shown = []

    def look(x):
        shown.append(repr(selection._replace(match=x, status=x, target_loss=x)))
        shown.append(selection._replace(indices=x, weights=x)._repr_html_())
        return x

    jax.jit(look)(1.0)
    assert shown[0].startswith("Selection(3 of 12, match=")
    assert "<code>" in shown[1]


def test_a_selection_is_a_tuple_of_arrays_with_types():
    assert ftw.Selection[np.ndarray].__origin__ is ftw.Selection
    hints = typing.get_type_hints(ftw.Selection)
    assert isinstance(hints["indices"], typing.TypeVar)


@pytest.fixture
def record(tmp_path):
    with report.Recorder(tmp_path / "run.jsonl", highlight="b") as recorder:
        for method in ("a", "b"):
            recorder.run(method, method=method, seed=1)
            for step in range(3):
                picked = [{"index": 4, "weight": 0.75, "source": "x"}, {"index": 5, "weight": 0.25, "source": "y"}]
                seconds = {"gradient": 0.5, "update": 0.25}
                recorder.step(method, step, test_loss=3.0 - step, match=0.5, picked=picked, seconds=seconds)
    return report.read(tmp_path / "run.jsonl")


def test_rows_and_picks(record):
    assert record.rows()[1] == {
        "run": "a", "method": "a", "seed": 1, "step": 1, "test_loss": 2.0, "match": 0.5, "seconds_gradient": 0.5,
        "seconds_update": 0.25,
    }  # fmt: skip
    assert len(record.rows()) == 6
    picks = record.picks()
    assert len(picks) == 12
    assert picks[0] == {"run": "a", "method": "a", "seed": 1, "step": 0, "index": 4, "weight": 0.75, "source": "x"}
    if importlib.util.find_spec("pandas"):
        import pandas as pd

        assert pd.DataFrame(record.rows()).groupby("method")["test_loss"].min().to_dict() == {"a": 1.0, "b": 1.0}


def test_scalars_go_to_tensorboard_and_to_weights_and_biases(selection):
    class TensorBoard:
        def __init__(self):
            self.found = {}

        def add_scalar(self, name, value, step):
            self.found[name] = value, step

    class Wandb:
        def log(self, values, step):
            self.found = values, step

    board, run = TensorBoard(), Wandb()
    report.log_scalars(board, selection, 7)
    report.log_scalars(run, selection, 8, prefix="")
    assert board.found["ftw/match"] == (pytest.approx(float(selection.match)), 7)
    assert board.found["ftw/status"] == (0, 7)
    assert run.found[1] == 8
    assert json.loads(json.dumps(run.found[0])) == report.scalars(selection, prefix="")
    with pytest.raises(TypeError, match="object has neither add_scalar nor log; use scalars"):
        report.log_scalars(object(), selection, 1)


def test_pictures(record):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from ftw import plot

    axes = plot.curves(record)
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [3.0, 2.0, 1.0])
    assert axes.get_ylabel() == "test loss"
    assert plot.match(record, ax=axes) is axes
    shares = plot.weights_by_source(record)
    assert shares.get_title() == "b"
    assert [c.get_label() for c in shares.collections] == ["x", "y"]
    top = shares.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(0.75)
    with pytest.raises(ValueError, match="no step of the record has a number 'grad_norm'"):
        plot.curves(record, "grad_norm")
    with pytest.raises(ValueError, match="no method 'c'; the record has"):
        plot.weights_by_source(record, "c")
    plt.close("all")


def test_pictures_without_matplotlib_name_the_extra(record, monkeypatch):
    from ftw import plot

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"ftw.plot needs matplotlib, not installed here: .*\[plot\]"):
        plot.curves(record)
