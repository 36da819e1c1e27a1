"""Forward scores over shards: matrix optimizers, mixed precision, accumulation, and a rank that dies."""

import datetime
import os
import runpy
import socket
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ftw_torch import FilterThenWeight
from ftw_torch.capture.fsdp import cut_as
from ftw_torch.distributed import DistributedFilterThenWeight
from ranks import WORLD, case, part, run
from test_forward_ranks import FORWARD, close, grads, layers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Adafactor, Muon

EXAMPLE = Path(__file__).parents[2] / "examples/fsdp2_loop.py"
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def halves(rank, pool, target):
    if rank is None:
        return pool, target
    return part(pool, 6 * rank, 6 * rank + 6), part(target, 2 * rank, 2 * rank + 2)


def matrices(rank):
    """Return an update of Muon, whose response takes whole matrices; the other parameters are frozen."""
    model, _, loss, pool, target = case("gpt")
    for p in model.parameters():
        p.requires_grad_(p.ndim == 2)
    if rank is not None:
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = Muon([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(1)
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p]["momentum_buffer"] = cut_as(torch.randn(*p.shape, dtype=p.dtype), p)
    return chosen(rank, model, optimizer, loss, pool, target)


def rows_and_columns(rank):
    """Return an update of Adafactor, whose response has means over rows and columns."""
    model, _, loss, pool, target = case("mlp")
    if rank is not None:
        layers(model)
    return chosen(rank, model, Adafactor(model.parameters(), lr=1e-2), loss, pool, target)


def chosen(rank, model, optimizer, loss, pool, target):
    make = FilterThenWeight if rank is None else DistributedFilterThenWeight
    selector = make(model, optimizer, loss, keep=4, score_step=1e-2, **FORWARD)
    selection = selector.backward(*halves(rank, pool, target))
    if rank is not None:  # whole matrices are gathered for Muon alone
        assert ("state" in selector.sent) == (type(optimizer) is Muon)
    return selection.indices.tolist(), {"scores": selection.scores.tolist(), **grads(model)}


def mixed(rank):
    """Return the scores of a checkpointed model whose layers run in bfloat16."""
    model, _, loss, pool, target = case("mlp")
    cast = lambda x: tuple(y.float() if y.is_floating_point() else y for y in x)  # noqa: E731
    model, pool, target = model.float(), cast(pool), cast(target)
    if rank is None:
        before = FilterThenWeight(model, torch.optim.SGD(model.parameters()), loss, keep=4, guard=0).select(
            pool, target
        )
        return before.scores.tolist()
    model[2] = checkpoint_wrapper(model[2])
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh, mp_policy=BF16)
    fully_shard(model, mesh=mesh, mp_policy=BF16)
    optimizer = torch.optim.SGD(model.parameters())
    selector = DistributedFilterThenWeight(model, optimizer, loss, keep=4, **FORWARD)
    selection = selector.backward(*halves(rank, pool, target))
    grads(model)
    model.set_requires_gradient_sync(False)  # as while gradients accumulate
    again = DistributedFilterThenWeight(model, optimizer, loss, keep=4, **FORWARD)
    before = [p.grad.clone() for p in model.parameters()]
    again.backward(*halves(rank, pool, target))
    both = zip(model.parameters(), before, strict=True)
    doubled = all(torch.allclose(p.grad.to_local(), 2 * g.to_local()) for p, g in both)
    return selection.scores.tolist(), doubled


def everything(rank):
    found = {"muon": matrices(rank), "adafactor": rows_and_columns(rank), "mixed": mixed(rank)}
    if rank is not None:
        found["example"] = runpy.run_path(str(EXAMPLE))["main"]()
    return found


def test_matrix_optimizers_and_mixed_precision():
    found = run(everything)
    for rank in range(WORLD):
        assert not isinstance(found[rank], str), found[rank]
    expected = everything(None)
    for name in ("muon", "adafactor"):
        for rank in range(WORLD):
            assert found[rank][name][0] == expected[name][0]
            close(found[rank][name][1], expected[name][1], 1e-10)
    first, last = found[0]["example"]
    assert last < 0.8 * first
    assert found[1]["example"] == (first, last)
    scores, doubled = found[0]["mixed"]
    assert doubled
    ours, exact = torch.tensor(scores), torch.tensor(expected["mixed"])
    assert float(torch.corrcoef(torch.stack([ours, exact]))[0, 1]) > 0.99


def test_a_rank_that_dies():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        context = mp.start_processes(dying, (port, results), nprocs=WORLD, join=False, start_method="forkserver")
        for process in context.processes:
            process.join(60)
        took, said = results[0]
    assert took < 30  # the group's timeout is 5
    assert said


def dying(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=5))
    model, _, loss, pool, target = case("mlp")
    layers(model)

    def fatal(model, batch):
        if rank == 1:
            os._exit(1)
        return loss(model, batch)

    selector = DistributedFilterThenWeight(model, torch.optim.SGD(model.parameters()), fatal, keep=4, **FORWARD)
    start = time.monotonic()
    try:
        selector.backward(*halves(rank, pool, target))
    except RuntimeError as error:
        results[rank] = time.monotonic() - start, str(error)
    os._exit(0)
