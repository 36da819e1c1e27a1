"""Two processes that hold a model in parts (fully_shard) choose and step as one does that holds the whole."""

import re

import pytest
import torch
from ftw_torch import FilterThenWeight
from ftw_torch.capture.fsdp import cut_as, refuse_offloaded
from ftw_torch.distributed import DistributedFilterThenWeight
from ranks import WORLD, case, part, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def layers(model, mesh):
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def last(model, mesh):
    fully_shard(model[-1], mesh=mesh)


def groups(model, mesh):
    fully_shard([model[0], model[2]], mesh=mesh)
    fully_shard(model, mesh=mesh)


CASES = {
    "layers": ("mlp", layers, torch.optim.AdamW, {"lr": 1e-2}),
    "columns": (
        "gpt",
        lambda model, mesh: fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1)),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    ),
    "one layer": ("mlp", last, torch.optim.Adagrad, {"lr": 1e-2}),
    "groups": ("mlp", groups, torch.optim.RMSprop, {}),
}


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def values(tensors):
    return {name: whole(x.detach()).tolist() for name, x in tensors.items() if x is not None}


def grads(model):
    for p in model.parameters():
        if p.grad is not None:
            assert type(p.grad) is type(p.data)
            assert p.grad.dtype == p.dtype
            assert getattr(p.grad, "placements", None) == getattr(p, "placements", None)
    return values({name: p.grad for name, p in model.named_parameters()})


def steps(kind, shard, optimizer, options, rank):
    """Return what three steps with selection, and one without in their middle, do to a model."""
    model, _, loss, pool, target = case(kind)
    if rank is not None:
        shard(model, init_device_mesh("cpu", (WORLD,)))
    optimizer = optimizer(model.parameters(), **options)
    make = FilterThenWeight if rank is None else DistributedFilterThenWeight
    selector = make(model, optimizer, loss, keep=4, micro_batch=4)
    out = []
    for cut in (7, 12, 5):
        goal = target if rank is None else (part(target, 0, 1), part(target, 1, 4))[rank]
        mine = pool if rank is None else (part(pool, 0, cut), part(pool, cut, 12) if cut < 12 else None)[rank]
        selection = selector.backward(mine, goal)
        found = {"scores": selection.scores.tolist(), "weights": selection.weights.tolist()}
        out.append({"indices": selection.indices.tolist(), "grads": grads(model), **found})
        if cut == 12 and shard is not last:  # nobody adds up the gradients of what is not sharded
            optimizer.zero_grad()
            half = pool if rank is None else part(pool, 6 * rank, 6 * rank + 6)
            loss(model, half).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        out[-1]["parameters"] = values(dict(model.named_parameters()))
    return out, dict(getattr(selector, "sent", {}))


def after_a_failure(rank):
    """Return the gradients of a plain step after a selection that failed in the middle of a forward."""
    model, _, loss, pool, target = case("mlp")
    if rank is not None:
        layers(model, init_device_mesh("cpu", (WORLD,)))
        mine = part(pool, 6 * rank, 6 * rank + 6)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with torch.no_grad():
            loss(model, mine)  # leaves the root's parameters whole

        def broken(model, batch):
            model[:3](batch[0])
            if rank == 1:
                raise KeyError("mine")
            return loss(model, batch)

        hooks = [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
        with pytest.raises((KeyError, RuntimeError), match="mine"):
            DistributedFilterThenWeight(model, optimizer, broken, keep=4).backward(mine, part(target, 0, 2))
        assert hooks == [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()]
        assert all(hasattr(p, "placements") and p.grad is None for p in model.parameters())
        pool = mine
    loss(model, pool).mean().backward()
    return grads(model)


def muon(rank):
    """Return an update of Muon, whose response is not entry by entry."""
    model, _, loss, pool, target = case("gpt")
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2)
    if rank is not None:
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p]["momentum_buffer"] = cut_as(torch.randn(*p.shape, dtype=p.dtype), p)
    make = FilterThenWeight if rank is None else DistributedFilterThenWeight
    mine, goal = (pool, target) if rank is None else (pool[6 * rank : 6 * rank + 6], target[2 * rank : 2 * rank + 2])
    make(model, optimizer, loss, keep=4).backward(mine, goal)
    return grads(model)


