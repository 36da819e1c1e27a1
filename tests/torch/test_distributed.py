"""Two processes choose what one would choose from both pools."""

import pytest
import torch
from ftw_torch import FilterThenWeight
from ftw_torch.distributed import DistributedFilterThenWeight
from ranks import WORLD, case, part, run, told

import ftw

CASES = [
    ("gpt", 6, {}),
    ("gpt", 9, {"max_bytes": 1, "micro_batch": 2}),
    ("mlp", 4, {"filter": "top_k", "weight": "uniform"}),
    ("mlp", 12, {"guard": 0.0}),
    ("gpt", 7, {"gram_sketch": 256}),
    ("mlp", 5, {"train_on_target": 0.3}),
]


def all_cases(rank):
    out = []
    for kind, cut, options in CASES:
        model, optimizer, loss, pool, target = case(kind)
        selector = DistributedFilterThenWeight(model, optimizer, loss, keep=4, **options)
        mine = part(pool, 0, cut) if rank == 0 else part(pool, cut, 12)
        goal = part(target, 0, 1) if rank == 0 else part(target, 1, 4)
        empty = rank == 1 and cut == 12
        out.append(told(selector.backward(None if empty else mine, goal), model, selector))
    return [*out, where_autocast_is_on(rank)]


def where_autocast_is_on(rank):
    model, optimizer, loss, pool, target = case("mlp")
    seen = {}

    def spied(model, batch):
        seen["loss"] = torch.is_autocast_enabled("cpu")
        return loss(model, batch)

    def spy(scores, gram, k):
        seen["choice"] = torch.is_autocast_enabled("cpu")
        return ftw.filters.top_k(scores, k)

    selector = DistributedFilterThenWeight(model, optimizer, spied, keep=4, filter=spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        selector.select(part(pool, 6 * rank, 6 * rank + 6), part(target, 2 * rank, 2 * rank + 2))
    return seen


def test_two_processes_choose_as_one_does():
    found = run(all_cases)
    assert not isinstance(found[0], str), found[0]
    assert not isinstance(found[1], str), found[1]
    for i, (kind, cut, options) in enumerate(CASES):
        model, optimizer, loss, pool, target = case(kind)
        options = {k: v for k, v in options.items() if k != "max_bytes"}
        expected = told(FilterThenWeight(model, optimizer, loss, keep=4, **options).backward(pool, target), model)
        for rank in range(WORLD):
            got = found[rank][i]
            assert got["indices"] == expected["indices"], (kind, cut)
            for name in ("weights", "scores", "match", "shrinkage", "target_loss", "effective_size"):
                torch.testing.assert_close(
                    torch.tensor(got[name]), torch.tensor(expected[name]), rtol=1e-6, atol=1e-9, msg=name
                )
            for ours, theirs in zip(got["grads"], expected["grads"], strict=True):
                torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6, atol=1e-9)
        assert found[0][i]["grads"] == found[1][i]["grads"]
        own = [j + (cut if rank else 0) for rank in range(WORLD) for j in found[rank][i]["mine"][0]]
        assert sorted(own) == sorted(expected["indices"])
    p = sum(x.numel() for x in case("mlp")[0].parameters())
    sent = found[0][2]["sent"]  # top_k with equal weights: no Gram matrix, but the update's length
    assert sent["target"] == 8 * (p + 2)
    assert sent["scores"] == 8 * 2 * 8  # the larger pool has 8
    assert sent["update"] == sent["length"] == 8 * p
    assert "records" not in sent
    sent = found[0][3]["sent"]  # mlp, one token: factors; rank 0 has the whole shortlist of 6
    factors = (5 + 7 + 7) + (7 + 6 + 6) + (6 + 3 + 3)  # d_in + d_out, and the bias
    assert sent["records"] == 8 * 6 * factors
    assert sent["gram"] == 8 * 6 * 6
    assert "records" not in found[0][4]["sent"]
    assert found[0][-1] == found[1][-1] == {"loss": True, "choice": False}


