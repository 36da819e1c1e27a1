"""Two processes choose what one would choose from both pools."""

import datetime
import functools
import os
import re
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_models as models
from ftw_torch import FilterThenWeight
from ftw_torch.distributed import DistributedFilterThenWeight
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

WORLD = 2


def work(rank, port, job, results):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60))
    try:
        results[rank] = job(rank)
    except Exception as error:
        results[rank] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    finally:
        dist.destroy_process_group()


def run(job):
    """Return what ``job(rank)`` gives on each of two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        context = mp.spawn(work, (port, job, results), nprocs=WORLD, join=False)
        assert context is not None
        for _ in range(12):
            if context.join(timeout=10):
                break
        else:
            for process in context.processes:
                process.kill()
            raise AssertionError("a process hangs")
        return [results[rank] for rank in range(WORLD)]


def case(kind):
    torch.manual_seed(0)
    if kind == "gpt":
        model, loss = models.GPT().double(), models.lm_loss
        pool, target = torch.randint(0, 11, (12, 6)), torch.randint(0, 11, (4, 6))
    else:
        model, loss = models.mlp().double(), models.classifier_loss
        pool = torch.randn(12, 5, dtype=torch.float64), torch.randint(0, 3, (12,))
        target = torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss(model, pool).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, loss, pool, target


def part(batch, start, stop):
    if isinstance(batch, tuple):
        return tuple(x[start:stop] for x in batch)
    return batch[start:stop]


def told(selection, model, selector=None):
    grads = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    out = {"grads": grads, **{name: getattr(selection, name).tolist() for name in ("indices", "weights", "scores")}}
    out |= {name: float(getattr(selection, name)) for name in ("match", "shrinkage", "target_loss", "effective_size")}
    if selector is not None:
        out["sent"], out["mine"] = dict(selector.sent), [x.tolist() for x in selector.mine(selection)]
    return out


CASES = [
    ("gpt", 6, {}),
    ("gpt", 9, {"max_bytes": 1, "micro_batch": 2}),
    ("mlp", 4, {"filter": "top_k", "weight": "uniform"}),
    ("mlp", 12, {"guard": 0.0}),
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
    return out


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


def test_a_rank_that_fails_makes_all_raise():
    found = run(functools.partial(fail, where="loss"))
    assert found[1] == ("ValueError", "my own fault", True)
    assert found[0][0] == "RuntimeError"
    assert "rank 1: ValueError: my own fault" in found[0][1]
    assert found[0][2]


def test_a_sample_that_is_not_finite_is_named_with_its_rank():
    found = run(functools.partial(fail, where="nan"))
    for kind, message, clean in found:
        assert kind == "FloatingPointError"
        assert "sample 1 of rank 1's pool" in message
        assert clean


def shard(rank):
    """A model whose second half is sharded."""
    model, _, loss, pool, target = case("mlp")
    fully_shard(model[-1], mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError) as caught:
        DistributedFilterThenWeight(model, optimizer, loss, keep=4).backward(pool, target)
    assert all(p.grad is None for p in model.parameters())
    return str(caught.value)


def test_sharded_parameters_are_refused_by_name():
    for message in run(shard):
        assert re.match(r"parameter '\w+\.weight' is sharded \(S(hard)?\(.*0\) of \(3, 6\)\)", message), message
        assert "DistributedDataParallel" in message


def test_without_processes():
    model, optimizer, loss, _, _ = case("mlp")
    with pytest.raises(RuntimeError, match="init_process_group"):
        DistributedFilterThenWeight(model, optimizer, loss, keep=4)
