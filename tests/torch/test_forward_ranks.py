"""Forward scores over processes: replicas, shards and tensor parallelism choose and step as one process does."""

import torch
from ftw_torch import FilterThenWeight
from ftw_torch.distributed import DistributedFilterThenWeight
from lion_pytorch import Lion
from ranks import WORLD, case, part, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

FORWARD = {"score": "forward", "filter": "top_k", "weight": "uniform"}
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.01}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "lion": (Lion, {"lr": 1e-2}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
    "radam": (torch.optim.RAdam, {"lr": 1e-2}),
    "adamax": (torch.optim.Adamax, {"lr": 1e-2}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2, "centered": True}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
}


def layers(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def last(model):
    fully_shard(model[-1], mesh=init_device_mesh("cpu", (WORLD,)))


def keep_whole(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def replicas(model):
    pass


# how the model lies on the ranks, the case, the dtype, samples of rank 0, options
CASES = {
    "replicas": (replicas, "mlp", torch.float64, 7, {}),
    "replicas, empty": (replicas, "gpt", torch.float64, 12, {"micro_batch": 3, "train_on_target": 0.25}),
    "layers": (layers, "mlp", torch.float64, 7, {"train_on_target": 0.25}),
    "layers, micro-batches": (layers, "mlp", torch.float64, 10, {"micro_batch": 3}),
    "layers, empty": (layers, "mlp", torch.float64, 12, {"micro_batch": 5}),
    "float32": (layers, "mlp", torch.float32, 5, {}),
    "one layer": (last, "mlp", torch.float64, 5, {}),
    "never freed": (keep_whole, "mlp", torch.float64, 8, {"micro_batch": 4}),
    "tied": (fully_shard, "gpt", torch.float64, 4, {}),
}


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def values(tensors):
    return {name: whole(x.detach()).tolist() for name, x in tensors.items() if x is not None}


def grads(model):
    for p in model.parameters():
        if p.grad is not None:
            assert p.grad.dtype == p.dtype
            assert getattr(p.grad, "placements", None) == getattr(p, "placements", None)
    return values({name: p.grad for name, p in model.named_parameters()})


def made(kind, dtype):
    model, _, loss, pool, target = case(kind)
    cast = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    pool, target = (tuple(map(cast, x)) if isinstance(x, tuple) else cast(x) for x in (pool, target))
    return model.to(dtype), loss, pool, target


def steps(shard, kind, dtype, cut, options, optimizer, rank):
    """Return the choice, the gradients and the parameters of two steps with a selection, a plain one between them."""
    model, loss, pool, target = made(kind, dtype)
    if rank is not None:
        shard(model)
    kind, more = OPTIMIZERS[optimizer]
    optimizer = kind(model.parameters(), **more)
    make = FilterThenWeight if rank is None else DistributedFilterThenWeight
    far = 1e-2 if dtype == torch.float64 else 10.0  # float32 losses leave few digits to a difference
    selector = make(model, optimizer, loss, keep=4, score_step=far, **FORWARD, **options)
    out = []
    for step in range(2):
        goal = target if rank is None else (part(target, 0, 1), part(target, 1, 4))[rank]
        mine = pool if rank is None else (part(pool, 0, cut), part(pool, cut, 12) if cut < 12 else None)[rank]
        before = [whole(p.detach()).clone() for p in model.parameters()]
        selection = selector.backward(mine, goal)
        assert all(torch.equal(a, whole(p.detach())) for a, p in zip(before, model.parameters(), strict=True))
        found = {name: getattr(selection, name).tolist() for name in ("scores", "weights", "match", "target_loss")}
        out.append({"indices": selection.indices.tolist(), "grads": grads(model), **found})
        optimizer.step()
        optimizer.zero_grad()
        out[-1]["parameters"] = values(dict(model.named_parameters()))
        if step == 0 and shard is layers:
            half = pool if rank is None else part(pool, 6 * rank, 6 * rank + 6)
            loss(model, half).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return out


def everything(rank):
    out = {name: steps(*options, "adamw", rank) for name, options in CASES.items()}
    for name in OPTIMIZERS:
        out[name] = steps(layers, "mlp", torch.float64, 7, {}, name, rank)
    return out


def close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        a, b = torch.tensor(ours[name], dtype=torch.float64), torch.tensor(theirs[name], dtype=torch.float64)
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + tolerance / 100, (name, a, b)


def test_ranks_choose_and_step_as_one_process():
    found = run(everything)
    for rank in range(WORLD):
        assert not isinstance(found[rank], str), found[rank]
    expected = everything(None)
    for name in expected:
        assert found[0][name] == found[1][name], name
        single = name == "float32"
        for ours, theirs in zip(found[0][name], expected[name], strict=True):
            assert ours["indices"] == theirs["indices"], name
            numbers = ("weights", "scores", "match", "target_loss")
            close({k: ours[k] for k in numbers}, {k: theirs[k] for k in numbers}, 1e-5 if single else 1e-10)
            close(ours["grads"], theirs["grads"], 1e-5 if single else 1e-10)
            close(ours["parameters"], theirs["parameters"], 1e-5 if single else 1e-10)
