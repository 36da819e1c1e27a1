"""The guard's warnings: each once, and only with cause."""

from __future__ import annotations

import math

import pytest

from ftw.guard_watch import GuardWatch


def test_few_samples_are_said_once():
    watch = GuardWatch()
    first = watch.note(2.0, 39)
    assert len(first) == 1
    assert "39 samples" in first[0]
    assert watch.note(2.0, 39) == []
    assert GuardWatch().note(2.0, 40) == []


def test_a_low_signal_is_said_once_and_only_in_a_row():
    watch = GuardWatch(patience=3)
    assert [watch.note(f, 50) for f in (0.5, 0.5, 1.0, 0.5, 0.5)] == [[]] * 5
    (said,) = watch.note(0.25, 50)
    assert "3 steps" in said
    assert "0.25" in said
    assert [watch.note(0.1, 50) for _ in range(9)] == [[]] * 9


@pytest.mark.parametrize("nothing", [math.inf, math.nan])
def test_steps_without_a_signal_do_not_count(nothing):
    watch = GuardWatch(patience=2)
    assert [watch.note(f, 50) for f in (0.5, nothing, nothing)] == [[]] * 3
    assert len(watch.note(0.5, 50)) == 1


@pytest.mark.parametrize("options", [{"patience": 0}, {"few": -1}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="GuardWatch"):
        GuardWatch(**options)


def test_the_torch_selector_logs_it(caplog):
    torch = pytest.importorskip("torch")
    from ftw_torch import FilterThenWeight

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss(model, x):
        return model(x)[:, 0] ** 2

    selector = FilterThenWeight(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, keep=2)
    for _ in range(3):
        selector.select(torch.randn(8, 3), torch.randn(17, 3))
    said = [record.getMessage() for record in caplog.records if "17 samples" in record.getMessage()]
    assert len(said) == 1
