"""Trainers: several steps on one pool, sources with quotas, and reasons."""

import json

import ftw_torch
import pytest
import torch
from ftw_torch import FilterThenWeight
from ftw_torch.trainer.columns import mixture
from trainers import TARGET, TRAIN, Watched, assert_close, batch, gpt, grads, logged, losses, trainer

import ftw
from ftw import report

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
TOP = {"filter": "top_k", "weight": "uniform"}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("extra", [{"train_on_target": 0.3}, {"score": "forward", "micro_batch": 2, **TOP}])
def test_a_pool_is_scored_once_for_several_steps(tmp_path, extra):
    """Two pools a step, each for two steps, and at the end of an epoch one pool once; against a loop of one's own."""
    options = {"max_steps": 10, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "lr_scheduler_type": "linear"}
    made = trainer(tmp_path, gpt(), Watched, train=TRAIN[:40], options=options, steps_per_pool=2, guard=0.0, **extra)
    made.train()
    assert made.state.global_step == 10
    assert made.state.epoch == 2
    model = gpt().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    selector = FilterThenWeight(model, optimizer, losses, keep=3, guard=0.0, **extra)
    target, place, whole = batch(TARGET), 0, []
    for step in range(10):
        turn = None if step % 5 == 4 else step % 5 % 2
        pools = made.seen[place : place + (1 if turn is None else 2)]
        place += len(pools)
        if turn == 1:
            assert all(map(same, pools, whole))
        elif turn == 0:
            assert not whole or not same(pools[0], whole[0])
            whole, found = pools, [selector.batches(pool, target, steps=2) for pool in pools]
        optimizer.zero_grad()
        if turn is None:
            selector.backward(pools[0], target)
        else:
            for pool, selections in zip(pools, found, strict=True):
                (selector.weighted_loss(pool, selections[turn], target) / 2).backward()
        assert_close(made.found[place - 1], grads(model), 1e-4)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 1e-2 * (10 - step) / 10
        optimizer.step()
    assert place == len(made.seen)
    assert logged(made, "picked_share") == [3 / 8] * 10


@pytest.mark.parametrize("place", [3, 6])
def test_a_run_that_resumes_between_two_steps_on_a_pool(tmp_path, place):
    """In the first epoch and in the second; the third pool of an epoch comes once."""
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": place}
    common = {"train": TRAIN[:20], "options": options, "steps_per_pool": 2, "explain": True}
    whole = trainer(tmp_path / "a", gpt(dropout=0.1), **common)
    whole.train()
    again = trainer(tmp_path / "b", gpt(dropout=0.1, seed=9), **common)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{place}"))
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert logged(whole, "match") == logged(again, "match")


def test_what_cannot_go_together_is_refused(tmp_path, monkeypatch):
    for options, message in (
        ({"select_every": 2}, "select_every=1 and select_after=0 go with it"),
        ({"keep": 5}, "steps_per_pool=2 selections of keep=5 samples each are more than a pool of 8"),
        ({"keep": 0.6}, "keep=0.6"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, steps_per_pool=2, **options)
    with pytest.raises(ValueError, match="score_step=-1"):
        trainer(tmp_path, score="forward", score_step=-1)
    with pytest.raises(ValueError, match="score='fast' must be one of exact, forward"):
        trainer(tmp_path, score="fast")
    with pytest.raises(ValueError, match="quota: its sources are None"):
        trainer(tmp_path, quota=ftw.Quota(None, {"a": 1}))
    made = trainer(tmp_path, score="forward", **TOP)
    monkeypatch.setattr(type(made.accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match="mode='two_pass' is for one process"):
        trainer(tmp_path, mode="two_pass")
    with pytest.raises(ValueError, match="steps_per_pool=2 is for one process"):
        trainer(tmp_path, steps_per_pool=2)


def test_sources_are_a_column_of_texts(tmp_path):
    """A quota is obeyed, and the log and the record say what it did."""
    train = [{**x, "kind": "up" if i % 2 else "any"} for i, x in enumerate(TRAIN)]
    options = {"max_steps": 4, "gradient_accumulation_steps": 2}
    path, quota = tmp_path / "run.jsonl", ftw.Quota("kind", at_least={"any": 2}, at_most={"up": 0.5})
    common = {"train": train, "sources": "kind", "eval_dataset": train[:4], "keep": 4}
    made = trainer(tmp_path, options=options, quota=quota, explain=True, record=path, **common)
    made.train()
    assert made.evaluate()["eval_loss"] > 0
    (run,) = report.read(path).runs
    for line in run.steps.values():
        for pool in range(2):
            kinds = [x["source"] for x in line["picked"] if x.get("pool", 0) == pool]
            assert kinds.count("any") >= 2 >= kinds.count("up")
        assert line["pool"].keys() == {"any", "up"}
    assert min(logged(made, "picked/any")) >= 0.5
    assert [x + y for x, y in zip(logged(made, "picked/any"), logged(made, "picked/up"), strict=True)] == [1.0] * 4
    assert max(logged(made, "floors_bound")) == 1
    assert sum(logged(made, "relaxed")) == 0
    refused = [logged(made, f"refused_{name}") for name in ("score", "redundant", "harmful", "quota")]
    assert [sum(some) for some in zip(*refused, strict=True)] == [4.0] * 4  # the mean of two pools of 8
    columns = json.loads(path.read_text().splitlines()[2])
    name = columns["offered"]["id"][9]  # of the second pool
    assert "kind" not in name
    assert report.why(report.read(path), name)
    free = trainer(tmp_path / "free", options=options, record=tmp_path / "free.jsonl", **common)
    free.train()
    assert logged(free, "picked/any") != logged(made, "picked/any")
    with pytest.raises(ftw_torch.SelectionError, match="films"):
        trainer(tmp_path, train=train, sources="kind", quota=ftw.Quota(None, {"films": 1})).train()


@pytest.mark.parametrize(
    ("floors", "bound"),
    [
        ((1, 3), 2.0),
        ((2, None), 0.0),
        ((0.25, 0.75), 2.0),
        (torch.tensor([0.1, 0.5]), 1.0),
        (torch.tensor([1, 0]), 1.0),
        ({0: 0.25, 1: 4}, 1.0),
    ],
)
def test_a_floor_binds_if_no_pick_is_beyond_it(floors, bound):
    chosen = ftw.filter_then_weight(
        {"w": ftw.Dense(torch.tensor([[4.0], [3.0], [2.0], [1.0], [0.5]]))},
        {"w": torch.ones(1)},
        {"w": ftw.Scale(1.0)},
        keep=4,
        filter="top_k",
        weight="uniform",
    )
    assert chosen.indices.tolist() == [0, 1, 2, 3]
    said = mixture(chosen, [0, 1, 1, 1, 0], ftw.Quota(None, at_least=floors))
    assert said == {"picked/0": 0.25, "picked/1": 0.75, "floors_bound": bound}
