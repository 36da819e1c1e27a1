"""Runs at equal compute: the head's gradients, the rivals' updates, prices, budgets, rates, and the data's checks."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

pytest.importorskip("scipy")
pytest.importorskip("tqdm")
from ftw_conformance.efficacy import ablations, baselines, budget, command, cost, real_data, rivals, tasks_sentiment
from ftw_conformance.efficacy.rates import rate
from ftw_conformance.efficacy.scenarios import SCENARIOS
from ftw_conformance.efficacy.step import Step
from ftw_conformance.efficacy.tasks_sentiment import Sentiment
from ftw_conformance.efficacy.tuning import tune


@pytest.fixture(autouse=True)
def _invented(monkeypatch):
    """Features that anybody can make: 400 sentences a domain, of which some have no clear rating."""
    rng = np.random.default_rng(0)
    domains = np.repeat(np.arange(4), 400)
    ratings = rng.normal(size=1600).astype(np.float32) * 2
    x = rng.normal(size=(1600, 385)).astype(np.float32)
    x[:, 0] += ratings
    monkeypatch.setattr(tasks_sentiment, "data", lambda: (x, ratings, domains))


def a_step(**options):
    task = Sentiment(3, **options)
    model, optimizer = task.model()
    model.params["head"][:] = np.random.default_rng(1).normal(size=(2, 385)) * 0.05
    return Step(task, model, optimizer, task.batches(0), np.random.default_rng(0))


def test_the_heads_gradients_are_those_of_its_loss():
    step = a_step()
    x, y = step.batches.pool
    record = step.candidates["head"]
    direction = np.random.default_rng(2).normal(size=(2, 385))
    p = step.model.params["head"] = step.model.params["head"].astype(float)
    h = 1e-5
    p += h * direction
    above = step.model.losses((x, y))
    p -= 2 * h * direction
    below = step.model.losses((x, y))
    p += h * direction
    assert_allclose(record.dot(np, direction), (above - below) / (2 * h), rtol=1e-4, atol=1e-6)


def test_target_test_set_and_stream_share_no_sentence():
    task = Sentiment(5)
    own = {row.tobytes() for row in task.test[0]}
    target = {task.x[i].tobytes() for i in task.target}
    stream = {task.x[i].tobytes() for i in task.clear[task.own]}
    assert len(task.target) == 48
    assert not own & target
    assert not own & stream
    assert not target & stream


def test_every_target_sentence_is_seen_once_a_round():
    task = Sentiment(5)
    for first in (0, 3, 30):
        seen = np.concatenate([task.turn(first + i) for i in range(3)])
        assert_array_equal(np.sort(seen), np.arange(48))
    assert not np.array_equal(task.turn(0), task.turn(3))


def test_good_candidates_have_the_domain_and_their_own_label():
    task = Sentiment(1, domain="tweets")
    rows = {task.x[i].tobytes(): i for i in range(len(task.x))}
    _, ratings, domains = tasks_sentiment.data()
    for i in range(4):
        batches = task.batches(i)
        place = np.array([rows[x.tobytes()] for x in batches.pool[0]])
        good = (domains[place] == 1) & (np.abs(ratings[place]) >= 0.5) & ((ratings[place] > 0) == batches.pool[1])
        assert_array_equal(batches.good, good & (np.abs(ratings[place]) > 0.35))


@pytest.mark.parametrize("name", [rivals.RAND_T, rivals.HALF_T, rivals.WHOLE_T, rivals.ALONE])
def test_the_target_has_its_share_of_the_update(name):
    step = a_step()
    choice = ablations.METHODS[name].choose(step)
    got = step.update(choice)["head"]

    def written_out(x, y):
        p = np.exp(step.model.forward(x)).astype(float)
        p[np.arange(len(y)), y] -= 1
        return p.T @ x / len(y)

    x, y = step.batches.pool
    own = written_out(x[choice.indices], y[choice.indices])
    count = {rivals.RAND_T: 4, rivals.HALF_T: 8, rivals.WHOLE_T: 16, rivals.ALONE: 8}[name]
    share = {rivals.HALF_T: 1 / 2, rivals.ALONE: 1.0}.get(name, 1 / 3)
    assert len(choice.indices) == {rivals.WHOLE_T: 64, rivals.ALONE: 1}.get(name, 8)
    goal = written_out(*(a[:count] for a in step.batches.target))
    assert_allclose(got, (1 - share) * own + share * goal, rtol=1e-4, atol=1e-6)


def test_forward_scores_leave_the_parameters_and_rank_as_losses_say():
    step = a_step()
    before = step.model.params["head"].copy()
    choice = ablations.METHODS[rivals.FORWARD].choose(step)
    assert_array_equal(step.model.params["head"], before)
    moved = before - step.geometry["head"].apply(step.target["head"])
    x, y = step.batches.pool

    def losses(w):
        z = (x.astype(float)) @ w.T.astype(float)
        return np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]

    expected = np.argsort(losses(moved) - losses(before), kind="stable")[:8]
    assert set(choice.indices.tolist()) == set(expected.tolist())
    small = ablations.METHODS[rivals.SMALL].choose(step)
    assert set(small.indices.tolist()) == set(np.argsort(losses(before))[:8].tolist())


def test_prices_in_sample_passes_by_hand():
    task = Sentiment(0)
    price = {n: cost.flops(task, ablations.METHODS[n].passes) / cost.one_sample(task) for n in rivals.BUDGETED}
    expected = {
        baselines.RANDOM: 8,
        baselines.ORACLE: 8,
        baselines.WHOLE: 64,
        baselines.LESS: 64 + 16 + 8 / 3,
        rivals.RAND_T: 8 + 4,
        rivals.HALF_T: 8 + 8,
        rivals.ALONE: 8,
        rivals.WHOLE_T: 64 + 16,
        rivals.SMALL: 64 / 3 + 8 * 2 / 3,
        rivals.FORWARD: 64 * 2 / 3 + 16 + 8,
    }
    assert {name: price[name] for name in expected} == pytest.approx(expected)
    gram = (2 * 32 * 24 + 32 * 32) / (6 * 24)  # of 32 sentences of 24 tokens
    assert price[baselines.METHOD] == pytest.approx(64 + 16 + 8 / 3 + gram, rel=0.03)


def test_runs_spend_the_budget_and_take_the_tuned_rate(tmp_path, monkeypatch):
    scenario = SCENARIOS["sentiment-48"]._replace(budget=400.0)
    record = budget.run(budget.Job("sentiment-48", scenario, baselines.LESS, 0))
    assert record["steps"] == round(400 / (80 + 8 / 3))
    assert record["curve"][-1][0] == pytest.approx(400, rel=0.2)
    assert record["lr"] == rate("sentiment-48", baselines.LESS)
    assert 0 <= record["accuracy"] <= 1
    monkeypatch.setattr("ftw_conformance.efficacy.tuning.GRID", (1e-6, 1e-3))
    best = tune({"sentiment-48": scenario}, [baselines.ORACLE], tmp_path / "runs.jsonl", 1)
    assert best == {"sentiment-48": {baselines.ORACLE: 1e-3}}


def test_the_command_names_the_domain_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FTW_REAL_DATA", str(tmp_path))
    options = command.arguments(["--task", "sentiment"])
    _, _, scenarios = command.plan(options)
    assert scenarios == {}
    assert "make real-data" in capsys.readouterr().out
    monkeypatch.setattr(real_data, "available", lambda: True)
    jobs, _, scenarios = command.plan(
        command.arguments(["--task", "sentiment", "--domain", "tweets", "--first-seed", "7", "--seeds", "2"])
    )
    assert list(scenarios) == ["sentiment-48", "sentiment-1500", "sentiment-useful"]
    assert {job.seed for job in jobs} == {7, 8}
    assert all(s.options["domain"] == "tweets" for s in scenarios.values())
    with pytest.raises(ValueError, match="no domain 'songs'"):
        Sentiment(0, domain="songs")


def test_an_archive_is_checked_before_it_is_opened(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for stem in real_data.DOMAINS.values():
            text = "1\t2.5\tgood\r\n2\t-1\tcaf\u00e9\r\n".encode("latin-1" if stem == "tweets" else "utf-8")
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    path = tmp_path / real_data.VADER.name
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        member.size = len(inner.getvalue())
        tar.addfile(member, io.BytesIO(inner.getvalue()))
    with pytest.raises(ValueError, match="is not the expected"):
        real_data.fetch(real_data.VADER, tmp_path)
    archive = real_data.VADER._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    texts, ratings, domains = real_data.rated(real_data.fetch(archive, tmp_path))
    assert texts == ["good", "caf\u00e9"] * 4
    assert_array_equal(ratings, [2.5, -1] * 4)
    assert_array_equal(domains, np.repeat(np.arange(4), 2))
