"""Forward scores over processes: several steps a pool, what moves and how much, failures and refusals."""

import pytest
import torch
import torch.distributed as dist
from ftw_torch import FilterThenWeight
from ftw_torch.distributed import DistributedFilterThenWeight
from ranks import WORLD, case, part, run
from test_forward_ranks import FORWARD, close, grads, layers, replicas, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup


def setting(rank, shard, *, micro_batch=None, keep=3, fresh=False, **options):
    """Return a model on its ranks with a selector, and this rank's pool and target."""
    model, _, loss, pool, target = case("mlp")
    if rank is not None:
        shard(model)
        pool = part(pool, 0, 7) if rank == 0 else part(pool, 7, 12)
        target = part(target, 0, 1) if rank == 0 else part(target, 1, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    make = FilterThenWeight if rank is None else DistributedFilterThenWeight
    selector = make(model, optimizer, loss, keep=keep, micro_batch=micro_batch, **{**FORWARD, **options})
    if fresh:
        return model, optimizer, loss, pool, target, selector
    (loss(model, pool).sum() / 12 * (1 if rank is None else WORLD)).backward()
    if rank is not None and shard is replicas:
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= WORLD
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, loss, pool, target, selector


def several(rank, shard, options):
    """Return the selections of one pool, and the gradients of their weighted losses in turn."""
    model, optimizer, _, pool, target, selector = setting(rank, shard, **options)
    wrapped = nn.parallel.DistributedDataParallel(model) if rank is not None and shard is replicas else None
    out = []
    for selection in selector.batches(pool, target, steps=3):
        optimizer.zero_grad()
        more = {} if rank is None else {"model": wrapped}
        selector.weighted_loss(pool, selection, target, **more).backward()
        out.append((selection.indices.tolist(), selection.weights.tolist(), grads(model)))
        optimizer.step()
    return out


SEVERAL = {
    "shards": (layers, {}),
    "shards, target": (layers, {"train_on_target": 0.3}),
    "replicas": (replicas, {"train_on_target": 0.3}),
    "replicas, matching": (replicas, {"filter": "matching", "weight": "qp", "micro_batch": 2}),
}


def matched(rank):
    """Return a match over forward scores, whose shortlist is captured where it is."""
    model, _, _, pool, target, selector = setting(rank, replicas, filter="matching", weight="qp", micro_batch=2)
    selection = selector.backward(pool, target)
    return selection.indices.tolist(), {"weights": selection.weights.tolist(), **grads(model)}


def counted(rank):
    """Return the most layers that are whole at a time, the bytes sent, and those that FSDP2 gathers."""
    _, _, _, pool, target, selector = setting(rank, layers)
    live, most, sizes = set(), [0], {}
    up, down = FSDPParamGroup._to_unsharded, FSDPParamGroup._to_sharded

    def note(group):
        live.add(id(group))
        most[0] = max(most[0], len(live))
        return up(group)

    def forget(group):
        live.discard(id(group))
        return down(group)

    def counting(name):
        original = getattr(dist, name)

        def collective(*args, **kwargs):
            given = (
                next(kwargs[key] for key in ("input", "input_tensor") if key in kwargs) if len(args) < 2 else args[1]
            )
            sizes[name[:10]] = sizes.get(name[:10], 0) + given.numel() * given.element_size()
            return original(*args, **kwargs)

        return collective

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPParamGroup, "_to_unsharded", note)
        patch.setattr(FSDPParamGroup, "_to_sharded", forget)
        for names in (
            ("all_gather_single", "reduce_scatter_single"),
            ("all_gather_into_tensor", "reduce_scatter_tensor"),
        ):
            if hasattr(dist, names[0]):
                for name in names:
                    patch.setattr(dist, name, counting(name))
                break
        selector.backward(pool, target)
    assert not live
    return most[0], sizes["all_gather"], sizes["reduce_sca"], dict(selector.sent)


