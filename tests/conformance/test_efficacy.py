"""The efficacy harness: gradients, figures, resuming, and what it prints."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

import ftw
from ftw.gradients import OuterProduct

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")
from ftw_conformance.efficacy import (
    ablations,
    baselines,
    budget,
    command,
    cost,
    learner,
    page,
    runs,
    scenarios,
    table,
    wear,
)
from ftw_conformance.efficacy import statistics as stats
from ftw_conformance.efficacy.step import Step
from ftw_conformance.efficacy.tasks_digits import Digits


def small(**options):
    return Digits(3, **({"steps": 6, "size": 12, "keep": 3, "targets": 5} | options))


def a_step(task, method_seed=0):
    model, optimizer = task.model()
    return Step(task, model, optimizer, task.batches(0), np.random.default_rng(method_seed))


def test_digits_gradients_are_those_of_the_loss():
    task = small()
    model, _ = task.model()
    model.params = {name: p.astype(float) for name, p in model.params.items()}
    x, y = task.batches(0).pool
    batch = x.astype(float), y
    records = model.capture(batch).records
    rng = np.random.default_rng(0)
    for name, record in records.items():
        assert isinstance(record, OuterProduct)
        direction = rng.normal(size=record.shape)
        slopes = record.dot(np, direction)  # (n,)
        p, h = model.params[name], 1e-6
        p += h * direction
        above = model.losses(batch)
        p -= 2 * h * direction
        below = model.losses(batch)
        p += h * direction
        assert_allclose(slopes, (above - below) / (2 * h), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_the_optimizers_do_what_their_geometry_says(name):
    task = small(optimizer=name)
    model, optimizer = task.model()
    for i in range(3):
        gradient = a_step(task).gradient(np.arange(3) + i, np.full(3, 1 / 3, dtype=np.float32))
        before = {k: p.copy() for k, p in model.params.items()}
        if i:
            linear = {k: op.apply(gradient[k]) for k, op in optimizer.geometry(gradient, 0.0).items()}
            moment = momentum(optimizer, gradient)
        optimizer.update(gradient)
        if i:
            for k, p in model.params.items():
                assert_allclose(before[k] - p, moment[k] + linear[k], rtol=2e-3, atol=1e-7)


def momentum(optimizer, gradient):
    """What the state alone would change."""
    if isinstance(optimizer, learner.Sgd):
        return {k: optimizer.lr * optimizer.momentum * b for k, b in optimizer.buffer.items()}
    linear = {
        k: ftw.optimizers.adam(optimizer.m[k], optimizer.v[k], optimizer.taken, lr=optimizer.lr, anticipate=gradient[k])
        for k in optimizer.m
    }
    return {k: update.offset for k, update in linear.items()}


def test_text_gradients_are_the_adapters():
    torch = pytest.importorskip("torch")
    from ftw_conformance.efficacy import tasks_text
    from ftw_torch import FilterThenWeight
    from ftw_torch.demo.model import GPT, per_sample_loss

    torch.manual_seed(0)
    start = GPT(tasks_text.LENGTH - 1, width=8)
    rng = np.random.default_rng(0)
    for rank in (0, 2):
        model = tasks_text.Network(start, rank, 0, None)
        if rank:
            for name, p in model.params.items():
                p[...] = rng.normal(size=p.shape) * 0.1 if "up" in name else p  # at the start LoRA's product is zero
        pool, target = (
            tuple(
                torch.randint(0, 256, (n, tasks_text.LENGTH - 1), generator=torch.Generator().manual_seed(n + i))
                for i in range(2)
            )
            for n in (7, 3)
        )
        optimizer = torch.optim.SGD(model.tensors.values(), lr=1.0)
        selector = FilterThenWeight(model.net, optimizer, per_sample_loss, keep=2, guard=0.0)
        expected = selector.select(pool, target)
        candidates, goal = (model.capture(tuple(x.numpy() for x in batch)) for batch in (pool, target))
        mean = ftw.combine(goal.records, np.full(3, 1 / 3, dtype=np.float32))
        got = ftw.scores(candidates.records, mean, {name: ftw.Scale(1.0) for name in mean})
        assert_allclose(candidates.losses, expected.losses.numpy(), rtol=1e-4)
        assert_allclose(got, expected.scores.numpy(), rtol=2e-3, atol=1e-5 * float(expected.scores.abs().max()))


@pytest.mark.parametrize("name", [*baselines.BASELINES, *ablations.ABLATIONS])
def test_every_method_keeps_distinct_candidates(name):
    step = a_step(small())
    choice = ablations.METHODS[name].choose(step)
    kept = 12 if name == baselines.WHOLE else 3
    assert len(set(np.asarray(choice.indices).tolist())) == kept
    assert_allclose(np.sum(choice.weights), 1, rtol=1e-5)
    assert np.min(choice.weights) >= 0


def test_baselines_against_written_out_gradients():
    step = a_step(small())
    G = np.concatenate(
        [r.block(np, slice(0, r.shape[0]), slice(0, r.shape[1])).reshape(12, -1) for r in step.candidates.values()],
        axis=1,
    )  # (N, p)
    t = np.concatenate([g.ravel() for g in step.target.values()])
    P = np.concatenate([np.broadcast_to(op.values, step.target[k].shape).ravel() for k, op in step.geometry.items()])

    def picks(name):
        return set(baselines.BASELINES[name].choose(step).indices.tolist())

    def best(values):
        return set(np.argsort(-values)[:3].tolist())

    assert picks("TracIn") == best(G @ t)
    assert picks(baselines.LESS) == best(G @ (P * t))
    assert picks("gradient norm") == best(np.sum(G * G, axis=1))
    assert picks("max loss") == best(step.losses)
    assert step.good[baselines.BASELINES[baselines.ORACLE].choose(step).indices].all()
    b, K = G @ t, G @ G.T
    top = np.argsort(-b)[:3]
    eta, chosen = b[top].sum() / K[np.ix_(top, top)].sum(), []
    for _ in range(3):
        gain = b - eta * (np.diag(K) / 2 + K[:, chosen].sum(axis=1))
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
    assert picks("GREATS") == set(chosen)


def test_flops_by_hand():
    task = small()
    work = sum(2 * layer.inputs * layer.outputs for layer in task.layers())  # one token a sample
    passes = {name: method.passes for name, method in baselines.BASELINES.items()}
    assert cost.flops(task, passes[baselines.RANDOM]) == 3 * 3 * work
    assert cost.flops(task, passes[baselines.WHOLE]) == 3 * 12 * work
    assert cost.flops(task, passes["max loss"]) == (12 + 2 * 3) * work
    assert cost.flops(task, passes["TracIn"]) == (3 * 12 + 3 * 5 + 3) * work


def test_paired_differences_are_students():
    from scipy import stats as scipy_stats

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=9), rng.normal(size=9) + 0.5
    got = stats.paired(dict(enumerate(a)), {**dict(enumerate(b)), 99: 1.0})
    expected = scipy_stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert got.count == 9
    assert_allclose([got.mean, got.p, got.low, got.high], [np.mean(a - b), expected.pvalue, *interval])
    assert np.isnan(stats.paired({0: 1.0}, {0: 2.0}).p)
    assert stats.paired({0: 1.0}, {1: 2.0}).count == 0


def test_area_and_speed_up():
    assert runs.area([(0, 4.0), (10, 2.0), (30, 1.0)]) == pytest.approx((30 + 30) / 30)
    curve = [(0, 4.0, 0.0), (10, 2.0, 0.0), (30, 1.0, 0.0)]
    assert stats._speedup(curve, 3.0) == pytest.approx(6.0)
    assert stats._speedup(curve, 1.0) == pytest.approx(1.0)
    assert stats._speedup(curve, 0.5) is None


def test_runs_are_paired_resumed_and_the_same_again(tmp_path, monkeypatch):
    scenario = scenarios.Scenario("digits", {"targets": 5, "size": 12, "keep": 3}, "small")
    jobs = [runs.Job("s", scenario, m, seed, 4) for seed in range(2) for m in (baselines.RANDOM, baselines.METHOD)]
    path = tmp_path / "runs.jsonl"
    first = runs.run_all(jobs[:3], path, 1)
    path.write_text(path.read_text() + '{"key": "unfin')
    path.write_text(path.read_text() + "\n")
    done = []
    monkeypatch.setattr(runs, "run", lambda job, real=runs.run: done.append(job) or real(job))
    every = runs.run_all(jobs, path, 1)
    assert done == jobs[3:]
    assert all(every[key] == json.loads(json.dumps(record)) for key, record in first.items())
    a, b = every[runs.key(jobs[0])], every[runs.key(jobs[1])]
    assert a["curve"][0] == b["curve"][0]  # the same start
    assert b["final"] == runs.run(jobs[1])["final"]
    assert a["equal_compute"] != a["final"]
    assert b["equal_compute"] == b["final"]


def test_the_command(tmp_path, capsys):
    out = {name: tmp_path / name for name in ("runs", "json", "page", "markdown")}
    given = ["--task", "digits-10", "--methods", "random", baselines.LESS, baselines.METHOD, "--seeds", "2", "--steps"]
    given += ["4", "--jobs", "1", *(word for name, path in out.items() for word in (f"--{name}", str(path)))]
    assert command.main(given) == 0
    shown = capsys.readouterr().out
    assert "Final test loss" in shown
    figures = json.loads(out["json"].read_text())
    cells = {c["method"]: c for c in figures["cells"]}
    lines = [json.loads(line) for line in out["runs"].read_text().splitlines()]
    finals = {m: {r["seed"]: r["final"] for r in lines if r["method"] == m} for m in cells}
    gaps = [finals[baselines.METHOD][s] - finals[baselines.LESS][s] for s in range(2)]
    assert_allclose(cells[baselines.METHOD]["against"][baselines.LESS]["mean"], np.mean(gaps))
    assert f"{np.mean(list(finals['random'].values())):.3f}" in out["markdown"].read_text()
    config = lines[0]["config"]
    assert config["command"].startswith("python -m ftw_conformance efficacy --task digits-10")
    assert config["options"]["seeds"] == 2
    assert "numpy" in config["packages"]
    html = out["page"].read_text()
    assert "<svg" in html
    assert "http" not in html


def test_the_first_call_is_no_part_of_a_time(monkeypatch):
    job, calls = runs.Job("digits-10", scenarios.SCENARIOS["digits-10"], baselines.METHOD, 0, 3), []
    choose = budget.METHODS[baselines.METHOD].choose
    counted = budget.METHODS[baselines.METHOD]._replace(choose=lambda step: calls.append(0) or choose(step))
    monkeypatch.setitem(budget.METHODS, baselines.METHOD, counted)
    monkeypatch.setattr(budget, "_warm", set())
    first, second = runs.run(job), runs.run(job)
    assert len(calls) == 1 + 3 + 3
    assert first["curve"] == second["curve"]


def test_an_interrupt_keeps_the_finished_runs(tmp_path, monkeypatch, capsys):
    done, real = [], runs.run

    def interrupted(job):
        done.append(job)
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(runs, "run", interrupted)
    path = tmp_path / "runs.jsonl"
    given = ["--task", "digits-10", "--methods", "random", "--seeds", "3", "--steps", "2", "--jobs", "1"]
    assert command.main([*given, "--runs", str(path)]) == 130
    printed = capsys.readouterr()
    assert f"Interrupted: {path} has the runs that are finished; the same command goes on from there" in printed.err
    assert "Traceback" not in printed.err
    assert len(runs.read(path)) == 1


@pytest.mark.parametrize("option", ["--json", "--page", "--markdown", "--runs"])
def test_a_folder_as_output_is_found_before_any_run(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as stop:
        command.main(["--task", "digits-10", "--runs", str(tmp_path / "runs.jsonl"), option, str(tmp_path)])
    assert stop.value.code == 2
    assert f"{option} {tmp_path}: is a folder" in capsys.readouterr().err
    assert not (tmp_path / "runs.jsonl").exists()


def test_the_page_escapes():
    pair = stats.paired({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.0})
    bad = "<script>x</script>"
    cell = stats.Cell(bad, baselines.METHOD, 2, 1.0, 1.0, 1.0, {baselines.LESS: pair}, None, None, None, None, None,
                      None, None, None, None, None, None, 1.0, [(0, 2.0, 0.1), (5, 1.0, 0.1)])  # fmt: skip
    html = page.render([cell], {bad: bad}, [baselines.METHOD], [cell], bad)
    assert "<script" not in html
    assert "|" not in table.markdown([["a"], ["b|c"]]).splitlines()[-1].replace("\\|", "")[1:-1]


@pytest.mark.parametrize(
    "given", [["--pool", "x"], ["--seeds", "0"], ["--methods", "nonsense"], ["--task", "nonsense"]]
)
def test_wrong_options_stop_at_once(given, capsys):
    with pytest.raises(SystemExit):
        command.main(given)


def test_what_the_statistics_need_is_asked_for_before_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main(["--quick", "--runs", str(tmp_path / "runs.jsonl")]) == 1
    assert "need scipy: pip install" in capsys.readouterr().err


def test_missing_files_are_named(tmp_path, capsys):
    given = ["--pool", str(tmp_path / "none"), "--target", str(tmp_path / "none"), "--jobs", "1", "--quick"]
    assert command.main([*given, "--runs", str(tmp_path / "runs")]) == 1
    assert "none" in capsys.readouterr().err


def test_the_ablation_by_use_enlarges_the_ridge_where_candidates_share_little():
    rng = np.random.default_rng(4)
    G = rng.normal(size=(8, 60)) + 0.6 * rng.normal(size=60)
    U, explained = G / np.linalg.norm(G, axis=1, keepdims=True), []
    for i in range(8):  # a ridge regression of each unit gradient on the others
        others = np.delete(U, i, axis=0)  # (7, 60)
        rows = np.concatenate([others.T, np.sqrt(0.05) * np.eye(7)])
        a = np.linalg.lstsq(rows, np.concatenate([U[i], np.zeros(7)]), rcond=None)[0]
        explained.append((1 - np.sum((U[i] - others.T @ a) ** 2) - 0.05 * a @ a) / 1.05)
    assert_allclose(wear.shared(G @ G.T), np.median(explained), rtol=1e-10)
    apart, alike = rng.normal(size=(6, 5000)), rng.normal(size=(6, 50)) + 5 * rng.normal(size=50)
    assert_allclose(wear.ridge(0.05, 7.0, apart @ apart.T), 0.05 * 8)
    assert_allclose(wear.ridge(0.05, 7.0, alike @ alike.T), 0.05)
    uses = wear.Uses()
    assert [uses.note(keys) for keys in ([], ["a", "b"], ["a", "c"], ["a", "a"])] == [0, 0, 0.5, 2]
