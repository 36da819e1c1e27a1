"""A loop over processes that never hold the whole model (FSDP2): scores from forward passes, two steps a pool.

Start it with torchrun --nproc-per-node 2 examples/fsdp2_loop.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ftw_torch.distributed import DistributedFilterThenWeight
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def per_sample_loss(model, batch):
    """Return one loss a sample."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")  # (n,)


def draw(n, generator, noise=0.0):
    """Return points of three classes, some of them with a class drawn at random."""
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    labels = torch.randint(3, (n,), generator=generator)
    points = centres[labels] + torch.randn(n, 2, generator=generator)
    wrong = torch.rand(n, generator=generator) < noise
    return points, torch.where(wrong, torch.randint(3, (n,), generator=generator), labels)


def main():
    """Train, and return what was reached."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # "cuda" on GPUs, with batches moved there
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"score": "forward", "filter": "top_k", "weight": "uniform"}
    selector = DistributedFilterThenWeight(model, optimizer, per_sample_loss, keep=8, **options)

    own = torch.Generator().manual_seed(dist.get_rank())  # every rank has a pool and a target of its own
    losses = []
    for _ in range(20):
        pool, target = draw(32, own, noise=0.5), draw(8, own)
        for selection in selector.batches(pool, target, steps=2):
            optimizer.zero_grad()
            selector.weighted_loss(pool, selection).backward()
            optimizer.step()
        losses.append(float(selection.target_loss))
    if dist.get_rank() == 0:
        print(f"target loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