SOURCES = torch.tensor([0, 0, 1, 0, 1, 1, 2, 0, 0, 1, 0, 2])


def with_a_quota(rank):
    out = []
    for options in ({"quota": ((1, 0, 2), None)}, {"constraint": ((0.0, 0.5, 0.2), None), "explain": True}):
        model, optimizer, loss, pool, target = case("mlp")
        here = slice(0, 6) if rank == 0 else slice(6, 12)
        own = bounded(options, SOURCES[here])
        selector = DistributedFilterThenWeight(model, optimizer, loss, keep=4, **own)
        selection = selector.backward(part(pool, here.start, here.stop), part(target, 2 * rank, 2 * rank + 2))
        out.append((selection.indices.tolist(), selection.weights.tolist()))
    try:
        selector = DistributedFilterThenWeight(
            model, optimizer, loss, keep=4, quota=ftw.Quota(SOURCES[here], (0, 0, 3))
        )
        selector.backward(part(pool, here.start, here.stop), part(target, 2 * rank, 2 * rank + 2))
    except Exception as error:
        out.append(str(error))
    return out


def bounded(options, sources):
    kinds = {"quota": ftw.Quota, "constraint": ftw.SourceShares}
    return {name: kinds[name](sources, *x) if name in kinds else x for name, x in options.items()}


def test_a_quota_counts_the_samples_of_all_ranks():
    found = run(with_a_quota)
    assert not isinstance(found[0], str), found[0]
    assert found[0] == found[1]
    for i, options in enumerate(({"quota": ((1, 0, 2), None)}, {"constraint": ((0.0, 0.5, 0.2), None)})):
        model, optimizer, loss, pool, target = case("mlp")
        selector = FilterThenWeight(model, optimizer, loss, keep=4, **bounded(options, SOURCES))
        expected = selector.backward(pool, target)
        assert found[0][i][0] == expected.indices.tolist()
        torch.testing.assert_close(torch.tensor(found[0][i][1]), expected.weights.float(), rtol=1e-6, atol=1e-9)
    assert "at_least=3 of source '2', of which the pool holds 2" in found[0][2]


def fail(rank, where):
    model, optimizer, loss, pool, target = case("mlp")

    def broken(model, batch):
        raise ValueError("my own fault")

    def poisoned(model, batch):
        return loss(model, batch) * torch.where(torch.arange(len(batch[0])) == 1, float("nan"), 1.0)

    bad = {"loss": broken, "nan": poisoned}[where] if rank == 1 else loss
    selector = DistributedFilterThenWeight(model, optimizer, bad, keep=4, guard=0.0)
    mine = part(pool, 0, 6) if rank == 0 else part(pool, 6, 12)
    goal = target if where == "loss" or rank == 0 else part(target, 0, 1)
    try:
        selector.backward(mine, goal)
    except Exception as error:
        clean = all(p.grad is None for p in model.parameters())
        return type(error).__name__, str(error), clean
    return None


def failures(rank):
    return [fail(rank, where) for where in ("loss", "nan")]


def test_a_rank_that_fails_makes_all_raise():
    one, two = run(failures)
    (kind, message, clean), poisoned = one
    assert two[0] == ("ValueError", "my own fault", True)
    assert kind == "SelectionError"
    assert "rank 1: ValueError: my own fault" in message
    assert clean
    for kind, message, clean in (poisoned, two[1]):  # named with its rank
        assert kind == "NonFiniteError"
        assert "sample 1 of rank 1's pool" in message
        assert clean


def test_without_processes():
    model, optimizer, loss, _, _ = case("mlp")
    with pytest.raises(RuntimeError, match="init_process_group"):
        DistributedFilterThenWeight(model, optimizer, loss, keep=4)
    with pytest.raises(TypeError, match="mode"):
        DistributedFilterThenWeight(model, optimizer, loss, keep=4, mode="two_pass")
