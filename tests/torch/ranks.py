"""A few processes (gloo, CPU) that do a job, and the small cases that they do it on."""

import datetime
import multiprocessing
import os
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch_models as models

WORLD = 2


def work(rank, port, job, results, world):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    try:
        results[rank] = job(rank)
    except Exception as error:
        results[rank] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    finally:
        dist.destroy_process_group()


def run(job, world=WORLD):
    """Return what ``job(rank)`` gives on each of the processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch._dynamo", "torch_models"])
        context = mp.start_processes(
            work, (port, job, results, world), nprocs=world, join=False, start_method="forkserver"
        )
        assert context is not None
        for _ in range(12):
            if context.join(timeout=10):
                break
        else:
            for process in context.processes:
                process.kill()
            raise AssertionError("a process hangs")
        return [results[rank] for rank in range(world)]


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