def faults(rank):
    """Return what is raised where one rank fails in its loss, and a plain step's gradients after each failure."""
    out = []
    for shard in (layers, replicas):
        for calls, place in (
            (0, "before"),
            (1, "before"),
            (1, "within"),
            (2, "within"),
            (3, "after"),
            (4, "before"),
            (4, "within"),
        ):
            if shard is replicas and (calls, place) == (4, "within"):
                continue
            model, _, loss, pool, target, selector = setting(rank, shard, keep=8, fresh=calls == 0)
            count = [0 if calls else -1]

            def broken(model, batch, calls=calls, place=place, loss=loss, count=count):
                count[0] += 1
                if rank == 1 and count[0] == calls:
                    if place == "within":
                        handle = model[2].register_forward_pre_hook(
                            lambda *args: (_ for _ in ()).throw(KeyError("mine"))
                        )
                        try:
                            return loss(model, batch)
                        finally:
                            handle.remove()
                    if place == "after":
                        loss(model, batch)
                    raise KeyError("mine")
                return loss(model, batch)

            selector.per_sample_loss = broken
            before = [whole(p.detach()).clone() for p in model.parameters()]
            with pytest.raises((KeyError, RuntimeError)) as caught:
                selector.backward(pool, target)
            assert all(p.grad is None for p in model.parameters())
            assert all(torch.equal(a, whole(p.detach())) for a, p in zip(before, model.parameters(), strict=True))
            selector.per_sample_loss = loss
            again = selector.backward(pool, target)
            out.append((str(caught.value), again.indices.tolist(), grads(model), calls == 0))
    return out


def everything(rank):
    found = {name: several(rank, *options) for name, options in SEVERAL.items()}
    found["matched"] = matched(rank)
    if rank is None:
        for name in ("fresh", "again"):
            model, _, _, pool, target, selector = setting(rank, replicas, keep=8, fresh=name == "fresh")
            found[name] = selector.backward(pool, target).indices.tolist(), grads(model)
    else:
        found["counted"] = counted(rank)
        found["faults"] = faults(rank)
        found["refused"] = refused(rank)
    return found


def refused(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    out = {}

    def message(
        name, shard=layers, make=DistributedFilterThenWeight, spoil=lambda model: None, batches=None, **options
    ):
        model, _, loss, pool, target = case("mlp")
        model = shard(model) or model
        spoil(model)
        options = {**FORWARD, **options}
        pool, target = (pool, target) if batches is None else batches(pool, target)
        with pytest.raises(ValueError) as caught:
            make(model, torch.optim.AdamW(model.parameters()), loss, keep=4, **options).backward(pool, target)
        out[name] = str(caught.value)

    message("fsdp1", lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")))
    message("offload", lambda model: fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)))
    message("deepspeed", replicas, spoil=lambda model: setattr(next(model.parameters()), "ds_id", 0))
    message("matching", filter="matching", weight="qp")
    message("idle", batches=lambda pool, target: (None, None) if rank else (pool, target))
    return out


def test_several_steps_failures_and_bytes():
    found = run(everything)
    for rank in range(WORLD):
        assert not isinstance(found[rank], str), found[rank]
    expected = everything(None)
    for name in SEVERAL:
        assert found[0][name] == found[1][name], name
        for (chosen, weights, update), (indices, w, g) in zip(found[0][name], expected[name], strict=True):
            assert chosen == indices, name
            close({"w": weights, **update}, {"w": w, **g}, 1e-7 if "matching" in name else 1e-10)
    assert found[0]["matched"][0] == found[1]["matched"][0] == expected["matched"][0]
    close(found[0]["matched"][1], expected["matched"][1], 1e-7)
    for rank in range(WORLD):
        most, gathered, reduced, sent = found[rank]["counted"]
        assert most <= 2
        assert sent["parameters"] == gathered
        assert sent["target"] + sent["update"] == reduced
        # docs/sharded.md: a rank's rows are 4, 3 and 2 of 7, 6 and 3; one micro-batch of each kind
        held = 8 * (4 * (5 + 1) + 3 * (7 + 1) + 2 * (6 + 1))
        assert sent["parameters"] == (2 + 2 + 2) * held
        assert sent["target"] == sent["update"] == WORLD * held
        assert sent["scores"] == 8 * (2 * 7 + 3)  # the most candidates of a rank, and the most target samples
        assert "state" not in sent
    for one, two in zip(found[0]["faults"], found[1]["faults"], strict=True):
        assert "rank 1: KeyError: 'mine'" in one[0]
        assert two[0] == "'mine'"
        assert one[1:] == two[1:]
        alone = expected["fresh" if one[3] else "again"]
        assert one[1] == alone[0]
        close(one[2], alone[1], 1e-10)
    said = found[0]["refused"]
    assert said == found[1]["refused"]
    for name in ("fsdp1", "offload", "deepspeed"):
        assert {"fsdp1": "FSDP1", "offload": "CPUOffloadPolicy", "deepspeed": "DeepSpeed ZeRO"}[name] in said[name]
        assert "offload_policy out" in said[name] or "fsdp_version: 2" in said[name]
    assert "filter='matching' with weight='qp'" in said["matching"]
    assert "filter='top_k' with weight='uniform'" in said["matching"]
    assert "rank 1 has neither" in said["idle"]