def mixed(rank):
    """Return the scores of parameters that are bfloat16 in the pass."""
    model, _, loss, (x, y), (goal, z) = case("mlp")
    if rank is None:
        model, pool, target = model.bfloat16(), (x.bfloat16(), y), (goal.bfloat16(), z)
        selector = FilterThenWeight(model, torch.optim.SGD(model.parameters()), loss, keep=4)
    else:
        model, pool, target = model.float(), (x.float(), y), (goal.float(), z)
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=BF16)
        selector = DistributedFilterThenWeight(model, torch.optim.SGD(model.parameters()), loss, keep=4)
        pool, target = part(pool, 6 * rank, 6 * rank + 6), part(target, 2 * rank, 2 * rank + 2)
    selection = selector.backward(pool, target)
    grads(model)
    return selection.scores.tolist()


def refused(rank):
    """Return what is said of models in parts that are not understood."""
    mesh = init_device_mesh("cpu", (WORLD,))
    out = []
    for shard, make in (
        (lambda m: parallelize_module(m, mesh, {"4": ColwiseParallel()}), DistributedFilterThenWeight),
        (lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")), DistributedFilterThenWeight),
        (lambda m: fully_shard(m, mesh=mesh), FilterThenWeight),
    ):
        model, _, loss, pool, target = case("mlp")
        model = shard(model)
        with pytest.raises(ValueError) as caught:
            make(model, torch.optim.AdamW(model.parameters()), loss, keep=4).backward(pool, target)
        assert all(p.grad is None for p in model.parameters())
        out.append(str(caught.value))
    return out


def everything(rank):
    found = {name: steps(*options, rank) for name, options in CASES.items()}
    found |= {"after a failure": after_a_failure(rank), "muon": muon(rank), "mixed": mixed(rank)}
    return found if rank is None else {**found, "refused": refused(rank)}


def close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(theirs[name]), rtol=1e-6, atol=1e-9, msg=name)


def test_parts_choose_and_step_as_the_whole():
    found = run(everything)
    for rank in range(WORLD):
        assert not isinstance(found[rank], str), found[rank]
    expected = everything(None)
    for name in CASES:
        assert found[0][name] == found[1][name]
        for ours, theirs in zip(found[0][name][0], expected[name][0], strict=True):
            assert ours["indices"] == theirs["indices"], name
            close({k: ours[k] for k in ("scores", "weights")}, {k: theirs[k] for k in ("scores", "weights")})
            close(ours["grads"], theirs["grads"])
            close(ours["parameters"], theirs["parameters"])
    for name in ("after a failure", "muon"):
        close(found[0][name], expected[name])

    ours, theirs = torch.tensor(found[0]["mixed"]), torch.tensor(expected["mixed"])
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4, (ours, theirs)

    # bytes: a rank's part of the parameters, and of them and two moments, rows cut in 4 + 3, 3 + 3 and 2 + 1
    sent = found[0]["layers"][1]
    assert sent["parameters"] == 8 * (4 * (5 + 1) + 3 * (7 + 1) + 2 * (6 + 1))
    assert sent["state"] == 3 * sent["parameters"]

    parallel, flat, alone = found[0]["refused"]
    assert re.match(r"parameter '4.weight' is sharded \(S(hard)?\(.*0\) of \(3, 6\)\)", parallel), parallel
    assert "fully_shard or DDP" in parallel
    assert "FSDP2" in flat
    assert "'0.weight'" in alone
    assert "DistributedFilterThenWeight" in alone


def test_what_is_offloaded_is_refused():
    with pytest.raises(ValueError, match=r"'w' lies on cpu and is used on meta"):
        refuse_offloaded({"w": torch.zeros(2)}, {"w": torch.device("meta")})
